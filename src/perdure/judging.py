"""The end of a stage: the candidate is measured, judged, repaired where that goes, and published with its verdict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from perdure.candidate import measure_candidate
from perdure.card import model_card
from perdure.files import code_state, environment, now
from perdure.forecast import priced
from perdure.measure import Scores, probe_json, score_json, write_items
from perdure.models import save
from perdure.repair import repair, worth_repairing
from perdure.runlog import LoopState
from perdure.running import Run
from perdure.stages import Outcome, settings_hash, settle
from perdure.types import Verdict
from perdure.workspace import BASE


def judge(run: Run, before: Scores, check: dict[str, Any] | None, state: LoopState) -> Outcome:
    """Bring a trained stage to its version; ``before`` holds the parent's scores."""
    workspace, config, name = run.workspace, run.config, run.workspace.next_version()
    candidate = measure_candidate(run, before, name)
    if config.gate.repair and worth_repairing(candidate.verdict):
        candidate = repair(run, before, check, name, candidate.verdict, state.best_step) or candidate
    info = _describe(run, name, check, state, candidate.verdict) | {
        "scores": {s.skill: score_json(s, run.scope[s.skill]) for s in candidate.scores},
        "probe": probe_json(candidate.probed),
    }

    def write(folder: Path) -> None:
        save(run.session.loaded, folder)
        write_items(folder / "evaluation", candidate.scores, candidate.probed)

    taught = list(dict.fromkeys([*workspace.taught(run.parent), run.skill.name]))
    workspace.add_version(info, write, lambda whole: model_card(whole, taught))
    accepted = settle(workspace, name)
    verdict = candidate.verdict
    for reason in verdict.reasons:
        run.reporter.note(reason)
    return Outcome(run.skill.name, run.stage, name, "promoted" if accepted else verdict.decision, verdict.reasons)


def _describe(run: Run, name: str, check: dict[str, Any] | None, state: LoopState, verdict: Verdict) -> dict[str, Any]:
    config = run.config
    base = run.workspace.version(BASE)["hashes"]["base"]
    hashes = {"base": base, "skill": run.skill.content_hash, "config": settings_hash(config), "code": code_state()}
    return {
        "version": name,
        "parent": run.parent,
        "stage": run.stage,
        "branch": run.branch,
        "skill": run.skill.name,
        "method": config.train.method,
        "created": now(),
        "seed": config.seed,
        "hashes": hashes,
        "config": config.model_dump(mode="json"),
        "teacher_accuracy": check["teacher_accuracy"] if check else None,
        "verdict": asdict(verdict),
        "environment": environment(),
        "cost": {
            "seconds": run.seconds,
            "tokens": state.tokens,
            "steps": state.step,
            "best_step": state.best_step,
            "predicted": check["cost"]["seconds"] if check else None,
            "priced": priced(config.cost, sum(run.seconds.values())),
        },
    }
