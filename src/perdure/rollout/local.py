"""Batched decoding with a transformers model on its own key/value store.

Every row advances at its own pace: prompts run packed, what they share runs once, a row with a reference verifies a
block of it in one pass (draft.py), finished rows are dropped and their slots refilled from the queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.attention import packed_hidden
from perdure.models import LoadedModel, backbone, head_of
from perdure.packing import KeyValues, advance, pack
from perdure.rollout.base import Progress, SamplingParams, references_of
from perdure.rollout.draft import Draft
from perdure.rollout.replay import Replays, Shapes, can_replay
from perdure.rollout.sampling import choose, uniforms
from perdure.types import Completion, Prompt

PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Device -> most prompt tokens in one pass, before sharing; a longer prompt goes alone. More gains nothing on a CPU."""
HEAD_ROWS = 256
"""Positions whose logits exist at the same time."""


class LocalEngine:
    """Decodes with ``model``, a working copy that ``attention.enable`` accepted; its owner keeps it current.

    ``replay``: passes in fixed shapes, on a GPU recorded ones (replay.py); None: where they pay."""

    def __init__(self, loaded: LoadedModel, model: Any, batch_tokens: int = 8192, replay: bool | None = None):
        self.model = model
        self.end_ids = frozenset(loaded.end_ids)
        self.batch_tokens = batch_tokens
        self.replays = Replays(model) if (can_replay(model) if replay is None else replay) else None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                 progress: Progress | None = None,
                 references: Sequence[Sequence[int]] | None = None) -> list[Completion]:  # fmt: skip
        """See RolloutEngine. Raises ValueError when prompts, seeds and references differ in number."""
        references = references_of(prompts, seeds, references)
        rows = [
            _Row(prompt.token_ids, params.max_new_tokens, uniforms(seed, params.max_new_tokens), Draft(reference))
            for prompt, seed, reference in zip(prompts, seeds, references, strict=True)
        ]
        queue = deque(sorted(rows, key=lambda row: -len(row.pending)))
        if queue:
            capacity = len(queue[0].pending) + params.max_new_tokens
            slots = min(len(rows), max(1, self.batch_tokens // capacity))
            shapes = self.replays.take(slots, capacity) if self.replays else None
            self._decode(queue, shapes.store if shapes else KeyValues(slots, capacity), shapes, params, progress)
            if self.replays:
                self.replays.trim()
        return [Completion(tuple(row.tokens), tuple(row.logprobs), row.finished) for row in rows]

    def _decode(self, queue: deque[_Row], store: KeyValues, shapes: Shapes | None, params: SamplingParams,
                progress: Progress | None) -> None:  # fmt: skip
        active: list[_Row] = []  # the row in slot s of the store is active[s]
        done = tokens = 0
        while queue or active:
            free = store.slots - len(active)
            if queue and free and (not active or 4 * free >= store.slots):
                fed = _admit(queue, free, PREFILL_TOKENS.get(self.model.device.type, PREFILL_TOKENS["cuda"]))
                slots = range(len(active), len(active) + len(fed))
                layout = pack([row.feed() for row in fed], self.model.device, store, slots)
                hidden_TH, paths = packed_hidden(backbone(self.model), layout), layout.paths
                active += fed
            else:
                fed = active
                hidden_TH, paths = self._advance(fed, store, shapes)
            tokens += self._draw(fed, hidden_TH, paths, params)
            ended = _compact(active, store)
            if ended and progress:
                done += ended
                progress(tokens, done)
                tokens = 0

    def _advance(self, rows: Sequence[_Row], store: KeyValues, shapes: Shapes | None) -> tuple[Tensor, list[list[int]]]:
        """Hidden states of what each row feeds next, and the index of its tokens in them."""
        news, lengths = [row.feed() for row in rows], [row.length for row in rows]
        if shapes and (found := shapes.run(news, lengths)):
            return found
        layout = advance(store, news, lengths, self.model.device)
        return packed_hidden(backbone(self.model), layout), layout.paths

    def _draw(self, rows: Sequence[_Row], hidden_TH: Tensor, paths: Sequence[Sequence[int]],
              params: SamplingParams) -> int:  # fmt: skip
        """The tokens that one forward pass settles for each row; returns their number."""
        places = [place for row, path in zip(rows, paths, strict=True) for place in path[-1 - len(row.block) :]]
        uniform_N = torch.cat([row.uniforms[len(row.tokens) :][: len(row.block) + 1] for row in rows])
        head, drawn, logprobs = head_of(self.model), [], []
        for begin in range(0, len(places), HEAD_ROWS):
            part = slice(begin, begin + HEAD_ROWS)
            next_N, logprob_N = choose(head.logits(hidden_TH[places[part]]), params, uniform_N[part])
            drawn += next_N.tolist()
            logprobs += logprob_N.tolist()
        settled = offset = 0
        for row in rows:
            part = slice(offset, offset + len(row.block) + 1)
            offset = part.stop
            settled += row.take(drawn[part], logprobs[part], self.end_ids)
        return settled


class _Row:
    """One completion under way."""

    def __init__(self, prompt: Sequence[int], most: int, uniforms: Tensor, draft: Draft):
        self.pending = list(prompt)
        """Tokens of the row that the store does not hold yet."""
        self.length = 0
        """Tokens of the row in the store."""
        self.block: tuple[int, ...] = ()
        """Draft tokens in the pass under way."""
        self.uniforms, self.draft, self.most = uniforms, draft, most
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finished = False

    @property
    def ended(self) -> bool:
        return self.finished or len(self.tokens) == self.most

    def feed(self) -> list[int]:
        """What the next pass reads; one token fewer is drafted than may still be said: each pass draws one more."""
        self.block = self.draft.propose(self.most - len(self.tokens) - 1)
        return [*self.pending, *self.block]

    def take(self, drawn: Sequence[int], logprobs: Sequence[float], end_ids: frozenset[int]) -> int:
        """Keep the drawn tokens up to the first that the draft did not foresee; returns how many."""
        agreed = next((i for i, (a, b) in enumerate(zip(drawn, self.block, strict=False)) if a != b), len(self.block))
        kept = list(drawn[: agreed + 1])
        end = next((i for i, token in enumerate(kept) if token in end_ids), None)
        if end is not None:
            kept, self.finished = kept[: end + 1], True
        self.tokens += kept
        self.logprobs += logprobs[: len(kept)]
        self.length += len(self.pending) + len(kept) - 1
        self.pending = kept[-1:]
        if not self.ended:
            self.draft.saw(self.tokens, len(self.block), agreed)
        return len(kept)


def _admit(queue: deque[_Row], most: int, most_tokens: int) -> list[_Row]:
    """The next rows of the queue: at most ``most``, and of at most ``most_tokens`` in all, but at least one."""
    rows = [queue.popleft()]
    total = len(rows[0].pending)
    while queue and len(rows) < most and (total := total + len(queue[0].pending)) <= most_tokens:
        rows.append(queue.popleft())
    return rows


def _compact(active: list[_Row], store: KeyValues) -> int:
    """Drop the rows that ended; each gap takes the last row. Returns how many were dropped."""
    before = len(active)
    for slot in reversed(range(before)):
        if active[slot].ended:
            last = active.pop()
            if slot < len(active):
                store.copy(len(active), slot, last.length)
                active[slot] = last
    return before - len(active)
