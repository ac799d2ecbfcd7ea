"""Everything that a stage needs to go on to the same bits: student, optimizer, moving teacher, loop state.

Random choices are derived from (seed, step), so no generator state is kept. A checkpoint is a folder, written
beside, synced and renamed; the one before it goes away only then.

With several processes the lead writes. Where the student is divided over them, all write and read their own parts
(torch.distributed.checkpoint), and any number of processes can go on from the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from perdure.adapters import ADAPTER, trainable
from perdure.files import beside_of, put_in_place
from perdure.processes import GROUP, barrier
from perdure.sharding import like, whole

_BEST = "best-"
WHOLE = "state.safetensors"
_PREFIX = "checkpoint-"


def save_checkpoint(run: Path, step: int, student: Any, optimizer: torch.optim.Optimizer,
                    teacher: Mapping[str, Tensor], loop: dict[str, Any]) -> None:  # fmt: skip
    """Write ``run/checkpoint-<step>``: the state after ``step`` optimizer steps. ``loop`` must be JSON. Every process
    calls it."""
    tensors = {f"student.{name}": p.detach() for name, p in trainable(student).items()}
    for name, parameter in trainable(student).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"teacher.{name}": value for name, value in teacher.items()}
    final = run / f"{_PREFIX}{step:06d}"
    beside = beside_of(final)
    divided = any(isinstance(value, DTensor) for value in tensors.values())
    if GROUP.lead:
        _sweep(run)
        beside.mkdir(parents=True)
    if divided:
        barrier()  # the folder is there
        save(tensors, checkpoint_id=beside)
        barrier()  # all parts are written
    if not GROUP.lead:
        return
    if not divided:
        save_file({name: value.contiguous() for name, value in tensors.items()}, beside / WHOLE)
    (beside / "loop.json").write_text(json.dumps({"step": step, **loop}), encoding="utf-8")
    _remove(final)
    put_in_place(beside, final)
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


def newest(run: Path) -> Path | None:
    """The checkpoint to go on from; None where there is none. A kill right after it was written has left the one before
    it as well, which then goes: repairs begin at what is there."""
    found = checkpoints(run)
    for folder in found[:-1] if GROUP.lead else ():
        _remove(folder)
    return found[-1] if found else None


def trainings(run: Path) -> list[Path]:
    """The folders of a stage's trainings: its own, and those of attempts at repair."""
    return [run, *sorted(path for path in run.glob("repair-*") if path.is_dir())]


def training_state(run: Path) -> list[Path]:
    """What of a training's folder only a resume, or the version that is to come of it, needs; and what a kill left of
    that out of sight."""
    return [path for name in (_PREFIX, _BEST, ADAPTER) for path in sorted(run.glob(f"*{name}*"))
            if path.name.startswith((name, f".{name}"))]  # fmt: skip


def drop_training_state(run: Path) -> None:
    """Remove what only a resume needs, once the stage's version is published: the folder keeps what people read."""
    for folder in checkpoints(run):
        _remove(folder)
    for path in training_state(run):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if run.is_dir() and not any(run.iterdir()):  # an attempt at repair that trained nothing
        run.rmdir()


def load_checkpoint(
    folder: Path, student: Any, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put student and optimizer back; returns the loop's state and the moving teacher's weights.

    Raises ValueError when the checkpoint is of a model with other weights."""
    parameters = trainable(student)
    tensors = _read(folder, parameters)
    teacher: dict[str, Tensor] = {}
    kept = {key.removeprefix("student.") for key in tensors if key.startswith("student.")}
    if kept != parameters.keys():
        raise ValueError(f"{folder}: holds other weights than this model: {sorted(kept ^ parameters.keys())[:5]}")
    with torch.no_grad():
        for key, value in tensors.items():
            part, _, rest = key.partition(".")
            if part == "student":
                parameters[rest].copy_(like(value, parameters[rest]))
            elif part == "teacher":
                teacher[rest] = value
            else:
                entry, _, name = rest.partition(".")
                placed = like(value, parameters[name]) if value.ndim else value
                # A copy: the file may be mapped, and goes away.
                optimizer.state[parameters[name]][entry] = placed.to(parameters[name].device, copy=True)
    return json.loads((folder / "loop.json").read_text(encoding="utf-8")), teacher


def load_student(folder: Path, student: Any) -> None:
    """Put only the student's weights of a checkpoint back."""
    parameters = trainable(student)
    _put(parameters, _read(folder, parameters), "student.")


def _read(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a checkpoint; those of one written in parts are divided as ``parameters`` are."""
    if (folder / WHOLE).is_file():
        return load_file(folder / WHOLE)
    found: dict[str, Tensor] = {}
    for key, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        name = next((name for name in parameters if key.endswith(f".{name}")), None)
        same = name is not None and parameters[name].shape == entry.size
        found[key] = (
            torch.zeros_like(parameters[name])
            if same and name
            else torch.empty(entry.size, dtype=entry.properties.dtype)
        )
    with warnings.catch_warnings():
        if not GROUP.shares:  # torch warns that one process reads alone, which is meant
            warnings.simplefilter("ignore")
        load(found, checkpoint_id=folder, no_dist=not GROUP.shares)
    return found


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def best_of(run: Path, step: int) -> Path:
    """Where the weights lie that validation chose at a step. Each step has its own file: a run that goes on from a
    checkpoint ends with those that the checkpoint speaks of, whatever a killed attempt saved after it."""
    return run / f"{_BEST}{step:06d}.safetensors"


def save_best(student: Any, run: Path, step: int) -> None:
    """Keep the weights of a step as the best so far; those before them go, but for what the newest checkpoint needs."""
    save_weights(student, best_of(run, step))
    if not GROUP.lead:
        return
    loops = [json.loads((folder / "loop.json").read_text(encoding="utf-8")) for folder in checkpoints(run)]
    needed = {best_of(run, loop.get("state", {}).get("best_step", -1)) for loop in loops} | {best_of(run, step)}
    for path in set(run.glob(f"{_BEST}*.safetensors")) - needed:
        path.unlink()


def save_weights(student: Any, path: Path) -> None:
    """The student's parameters that train as one safetensors file, replaced atomically. Every process calls it."""
    beside = beside_of(path)
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(student).items():
        value = whole(parameter.detach())  # every process takes part; one tensor at a time, so that they need not fit
        if GROUP.lead:
            tensors[name] = value.to("cpu", copy=True).contiguous()
    if not GROUP.lead:
        return
    save_file(tensors, beside)
    put_in_place(beside, path)


def load_weights(student: Any, path: Path) -> None:
    """Put parameters written by ``save_weights`` back."""
    _put(trainable(student), load_file(path))


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    for name, parameter in parameters.items():
        parameter.copy_(like(tensors[prefix + name], parameter))
