"""Many sequences as one packed row: no padding, and what sequences share is there once.

The sequences form a tree: a prefix that several of them begin with (system prompt, tools, one prompt sampled more than
once) is one segment, computed once, and every segment attends to its ancestors and to itself. Linear layers see the
packed tokens only; attention.py works on padded groups of segments of like length, and may keep keys and values in a
``KeyValues`` store, with which each row of a decode advances at its own pace.

Dimension letters: T packed tokens, S segments of a group, Q queries of a segment, K keys it may see, H heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

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

    What lies beyond a row's current length is garbage that no query sees, and is overwritten as the row grows.
    ``spare`` positions follow the last of each slot; they are never seen either."""

    def __init__(self, slots: int, capacity: int, spare: int = 0):
        self.slots, self.capacity, self.spare = slots, capacity, spare
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        return sum(kept.nbytes for pair in self.layers.values() for kept in pair)

    def clear(self) -> None:
        """Zeros everywhere: a masked position adds nothing to a sum, but its NaN would."""
        for pair in self.layers.values():
            for kept in pair:
                kept.zero_()

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
                x.new_zeros(store.slots, x.shape[1], store.capacity + store.spare, x.shape[2])
                for x in (key_THD, value_THD)
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
        common = common_prefix(first, last, start)
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


def common_prefix(first: Tokens, last: Tokens, start: int = 0) -> int:
    """How many tokens both begin with; they agree up to ``start``."""
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
