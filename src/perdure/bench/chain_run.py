"""One run of a bench: a chain of skills by one method, reduced to the numbers that the tables need.

A run is an ordinary workspace, so it can be taken up again; when it is finished its weights are removed, because sixty
chains of a small model already fill a disk. What stays: result.json and the workspace's records without weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from perdure.anchors import answered, general_prompts
from perdure.bench.finished import RESULT
from perdure.bench.plan import RunPlan
from perdure.curriculum import learn
from perdure.files import read_json, read_jsonl, replace_text
from perdure.gates import Together, unit_of
from perdure.measure import measure_probe, measure_skill, skill_items
from perdure.monitor import drift
from perdure.probe import ProbeResult
from perdure.provenance import code_state, environment, now
from perdure.reporting import Phase, Silent
from perdure.running import open_version
from perdure.scores import Scores, known_scores
from perdure.session import Session, open_session
from perdure.skills.base import load_skill
from perdure.stages import create_workspace
from perdure.teacher import FixedTeacher
from perdure.workspace import Workspace

DRIFT_ROWS = 32
"""General prompts on which the drift from the base is measured."""


class FileReporter(Silent):
    """Stages, phases and notes as lines of a file, so that a long run can be watched."""

    def __init__(self, path: Path):
        self.path = path

    def stage(self, title: str) -> None:
        self.note(title)

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Phase]:
        start = time.perf_counter()
        yield self
        self.note(f"{name}: {time.perf_counter() - start:.0f} s")

    def note(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{now()} {text}\n")


def run_chain(folder: Path, plan: RunPlan, skills: dict[str, Path], base: Path | None, threads: int) -> dict[str, Any]:
    """Run or continue the chain in ``folder``; writes and returns its result.

    ``base``: the file that ``measure_base`` wrote; None for a sweep, which is measured by its validation rows alone."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    reporter = FileReporter(folder / "log.txt")
    place, config = folder / "workspace", plan.config
    workspace = Workspace.open(place) if (place / "perdure.toml").is_file() else create_workspace(place, config)
    with workspace.lock():
        for skill in plan.skills:
            learn(workspace, [skills[skill]], config, reporter, force=True)
    last = known_scores(workspace, "champion")
    result = {
        "key": plan.key, "method": plan.method, "label": plan.label, "order": plan.order, "seed": plan.seed,
        "identity": plan.identity, "rate": config.train.learning_rate, "threads": threads, "finished": now(),
        "code": code_state(), "environment": environment(), "stages": [_stage(workspace, last, skill)
                                                                       for skill in plan.skills],
    }  # fmt: skip
    if base is not None:
        result |= _final(workspace, plan, reporter)
    replace_text(folder / RESULT, json.dumps(result) + "\n")
    _drop_weights(place)
    return result


def _stage(workspace: Workspace, last: Scores, skill: str) -> dict[str, Any]:
    """What a stage cost and scored: bits of the skill's items before it, when learned and at the end (``last``). Where
    the gate refused, the parent went on, and its scores count as those when learned and at the end."""
    versions = [name for name in workspace.versions()[::-1] if workspace.version(name)["skill"] == skill]
    lineage = workspace.lineage()
    promoted = [name for name in versions if name in lineage]
    name = (promoted or versions)[0]
    info = workspace.version(name)
    before, learned = (known_scores(workspace, version)
                       for version in (info["parent"], name if promoted else info["parent"]))  # fmt: skip
    lines = read_jsonl(workspace.run_folder(info["stage"]) / "metrics.jsonl")
    validated = [line for line in lines if "validation_accuracy" in line]
    check = workspace.run_folder(info["stage"]) / "preflight.json"
    return {
        "skill": skill,
        "before": _bits(before.items[skill]), "learned": _bits(learned.items[skill]),
        "final": _bits(last.items.get(skill, learned.items[skill])),
        "promoted": bool(promoted),
        "scores": {name: score["accuracy"] for name, score in learned.skills.items()},
        "kl_start": next((line["kl_start"] for line in reversed(validated)), None),
        "validation": max((line["validation_accuracy"] for line in validated), default=None),
        "seconds": info["cost"]["seconds"], "tokens": info["cost"]["tokens"], "steps": info["cost"]["steps"],
        "preflight": read_json(check) if check.is_file() else None,
    }  # fmt: skip


def _bits(items: Any) -> str:
    """Right or wrong of each item, in the order of the test file."""
    return "".join("1" if right else "0" for right in items.values())


def _final(workspace: Workspace, plan: RunPlan, reporter: FileReporter) -> dict[str, Any]:
    """Prior capabilities and drift of the last version."""
    last = open_version(workspace, workspace.resolve("champion"), plan.config)
    probed = measure_probe(last, plan.probe, reporter, "the last version")
    return {"probe": probe_bits(probed), "drift": _drift(open_session(plan.config), last)}


def measure_base(path: Path, plan: RunPlan, skills: dict[str, Path], threads: int) -> None:
    """What the base model scores on every skill and prior task, written to ``path``: the same for every run."""
    torch.set_num_threads(threads)
    session, config = open_session(plan.config), plan.config
    scores, units = {}, {}
    for name, folder in skills.items():
        skill = load_skill(folder)
        items = skill_items(measure_skill(session, skill, config, Silent(), "base"))
        scores[name], units[name] = _bits(items), units_of(items, skill.together)
    probed = measure_probe(session, plan.probe, Silent(), "base")
    found = {"identity": plan.base_identity(skills), "skills": scores, "units": units, "probe": probe_bits(probed)}
    replace_text(path, json.dumps(found) + "\n")


def units_of(items: Iterable[str], together: Together) -> list[int]:
    """A number for each item, the same for those that are not independent of each other."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(unit_of(item, together), len(numbers)) for item in items]


def probe_bits(probed: ProbeResult | None) -> dict[str, str]:
    """Task -> right or wrong of each item."""
    tasks: dict[str, str] = {}
    for row in probed.items if probed else []:
        tasks[row["task"]] = tasks.get(row["task"], "") + ("1" if row["correct"] else "0")
    return tasks


def _drift(base: Session, last: Session) -> float:
    """How far the last version is from the base, on the base's own answers to general prompts."""
    rollouts = answered(base, general_prompts()[:DRIFT_ROWS], 32, seed=0)
    return drift(rollouts, last.working, FixedTeacher(base.working), base.loaded.pad_id)


def _drop_weights(place: Path) -> None:
    for file in place.rglob("*.safetensors"):
        file.unlink()
