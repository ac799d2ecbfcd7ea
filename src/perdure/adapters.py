"""Low-rank adapters within a stage (peft): they train on the working copy, which decodes and, with them off, teaches.

One copy of the weights in the compute dtype serves as student, decoder and frozen teacher; the float32 masters do not
take part (on a CPU, where both share one memory, they lie in a file) and get the product at the stage's end. The model
is then plain: evaluation and the next stage never see an adapter, whether a version keeps one (loading.py) or not. With
``lora_nf4`` the layers below the adapters lie in 4 bits meanwhile; what the masters get is the product alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perdure.config import TrainConfig
from perdure.nf4 import in_nf4, is_nf4, plain_of, weight_of
from perdure.processes import GROUP
from perdure.stacks import ADAPTER_WEIGHTS
from perdure.types import InputError

ADAPTER = "adapter"
"""Where in a training's folder they lie until its version has them."""


@contextmanager
def adapted(masters: Any, working: Any, config: TrainConfig, seed: int, merge: bool = True,
            folder: Path | None = None) -> Iterator[Any]:  # fmt: skip
    """The model that trains: ``masters``; with ``lora_rank`` above 0 ``working``, of which only adapters train.

    Afterwards ``working`` is without adapters again. What they learned is part of ``masters`` then, unless ``merge`` is
    off or an error ended the context; with ``lora_merge`` off they lie in ``folder``'s ADAPTER as well. Where
    ``working`` shares the CPU's memory with ``masters``, those lie in a file of ``folder`` meanwhile, if it is given.
    Raises InputError for targets that the model does not have."""
    if not config.lora_rank:
        yield masters
        return
    below = in_nf4(working, masters) if config.lora_nf4 else nullcontext()
    with below, _with_adapters(masters, working, config, seed, merge, folder):
        yield working


@contextmanager
def _with_adapters(masters: Any, working: Any, config: TrainConfig, seed: int, merge: bool,
                   folder: Path | None) -> Iterator[None]:  # fmt: skip
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    _check_targets(working, config.lora_targets)
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
            tuner = LoraModel(working, settings, "default")
        except ValueError as error:
            raise InputError(f"train.lora_targets: {error}") from error
    for parameter in trainable(working).values():
        parameter.data = parameter.data.float()  # peft makes them in the base's dtype
    if config.lora_dora:
        _exact_magnitudes(masters, working)
    aside = set_aside(masters, folder) if folder and working.device.type == "cpu" else nullcontext()
    try:
        with aside:
            yield
        if merge:
            _merge(masters, working)
            if folder and config.keeps_adapters and GROUP.lead:
                save_adapter(folder / ADAPTER, settings, _tensors(tuner))
    finally:
        tuner.unload()
        working.requires_grad_(False)


def _tensors(tuner: Any) -> dict[str, Tensor]:
    """An adapter's parameters on the CPU, by the names that peft's files give them."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(tuner, save_embedding_layers=False)
    return {f"base_model.{name}": value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}


def save_adapter(folder: Path, settings: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter as peft reads it; ``settings``: its ``LoraConfig``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    save_settings(settings, folder)


def save_settings(settings: Any, folder: Path) -> None:
    """Write a ``LoraConfig`` for those who load the adapter; the same one gives the same bytes."""
    settings.inference_mode, settings.target_modules = True, sorted(settings.target_modules)
    settings.save_pretrained(str(folder))


@torch.no_grad()
def add_adapter(model: Any, folder: Path) -> None:
    """Add the product of the adapter in ``folder`` to the weights of a plain float32 model, as the end of its training
    did. Raises InputError where it is damaged or of another model."""
    from peft import LoraConfig, set_peft_model_state_dict
    from peft.tuners.lora import LoraModel

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        tensors = {name.removeprefix("base_model."): value for name, value in
                   load_file(folder / ADAPTER_WEIGHTS, device=str(model.device)).items()}  # fmt: skip
        with torch.random.fork_rng():  # first values are drawn for it, and replaced
            tuner = LoraModel(model, LoraConfig.from_pretrained(str(folder)), "default")
        found = set_peft_model_state_dict(tuner, tensors)
    except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: cannot be loaded as an adapter of this model: {error}") from error
    if lacking := [name for name in found.missing_keys if ".lora_" in name] + list(found.unexpected_keys):
        raise InputError(f"{folder}: damaged, or an adapter of another model: {lacking[0]} has no counterpart")
    for _, layer in _layers(model):
        layer.merge()
        layer.merged_adapters.clear()  # the sum stays when the adapter goes
    tuner.unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Raises InputError for the head and the embedding: their matrices are read as they are, without an adapter."""
    outside = [model.get_output_embeddings(), model.get_input_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is one for one in outside)]
    if wrong := [target for target in targets if any(f".{name}".endswith(f".{target}") for name in names)]:
        raise InputError(f"train.lora_targets: {wrong[0]!r} is no layer inside the model's blocks; leave it out")


def _exact_magnitudes(masters: Any, working: Any) -> None:
    """DoRA's first magnitudes, from the float32 weights: peft takes the norms of the rounded ones."""
    parameters = dict(masters.named_parameters())
    for name, layer in _layers(working):
        magnitude = layer.lora_magnitude_vector["default"].weight
        norms = torch.linalg.vector_norm(parameters[f"{name}.weight"].detach(), dim=1)
        magnitude.data = norms.to(magnitude.device)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The model as if it had no adapters."""
    layers = [module for _, module in _layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _layers(model: Any) -> list[tuple[str, Any]]:
    """Names and modules of the layers that have an adapter."""
    # Known by an attribute, not by peft's class: importing peft for a model without adapters would take a second.
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@contextmanager
def set_aside(model: Any, folder: Path) -> Iterator[None]:
    """Inside, the parameters of a model on the CPU are read from a file of ``folder`` and take no memory until they
    are. Nothing may change them meanwhile.

    The file has no name, so that a killed process leaves none behind."""
    parameters = list(model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        for parameter in parameters:
            file.write(_bytes_of(parameter.detach().contiguous()))
        file.flush()
        # Copied on write: torch wants a buffer that may be written to, and the file stays as it is.
        buffer, place = mmap(file.fileno(), 0, access=ACCESS_COPY), 0
        for parameter in parameters:
            count, shape = parameter.numel(), parameter.shape
            parameter.data = torch.frombuffer(buffer, dtype=parameter.dtype, count=count, offset=place).view(shape)
            place += count * parameter.element_size()
        del buffer
        try:
            yield
        finally:
            file.seek(0)
            for parameter in parameters:  # read, not copied from the mapping: that would be in memory, too
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
                file.readinto(_bytes_of(parameter.data))


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy()


@torch.no_grad()
def _merge(masters: Any, working: Any) -> None:
    """Add the adapters' product to the float32 weights, exactly: not by way of the working copy's rounded ones."""
    parameters = dict(masters.named_parameters())
    for name, layer in _layers(working):
        parameter = parameters[f"{name}.weight"]
        parameter.copy_(_merged(layer, parameter))


@torch.no_grad()
def effective_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under the name, and in the order, that it has without adapters; where there is one, the product
    of its factors is added, in float32."""
    layers = dict(_layers(model))
    for name, parameter in model.named_parameters():
        owner, inside, last = name.rpartition(".base_layer.")
        if inside:
            layer = layers[owner]
            plain = _merged(layer, weight_of(layer.get_base_layer())) if last == "weight" else parameter
            yield f"{owner}.{last}", plain
        elif not any(name.startswith(f"{layer}.lora_") for layer in layers):
            yield name, plain_of(parameter)


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """``weight`` with the layer's adapter, in float32. The layer's own weight is put back, not computed back."""
    if is_nf4(layer.get_base_layer()):  # peft would merge into what 4 bits can say
        return weight.detach().to(torch.float32) + layer.get_delta_weight("default").to(weight.device)
    base = layer.get_base_layer().weight
    kept = base.data
    base.data = weight.detach().to(kept.device, torch.float32, copy=True)
    layer.merge()
    merged, base.data = base.data, kept
    layer.merged_adapters.clear()
    return merged


def trainable(model: Any) -> dict[str, Tensor]:
    """The parameters that a stage changes, by name: all of them, or the adapter's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
