"""Many sequences through a transformers model as one packed row: no padding, and what sequences share runs once.

The sequences form a tree: a prefix that several of them begin with (system prompt, tools, one prompt sampled more than
once) is one segment, computed once, and every segment attends to its ancestors and to itself. Linear layers see the
packed tokens only; attention alone works on padded groups of segments of like length. Gradients flow through shared
segments, so the result is that of separate rows, forward and backward, up to rounding.

The same attention, with keys and values kept in a ``KeyValues`` store, lets each row of a decode advance at its own
pace.

Dimension letters: T packed tokens, S segments of a group, Q queries of a segment, K keys it may see, H heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "perdure_packed"
"""The attention implementation's name in transformers. Without a layout it is sdpa."""
SHARED_TOKENS = 8
"""Shorter prefixes are computed once for each row: one more group of segments costs more than it saves."""
Tokens = Sequence[int]


@dataclass
class Segment:
    """A run of tokens that one or more rows share."""

    tokens: Tokens
    start: int
    """Position of its first token in its rows."""
    before: list[int]
    """Packed index of every token of its ancestors, in order."""
    place: int = 0
    """Packed index of its first token."""

    @property
    def path(self) -> list[int]:
        """Packed index of all tokens from the row's first to this segment's last."""
        return [*self.before, *range(self.place, self.place + len(self.tokens))]


@dataclass(eq=False)
class Group:
    """Segments that attend together."""

    queries_SQ: Tensor
    """int64: packed index of each query; padding repeats some token."""
    positions_SQ: Tensor
    """int64: position of each query in its row; 0 at padding. A query sees the keys at positions up to its own."""
    keys_SK: Tensor | None
    """int64: packed index of the key at each position; None: keys lie in the store's first S slots."""
    width: int
    """K: how many keys a segment may see at most."""
    plain: bool
    """Every segment begins its row: attention is simply causal and needs no mask."""
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive, [S, 1, Q, K]; all layers of one kind share it."""
        if (window, dtype) not in self.masks:
            keys_K = torch.arange(self.width, device=self.positions_SQ.device)
            positions_SQ1 = self.positions_SQ[..., None]
            seen = keys_K <= positions_SQ1
            if window is not None:
                seen &= keys_K > positions_SQ1 - window
            shut = torch.zeros((), dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
            self.masks[window, dtype] = shut[:, None]
        return self.masks[window, dtype]


class KeyValues:
    """Keys and values of rows that advance at their own pace: slot s holds a row's tokens at their positions.

    What lies beyond a row's current length is garbage that no query sees, and is overwritten as the row grows."""

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` positions of one slot, over another's."""
        for pair in self.layers.values():
            for kept in pair:
                kept[target, :, :length] = kept[source, :, :length]


@dataclass(eq=False)
class Keep:
    """Which packed tokens' keys and values go where in a store."""

    store: KeyValues
    slots_N: Tensor
    positions_N: Tensor
    sources_N: Tensor
    """int64: packed index of what is kept."""

    def write(self, layer: int, key_THD: Tensor, value_THD: Tensor) -> None:
        store = self.store
        if layer not in store.layers:
            key, value = (
                x.new_zeros(store.slots, x.shape[1], store.capacity, x.shape[2]) for x in (key_THD, value_THD)
            )
            store.layers[layer] = (key, value)
        for kept, new_THD in zip(store.layers[layer], (key_THD, value_THD), strict=True):
            kept[self.slots_N, :, self.positions_N] = new_THD[self.sources_N]


@dataclass(eq=False)
class Layout:
    """One packed row."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    groups: list[Group]
    back_T: Tensor
    """int64: where each packed token's output stands in the groups' outputs, flattened and joined."""
    paths: list[list[int]]
    """Of each sequence, the packed index of each of its tokens."""
    keep: Keep | None = None


def segments_of(rows: Sequence[Tokens], shared_tokens: int = SHARED_TOKENS) -> tuple[list[Segment], list[list[int]]]:
    """The rows as a tree of segments, and each row's path (packed index of each of its tokens)."""
    segments: list[Segment] = []
    paths: list[list[int]] = [[] for _ in rows]
    total = 0

    def add(tokens: Tokens, start: int, before: list[int]) -> list[int]:
        nonlocal total
        if not tokens:
            return before
        segments.append(Segment(tokens, start, before, total))
        total += len(tokens)
        return segments[-1].path

    def build(members: list[int], start: int, before: list[int]) -> None:
        """``members`` are sorted and agree up to ``start``, which ``before`` covers."""
        first, last = rows[members[0]], rows[members[-1]]
        common = _common(first, last, start)
        if len(members) > 1 and (common - start >= shared_tokens or common == len(last)):
            before, start = add(first[start:common], start, before), common
        for ends, some in groupby(members, key=lambda row: len(rows[row]) == common):
            if ends:  # equal rows, or a row that others go on from
                whole = add(rows[members[0]][start:], start, before)
                for row in some:
                    paths[row] = whole
            else:
                for _, branch in groupby(some, key=lambda row: rows[row][common]):
                    build(list(branch), start, before)

    order = sorted(range(len(rows)), key=lambda row: tuple(rows[row]))
    if not order or not all(len(row) for row in rows):
        raise ValueError("packing needs at least one row, and every row at least one token")
    build(order, 0, [])
    return segments, paths


def _common(first: Tokens, last: Tokens, start: int) -> int:
    most = min(len(first), len(last))
    return next((place for place in range(start, most) if first[place] != last[place]), most)


def pack(rows: Sequence[Tokens], device: torch.device | str = "cpu", store: KeyValues | None = None,
         slots: Sequence[int] | None = None, shared_tokens: int = SHARED_TOKENS) -> Layout:  # fmt: skip
    """The layout of whole sequences; a ``store`` keeps row i's keys and values in slot ``slots[i]`` (i by default).

    Raises ValueError for an empty sequence."""
    segments, paths = segments_of(rows, shared_tokens)
    kinds: dict[tuple[bool, int], list[Segment]] = {}
    for segment in segments:  # like lengths together: at most half of a group is padding
        kinds.setdefault((segment.start == 0, len(segment.tokens).bit_length()), []).append(segment)
    groups = [_group(members, plain, device) for (plain, _), members in kinds.items()]
    ids = [token for segment in segments for token in segment.tokens]
    positions = [segment.start + i for segment in segments for i in range(len(segment.tokens))]
    back = torch.empty(len(ids), dtype=torch.int64)
    offset = 0
    for (_, members), group in zip(kinds.items(), groups, strict=True):
        for index, segment in enumerate(members):
            begin = offset + index * group.queries_SQ.shape[1]
            back[segment.place : segment.place + len(segment.tokens)] = torch.arange(begin, begin + len(segment.tokens))
        offset += group.queries_SQ.numel()
    keep = None
    if store:
        places = [
            (slots[row] if slots else row, t, place) for row, path in enumerate(paths) for t, place in enumerate(path)
        ]
        keep = Keep(store, *(torch.tensor(column, device=device) for column in zip(*places, strict=True)))
    ids_T, positions_T = torch.tensor(ids, device=device), torch.tensor(positions, device=device)
    return Layout(ids_T, positions_T, groups, back.to(device), paths, keep)


def _group(members: list[Segment], plain: bool, device: torch.device | str) -> Group:
    queries, width = max(len(s.tokens) for s in members), max(s.start + len(s.tokens) for s in members)
    queries_SQ = torch.zeros(len(members), queries, dtype=torch.int64)
    positions_SQ = torch.zeros(len(members), queries, dtype=torch.int64)
    keys_SK = torch.zeros(len(members), width, dtype=torch.int64)
    for index, segment in enumerate(members):
        count, path = len(segment.tokens), torch.tensor(segment.path)
        queries_SQ[index, :count] = path[segment.start :]
        positions_SQ[index, :count] = torch.arange(segment.start, segment.start + count)
        keys_SK[index, : len(path)] = path
    return Group(queries_SQ.to(device), positions_SQ.to(device), keys_SK.to(device), width, plain)


def advance(
    store: KeyValues, news: Sequence[Tokens], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> Layout:
    """The layout of a decode step: row s feeds ``news[s]`` after the ``lengths[s]`` tokens that its slot s holds."""
    most, width = max(map(len, news)), max(length + len(new) for new, length in zip(news, lengths, strict=True))
    queries_SQ = torch.zeros(len(news), most, dtype=torch.int64)
    positions_SQ = torch.zeros(len(news), most, dtype=torch.int64)
    back, paths, ids, slots, positions = [], [], [], [], []
    for slot, (new, length) in enumerate(zip(news, lengths, strict=True)):
        paths.append(list(range(len(ids), len(ids) + len(new))))
        queries_SQ[slot, : len(new)] = torch.arange(len(ids), len(ids) + len(new))
        positions_SQ[slot, : len(new)] = torch.arange(length, length + len(new))
        back += range(slot * most, slot * most + len(new))
        ids += new
        slots += [slot] * len(new)
        positions += range(length, length + len(new))
    group = Group(queries_SQ.to(device), positions_SQ.to(device), None, width, plain=False)
    ids_T, positions_T, back_T, slots_T = (torch.tensor(x, device=device) for x in (ids, positions, back, slots))
    keep = Keep(store, slots_T, positions_T, torch.arange(len(ids), device=device))
    return Layout(ids_T, positions_T, [group], back_T, paths, keep)


def packed_hidden(model: Any, layout: Layout) -> Tensor:
    """Last hidden states of the packed tokens, [T, hidden]. ``model`` is a backbone that ``enable`` accepted."""
    out = model(
        input_ids=layout.input_ids_T[None], position_ids=layout.position_ids_T[None], attention_mask=None,
        use_cache=False, layout=layout,
    )  # fmt: skip
    return out.last_hidden_state[0]


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
              dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
              layout: Layout | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [1, heads, T, D], key and value [1, key heads, T, D]."""
    if layout is None and softcap is not None:  # sdpa does not know it
        return _capped_rows(module, query, key, value, attention_mask, scaling, softcap), None
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      sliding_window=sliding_window, **kwargs)  # fmt: skip
    if unknown := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"packed attention does not know {unknown[0]}")
    kinds = getattr(module.config, "layer_types", None)
    if kinds and (kinds[module.layer_idx] == "sliding_attention") != (sliding_window is not None):
        raise NotImplementedError("this layer's window is in a mask that packed attention never sees")
    # Autocast leaves rotated queries and keys in float32. With gradients a CPU is faster in float32 (docs/log.md).
    dtype = torch.float32 if value.device.type == "cpu" and torch.is_grad_enabled() else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.keep:
        layout.keep.write(module.layer_idx, key_THD, value_THD)
    outputs = []
    for group in layout.groups:
        if group.keys_SK is not None:
            keys, values = (_rows(x, group.keys_SK).transpose(1, 2) for x in (key_THD, value_THD))
        else:
            assert layout.keep is not None
            kept = layout.keep.store.layers[module.layer_idx]
            keys, values = (x[: len(group.queries_SQ), :, : group.width] for x in kept)
        with torch.autocast(value.device.type, enabled=False):
            out_SQHD = _attend(
                group, _rows(query_THD, group.queries_SQ), keys, values, scaling, sliding_window, softcap
            )
        outputs.append(out_SQHD.flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.back_T)[None], None


def _rows(x_THD: Tensor, index_SK: Tensor) -> Tensor:
    """x[index], [S, K, H, D]; the backward of ``index_select`` is several times faster than that of indexing."""
    return x_THD.index_select(0, index_SK.flatten()).unflatten(0, index_SK.shape)


def _attend(group: Group, query_SQHD: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None,
            softcap: float | None) -> Tensor:  # fmt: skip
    """[S, Q, H, D]; ``key`` and ``value`` are [S, key heads, K, D]."""
    S, Q, H, D = query_SQHD.shape
    key_heads = key.shape[1]
    each = H // key_heads
    if group.plain and softcap is None and (window is None or window >= group.width):
        out = scaled_dot_product_attention(query_SQHD.transpose(1, 2), key, value, is_causal=True, scale=scaling,
                                           enable_gqa=each > 1)  # fmt: skip
        return out.transpose(1, 2)
    # The query heads of one key head become more queries of it: no copy of the keys for each.
    query = query_SQHD.view(S, Q, key_heads, each, D).permute(0, 2, 3, 1, 4).reshape(S, key_heads, each * Q, D)
    mask = group.mask(window, query.dtype).expand(S, each, Q, group.width).reshape(S, 1, each * Q, group.width)
    if softcap is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        out = _capped(query, key, value, mask, scaling, softcap)
    return out.view(S, key_heads, each, Q, -1).permute(0, 3, 1, 2, 4).reshape(S, Q, H, -1)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    """Attention whose scores are capped by a tanh before the additive ``mask``."""
    scores = (query @ key.transpose(-1, -2)) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    weights = (torch.tanh(scores / softcap) * softcap + mask).float().softmax(-1)
    return weights.to(value.dtype) @ value


def _capped_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float | None,
                 softcap: float) -> Tensor:  # fmt: skip
    """Without a layout: rows and their mask as transformers gives them to sdpa, [B, T, heads, D]."""
    if seen is None:  # sdpa would be told "causal"
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    mask = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~seen, torch.finfo(query.dtype).min)
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    return _capped(query, key, value, mask, scaling, softcap).transpose(1, 2)


def is_enabled(model: Any) -> bool:
    """Whether ``enable`` has accepted this model (or the one it was copied from)."""
    return model.config.get_text_config()._attn_implementation == NAME


@torch.no_grad()
def enable(model: Any) -> bool:
    """Let a causal language model run packed; False, and nothing changed, where its architecture does not allow it.

    Accepted is what gives the hidden states of separate rows, and whose layers see their window as their settings say.
    The model's results without a layout stay those of sdpa (or of eager attention, where it has a soft cap)."""
    before = model.config._attn_implementation
    if before == NAME:
        return True
    if before not in ("sdpa", "eager") or not _known(model):
        return False
    rows = [[1, 2, 3, 1, 2, 3, 1, 2, 3, 4], [1, 2, 3, 1, 2, 3, 1, 2, 3, 5, 2], [3, 1]]
    backbone = model.base_model
    wanted = [backbone(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows]
    model.set_attn_implementation(NAME)
    layout = pack(rows)
    try:
        hidden = packed_hidden(backbone, layout)
        store = KeyValues(len(rows), 16)
        packed_hidden(backbone, pack([row[:-1] for row in rows], store=store))
        last = packed_hidden(backbone, advance(store, [row[-1:] for row in rows], [len(row) - 1 for row in rows]))
        same = all(
            torch.allclose(hidden[path], states, rtol=1e-2, atol=1e-3) and
            torch.allclose(last[slot], states[-1], rtol=1e-2, atol=1e-3)
            for slot, (path, states) in enumerate(zip(layout.paths, wanted, strict=True))
        )  # fmt: skip
    except (NotImplementedError, TypeError, AttributeError, ValueError, RuntimeError, IndexError):
        same = False  # the architecture passes no layout to its attention, or is none that this attention knows
    if not same:
        model.set_attn_implementation(before)
    return same


def _known(model: Any) -> bool:
    """Rotary positions, and only layers whose mask is causal or a sliding window."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rotary = getattr(config, "rope_parameters", None) is not None
    return rotary and kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
