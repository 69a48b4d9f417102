"""Replicates: calibration samples as a second source of error, crossed with the documents.

Every seed sees the same documents, so seeds and documents are crossed, not nested: y_si = mu + a_s + b_i + e_si.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from qfarm.stats.means import INTERVAL_CLUSTERS, LEVEL, TEST_CLUSTERS, Floats, Interval, t_tail


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedsMean:
    """A mean over seeds and documents, both random."""

    value: float
    error: float  # of other seeds and other documents
    df: float
    spread: float  # standard deviation between the seeds' means
    seeds: int
    clusters: int

    @property
    def p(self) -> float | None:
        """Two-sided, against 0; None below TEST_CLUSTERS clusters."""
        return 2 * t_tail(-abs(self.value), self.error, self.df) if self.clusters >= TEST_CLUSTERS else None

    def interval(self, level: float = LEVEL) -> Interval:
        """No ends below INTERVAL_CLUSTERS clusters."""
        if self.clusters < INTERVAL_CLUSTERS:
            return Interval(self.value, None, None)
        half = float(special.stdtrit(self.df, (1 + level) / 2)) * self.error if self.error else 0.0
        return Interval(self.value, self.value - half, self.value + half)


def seeds_interval(y: ArrayLike) -> SeedsMean:
    """Mean of y [seed, document] with an error for other seeds *and* other documents; at least two of each.

    The variance is that of the seed means plus that of the document means less what both count, and never below
    either; degrees of freedom after Satterthwaite.
    """
    values = np.asarray(y, np.float64)
    seeds, documents = values.shape
    assert seeds > 1 and documents > 1, "one seed or one document has no spread"
    mean = values.mean()
    by_seed = values.mean(1).var(ddof=1) / seeds
    by_document = values.mean(0).var(ddof=1) / documents
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + mean
    both = (rest**2).sum() / ((seeds - 1) * (documents - 1) * seeds * documents)
    variance = max(by_seed + by_document - both, by_seed, by_document)
    pooled = by_seed**2 / (seeds - 1) + by_document**2 / (documents - 1)
    return SeedsMean(
        value=float(mean),
        error=float(np.sqrt(variance)),
        df=float(variance**2 / pooled) if pooled > 0 else float(seeds + documents - 2),
        spread=float(values.mean(1).std(ddof=1)),
        seeds=seeds,
        clusters=documents,
    )


def rows_of_seeds(values: Sequence[float], influences: Sequence[Floats]) -> Floats:
    """y [seed, cluster] for `seeds_interval` from each seed's mean and what its clusters add to it.

    Rows have the seeds' values as their means and the clustered errors as their standard errors, so clusters of
    different sizes keep their weights.
    """
    parts = np.stack([np.asarray(part, np.float64) for part in influences])  # [seed, cluster]
    clusters = parts.shape[1]
    return np.asarray(values, np.float64)[:, None] + math.sqrt(clusters * (clusters - 1)) * parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedVariance:
    """How much the mean of a cell moves with its calibration sample, pooled over alike cells."""

    variance: float
    df: int
    cells: int

    @property
    def sigma(self) -> float:
        return math.sqrt(self.variance)


def pooled_seed_variance(groups: Iterable[ArrayLike]) -> SeedVariance | None:
    """Variance between seeds, pooled over cells with their degrees of freedom as weights; None without two seeds.

    Each group holds one value per seed of a cell. With 3 seeds a standard deviation is known to a factor 0.5 to 6.3,
    over 8 such cells to 0.75 to 1.5.
    """
    values = [np.asarray(group, np.float64) for group in groups]
    values = [group for group in values if group.size > 1]
    df = sum(group.size - 1 for group in values)
    if df == 0:
        return None
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in values)
    return SeedVariance(variance=squares / df, df=df, cells=len(values))


def with_seed_noise(value: float, error: float, df: float, noise: SeedVariance, level: float = LEVEL) -> Interval:
    """Interval of a one-seed value when the noise of its calibration sample is known from other cells."""
    variance = error**2 + noise.variance
    pooled = error**4 / df + noise.variance**2 / noise.df
    half = float(special.stdtrit(variance**2 / pooled, (1 + level) / 2)) * math.sqrt(variance) if pooled else 0.0
    return Interval(value, value - half, value + half)
