"""Versions kept as a stack (``train.lora_merge = false``): an adapter on the version before. What their files say.

A stacked version's folder holds peft's two files instead of whole weights; ``base_model_name_or_path`` in the second
names what the adapter lies on. loading.py makes weights of it.
"""

from __future__ import annotations

import re
from pathlib import Path

from perdure.files import read_object
from perdure.types import InputError

ADAPTER_WEIGHTS, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""peft's two files."""
_BELOW = re.compile(r"\.\./(v[0-9]{3,})")
"""Another version of the same workspace; anything else is the base model."""


def is_stacked(folder: Path) -> bool:
    """Whether a version's folder, or one that is being written, holds an adapter instead of whole weights."""
    return (folder / ADAPTER_SETTINGS).is_file()


def stack_of(folder: Path) -> tuple[Path | None, list[Path]]:
    """What a version's folder stands on: the folder with whole weights (None: the base model), and those with adapters
    above it, the lowest first. Raises InputError where the files do not say."""
    above: list[Path] = []
    while is_stacked(folder):
        if folder in above:
            raise InputError(f"{folder}: damaged, its adapter lies on itself")
        above.insert(0, folder)
        settings = read_object(folder / ADAPTER_SETTINGS, {"base_model_name_or_path": str, "peft_type": str})
        if settings["peft_type"] != "LORA":
            raise InputError(f"{folder / ADAPTER_SETTINGS}: damaged, no LoRA adapter")
        below = _BELOW.fullmatch(settings["base_model_name_or_path"])
        if not below:
            return None, above
        folder = folder.parent / below[1]
        if not folder.is_dir():
            raise InputError(f"{above[0]}: its adapter lies on {folder.name}, and {folder} is missing")
    return folder, above
