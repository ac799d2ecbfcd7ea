"""Linear layers in 4 bits while adapters train above them (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

NF4 by bitsandbytes: 16 levels for blocks of 64 weights, a float32 scale each, so 4.5 bits a weight.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from perdure.types import InputError

NF4_BYTES = 4.5 / 8
"""Of a weight."""
BLOCK = 64
"""Weights that share a scale."""


@contextmanager
def in_nf4(model: Any, masters: Any) -> Iterator[None]:
    """Inside, every linear layer of ``model`` but its head holds its weight in 4 bits and computes in the dtype it had;
    rows that are no whole blocks stay as they are (bitsandbytes 0.50 reads them wrongly on CPUs with AVX-512).
    Afterwards the layers are plain again, with the weights of ``masters``.

    Raises InputError where bitsandbytes is not installed."""
    bitsandbytes, head = _bitsandbytes(), model.get_output_embeddings()
    linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}
    plain = {name: layer for name, layer in linear.items() if layer.in_features % BLOCK == 0}
    model.is_loaded_in_4bit = True  # by this peft knows such layers
    try:
        for name, layer in plain.items():
            model.set_submodule(name, _quantised(bitsandbytes, layer))
            layer.weight.data = layer.weight.new_empty(0)
        yield
    finally:
        del model.is_loaded_in_4bit
        weights = dict(masters.named_parameters())
        for name, layer in linear.items():
            layer.weight.data = weights[f"{name}.weight"].detach().to(layer.weight, copy=True)
        for name, layer in plain.items():
            model.set_submodule(name, layer)


def _quantised(bitsandbytes: Any, layer: nn.Linear) -> Any:
    weight = layer.weight
    made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=weight.dtype,
                                      compress_statistics=False, quant_type="nf4", device="meta")  # fmt: skip
    made.weight = bitsandbytes.nn.Params4bit(
        weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=False, module=made
    ).to(weight.device)
    made.bias = layer.bias
    # On CPUs with bfloat16 units it would lay its weights out anew, and round their scales, in the first pass without
    # gradients: what is merged then, and what trains, would be other weights than those that decode.
    made.support_avx512bf16_for_cpu = False
    return made


def is_nf4(layer: Any) -> bool:
    return hasattr(layer.weight, "quant_state")


def weight_of(layer: Any) -> Tensor:
    """A linear layer's weight as it computes with it."""
    if not is_nf4(layer):
        return layer.weight
    return _bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def plain_of(parameter: Tensor) -> Tensor:
    """A parameter in plain numbers: of one in 4 bits, what it computes with."""
    state = getattr(parameter, "quant_state", None)
    return parameter if state is None else _bitsandbytes().functional.dequantize_4bit(parameter.data, state)


def weight_count(parameter: Tensor) -> int:
    """How many weights a parameter holds: two a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise InputError("train.lora_nf4 needs bitsandbytes: pip install 'bitsandbytes>=0.50'") from error
