"""Everything that a stage needs to go on to the same bits: student, optimizer, moving teacher, loop state.

Random choices are derived from (seed, step), so no generator state is kept. A checkpoint is a folder, written
beside, synced and renamed; the one before it goes away only then.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from perdure.adapters import trainable
from perdure.files import sync_folder, sync_path

BEST = "best.safetensors"
"""In the run folder: the student's weights at the best validation so far."""
_PREFIX = "checkpoint-"


def save_checkpoint(run: Path, step: int, student: Any, optimizer: torch.optim.Optimizer,
                    teacher: Mapping[str, Tensor], loop: dict[str, Any]) -> None:  # fmt: skip
    """Write ``run/checkpoint-<step>``: the state after ``step`` optimizer steps. ``loop`` must be JSON."""
    tensors = {f"student.{name}": p.detach() for name, p in trainable(student).items()}
    for name, parameter in trainable(student).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"teacher.{name}": value for name, value in teacher.items()}
    final = run / f"{_PREFIX}{step:06d}"
    beside = run / f".{final.name}.tmp"
    _sweep(run)
    beside.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, beside / "state.safetensors")
    (beside / "loop.json").write_text(json.dumps({"step": step, **loop}), encoding="utf-8")
    sync_folder(beside)
    _remove(final)
    os.replace(beside, final)
    sync_path(run)
    for other in checkpoints(run):
        if other != final:
            _remove(other)


def _remove(folder: Path) -> None:
    """Out of sight first: a checkpoint that is visible is whole, also when the removal is cut off."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def _sweep(run: Path) -> None:
    """Clear what earlier attempts, cut off, left out of sight."""
    for left in run.glob(f".{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(run.glob(f"{_PREFIX}*"))


def drop_training_state(run: Path) -> None:
    """Remove what only a resume needs, once the stage's version is published: the folder keeps what people read."""
    _sweep(run)
    for folder in checkpoints(run):
        _remove(folder)
    (run / BEST).unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, student: Any, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put student and optimizer back; returns the loop's state and the moving teacher's weights.

    Raises ValueError when the checkpoint is of a model with other weights."""
    tensors = load_file(folder / "state.safetensors")
    teacher: dict[str, Tensor] = {}
    parameters = trainable(student)
    kept = {key.removeprefix("student.") for key in tensors if key.startswith("student.")}
    if kept != parameters.keys():
        raise ValueError(f"{folder}: holds other weights than this model: {sorted(kept ^ parameters.keys())[:5]}")
    with torch.no_grad():
        for key, value in tensors.items():
            part, _, rest = key.partition(".")
            if part == "student":
                parameters[rest].copy_(value)
            elif part == "teacher":
                teacher[rest] = value
            else:
                entry, _, name = rest.partition(".")
                # A copy: the file may be mapped, and goes away.
                optimizer.state[parameters[name]][entry] = value.to(parameters[name].device, copy=True)
    return json.loads((folder / "loop.json").read_text(encoding="utf-8")), teacher


def load_student(folder: Path, student: Any) -> None:
    """Put only the student's weights of a checkpoint back."""
    load_weights(student, folder / "state.safetensors", "student.")


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def save_weights(student: Any, path: Path) -> None:
    """The student's parameters that train as one safetensors file, replaced atomically."""
    beside = path.with_name(f".{path.name}.tmp")
    save_file({name: p.detach().contiguous() for name, p in trainable(student).items()}, beside)
    sync_path(beside)
    os.replace(beside, path)


def load_weights(student: Any, path: Path, prefix: str = "") -> None:
    """Put parameters written by ``save_weights`` back, or those of a file that holds them behind a prefix."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in trainable(student).items():
            parameter.copy_(tensors[prefix + name])
