"""Log-likelihoods of continuations under a causal LM: what log-likelihood benchmarks cost, and nothing more.

Continuations of one context share a single row: the context runs once, and every continuation is a branch of it
that sees the context and itself only (a tree-shaped attention mask). The LM head runs only where a token is
predicted, so no [B, T, V] tensor exists. Models that cannot take such a mask get one right-padded row a continuation.

Dimension letters: B rows, T positions, P predicting positions of a batch, N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from perdure.attention import is_enabled

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context (at least one) and of the continuation to score (at least one)."""

SOFTMAX_ROWS = 64
"""Positions normalised in float32 at once: bounds the memory at large vocabularies, and stays in a CPU's cache."""
CPU_BATCH_TOKENS = 1024
"""More per batch is slower on a CPU: more padding, nothing gained."""
DEVICE_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Row:
    """One context and continuations of it, as they go through the model together."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens fed. The last token of a continuation is predicted but never fed."""
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


@dataclass(frozen=True)
class Layout:
    """A batch of rows as tensors."""

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    branch_BT: torch.Tensor
    """0 in the context, 1, 2, ... in the continuations, -1 at padding."""
    heads_P: tuple[torch.Tensor, torch.Tensor]
    """Row and column of each position that predicts something."""
    which_N: torch.Tensor
    """Index into P: where each scored token is predicted."""
    targets_N: torch.Tensor
    lengths: tuple[int, ...]
    """Tokens of each continuation, in the order of N."""


def score_pairs(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    share_contexts: bool,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[tuple[float, bool]]:
    """(sum of log p over the continuation's tokens, whether greedy decoding would write it), in the order of ``pairs``.

    ``batch_tokens`` bounds the padded tokens of a batch (a longer row goes alone), ``share_contexts`` needs a model
    that ``can_share_contexts``, ``advance`` is called with the tokens that each batch fed.
    """
    results: dict[Pair, tuple[float, bool]] = {}
    for rows in batches(make_rows(pairs, share_contexts, batch_tokens), batch_tokens):
        keys = [(row.context, continuation) for row in rows for continuation in row.continuations]
        results.update(zip(keys, _score_rows(model, rows, share_contexts), strict=True))
        advance(sum(row.length for row in rows))
    return [results[pair] for pair in pairs]


def can_share_contexts(model: PreTrainedModel) -> bool:
    """True when a custom attention mask means the same in every layer: plain full attention, no recurrent state."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    takes_masks = config._attn_implementation in ("sdpa", "eager") or is_enabled(model)
    rotary = getattr(config, "rope_parameters", None) is not None
    return kinds == {"full_attention"} and not windowed and takes_masks and rotary and not model._is_stateful


def make_rows(pairs: Sequence[Pair], share: bool, batch_tokens: int) -> list[Row]:
    """Distinct pairs as rows: continuations of one context together when ``share``, up to ``batch_tokens`` a row."""
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError(f"empty context or continuation: {(context, continuation)}")
        by_context.setdefault(context, {})[continuation] = None
    rows = []
    for context, continuations in by_context.items():
        members: list[tuple[int, ...]] = []
        for continuation in continuations:
            full = Row(context, (*members, continuation)).length > batch_tokens
            if members and (full or not share):
                rows.append(Row(context, tuple(members)))
                members = []
            members.append(continuation)
        rows.append(Row(context, tuple(members)))
    return rows


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length together, the longest first (it tells at once whether memory is enough)."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if batch and (len(batch) + 1) * batch[0].length > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def _score_rows(model: PreTrainedModel, rows: Sequence[Row], share: bool) -> list[tuple[float, bool]]:
    layout = lay_out(rows, model.device)
    mask = tree_mask(layout.branch_BT, model.dtype) if share else (layout.branch_BT >= 0).long()
    with _head_only_at(model, layout.heads_P):
        logits_PV = model(
            input_ids=layout.input_ids_BT, attention_mask=mask, position_ids=layout.position_ids_BT, use_cache=False
        ).logits[0]
    assert len(logits_PV) == len(layout.heads_P[0]), "this model's forward does not call its output embeddings"
    chunks = logits_PV.split(SOFTMAX_ROWS)
    logsumexp_P = torch.cat([chunk.float().logsumexp(-1) for chunk in chunks])
    best_P = torch.cat([chunk.argmax(-1) for chunk in chunks])
    logprobs_N = logits_PV[layout.which_N, layout.targets_N].float() - logsumexp_P[layout.which_N]
    greedy_N = best_P[layout.which_N] == layout.targets_N
    parts = zip(logprobs_N.cpu().split(layout.lengths), greedy_N.cpu().split(layout.lengths), strict=True)
    return [(logprobs.double().sum().item(), bool(greedy.all())) for logprobs, greedy in parts]


def lay_out(rows: Sequence[Row], device: torch.device) -> Layout:
    """Put each row's context and branches side by side; branches take the positions that follow the context."""
    shape = (len(rows), max(row.length for row in rows))
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    branches = torch.full(shape, -1)
    heads: list[tuple[int, int]] = []
    which: list[int] = []
    for b, row in enumerate(rows):
        end = len(row.context)
        ids[b, :end], positions[b, :end], branches[b, :end] = torch.tensor(row.context), torch.arange(end), 0
        start, root = end, len(heads)
        heads.append((b, end - 1))
        for number, continuation in enumerate(row.continuations, 1):
            fed = slice(start, start + len(continuation) - 1)
            ids[b, fed] = torch.tensor(continuation[:-1], dtype=torch.long)
            positions[b, fed], branches[b, fed] = torch.arange(end, end + len(continuation) - 1), number
            which += [root, *range(len(heads), len(heads) + len(continuation) - 1)]
            heads += [(b, t) for t in range(fed.start, fed.stop)]
            start = fed.stop
    continuations = [continuation for row in rows for continuation in row.continuations]
    rows_P, columns_P = torch.tensor(heads, device=device).unbind(1)
    return Layout(
        input_ids_BT=ids.to(device),
        position_ids_BT=positions.to(device),
        branch_BT=branches.to(device),
        heads_P=(rows_P, columns_P),
        which_N=torch.tensor(which, device=device),
        targets_N=torch.tensor([token for continuation in continuations for token in continuation], device=device),
        lengths=tuple(map(len, continuations)),
    )


def tree_mask(branch_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [B, 1, T, T]: a token sees the context and its own branch, never what comes after it."""
    positions_T = torch.arange(branch_BT.shape[1], device=branch_BT.device)
    causal_TT = positions_T[None, :] <= positions_T[:, None]
    visible_BTT = (branch_BT[:, None, :] == 0) | (branch_BT[:, None, :] == branch_BT[:, :, None])
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=branch_BT.device)
    return mask_BTT.masked_fill(~(causal_TT & visible_BTT), torch.finfo(dtype).min)[:, None]


@contextmanager
def _head_only_at(model: PreTrainedModel, heads_P: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Inside, the LM head sees only the chosen positions, as one row; the model's own scaling and caps still apply."""

    def choose(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][heads_P][None], *args[1:])

    head = model.get_output_embeddings()
    assert head is not None, "a model without output embeddings scores no tokens"
    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
