"""Decoding through transformers' own ``generate``, for architectures that cannot run packed: slower, the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from perdure.models import LoadedModel
from perdure.rollout.base import Progress, SamplingParams, references_of
from perdure.rollout.sampling import choose, uniforms
from perdure.types import Completion, Prompt


class GenerateEngine:
    """Rows of equal length together: nothing is padded, since some architectures have no mask to hide padding."""

    def __init__(self, loaded: LoadedModel, model: Any, batch_tokens: int = 8192):
        self.model = model
        self.end_ids, self.pad_id = loaded.end_ids, loaded.pad_id
        self.batch_tokens = batch_tokens

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                 progress: Progress | None = None,
                 references: Sequence[Sequence[int]] | None = None) -> list[Completion]:  # fmt: skip
        """See RolloutEngine; a reference has no use here. Raises ValueError when prompts and seeds differ in number."""
        references_of(prompts, seeds, references)
        done: dict[int, Completion] = {}
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i))
        for length, rows in groupby(order, key=lambda i: len(prompts[i].token_ids)):
            members, most = list(rows), max(1, self.batch_tokens // (length + params.max_new_tokens))
            for begin in range(0, len(members), most):
                batch = members[begin : begin + most]
                ids_BT = torch.tensor([prompts[i].token_ids for i in batch], device=self.model.device)
                uniforms_BT = torch.stack([uniforms(seeds[i], params.max_new_tokens) for i in batch])
                done |= zip(batch, self._decode(ids_BT, params, uniforms_BT), strict=True)
                if progress:
                    progress(sum(len(done[i].token_ids) for i in batch), len(done))
        return [done[i] for i in range(len(prompts))]

    def _decode(self, ids_BT: Tensor, params: SamplingParams, uniforms_BT: Tensor) -> list[Completion]:
        draw = _Draw(params, uniforms_BT)
        written_BT = self.model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=params.max_new_tokens, do_sample=False,
            num_beams=1, repetition_penalty=1.0, eos_token_id=list(self.end_ids), pad_token_id=self.pad_id,
            logits_processor=LogitsProcessorList([draw]),
        )[:, ids_BT.shape[1]:]  # fmt: skip
        completions = []
        for row, tokens in enumerate(written_BT.tolist()):
            end = next((t for t, token in enumerate(tokens) if token in self.end_ids), None)
            kept = tokens if end is None else tokens[: end + 1]
            logprobs = tuple(float(logprob_B[row]) for logprob_B in draw.logprobs[: len(kept)])
            completions.append(Completion(tuple(kept), logprobs, end is not None))
        return completions


class _Draw(LogitsProcessor):
    """Draws each row's next token itself and leaves greedy decoding no other choice."""

    def __init__(self, params: SamplingParams, uniforms_BT: Tensor):
        self.params, self.uniforms_BT = params, uniforms_BT
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        next_B, logprob_B = choose(scores.float().clone(), self.params, self.uniforms_BT[:, len(self.logprobs)])
        self.logprobs.append(logprob_B)
        return torch.full_like(scores, -torch.inf).scatter(1, next_B[:, None], 0.0)
