"""One version of the model, loaded for work: masters, working copy, decode engine and renderer that belong together."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perdure.attention import is_enabled
from perdure.config import RunConfig
from perdure.contexts import Renderer
from perdure.models import LoadedModel, compute_dtype, load, working_copy
from perdure.rollout.base import RolloutEngine
from perdure.rollout.generate import GenerateEngine
from perdure.rollout.local import LocalEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What every activity needs of a version."""

    loaded: LoadedModel
    """float32 masters, tokenizer, window."""
    working: Any
    """A copy in the compute dtype, for decoding and scoring; its owner keeps it in step with the masters."""
    engine: RolloutEngine
    renderer: Renderer
    dtype: torch.dtype


def open_session(config: RunConfig, folder: Path | None = None) -> Session:
    """Load the version in ``folder``, or the configured base model. Raises InputError when it cannot be loaded."""
    loaded = load(config.model, folder)
    dtype = compute_dtype(config.model)
    working = working_copy(loaded.model, dtype)
    engine = make_engine(loaded, working, config.eval.batch_tokens)
    return Session(loaded, working, engine, Renderer(loaded.tokenizer, loaded.end_ids, loaded.window), dtype)


def make_engine(loaded: LoadedModel, working: Any, batch_tokens: int = 8192) -> RolloutEngine:
    """The own decode where the architecture runs packed, else transformers' ``generate``, with a warning."""
    if is_enabled(working):
        return LocalEngine(loaded, working, batch_tokens)
    logger.warning(
        "%s cannot run packed (its attention or positions are of a kind that Perdure does not know): decoding goes "
        "through transformers' generate, which is several times slower", type(working).__name__,
    )  # fmt: skip
    return GenerateEngine(loaded, working, batch_tokens)


def weights_sha256(model: Any) -> str:
    """One hash over names, shapes and float32 values of all parameters: the same weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().float().contiguous().cpu().numpy())
    return digest.hexdigest()
