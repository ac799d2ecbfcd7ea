"""A candidate measured on everything, and the gate's verdict on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perdure.gates import Items, decide
from perdure.measure import Scores, guards, measure_probe, measure_skill, probe_items
from perdure.probe import ProbeResult
from perdure.running import Run
from perdure.types import SkillScore, Verdict


@dataclass(frozen=True)
class Candidate:
    """What the session's student scores now."""

    scores: Sequence[SkillScore]
    probed: ProbeResult | None
    verdict: Verdict


def measure_candidate(run: Run, before: Scores, name: str, strict: bool = False) -> Candidate:
    """Measure the session's student on every skill in scope and on the prior tasks, and judge it against ``before``,
    the parent's scores. ``strict``: see ``gates.decide``."""
    workspace, config = run.workspace, run.config
    with run.timed("evaluate"):
        scores = [measure_skill(run.session, skill, config, run.reporter, name) for skill in run.scope.values()]
    with run.timed("probe"):
        probed = measure_probe(run.session, config, run.reporter, name)
    after: dict[str, Items] = {s.skill: {item.id: item.score >= 1 for item in s.items} for s in scores}
    after |= probe_items(probed.items if probed else [])
    earlier = {skill: run.scope[skill] for skill in workspace.taught(run.parent) if skill != run.skill.name}
    kept = guards(workspace, run.parent, before, earlier, config)
    skill = run.skill.name
    return Candidate(scores, probed, decide(config.gate, skill, before.items.get(skill), after, kept, strict))
