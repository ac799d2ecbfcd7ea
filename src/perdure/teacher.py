"""The teacher: the same model, with the demonstration in view. Four kinds of weights, one ``score``."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from perdure.adapters import effective_parameters, without_adapters
from perdure.ema import teacher_update
from perdure.fused import Head
from perdure.models import head_of, hidden_at_loss_positions, working_copy
from perdure.sharding import like, whole
from perdure.types import Batch

KINDS = ("frozen", "ema", "original", "live")


class Teacher(Protocol):
    """Scores completions; never samples, never enters the optimizer."""

    moves: bool
    """False: the same tokens are always scored the same, so scores may be kept."""
    is_start: bool
    """True: these are the weights that the stage started from, for the whole stage."""

    def score(self, batch: Batch) -> Tensor:
        """Hidden states at the loss positions, [N, H], without gradient."""
        ...

    @property
    def head(self) -> Head: ...

    def follow(self, student: Any) -> None:
        """Called before the first step with the student as it trains: plain, or divided over processes."""
        ...

    def update(self, student: Any) -> None:
        """Called after each optimizer step."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep; empty for weights that do not move."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class ModelTeacher:
    """A model that scores, and keeps nothing of the student: what the kinds below have in common."""

    moves: bool
    is_start = False

    def __init__(self, model: Any):
        self.model = model.requires_grad_(False)

    @property
    def head(self) -> Head:
        return head_of(self.model)

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        return hidden_at_loss_positions(self.model, batch)

    def follow(self, student: Any) -> None:
        pass

    def update(self, student: Any) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError("the checkpoint belongs to a teacher with weights of its own, this one has none")


class FixedTeacher(ModelTeacher):
    """``frozen`` (the version promoted last) and ``original`` (the base): weights that never move in a stage."""

    moves = False

    def __init__(self, model: Any, is_start: bool = False):
        super().__init__(model)
        self.is_start = is_start


class BareTeacher(FixedTeacher):
    """The weights that a stage with adapters started from: the model that trains, with its adapters off."""

    def __init__(self, working: Any):
        super().__init__(working, is_start=True)

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        with without_adapters(self.model):
            return hidden_at_loss_positions(self.model, batch)


class LiveTeacher(ModelTeacher):
    """The student itself: the caller passes the working copy that it keeps in step with the student."""

    moves = True


class EmaTeacher(ModelTeacher):
    """Follows the student: averages in float32, scores with a working copy in the compute dtype.

    Of adapters it averages the product, merged: averaged factors would have another product. The averages are divided
    over processes where the student is."""

    moves = True

    def __init__(self, student: Any, dtype: torch.dtype, teacher_update_rate: float,
                 device: torch.device | None = None, divided: bool = False):  # fmt: skip
        there = device or student.device
        super().__init__(working_copy(student, dtype, there))
        self.rate = teacher_update_rate
        begin = torch.device("cpu") if divided else there  # whole, they may be more than one device holds
        self.average = {
            name: p.detach().to(begin, torch.float32, copy=True) for name, p in effective_parameters(student)
        }

    def follow(self, student: Any) -> None:
        # One process may go on with a divided run: its averages, begun in the CPU's memory, then lie with the weights.
        self.average = {name: like(self.average[name], p).to(p.device) for name, p in effective_parameters(student)}

    def update(self, student: Any) -> None:
        teacher_update(self.average, dict(effective_parameters(student)), self.rate)
        self._publish()

    def state(self) -> dict[str, Tensor]:
        return self.average

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self.average.keys():
            raise ValueError("the checkpoint's teacher has other weights than this model")
        for name, tensor in state.items():
            self.average[name].copy_(like(tensor, self.average[name]))
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(whole(self.average[name]))


def start_teacher(student: Any, working: Any, dtype: torch.dtype, adapters: bool) -> FixedTeacher:
    """The weights that the stage starts from: with ``adapters`` those of the working copy below them, else a copy."""
    if adapters:
        return BareTeacher(working)
    return FixedTeacher(working_copy(student, dtype, working.device), is_start=True)


def make_teacher(kind: str, *, student: Any, working: Any, original: Any | None, dtype: torch.dtype,
                 teacher_update_rate: float, adapters: bool = False, divided: bool = False) -> Teacher:  # fmt: skip
    """The teacher of a stage. ``student`` is the version promoted last, before its first step; ``working`` is the
    copy of it that is kept in step while it trains, or that trains itself, with ``adapters``. ``divided``: the student
    will be, over processes. Raises ValueError for an unknown kind."""
    if kind == "frozen":
        return start_teacher(student, working, dtype, adapters)
    if kind == "ema":
        return EmaTeacher(student, dtype, teacher_update_rate, working.device, divided)
    if kind == "live":
        return LiveTeacher(working)
    if kind == "original":
        if original is None:
            raise ValueError('teacher "original" needs the base model')
        return FixedTeacher(working_copy(original, dtype, working.device))
    raise ValueError(f"unknown teacher {kind!r}: one of {', '.join(KINDS)}")
