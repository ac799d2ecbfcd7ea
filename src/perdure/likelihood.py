"""Log-likelihoods of continuations under a causal LM: what log-likelihood benchmarks cost, and nothing more.

Where the model runs packed (attention.py), a context that several continuations follow, and any longer beginning that
contexts have in common, runs once; other models get padded rows. The LM head runs only where a token is predicted.

Dimension letters: B rows, T positions, P predicting positions of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from perdure.attention import is_enabled, packed_hidden
from perdure.models import backbone, head_of
from perdure.packing import pack
from perdure.processes import GROUP, dealt, gather, together

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context (at least one) and of the continuation to score (at least one)."""

HEAD_ROWS = 64
"""Positions whose float32 logits exist at once: bounds the memory at large vocabularies."""
CPU_BATCH_TOKENS = 2048
"""Before sharing, which takes about half; more per batch gains nothing on a CPU."""
DEVICE_BATCH_TOKENS = 16384


def score_pairs(
    model: Any, pairs: Sequence[Pair], *, batch_tokens: int, advance: Callable[[int], None] = lambda tokens: None,
    key: int = 0,
) -> list[tuple[float, bool]]:  # fmt: skip
    """(sum of log p over the continuation's tokens, whether greedy decoding would write it), in the order of ``pairs``.

    ``batch_tokens`` bounds the tokens of a batch, before sharing where the model runs packed and with padding where it
    does not (a longer row goes alone); ``advance`` is called with the tokens that each batch asked for, before sharing.
    ``key``: of the session that all processes of the run know, which then share the batches; 0 = this one alone. Raises
    ValueError for an empty context or continuation."""
    packed = is_enabled(model)
    every = batches(pairs, batch_tokens, packed)
    sizes = [sum(map(length, batch)) for batch in every]
    with together("score", key, pairs, batch_tokens) if key else nullcontext():
        mine = dealt(sizes)[GROUP.rank] if key else range(len(every))
        results: dict[Pair, tuple[float, bool]] = {}
        for place in mine:
            results.update(zip(every[place], _score(model, every[place], packed), strict=True))
            advance(sizes[place])
        for found in gather(results) if key else ():
            results |= found
    if others := sum(sizes) - sum(sizes[place] for place in mine):
        advance(others)
    return [results[pair] for pair in pairs]


def length(pair: Pair) -> int:
    """Tokens fed. The last token of a continuation is predicted but never fed."""
    return len(pair[0]) + len(pair[1]) - 1


def batches(pairs: Sequence[Pair], batch_tokens: int, packed: bool) -> list[list[Pair]]:
    """The distinct pairs: neighbours in sorted order (they share most) when ``packed``, else of like length."""
    if empty := next((pair for pair in pairs if not all(pair)), None):
        raise ValueError(f"empty context or continuation: {empty}")
    found: list[list[Pair]] = [[]]
    for pair in sorted(set(pairs), key=lambda pair: (0 if packed else -length(pair), pair)):
        batch = found[-1]
        filled = sum(map(length, batch)) if packed else len(batch) * length((batch or [pair])[0])
        more = length(pair) if packed else length((batch or [pair])[0])
        if batch and filled + more > batch_tokens:
            found.append([])
        found[-1].append(pair)
    return [batch for batch in found if batch]


@torch.no_grad()
def _score(model: Any, batch: Sequence[Pair], packed: bool) -> list[tuple[float, bool]]:
    rows = [(*context, *continuation[:-1]) for context, continuation in batch]
    hidden_NH, paths = _packed(model, rows) if packed else _padded(model, rows)
    places = [path[len(context) - 1 :] for (context, _), path in zip(batch, paths, strict=True)]
    asked = torch.tensor([place for some in places for place in some], device=hidden_NH.device)
    targets = torch.tensor([token for _, continuation in batch for token in continuation], device=hidden_NH.device)
    predicting_P, which = asked.unique(return_inverse=True)  # several continuations begin at one position
    logprobs, greedy = torch.empty(len(asked)), torch.empty(len(asked), dtype=torch.bool)
    head = head_of(model)
    for begin in range(0, len(predicting_P), HEAD_ROWS):
        logits_PV = head.logits(hidden_NH[predicting_P[begin : begin + HEAD_ROWS]])
        here = (which >= begin) & (which < begin + HEAD_ROWS)
        chunk, tokens = which[here] - begin, targets[here]
        logprobs[here.cpu()] = (logits_PV[chunk, tokens] - logits_PV.logsumexp(-1)[chunk]).cpu()
        greedy[here.cpu()] = (logits_PV.argmax(-1)[chunk] == tokens).cpu()
    sizes = [len(some) for some in places]
    parts = zip(logprobs.double().split(sizes), greedy.split(sizes), strict=True)
    return [(part.sum().item(), bool(same.all())) for part, same in parts]


def _packed(model: Any, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, list[list[int]]]:
    """Hidden states, [tokens, H], and where each row's tokens stand among them."""
    layout = pack(rows, model.device)
    return packed_hidden(backbone(model), layout), layout.paths


def _padded(model: Any, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, list[list[int]]]:
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *(longest - len(row)) * (0,)] for row in rows], device=model.device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    hidden_BTH = backbone(model)(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return hidden_BTH.flatten(0, 1), [list(range(b * longest, b * longest + len(row))) for b, row in enumerate(rows)]
