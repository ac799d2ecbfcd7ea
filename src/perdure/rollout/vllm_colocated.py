"""vLLM inside this process, on the device that trains: one for all versions that the process works with.

vLLM has to be installed beside Perdure, in versions of torch and transformers that both take.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.config import ModelConfig
from perdure.rollout.base import Progress, SamplingParams
from perdure.types import Completion, InputError

OURS = {
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",  # not the model folder's own, which would sample from another distribution
    "hf_overrides": {"tie_word_embeddings": False},  # a reload leaves a tied head as it was
    "skip_tokenizer_init": True,
}
"""What makes its samples and log-probabilities those that the loss is about."""

OF_MODEL = {"model", "dtype", "revision", "trust_remote_code", "max_model_len"}
"""What the section [model] says; beyond another ``max_model_len`` than its window answers would be cut short unsaid."""

DEFAULTS = {"gpu_memory_utilization": 0.3, "disable_log_stats": True, "use_tqdm_on_load": False}
"""The rest of a GPU is the trainer's."""

ONE_PROCESS = 'rollout.mode = "colocate" is for one process; for several start a server (mode = "server")'

AT_ONCE = 256
"""Prompts a call, so that progress moves."""

_RUNNING: dict[str, ColocatedVllm] = {}


class ColocatedVllm:
    """See ``rollout.vllm.Vllm``. ``llm``: a ``vllm.LLM`` with the options of ``OURS``; ``library``: its module."""

    where = "vLLM in this process"
    remedy = ("this version of vLLM may compute this model otherwise or not reload all of its weights; use "
              'rollout.engine = "own"')  # fmt: skip

    def __init__(self, llm: Any, library: Any):
        self.llm, self.library = llm, library
        refusal = getattr(getattr(library, "exceptions", None), "VLLMClientError", ValueError)  # by its version
        self.refusals = (ValueError, refusal)
        self._version: str | None = None

    def version(self) -> str | None:
        return self._version

    def reload(self, folder: Path, version: str) -> None:
        self._version = None  # until all of them are there
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()
        self._version = version

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int],
                 end_ids: Sequence[int], progress: Progress | None) -> list[Completion]:  # fmt: skip
        found: list[Completion] = []
        for start in range(0, len(prompts), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            asked = [{"prompt_token_ids": list(ids)} for ids in prompts[part]]
            try:
                answers = self.llm.generate(asked, [self._sampling(params, seed, end_ids) for seed in seeds[part]],
                                            use_tqdm=False)  # fmt: skip
            except self.refusals as error:  # a prompt beyond max_model_len, above all
                raise InputError(f"{self.where}: {error}") from error
            made = [_completion(answer.outputs[0], end_ids) for answer in answers]
            found += made
            if progress:
                progress(sum(len(completion.token_ids) for completion in made), len(found))
        return found

    def _sampling(self, params: SamplingParams, seed: int, end_ids: Sequence[int]) -> Any:
        return self.library.SamplingParams(
            max_tokens=params.max_new_tokens, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            seed=seed, logprobs=0, stop_token_ids=list(end_ids), detokenize=False,
        )  # fmt: skip


def _completion(output: Any, end_ids: Sequence[int]) -> Completion:
    tokens = tuple(output.token_ids)
    logprobs = tuple(found[token].logprob for token, found in zip(tokens, output.logprobs, strict=True))
    return Completion(tokens, logprobs, bool(tokens) and tokens[-1] in end_ids)


def colocated(source: str, model: ModelConfig, dtype: str, window: int, options: dict[str, Any]) -> ColocatedVllm:
    """This process's vLLM for ``source`` (a folder or a hub id), started at the first call.

    ``dtype``: of the weights; ``window``: most tokens of prompt and answer; ``options``: what else ``vllm.LLM`` takes.
    Raises InputError where vLLM is not installed, does not start, or would be given an option that is not free."""
    if taken := sorted((OURS.keys() | OF_MODEL) & options.keys()):
        raise InputError(f"rollout.options: {', '.join(taken)}: set by Perdure, which needs them as they are")
    given = {"model": source, "dtype": dtype, "trust_remote_code": model.trust_remote_code, "max_model_len": window}
    given |= {"revision": model.revision or None} | DEFAULTS | options | OURS
    key = repr(sorted(given.items()))
    if key not in _RUNNING:
        # Forking a process whose torch has threads can hang it; its log is none of the command's.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers; nothing leaves unasked
        try:
            vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise InputError(f"rollout.mode: vLLM cannot be imported ({error}): pip install 'vllm>=0.32', or "
                             'start a server and use mode = "server"') from error  # fmt: skip
        try:
            llm = vllm.LLM(**given)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise InputError(f"rollout.options: vLLM does not start: {error}") from error
        _RUNNING[key] = ColocatedVllm(llm, vllm)
    return _RUNNING[key]
