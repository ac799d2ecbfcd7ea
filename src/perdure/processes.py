"""Several processes, one model each: started by ``torchrun`` or ``accelerate launch``, which set the environment.

Process 0, the lead, runs the command as a single process would: it alone reads input, decides and writes. The others
follow: they wait for the lead's calls and take their part in them. ``together`` opens such a call; inside it every
process runs the same code, so what is nested needs no call of its own. With one process all of this does nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from perdure.types import InputError

T = TypeVar("T")
BUCKET = 2**24
"""Elements that are summed over the processes in one go."""
PATIENCE = timedelta(days=7)
"""How long a process waits for another that lives: the lead may be busy for hours with what it does alone."""
_SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "peer")


class ProcessLost(InputError):
    """Another process of this run is gone. What was finished is kept."""


@dataclass
class Group:
    """This process among those of its run."""

    rank: int = 0
    count: int = 1
    inside: bool = False
    """Within a call that all processes take part in."""
    broken: bool = False
    """Such a call was left by an error: where the others are now is not known."""
    dropped: list[int] = field(default_factory=list)
    """Objects of the followers that the lead no longer needs."""

    @property
    def lead(self) -> bool:
        return self.rank == 0

    @property
    def shares(self) -> bool:
        """Whether work is divided now: collectives are allowed only here."""
        return self.count > 1 and self.inside


GROUP = Group()
_CALLS: dict[str, Callable[..., object]] = {}


def start() -> None:
    """Join the other processes of the run; one process alone stays alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    GROUP.rank, GROUP.count = dist.get_rank(), dist.get_world_size()


def stop() -> None:
    """The lead lets the others go, after a command that ended in good order. One that failed just ends: what it was in
    the middle of, the others may be, too, and its closed connection ends them."""
    if GROUP.count > 1 and GROUP.lead and not GROUP.broken:
        _send("stop", ())
        dist.destroy_process_group()


def follow() -> None:
    """Take part in the lead's calls until it says stop. Raises ProcessLost when it is gone, and InputError, with this
    process's rank, for what it meets itself."""
    while True:
        name, arguments = _receive()
        if name == "stop":
            dist.destroy_process_group()
            return
        GROUP.inside = True
        try:
            _CALLS[name](*arguments)
        except ProcessLost:
            raise
        except InputError as error:  # most often the lead meets the same; a folder may be missing here alone
            raise InputError(f"process {GROUP.rank}: {error}") from error
        finally:
            GROUP.inside = False


def followed_by(name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Marks what the others run while the lead is inside ``together(name, ...)``."""

    def register(function: Callable[..., T]) -> Callable[..., T]:
        _CALLS[name] = function
        return function

    return register


@contextmanager
def together(name: str, *arguments: object) -> Iterator[None]:
    """All processes are in this block at once: the lead here, the others in what is registered under ``name``, called
    with ``arguments`` (pickled). Nested inside another one, or with one process, it is just the block."""
    if GROUP.count == 1 or GROUP.inside:
        yield
        return
    _send(name, arguments)
    GROUP.inside = GROUP.broken = True
    try:
        with _others():
            yield
        GROUP.broken = False
    finally:
        GROUP.inside = False


def drop_with(owner: object, key: int) -> None:
    """When ``owner`` goes, the followers are told with the next call to let go of ``key``."""
    weakref.finalize(owner, GROUP.dropped.append, key)


def gather(value: T) -> list[T]:
    """Every process's value, in the order of their ranks."""
    if not GROUP.shares:
        return [value]
    values: list[Any] = [None] * GROUP.count
    with _others():
        dist.all_gather_object(values, value)
    return values


def from_lead(value: T) -> T:
    """The lead's value, in every process."""
    if not GROUP.shares:
        return value
    values = [value]
    with _others():
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def barrier() -> None:
    gather(None)


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    _in_buckets(tensors, dist.all_reduce)


@torch.no_grad()
def copy_from_lead(tensors: Sequence[Tensor]) -> None:
    """Give each tensor the lead's values."""
    _in_buckets(tensors, lambda flat: dist.broadcast(flat, 0))


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run a collective that works in place over the tensors, many in one go."""
    for bucket in _buckets(tensors) if GROUP.shares else ():
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with _others():
            collective(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def dealt(sizes: Sequence[int]) -> list[list[int]]:
    """For each process the places of its rows, in ascending order: the largest first, to and fro, so that all get
    about the same. The same in every process."""
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    turn = [*range(GROUP.count), *reversed(range(GROUP.count))]
    parts: list[list[int]] = [[] for _ in range(GROUP.count)]
    for number, place in enumerate(order):
        parts[turn[number % len(turn)]].append(place)
    return [sorted(part) for part in parts]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(other.numel() for other in bucket) + tensor.numel() > BUCKET
        if bucket and (full or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _send(name: str, arguments: tuple[object, ...]) -> None:
    dropped = GROUP.dropped[:]
    del GROUP.dropped[: len(dropped)]
    with _others():
        dist.broadcast_object_list([name, arguments, dropped], device=torch.device("cpu"))


def _receive() -> tuple[str, tuple[Any, ...]]:
    message: list[Any] = [None, None, None]
    with _others():
        dist.broadcast_object_list(message, device=torch.device("cpu"))
    name, arguments, dropped = message
    for key in dropped:
        _CALLS["drop"](key)
    return name, arguments


@contextmanager
def _others() -> Iterator[None]:
    """A collective's failure means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise ProcessLost("another process of this run is gone (its own message says why). What was finished is kept; "
                          "the same command goes on from there.") from error  # fmt: skip
