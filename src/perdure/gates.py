"""Is a candidate allowed to become the champion? Paired tests on per-item results, and three answers: promoted, held
(the items cannot tell), refused.

The promise, at the default settings and of a stage's first candidate: one that harms nothing is refused in at most 5 %
of stages, and one that costs an earlier skill, or all prior tasks together, twice the budget is promoted in at most
10 %, however few items there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from perdure.config import GateConfig
from perdure.stats import (
    clustered_noninferiority_p,
    holm,
    items_needed,
    mcnemar_one_sided,
    noninferiority_p,
    noninferiority_power,
)
from perdure.types import Verdict

Items = Mapping[str, bool]
"""Item id -> right or wrong."""
Together = Mapping[str, str]
"""Item id -> a name of the items with which it is no independent one (``Skill.together``); an item that is not there
stands by itself."""

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
    """``skill`` (against the champion), ``best ever``, ``prior`` (one task) or ``priors`` (all tasks together); ``new
    skill`` where the stage taught it again."""
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
    together: Together = field(default_factory=dict)


def decide(config: GateConfig, skill: str, before: Items | None, after: Mapping[str, Items],
           guards: Sequence[Guard] = (), hurt: Collection[str] | None = None,
           together: Together | None = None, known: float | None = None) -> Verdict:  # fmt: skip
    """The verdict on a candidate: ``promoted``, ``held`` or ``refused``, with every failed check among the reasons.

    The new ``skill`` must gain significantly over ``before`` (one-sided exact McNemar test). One that was taught before
    (``known``: the accuracy that it may lose, 0..1) may also be kept, as a decisive guard is: there may be nothing more
    to gain on its test rows. A guard is refused when it
    lost more than its budget, or more than half of what it had, and the loss is significant (the same test the other
    way, Holm over all guards). A decisive guard is held unless its items show, with ``config.confidence``, that the
    true loss is less than twice its budget (``stats.noninferiority_p``). What has no results on the same items is
    refused. ``hurt``: names of guards that an earlier attempt hurt; these and the decisive ones are then refused by any
    loss beyond the budget, significant or not.

    Turns of one conversation, and rows with the same prompt, are no independent items (``together``: those of the new
    skill). The tests then count such groups, each of which lost, gained or neither, by the sum over its items; and that
    twice the budget of all items was not lost must be shown over the groups' sums as well.

    ``config.enforce`` changes nothing here: whoever promotes looks at it.
    """
    pair = _paired(before, after.get(skill), together or {})
    gain = _gain(config, skill, pair)
    if known is not None and pair and not gain["passed"]:
        own = Guard(skill, "new skill", "", before, known, together=together or {})
        return _verdict(_losses(config, after, [own, *guards], hurt))
    return _verdict([gain, *_losses(config, after, guards, hurt)])


def decide_kept(config: GateConfig, after: Mapping[str, Items], guards: Sequence[Guard]) -> Verdict:
    """The verdict on a candidate that was taught nothing new: it must keep every guard, as in ``decide``."""
    return _verdict(_losses(config, after, guards, None))


def _losses(
    config: GateConfig, after: Mapping[str, Items], guards: Sequence[Guard], hurt: Collection[str] | None
) -> list[dict[str, Any]]:
    pairs = [_paired(guard.before, after.get(guard.name), guard.together) for guard in guards]
    p_values = [
        min(1.0, guard.chosen_from * mcnemar_one_sided(*pair.units, alternative="worse")) if pair else 1.0
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


Bits = list[bool]


class _Pair(NamedTuple):
    """The same items before and after, in one order."""

    items: tuple[Bits, Bits]
    units: tuple[Bits, Bits]
    """What is independent: items, or groups of them that lost, gained or neither."""
    sizes: list[int]
    """Items of each unit."""
    losses: list[int]
    """How many of them became wrong, less those that became right."""

    @property
    def n(self) -> int:
        return len(self.units[0])

    @property
    def said(self) -> str:
        """How many there are, for people."""
        items = f"{len(self.items[0])} items"
        return items if self.n == len(self.items[0]) else f"{items}, {self.n} of them independent"

    @property
    def changed(self) -> tuple[int, int]:
        """Units that became wrong, and units that became right."""
        lost = sum(old and not new for old, new in zip(*self.units, strict=True))
        return lost, sum(new and not old for old, new in zip(*self.units, strict=True))

    @property
    def noise(self) -> float:
        """Share of the units that changed each way: what goes on without any loss."""
        return min(self.changed) / self.n


def unit_of(item: str, together: Together) -> tuple[str, str]:
    """What an item is independent as: its group, or itself."""
    return ("group", together[item]) if item in together else ("item", item)


def _paired(old: Items | None, new: Items | None, together: Together) -> _Pair | None:
    """None when they cannot be paired."""
    if not old or not new or old.keys() != new.keys():
        return None
    items = [old[item] for item in old], [new[item] for item in old]
    units: dict[tuple[str, str], list[str]] = {}
    for item in old:
        units.setdefault(unit_of(item, together), []).append(item)
    losses = [sum(old[item] - new[item] for item in turns) for turns in units.values()]
    whole = [
        all(old[item] for item in turns) for turns in units.values()
    ]  # what a unit is that neither lost nor gained
    before = [lost > 0 or (lost == 0 and right) for lost, right in zip(losses, whole, strict=True)]
    after = [lost < 0 or (lost == 0 and right) for lost, right in zip(losses, whole, strict=True)]
    return _Pair(items, (before, after), [len(turns) for turns in units.values()], losses)


def _row(name: str, kind: str, pair: _Pair | None, **more: Any) -> dict[str, Any]:
    row = {"name": name, "kind": kind, "before": None, "after": None, "change": None, "n": 0, "p_value": None,
           "budget": None, "reference": None, "needed": None} | more  # fmt: skip
    if pair is None:
        reason = f"{name}: there is no result before and after on the same items, so it cannot be judged."
        return row | {"p_value": None, "verdict": "not measured", "passed": False, "reason": reason}
    (old, new), n = pair.items, len(pair.items[0])
    return row | {"before": sum(old) / n, "after": sum(new) / n, "change": (sum(new) - sum(old)) / n, "n": n}


def _gain(config: GateConfig, skill: str, pair: _Pair | None) -> dict[str, Any]:
    p_value = mcnemar_one_sided(*pair.units, alternative="better") if pair else None
    row = _row(skill, "new skill", pair, p_value=p_value)
    if pair is None or p_value is None:
        return row
    real = row["change"] > 0 and p_value <= config.significance
    row["verdict"] = "learned" if real else "not learned"
    numbers = f"{row['before']:.0%} to {row['after']:.0%} on {pair.said} ({_said(p_value)})"
    row["reason"] = f"{skill}: {row['verdict']}, {numbers}."
    blind = row["change"] > 0 and 0.5 ** pair.units[0].count(False) > config.significance
    if not real and (blind or row["change"] >= TELLING_GAIN):
        row["verdict"] = CANNOT_TELL
        row["reason"] = f"{skill}: {numbers}; so few items cannot show a gain: teach it with more test rows."
    return row | {"passed": real}


def _loss(guard: Guard, pair: _Pair | None, p_value: float, counts: bool, confidence: float) -> dict[str, Any]:
    """A guard's row of the verdict; ``counts``: whether a loss beyond what is allowed is one."""
    row = _row(guard.name, guard.kind, pair, budget=guard.budget, reference=guard.reference, p_value=p_value)
    if pair is None:
        return row
    label = "all prior tasks together" if guard.kind == "priors" else guard.name
    against = f" against {guard.reference}, its best" if guard.kind == "best ever" else ""
    numbers = f"{row['before']:.1%} to {row['after']:.1%}{against} on {pair.said} ({_said(p_value)})"
    # A budget is meant for what is known well: of a skill with less than twice of it, half may not go either.
    if counts and row["change"] < -min(guard.budget, row["before"] / 2):
        reason = f"{label}: got worse, {numbers}, budget {guard.budget:.1%}."
        return row | {"verdict": "worse", "passed": False, "reason": reason}
    if not guard.decisive or _is_kept(guard, pair, confidence):
        return row | {"verdict": "kept", "passed": True, "reason": f"{label}: kept, {numbers}."}
    needed = items_needed(_twice(guard, pair), pair.noise, 1 - confidence, confidence)
    row["needed"] = needed
    what = "" if pair.n == row["n"] else " independent ones"
    asked = f"a version without any loss takes about {needed}{what}" if needed else "a million cannot either"
    reason = (
        f"{label}: cannot tell, {numbers}: so few items cannot show that less than twice the budget of "
        f"{guard.budget:.1%} was lost ({asked}). Set gate.budget to what they can judge, or teach it with more rows."
    )
    return row | {"verdict": CANNOT_TELL, "passed": False, "reason": reason}


def _said(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= 0.001 else "p < 0.001"


def _twice(guard: Guard, pair: _Pair) -> float:
    """The loss that must be shown not to be: twice the budget, or all that there was."""
    return min(2 * guard.budget, sum(pair.items[0]) / len(pair.items[0]))


def _is_kept(guard: Guard, pair: _Pair, confidence: float) -> bool:
    """Whether the items show that the true loss is less than ``_twice``. What holds no more right answers than the
    budget has nothing to lose beyond it."""
    loss = _twice(guard, pair)
    if loss <= guard.budget:
        return True
    if max(pair.sizes) > 1 and clustered_noninferiority_p(pair.sizes, pair.losses, loss) > 1 - confidence:
        return False
    return noninferiority_p(pair.n, *pair.changed, loss) <= 1 - confidence


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
