"""Accuracy matrix -> forgetting, transfer, retention. Plain numbers in, plain numbers out.

Words used here, S stages and J skills:

- ``R`` is the accuracy matrix, shape [S + 1, J]. Row 0 is the base model, row i the version after stage i. A cell is an
  accuracy 0..1, or NaN where it was not measured.
- ``learned_at[j]`` is the row in which skill j was taught, 1..S. Several skills may share a row, a row may teach none.
- "now" is the last row.

Definitions. Lopez-Paz and Ranzato (2017, GEM) compare the last row with the diagonal: ``backward_transfer`` is the mean
of R[S, j] - R[learned_at[j], j] over the earlier skills, and ``forward_transfer`` compares the row just before a skill
is taught with a model that learned nothing. ``forgetting`` here is the *signed* per-skill form of the former with the
sign turned: at learning minus now, so that an improvement is negative. Chaudhry et al. (2018) instead take the best
accuracy *ever* reached minus now: that is ``max_forgetting``, which is never negative.

A skill taught in the last row has had no time to be forgotten. Means over "earlier skills" leave it out too.
A value that depends on an unmeasured cell is NaN; means skip NaN and are NaN when nothing is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def average_accuracy(matrix: ArrayLike) -> float:
    """Mean accuracy of the last row over all measured skills."""
    return _mean(_matrix(matrix)[-1])


def final_accuracy(matrix: ArrayLike) -> Array:
    """The last row: accuracy of every skill now, [J]."""
    return _matrix(matrix)[-1].copy()


def accuracy_when_learned(matrix: ArrayLike, learned_at: Sequence[int]) -> Array:
    """Accuracy of each skill in the row that taught it, [J]."""
    return _diagonal(*_checked(matrix, learned_at))


def forgetting(matrix: ArrayLike, learned_at: Sequence[int]) -> Array:
    """Signed: accuracy when learned minus accuracy now, [J]. Negative where a skill improved later."""
    values, rows = _checked(matrix, learned_at)
    return _diagonal(values, rows) - values[-1]


def max_forgetting(matrix: ArrayLike, learned_at: Sequence[int]) -> Array:
    """Best accuracy since it was learned (Chaudhry et al.) minus accuracy now, [J]. Never negative."""
    values, rows = _checked(matrix, learned_at)
    now = values[-1]
    # fmax skips unmeasured cells; the last row takes part, so the best is never below now.
    best = np.array([np.fmax.reduce(values[row:, skill]) for skill, row in enumerate(rows)])
    return best - now


def backward_transfer(matrix: ArrayLike, learned_at: Sequence[int]) -> float:
    """Mean of now minus when learned over the earlier skills (Lopez-Paz and Ranzato). Negative = forgetting."""
    values, rows = _checked(matrix, learned_at)
    change = values[-1] - _diagonal(values, rows)
    return _mean(change[rows < _last_row(values)])


def forward_transfer(matrix: ArrayLike, learned_at: Sequence[int]) -> float:
    """Mean of accuracy just before a skill is taught minus the base model's (row 0), over skills taught after row 1.

    Positive: learning earlier skills already helped with skills not taught yet.
    """
    values, rows = _checked(matrix, learned_at)
    before = values[rows - 1, np.arange(len(rows))]
    return _mean((before - values[0])[rows > 1])


def retention(matrix: ArrayLike, learned_at: Sequence[int]) -> Array:
    """Accuracy now divided by accuracy when learned, [J]; above 1 where it improved, NaN where it was learned to 0."""
    values, rows = _checked(matrix, learned_at)
    learned = _diagonal(values, rows)
    ratio = np.full(len(rows), np.nan)
    return np.divide(values[-1], learned, out=ratio, where=learned > 0)


def mean_retention(matrix: ArrayLike, learned_at: Sequence[int]) -> float:
    """Mean retention of the earlier skills; NaN when there are none."""
    values, rows = _checked(matrix, learned_at)
    return _mean(retention(values, learned_at)[rows < _last_row(values)])


def _diagonal(values: Array, rows: NDArray[np.intp]) -> Array:
    return values[rows, np.arange(len(rows))]


def _last_row(values: Array) -> int:
    return len(values) - 1


def _mean(values: Array) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if measured.size else float("nan")


def _matrix(matrix: ArrayLike) -> Array:
    values = np.array(matrix, dtype=np.float64)  # a copy: the caller's matrix is never touched
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"accuracy matrix: expected [stages + 1, skills] with at least one of each, got {values.shape}"
        )
    outside = values[(values < 0) | (values > 1) | np.isinf(values)]
    if outside.size:
        raise ValueError(f"accuracy matrix: accuracies are shares between 0 and 1, got {outside[0]}")
    return values


def _checked(matrix: ArrayLike, learned_at: Sequence[int]) -> tuple[Array, NDArray[np.intp]]:
    values = _matrix(matrix)
    if len(learned_at) != values.shape[1]:
        raise ValueError(f"learned_at: expected one row per skill ({values.shape[1]}), got {len(learned_at)}")
    last = _last_row(values)
    for skill, row in enumerate(learned_at):
        if row != int(row) or not 1 <= row <= last:
            raise ValueError(f"learned_at[{skill}]: expected a row 1..{last} (row 0 is the base model), got {row}")
    return values, np.array([int(row) for row in learned_at], dtype=np.intp)
