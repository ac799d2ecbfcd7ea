"""Is a candidate allowed to become the champion? Paired tests on per-item results, and three answers: promoted, held
(the items cannot tell), refused.

The promise, at the default settings: a candidate that harms nothing is refused in at most 5 % of stages, and one that
costs a guarded capability twice its budget is promoted in at most 10 %, however few items there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perdure.config import GateConfig
from perdure.stats import holm, items_needed, mcnemar_one_sided, mcnemar_power
from perdure.types import Verdict

Items = Mapping[str, bool]
"""Item id -> right or wrong."""

CANNOT_TELL = "cannot tell"
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
    """Its items alone must be able to show a loss of twice the budget."""
    chosen_from: int = 1
    """Versions among which the reference was picked as the best: the best of several noisy results is partly luck, so
    the p-value is multiplied by their number."""


def decide(config: GateConfig, skill: str, before: Items | None, after: Mapping[str, Items],
           guards: Sequence[Guard] = (), strict: bool = False) -> Verdict:  # fmt: skip
    """The verdict on a candidate: ``promoted``, ``held`` or ``refused``, with every failed check among the reasons.

    The new ``skill`` must gain significantly over ``before`` (one-sided exact McNemar test). A guard is refused when it
    lost more than its budget and the loss is significant (the same test the other way, Holm over all guards). A
    decisive guard is held when a true loss of twice its budget would be found with less than ``config.power``, by the
    exact power of the test on so many items, with as much noise as was seen (items that changed each way). What has no
    results on the same items is refused. ``strict``: a loss beyond the budget is refused, significant or not.

    ``config.enforce`` changes nothing here: whoever promotes looks at it.
    """
    return _verdict([_gain(config, skill, before, after.get(skill)), *_losses(config, after, guards, strict)])


def decide_kept(config: GateConfig, after: Mapping[str, Items], guards: Sequence[Guard]) -> Verdict:
    """The verdict on a candidate that was taught nothing new: it must keep every guard, as in ``decide``."""
    return _verdict(_losses(config, after, guards, False))


def _losses(
    config: GateConfig, after: Mapping[str, Items], guards: Sequence[Guard], strict: bool
) -> list[dict[str, Any]]:
    pairs = [_paired(guard.before, after.get(guard.name)) for guard in guards]
    p_values = [
        min(1.0, guard.chosen_from * mcnemar_one_sided(*pair, alternative="worse")) if pair else 1.0
        for guard, pair in zip(guards, pairs, strict=True)
    ]
    significant = holm(p_values, config.significance)
    level = config.significance / max(1, len(guards))
    return [
        _loss(guard, pair, p_value, real or strict, level, config.power)
        for guard, pair, p_value, real in zip(guards, pairs, p_values, significant, strict=True)
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
    if not real and row["change"] > 0 and 0.5 ** pair[0].count(False) > config.significance:
        row["verdict"] = CANNOT_TELL
        row["reason"] = f"{skill}: {numbers}; so few items cannot show a gain: add test rows."
    return row | {"passed": real}


def _loss(guard: Guard, pair: tuple[list[bool], list[bool]] | None, p_value: float, counts: bool, level: float,
          power: float) -> dict[str, Any]:  # fmt: skip
    row = _row(guard.name, guard.kind, pair, budget=guard.budget, reference=guard.reference, p_value=p_value)
    if pair is None:
        return row
    label = "all prior tasks together" if guard.kind == "priors" else guard.name
    against = f" against {guard.reference}, its best" if guard.kind == "best ever" else ""
    numbers = f"{row['before']:.1%} to {row['after']:.1%}{against} on {row['n']} items (p = {p_value:.2g})"
    if counts and row["change"] < -guard.budget:
        reason = f"{label}: got worse, {numbers}, budget {guard.budget:.1%}."
        return row | {"verdict": "worse", "passed": False, "reason": reason}
    if not guard.decisive or _can_tell(guard, pair, level, power):
        return row | {"verdict": "kept", "passed": True, "reason": f"{label}: kept, {numbers}."}
    needed = items_needed(2 * guard.budget, _noise(pair), level, power, guard.budget)
    row["needed"] = needed
    asked = f"that takes about {needed}" if needed else "a million cannot either"
    reason = (
        f"{label}: cannot tell, {numbers}: so few items cannot show a loss of twice the budget of "
        f"{guard.budget:.1%} ({asked}). Set gate.budget to what they can judge, or teach it with more test rows."
    )
    return row | {"verdict": CANNOT_TELL, "passed": False, "reason": reason}


def _noise(pair: tuple[list[bool], list[bool]]) -> float:
    """Share of the items that changed each way: what goes on without any loss."""
    lost = sum(old and not new for old, new in zip(*pair, strict=True))
    gained = sum(new and not old for old, new in zip(*pair, strict=True))
    return min(lost, gained) / len(pair[0])


def _can_tell(guard: Guard, pair: tuple[list[bool], list[bool]], level: float, power: float) -> bool:
    """A capability that holds no more right answers than the budget has nothing to lose beyond it."""
    n, right = len(pair[0]), sum(pair[0])
    loss = min(2 * guard.budget, right / n)
    if loss <= guard.budget:
        return True
    noise = min(_noise(pair), (1 - loss) / 2)
    return mcnemar_power(n, loss, noise, level, guard.budget) >= power


def guards_of(skills: int, tasks: int) -> int:
    """Guards of a stage: each earlier skill, each prior task, and where there are several of these all together."""
    return skills + tasks + (tasks > 1)


def least_budget(n: int, guards: int, config: GateConfig, noise: float) -> float:
    """The smallest budget (in whole tenths of a point) that ``n`` items can judge beside so many guards."""
    for tenths in range(1, 500):
        budget = tenths / 1000
        level = config.significance / max(1, guards)
        if mcnemar_power(n, 2 * budget, min(noise, (1 - 2 * budget) / 2), level, budget) >= config.power:
            return budget
    return 0.5
