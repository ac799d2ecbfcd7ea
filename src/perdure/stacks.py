"""A version's weights: whole ones, or a stack (``train.lora_merge = false``): an adapter on the version before it.

A stacked version's folder holds peft's two files instead of whole weights. Loading goes down to whole weights or the
base model and adds each adapter's product in float32, in the order in which they were trained: on the machine that
trained on its CPU the same bits that merging gives.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from perdure.adapters import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, add_adapter, save_adapter
from perdure.config import ModelConfig
from perdure.models import LoadedModel, load, resolve
from perdure.types import InputError

_BELOW = re.compile(r"\.\./(v[0-9]{3,})")
"""The version below, where peft says on which model an adapter lies; anything else there is the base model."""


def is_stacked(folder: Path) -> bool:
    """Whether a version's folder, or one that is being written, holds an adapter instead of whole weights."""
    return (folder / ADAPTER_SETTINGS).is_file()


def stack_of(folder: Path) -> tuple[Path | None, list[Path]]:
    """What a version's folder stands on: the folder with whole weights (None: the base model), and those with adapters
    above it, the lowest first. Raises InputError where the files do not say."""
    from peft import LoraConfig

    above: list[Path] = []
    while is_stacked(folder):
        if folder in above:
            raise InputError(f"{folder}: damaged, its adapter lies on itself")
        above.insert(0, folder)
        try:
            below = _BELOW.fullmatch(str(LoraConfig.from_pretrained(str(folder)).base_model_name_or_path))
        except (TypeError, ValueError) as error:
            raise InputError(f"{folder / ADAPTER_SETTINGS}: damaged: {error}") from error
        if not below:
            return None, above
        folder = folder.parent / below[1]
        if not folder.is_dir():
            raise InputError(f"{above[0]}: its adapter lies on {folder.name}, and {folder} is missing")
    return folder, above


def load_version(config: ModelConfig, folder: Path | None, device: torch.device | None = None,
                 base_sha256: str | None = None) -> LoadedModel:  # fmt: skip
    """Load the version in ``folder``, or the base model, in float32: see ``models.load``.

    Raises InputError where a file is missing or damaged, and where the base model has other weights than
    ``base_sha256`` says."""
    root, adapters = stack_of(folder) if folder else (None, [])
    loaded = load(config, root, device)
    if root is None:
        check_base(loaded.model, config, base_sha256)
    for adapter in adapters:
        add_adapter(loaded.model, adapter)
    return loaded


def put_adapter(kept: Path, folder: Path, below: Path | None, config: ModelConfig) -> None:
    """Copy the adapter in ``kept`` into the folder of a version; ``below``: the version that it lies on, None: the
    configured base model."""
    from peft import LoraConfig

    settings = LoraConfig.from_pretrained(str(kept))
    settings.base_model_name_or_path = f"../{below.name}" if below else resolve(config)
    settings.save_pretrained(str(folder))
    shutil.copy(kept / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)


def scaled_adapter(kept: Path, share: float, folder: Path) -> None:
    """Write ``share`` times the product of the adapter in ``kept`` as an adapter in ``folder``. Not for DoRA, whose
    weights are no sum."""
    from peft import LoraConfig

    tensors = load_file(kept / ADAPTER_WEIGHTS)
    scaled = {name: value * share if ".lora_B." in name else value for name, value in tensors.items()}
    save_adapter(folder, LoraConfig.from_pretrained(str(kept)), scaled)


def check_base(model: Any, config: ModelConfig, wanted: str | None) -> None:
    """Raises InputError where ``wanted`` is given and these are other weights."""
    if wanted is not None and (found := weights_sha256(model)) != wanted:
        raise InputError(
            f"model.source: {config.source} is not the base model that this workspace was made with (weights "
            f"{found[:12]}, in the ledger {wanted[:12]}); bring that one back, or make a new workspace for this one"
        )


def weights_sha256(model: Any) -> str:
    """One hash over names, shapes and float32 values of all parameters: the same weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().float().contiguous().cpu().numpy())
    return digest.hexdigest()
