"""The end of a stage: the candidate is measured, judged, repaired where that goes, and published with its verdict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from perdure.candidate import measure_candidate
from perdure.card import model_card
from perdure.config import RunConfig
from perdure.files import read_jsonl
from perdure.forecast import priced
from perdure.gates import decide
from perdure.loading import put_adapter
from perdure.measure import probe_json, score_json, way_of, write_items
from perdure.models import save
from perdure.provenance import code_state, environment, now
from perdure.repair import repair, worth_repairing
from perdure.reporting import Reporter
from perdure.runlog import LoopState
from perdure.running import Run
from perdure.scores import Scores, Way, guards, known_budget, known_scores, said_of_kinds, unmeasured
from perdure.skills.base import Skill, load_skill
from perdure.stages import (
    Outcome,
    asked_for,
    deciding,
    follow,
    settings_hash,
    settle,
    taught_this,
    turned_away,
)
from perdure.types import Verdict
from perdure.workspace import BASE, Workspace


def judge(run: Run, before: Scores, check: dict[str, Any] | None, state: LoopState) -> Outcome:
    """Bring a trained stage to its version; ``before`` holds the parent's scores."""
    workspace, config, name = run.workspace, run.config, run.workspace.next_version()
    way = way_of(config)
    kept = guards(workspace, run.parent, before, run.earlier, config, way)
    candidate = measure_candidate(run, before, kept, name)
    tokens = dict(state.tokens)
    if config.gate.repair and worth_repairing(candidate.verdict):
        ended = state.best_step if state.best_step >= 0 else state.step  # without validation: the last
        candidate = repair(run, before, kept, check, name, candidate.verdict, ended) or candidate
        for file in sorted(run.folder.glob("repair-*/timings.jsonl")):  # other trainings, of earlier attempts too
            tokens = {part: count + read_jsonl(file)[-1]["tokens"][part] for part, count in tokens.items()}
    if again := candidate.trained:  # a version says how it was trained
        run.config, state = run.config.model_copy(update={"train": again.settings}), again.state
    info = _describe(run, name, check, state, tokens, candidate.verdict) | {
        "scores": {s.skill: score_json(s, run.scope[s.skill], way) for s in candidate.scores},
        "probe": probe_json(candidate.probed, way),
    }

    def write(folder: Path) -> None:
        if run.adapter:
            put_adapter(run.adapter, folder, workspace.weights_folder(run.parent), config.model)
            run.session.loaded.tokenizer.save_pretrained(folder)
        else:
            save(run.session.loaded, folder)
        write_items(folder / "evaluation", candidate.scores, candidate.probed)

    taught = list(dict.fromkeys([*workspace.taught(run.parent), run.skill.name]))
    workspace.add_version(info, write, lambda whole: model_card(whole, taught, run.parent if run.adapter else None))
    outcome = settle(workspace, name)
    for reason in outcome.reasons:
        run.reporter.note(reason)
    skill = run.skill.name
    for said in said_of_kinds(before.skills.get(skill, {}), info["scores"].get(skill, {})):
        run.reporter.note(f"{skill}: {said}.")
    return outcome


def judge_again(workspace: Workspace, skill: Skill, config: RunConfig, reporter: Reporter) -> Outcome | None:
    """The last version that taught this content to the champion and was turned away, under another gate than then: its
    results are on file, so the gate alone decides anew and nothing is trained. None where there is no such version, or
    where what it was compared with was measured otherwise since."""
    champion = workspace.resolve("champion")
    for info in taught_this(workspace, skill):
        name, same = info["version"], info["parent"] == champion and not info.get("branch")
        graded = info["scores"].get(skill.name, {}).get("code_hash", "") == skill.code_hash
        asked = _without_gate(asked_for(info))
        if not same or not graded or asked != _without_gate(config.model_dump(mode="json")):
            continue
        said = [event for event in workspace.ledger() if event.get("version") == name]
        judged = [event.get("gate", info["config"]["gate"]) for event in said if event["event"] == "verdict"]
        gate = config.gate.model_dump(mode="json")
        if workspace.was_served(name) or (said[-1]["event"] != "verdict" and judged[-1] == gate):
            return turned_away(info, workspace.verdict(name) or info["verdict"])
        if judged[-1] != gate:
            verdict = _verdict_on_file(workspace, skill, config, champion, info)
            if verdict is None:
                return None
            reporter.note(f"{name} is judged again under the gate's new settings; nothing is trained.")
            workspace.append("verdict", version=name, decision=verdict.decision, reasons=list(verdict.reasons),
                             table=list(verdict.table), gate=gate)  # fmt: skip
        return follow(workspace, info, workspace.verdict(name) or info["verdict"], config.gate.enforce)
    return None


def _without_gate(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide which weights come out; ``gate.repair`` is one of them."""
    return {key: value for key, value in deciding(config).items()
            if not key.startswith("gate.") or key == "gate.repair"}  # fmt: skip


def _verdict_on_file(workspace: Workspace, skill: Skill, config: RunConfig, parent: str,
                     info: dict[str, Any]) -> Verdict | None:  # fmt: skip
    earlier = {
        taught: load_skill(folder) for taught, folder in workspace.taught(parent).items() if taught != skill.name
    }
    # As the candidate was measured then: this machine may choose another precision.
    way = Way(info["scores"].get(skill.name, {}).get("measured_with", ""),
              (info["probe"] or {}).get("measured_with", ""), config.eval.rows,
              frozenset(config.probe.tasks)).of([skill, *earlier.values()])  # fmt: skip
    before, after = (known_scores(workspace, version, way) for version in (parent, info["version"]))
    if any(unmeasured(scores, [skill, *earlier.values()], config) != ([], False) for scores in (before, after)):
        return None
    kept = guards(workspace, parent, before, earlier, config, way)
    return decide(config.gate, skill.name, before.items.get(skill.name), after.items, kept, together=skill.together,
                  known=known_budget(workspace, parent, skill, config))  # fmt: skip


def _describe(run: Run, name: str, check: dict[str, Any] | None, state: LoopState, tokens: dict[str, int],
              verdict: Verdict) -> dict[str, Any]:  # fmt: skip
    """version.json but for the scores; ``state``: the end of the training that made it, ``tokens``: of all of the
    stage's trainings."""
    base = run.workspace.version(BASE)["hashes"]["base"]
    hashes = {"base": base, "skill": run.skill.content_hash, "config": settings_hash(run.asked), "code": code_state()}
    return {
        "version": name,
        "parent": run.parent,
        "stage": run.stage,
        "branch": run.branch,
        "skill": run.skill.name,
        "method": run.config.train.method,
        "created": now(),
        "seed": run.asked.seed,
        "hashes": hashes,
        "config": run.config.model_dump(mode="json"),
        "asked": None if run.asked == run.config else run.asked.model_dump(mode="json"),
        "teacher_accuracy": check["teacher_accuracy"] if check else None,
        "verdict": asdict(verdict),
        "environment": environment(),
        "cost": {
            "seconds": run.seconds,
            "tokens": tokens,
            "steps": state.step,
            "best_step": state.best_step,
            "predicted": (check["cost"]["seconds"] or None) if check else None,
            "priced": priced(run.asked.cost, sum(run.seconds.values())),
        },
    }
