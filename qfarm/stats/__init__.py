"""Statistics: how large a difference between two cells is, and how far it would move on other text of this kind.

The unit of sampling is the cluster (an article, a C4 document, items that share a passage), never the token. Two cells
are compared on the same documents, so what the documents have in common cancels; errors come from the linearised
ratio of sums, with Student's t on clusters - 1 degrees of freedom. Only `seeds` makes a statement about other
calibration samples.

`means` has means and quantiles of one cell, `paired` and `accuracy` differences of two, `many` whole tables, `seeds`
replicates; the sequential test that stops hopeless cells is qfarm.betting.
"""

from qfarm.stats.accuracy import (
    TEST_CHANGED,
    TEST_ITEMS,
    AccuracyDifference,
    accuracy_change,
    accuracy_difference,
    exact_p,
    less_accurate_p,
    mid_p,
    share,
    wilson,
)
from qfarm.stats.many import (
    FAMILY_ALPHA,
    MARK_CLUSTERS,
    STRONG_ALPHA,
    benjamini_hochberg,
    dominated,
    holm,
    no_more_bits,
    tied_with_best,
    worse_p,
)
from qfarm.stats.means import (
    INTERVAL_CLUSTERS,
    LEVEL,
    QUANTILE_BEYOND,
    QUANTILE_CLUSTERS,
    TEST_CLUSTERS,
    Interval,
    Mean,
    Weights,
    clustered_mean,
    clustered_quantile,
    percent,
    stratified_mean,
)
from qfarm.stats.paired import ALPHA, DETECTABLE, Difference, Verdict, count_skewed, paired_difference, verdict
from qfarm.stats.seeds import (
    SeedsMean,
    SeedVariance,
    pooled_seed_variance,
    rows_of_seeds,
    seeds_interval,
    with_seed_noise,
)

__all__ = [
    "ALPHA",
    "DETECTABLE",
    "FAMILY_ALPHA",
    "INTERVAL_CLUSTERS",
    "LEVEL",
    "MARK_CLUSTERS",
    "QUANTILE_BEYOND",
    "QUANTILE_CLUSTERS",
    "STRONG_ALPHA",
    "TEST_CHANGED",
    "TEST_CLUSTERS",
    "TEST_ITEMS",
    "AccuracyDifference",
    "Difference",
    "Interval",
    "Mean",
    "SeedVariance",
    "SeedsMean",
    "Verdict",
    "Weights",
    "accuracy_change",
    "accuracy_difference",
    "benjamini_hochberg",
    "clustered_mean",
    "count_skewed",
    "clustered_quantile",
    "dominated",
    "exact_p",
    "holm",
    "less_accurate_p",
    "mid_p",
    "no_more_bits",
    "paired_difference",
    "percent",
    "pooled_seed_variance",
    "rows_of_seeds",
    "seeds_interval",
    "share",
    "stratified_mean",
    "tied_with_best",
    "verdict",
    "wilson",
    "with_seed_noise",
    "worse_p",
]
