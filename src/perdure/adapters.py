"""Low-rank adapters (LoRA, by peft) on the student while a stage trains; at its end they are merged into full weights.

Outside a stage every model here is a plain one: evaluation, versions and the next stage never see an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from perdure.config import TrainConfig
from perdure.types import InputError

_MARK = "_perdure_adapted"


@contextmanager
def adapted(model: Any, config: TrainConfig, seed: int) -> Iterator[None]:
    """Within the context only the adapter's weights of ``model`` train; afterwards they are part of its own.

    Does nothing for ``lora_rank`` 0. Raises InputError for targets that the model does not have."""
    if not config.lora_rank:
        yield
        return
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft divides it, whatever number it is
        target_modules=list(config.lora_targets) or "all-linear",
        use_rslora=config.lora_rslora,
        use_dora=config.lora_dora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            tuner = LoraModel(model, settings, "default")
        except ValueError as error:
            raise InputError(f"train.lora_targets: {error}") from error
    setattr(model, _MARK, True)
    try:
        yield
    finally:
        delattr(model, _MARK)
        tuner.merge_and_unload()
        model.requires_grad_(True)


@torch.no_grad()
def effective_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under the name, and in the order, that it has without adapters; where there is one, the product
    of its factors is added. Exactly what merging will give."""
    if not getattr(model, _MARK, False):
        yield from model.named_parameters()
        return
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in model.named_parameters():
        owner, inside, last = name.rpartition(".base_layer.")
        if inside:
            yield f"{owner}.{last}", _merged(layers[owner]) if last == "weight" else parameter
        elif not any(name.startswith(f"{layer}.lora_") for layer in layers):
            yield name, parameter


def _merged(layer: Any) -> Tensor:
    """The layer's weight with its adapter. The base weight is put back, not computed back: nothing drifts."""
    weight = layer.get_base_layer().weight
    kept = weight.detach().clone()
    layer.merge()
    merged = weight.detach().clone()
    weight.data.copy_(kept)
    layer.merged_adapters.clear()
    return merged


def trainable(model: Any) -> dict[str, Tensor]:
    """The parameters that a stage changes, by name: all of them, or the adapter's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
