"""The next token from logits: one uniform number a token, so that what is drawn depends on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from perdure.rollout.base import SamplingParams

BLOCK = 256
"""Vocabulary entries summed at once: the place of a uniform number is found by block, then inside the block."""


def choose(logits_NV: Tensor, params: SamplingParams, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens (int64 [N]) and their log-probabilities (float32 [N]) under the distribution they were drawn from.

    Sampling inverts the cumulative distribution at one uniform number (float64, 0 <= u < 1) a position. Greedy
    log-probabilities are those at temperature 1. Overwrites ``logits_NV`` (float32)."""
    if params.temperature == 0:
        values_N, next_N = logits_NV.max(-1)
        return next_N, values_N - logits_NV.logsumexp(-1)
    logits_NV = logits_NV if params.temperature == 1 else logits_NV.div_(params.temperature)
    logits_NV = truncated(logits_NV, params.top_k, params.top_p)
    weights_NV = logits_NV.sub_(logits_NV.amax(-1, keepdim=True)).exp_()
    blocks_NCB = pad(weights_NV, (0, -weights_NV.shape[1] % BLOCK)).view(len(weights_NV), -1, BLOCK)
    upper_NC = blocks_NCB.sum(-1).double().cumsum(-1)
    total_N = upper_NC[:, -1]
    block_N, rest_N = _locate(upper_NC, uniform_N.to(total_N.device) * total_N)
    inside_NB = blocks_NCB[torch.arange(len(block_N), device=block_N.device), block_N].double()
    place_N, _ = _locate(inside_NB.cumsum(-1), rest_N)
    next_N = block_N * BLOCK + place_N
    chosen_N = inside_NB.gather(-1, place_N[:, None]).squeeze(-1)
    return next_N, (chosen_N / total_N).log().float()


def _locate(upper_NC: Tensor, goal_N: Tensor) -> tuple[Tensor, Tensor]:
    """First entry whose upper edge lies above the goal, and how far the goal lies above its lower edge.

    Rounding may put the goal on the last edge: it is then just below it, in the last entry that has any weight."""
    last_N = upper_NC[:, -1]
    goal_N = torch.minimum(goal_N, torch.nextafter(last_N, torch.zeros_like(last_N)))
    place_N = torch.searchsorted(upper_NC, goal_N[:, None], right=True).squeeze(-1)
    lower_N = upper_NC.gather(-1, (place_N - 1).clamp_min(0)[:, None]).squeeze(-1)
    return place_N, goal_N - torch.where(place_N > 0, lower_N, torch.zeros_like(lower_N))


def truncated(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the ``top_k`` likeliest tokens (0: all) and outside the fewest that together reach ``top_p``.

    Of equal logits at the border all are kept by ``top_k``; ``top_p`` keeps at least the likeliest."""
    if 0 < top_k < logits_NV.shape[-1]:
        least_N1 = logits_NV.topk(top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True)
        before_NV = sorted_NV.softmax(-1).cumsum(-1).roll(1, -1)
        before_NV[:, 0] = 0
        out_NV = torch.zeros_like(logits_NV, dtype=torch.bool).scatter(-1, order_NV, before_NV >= top_p)
        logits_NV = logits_NV.masked_fill(out_NV, -torch.inf)
    return logits_NV


def uniforms(seed: int, count: int) -> Tensor:
    """``count`` numbers in [0, 1), float64, from the row's own seed."""
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    return torch.rand(count, generator=generator, dtype=torch.float64)
