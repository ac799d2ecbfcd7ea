"""The verdict table, with the binomial tails in the comments."""

import pytest

from perdure.config import GateConfig
from perdure.gates import decide

CONFIG = GateConfig(budget=0.02, significance=0.05)


def items(right: int, n: int, start: int = 0) -> dict[str, bool]:
    """``n`` items of which those from ``start`` on, ``right`` in number, are right."""
    return {f"i{place}": start <= place < start + right for place in range(n)}


LEARNED = ({"new": items(0, 40)}, {"new": items(30, 40)})


def verdict(before, after, kept=None, config=CONFIG, budgets=None):
    """The verdict where the new skill itself is learned well."""
    return decide(config, "new", LEARNED[0] | before, LEARNED[1] | after, kept or {}, budgets)


@pytest.mark.parametrize(
    ("before", "after", "decision"),
    [
        (items(0, 40), items(30, 40), "promoted"),
        (items(0, 40), items(5, 40), "promoted"),  # 5 of 5 changed items gained: 1/32 = 0.031
        (items(0, 40), items(4, 40), "refused"),  # 4 of 4: 1/16 = 0.0625
        (items(20, 40), items(20, 40), "refused"),  # unchanged
        (items(20, 40), items(20, 40, start=20), "refused"),  # all changed, none in sum
        (items(30, 40), items(5, 40), "refused"),  # got worse
        (items(40, 40), items(40, 40), "refused"),  # known already
    ],
)
def test_the_new_skill_must_be_learned(before, after, decision):
    result = decide(CONFIG, "new", {"new": before}, {"new": after}, {})
    assert result.decision == decision
    assert ("not learned" in result.reasons[0]) == (decision == "refused")
    assert result.table[0]["passed"] == (decision == "promoted")


def test_a_gain_that_so_few_items_cannot_show_says_so():
    result = decide(CONFIG, "new", {"new": items(0, 4)}, {"new": items(4, 4)}, {})
    assert result.decision == "refused" and "add test rows" in result.reasons[0]
    enough = decide(CONFIG, "new", {"new": items(0, 5)}, {"new": items(4, 5)}, {})
    assert enough.decision == "refused" and "add test rows" not in enough.reasons[0]


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
def test_an_earlier_skill_may_lose_its_budget_or_what_chance_explains(before, after, decision):
    result = verdict({"old": before}, {"old": after}, {"old": "skill"})
    assert result.decision == decision
    row = result.table[1]
    assert row["name"] == "old" and row["kind"] == "skill" and row["budget"] == 0.02
    assert row["before"] == sum(before.values()) / len(before)
    assert row["after"] == sum(after.values()) / len(after)
    assert row["change"] == pytest.approx(row["after"] - row["before"]) and row["n"] == len(before)
    assert ("got worse" in row["reason"]) == (decision == "refused")
    if decision == "refused":
        assert result.reasons == (row["reason"],)


def test_a_skills_own_budget_counts():
    before, after = {"old": items(80, 100)}, {"old": items(70, 100)}
    assert verdict(before, after, {"old": "skill"}).decision == "refused"
    assert verdict(before, after, {"old": "skill"}, budgets={"old": 0.2}).decision == "promoted"
    assert verdict(before, after, {"old": "skill"}, budgets={"other": 0.2}).decision == "refused"
    strict = GateConfig(budget=0.0)
    assert verdict({"old": items(80, 1000)}, {"old": items(75, 1000)}, {"old": "skill"}, strict).decision == "refused"


def test_many_kept_names_share_the_significance():
    # 6 of 6 lost: 1/64 = 0.016, below 0.05 but above 0.05 / 4.
    before, after = {"old": items(80, 100)}, {"old": items(74, 100)}
    others = {f"o{i}": items(50, 100) for i in range(3)}
    assert verdict(before, after, {"old": "skill"}).decision == "refused"
    kept = {"old": "skill"} | dict.fromkeys(others, "skill")
    assert verdict(before | others, after | others, kept).decision == "promoted"


def test_a_loss_on_too_few_items_cannot_be_judged_and_refuses():
    # Even 4 of 4 lost is 1/16: the test can never find it, so "not significant" means nothing.
    result = verdict({"old": items(4, 4)}, {"old": items(0, 4)}, {"old": "skill"})
    assert result.decision == "refused" and "cannot be judged" in result.reasons[0]
    assert verdict({"old": items(4, 4)}, {"old": items(4, 4)}, {"old": "skill"}).decision == "promoted"
    assert verdict({"old": items(0, 4)}, {"old": items(0, 4)}, {"old": "skill"}).decision == "promoted"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"old": items(8, 10)}),
        ({"old": items(8, 10)}, {}),
        ({"old": {}}, {"old": {}}),
        ({"old": items(8, 10)}, {"old": items(8, 9)}),
        ({"old": {"a": True}}, {"old": {"b": True}}),
    ],
)
def test_what_cannot_be_paired_refuses(before, after):
    result = verdict(before, after, {"old": "skill"})
    assert result.decision == "refused"
    assert "old" in result.reasons[0] and "cannot be judged" in result.reasons[0]
    assert result.table[1]["p_value"] is None and not result.table[1]["passed"]
    swapped = decide(CONFIG, "old", before, after, {})
    assert swapped.decision == "refused" and "cannot be judged" in swapped.reasons[0]


def test_items_are_paired_by_id_whatever_their_order():
    before = {"a": True, "b": False, **items(20, 40)}
    after = dict(reversed(before.items()))
    row = verdict({"old": before}, {"old": after}, {"old": "skill"}).table[1]
    assert row["change"] == 0 and row["p_value"] == 1.0


def test_prior_capabilities_are_kept_like_skills():
    kept = {"probe/piqa": "prior", "old": "skill"}
    before = {"probe/piqa": items(70, 100), "old": items(80, 100)}
    good = verdict(before, {"probe/piqa": items(69, 100), "old": items(80, 100)}, kept)
    assert good.decision == "promoted"
    assert [row["kind"] for row in good.table] == ["new skill", "prior", "skill"]
    bad = verdict(before, {"probe/piqa": items(50, 100), "old": items(40, 100)}, kept)
    assert bad.decision == "refused"
    assert [reason.split(":")[0] for reason in bad.reasons] == ["probe/piqa", "old"]  # every failed check is named


def test_the_verdict_is_the_same_when_it_is_not_enforced():
    kept = {"old": "skill"}
    before, after = {"old": items(80, 100)}, {"old": items(20, 100)}
    assert verdict(before, after, kept, GateConfig(enforce=False)) == verdict(before, after, kept, GateConfig())
