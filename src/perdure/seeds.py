"""One seed for a run, threaded explicitly: every random choice names what it is for and at which step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends on the run's seed and on the purpose only, so that a resumed run draws the same."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(seed: int, count: int) -> list[int]:
    """A shuffled ``range(count)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()


def stream_window(seed: int, size: int, start: int, count: int,
                  groups: Sequence[Sequence[int]] | None = None) -> list[int]:  # fmt: skip
    """Items ``start`` to ``start + count`` of an endless stream of shuffled epochs over ``range(size)``.

    ``groups``: a division of these items: those of a group follow each other in each epoch; the groups are shuffled.
    Stateless: step n needs no memory of the steps before it. Raises ValueError when there is nothing to draw from."""
    if size < 1:
        raise ValueError("cannot draw rows from an empty set")
    groups = [[item] for item in range(size)] if groups is None else groups
    epochs: dict[int, list[int]] = {}
    picked = []
    for place in range(start, start + count):
        epoch, offset = divmod(place, size)
        if epoch not in epochs:
            order = permutation(derive_seed(seed, "epoch", epoch), len(groups))
            epochs[epoch] = [item for group in order for item in groups[group]]
        picked.append(epochs[epoch][offset])
    return picked
