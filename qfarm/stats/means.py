"""Means with clusters as the unit of their error: ratios of sums, means over tasks, quantiles."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

LEVEL = 0.95
# Below these an answer would look more certain than it is, so none is given.
INTERVAL_CLUSTERS = 10
TEST_CLUSTERS = 20
QUANTILE_CLUSTERS = 20
QUANTILE_BEYOND = 50  # values beyond the quantile

Weights = Literal["plain", "size"]  # every task counts the same, or every item does
Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A value and the ends of its interval, None where too little was seen to give one."""

    value: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Mean:
    """A ratio of sums, or a weighted sum of such ratios, and its error with clusters as the unit."""

    value: float
    error: float  # as computed, from however few clusters; NaN for a single one
    clusters: int
    degrees: float | None = None  # of freedom, where it is not clusters - 1
    # What each cluster (in sorted order) adds: the error is its norm, and that of a difference the norm of the
    # difference, so any two means over the same clusters can be compared without their data.
    influence: Floats | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def df(self) -> float:
        return self.clusters - 1 if self.degrees is None else self.degrees

    @property
    def standard_error(self) -> float | None:
        """The error if it may be shown: None below INTERVAL_CLUSTERS, or when a task of the mean has one cluster."""
        return self.error if self.clusters >= INTERVAL_CLUSTERS and math.isfinite(self.error) else None

    @property
    def low(self) -> float | None:
        return self.interval().low

    @property
    def high(self) -> float | None:
        return self.interval().high

    def interval(self, level: float = LEVEL) -> Interval:
        """Student's t interval; no ends where there is no standard error to show."""
        if self.standard_error is None:
            return Interval(self.value, None, None)
        half = float(special.stdtrit(self.df, (1 + level) / 2)) * self.error
        return Interval(self.value, self.value - half, self.value + half)

    def exponentiated(self, level: float = LEVEL) -> Interval:
        """Of a mean of logarithms: a perplexity from losses, a ratio from differences.

        The interval is made on the log scale because the raw one misses unevenly.
        """
        value, low, high = self.interval(level)
        return Interval(_exp(value), None if low is None else _exp(low), None if high is None else _exp(high))


def clustered_mean(total: ArrayLike, count: ArrayLike, cluster: ArrayLike) -> Mean:
    """sum(total) / sum(count) with clusters as the unit of its error (linearised ratio).

    total, count, cluster [piece]: pieces of one cluster need not stand together; cluster ids may be numbers or text.
    """
    names, index = np.unique(np.asarray(cluster), return_inverse=True)
    totals = np.bincount(index, np.asarray(total, np.float64))  # [cluster]
    counts = np.bincount(index, np.asarray(count, np.float64))  # [cluster]
    assert counts.sum() > 0, "nothing was counted"
    mean, clusters = totals.sum() / counts.sum(), len(names)
    if clusters == 1:
        return Mean(float(mean), math.nan, 1)
    influence = math.sqrt(clusters / (clusters - 1)) * (totals - mean * counts) / counts.sum()
    return Mean(float(mean), float(np.linalg.norm(influence)), clusters, influence=influence)


def stratified_mean(
    total: ArrayLike, count: ArrayLike, cluster: ArrayLike, stratum: ArrayLike, weights: Weights = "plain"
) -> Mean:
    """Mean over strata (tasks) that are fixed: no statement about other tasks follows.

    total, count, cluster, stratum [piece]. The variance is the sum of the strata's, with the squared weights of the
    point estimate: 1 / strata each (`plain`), or by count (`size`). Degrees of freedom after Satterthwaite.
    """
    totals, counts = np.asarray(total, np.float64), np.asarray(count, np.float64)
    names, index = np.unique(np.asarray(cluster), return_inverse=True)
    strata, of_piece = np.unique(np.asarray(stratum), return_inverse=True)
    value, influence, degrees = 0.0, np.zeros(len(names)), 0.0
    for number in range(len(strata)):
        here = of_piece == number
        weight = 1 / len(strata) if weights == "plain" else counts[here].sum() / counts.sum()
        mean = clustered_mean(totals[here], counts[here], index[here])
        value += weight * mean.value
        if mean.influence is None:
            influence[:] = math.nan
            continue
        influence[np.unique(index[here])] += weight * mean.influence
        degrees += (weight * mean.error) ** 4 / mean.df
    error = float(np.linalg.norm(influence))
    satterthwaite = error**4 / degrees if degrees > 0 else float(len(names) - len(strata))
    return Mean(float(value), error, len(names), satterthwaite, influence)


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


def percent(log_ratio: float) -> float:
    """A logarithm of a ratio as a change in percent: 0.01 is +1.005 %."""
    with np.errstate(over="ignore"):
        return float(100 * np.expm1(log_ratio))


def t_tail(value: float, error: float, df: float) -> float:
    """P(T <= value / error) of Student's t; without error it is certain, or even where the value is 0 too."""
    if error == 0:
        return 0.5 if value == 0 else float(value > 0)
    tail: Any = special.stdtr(df, value / error)
    return float(tail)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
