"""A stage's run folder while it trains: metrics, timings, samples, checkpoints, and going on from the last one.

``metrics.jsonl`` holds nothing that depends on the clock, so the same seed gives the same bytes; times go to
``timings.jsonl``. On resume all three files are cut back to where the checkpoint stood.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from perdure.files import sync_path
from perdure.guidance import Allotments
from perdure.processes import GROUP
from perdure.types import InputError

FILES = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")


@dataclass
class LoopState:
    """What the loop carries from step to step, beside weights and optimizer."""

    step: int = 0
    warm: bool = True
    known: bool = False
    """The demonstrations' own tokens have become likely."""
    first_own: int = -1
    """The first step whose rows the student answered itself; -1 before it."""
    best_accuracy: float = -1.0
    best_step: int = -1
    stale: int = 0
    """Validations in a row without a better accuracy."""
    start_length: float | None = None
    """Mean tokens of the answers to the validation rows before the first step, where that is measured."""
    strayed: bool = False
    """The answers became longer or shorter than ``train.max_length_change`` allows."""
    allotted: Allotments = field(default_factory=dict)
    """What the anchor rows of each earlier skill got and said (guidance.py)."""
    tokens: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("rollout", "teacher", "student", "evaluate"), 0)
    )


Report = Callable[[dict[str, Any], dict[str, Any]], None]
"""Called after each line of metrics with that line and the step's timings (empty for a validation)."""


class RunLog:
    """Appends to the run folder's files, in the lead process only. ``report`` hears of every line."""

    def __init__(self, folder: Path, report: Report | None):
        self.folder = folder
        self.report = report
        if GROUP.lead:
            folder.mkdir(parents=True, exist_ok=True)

    def metrics(self, line: dict[str, Any], timings: dict[str, Any] | None = None) -> None:
        self._append("metrics.jsonl", line)
        if timings is not None:
            self._append("timings.jsonl", timings)
        if self.report:
            self.report(line, timings or {})

    def sample(self, line: dict[str, Any]) -> None:
        self._append("samples.jsonl", line)

    def positions(self) -> dict[str, int]:
        """Bytes in each file, synced. A checkpoint keeps them, so that a resumed run repeats and misses no line."""
        sizes = {}
        for name in FILES:
            path = self._path(name)
            if path.exists():
                sync_path(path)
            sizes[name] = _size(path)
        return sizes

    def rewind(self, positions: dict[str, int]) -> None:
        """Cut the files back to ``positions`` (to nothing where they name none): what follows is written again.

        Raises InputError for a file that is shorter than it was: its lines are lost."""
        for name in FILES if GROUP.lead else ():
            path, position = self._path(name), positions.get(name, 0)
            if _size(path) < position:
                raise InputError(
                    f"{path}: shorter than when the checkpoint beside it was written ({position} bytes); begin this "
                    "stage anew"
                )
            if path.exists():
                os.truncate(path, position)

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not GROUP.lead:
            return
        with self._path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        if torch.cuda.is_initialized():  # a GPU works on after the call
            # Not the whole device: another thread may be recording a pass just now (train.overlap), which that breaks.
            torch.cuda.current_stream().synchronize()
        now = time.perf_counter()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._last, 4)
        self._last = now
