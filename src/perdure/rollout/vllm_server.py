"""A vLLM server, started by hand in an environment of its own with the base model of the workspace:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --served-model-name perdure --logprobs-mode processed_logprobs \\
      --generation-config vllm --hf-overrides '{"tie_word_embeddings": false}'

Development mode is what offers the reloading of weights; keep such a server on a network of your own. Where it asks for
a key (``--api-key``), that is taken from the environment's ``VLLM_API_KEY``. The override is for models whose head is
their embedding: vLLM does not reload a tied head, so it gets one of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx2

from perdure.config import RolloutConfig
from perdure.rollout.base import Progress, SamplingParams
from perdure.servers import headers_for, without_key
from perdure.types import Completion, InputError

KEY = "VLLM_API_KEY"
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What a server would otherwise take from the model's generation_config.json: samples of another distribution."""


class VllmServer:
    """See ``rollout.vllm.Vllm``: the server that ``config.url`` names."""

    remedy = ("start vLLM with the workspace's base model, --logprobs-mode processed_logprobs and --hf-overrides "
              "'{\"tie_word_embeddings\": false}'")  # fmt: skip

    def __init__(self, config: RolloutConfig, transport: httpx2.BaseTransport | None = None):
        self.config, self.where = config, config.url
        headers = headers_for(config.url, KEY)
        self.client = httpx2.Client(base_url=config.url, headers=headers, timeout=config.timeout, transport=transport)
        weakref.finalize(self, self.client.close)

    def version(self) -> str | None:
        return self._ask("GET", "/weight_info").get("weight_version")

    def reload(self, folder: Path, version: str) -> None:
        self._ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._ask("POST", "/reset_prefix_cache")  # it holds keys and values of the weights before
        self._ask("POST", "/update_weight_version", {"new_version": version})

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int],
                 end_ids: Sequence[int], progress: Progress | None) -> list[Completion]:  # fmt: skip
        found: dict[int, Completion] = {}
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            jobs = {pool.submit(self._complete, token_ids, params, seed, end_ids): place
                    for place, (token_ids, seed) in enumerate(zip(prompts, seeds, strict=True))}  # fmt: skip
            for job in as_completed(jobs):
                found[jobs[job]] = completion = job.result()
                if progress:
                    progress(len(completion.token_ids), len(found))
        return [found[place] for place in range(len(prompts))]

    def _complete(self, token_ids: Sequence[int], params: SamplingParams, seed: int,
                  end_ids: Sequence[int]) -> Completion:  # fmt: skip
        answer = self._ask("POST", "/v1/completions", {
            "model": self.config.model, "prompt": list(token_ids), "max_tokens": params.max_new_tokens,
            "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k or -1,
            "seed": seed, "logprobs": 0, "return_token_ids": True, "stop_token_ids": list(end_ids),
            **NEUTRAL,
        })["choices"][0]  # fmt: skip
        tokens, logprobs = answer["token_ids"], answer["logprobs"]["token_logprobs"]
        return Completion(tuple(tokens), tuple(logprobs), bool(tokens) and tokens[-1] in end_ids)

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
