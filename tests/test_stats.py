"""Statistics: by hand, by simulation with a fixed seed, and by what must not change a result."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qfarm import stats
from qfarm.errors import NonFinite

SEED = 20261121
EXACT = 1e-12


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


def difference(d, tokens=None, cluster=None) -> stats.Difference:
    d = np.asarray(d, float)
    tokens = np.ones_like(d) if tokens is None else tokens
    cluster = np.arange(d.size) if cluster is None else cluster
    return stats.paired_difference(d, np.zeros_like(d), tokens, cluster)


def test_clustered_mean_by_hand():
    # Cluster sums 3 and 9 over counts 2 and 3: mean 12 / 5; residuals -1.8 and 1.8; sqrt(2 * 6.48) / 5.
    mean = stats.clustered_mean([1, 2, 6, 3], [1, 1, 2, 1], [0, 0, 1, 1])
    assert (mean.value, mean.error, mean.df) == pytest.approx((2.4, 0.72, 1), abs=EXACT)


def test_clustered_mean_of_singletons_is_the_textbook_error(rng):
    x = rng.normal(size=30)
    mean = stats.clustered_mean(x, np.ones(30), [f"article {i}" for i in range(30)])
    assert mean.standard_error == pytest.approx(x.std(ddof=1) / np.sqrt(30), abs=EXACT)


def test_one_cluster_has_no_error():
    mean = stats.clustered_mean([1, 2], [1, 1], ["a", "a"])
    assert (mean.value, mean.df) == (1.5, 0) and np.isnan(mean.error)
    assert mean.interval() == (1.5, None, None)


def test_paired_difference_equals_scipy_on_independent_documents(rng):
    d = rng.normal(0.01, 0.03, size=40)
    ours, theirs = difference(d), scipy_stats.ttest_1samp(d, 0)
    assert ours.p == pytest.approx(theirs.pvalue, abs=EXACT)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), abs=EXACT)


def test_t_interval_covers_and_p_is_uniform(rng):
    found = [difference(row) for row in rng.normal(size=(8000, 24))]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.940 <= covered <= 0.960
    assert scipy_stats.kstest([one.p for one in found], "uniform").pvalue > 0.001


def test_power_of_a_planted_half_percent(rng):
    effect, sigma, n = np.log(1.005), 0.02, 141
    power = np.mean([difference(row).p < 0.05 for row in rng.normal(effect, sigma, size=(2000, n))])
    cut, shift = scipy_stats.t.ppf(0.975, n - 1), effect / sigma * np.sqrt(n)
    theory = scipy_stats.nct.sf(cut, n - 1, shift) + scipy_stats.nct.cdf(-cut, n - 1, shift)
    assert power == pytest.approx(theory, abs=0.035)


def test_clusters_cover_where_naive_errors_do_not(rng):
    clustered = naive = 0
    for _ in range(2000):
        cluster = np.repeat(np.arange(40), rng.integers(1, 6, size=40))
        d = 0.7 * rng.normal(size=40)[cluster] + rng.normal(size=cluster.size)
        by_cluster, by_piece = difference(d, cluster=cluster), difference(d)
        clustered += by_cluster.low <= 0 <= by_cluster.high
        naive += by_piece.low <= 0 <= by_piece.high
    assert clustered / 2000 > 0.925
    assert naive / 2000 < 0.90


def test_mid_p_by_hand():
    assert stats.mid_p(1, 9) == pytest.approx(0.01171875, abs=EXACT)  # 2 * 11 / 1024 - 10 / 1024
    assert stats.mid_p(0, 0) == 1.0
    assert stats.mid_p(3, 3) == 1.0


@pytest.mark.parametrize("n", [100, 200])
def test_mid_p_keeps_its_size(n):
    changed = np.arange(81)  # disagreement up to 20 %: more than 80 of 200 does not happen
    rejects = np.zeros(81)
    for m in changed:
        lost = np.arange(m + 1)
        p = np.array([stats.mid_p(int(k), int(m - k)) for k in lost[: m // 2 + 1]])
        p = np.concatenate([p, p[: m + 1 - p.size][::-1]])
        rejects[m] = scipy_stats.binom.pmf(lost, m, 0.5)[p <= 0.05].sum()
    sizes = [scipy_stats.binom.pmf(changed, n, share) @ rejects for share in np.linspace(0.01, 0.2, 20)]
    assert 0.03 < max(sizes) <= 0.05


def test_accuracy_change_by_hand():
    # down 11 / 102, up 6 / 102: centre -5 / 102, variance (17 / 102 - (5 / 102)^2) / 102
    change = stats.accuracy_change(lost=10, gained=5, n=100)
    half = 1.959963984540054 * np.sqrt((17 / 102 - (5 / 102) ** 2) / 102)
    assert change == pytest.approx((-0.05, -5 / 102 - half, -5 / 102 + half), abs=EXACT)


def test_bonett_price_covers(rng):
    counts = rng.multinomial(500, [0.02, 0.01, 0.97], size=4000)
    found = [stats.accuracy_change(int(lost), int(gained), 500) for lost, gained, _ in counts]
    assert 0.945 <= np.mean([one.low <= -0.01 <= one.high for one in found]) <= 0.985


def test_wilson_of_a_known_table():
    assert stats.wilson(90, 100) == pytest.approx((0.9, 0.82563, 0.94477), abs=1e-5)


def test_woodruff_covers_where_token_order_statistics_do_not(rng):
    windows, tokens, runs, q = 60, 512, 400, 0.99
    cluster = np.repeat(np.arange(windows), tokens)
    truth = scipy_stats.lognorm.ppf(q, np.sqrt(0.25 + 1))  # KL-like values: each window has its own scale
    by_window = by_token = 0
    for _ in range(runs):
        x = np.exp(np.repeat(rng.normal(0, 0.5, size=windows), tokens) + rng.normal(size=windows * tokens))
        _, low, high = stats.clustered_quantile(x, cluster, q)
        by_window += low <= truth <= high
        half = 1.96 * np.sqrt(q * (1 - q) / x.size)
        low, high = np.quantile(x, [q - half, q + half])
        by_token += low <= truth <= high
    assert by_window / runs > 0.90
    assert by_token / runs < 0.85


def test_quantiles_of_too_little_have_no_interval(rng):
    few_windows = stats.clustered_quantile(rng.normal(size=19_000), np.repeat(np.arange(19), 1000), 0.5)
    few_beyond = stats.clustered_quantile(rng.normal(size=4000), np.repeat(np.arange(40), 100), 0.99)
    assert few_windows[1:] == few_beyond[1:] == (None, None)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then never falling.
    assert stats.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06], abs=EXACT)
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]).size == 0


def test_holm_equals_statsmodels(rng):
    oracle = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    p = rng.uniform(size=50) ** 3
    assert stats.holm(p) == pytest.approx(oracle.multipletests(p, method="holm")[1], abs=EXACT)


def test_percent_of_a_log_ratio():
    assert stats.percent(np.log(1.052)) == pytest.approx(5.2)
    assert stats.percent(1e6) == np.inf


def test_a_mean_of_logarithms_is_exponentiated_with_its_ends():
    t = scipy_stats.t.ppf(0.975, 29)
    ends = 20 * np.exp([-0.1 * t, 0.1 * t])
    assert stats.Mean(np.log(20), 0.1, 30).exponentiated() == pytest.approx((20, *ends))
    assert stats.Mean(np.log(20), 0.1, 9).exponentiated() == (pytest.approx(20), None, None)


def test_percent_exponentiates_the_ends(rng):
    found = difference(rng.normal(0.05, 0.1, size=30))
    assert found.percent == pytest.approx([100 * (np.exp(x) - 1) for x in (found.delta, found.low, found.high)])


@pytest.mark.parametrize(
    ("clusters", "interval", "test"), [(9, False, False), (10, True, False), (19, True, False), (20, True, True)]
)
def test_small_samples_give_less(rng, clusters, interval, test):
    found = difference(rng.normal(size=clusters))
    assert (found.low is not None, found.standard_error is not None) == (interval, interval)
    assert (found.p is not None) == test
    assert found.clusters == clusters


def test_a_cell_against_itself_is_identical(rng):
    loss = rng.normal(size=30)
    found = stats.paired_difference(loss, loss, np.ones(30), np.arange(30))
    assert found.identical and found.delta == 0
    assert (found.standard_error, found.low, found.high, found.p) == (None, None, None, None)


def test_a_constant_shift_is_certain():
    found = difference(np.full(32, 0.25))
    assert not found.identical and found.p == 0 and (found.low, found.high) == (0.25, 0.25)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_refused(value):
    loss = np.zeros(30)
    loss[7] = value
    with pytest.raises(NonFinite, match="the loss of 1 of 30 pieces is not finite"):
        stats.paired_difference(loss, loss, np.ones(30), np.arange(30))


def pieces(rng):
    cluster = rng.integers(0, 25, size=200)
    return rng.normal(size=200), rng.normal(size=200), rng.integers(1, 50, size=200), cluster


def test_order_changes_nothing(rng):
    first, second, tokens, cluster = pieces(rng)
    order = rng.permutation(200)
    plain = stats.paired_difference(first, second, tokens, cluster)
    shuffled = stats.paired_difference(first[order], second[order], tokens[order], cluster[order])
    renamed = stats.paired_difference(first, second, tokens, [f"article {c}" for c in cluster])
    for other in (shuffled, renamed):
        for name in ("delta", "standard_error", "low", "high", "p"):
            assert getattr(other, name) == pytest.approx(getattr(plain, name), abs=EXACT)


def test_swapping_sides_negates(rng):
    first, second, tokens, cluster = pieces(rng)
    one = stats.paired_difference(first, second, tokens, cluster)
    two = stats.paired_difference(second, first, tokens, cluster)
    assert (two.delta, two.low, two.high) == pytest.approx((-one.delta, -one.high, -one.low), abs=EXACT)
    assert two.p == pytest.approx(one.p, abs=EXACT)


def test_duplicates_shrink_only_the_naive_error(rng):
    d, _, tokens, cluster = pieces(rng)
    twice = [np.tile(x, 2) for x in (d, tokens, cluster)]
    once = stats.clustered_mean(d, tokens, cluster).error
    assert stats.clustered_mean(*twice).error == pytest.approx(once, abs=EXACT)
    naive = stats.clustered_mean(d, tokens, np.arange(200)).error
    shrunk = stats.clustered_mean(twice[0], twice[1], np.arange(400)).error
    assert shrunk == pytest.approx(naive / np.sqrt(2), rel=3e-3)  # up to (n - 1) / n
