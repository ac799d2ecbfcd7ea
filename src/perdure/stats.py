"""Is a difference of accuracies real? Intervals and paired tests; scipy does the mathematics.

Two versions of a model answer the *same* items, so everything that compares them is paired: only items on which they
disagree carry information.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
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


def clustered_interval(
    right: Sequence[bool], clusters: Sequence[Hashable], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of an accuracy whose items come in ``clusters`` (the name of each item's), as the turns of a
    conversation do: the Wilson interval at the number of independent items that would be as uncertain. It is
    ``wilson_interval`` where each item is a cluster by itself, and (0, 1) where all are one.

    That number is n over the design effect (Kish 1965; linearised variance between clusters), made smaller for few
    clusters by Student's t (Korn and Graubard 1998), and that of the clusters where all or no items are right: their
    spread cannot be seen there."""
    _check_confidence(confidence)
    hits, sizes = Counter(name for name, bit in zip(clusters, right, strict=True) if bit), Counter(clusters)
    n, k, total = len(right), len(sizes), sum(map(bool, right))
    if k == n:
        return wilson_interval(total, n, confidence)
    if k < 2:
        return 0.0, 1.0
    share = total / n
    between = sum((hits[name] - share * size) ** 2 for name, size in sizes.items()) * k / (k - 1) / n**2
    independent = n / max(1.0, between / (share * (1 - share) / n)) if 0 < total < n else float(k)
    tail = 0.5 + confidence / 2
    independent *= float(stats.t.ppf(tail, n - 1) / stats.t.ppf(tail, k - 1)) ** 2
    return _wilson(share, independent, float(stats.norm.ppf(tail)))


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # of none or all: but for rounding


def one_error_below(share: float, n: int) -> float:
    """A share of ``n`` items less one standard error: the lower end of its Wilson interval with z = 1, which is below
    the share at 0 and 1, too."""
    if n < 1:
        raise ValueError(f"one_error_below: n must be at least 1, got {n}")
    low = (share + 0.5 / n - math.sqrt(share * (1 - share) / n + 0.25 / n**2)) / (1 + 1 / n)
    return max(0.0, low)  # of none, rounding may leave a little above or below it


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
def noninferiority_p(n: int, lost: int, gained: int, loss: float) -> float:
    """P-value of the claim that the true accuracy dropped by ``loss`` or more, on ``n`` items of which ``lost`` became
    wrong and ``gained`` right: the chance of a net loss no larger than the observed one. Small = the drop was smaller.

    An item is lost with probability loss + noise and gained with probability noise; the noise is the likeliest one
    under the claim (the constrained estimate of Tango 1998), and given that the chance is exact (an estimated p-value,
    Lloyd 2008). Raises ValueError for counts or a loss that are none."""
    if not (lost >= 0 and gained >= 0 and lost + gained <= n and 0 < loss <= 1):
        raise ValueError(f"noninferiority_p: {lost} lost and {gained} gained of {n}, loss={loss}")
    return _net_loss_cdf(n, loss, _noise_under(n, lost, gained, loss), lost - gained)


def clustered_noninferiority_p(sizes: Sequence[int], losses: Sequence[int], loss: float) -> float:
    """P-value of the claim that a share ``loss`` or more of all items was lost, where items come in clusters of
    ``sizes`` that lost ``losses`` each (net; negative = gained): one-sided t test over the clusters, which is near its
    level where there are some dozens of clusters of like sizes. 1.0 where fewer than two clusters leave nothing to
    estimate by; where all clusters lost the same share it is 0.0 or 1.0, as that share is smaller or not."""
    spare = loss * np.asarray(sizes, dtype=float) - np.asarray(losses, dtype=float)
    if len(spare) < 2:
        return 1.0
    error = float(spare.std(ddof=1)) / len(spare) ** 0.5
    if error == 0:
        return 0.0 if float(spare[0]) > 0 else 1.0
    return float(stats.t.sf(float(spare.mean()) / error, len(spare) - 1))


def _noise_under(n: float, lost: float, gained: float, loss: float) -> float:
    """The likeliest noise if the true loss is ``loss``: the root of the likelihood's derivative."""
    linear = (lost + gained) * (1 - loss) - 2 * loss * (n - lost)
    root = np.sqrt(linear**2 + 8 * n * gained * loss * (1 - loss))
    return float(np.clip((linear + root) / (4 * n), 0.0, (1 - loss) / 2))


def _net_loss_cdf(n: int, loss: float, noise: float, most: int) -> float:
    """Chance that lost minus gained items are at most ``most``, summed over the number of gained ones."""
    if noise == 0:
        return float(stats.binom.cdf(most, n, loss))
    gained = np.arange(int(stats.binom.ppf(1 - 1e-10, n, noise)) + 1)
    lost = stats.binom.cdf(most + gained, n - gained, min(1.0, (loss + noise) / (1 - noise)))
    return float(np.sum(stats.binom.pmf(gained, n, noise) * lost))


@lru_cache(maxsize=4096)
def noninferiority_power(n: int, loss: float, noise: float, level: float) -> float:
    """Chance that ``noninferiority_p`` is at most ``level`` where nothing was lost in truth, and each way a share
    ``noise`` of the items changes without meaning (0..0.5)."""
    if n == 0:
        return 0.0
    expected = _noise_under(1.0, noise, noise, loss)
    low, high = -n - 1, n  # the largest net loss that still passes lies between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _net_loss_cdf(n, loss, expected, middle) <= level else (low, middle)
    return _net_loss_cdf(n, 0.0, noise, low) if noise else float(low >= 0)


@lru_cache(maxsize=4096)
def items_needed(loss: float, noise: float, level: float, power: float, most: int = 1_000_000) -> int | None:
    """The fewest items (to 1 %) on which ``noninferiority_power`` reaches ``power``; None where ``most`` do not."""
    low, high = 0, 16
    while noninferiority_power(high, loss, noise, level) < power:
        low, high = high, high * 2
        if low >= most:
            return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if noninferiority_power(middle, loss, noise, level) >= power else (middle, high)
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
    before: ArrayLike, after: ArrayLike, seed: int = 0, confidence: float = 0.95, resamples: int = 2000,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Percentile bootstrap interval of mean(after) - mean(before), resampling items with both their scores, or whole
    ``clusters`` of them (the name of each item's).

    Scores may be booleans or any numbers. The same seed gives the same interval.
    """
    _check_confidence(confidence)
    if resamples < 100:
        raise ValueError(f"paired_bootstrap_difference: at least 100 resamples, got {resamples}")
    first, second = _paired_scores(before, after)
    differences = second - first
    if np.all(differences == differences[0]):  # scipy cannot resample one item or no spread; the answer is known
        return float(differences[0]), float(differences[0])
    sums, sizes = _by_cluster(differences, clusters)
    if len(sums) == 1:
        return -1.0, 1.0  # one cluster says nothing of others
    result = stats.bootstrap(
        (sums, sizes),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, 1_000_000 // sums.size),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], seed: int = 0, confidence: float = 0.95, resamples: int = 2000,
    clusters: Sequence[Hashable] | None = None,
) -> PairedDifference:  # fmt: skip
    """What a report says about two versions on the same items. Where these come in ``clusters`` (the name of each
    item's), interval and p-values are over clusters, each of which lost, gained or neither."""
    first, second = _paired_bools(before, after)
    lost, gained = _discordant(first, second)
    low, high = paired_bootstrap_difference(first, second, seed, confidence, resamples, clusters)
    sums, _ = _by_cluster(second.astype(float) - first, clusters)
    worse, better = int((sums < 0).sum()), int((sums > 0).sum())
    return PairedDifference(
        n=first.size,
        before=float(first.mean()),
        after=float(second.mean()),
        change=(gained - lost) / first.size,
        low=low,
        high=high,
        lost=lost,
        gained=gained,
        p_worse=_sign_test(worse, worse + better),
        p_better=_sign_test(better, worse + better),
    )


def _by_cluster(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sum of each cluster's values, and how many they are; without names each value is a cluster."""
    names = list(range(len(values))) if clusters is None else list(clusters)
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    sums, sizes = np.zeros(len(place)), np.zeros(len(place))
    for name, value in zip(names, values, strict=True):
        sums[place[name]] += value
        sizes[place[name]] += 1
    return sums, sizes


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
