"""Statistics: how large a difference between two cells is, and how far it would move on other text of this kind.

The unit of sampling is the cluster (an article, a C4 document, items that share a passage), never the token. Two cells
are compared on the same documents, so what the documents have in common cancels; errors come from the linearised
ratio of sums, with Student's t on clusters - 1 degrees of freedom. Nothing here is a statement about other
calibration samples: that needs several seeds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from qfarm.errors import NonFinite

LEVEL = 0.95
# Below these an answer would look more certain than it is, so none is given.
INTERVAL_CLUSTERS = 10
TEST_CLUSTERS = 20
MARK_CLUSTERS = 48  # the tails that multiplicity needs break first: family error of Holm at n = 24 is up to 13 %
QUANTILE_CLUSTERS = 20
QUANTILE_BEYOND = 50  # values beyond the quantile
FAMILY_ALPHA = 0.05


class Interval(NamedTuple):
    """A value and the ends of its interval, None where too little was seen to give one."""

    value: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Mean:
    """A ratio of sums and its error with clusters as the unit."""

    value: float
    error: float  # as computed, from however few clusters; NaN for a single one
    clusters: int

    @property
    def df(self) -> int:
        return self.clusters - 1

    @property
    def standard_error(self) -> float | None:
        """The error if it may be shown: None below INTERVAL_CLUSTERS."""
        return self.error if self.clusters >= INTERVAL_CLUSTERS else None

    @property
    def low(self) -> float | None:
        return self.interval().low

    @property
    def high(self) -> float | None:
        return self.interval().high

    def interval(self, level: float = LEVEL) -> Interval:
        """Student's t interval; no ends below INTERVAL_CLUSTERS."""
        if self.clusters < INTERVAL_CLUSTERS:
            return Interval(self.value, None, None)
        half = float(special.stdtrit(self.df, (1 + level) / 2)) * self.error
        return Interval(self.value, self.value - half, self.value + half)

    def exponentiated(self, level: float = LEVEL) -> Interval:
        """Of a mean of logarithms: a perplexity from losses, a ratio from differences.

        The interval is made on the log scale because the raw one misses unevenly.
        """
        value, low, high = self.interval(level)
        return Interval(_exp(value), None if low is None else _exp(low), None if high is None else _exp(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference of mean loss, first minus second: ln(PPL_first / PPL_second)."""

    delta: float  # nats per token
    standard_error: float | None  # None below INTERVAL_CLUSTERS and when identical
    df: int
    low: float | None  # ends of the 95 % interval of delta
    high: float | None
    p: float | None  # two-sided; None below TEST_CLUSTERS and when identical
    n: int  # paired units
    clusters: int
    identical: bool  # every single difference is zero

    @property
    def percent(self) -> Interval:
        """The same as a change of perplexity in percent."""
        ends = (None if end is None else percent(end) for end in (self.low, self.high))
        return Interval(percent(self.delta), *ends)


def clustered_mean(total: ArrayLike, count: ArrayLike, cluster: ArrayLike) -> Mean:
    """sum(total) / sum(count) with clusters as the unit of its error.

    total, count, cluster [piece]: pieces of one cluster need not stand together; cluster ids may be numbers or text.
    """
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    totals = np.bincount(index, np.asarray(total, np.float64))  # [cluster]
    counts = np.bincount(index, np.asarray(count, np.float64))  # [cluster]
    assert counts.sum() > 0, "nothing was counted"
    mean, clusters = totals.sum() / counts.sum(), len(counts)
    if clusters == 1:
        return Mean(float(mean), math.nan, 1)
    residual = totals - mean * counts
    error = np.sqrt(clusters / (clusters - 1) * (residual @ residual)) / counts.sum()
    return Mean(float(mean), float(error), clusters)


def percent(log_ratio: float) -> float:
    """A logarithm of a ratio as a change in percent: 0.01 is +1.005 %."""
    with np.errstate(over="ignore"):
        return float(100 * np.expm1(log_ratio))


def paired_difference(first: ArrayLike, second: ArrayLike, tokens: ArrayLike, cluster: ArrayLike) -> Difference:
    """How much larger the mean loss per token of `first` is than that of `second` on the same pieces.

    first, second [piece] are loss sums in nats, tokens [piece] the predicted tokens behind them. Raises NonFinite when
    a loss is not finite: a mean that leaves such pieces out, or takes them in, says nothing.
    """
    with np.errstate(invalid="ignore"):  # inf - inf is caught below
        difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    broken = int(np.count_nonzero(~np.isfinite(difference)))
    if broken:
        raise NonFinite(f"the loss of {broken} of {difference.size} pieces is not finite")
    mean = clustered_mean(difference, tokens, cluster)
    identical = not difference.any()
    _, low, high = mean.interval()
    return Difference(
        delta=mean.value,
        standard_error=None if identical else mean.standard_error,
        df=mean.df,
        low=None if identical else low,
        high=None if identical else high,
        p=None if identical or mean.clusters < TEST_CLUSTERS else _two_sided(mean),
        n=difference.size,
        clusters=mean.clusters,
        identical=identical,
    )


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Share of successes among n >= 1 independent items with its Wilson interval."""
    ends = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(ends.low), float(ends.high))


def mid_p(lost: int, gained: int) -> float:
    """McNemar's two-sided mid-p: did accuracy change, given the items that changed? 1 when none did."""
    changed, fewer = lost + gained, min(lost, gained)
    if changed == 0:
        return 1.0
    twice = 2 * stats.binom.cdf(fewer, changed, 0.5) - stats.binom.pmf(fewer, changed, 0.5)
    return min(1.0, float(twice))


def accuracy_change(lost: int, gained: int, n: int, level: float = LEVEL) -> Interval:
    """Change of accuracy on the same n items (gained - lost) / n with its Bonett-Price interval."""
    z = float(special.ndtri((1 + level) / 2))
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = z * math.sqrt((down + up - (up - down) ** 2) / (n + 2))
    return Interval((gained - lost) / n, up - down - half, up - down + half)


def clustered_quantile(x: ArrayLike, cluster: ArrayLike, q: float, level: float = LEVEL) -> Interval:
    """Quantile of x [value] with Woodruff's interval: the error of the share below it, turned back into quantiles.

    No ends below QUANTILE_CLUSTERS clusters or QUANTILE_BEYOND values beyond the quantile.
    """
    values = np.asarray(x, np.float64)
    value = float(np.quantile(values, q))
    below = (values <= value).astype(np.float64)
    share = clustered_mean(below, np.ones_like(below), cluster)
    if share.clusters < QUANTILE_CLUSTERS or values.size * min(q, 1 - q) < QUANTILE_BEYOND:
        return Interval(value, None, None)
    half = float(special.stdtrit(share.df, (1 + level) / 2)) * share.error
    low, high = np.quantile(values, [max(0.0, q - half), min(1.0, q + half)])
    return Interval(value, float(low), float(high))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p values of a family, in the given order."""
    raw = np.asarray(p, np.float64)
    order = np.argsort(raw, kind="stable")
    adjusted = np.empty_like(raw)
    factors = np.arange(raw.size, 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(raw[order] * factors))
    return adjusted


def _two_sided(mean: Mean) -> float:
    if mean.error == 0:
        return 0.0  # every cluster moved by exactly the same amount
    return float(2 * special.stdtr(mean.df, -abs(mean.value) / mean.error))


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
