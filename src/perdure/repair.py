"""A candidate that learned its skill but hurt something is not the end: a few attempts to keep both.

In order, until one passes: checkpoints of the stage from before the weights it ended with; the weights blended back
towards the parent (three shares; not where the version keeps a DoRA adapter, of which a part is none); a second
training with more anchors; a third with a smaller learning rate. Several attempts are several chances to pass by luck,
so the gate is strict with them: no observed loss beyond the budget of what was hurt, of an earlier skill or of all
prior tasks together, significant or not. The ledger holds every attempt and is what a resumed stage goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.adapters import ADAPTER, adapted, add_adapter
from perdure.candidate import Candidate, Trained, measure_candidate
from perdure.checkpoint import checkpoint_step, checkpoints, load_student
from perdure.config import RunConfig, TrainConfig
from perdure.files import read_json
from perdure.gates import Guard
from perdure.loading import load_version, scaled_adapter
from perdure.methods import METHODS
from perdure.running import Run, train_stage
from perdure.scores import Scores
from perdure.stages import settings_hash
from perdure.types import Verdict

BLENDS = (0.75, 0.5, 0.25)
"""Shares of the way from the parent to the candidate."""
Weights = Mapping[str, Tensor]


def worth_repairing(verdict: Verdict) -> bool:
    """Refused for harm alone: the new skill was learned, or kept where it was taught again."""
    verdicts = {row["verdict"] for row in verdict.table}
    learned = any(row["kind"] == "new skill" and row["verdict"] in ("learned", "kept") for row in verdict.table)
    return verdict.decision == "refused" and learned and "worse" in verdicts and "not measured" not in verdicts


def repair(
    run: Run, before: Scores, kept: Sequence[Guard], check: dict[str, Any] | None, name: str, harmed: Verdict,
    ended: int,
) -> Candidate | None:  # fmt: skip
    """The first attempt that passes, whose weights the session's student then has; None, and the student as it was,
    when none of ``gate.repair`` attempts does. ``ended``: the step whose weights the training ended with."""
    run.reporter.note(f"Refused so far: {harmed.reasons[0]}")
    student = run.session.loaded.model
    # Blended in the CPU's memory: a GPU that holds masters and working copy has no room for two more sets.
    trained = {key: value.detach().to("cpu", copy=True) for key, value in student.named_parameters()}
    parent = _parent_weights(run)
    tries: dict[str, Callable[[], Trained | None]] = {}
    for folder in checkpoints(run.folder):
        if (step := checkpoint_step(folder)) < ended:
            label = f"checkpoint {step}"
            tries[label] = lambda label=label, folder=folder: _earlier(run, parent, label, folder)
    kept_adapter = run.adapter
    for share in BLENDS if not (kept_adapter and run.config.train.lora_dora) else ():
        tries[f"blend {share}"] = lambda share=share: _blended(run, parent, trained, kept_adapter, share)
    again = {"more anchors": _anchored(run.config.train, harmed), "smaller rate": _slower(run.config)}
    if run.config.train.support == "sampled":  # an estimate from the student's samples: anchors are not
        del again["more anchors"]
    for label, settings in again.items():
        tries[label] = lambda label=label, settings=settings: _again(run, parent, check, label, settings)
    # A stage that was begun anew may have the same name: its attempts are others.
    key = {"event": "repair", "stage": run.stage, "parent": run.parent, "config": settings_hash(run.asked),
           "began": read_json(run.folder / "stage.json")["created"]}  # fmt: skip
    past = {event["attempt"]: event["decision"] for event in run.workspace.ledger() if event | key == event}
    hurt = {row["name"] for row in harmed.table if row["verdict"] == "worse"}
    for label, attempt in list(tries.items())[: run.config.gate.repair]:
        if past.get(label, "promoted") != "promoted":
            continue
        run.reporter.note(f"Repair: {label}.")
        trained_anew = attempt()
        found = measure_candidate(run, before, kept, name, hurt)
        decision, reason = found.verdict.decision, found.verdict.reasons[0]
        if label not in past:
            run.workspace.append(**key, skill=run.skill.name, attempt=label, decision=decision, reason=reason)
        if decision == "promoted":
            how = f"Repaired ({label}) after: {harmed.reasons[0]}"
            verdict = Verdict(decision, (how, *found.verdict.reasons), found.verdict.table)
            return Candidate(found.scores, found.probed, verdict, trained_anew)
    _set(run, trained, trained, 1.0)
    run.adapter = kept_adapter
    return None


def _parent_weights(run: Run) -> Weights:
    folder = run.workspace.weights_folder(run.parent)
    loaded = load_version(run.config.model, folder, torch.device("cpu"), run.session.base_sha256)
    return dict(loaded.model.named_parameters())


@torch.no_grad()
def _set(run: Run, start: Weights, end: Weights, share: float) -> None:
    """Give student and working copy, in every process, the weights ``start`` + ``share`` * (``end`` - ``start``)."""
    for key, parameter in run.session.loaded.model.named_parameters():
        parameter.copy_(torch.lerp(start[key], end[key], share))
    run.session.publish()


def _blended(run: Run, parent: Weights, trained: Weights, adapter: Path | None, share: float) -> None:
    if adapter is None:
        _set(run, parent, trained, share)
        return
    run.adapter = run.folder / _place(f"blend {share}") / ADAPTER
    scaled_adapter(adapter, share, run.adapter)
    _set(run, parent, parent, 0.0)
    add_adapter(run.session.loaded.model, run.adapter)
    run.session.publish()


def _earlier(run: Run, parent: Weights, label: str, folder: Path) -> None:
    _set(run, parent, parent, 0.0)
    place, train = run.folder / _place(label), run.config.train
    with adapted(run.session.loaded.model, run.session.working, train, run.seed, folder=place) as student:
        load_student(folder, student)
    run.adapter = place / ADAPTER if train.keeps_adapters else None
    run.session.publish()


def _place(label: str) -> str:
    """The folder of an attempt in its stage's."""
    return "repair-" + label.replace(" ", "-")


def _again(run: Run, parent: Weights, check: dict[str, Any] | None, label: str, settings: TrainConfig) -> Trained:
    _set(run, parent, parent, 0.0)
    return Trained(settings, train_stage(run, check, settings, _place(label)))


def _anchored(config: TrainConfig, harmed: Verdict) -> TrainConfig:
    """Half of each batch anchors, and of those more of the kind that was hurt: earlier skills or prior capabilities.

    Hurt skills are rehearsed, unless nothing may be: what the champion itself has lost against its best, its own
    answers cannot bring back."""
    skills = any(row["verdict"] == "worse" and row["kind"] in ("skill", "best ever") for row in harmed.table)
    share = max(config.anchor_earlier_share, 0.75) if skills else min(config.anchor_earlier_share, 0.25)
    may = skills and METHODS[config.method].earlier == "answers" and config.anchor_rehearsal > 0
    rehearsed = 1.0 if may else config.anchor_rehearsal
    return config.model_copy(
        update={"anchor_share": max(config.anchor_share, 0.5), "anchor_earlier_share": share,
                "anchor_rows": 2 * config.anchor_rows, "anchor_per_skill": 2 * config.anchor_per_skill,
                "anchor_rehearsal": rehearsed}
    )  # fmt: skip


def _slower(config: RunConfig) -> TrainConfig:
    return config.train.model_copy(update={"learning_rate": config.train.learning_rate / 3})
