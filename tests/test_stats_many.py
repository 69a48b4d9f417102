"""Statistics of accuracies, margins, whole tables and replicates: by hand, by brute force, by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qfarm import stats

SEED = 20261121
EXACT = 1e-12


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


def loss_difference(d, cluster=None) -> stats.Difference:
    d = np.asarray(d, float)
    return stats.paired_difference(
        d, np.zeros_like(d), np.ones_like(d), np.arange(d.size) if cluster is None else cluster
    )


def items(lost: int, gained: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong [item] of two cells that differ on lost + gained of n items."""
    before, after = np.ones(n), np.ones(n)
    after[:lost] = 0
    before[lost : lost + gained] = 0
    return after, before


# -- accuracy ---------------------------------------------------------------------------------------------------------


def test_exact_p_by_hand_and_beside_mid_p():
    assert stats.exact_p(1, 9) == pytest.approx(0.021484375, abs=EXACT)  # 2 * (1 + 10) / 1024
    assert stats.exact_p(0, 0) == 1.0
    assert all(stats.mid_p(k, 20 - k) <= stats.exact_p(k, 20 - k) for k in range(21))


def test_independent_items_get_mid_p_and_bonett_price():
    found = stats.accuracy_difference(*items(30, 12, 500), np.arange(500))
    assert (found.lost, found.gained, found.n, found.clusters) == (30, 12, 500, 500)
    assert (found.test, found.p, found.exact_p) == ("McNemar mid-p", stats.mid_p(30, 12), stats.exact_p(30, 12))
    assert (found.delta, found.low, found.high) == pytest.approx(stats.accuracy_change(30, 12, 500), abs=EXACT)
    assert found.shown.value == pytest.approx(-3.6) and found.harm == pytest.approx(0.036)
    assert found.flips == stats.wilson(42, 500)


def test_twins_get_the_clustered_t():
    after, before = items(30, 12, 500)
    twin = np.arange(500) // 2
    found = stats.accuracy_difference(after, before, twin)
    pairs = (after - before).reshape(250, 2).mean(1)
    theirs = scipy_stats.ttest_1samp(pairs, 0)
    assert (found.test, found.exact_p) == ("t over clusters", None)
    assert found.p == pytest.approx(theirs.pvalue, abs=EXACT)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), abs=EXACT)


def test_twins_with_shared_changes_keep_the_size_that_mid_p_breaks(rng):
    clustered = naive = 0
    for _ in range(1500):
        change = rng.choice([-1, 0, 1], p=[0.05, 0.9, 0.05], size=300)
        d = np.repeat(change, 2)  # twins change together
        after, before = (d > 0).astype(float), (d < 0).astype(float)
        found = stats.accuracy_difference(after, before, np.repeat(np.arange(300), 2))
        clustered += found.p is not None and found.p < 0.05
        naive += stats.mid_p(found.lost, found.gained) < 0.05
    assert clustered / 1500 <= 0.07
    assert naive / 1500 > 0.08


def test_a_mean_over_tasks_by_hand(rng):
    """SE^2 = sum s_t^2 / n_t / T^2 for the plain mean, with (n_t / N)^2 for the weighted one."""
    sizes = [100, 300, 50]
    task = np.repeat([0, 1, 2], sizes)
    after, before = (rng.uniform(size=(2, 450)) < 0.6).astype(float)
    d = after - before
    parts = [d[task == t] for t in range(3)]
    plain = stats.accuracy_difference(after, before, np.arange(450), task)
    assert plain.delta == pytest.approx(np.mean([part.mean() for part in parts]), abs=EXACT)
    squared = sum(part.var(ddof=1) / part.size for part in parts) / 9
    assert plain.standard_error == pytest.approx(np.sqrt(squared), abs=EXACT)
    assert plain.test == "t over tasks"
    by_size = stats.accuracy_difference(after, before, np.arange(450), task, weights="size")
    assert by_size.delta == pytest.approx(d.mean(), abs=EXACT)
    squared = sum((part.size / 450) ** 2 * part.var(ddof=1) / part.size for part in parts)
    assert by_size.standard_error == pytest.approx(np.sqrt(squared), abs=EXACT)


def test_the_stratified_interval_covers_where_the_size_weighted_error_does_not(rng):
    sizes, runs = np.array([100, 1500]), 2000
    stratified = by_size = 0
    task, cluster = np.repeat([0, 1], sizes), np.arange(sizes.sum())
    for _ in range(runs):
        d = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=sizes.sum())
        found = stats.stratified_mean(d, np.ones_like(d), cluster, task)
        stratified += found.low <= 0 <= found.high
        by_size += abs(found.value) <= 1.96 * d.std() / np.sqrt(d.size)
    assert 0.93 < stratified / runs < 0.97
    assert by_size / runs < 0.85


@pytest.mark.parametrize(("lost", "gained", "n", "tested"), [(5, 4, 500, False), (6, 4, 500, True), (6, 4, 99, False)])
def test_too_few_items_or_changes_are_not_tested(lost, gained, n, tested):
    found = stats.accuracy_difference(*items(lost, gained, n), np.arange(n))
    assert (found.p is not None) == tested and found.low is not None


def test_a_test_of_clustered_items_needs_twenty_clusters():
    after, before = items(30, 12, 500)
    for clusters, tested in ((19, False), (20, True)):
        found = stats.accuracy_difference(after, before, np.arange(500) % clusters)
        assert (found.p is not None) == tested and found.low is not None


def test_flips_of_twins_have_the_clustered_interval():
    after, before = items(30, 12, 500)
    flipped = (after != before).astype(float)
    expected = stats.clustered_mean(flipped, np.ones(500), np.arange(500) // 2).interval()
    found = stats.accuracy_difference(after, before, np.arange(500) // 2).flips
    assert found == pytest.approx(expected, abs=EXACT)
    assert found.high - found.low > 1.3 * np.ptp(stats.wilson(42, 500)[1:])  # twins flip together


@pytest.mark.parametrize(("right", "k"), [(1.0, 15), (0.0, 0)])
def test_clusters_that_are_all_alike_are_no_certainty(right, k):
    mean, interval = stats.share(np.full(30, right), np.arange(30) // 2)
    assert mean.error == 0 and interval == pytest.approx(stats.wilson(k, 15), abs=EXACT)
    halves = stats.share(np.tile([1.0, 0.0], 15), np.arange(30) // 2)[1]
    assert halves == (0.5, None, None)


def test_less_accurate_is_the_mid_p_of_each_pair(rng):
    before = rng.uniform(size=800) < 0.7
    after = before ^ (rng.uniform(size=(4, 800)) < [[0.01], [0.03], [0.08], [0.08]])
    after[0] = before
    after[0, :7] = ~before[:7]
    p, testable = stats.less_accurate_p(after.astype(int) - before)
    for i, j in itertools.permutations(range(4), 2):
        lost, gained = np.sum(after[j] & ~after[i]), np.sum(after[i] & ~after[j])
        two_sided = stats.mid_p(lost, gained)
        expected = two_sided / 2 if lost >= gained else 1 - two_sided / 2
        assert testable[i, j] == (lost + gained >= 10)
        assert p[i, j] == pytest.approx(expected if testable[i, j] else 1.0, abs=1e-9)
    assert not stats.less_accurate_p(after[:, :99].astype(int) - before[:99])[1].any()


def test_equal_answers_are_identical():
    found = stats.accuracy_difference(*items(0, 0, 500), np.arange(500))
    assert found.identical and (found.p, found.low, found.standard_error) == (None, None, None)


def test_swapping_sides_negates_an_accuracy_difference():
    after, before = items(30, 12, 500)
    one = stats.accuracy_difference(after, before, np.arange(500))
    two = stats.accuracy_difference(before, after, np.arange(500))
    assert (two.delta, two.low, two.high) == pytest.approx((-one.delta, -one.high, -one.low), abs=EXACT)
    assert (two.p, two.lost, two.gained) == (one.p, one.gained, one.lost)


# -- margins ----------------------------------------------------------------------------------------------------------


def test_equivalence_is_two_one_sided_tests(rng):
    margin = np.log(1.01)
    d = rng.normal(0.002, 0.02, size=141)
    found = loss_difference(d)
    below = scipy_stats.ttest_1samp(d, margin, alternative="less").pvalue
    above = scipy_stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    assert found.non_inferior_p(margin) == pytest.approx(below, abs=EXACT)
    assert found.equivalence_p(margin) == pytest.approx(max(below, above), abs=EXACT)


def test_non_inferiority_at_the_margin_errs_as_often_as_promised(rng):
    margin = np.log(1.01)
    said = [loss_difference(d).non_inferior_p(margin) < 0.05 for d in rng.normal(margin, 0.02, size=(8000, 141))]
    assert 0.040 <= np.mean(said) <= 0.060


def test_accuracy_is_equivalent_where_its_90_percent_interval_lies_within():
    for lost, gained in itertools.product(range(20, 45, 3), repeat=2):
        found = stats.accuracy_difference(*items(lost, gained, 2000), np.arange(2000))
        _, low, high = stats.accuracy_change(lost, gained, 2000, level=0.9)
        assert (found.equivalence_p(0.01) < 0.05) == (-0.01 < low and high < 0.01)


def test_verdicts_are_four_and_identical(rng):
    noise = rng.normal(0, 0.02, size=141)
    noise -= noise.mean()
    margin = np.log(1.01)

    def judged(d):
        found = loss_difference(d)
        return stats.verdict(found, found.p, found.equivalence_p(margin))

    assert judged(noise + 0.02) == "worse" and judged(noise - 0.02) == "better"
    assert judged(noise) == "within margin" and judged(5 * noise) == "undecided"
    assert judged(np.zeros(141)) == "identical" and judged(noise[:19] + 1) is None
    gained = stats.accuracy_difference(*items(5, 40, 500), np.arange(500))
    assert stats.verdict(gained, gained.p, None) == "better"


def test_the_detectable_difference_is_found_in_80_percent(rng):
    found = loss_difference(rng.normal(size=200))
    assert found.detectable == pytest.approx(2.8 * found.standard_error)
    effect = 2.8 / np.sqrt(200)
    assert np.mean([loss_difference(d).p < 0.05 for d in rng.normal(effect, 1, size=(1500, 200))]) == pytest.approx(
        0.8, abs=0.045
    )


# -- many cells -------------------------------------------------------------------------------------------------------


def judged(d):
    """p [i, j] from d [document, cell], differences to one baseline."""
    found = [loss_difference(column) for column in d.T]
    return stats.worse_p([one.harm for one in found], np.stack([one.influence for one in found], 1), len(d) - 1)


def test_pairs_are_what_a_paired_t_test_says(rng):
    d = rng.normal(size=(30, 4)) + [0, 0.2, 0.5, 0]
    p = judged(d)
    for i, j in itertools.permutations(range(4), 2):
        theirs = scipy_stats.ttest_rel(d[:, i], d[:, j], alternative="greater").pvalue
        assert p[i, j] == pytest.approx(theirs, abs=1e-10)
    assert np.diag(p) == pytest.approx(1)


def test_pairs_of_uneven_clusters_are_what_paired_difference_says(rng):
    cluster, tokens = rng.integers(0, 30, size=200), rng.integers(1, 50, size=200)
    a, b, base = rng.normal(size=(3, 200))
    one, two = (stats.paired_difference(x, base, tokens, cluster) for x in (a, b))
    direct = stats.paired_difference(a, b, tokens, cluster)
    p = stats.worse_p([one.harm, two.harm], np.stack([one.influence, two.influence], 1), one.df)
    assert 2 * min(p[0, 1], p[1, 0]) == pytest.approx(direct.p, abs=1e-10)


def test_seed_variance_makes_pairs_less_certain(rng):
    d = rng.normal(size=(60, 2)) + [0.5, 0]
    found = [loss_difference(column) for column in d.T]
    parts = np.stack([one.influence for one in found], 1)
    p = [stats.worse_p([one.harm for one in found], parts, 59, extra, 7)[0, 1] for extra in (None, [0.04, 0.04])]
    documents = scipy_stats.sem(d[:, 0] - d[:, 1]) ** 2
    error, df = np.sqrt(documents + 0.08), (documents + 0.08) ** 2 / (documents**2 / 59 + 0.08**2 / 7)
    assert p[1] == pytest.approx(scipy_stats.t.sf((d[:, 0] - d[:, 1]).mean() / error, df), abs=1e-10)
    assert p[0] < p[1]


def test_the_best_of_equal_cells_stays_in_the_set(rng):
    kept = [stats.tied_with_best(judged(rng.normal(size=(100, 12))))[0] for _ in range(600)]
    assert np.mean(kept) > 0.92


def test_a_clearly_worse_cell_leaves_the_set(rng):
    d = rng.normal(size=(141, 3)) * 0.02 + [0, 0.0005, 0.05]
    assert list(stats.tied_with_best(judged(d))) == [True, True, False]
    assert list(stats.tied_with_best(judged(d[:, :1]))) == [True]


def test_a_cell_of_the_front_is_rarely_dropped(rng):
    """Losses fall as bits grow, in pairs of equal bits with nothing between them: all are on the front."""
    bits = np.repeat([2.0, 3.0, 4.0, 6.0], 3)
    dropped = [stats.dominated(judged(rng.normal(size=(80, 12)) - bits * 0.05), bits).any() for _ in range(600)]
    assert np.mean(dropped) < 0.09


def test_dominated_needs_no_more_bits_and_a_better_score(rng):
    d = rng.normal(size=(141, 3)) * 0.02 + [0.0, 0.05, -0.05]
    p = judged(d)
    assert list(stats.dominated(p, [3, 4, 8])) == [False, True, False]
    assert list(stats.dominated(p, [4, 3, 8])) == [False, False, False]
    assert list(stats.dominated(p[:1, :1], [4])) == [False]


def test_dominated_needs_no_more_bits_in_any_respect(rng):
    p = judged(rng.normal(size=(141, 2)) * 0.02 + [0.0, 0.05])
    assert list(stats.dominated(p, [[4, 16], [4, 16]])) == [False, True]
    assert list(stats.dominated(p, [[4, 16], [4, 8]])) == [False, False]
    assert list(stats.dominated(p, [[4, np.nan], [4, np.nan]])) == [False, False]


def test_equal_cells_are_neither_worse_nor_better(rng):
    d = np.repeat(rng.normal(size=(50, 1)), 2, axis=1)
    assert judged(d)[0, 1] == pytest.approx(0.5)


def test_benjamini_hochberg_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4/1, 4/2, 4/3, 1: never above the next.
    assert stats.benjamini_hochberg([0.5, 0.02, 0.01, 0.03]) == pytest.approx([0.5, 0.04, 0.04, 0.04], abs=EXACT)
    assert stats.benjamini_hochberg([]).size == 0


def test_benjamini_hochberg_equals_statsmodels(rng):
    oracle = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    p = rng.uniform(size=50) ** 3
    assert stats.benjamini_hochberg(p) == pytest.approx(oracle.multipletests(p, method="fdr_bh")[1], abs=EXACT)


# -- replicates -------------------------------------------------------------------------------------------------------


def test_crossed_seeds_cover_where_the_document_interval_does_not(rng):
    runs, seeds, documents = 2500, 3, 100
    crossed = by_document = 0
    for _ in range(runs):
        y = rng.normal(size=(seeds, 1)) * 0.1 + rng.normal(size=documents) + 0.3 * rng.normal(size=(seeds, documents))
        _, low, high = stats.seeds_interval(y).interval()
        crossed += low <= 0 <= high
        found = loss_difference(y.mean(0))
        by_document += found.low <= 0 <= found.high
    assert crossed / runs > 0.925
    assert by_document / runs < crossed / runs - 0.01


def test_crossed_error_by_hand():
    # Seed means 1 and 3, document means 1, 2, 3; y = seed + document - mean leaves no residual.
    y = np.array([1.0, 3.0])[:, None] + np.array([-1.0, 0.0, 1.0])
    found = stats.seeds_interval(y)
    by_seed, by_document = 2 / 2, 1 / 3
    assert found.error**2 == pytest.approx(by_seed + by_document, abs=EXACT)
    assert found.df == pytest.approx((4 / 3) ** 2 / (1 / 1 + (1 / 9) / 2), abs=EXACT)
    assert (found.value, found.spread) == pytest.approx((2.0, np.sqrt(2)), abs=EXACT)
    assert found.interval().low is None  # three documents


def test_rows_of_seeds_keep_means_and_clustered_errors(rng):
    cluster, tokens = rng.integers(0, 30, size=200), rng.integers(1, 50, size=200)
    found = [stats.paired_difference(rng.normal(size=200), np.zeros(200), tokens, cluster) for _ in range(3)]
    y = stats.rows_of_seeds([one.delta for one in found], [one.influence for one in found])
    assert y.mean(1) == pytest.approx([one.delta for one in found], abs=EXACT)
    assert y.std(1, ddof=1) / np.sqrt(30) == pytest.approx([one.standard_error for one in found], abs=EXACT)


def test_equal_seeds_have_the_document_error(rng):
    y = np.repeat(rng.normal(size=(1, 40)), 3, axis=0)
    found = stats.seeds_interval(y)
    assert found.spread == pytest.approx(0, abs=EXACT)
    assert found.error == pytest.approx(y[0].std(ddof=1) / np.sqrt(40), abs=EXACT)
    assert found.df == pytest.approx(39)
    assert stats.seeds_interval(np.zeros((3, 40))).interval() == (0, 0, 0)


def test_seed_variance_is_pooled_by_degrees_of_freedom():
    found = stats.pooled_seed_variance([[1.0, 3.0], [0.0, 1.0, 2.0], [5.0]])
    assert (found.variance, found.df, found.cells) == (pytest.approx((2 + 2) / 3), 3, 2)
    assert stats.pooled_seed_variance([[1.0], []]) is None


def test_known_seed_noise_widens_a_one_seed_interval():
    noise = stats.SeedVariance(variance=0.04, df=16, cells=8)
    found = stats.with_seed_noise(1.0, 0.1, 100, noise)
    df = 0.05**2 / (0.1**4 / 100 + 0.04**2 / 16)
    half = scipy_stats.t.ppf(0.975, df) * np.sqrt(0.05)
    assert found == pytest.approx((1.0, 1.0 - half, 1.0 + half))
