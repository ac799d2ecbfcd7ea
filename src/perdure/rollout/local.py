"""Batched decoding with a transformers model: rows sorted by length, finished ones dropped, log-probabilities kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from perdure.models import LoadedModel, backbone, head_of
from perdure.rollout.base import Progress, SamplingParams
from perdure.types import Completion, Prompt


class LocalEngine:
    """Decodes with ``model`` (a working copy). Rows of one batch share key/value storage; left padding aligns them."""

    def __init__(self, loaded: LoadedModel, model: Any, batch_tokens: int = 8192):
        self.model = model
        self.end_ids = torch.tensor(loaded.end_ids)
        self.pad_id = loaded.pad_id
        self.batch_tokens = batch_tokens

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int], progress: Progress | None = None
    ) -> list[Completion]:
        """See RolloutEngine. Raises ValueError when prompts and seeds differ in number."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        done: dict[int, Completion] = {}
        for rows in self._batches(prompts, params.max_new_tokens):
            ids = [prompts[i].token_ids for i in rows]
            uniforms = torch.stack([_uniforms(seeds[i], params.max_new_tokens) for i in rows])
            for i, completion in zip(rows, self._decode(ids, params, uniforms), strict=True):
                done[i] = completion
            if progress:
                progress(sum(len(done[i].token_ids) for i in rows), len(done))
        return [done[i] for i in range(len(prompts))]

    def _batches(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[list[int]]:
        """Rows of like length together, so that padding stays small; a batch's padded size stays in the budget."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i))
        batch: list[int] = []
        for i in order:
            longest = len(prompts[batch[0]].token_ids) if batch else 0
            if batch and (len(batch) + 1) * (longest + max_new_tokens) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _decode(self, ids: list[tuple[int, ...]], params: SamplingParams, uniforms_BT: Tensor) -> list[Completion]:
        tokens: list[list[int]] = [[] for _ in ids]
        logprobs: list[list[float]] = [[] for _ in ids]
        finished = [False] * len(ids)
        alive = torch.arange(len(ids))
        input_ids, mask = self._left_padded(ids)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache(config=self.model.config)
        head = head_of(self.model)
        for t in range(params.max_new_tokens):
            hidden_BH = backbone(self.model)(
                input_ids=input_ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
            ).last_hidden_state[:, -1]
            next_B, logprob_B = choose(head.logits(hidden_BH), params.temperature, uniforms_BT[alive, t])
            ended_B = torch.isin(next_B, self.end_ids)
            for row, token, value, end in zip(alive.tolist(), next_B.tolist(), logprob_B.tolist(), ended_B.tolist(),
                                              strict=True):  # fmt: skip
                tokens[row].append(token)
                logprobs[row].append(value)
                finished[row] = end
            keep = (~ended_B).nonzero().squeeze(-1)
            if not len(keep):
                break
            if len(keep) < len(alive):
                cache.batch_select_indices(keep)
                mask, positions, next_B, alive = mask[keep], positions[keep], next_B[keep], alive[keep]
            input_ids = next_B[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat((mask, torch.ones_like(input_ids)), dim=-1)
        return [Completion(tuple(t), tuple(p), f) for t, p, f in zip(tokens, logprobs, finished, strict=True)]

    def _left_padded(self, ids: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, ids))
        input_ids = torch.full((len(ids), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(ids), width), dtype=torch.int64)
        for row, tokens in enumerate(ids):
            input_ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        return input_ids, mask


def choose(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens (int64 [B]) and their log-probabilities (float32 [B]) under the distribution they were drawn from.

    Sampling inverts the cumulative distribution at one uniform number a row, so a row's token depends on its own
    number alone. Greedy log-probabilities are those at temperature 1."""
    if temperature == 0:
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        next_B = logits_BV.argmax(-1)
    else:
        logprobs_BV = torch.log_softmax(logits_BV / temperature, dim=-1)
        cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
        # Scaled by the last entry, which rounding keeps from being exactly one.
        next_B = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True).squeeze(-1)
        next_B = next_B.clamp_max(logits_BV.shape[-1] - 1)
    return next_B, logprobs_BV.gather(-1, next_B[:, None]).squeeze(-1)


def _uniforms(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    return torch.rand(count, generator=generator, dtype=torch.float64)
