"""Against hand values, against scipy's other routes, and properties."""

from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from perdure.stats import (
    _noise_under,
    clustered_interval,
    items_needed,
    mcnemar_one_sided,
    noninferiority_p,
    noninferiority_power,
    one_error_below,
    paired_bootstrap_difference,
    paired_difference,
    wilson_interval,
)

bools = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def wilson_by_formula(k: int, n: int, confidence: float):
    z = norm.ppf(0.5 + confidence / 2)
    share, middle = k / n, (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def test_wilson_known_value():
    # 8 of 10 at 95 %: (0.8 + 1.92073/10 +- 1.96 sqrt(0.016 + 0.0096036)) / 1.384146 = 0.4902, 0.9433
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_is_the_formula_and_holds_the_share(pair, confidence):
    k, n = pair
    low, high = wilson_interval(k, n, confidence)
    assert (low, high) == pytest.approx(wilson_by_formula(k, n, confidence), abs=1e-9)
    assert -1e-12 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1 + 1e-12


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=2, max_size=60))
def test_items_in_clusters_give_an_interval_around_the_share(items):
    right, clusters = [bit for bit, _ in items], [name for _, name in items]
    low, high = clustered_interval(right, clusters)
    assert 0 <= low <= sum(right) / len(right) <= high <= 1
    alone = clustered_interval(right, range(len(right)))
    assert alone == wilson_interval(sum(right), len(right))
    if 0 < sum(right) < len(right):
        assert high - low >= (alone[1] - alone[0]) * (1 - 1e-9)


def test_clusters_that_move_together_count_as_one_item_each():
    """20 conversations of 5 turns, all right or all wrong: the interval of 20 items, but for Student's t."""
    right, clusters = [c < 12 for c in range(20) for _ in range(5)], [c for c in range(20) for _ in range(5)]
    low, high = clustered_interval(right, clusters)
    few, many = wilson_interval(12, 20), wilson_interval(60, 100)
    assert low < few[0] + 0.01 and high > few[1] - 0.01 and high - low > 2 * (many[1] - many[0])
    assert clustered_interval([True] * 100, clusters)[0] < wilson_interval(20, 20)[0]
    assert clustered_interval([True, False], ["a", "a"]) == (0, 1)
    with pytest.raises(ValueError):
        clustered_interval([True], ["a", "b"])


def test_differences_of_clusters_are_over_clusters():
    """Two conversations of ten that lost all five turns: two throws of a coin, not ten."""
    before, clusters = [True] * 50, [item // 5 for item in range(50)]
    after = [item >= 10 for item in range(50)]
    alone, together = paired_difference(before, after), paired_difference(before, after, clusters=clusters)
    assert alone == paired_difference(before, after, clusters=range(50))
    assert (alone.p_worse, together.p_worse) == (0.5**10, 0.5**2) and together.lost == alone.lost == 10
    assert together.change == alone.change and together.low < alone.low < alone.high < together.high
    one = paired_difference([True, True, False], [True, False, False], clusters=["a"] * 3)
    assert (one.low, one.high, one.p_worse) == (-1, 1, 0.5)


@pytest.mark.parametrize("k", [12, 40])
def test_clustered_intervals_hold_the_truth_as_often_as_they_say(k):
    """Conversations of 2 to 6 turns whose accuracy varies widely (beta 1.4, 0.6: mean 0.7)."""
    rng = np.random.default_rng(0)
    held = {"clustered": 0, "items": 0}
    for _ in range(400):
        sizes = rng.integers(2, 7, k)
        clusters = np.repeat(np.arange(k), sizes).tolist()
        right = (rng.random(sum(sizes)) < np.repeat(rng.beta(1.4, 0.6, k), sizes)).tolist()
        for way, (low, high) in (("clustered", clustered_interval(right, clusters)),
                                 ("items", wilson_interval(sum(right), len(right)))):  # fmt: skip
            held[way] += low <= 0.7 <= high
    assert held["clustered"] >= 0.92 * 400 and held["items"] < 0.88 * 400


def test_wilson_at_the_ends_is_not_a_point():
    assert wilson_interval(0, 20)[0] == 0 and wilson_interval(0, 20)[1] > 0.1
    assert wilson_interval(20, 20)[1] == 1 and wilson_interval(20, 20)[0] < 0.9


@pytest.mark.parametrize(("k", "n", "c"), [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0.0), (1, 5, 1.0)])
def test_wilson_refuses(k, n, c):
    with pytest.raises(ValueError):
        wilson_interval(k, n, c)


def pairs(lost: int, gained: int, both: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * lost + [False] * gained + [True] * both + [False] * neither
    after = [False] * lost + [True] * gained + [True] * both + [False] * neither
    return before, after


@given(st.integers(0, 40), st.integers(1, 40))
def test_one_error_below_is_the_wilson_end_of_one_standard_error(k, n):
    k = min(k, n)
    low = one_error_below(k / n, n)
    assert low == pytest.approx(wilson_interval(k, n, confidence=0.6826894921370859)[0], abs=1e-9)
    assert low < k / n or low == k == 0


def test_one_error_below_needs_an_item():
    with pytest.raises(ValueError, match="at least 1"):
        one_error_below(0.5, 0)


def test_mcnemar_by_hand():
    # 7 lost, 1 gained: P(X >= 7 | 8, 1/2) = (8 + 1) / 256; better: P(X >= 1) = 255 / 256
    before, after = pairs(7, 1, 30, 12)
    assert mcnemar_one_sided(before, after, "worse") == pytest.approx(9 / 256)
    assert mcnemar_one_sided(before, after, "better") == pytest.approx(255 / 256)


def test_mcnemar_without_a_change_says_nothing():
    assert mcnemar_one_sided([True, False], [True, False]) == 1.0


@given(bools)
def test_mcnemar_is_the_binomial_tail_and_symmetric(items):
    before, after = zip(*items, strict=True)
    lost = sum(b and not a for b, a in items)
    gained = sum(a and not b for b, a in items)
    n = lost + gained
    tail = sum(comb(n, k) for k in range(lost, n + 1)) / 2**n
    assert mcnemar_one_sided(before, after, "worse") == pytest.approx(tail)
    assert mcnemar_one_sided(before, after, "worse") == pytest.approx(mcnemar_one_sided(after, before, "better"))


def test_bootstrap_is_near_the_normal_interval_and_repeats():
    rng = np.random.default_rng(3)
    before, after = rng.random(400) < 0.8, rng.random(400) < 0.7
    difference = after.astype(float) - before
    half = 1.96 * difference.std(ddof=1) / sqrt(400)
    low, high = paired_bootstrap_difference(before, after, seed=1, confidence=0.95, resamples=4000)
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.01)
    assert (low, high) == paired_bootstrap_difference(before, after, seed=1, confidence=0.95, resamples=4000)
    assert (low, high) != paired_bootstrap_difference(before, after, seed=2, confidence=0.95, resamples=4000)


@settings(max_examples=25)
@given(bools, st.integers(0, 2**32 - 1))
def test_paired_difference_agrees_with_itself(items, seed):
    before, after = zip(*items, strict=True)
    result = paired_difference(before, after, seed=seed, resamples=200)
    assert result.change == pytest.approx(result.after - result.before)
    assert result.change == pytest.approx((result.gained - result.lost) / result.n)
    assert -1 <= result.low <= result.high <= 1
    assert result.p_worse == mcnemar_one_sided(before, after, "worse")
    assert result.p_better == mcnemar_one_sided(before, after, "better")


def test_no_spread_gives_the_difference_itself():
    assert paired_bootstrap_difference([1, 1, 1], [0, 0, 0]) == (-1.0, -1.0)
    assert paired_bootstrap_difference([True], [True]) == (0.0, 0.0)


def test_bootstrap_takes_partial_scores_but_mcnemar_does_not():
    low, high = paired_bootstrap_difference([0.5, 0.2, 0.9], [0.6, 0.7, 0.9])
    assert 0 <= low <= high <= 0.5
    with pytest.raises(ValueError, match="right or wrong"):
        mcnemar_one_sided([0.5, 1.0], [1.0, 1.0])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [], "no items"),
        ([True], [True, False], "1 items before but 2 after"),
        ([[True]], [[True]], "one score per item"),
        ([float("nan")], [1.0], "finite"),
    ],
)
def test_unusable_pairs_are_refused_in_words(before, after, message):
    for function in (mcnemar_one_sided, paired_bootstrap_difference, paired_difference):
        with pytest.raises(ValueError, match=message):
            function(before, after)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="alternative"):
        mcnemar_one_sided([True], [True], "two-sided")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="resamples"):
        paired_bootstrap_difference([True, False], [False, True], resamples=10)
    with pytest.raises(ValueError, match="confidence"):
        paired_bootstrap_difference([True, False], [False, True], confidence=95)


# Is the loss smaller than so much?


def chances(n: int, loss: float, noise: float) -> dict[tuple[int, int], float]:
    """(lost, gained) -> chance, one by one."""
    same = 1 - loss - 2 * noise
    return {
        (lost, gained): comb(n, lost) * comb(n - lost, gained) * (loss + noise) ** lost * noise**gained
        * same ** (n - lost - gained) for lost in range(n + 1) for gained in range(n + 1 - lost)
    }  # fmt: skip


@given(
    st.integers(1, 14).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    st.floats(0, 1),
    st.sampled_from([0.04, 0.1, 0.3, 1.0]),
)
@settings(deadline=None)
def test_noninferiority_is_the_chance_of_so_small_a_net_loss(counts, share, loss):
    n, lost = counts
    gained = round(share * (n - lost))
    noise = _noise_under(n, lost, gained, loss)
    wanted = sum(p for (a, b), p in chances(n, loss, noise).items() if a - b <= lost - gained)
    assert noninferiority_p(n, lost, gained, loss) == pytest.approx(wanted, abs=1e-8)
    # The noise is the likeliest: no other on a grid explains the counts better.
    grid = np.linspace(0, (1 - loss) / 2, 200)
    likely = [chances(n, loss, float(g))[lost, gained] for g in (noise, *grid)]
    assert likely[0] >= max(likely) * (1 - 1e-6)


@pytest.mark.parametrize("n", [12, 30])
@pytest.mark.parametrize("loss", [0.04, 0.15, 0.4])
def test_a_true_loss_of_so_much_hardly_ever_passes(n, loss):
    """Exactly, over all outcomes: at most the level, whatever the noise."""
    passes = {(a, b) for a, b in chances(n, loss, 0.0) if noninferiority_p(n, a, b, loss) <= 0.1}
    for noise in (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.28):
        assert sum(p for key, p in chances(n, loss, noise).items() if key in passes) <= 0.1 + 1e-9


def test_noninferiority_at_its_ends():
    assert noninferiority_p(60, 0, 0, 0.04) == pytest.approx(0.96**60)
    assert [noninferiority_p(10, 10, 0, loss) for loss in (0.5, 1.0)] == pytest.approx([1.0, 1.0])
    assert noninferiority_p(1000, 5, 40, 0.04) < 1e-6 < noninferiority_p(1000, 40, 5, 0.04)
    for wrong in ((10, 8, 3, 0.1), (10, -1, 0, 0.1), (10, 1, 1, 0.0), (10, 1, 1, 1.1)):
        with pytest.raises(ValueError, match="noninferiority_p"):
            noninferiority_p(*wrong)


def test_more_items_and_less_noise_pass_more_often():
    powers = [noninferiority_power(n, 0.04, 0.02, 0.1) for n in (0, 60, 120, 240, 480)]
    assert powers == sorted(powers) and powers[0] == 0 and powers[-1] > 0.98
    assert noninferiority_power(240, 0.04, 0.01, 0.1) > noninferiority_power(240, 0.04, 0.05, 0.1)
    needed = items_needed(0.04, 0.02, 0.1, 0.9)
    assert needed and noninferiority_power(needed, 0.04, 0.02, 0.1) >= 0.9
    assert items_needed(0.04, 0.4, 0.1, 0.99, most=100) is None
