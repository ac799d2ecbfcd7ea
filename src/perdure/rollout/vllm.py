"""Rollouts by a running vLLM server, which gets the model's weights whenever they have changed.

Start it in an environment of its own, with the base model of the workspace, and name it in ``rollout.url``:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --served-model-name perdure --logprobs-mode processed_logprobs \\
      --generation-config vllm --hf-overrides '{"tie_word_embeddings": false}'

Development mode is what offers the reloading of weights; keep such a server on a network of your own. Where it asks for
a key (``--api-key``), that is taken from the environment's ``VLLM_API_KEY``. The override is for models whose head is
their embedding: vLLM does not reload a tied head, so it gets one of its own. Weights travel through
``rollout.weights_folder``, which both sides must see; without it through a temporary folder that this user alone can
read, gone with the engine. Log-probabilities are those of the distribution sampled
from (processed, not raw). After every reload a few tokens are scored by both sides, and a server that disagrees is
refused: samples of another model would not be on-policy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx2
import torch
from safetensors.torch import save_file
from torch import Tensor

from perdure.adapters import effective_parameters
from perdure.batching import collate
from perdure.config import RolloutConfig
from perdure.losses import pick
from perdure.models import LoadedModel, head_of, hidden_at_loss_positions
from perdure.rollout.base import Progress, SamplingParams, references_of
from perdure.servers import headers_for, without_key
from perdure.types import Completion, InputError, Prompt, Rollout

KEY = "VLLM_API_KEY"
HEAD = "lm_head.weight"
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What a server would otherwise take from the model's generation_config.json: samples of another distribution."""
PROBE = SamplingParams(16, temperature=0.5)
PARITY = 0.2
"""Most nats a token, on average over a probe, by which both sides may differ: bfloat16 alone makes about 0.05."""


class VllmEngine:
    """Generates with the weights that ``working`` has at each call, or where it ``lags`` had when they were last
    sent; sampling is vLLM's own, seeded by row."""

    def __init__(self, loaded: LoadedModel, working: Any, config: RolloutConfig,
                 transport: httpx2.BaseTransport | None = None):  # fmt: skip
        self.working, self.end_ids, self.pad_id = working, list(loaded.end_ids), loaded.pad_id
        self.config = config
        self.name = uuid.uuid4().hex[:12]
        self.lags, self.sent = False, False
        headers = headers_for(config.url, KEY)
        self.client = httpx2.Client(base_url=config.url, headers=headers, timeout=config.timeout, transport=transport)
        weakref.finalize(self, self.client.close)
        self._own_folder: Path | None = None

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                 progress: Progress | None = None,
                 references: Sequence[Sequence[int]] | None = None) -> list[Completion]:  # fmt: skip
        """See RolloutEngine; references are not used. Raises InputError when the server cannot be used, saying why."""
        references_of(prompts, seeds, references)
        if not prompts:
            return []
        if not (self.lags and self.sent) and self._push():
            self._check(prompts[0])
        self.sent = True
        found: dict[int, Completion] = {}
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            jobs = {pool.submit(self._complete, prompt.token_ids, params, seed): place
                    for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))}  # fmt: skip
            for job in as_completed(jobs):
                found[jobs[job]] = completion = job.result()
                if progress:
                    progress(len(completion.token_ids), len(found))
        return [found[place] for place in range(len(prompts))]

    def _complete(self, token_ids: Sequence[int], params: SamplingParams, seed: int) -> Completion:
        answer = self._ask("POST", "/v1/completions", {
            "model": self.config.model, "prompt": list(token_ids), "max_tokens": params.max_new_tokens,
            "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k or -1,
            "seed": seed, "logprobs": 0, "return_token_ids": True, "stop_token_ids": self.end_ids,
            **NEUTRAL,
        })["choices"][0]  # fmt: skip
        tokens, logprobs = answer["token_ids"], answer["logprobs"]["token_logprobs"]
        return Completion(tuple(tokens), tuple(logprobs), bool(tokens) and tokens[-1] in self.end_ids)

    def _push(self) -> bool:
        """Give the server the weights; False where it has these very ones."""
        # Every change in place counts a tensor's version up, whoever makes it: an optimizer, a copy.
        counts = [(name, parameter._version) for name, parameter in self.working.named_parameters()]
        version = f"{self.name}-{hashlib.sha256(repr(counts).encode()).hexdigest()[:16]}"
        if self._ask("GET", "/weight_info").get("weight_version") == version:
            return False
        folder = self._folder()
        beside = folder / f".{self.name}.tmp"
        save_file(self._weights(), beside)
        os.replace(beside, folder / "model.safetensors")
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._ask("POST", "/collective_rpc", arguments)
        self._ask("POST", "/reset_prefix_cache")  # it holds keys and values of the weights before
        self._ask("POST", "/update_weight_version", {"new_version": version})
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
        if self.config.weights_folder:
            folder = Path(self.config.weights_folder).expanduser().resolve()
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        if self._own_folder is None:
            self._own_folder = Path(mkdtemp(prefix="perdure-vllm-"))
            weakref.finalize(self, shutil.rmtree, self._own_folder, ignore_errors=True)
        return self._own_folder

    @torch.no_grad()
    def _check(self, prompt: Prompt) -> None:
        """Raises InputError where the server's log-probabilities are not those of the working copy."""
        completion = self._complete(prompt.token_ids, PROBE, 0)
        batch = collate([Rollout(prompt, prompt, completion)], "student", self.pad_id, device=self.working.device)
        logits_NV = head_of(self.working).logits(hidden_at_loss_positions(self.working, batch)) / PROBE.temperature
        own_N = pick(logits_NV.log_softmax(-1), batch.targets_N)
        theirs_N = torch.tensor(completion.sampler_logprobs, device=own_N.device)
        if not (difference := float((own_N - theirs_N).abs().mean())) <= PARITY:
            raise InputError(
                f"{self.config.url}: its log-probabilities differ from this model's by {difference:.2f} nats a token; "
                "start vLLM with the workspace's base model, --logprobs-mode processed_logprobs and "
                "--hf-overrides '{\"tie_word_embeddings\": false}'"
            )

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = self.client.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise InputError(f"rollout.url {self.config.url}: no vLLM server answers there: {error}") from error
        if response.status_code == 404 and not path.startswith("/v1/"):
            raise InputError(f"{self.config.url}: offers no {path}; start vLLM with VLLM_SERVER_DEV_MODE=1")
        if response.is_error:
            raise InputError(
                f"{self.config.url}{path}: {response.status_code}: {without_key(response.text, KEY)[:300]}"
            )
        return response.json() if response.content else {}
