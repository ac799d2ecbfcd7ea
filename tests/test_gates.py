"""The verdict table, with the binomial tails in the comments, and what the gate promises, by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from perdure.config import GateConfig
from perdure.gates import Guard, Items, decide, least_budget
from perdure.repair import worth_repairing
from perdure.stats import items_needed, noninferiority_power
from perdure.types import Verdict

CONFIG = GateConfig(budget=0.02, prior_budget=0.02, significance=0.05, confidence=0.9)


def items(right: int, n: int, start: int = 0) -> dict[str, bool]:
    """``n`` items of which those from ``start`` on, ``right`` in number, are right."""
    return {f"i{place}": start <= place < start + right for place in range(n)}


def guard(before: Items | None, name: str = "old", budget: float = 0.02, **options: Any) -> Guard:
    return Guard(name, "skill", "v001", before, budget, **{"decisive": False} | options)


def verdict(guards: list[Guard], after: dict[str, Items], config: GateConfig = CONFIG) -> Verdict:
    """The verdict where the new skill itself is learned well."""
    return decide(config, "new", items(0, 40), {"new": items(30, 40)} | after, guards)


@pytest.mark.parametrize(
    ("before", "after", "decision"),
    [
        (items(0, 40), items(30, 40), "promoted"),
        (items(0, 40), items(5, 40), "promoted"),  # 5 of 5 changed items gained: 1/32 = 0.031
        (items(0, 80), items(4, 80), "refused"),  # 4 of 4: 1/16 = 0.0625
        (items(20, 40), items(20, 40), "refused"),  # unchanged
        (items(20, 40), items(20, 40, start=20), "refused"),  # all changed, none in sum
        (items(30, 40), items(5, 40), "refused"),  # got worse
        (items(40, 40), items(40, 40), "refused"),  # known already
    ],
)
def test_the_new_skill_must_be_learned(before, after, decision):
    result = decide(CONFIG, "new", before, {"new": after})
    assert result.decision == decision
    assert ("not learned" in result.reasons[0]) == (decision == "refused")
    assert result.table[0]["passed"] == (decision == "promoted")


def test_a_gain_that_so_few_items_cannot_show_is_held():
    result = decide(CONFIG, "new", items(0, 4), {"new": items(4, 4)})
    assert result.decision == "held" and "more test rows" in result.reasons[0]
    some = decide(CONFIG, "new", items(20, 40), {"new": items(27, 40, start=5)})  # 12 gained, 5 lost: p = 0.07
    assert some.decision == "held" and some.table[0]["change"] == pytest.approx(0.175)
    none = decide(CONFIG, "new", items(20, 40), {"new": items(22, 40)})
    assert none.decision == "refused" and "more test rows" not in none.reasons[0]


@pytest.mark.parametrize(
    ("before", "after", "decision"),
    [
        (items(80, 100), items(80, 100), "promoted"),  # nothing changed
        (items(80, 100), items(78, 100), "promoted"),  # -2 points: exactly the budget
        (items(80, 100), items(76, 100), "promoted"),  # -4, 4 of 4 lost: 1/16, could be chance
        (items(80, 100), items(75, 100), "refused"),  # -5, 5 of 5 lost: 1/32
        (items(80, 100), items(80, 100, start=20), "promoted"),  # 20 lost, 20 gained
        (items(80, 100), items(75, 100, start=25), "promoted"),  # 25 lost, 20 gained: P(X >= 25 | 45) = 0.28
        (items(80, 1000), items(75, 1000), "promoted"),  # significant, but half a point: within the budget
        (items(40, 100), items(90, 100), "promoted"),  # improved
    ],
)
def test_a_guard_may_lose_its_budget_or_what_chance_explains(before, after, decision):
    result = verdict([guard(before)], {"old": after})
    assert result.decision == decision
    row = result.table[1]
    assert row["name"] == "old" and row["kind"] == "skill" and row["budget"] == 0.02 and row["reference"] == "v001"
    assert row["before"] == sum(before.values()) / len(before)
    assert row["after"] == sum(after.values()) / len(after)
    assert row["change"] == pytest.approx(row["after"] - row["before"]) and row["n"] == len(before)
    assert ("got worse" in row["reason"]) == (decision == "refused")
    if decision == "refused":
        assert result.reasons == (row["reason"],)


def test_each_guard_has_its_own_budget():
    after = {"old": items(70, 100)}
    assert verdict([guard(items(80, 100))], after).decision == "refused"
    assert verdict([guard(items(80, 100), budget=0.2)], after).decision == "promoted"


def test_many_guards_share_the_significance():
    # 6 of 6 lost: 1/64 = 0.016, below 0.05 but above 0.05 / 4.
    old, others = guard(items(80, 100)), [guard(items(50, 100), f"o{i}") for i in range(3)]
    after = {"old": items(74, 100)} | {other.name: items(50, 100) for other in others}
    assert verdict([old], after).decision == "refused"
    assert verdict([old, *others], after).decision == "promoted"
    # Holm: beside three that are clearly worse (20 of 20), the fourth is tested at 0.05 again.
    worse = after | {other.name: items(30, 100) for other in others}
    reasons = verdict([old, *others], worse).reasons
    assert [reason.split(":")[0] for reason in reasons] == ["old", "o0", "o1", "o2"]  # every failed check is named


def test_the_best_of_several_versions_is_partly_luck():
    # 6 of 6 lost, 0.016: real against one version, not against the best of four.
    after = {"old": items(74, 100)}
    assert verdict([guard(items(80, 100), chosen_from=3)], after).decision == "refused"
    assert verdict([guard(items(80, 100), chosen_from=4)], after).decision == "promoted"


def test_small_accepted_losses_cannot_add_up():
    """Three stages lose 4 of 4, 4 of 4, 4 of 4 of 100: none is significant alone, and the third is against the best."""
    before, after = items(92, 100), {"old": items(88, 100)}
    assert verdict([guard(before)], after).decision == "promoted"
    best = Guard("old", "best ever", "v001", items(100, 100), 0.02, decisive=False, chosen_from=3)
    result = verdict([guard(before), best], after)
    assert result.decision == "refused" and "against v001, its best" in result.reasons[0]


def test_too_few_items_cannot_tell_and_hold():
    # Where twice the budget, 4 points, was lost in truth, 40 items show no change with 0.96^40 = 20 %, 60 with 9 %.
    assert verdict([guard(items(48, 60), decisive=True)], {"old": items(48, 60)}).decision == "promoted"
    result = verdict([guard(items(32, 40), decisive=True)], {"old": items(32, 40)})
    assert result.decision == "held" and "cannot tell" in result.reasons[0]
    needed = result.table[1]["needed"]
    assert f"about {needed}" in result.reasons[0]
    enough = verdict([guard(items(needed, needed), decisive=True)], {"old": items(needed, needed)})
    assert enough.decision == "promoted"
    fewer = int(0.9 * needed)
    assert verdict([guard(items(fewer, fewer), decisive=True)], {"old": items(fewer, fewer)}).decision == "held"


def test_what_is_worse_or_unlearned_is_refused_even_where_others_cannot_tell():
    few, worse = guard(items(10, 10), "few", decisive=True), guard(items(80, 100))
    result = verdict([few, worse], {"few": items(10, 10), "old": items(50, 100)})
    assert result.decision == "refused" and [reason.split(":")[0] for reason in result.reasons] == ["old", "few"]


def test_noise_raises_the_number_of_items_it_takes():
    quiet = items(300, 300)
    noisy = {name: int(name[1:]) >= 60 for name in quiet}
    other = {name: int(name[1:]) < 240 for name in quiet}
    assert verdict([guard(quiet, decisive=True)], {"old": quiet}).decision == "promoted"
    result = verdict([guard(noisy, decisive=True)], {"old": other})  # 60 lost, 60 gained
    assert result.decision == "held" and result.table[1]["needed"] > 1000


@pytest.mark.parametrize(("right", "n", "budget"), [(12, 120, 0.1), (16, 240, 0.07), (20, 240, 0.07)])
def test_a_skill_known_a_little_may_not_go_altogether(right, n, budget):
    """A budget that is as large as what there is does not allow to lose it all."""
    known = guard(items(right, n), budget=budget, decisive=True)
    result = verdict([known], {"old": items(0, n)})
    assert result.decision == "refused" and "got worse" in result.reasons[0]
    assert verdict([known], {"old": items(right, n)}).decision == "promoted"


def test_what_improved_is_not_held_for_want_of_items():
    """8 lost and 40 gained of 240: whatever the test's power against a loss, there was none."""
    old = items(178, 240)
    better = {name: (right and not 0 <= int(name[1:]) < 8) or 178 <= int(name[1:]) < 218 for name, right in old.items()}
    assert verdict([guard(old, budget=0.05, decisive=True)], {"old": better}).decision == "promoted"


def test_an_attempt_to_repair_is_strict_with_what_was_hurt_and_what_is_decisive():
    learned, three_lost = {"new": items(30, 40)}, items(97, 100)
    loose, decisive = guard(items(100, 100)), guard(items(100, 100), "sure", decisive=True)
    for name, hurt, decision in (("old", {"old"}, "refused"), ("old", set(), "promoted"), ("sure", set(), "refused")):
        one = loose if name == "old" else decisive
        result = decide(CONFIG, "new", items(0, 40), learned | {name: three_lost}, [one], hurt)
        assert result.decision == decision
    assert decide(CONFIG, "new", items(0, 40), learned | {"old": three_lost}, [loose]).decision == "promoted"


def test_a_capability_without_right_answers_has_nothing_to_lose():
    assert verdict([guard(items(0, 10), decisive=True)], {"old": items(0, 10)}).decision == "promoted"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, items(8, 10)),
        (items(8, 10), None),
        ({}, {}),
        (items(8, 10), items(8, 9)),
        ({"a": True}, {"b": True}),
    ],
)
def test_what_cannot_be_paired_refuses(before, after):
    result = verdict([guard(before)], {"old": after} if after is not None else {})
    assert result.decision == "refused"
    assert "old" in result.reasons[0] and "cannot be judged" in result.reasons[0]
    assert result.table[1]["p_value"] is None and not result.table[1]["passed"]
    swapped = decide(CONFIG, "old", before, {"old": after} if after is not None else {})
    assert swapped.decision == "refused" and "cannot be judged" in swapped.reasons[0]


def test_items_are_paired_by_id_whatever_their_order():
    before = {"a": True, "b": False, **items(20, 40)}
    row = verdict([guard(before)], {"old": dict(reversed(before.items()))}).table[1]
    assert row["change"] == 0 and row["p_value"] == 1.0


def test_the_verdict_is_the_same_when_it_is_not_enforced():
    guards, after = [guard(items(80, 100))], {"old": items(20, 100)}
    assert verdict(guards, after, GateConfig(enforce=False)) == verdict(guards, after, GateConfig())


def test_a_skill_that_is_taught_again_may_gain_or_be_kept():
    def again(before: Items, after: Items, known: float | None = 0.05) -> Verdict:
        return decide(CONFIG, "new", before, {"new": after}, known=known)

    same = items(360, 400)
    assert again(same, same, None).decision == "refused"
    found = again(same, same)
    assert found.decision == "promoted" and found.table[0]["verdict"] == "kept" and worth_repairing(found) is False
    assert again(same, items(380, 400)).table[0]["verdict"] == "learned"
    worse = again(same, items(320, 400))
    assert worse.decision == "refused" and "new: got worse, 90.0% to 80.0%" in worse.reasons[0]
    assert again(items(36, 40), items(36, 40), 0.01).decision == "held"  # so few items cannot show that it was kept
    assert again(items(36, 40), {"other": True}).decision == "refused"
    harm = Guard("old", "skill", "v001", items(400, 400), 0.05)
    harmed = decide(CONFIG, "new", same, {"new": same, "old": items(300, 400)}, [harm], known=0.05)
    assert harmed.decision == "refused" and worth_repairing(harmed)


def test_least_budget_is_what_the_items_can_judge():
    for n, guards in ((120, 1), (300, 9)):
        budget = least_budget(n, guards, CONFIG, 0.01)
        passes = [noninferiority_power(n, 2 * b, 0.01, 0.1) for b in (budget, budget - 0.001)]
        assert passes[0] >= 1 - 0.1 / guards > passes[1]


# What the gate promises: true losses and noise as a model would show them, 400 candidates each


def simulate(n: int, guards: int, loss: float, noise: float, seed: int = 0, runs: int = 400) -> dict[str, float]:
    """Shares of the verdicts when the first guard truly loses ``loss`` and every guard's items change by ``noise`` each
    way; the new skill is learned."""
    rng = np.random.default_rng(seed)
    counts = {"promoted": 0, "held": 0, "refused": 0}
    before = items(round(0.8 * n), n)
    right, wrong = [i for i, ok in before.items() if ok], [i for i, ok in before.items() if not ok]
    for _ in range(runs):
        after = {}
        for number in range(guards):
            lost = rng.random(len(right)) < (noise + (loss if number == 0 else 0.0)) * n / len(right)
            gained = rng.random(len(wrong)) < noise * n / len(wrong)
            after[f"g{number}"] = before | {
                i: False for i, gone in zip(right, lost, strict=True) if gone
            } | {i: True for i, came in zip(wrong, gained, strict=True) if came}  # fmt: skip
        kept = [guard(before, f"g{number}", decisive=True) for number in range(guards)]
        counts[verdict(kept, after).decision] += 1
    return {name: count / runs for name, count in counts.items()}


@pytest.mark.parametrize(("n", "guards", "noise"), [(100, 3, 0.03), (300, 1, 0.02), (300, 8, 0.05), (1200, 8, 0.02)])
def test_without_a_true_loss_at_most_one_stage_in_twenty_is_refused(n, guards, noise):
    """And the simulation's error."""
    assert simulate(n, guards, 0.0, noise)["refused"] <= 0.05 + 0.02


def test_a_loss_of_twice_the_budget_is_found_on_300_items():
    assert simulate(300, 1, 0.04, 0.0)["refused"] >= 0.9
    assert simulate(300, 6, 0.04, 0.0)["refused"] >= 0.9


@pytest.mark.parametrize(("n", "guards", "noise"), [(60, 1, 0.0), (300, 1, 0.01), (300, 8, 0.05), (900, 8, 0.02)])
def test_a_loss_of_twice_the_budget_is_hardly_ever_promoted(n, guards, noise):
    """Whatever the number of items and the noise: what is not found is held. One in ten, and the simulation's error."""
    assert simulate(n, guards, 0.04, noise)["promoted"] <= 0.1 + 0.02


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_cannot_tell_begins_where_the_calculation_says(noise):
    needed = items_needed(0.04, noise, 0.1, 0.9)
    assert needed
    told, fewer = (simulate(n, 1, 0.0, noise, seed=n)["promoted"] for n in (needed, needed // 2))
    assert told == pytest.approx(noninferiority_power(needed, 0.04, noise, 0.1), abs=0.05) and fewer < told - 0.1


@pytest.mark.parametrize(("n", "noise"), [(240, 0.02), (400, 0.03)])
def test_without_a_loss_a_usual_number_of_rows_suffices(n, noise):
    assert simulate(n, 1, 0.0, noise)["promoted"] >= 0.85


# Conversations


def talks(right: int, of: int, turns: int) -> dict[str, bool]:
    """``of`` conversations of ``turns`` turns each; of the first ``right`` every turn is right."""
    return {f"c{talk}/{turn}": talk < right for talk in range(of) for turn in range(turns)}


def of_talk(items: Items) -> dict[str, str]:
    return {name: name.partition("/")[0] for name in items}


def test_turns_of_a_conversation_are_no_independent_items():
    """Three conversations lost whole are 15 items of 15 changed, and three throws of a coin: p = 1/8."""
    before, after = talks(30, 40, 5), talks(27, 40, 5)
    alone = verdict([guard(before)], {"old": after})
    assert alone.decision == "refused" and alone.table[1]["p_value"] == pytest.approx(2**-15)
    together = verdict([guard(before, together=of_talk(before))], {"old": after})
    assert together.decision == "promoted" and together.table[1]["p_value"] == pytest.approx(2**-3)
    assert "on 200 items, 40 of them independent" in together.table[1]["reason"]
    assert together.table[1]["change"] == pytest.approx(-3 / 40) and together.table[1]["n"] == 200
    judged = verdict([guard(before, decisive=True, together=of_talk(before))], {"old": after})
    assert (
        judged.decision == "held" and f"takes about {judged.table[1]['needed']} independent ones" in judged.reasons[0]
    )


def test_a_skill_of_conversations_is_learned_by_conversations():
    before, after = talks(0, 10, 8), talks(4, 10, 8)
    assert decide(CONFIG, "new", before, {"new": after}).decision == "promoted"
    together = decide(CONFIG, "new", before, {"new": after}, together=of_talk(before))
    assert together.table[0]["p_value"] == pytest.approx(2**-4) and together.decision == "held"  # a gain of 40 %


def test_what_the_turns_of_a_conversation_lost_and_gained_cancels():
    before = {"c/1": True, "c/2": False, "d/1": True, "d/2": True, "e": True}
    after = {"c/1": False, "c/2": True, "d/1": True, "d/2": False, "e": True}
    row = verdict([guard(before, together={k: k[0] for k in before if "/" in k})], {"old": after}).table[1]
    assert row["p_value"] == pytest.approx(1 / 2) and "5 items, 3 of them independent" in row["reason"]


def test_turns_that_depend_on_each_other_leave_the_gate_its_word():
    """True losses of twice the budget that come as whole conversations: promoted in at most one case of ten."""
    rng, promoted = np.random.default_rng(0), 0
    before = talks(120, 120, 4)
    for _ in range(300):
        gone = rng.random(120) < 0.08
        after = {name: not gone[int(name[1:].partition("/")[0])] for name in before}
        one = guard(before, budget=0.04, decisive=True, together=of_talk(before))
        promoted += verdict([one], {"old": after}).decision == "promoted"
    assert promoted <= 0.1 * 300 + 2 * (300 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize(
    "case", ["whole conversations", "few that lose much, as many that gain one", "long ones break"]
)
def test_a_share_of_all_turns_that_is_lost_in_few_conversations(case: str):
    """True losses of twice the budget, however they fall on the conversations: hardly ever promoted."""
    rng, promoted, runs = np.random.default_rng(1), 0, 100
    sizes = [20 if talk % 10 == 0 else 2 for talk in range(400)] if case == "long ones break" else [10] * 400
    names = {f"c{talk}/{turn}": (talk, turn) for talk, size in enumerate(sizes) for turn in range(size)}
    talks_of = {name: f"c{talk}" for name, (talk, _) in names.items()}
    before = {name: turn > 0 for name, (_, turn) in names.items()}  # the first turn is wrong
    for _ in range(runs):
        draw = rng.random(400)
        if case == "whole conversations":
            lost, won = draw < 0.045, draw > 2
        elif case == "long ones break":
            lost, won = (draw < 0.081) & (np.array(sizes) == 20), draw > 2
        else:
            lost, won = draw < 0.05, (draw > 0.5) & (draw < 0.55)
        after = {name: (before[name] and not lost[talk]) or (turn == 0 and bool(won[talk]))
                 for name, (talk, turn) in names.items()}  # fmt: skip
        one = guard(before, budget=0.02, decisive=True, together=talks_of)
        promoted += verdict([one], {"old": after}).decision == "promoted"
    assert promoted <= 0.25 * runs
