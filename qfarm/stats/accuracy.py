"""Accuracy: right or wrong, item by item, for one cell and for two cells on the same items."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from qfarm.stats.means import (
    INTERVAL_CLUSTERS,
    LEVEL,
    TEST_CLUSTERS,
    Floats,
    Interval,
    Mean,
    Weights,
    clustered_mean,
    stratified_mean,
)
from qfarm.stats.paired import Difference, two_sided

TEST_ITEMS = 100
TEST_CHANGED = 10  # items; with fewer than 5 no mid-p is below 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyDifference(Difference):
    """A paired change of accuracy, first minus second; `delta` is a fraction of items."""

    WORSE: ClassVar[int] = -1
    lost: int  # items right in the second only
    gained: int  # items right in the first only
    flips: Interval  # share of items that went either way: Wilson, or t where items share clusters
    test: str  # what p is of
    exact_p: float | None  # McNemar's exact p; None where items are clustered or weighted
    centre: float  # of the interval, which is not quite delta under Bonett-Price
    centre_error: float
    # [item]: 1 gained, -1 lost, 0 as before; of cells compared with one baseline the items stand in one order.
    changes: NDArray[np.int8] = dataclasses.field(repr=False, compare=False)

    @property
    def shown(self) -> Interval:
        """In points."""
        return Interval(100 * self.delta, *(None if end is None else 100 * end for end in (self.low, self.high)))

    @property
    def unit(self) -> str:
        return "points"

    def show(self, amount: float) -> float:
        return 100 * amount

    @property
    def _tested(self) -> tuple[float, float] | None:
        return None if self.p is None else (-self.centre, self.centre_error)


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


def exact_p(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p, which is conservative; 1 when no item changed."""
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def share(right: ArrayLike, cluster: ArrayLike) -> tuple[Mean, Interval]:
    """Share of items [item] that are 1 and not 0, with its error over clusters [item] and its interval.

    Wilson's interval for independent items, Student's t over clusters otherwise. Where all items are 0, or all 1, a t
    interval would claim certainty: each cluster then counts as one item of Wilson's. Where clusters agree on a share
    between, there is no interval.
    """
    values = np.asarray(right, np.float64)
    mean = clustered_mean(values, np.ones_like(values), cluster)
    if mean.clusters < INTERVAL_CLUSTERS:
        return mean, mean.interval()
    if mean.clusters == values.size:
        return mean, wilson(round(values.sum()), values.size)
    if mean.error > 0:
        return mean, mean.interval()
    if mean.value not in (0.0, 1.0):
        return mean, Interval(mean.value, None, None)
    return mean, wilson(round(mean.value) * mean.clusters, mean.clusters)


def accuracy_change(lost: int, gained: int, n: int, level: float = LEVEL) -> Interval:
    """Change of accuracy on the same n items (gained - lost) / n with its Bonett-Price interval."""
    z = float(special.ndtri((1 + level) / 2))
    centre, error = _bonett_price(lost, gained, n)
    return Interval((gained - lost) / n, centre - z * error, centre + z * error)


def accuracy_difference(
    first: ArrayLike,
    second: ArrayLike,
    cluster: ArrayLike,
    task: ArrayLike | None = None,
    weights: Weights = "plain",
) -> AccuracyDifference:
    """How much more accurate `first` is than `second` on the same items.

    first, second [item] are 1 where right and 0 where wrong, cluster [item] names what is not independent (a passage,
    twins), task [item] the tasks to average over. Independent items of one task: McNemar's mid-p with the Bonett-Price
    interval, and the test decides where the two disagree. Items that share a cluster: Student's t over clusters.
    Several tasks: stratified, with the weights of the point estimate. No p below TEST_ITEMS, TEST_CHANGED or
    TEST_CLUSTERS.
    """
    right, before = np.asarray(first, np.float64), np.asarray(second, np.float64)
    d = right - before
    lost, gained = int(np.count_nonzero(d < 0)), int(np.count_nonzero(d > 0))
    several = task is not None and len(np.unique(np.asarray(task))) > 1
    ones = np.ones_like(d)
    mean = stratified_mean(d, ones, cluster, task, weights) if several and task is not None else None
    mean = mean or clustered_mean(d, ones, cluster)
    independent = not several and mean.clusters == d.size
    enough = d.size >= TEST_ITEMS and lost + gained >= TEST_CHANGED and mean.clusters >= TEST_CLUSTERS
    testable = enough and mean.standard_error is not None
    interval = accuracy_change(lost, gained, d.size) if independent else mean.interval()
    shown = lost + gained > 0 and mean.standard_error is not None
    centre, error = _bonett_price(lost, gained, d.size) if independent else (mean.value, mean.error)
    return AccuracyDifference(
        delta=mean.value,
        standard_error=mean.standard_error if shown else None,
        df=math.inf if independent else mean.df,
        low=interval.low if shown else None,
        high=interval.high if shown else None,
        p=_p_value(mean, lost, gained, independent) if testable else None,
        n=d.size,
        clusters=mean.clusters,
        identical=lost + gained == 0,
        influence=mean.influence,
        lost=lost,
        gained=gained,
        flips=share(d != 0, cluster)[1],
        test="McNemar mid-p" if independent else "t over tasks" if several else "t over clusters",
        exact_p=exact_p(lost, gained) if independent and testable else None,
        centre=centre,
        centre_error=error,
        changes=d.astype(np.int8),
    )


def less_accurate_p(changes: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """p [i, j], one-sided mid-p: cell i is right on fewer items than cell j; and which pairs [i, j] may be tested.

    changes [cell, item] against one baseline as in AccuracyDifference, or their means over seeds, of which the items
    that differ are counted but mid-p means nothing. Pairs below TEST_ITEMS or TEST_CHANGED may not be tested; p is 1.
    """
    each = np.asarray(changes)
    lost = np.array([np.count_nonzero(each > own, axis=1) for own in each])  # [i, j]: items right in j only
    changed = lost + lost.T
    testable = (changed >= TEST_CHANGED) & (each.shape[1] >= TEST_ITEMS)
    p = stats.binom.sf(lost, changed, 0.5) + stats.binom.pmf(lost, changed, 0.5) / 2
    return np.where(testable, p, 1.0), testable


def _p_value(mean: Mean, lost: int, gained: int, independent: bool) -> float | None:
    return mid_p(lost, gained) if independent else two_sided(mean)


def _bonett_price(lost: int, gained: int, n: int) -> tuple[float, float]:
    """Centre and error of gained - lost as a share of n, with 1 added to each count and 2 to n."""
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    return up - down, math.sqrt((down + up - (up - down) ** 2) / (n + 2))
