"""Rows of prompt and completion as tensors, and rows in groups that fit into one forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from perdure.types import Batch, Rollout


def collate(rollouts: Sequence[Rollout], role: str, pad_id: int, skip_first_tokens: int = 0,
            device: torch.device | str = "cpu") -> Batch:  # fmt: skip
    """Right-padded tensors of one role (``student`` or ``teacher``) on ``device``.

    Loss positions come row by row, in the order of the completion, and are the same in number and target for both
    roles. The hidden state at position p predicts the token at p + 1. Raises ValueError for an empty batch or prompt.
    """
    prompts = [r.student_prompt if role == "student" else r.teacher_prompt for r in rollouts]
    rows = [[*p.token_ids, *r.completion.token_ids] for p, r in zip(prompts, rollouts, strict=True)]
    if not rows or not all(p.token_ids for p in prompts):
        raise ValueError("collate needs at least one rollout, and every prompt at least one token")
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    places = [
        (index, len(p.token_ids) + t - 1, r.completion.token_ids[t], r.weight, r.label_weight,
         r.completion.sampler_logprobs[t] if r.lagging else math.nan, r.has_demonstration)
        for index, (p, r) in enumerate(zip(prompts, rollouts, strict=True))
        for t in r.loss_places(skip_first_tokens)
    ]  # fmt: skip
    columns = list(zip(*places, strict=True)) or [()] * 7
    row_N, position_N, target_N = (torch.tensor(column, dtype=torch.int64) for column in columns[:3])
    weights_N, label_weights_N, sampler_N = (torch.tensor(column, dtype=torch.float32) for column in columns[3:6])
    demonstrated_N = torch.tensor(columns[6], dtype=torch.bool)
    tensors = (input_ids, mask, row_N, position_N, target_N, weights_N, label_weights_N, demonstrated_N, sampler_N)
    return Batch(*(tensor.to(device) for tensor in tensors))


def micro_batches(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows sorted by length, in groups whose padded size stays within ``budget`` tokens (a longer row goes alone)."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
