"""Is a candidate allowed to become the champion? Paired tests on per-item results; what cannot be judged is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perdure.config import GateConfig
from perdure.stats import mcnemar_one_sided
from perdure.types import Verdict

Items = Mapping[str, bool]
"""Item id -> right or wrong."""


def decide(config: GateConfig, skill: str, before: Mapping[str, Items], after: Mapping[str, Items],
           kept: Mapping[str, str], budgets: Mapping[str, float] | None = None) -> Verdict:  # fmt: skip
    """The verdict on a candidate: ``promoted``, or ``refused`` with every failed check among the reasons.

    ``before`` and ``after`` hold the champion's and the candidate's items by name, the new ``skill`` among them;
    ``kept`` maps every other name that must not get worse to its kind (``skill`` or ``prior``). The new skill must
    gain significantly; a kept one is refused when it lost more than its budget and the loss is significant (one-sided
    exact McNemar test, Bonferroni over the kept names). What cannot be judged is refused: a missing or mismatched
    result, and a loss beyond the budget on so few items that no loss could be significant.

    ``config.enforce`` changes nothing here: whoever promotes looks at it.
    """
    rows = [_gain(config, skill, before, after)]
    level = config.significance / max(1, len(kept))
    for name, kind in kept.items():
        budget = (budgets or {}).get(name, config.budget)
        rows.append(_loss(name, kind, before, after, budget, level))
    failed = [row for row in rows if not row["passed"]]
    if failed:
        return Verdict("refused", tuple(row["reason"] for row in failed), tuple(rows))
    return Verdict("promoted", tuple(row["reason"] for row in rows), tuple(rows))


def _pairs(name: str, before: Mapping[str, Items], after: Mapping[str, Items]) -> tuple[list[bool], list[bool]] | None:
    """The same items before and after, in one order; None when they cannot be paired."""
    old, new = before.get(name), after.get(name)
    if not old or not new or old.keys() != new.keys():
        return None
    return [old[item] for item in old], [new[item] for item in old]


def _unpaired(name: str, kind: str, budget: float | None) -> dict[str, Any]:
    reason = f"{name}: there is no result before and after on the same items, so it cannot be judged."
    return {"name": name, "kind": kind, "before": None, "after": None, "change": None, "n": 0, "p_value": None,
            "budget": budget, "passed": False, "reason": reason}  # fmt: skip


def _row(
    name: str, kind: str, old: list[bool], new: list[bool], p_value: float, budget: float | None
) -> dict[str, Any]:
    n = len(old)
    return {"name": name, "kind": kind, "before": sum(old) / n, "after": sum(new) / n,
            "change": (sum(new) - sum(old)) / n, "n": n, "p_value": p_value, "budget": budget}  # fmt: skip


def _least_p(changeable: int) -> float:
    """The smallest p-value that the test can give when at most this many items can change."""
    return 0.5**changeable


def _gain(config: GateConfig, skill: str, before: Mapping[str, Items], after: Mapping[str, Items]) -> dict[str, Any]:
    pairs = _pairs(skill, before, after)
    if pairs is None:
        return _unpaired(skill, "new skill", None)
    p_value = mcnemar_one_sided(*pairs, alternative="better")
    row = _row(skill, "new skill", *pairs, p_value, None)
    row["passed"] = row["change"] > 0 and p_value <= config.significance
    verb = "learned" if row["passed"] else "not learned"
    row["reason"] = (
        f"{skill}: {verb}, {row['before']:.0%} to {row['after']:.0%} on {row['n']} items (p = {p_value:.2g})."
    )
    if row["change"] > 0 and _least_p(pairs[0].count(False)) > config.significance:
        row["reason"] += " So few items cannot show a gain: add test rows."
    return row


def _loss(name: str, kind: str, before: Mapping[str, Items], after: Mapping[str, Items], budget: float,
          level: float) -> dict[str, Any]:  # fmt: skip
    pairs = _pairs(name, before, after)
    if pairs is None:
        return _unpaired(name, kind, budget)
    p_value = mcnemar_one_sided(*pairs, alternative="worse")
    row = _row(name, kind, *pairs, p_value, budget)
    numbers = f"{row['before']:.1%} to {row['after']:.1%} on {row['n']} items (p = {p_value:.2g})"
    beyond = row["change"] < -budget
    judged = _least_p(pairs[0].count(True)) <= level
    row["passed"] = not beyond or (judged and p_value > level)
    if row["passed"]:
        row["reason"] = f"{name}: kept, {numbers}."
    elif judged:
        row["reason"] = f"{name}: got worse, {numbers}, budget {budget:.1%}."
    else:
        row["reason"] = (
            f"{name}: lost more than its budget of {budget:.1%}, {numbers}; too few items to tell this from chance, "
            "so it cannot be judged."
        )
    return row
