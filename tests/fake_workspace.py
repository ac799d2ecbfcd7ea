"""Small workspaces with made-up numbers, written through perdure.workspace the way a chain of stages writes them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from perdure.config import GateConfig, RunConfig, TrainConfig
from perdure.files import write_jsonl
from perdure.report.html import write_report
from perdure.report.text import render
from perdure.stats import wilson_interval
from perdure.workspace import BASE, Workspace

PRIOR = {"piqa": 60, "boolq": 50}
"""What the base model has right of 100 items a task."""
Right = Mapping[str, int]
"""Skill or task -> number of items answered right."""


def score(right: int, n: int) -> dict[str, Any]:
    low, high = wilson_interval(right, n)
    return {"accuracy": right / n, "mean_score": right / n, "low": low, "high": high, "n": n}


def probe(right: Right | None, n: int = 100) -> dict[str, Any] | None:
    if right is None:
        return None
    tasks = {task: score(hits, n) | {"metric": "acc"} for task, hits in right.items()}
    return {"average": sum(right.values()) / n / len(right), "tasks": tasks}


def items(skill: str, right: int, n: int) -> list[dict[str, Any]]:
    """The first ``right`` of ``n`` items are right."""
    return [
        {"id": f"{skill}-{i}", "prompt": f"{skill} question {i}", "expected": f"answer {i}",
         "completion": f"answer {i}" if i < right else f"not sure about {i}", "score": float(i < right), "tokens": 4}
        for i in range(n)
    ]  # fmt: skip


def probe_rows(right: Right, n: int = 100) -> list[dict[str, Any]]:
    """The first ``right`` of each task's ``n`` items are right."""
    return [{"task": task, "id": str(i), "correct": i < hits} for task, hits in right.items() for i in range(n)]


class FakeWorkspace:
    """Adds stages to a workspace; every number is what the test says."""

    def __init__(self, folder: Path, method: str = "sdft", n: int = 10, enforce: bool = True):
        config = RunConfig(train=TrainConfig(method=method), gate=GateConfig(enforce=enforce))  # pyright: ignore
        self.workspace, self.method, self.n = Workspace.create(folder, config, "b" * 64), method, n
        self.folder = folder

    @classmethod
    def reopened(cls, workspace: Workspace) -> FakeWorkspace:
        """To add more stages to one that is there already."""
        fake = cls.__new__(cls)
        fake.workspace, fake.folder, fake.method, fake.n = workspace, workspace.folder, "sdft", 10
        return fake

    def start(self, skill: str, *, ready: bool = True, teacher: float | None = 0.9) -> str:
        """Open a stage's run folder with its stage.json and preflight.json; returns the stage."""
        stage = f"s{len(list((self.folder / 'runs').glob('*'))) + 1:02d}-{skill}"
        run = self.workspace.run_folder(stage)
        run.mkdir(parents=True)
        parent = self.workspace.aliases()["champion"]
        self._json(run / "stage.json", {"stage": stage, "skill": skill, "method": self.method, "parent": parent,
                                        "seed": 0, "config": self.workspace.config().model_dump(mode="json"),
                                        "created": "2026-11-25T04:00:00Z"})  # fmt: skip
        if teacher is not None:
            self._json(run / "preflight.json", preflight(skill, teacher, ready))
        return stage

    def baseline(self, stage: str, right: Right, prior: Right | None, version: str = BASE) -> None:
        """What the stage's parent scored, with its items."""
        run = self.workspace.run_folder(stage)
        self._json(run / "baseline.json", {"version": version, "scores": self._scores(right), "probe": probe(prior)})
        for skill, hits in right.items():
            write_jsonl(run / "baseline" / f"{skill}.jsonl", items(skill, hits, self.n))

    def candidate(self, stage: str, right: Right, prior: Right | None = None, *, decision: str = "promoted",
                  reasons: Sequence[str] = ("it is better.",), teacher: float | None = 0.9,
                  table: Sequence[dict[str, Any]] = (), seconds: float = 100, promote: bool | None = None,
                  changed: Mapping[str, list[dict[str, Any]]] | None = None, parent: str | None = None,
                  branch: str | None = None) -> str:  # fmt: skip
        """Finish a stage with a version, on a ``branch`` of ``parent`` or of the champion; ``changed`` replaces the
        items of a skill. Returns the version's name."""
        workspace, name = self.workspace, self.workspace.next_version()
        skill = stage.split("-", 1)[1]
        cost = {"seconds": {"preflight": seconds / 10, "train": seconds, "evaluate": seconds / 4, "probe": seconds / 5},
                "tokens": {"rollout": 1000, "teacher": 3000, "student": 4000, "evaluate": 500}}  # fmt: skip
        info = {"version": name, "parent": parent or workspace.aliases()["champion"], "stage": stage, "skill": skill,
                "branch": branch,
                "method": self.method, "created": "2026-11-25T04:30:00Z", "seed": 0,
                "config": workspace.config().model_dump(mode="json"),
                "hashes": {"base": "b" * 64, "skill": "c" * 64, "config": "d" * 64, "code": "e" * 40},
                "scores": self._scores(right), "probe": probe(prior), "teacher_accuracy": teacher,
                "verdict": {"decision": decision, "reasons": list(reasons), "table": list(table)},
                "cost": cost}  # fmt: skip
        every = {key: items(key, hits, self.n) for key, hits in right.items()} | dict(changed or {})

        def write(folder: Path) -> None:
            for key, rows in every.items():
                write_jsonl(folder / "evaluation" / f"{key}.jsonl", rows)
            if prior is not None:
                write_jsonl(folder / "evaluation" / "probe.jsonl", probe_rows(prior))

        workspace.add_version(info, write)
        workspace.append("candidate", version=name, stage=stage, skill=skill, parent=info["parent"])
        workspace.append("verdict", version=name, decision=decision, reasons=list(reasons))
        if promote if promote is not None else decision == "promoted":
            workspace.promote(name, "gate")
        return name

    def metrics(self, stage: str, steps: int = 60, best: float = 0.95, drift: float | None = 0.04,
                speed: float = 5) -> None:  # fmt: skip
        lines = metrics(self.method, steps, best, drift, speed)
        write_jsonl(self.workspace.run_folder(stage) / "metrics.jsonl", lines)

    def _scores(self, right: Right) -> dict[str, Any]:
        return {skill: score(hits, self.n) for skill, hits in right.items()}

    @staticmethod
    def _json(path: Path, value: Any) -> None:
        path.write_text(json.dumps(value), encoding="utf-8")


def preflight(skill: str, teacher: float, ready: bool) -> dict[str, Any]:
    """The in-line template fails, the turns succeed: as measured on the small model."""
    measured = [("inline", 0.03, 210.0, 1.9), ("turns:1", teacher - 0.1, 180.0, 2.4), ("turns:2", teacher, 260.0, 2.8)]
    templates = [
        {"template": name, "accuracy": accuracy, "low": max(0, accuracy - 0.1), "high": min(1, accuracy + 0.08),
         "tokens": tokens, "kl": kl, "demonstration_probability": accuracy, "leak_share": 0.0}
        for name, accuracy, tokens, kl in measured
    ]  # fmt: skip
    advice = "ready to learn." if ready else "The teacher has nothing to teach."
    return {"skill": skill, "student_accuracy": 0.0, "teacher_accuracy": teacher, "gap": teacher, "template": "turns:2",
            "kl_teacher_student": 2.8, "identity_kl": 3e-6, "leak_share": 0.0, "n": 32, "templates": templates,
            "window": {"limit": 4096, "longest_student": 120, "longest_teacher": {"turns:2": 420}, "too_long": []},
            "cost": {"seconds": {"train": 300}, "tokens": {"student": 40000}},
            "ready": ready, "advice": [advice]}  # fmt: skip


def metrics(method: str, steps: int, best: float, drift: float | None, speed: float) -> list[dict[str, Any]]:
    """A smooth run with some ripple; a validation every 10 steps."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-speed * step / steps)
        ripple = 0.03 * math.sin(step * 1.7)
        phase = "sft" if method == "sft" else "warm_start" if step <= steps * 2 / 3 else "on_policy"
        lines.append({"step": step, "phase": phase, "loss": 2.4 * (1 - done) + 0.08 + abs(ripple), "entropy": 0.4,
                      "demonstration_probability": min(1.0, best * done + 0.02 + ripple / 2), "grad_norm": 1.0,
                      "learning_rate": 3e-5, "loss_tokens": 400, "completion_length": 12.0})  # fmt: skip
        if step % 10 == 0 or step == steps:
            lines.append({"step": step, "validation_accuracy": round(best * min(1.0, done * 1.05), 3),
                          "validation_n": 32, "kl_start": None if drift is None else drift * done})  # fmt: skip
    return lines


def add_stage(fake: FakeWorkspace, skill: str, right: dict[str, int], prior: dict[str, int] | None = PRIOR, *,
              base: dict[str, int] | None = None, **more: Any) -> str:  # fmt: skip
    """A whole stage; ``base`` is what the base model scores, measured before the first one."""
    stage = fake.start(skill)
    if base is not None:
        fake.baseline(stage, base, PRIOR)
    fake.metrics(stage)
    return fake.candidate(stage, right, prior, **more)


def chain_of_three(folder: Path) -> FakeWorkspace:
    """Three skills of 10 test rows each: a at 0, 9, 8, 8; b at 5, 4, 9, 6; c at 1, 2, 1, 7 right."""
    fake = FakeWorkspace(folder)
    add_stage(fake, "a", {"a": 9, "b": 4, "c": 2}, {"piqa": 61, "boolq": 50}, base={"a": 0, "b": 5, "c": 1})
    add_stage(fake, "b", {"a": 8, "b": 9, "c": 1}, {"piqa": 60, "boolq": 48})
    add_stage(fake, "c", {"a": 8, "b": 6, "c": 7}, {"piqa": 58, "boolq": 50})
    return fake


def page_of(fake: FakeWorkspace) -> str:
    """The report's HTML."""
    return write_report(fake.folder).read_text(encoding="utf-8")


def printed(numbers: dict[str, Any], width: int = 80, color: bool = False) -> str:
    """What the terminal shows of a summary."""
    file = io.StringIO()
    render(numbers, Console(file=file, width=width, force_terminal=color, color_system="truecolor" if color else None))
    return file.getvalue()
