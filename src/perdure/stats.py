"""Is a difference of accuracies real? Intervals and paired tests; scipy does the mathematics.

Two versions of a model answer the *same* items, so everything that compares them is paired: only items on which they
disagree carry information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Alternative = Literal["worse", "better"]
"""``worse``: the test's claim is that *after* is worse than *before*."""


@dataclass(frozen=True)
class PairedDifference:
    """Two versions on the same items."""

    n: int
    before: float
    """Accuracy (mean score) before, 0..1."""
    after: float
    change: float
    """after minus before."""
    low: float
    """Bootstrap interval of the change, lower end."""
    high: float
    lost: int
    """Items right before and wrong after."""
    gained: int
    """Items wrong before and right after."""
    p_worse: float
    """One-sided exact McNemar: small = the loss is hard to explain by chance."""
    p_better: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share. Sensible at 0 of n and n of n, unlike mean +- 2 standard errors."""
    _check_confidence(confidence)
    if n < 1:
        raise ValueError(f"wilson_interval: n must be at least 1, got {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: successes must be 0..n = 0..{n}, got {successes}")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_one_sided(before: Sequence[bool], after: Sequence[bool], alternative: Alternative = "worse") -> float:
    """Exact one-sided McNemar test: p-value of the discordant pairs under a fair coin.

    ``alternative="worse"``: probability of at least this many lost items among the changed ones if nothing had changed
    in truth. No changed item gives 1.0.
    """
    if alternative not in ("worse", "better"):
        raise ValueError(f'mcnemar_one_sided: alternative must be "worse" or "better", got {alternative!r}')
    lost, gained = _discordant(*_paired_bools(before, after))
    return _sign_test(lost if alternative == "worse" else gained, lost + gained)


@lru_cache(maxsize=4096)
def mcnemar_power(n: int, loss: float, noise: float, level: float, beyond: float = 0.0) -> float:
    """Probability that a true loss is found on ``n`` items: one-sided exact McNemar p-value at most ``level``, and an
    observed loss of more than ``beyond``.

    ``loss`` is the drop of the true accuracy; ``noise`` the share of items that change each way without any meaning, so
    an item is lost with probability loss + noise and gained with probability noise. Exact, by summing over the number
    of changed items (Duffy 1984). Raises ValueError for shares that are none."""
    changed = loss + 2 * noise
    if n < 0 or not (0 <= loss <= 1 and noise >= 0 and changed <= 1 and 0 < level < 1):
        raise ValueError(f"mcnemar_power: n={n}, loss={loss}, noise={noise}, level={level} are no shares of items")
    if changed == 0 or n == 0:
        return 0.0
    low, high = stats.binom.ppf([1e-10, 1 - 1e-10], n, changed)
    counts = np.arange(int(low), int(high) + 1)
    by_chance = stats.binom.isf(level, counts, 0.5) + 1  # the fewest lost items that are significant
    by_size = np.floor((counts + round(beyond * n, 9)) / 2) + 1
    found = stats.binom.sf(np.maximum(by_chance, by_size) - 1, counts, (loss + noise) / changed)
    return float(np.sum(stats.binom.pmf(counts, n, changed) * found))


@lru_cache(maxsize=4096)
def items_needed(
    loss: float, noise: float, level: float, power: float, beyond: float = 0.0, most: int = 1_000_000
) -> int | None:
    """The fewest items (to 1 %) on which ``mcnemar_power`` reaches ``power``; None where ``most`` do not."""
    low, high = 0, 16
    while mcnemar_power(high, loss, noise, level, beyond) < power:
        low, high = high, high * 2
        if low >= most:
            return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(middle, loss, noise, level, beyond) >= power else (middle, high)
    return high


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects, with at most ``level`` chance of any false rejection."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def paired_bootstrap_difference(
    before: ArrayLike, after: ArrayLike, seed: int = 0, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(after) - mean(before), resampling items with both their scores.

    Scores may be booleans or any numbers. The same seed gives the same interval.
    """
    _check_confidence(confidence)
    if resamples < 100:
        raise ValueError(f"paired_bootstrap_difference: at least 100 resamples, got {resamples}")
    first, second = _paired_scores(before, after)
    differences = second - first
    if np.all(differences == differences[0]):  # scipy cannot resample one item or no spread; the answer is known
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, 1_000_000 // differences.size),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], seed: int = 0, confidence: float = 0.95, resamples: int = 2000
) -> PairedDifference:
    """Everything a gate or a report says about two versions on the same items."""
    first, second = _paired_bools(before, after)
    lost, gained = _discordant(first, second)
    low, high = paired_bootstrap_difference(first, second, seed, confidence, resamples)
    return PairedDifference(
        n=first.size,
        before=float(first.mean()),
        after=float(second.mean()),
        change=(gained - lost) / first.size,
        low=low,
        high=high,
        lost=lost,
        gained=gained,
        p_worse=_sign_test(lost, lost + gained),
        p_better=_sign_test(gained, lost + gained),
    )


def _sign_test(hits: int, n: int) -> float:
    if n == 0:
        return 1.0
    return float(stats.binom.sf(hits - 1, n, 0.5))


def _discordant(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    return int(np.sum(before & ~after)), int(np.sum(~before & after))


def _paired_scores(before: ArrayLike, after: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or second.ndim != 1:
        raise ValueError(f"paired comparison: expected one score per item, got shapes {first.shape} and {second.shape}")
    if first.size != second.size:
        raise ValueError(f"paired comparison: {first.size} items before but {second.size} after; pair them by id first")
    if first.size == 0:
        raise ValueError("paired comparison: no items")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("paired comparison: every score must be a finite number")
    return first, second


def _paired_bools(before: Sequence[bool], after: Sequence[bool]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    first, second = _paired_scores(before, after)
    for scores in (first, second):
        if not np.isin(scores, (0.0, 1.0)).all():
            raise ValueError("paired comparison: right or wrong only (True/False or 1/0)")
    return first.astype(bool), second.astype(bool)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
