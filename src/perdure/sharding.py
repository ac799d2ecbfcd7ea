"""A student whose masters, gradients and optimizer state are divided over the processes while it trains (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register_forward
from torch.distributed.tensor import DTensor, distribute_tensor

from perdure.processes import GROUP
from perdure.types import InputError

T = TypeVar("T")
_RUN = "perdure_run"


@contextmanager
def sharded(model: Any, wanted: bool, dtype: torch.dtype, offload: bool = False,
            device: torch.device | None = None) -> Iterator[Any]:  # fmt: skip
    """Within the context a twin of ``model`` whose parameters are divided; ``model`` itself holds nothing meanwhile and
    has the twin's weights afterwards, unless an error ended the context. The model as it is, where nothing is to be
    divided.

    Products run in ``dtype`` on ``device``, the model's own or another one: one in the CPU's memory goes there layer by
    layer, and never has to fit whole. Gradients are summed over the processes in float32. ``offload`` keeps what is
    divided in the CPU's memory."""
    if not (wanted and GROUP.shares):
        yield model
        return
    home = model.device
    there = device or home
    if offload and there.type == "cpu":
        raise InputError("train.fsdp_offload moves weights from a GPU to the CPU's memory, and here is no GPU")
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    policy = {
        "mesh": init_device_mesh(there.type, (GROUP.count,)),
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    pairs = list(model.named_parameters())
    for part in (*_layers(twin), twin):
        undivided = [tensor for tensor in part.parameters() if not isinstance(tensor, DTensor)]
        fully_shard(part, **policy)
        for tensor in undivided:  # the model's own: each is let go of as soon as its parts are made
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the whole step's tokens already
        part.set_force_sum_reduction_for_comms(True)
    setattr(twin, _RUN, _call.__get__(twin))
    register_forward(twin, _RUN)
    yield twin
    # Not after an error: the processes that had none would not take part, and both would wait.
    divided = dict(twin.named_parameters())
    for name, mine in pairs:
        mine.data = whole(divided[name].detach()).to(home)


def _call(self: Any, function: Callable[[], T]) -> T:
    return function()


def run_in(model: Any, function: Callable[[], T]) -> T:
    """``function()``, during which the parameters of a divided model that lie outside its layers are whole: what uses
    the model in another way than by calling it must run in here."""
    return getattr(model, _RUN)(function) if hasattr(model, _RUN) else function()


def is_sharded(model: Any) -> bool:
    return hasattr(model, _RUN)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a divided one, in every process; another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """``tensor``, which all processes have, divided as ``pattern`` is."""
    if not isinstance(pattern, DTensor) or isinstance(tensor, DTensor):
        return tensor
    placed = tensor.to(pattern.to_local().device)
    return distribute_tensor(placed, pattern.device_mesh, pattern.placements)


@contextmanager
def recomputed(model: Any, wanted: bool) -> Iterator[None]:
    """Within the context the blocks keep only their inputs for the backward pass and compute the rest again there
    (activation checkpointing, by transformers). Raises InputError where the model's blocks cannot."""
    if not wanted:
        yield
        return
    blocks = _layers(model)
    if not model.supports_gradient_checkpointing or not blocks:
        raise InputError(f"train.activation_checkpointing: {type(model).__name__} does not support it; set it false")
    # transformers 5.19 still calls it by its former name.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    for block in blocks:
        block.training = True  # transformers recomputes in training only; what is inside the block stays as it is
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()
        for block in blocks:
            block.training = False


def _layers(model: Any) -> list[Any]:
    """The repeated blocks: what is gathered and let go of one after the other."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
