"""Rows of prompt and completion as tensors, and rows in groups that fit into one forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from perdure.attention import is_enabled
from perdure.packing import SHARED_TOKENS, common_prefix
from perdure.types import Batch, Prompt, Rollout


def collate(rollouts: Sequence[Rollout], role: str, pad_id: int, skip_first_tokens: int = 0,
            device: torch.device | str = "cpu") -> Batch:  # fmt: skip
    """Right-padded tensors of one role (``student`` or ``teacher``) on ``device``.

    Loss positions come row by row, in the order of the completion, and are the same in number and target for both
    roles. The hidden state at position p predicts the token at p + 1. Raises ValueError for an empty batch or prompt.
    """
    prompts, rows = [prompt_of(r, role) for r in rollouts], token_rows(rollouts, role)
    if not rows or not all(p.token_ids for p in prompts):
        raise ValueError("collate needs at least one rollout, and every prompt at least one token")
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    places = [
        (index, len(p.token_ids) + t - 1, r.completion.token_ids[t], *r.terms(t),
         r.completion.sampler_logprobs[t] if r.lagging else math.nan, r.has_demonstration)
        for index, (p, r) in enumerate(zip(prompts, rollouts, strict=True))
        for t in r.loss_places(skip_first_tokens)
    ]  # fmt: skip
    columns = list(zip(*places, strict=True)) or [()] * 8
    rows_N, positions_N, targets_N, labels_N = (torch.tensor(columns[c], dtype=torch.int64) for c in (0, 1, 2, 4))
    weights_N, label_weights_N, sampler_N = (torch.tensor(columns[c], dtype=torch.float32) for c in (3, 5, 6))
    demonstrated_N = torch.tensor(columns[7], dtype=torch.bool)
    tensors = (input_ids, mask, rows_N, positions_N, targets_N, weights_N, labels_N, label_weights_N, demonstrated_N,
               sampler_N)  # fmt: skip
    return Batch(*(tensor.to(device) for tensor in tensors))


def prompt_of(rollout: Rollout, role: str) -> Prompt:
    """What ``student`` or ``teacher`` sees before the completion."""
    return rollout.student_prompt if role == "student" else rollout.teacher_prompt


def token_rows(rollouts: Sequence[Rollout], role: str) -> list[tuple[int, ...]]:
    """Each rollout's prompt and completion in one, as a role reads them."""
    return [(*prompt_of(r, role).token_ids, *r.completion.token_ids) for r in rollouts]


def passes(model: Any, rollouts: Sequence[Rollout], role: str, budget: int) -> list[list[int]]:
    """The places of ``rollouts`` in groups, each for one forward pass of ``model`` as it runs: packed or padded."""
    return micro_batches(token_rows(rollouts, role), budget, is_enabled(model))


def micro_batches(rows: Sequence[tuple[int, ...]], budget: int, packed: bool) -> list[list[int]]:
    """The places of ``rows`` in groups for one forward pass: at most ``budget`` tokens each (a longer row goes alone).

    ``packed``: rows with a prefix in common stand together, and it counts once; else rows of like length do, and each
    counts as much as the longest of its group."""
    groups: list[list[int]] = []
    size = 0

    def with_row(group: list[int], place: int) -> int:
        if not packed:
            return (len(group) + 1) * len(rows[group[0]])
        known = common_prefix(rows[group[-1]], rows[place])
        return size + len(rows[place]) - (known if known >= SHARED_TOKENS else 0)

    for place in sorted(range(len(rows)), key=lambda i: (rows[i] if packed else (-len(rows[i]),), i)):
        if groups and (whole := with_row(groups[-1], place)) <= budget:
            groups[-1].append(place)
            size = whole
        else:
            groups.append([place])
            size = len(rows[place])
    return groups
