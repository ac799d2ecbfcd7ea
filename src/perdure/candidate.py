"""A candidate measured on everything, and the gate's verdict on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from perdure.config import TrainConfig
from perdure.gates import Guard, Items, decide
from perdure.measure import measure_probe, measure_skill, skill_items
from perdure.probe import ProbeResult
from perdure.runlog import LoopState
from perdure.running import Run
from perdure.scores import Scores, known_budget, probe_items
from perdure.types import SkillScore, Verdict


@dataclass(frozen=True)
class Trained:
    """A training beside a stage's first one."""

    settings: TrainConfig
    state: LoopState
    """At its end."""


@dataclass(frozen=True)
class Candidate:
    """What the session's student scores now."""

    scores: Sequence[SkillScore]
    probed: ProbeResult | None
    verdict: Verdict
    trained: Trained | None = None
    """Where it is not the stage's first training that made it."""


def measure_candidate(run: Run, before: Scores, kept: Sequence[Guard], name: str,
                      hurt: Collection[str] | None = None) -> Candidate:  # fmt: skip
    """Measure the session's student on every skill in scope and on the prior tasks, and judge it against ``before``,
    the parent's scores, and all that must be ``kept``. ``hurt``: see ``gates.decide``; what then fails on the skills
    alone is not measured on the rest."""
    config, skill, earlier = run.config, run.skill.name, run.earlier
    known = known_budget(run.workspace, run.parent, run.skill, config)

    def verdict(after: dict[str, Items], kept: Sequence[Guard]) -> Verdict:
        return decide(config.gate, skill, before.items.get(skill), after, kept, hurt,
                      run.skill.together, known)  # fmt: skip

    scores = {taught: _measure(run, name, taught) for taught in (*earlier, skill)}
    after: dict[str, Items] = {s.skill: skill_items(s) for s in scores.values()}
    if hurt is not None:
        first = verdict(after, [guard for guard in kept if guard.name in earlier])
        if first.decision != "promoted":
            return Candidate(tuple(scores.values()), None, first)
    scores |= {other: _measure(run, name, other) for other in run.scope if other not in scores}
    with run.timed("probe"):
        probed = measure_probe(run.session, config, run.reporter, name)
    after |= probe_items(probed.items if probed else [])
    return Candidate(tuple(scores[name] for name in run.scope), probed, verdict(after, kept))


def _measure(run: Run, name: str, skill: str) -> SkillScore:
    with run.timed("evaluate"):
        return measure_skill(run.session, run.scope[skill], run.config, run.reporter, name)
