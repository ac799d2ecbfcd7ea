"""Models by hub id: whether the hub answers is asked once, not again and again for each of a model's files."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from perdure.config import ModelConfig
from perdure.types import InputError

PATIENCE = 10.0
"""Seconds for the hub's first answer."""


def load_options(config: ModelConfig, folder: Path | None = None) -> dict[str, Any]:
    """What transformers' loaders take beside the source; what lies on this machine, as a version's ``folder`` does, has
    no revisions and needs no hub. Where the hub cannot be reached, a model in its cache is taken from there.

    Raises InputError for a hub id that is in neither."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    source, revision = config.source, config.revision or None
    if folder or source == "embedded" or Path(source).expanduser().exists():
        return options
    options |= {"revision": revision} if revision else {}
    problem = None if constants.HF_HUB_OFFLINE else unreachable()
    if problem is None:
        return options
    with suppress(HFValidationError):  # a path that was mistyped is no hub id
        if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
            return options | {"local_files_only": True}
    raise InputError(
        f"{source}: no folder on this machine, not in the hub's cache, and {constants.ENDPOINT} cannot be reached "
        f"({problem}); give a model folder, a GGUF file or 'embedded', or a hub id where there is a network "
        "(HF_ENDPOINT names another hub)"
    )


@lru_cache
def unreachable() -> str | None:
    """Why no answer came from the hub; None where one did, whatever it says."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except httpx2.TransportError as error:
        return str(error) or type(error).__name__
    return None
