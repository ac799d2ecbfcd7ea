"""Is a candidate allowed to become the champion? Paired tests on per-item results, and three answers: promoted, held
(the items cannot tell), refused.

The promise, at the default settings and of a stage's first candidate: one that harms nothing is refused in at most 5 %
of stages, and one that costs an earlier skill, or all prior tasks together, twice the budget is promoted in at most
10 %, however few items there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perdure.config import GateConfig
from perdure.stats import holm, items_needed, mcnemar_one_sided, noninferiority_p, noninferiority_power
from perdure.types import Verdict

Items = Mapping[str, bool]
"""Item id -> right or wrong."""

CANNOT_TELL = "cannot tell"
TELLING_GAIN = 0.1
"""A gain of the new skill that is so large and not significant is no sign that nothing was learned."""
USUAL_NOISE = 0.02
"""Share of items that change each way between versions without meaning; seen in the demo: 0 to 0.06 (docs/log.md)."""


@dataclass(frozen=True)
class Guard:
    """Something that must not get worse."""

    name: str
    """Its key among the candidate's items."""
    kind: str
    """``skill`` (against the champion), ``best ever``, ``prior`` (one task) or ``priors`` (all tasks together)."""
    reference: str
    """The version compared with."""
    before: Items | None
    """That version's items; None where there are none."""
    budget: float
    """Accuracy that it may lose, 0..1."""
    decisive: bool = True
    """Its items alone must show that the loss is less than twice the budget."""
    chosen_from: int = 1
    """Versions among which the reference was picked as the best: the best of several noisy results is partly luck, so
    the p-value is multiplied by their number."""


def decide(config: GateConfig, skill: str, before: Items | None, after: Mapping[str, Items],
           guards: Sequence[Guard] = (), hurt: Collection[str] | None = None) -> Verdict:  # fmt: skip
    """The verdict on a candidate: ``promoted``, ``held`` or ``refused``, with every failed check among the reasons.

    The new ``skill`` must gain significantly over ``before`` (one-sided exact McNemar test). A guard is refused when it
    lost more than its budget, or more than half of what it had, and the loss is significant (the same test the other
    way, Holm over all guards). A decisive guard is held unless its items show, with ``config.confidence``, that the
    true loss is less than twice its budget (``stats.noninferiority_p``). What has no results on the same items is
    refused. ``hurt``: names of guards that an earlier attempt hurt; these and the decisive ones are then refused by any
    loss beyond the budget, significant or not.

    ``config.enforce`` changes nothing here: whoever promotes looks at it.
    """
    return _verdict([_gain(config, skill, before, after.get(skill)), *_losses(config, after, guards, hurt)])


def decide_kept(config: GateConfig, after: Mapping[str, Items], guards: Sequence[Guard]) -> Verdict:
    """The verdict on a candidate that was taught nothing new: it must keep every guard, as in ``decide``."""
    return _verdict(_losses(config, after, guards, None))


def _losses(
    config: GateConfig, after: Mapping[str, Items], guards: Sequence[Guard], hurt: Collection[str] | None
) -> list[dict[str, Any]]:
    pairs = [_paired(guard.before, after.get(guard.name)) for guard in guards]
    p_values = [
        min(1.0, guard.chosen_from * mcnemar_one_sided(*pair, alternative="worse")) if pair else 1.0
        for guard, pair in zip(guards, pairs, strict=True)
    ]
    significant = holm(p_values, config.significance)
    strict = [hurt is not None and (guard.decisive or guard.name in hurt) for guard in guards]
    return [
        _loss(guard, pair, p_value, real or any_loss, config.confidence)
        for guard, pair, p_value, real, any_loss in zip(guards, pairs, p_values, significant, strict, strict=True)
    ]


def _verdict(rows: Sequence[dict[str, Any]]) -> Verdict:
    failed = sorted((row for row in rows if not row["passed"]), key=lambda row: row["verdict"] == CANNOT_TELL)
    reasons = tuple(row["reason"] for row in failed or rows) or ("There is nothing that could have got worse.",)
    if not failed:
        return Verdict("promoted", reasons, tuple(rows))
    return Verdict("held" if failed[0]["verdict"] == CANNOT_TELL else "refused", reasons, tuple(rows))


def _paired(old: Items | None, new: Items | None) -> tuple[list[bool], list[bool]] | None:
    """The same items before and after, in one order; None when they cannot be paired."""
    if not old or not new or old.keys() != new.keys():
        return None
    return [old[item] for item in old], [new[item] for item in old]


def _row(name: str, kind: str, pair: tuple[list[bool], list[bool]] | None, **more: Any) -> dict[str, Any]:
    row = {"name": name, "kind": kind, "before": None, "after": None, "change": None, "n": 0, "p_value": None,
           "budget": None, "reference": None, "needed": None} | more  # fmt: skip
    if pair is None:
        reason = f"{name}: there is no result before and after on the same items, so it cannot be judged."
        return row | {"p_value": None, "verdict": "not measured", "passed": False, "reason": reason}
    (old, new), n = pair, len(pair[0])
    return row | {"before": sum(old) / n, "after": sum(new) / n, "change": (sum(new) - sum(old)) / n, "n": n}


def _gain(config: GateConfig, skill: str, before: Items | None, after: Items | None) -> dict[str, Any]:
    pair = _paired(before, after)
    p_value = mcnemar_one_sided(*pair, alternative="better") if pair else None
    row = _row(skill, "new skill", pair, p_value=p_value)
    if pair is None or p_value is None:
        return row
    real = row["change"] > 0 and p_value <= config.significance
    row["verdict"] = "learned" if real else "not learned"
    numbers = f"{row['before']:.0%} to {row['after']:.0%} on {row['n']} items (p = {p_value:.2g})"
    row["reason"] = f"{skill}: {row['verdict']}, {numbers}."
    blind = row["change"] > 0 and 0.5 ** pair[0].count(False) > config.significance
    if not real and (blind or row["change"] >= TELLING_GAIN):
        row["verdict"] = CANNOT_TELL
        row["reason"] = f"{skill}: {numbers}; so few items cannot show a gain: teach it with more test rows."
    return row | {"passed": real}


def _loss(guard: Guard, pair: tuple[list[bool], list[bool]] | None, p_value: float, counts: bool,
          confidence: float) -> dict[str, Any]:  # fmt: skip
    """A guard's row of the verdict; ``counts``: whether a loss beyond what is allowed is one."""
    row = _row(guard.name, guard.kind, pair, budget=guard.budget, reference=guard.reference, p_value=p_value)
    if pair is None:
        return row
    label = "all prior tasks together" if guard.kind == "priors" else guard.name
    against = f" against {guard.reference}, its best" if guard.kind == "best ever" else ""
    numbers = f"{row['before']:.1%} to {row['after']:.1%}{against} on {row['n']} items (p = {p_value:.2g})"
    # A budget is meant for what is known well: of a skill with less than twice of it, half may not go either.
    if counts and row["change"] < -min(guard.budget, row["before"] / 2):
        reason = f"{label}: got worse, {numbers}, budget {guard.budget:.1%}."
        return row | {"verdict": "worse", "passed": False, "reason": reason}
    if not guard.decisive or _is_kept(guard, pair, confidence):
        return row | {"verdict": "kept", "passed": True, "reason": f"{label}: kept, {numbers}."}
    needed = items_needed(_twice(guard, pair), _noise(pair), 1 - confidence, confidence)
    row["needed"] = needed
    asked = f"a version without any loss takes about {needed}" if needed else "a million cannot either"
    reason = (
        f"{label}: cannot tell, {numbers}: so few items cannot show that less than twice the budget of "
        f"{guard.budget:.1%} was lost ({asked}). Set gate.budget to what they can judge, or teach it with more rows."
    )
    return row | {"verdict": CANNOT_TELL, "passed": False, "reason": reason}


def _twice(guard: Guard, pair: tuple[list[bool], list[bool]]) -> float:
    """The loss that must be shown not to be: twice the budget, or all that there was."""
    return min(2 * guard.budget, sum(pair[0]) / len(pair[0]))


def _is_kept(guard: Guard, pair: tuple[list[bool], list[bool]], confidence: float) -> bool:
    """Whether the items show that the true loss is less than ``_twice``. What holds no more right answers than the
    budget has nothing to lose beyond it."""
    loss = _twice(guard, pair)
    if loss <= guard.budget:
        return True
    lost, gained = _changed(pair)
    return noninferiority_p(len(pair[0]), lost, gained, loss) <= 1 - confidence


def _changed(pair: tuple[list[bool], list[bool]]) -> tuple[int, int]:
    """Items that became wrong, and items that became right."""
    lost = sum(old and not new for old, new in zip(*pair, strict=True))
    return lost, sum(new and not old for old, new in zip(*pair, strict=True))


def _noise(pair: tuple[list[bool], list[bool]]) -> float:
    """Share of the items that changed each way: what goes on without any loss."""
    return min(_changed(pair)) / len(pair[0])


def guards_of(skills: int, tasks: int) -> int:
    """Guards of a stage: each earlier skill, each prior task, and where there are several of these all together."""
    return skills + tasks + (tasks > 1)


def least_budget(n: int, guards: int, config: GateConfig, noise: float) -> float:
    """The smallest budget (in whole tenths of a point) by which ``n`` items a guard let a version without any loss pass
    so many guards with the gate's confidence."""
    wanted = 1 - (1 - config.confidence) / max(1, guards)
    for tenths in range(1, 500):
        if noninferiority_power(n, tenths / 500, noise, 1 - config.confidence) >= wanted:
            return tenths / 1000
    return 0.5
