"""A version's weights: whole ones from its folder, or a stack of adapters on them or on the base model (stacks.py).

Each adapter's product is added in float32, in the order in which they were trained: on the machine that trained on its
CPU the same bits that merging gives.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from perdure.adapters import add_adapter, save_adapter, save_settings
from perdure.config import ModelConfig
from perdure.models import LoadedModel, load, resolve
from perdure.stacks import ADAPTER_WEIGHTS, stack_of
from perdure.types import InputError


def load_version(config: ModelConfig, folder: Path | None, device: torch.device | None = None,
                 base_sha256: str | None = None) -> LoadedModel:  # fmt: skip
    """Load the version in ``folder``, or the base model, in float32: see ``models.load``.

    Raises InputError where a file is missing or damaged, and where the base model has other weights than
    ``base_sha256`` says."""
    root, adapters = stack_of(folder) if folder else (None, [])
    loaded = load(config, root, device, folder)
    if root is None:
        check_base(loaded.model, config, base_sha256)
    for adapter in adapters:
        add_adapter(loaded.model, adapter)
    return loaded


def base_name(config: ModelConfig) -> str:
    """The base model as peft's files name it: a hub id, or a folder by its whole path."""
    source = resolve(config)
    return str(Path(source).absolute()) if Path(source).exists() else source


def put_adapter(kept: Path, folder: Path, below: Path | None, config: ModelConfig) -> None:
    """Copy the adapter in ``kept`` into the folder of a version; ``below``: the version that it lies on, None: the
    configured base model."""
    from peft import LoraConfig

    settings = LoraConfig.from_pretrained(str(kept))
    settings.base_model_name_or_path = f"../{below.name}" if below else base_name(config)
    settings.revision = None if below else config.revision or None
    save_settings(settings, folder)
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
