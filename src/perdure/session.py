"""One version of the model, loaded for work: masters, working copy, decode engine and renderer that belong together."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perdure.attention import is_enabled
from perdure.config import RunConfig
from perdure.contexts import Renderer
from perdure.likelihood import Pair, score_pairs
from perdure.loading import load_version
from perdure.memory import keep_freed_memory
from perdure.models import LoadedModel, compute_dtype, device_of, resolve, sync_weights, working_copy
from perdure.processes import GROUP, copy_from_lead, followed_by, from_lead, together
from perdure.rollout.base import RolloutEngine, SamplingParams
from perdure.rollout.generate import GenerateEngine
from perdure.rollout.local import LocalEngine
from perdure.rollout.split import SplitEngine
from perdure.types import InputError, Prompt

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
    key: int = 0
    """By which the other processes of the run know it."""
    is_base: bool = False
    """The base model itself, not a version of it."""
    base_sha256: str | None = None
    """What the base model's weights have to be (``weights_sha256``), where that is known."""

    def publish(self) -> None:
        """Bring the working copy, and the other processes, in step with the masters."""
        sync_weights(self.working, self.loaded.model)
        with together("publish", self.key):
            copy_from_lead([*self.loaded.model.parameters(), *self.working.parameters()])


_KEYS = itertools.count(1)
FOLLOWED: dict[int, Session] = {}
"""In a process that follows: its own twin of each of the lead's sessions."""


def open_session(config: RunConfig, folder: Path | None = None, base_sha256: str | None = None) -> Session:
    """Load the version in ``folder``, or the configured base model, in every process. Raises InputError when it cannot
    be loaded, or when the base model has other weights than ``base_sha256`` says."""
    key = next(_KEYS)
    with together("open", key, config, folder, base_sha256):
        return _open(key, config, folder, base_sha256)


def _open(key: int, config: RunConfig, folder: Path | None, base_sha256: str | None) -> Session:
    device = device_of(config.model)
    if device.type == "cpu":
        keep_freed_memory()
    # Masters of adapters take no part in training, and those that are to be divided need not fit whole: they leave a
    # GPU's memory to the working copy.
    divided = config.train.fsdp and GROUP.count > 1
    there = torch.device("cpu") if config.train.lora_rank or divided else device
    loaded = load_version(config.model, folder, there, base_sha256)
    dtype = from_lead(compute_dtype(config.model))  # another machine's probe could say something else
    working = working_copy(loaded.model, dtype, device)
    remote = config.rollout.engine == "vllm"
    engine = _remote(loaded, working, config) if remote else make_engine(loaded, working, config.eval.batch_tokens)
    if GROUP.count > 1:
        engine = SplitEngine(engine, key, alone=remote)  # one server: the lead asks it
    renderer = Renderer(loaded.tokenizer, loaded.end_ids, loaded.window, config.context, config.thinking)
    return Session(loaded, working, engine, renderer, dtype, key, folder is None, base_sha256)


def _remote(loaded: LoadedModel, working: Any, config: RunConfig) -> RolloutEngine:
    from perdure.rollout.vllm import VllmEngine
    from perdure.rollout.vllm_colocated import ONE_PROCESS, colocated
    from perdure.rollout.vllm_server import VllmServer

    rollout = config.rollout
    if rollout.mode == "server":
        vllm = VllmServer(rollout)
    elif GROUP.count > 1:
        raise InputError(ONE_PROCESS)
    else:
        dtype = str(working.dtype).removeprefix("torch.")
        vllm = colocated(resolve(config.model), config.model, dtype, loaded.window, rollout.options)
    return VllmEngine(loaded, working, vllm, rollout.weights_folder)


@followed_by("open")
def _follow_open(key: int, config: RunConfig, folder: Path | None, base_sha256: str | None) -> None:
    FOLLOWED[key] = _open(key, config, folder, base_sha256)


@followed_by("drop")
def _follow_drop(key: int) -> None:
    FOLLOWED.pop(key, None)


@followed_by("generate")
def _follow_generate(key: int, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                     references: Sequence[Sequence[int]]) -> None:  # fmt: skip
    FOLLOWED[key].engine.generate(prompts, params, seeds, None, references)


@followed_by("score")
def _follow_score(key: int, pairs: Sequence[Pair], batch_tokens: int) -> None:
    score_pairs(FOLLOWED[key].working, pairs, batch_tokens=batch_tokens, key=key)


@followed_by("publish")
def _follow_publish(key: int) -> None:
    session = FOLLOWED[key]
    copy_from_lead([*session.loaded.model.parameters(), *session.working.parameters()])


def base_model(config: RunConfig, session: Session) -> Any:
    """The configured base model by itself, in float32, in the CPU's memory: for a copy to be made of.

    Raises InputError where it is not the base model that the session knows of."""
    return load_version(config.model, None, torch.device("cpu"), session.base_sha256).model


def base_as_teacher(config: RunConfig, session: Session) -> tuple[Any, RolloutEngine]:
    """A working copy of the base model beside ``session``'s, and an engine on it: this process's own, whoever answers
    for the student. The float32 weights that it was made of are let go."""
    working = working_copy(base_model(config, session), session.dtype, session.working.device)
    return working, make_engine(session.loaded, working, config.eval.batch_tokens)


def make_engine(loaded: LoadedModel, working: Any, batch_tokens: int = 8192) -> RolloutEngine:
    """The own decode where the architecture runs packed, else transformers' ``generate``, with a warning."""
    if is_enabled(working):
        return LocalEngine(loaded, working, batch_tokens)
    logger.warning(
        "%s cannot run packed (its attention or positions are of a kind that Perdure does not know): decoding goes "
        "through transformers' generate, which is several times slower", type(working).__name__,
    )  # fmt: skip
    return GenerateEngine(loaded, working, batch_tokens)
