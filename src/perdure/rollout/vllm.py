"""Rollouts by vLLM, in a server of its own or inside this process, which gets the model's weights whenever they have
changed.

Weights travel through ``rollout.weights_folder``, which both sides must see; without it through a temporary folder that
this user alone can read, gone with the engine. Log-probabilities are those of the distribution sampled from (processed,
not raw). After every reload a few tokens are scored by both sides, and a vLLM that disagrees is refused: samples of
another model would not be on-policy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from perdure.adapters import effective_parameters
from perdure.batching import collate
from perdure.losses import pick
from perdure.models import LoadedModel, head_of, hidden_at_loss_positions
from perdure.rollout.base import Progress, SamplingParams, references_of
from perdure.types import Completion, InputError, Prompt, Rollout

HEAD = "lm_head.weight"
PROBE = SamplingParams(16, temperature=0.5)
PARITY = 0.2
"""Most nats a token, on average over a probe, by which both sides may differ: bfloat16 alone makes about 0.05."""


class Vllm(Protocol):
    """A running vLLM, wherever it runs."""

    where: str
    """How errors name it."""
    remedy: str
    """What may help where its log-probabilities are not the model's."""

    def version(self) -> str | None:
        """The name of the weights that it has, where somebody gave it one."""
        ...

    def reload(self, folder: Path, version: str) -> None:
        """Take the weights of ``model.safetensors`` in ``folder``, and forget what was computed with others."""
        ...

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int],
                 end_ids: Sequence[int], progress: Progress | None) -> list[Completion]:  # fmt: skip
        """See RolloutEngine.generate; prompts as token ids."""
        ...


class VllmEngine:
    """Generates with the weights that ``working`` has at each call, or where it ``lags`` had when they were last
    sent; sampling is vLLM's own, seeded by row. Several engines may share one ``vllm``."""

    def __init__(self, loaded: LoadedModel, working: Any, vllm: Vllm, weights_folder: str = ""):
        self.working, self.end_ids, self.pad_id = working, list(loaded.end_ids), loaded.pad_id
        self.vllm, self.weights_folder = vllm, weights_folder
        self.name = uuid.uuid4().hex[:12]
        self.lags, self.sent = False, False
        self._own_folder: Path | None = None

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                 progress: Progress | None = None,
                 references: Sequence[Sequence[int]] | None = None) -> list[Completion]:  # fmt: skip
        """See RolloutEngine; references are not used. Raises InputError when vLLM cannot be used, saying why."""
        references_of(prompts, seeds, references)
        if not prompts:
            return []
        if not (self.lags and self.sent) and self._push():
            self._check(prompts[0])
        self.sent = True
        return self.vllm.complete([prompt.token_ids for prompt in prompts], params, seeds, self.end_ids, progress)

    def _push(self) -> bool:
        """Hand the weights over; False where vLLM has these very ones."""
        # Every change in place counts a tensor's version up, whoever makes it: an optimizer, a copy.
        counts = [(name, parameter._version) for name, parameter in self.working.named_parameters()]
        version = f"{self.name}-{hashlib.sha256(repr(counts).encode()).hexdigest()[:16]}"
        if self.vllm.version() == version:
            return False
        folder = self._folder()
        beside = folder / f".{self.name}.tmp"
        save_file(self._weights(), beside)
        os.replace(beside, folder / "model.safetensors")
        self.vllm.reload(folder, version)
        return True

    def _weights(self) -> dict[str, Tensor]:
        """All parameters in the working dtype, and a head also where it is the embedding."""
        dtype = self.working.dtype
        tensors = {name: value.detach().to(dtype).contiguous() for name, value in effective_parameters(self.working)}
        if HEAD not in tensors:
            tensors[HEAD] = head_of(self.working).weight_VH.detach().to(dtype, copy=True)
        return tensors

    def _folder(self) -> Path:
        """Where weights travel through; it is there."""
        if self.weights_folder:
            folder = Path(self.weights_folder).expanduser().resolve()
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        if self._own_folder is None:
            self._own_folder = Path(mkdtemp(prefix="perdure-vllm-"))
            weakref.finalize(self, shutil.rmtree, self._own_folder, ignore_errors=True)
        return self._own_folder

    @torch.no_grad()
    def _check(self, prompt: Prompt) -> None:
        """Raises InputError where vLLM's log-probabilities are not those of the working copy."""
        (completion,) = self.vllm.complete([prompt.token_ids], PROBE, [0], self.end_ids, None)
        batch = collate([Rollout(prompt, prompt, completion)], "student", self.pad_id, device=self.working.device)
        logits_NV = head_of(self.working).logits(hidden_at_loss_positions(self.working, batch)) / PROBE.temperature
        own_N = pick(logits_NV.log_softmax(-1), batch.targets_N)
        theirs_N = torch.tensor(completion.sampler_logprobs, device=own_N.device)
        if not (difference := float((own_N - theirs_N).abs().mean())) <= PARITY:
            raise InputError(
                f"{self.vllm.where}: its log-probabilities differ from this model's by {difference:.2f} nats a token; "
                + self.vllm.remedy
            )
