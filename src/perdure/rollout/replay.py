"""Decode passes in few fixed shapes, each recorded once as a CUDA graph and replayed from then on.

A GPU is done with a decode pass's thousand kernels sooner than Python has launched them, so a pass over a small batch
takes the time of the launches. Replaying a graph launches them all at once. Shapes are padded to a few sizes; what is
padded writes to a position beyond the row's last and is seen by nobody, so the tokens are those of unpadded passes.
Dimension letters: packing.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from perdure.attention import packed_hidden
from perdure.models import backbone
from perdure.packing import Group, Keep, KeyValues, Layout

WIDTHS = (1, 3, 9, 17, 33)
"""Tokens that each row feeds in one pass: its last one, and blocks of a draft as draft.py lets them grow."""
MOST_TOKENS = 2048
"""Padded tokens in one pass; larger ones are no longer short enough to be worth a graph."""
RECORD_AFTER = 2
"""A shape that came up so often is recorded; recording costs about two passes."""
CAPACITY_STEP = 256
KEPT_BYTES = 2e9
"""Keys and values that may stay between calls, with the graphs that point at them."""
CHANGING_ROTATIONS = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length read: a recorded pass would keep those of its recording."""


def can_replay(model: Any) -> bool:
    """Whether fixed shapes pay and hold: on a GPU, with rotations that are the same for every length."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    return model.device.type == "cuda" and not kinds & set(CHANGING_ROTATIONS)


class Replays:
    """The recorded passes of one model. Its weights may change in place; where they move, all is recorded anew."""

    def __init__(self, model: Any):
        self.model = model
        self._shelf: dict[tuple[int, int], Shapes] = {}
        self._identity: Any = None

    def take(self, slots: int, capacity: int) -> Shapes:
        """A store of at least ``slots`` rows of ``capacity`` tokens, all zeros, with the passes recorded for it."""
        if (identity := _identity(self.model)) != self._identity:
            self._shelf.clear()
            self._identity = identity
        key = (1 << (slots - 1).bit_length(), -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        shapes = self._shelf.pop(key, None) or Shapes(self.model, *key)
        shapes.store.clear()
        self._shelf[key] = shapes  # the one used last stands last
        return shapes

    def trim(self) -> None:
        """Let go of the stores used longest ago, until what is kept is no more than KEPT_BYTES."""
        while self._shelf and sum(shapes.store.bytes for shapes in self._shelf.values()) > KEPT_BYTES:
            del self._shelf[next(iter(self._shelf))]


class Shapes:
    """A key/value store, and the passes over it by shape."""

    def __init__(self, model: Any, slots: int, capacity: int):
        self.model = model
        self.store = KeyValues(slots, capacity, spare=1)
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def run(self, news: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Tensor, list[list[int]]] | None:
        """Row s feeds ``news[s]`` after the ``lengths[s]`` tokens of its slot s: hidden states [T, hidden], good until
        the next call, and the index of each row's tokens in them. None where no shape fits."""
        each = next((width for width in WIDTHS if width >= max(map(len, news))), None)
        rows = self.store.slots if 4 * len(news) > self.store.slots else max(1, self.store.slots // 4)
        if each is None or rows * each > MOST_TOKENS:
            return None
        if (rows, each) not in self._passes:
            self._passes[rows, each] = _Pass(self.store, rows, each, self.model.device, self._pool)
        paths = [list(range(row * each, row * each + len(new))) for row, new in enumerate(news)]
        return self._passes[rows, each].run(self.model, news, lengths), paths


class _Pass:
    """``rows`` rows that feed ``each`` tokens."""

    def __init__(self, store: KeyValues, rows: int, each: int, device: torch.device, pool: Any):
        self.store, self.rows, self.each, self.pool = store, rows, each, pool
        self.inputs_2T = torch.zeros(2, rows * each, dtype=torch.int64, device=device)
        self.places_T = torch.arange(rows * each, device=device)
        self.slots_T = self.places_T // each
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden_TH: Tensor | None = None

    def run(self, model: Any, news: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
        self.inputs_2T.copy_(torch.tensor(self._padded(news, lengths)))
        self.seen += 1
        if self.graph is None and self.seen > RECORD_AFTER and model.device.type == "cuda":
            self._record(model)
        if self.graph is None:
            return packed_hidden(backbone(model), self._layout())
        self.graph.replay()
        assert self.hidden_TH is not None
        return self.hidden_TH

    def _padded(self, news: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Ids and positions; padding stands at the spare position."""
        ids = [0] * (self.rows * self.each)
        positions = [self.store.capacity] * (self.rows * self.each)
        for row, (new, length) in enumerate(zip(news, lengths, strict=True)):
            begin = row * self.each
            ids[begin : begin + len(new)] = new
            positions[begin : begin + len(new)] = range(length, length + len(new))
        return [ids, positions]

    def _layout(self) -> Layout:
        """New each time: a group keeps its masks, which follow the positions."""
        ids_T, positions_T = self.inputs_2T
        shape = (self.rows, self.each)
        group = Group(self.places_T.view(shape), positions_T.view(shape), None, self.store.capacity, plain=False)
        return Layout(ids_T, positions_T, [group], self.places_T, [],
                      Keep(self.store, self.slots_T, positions_T, self.places_T))  # fmt: skip

    def _record(self, model: Any) -> None:
        """The passes before this one have made what a recording must not make: kernels, workspaces, the store."""
        self.graph = torch.cuda.CUDAGraph()
        # Training may go on in another thread meanwhile (train.overlap): its calls are no fault of the recording.
        with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
            self.hidden_TH = packed_hidden(backbone(model), self._layout())


def _identity(model: Any) -> tuple[Any, ...]:
    """What a recorded pass has built in: where the weights lie, and how adapters take part."""
    places = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    return places, tuple(_adapters(model))


def _adapters(model: Any) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            yield module.disable_adapters, module.merged, tuple(module.scaling.items()), tuple(module.active_adapters)
