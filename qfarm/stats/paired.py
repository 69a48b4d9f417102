"""Paired differences of two cells on the same documents: how large, how certain, within a margin or not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from qfarm.errors import NonFinite
from qfarm.stats.means import TEST_CLUSTERS, Floats, Interval, Mean, clustered_mean, percent, t_tail

ALPHA = 0.05
SKEW = 2.0  # from here on, an interval of few clusters is too narrow
SKEW_CLUSTERS = 50
DETECTABLE = 2.8  # standard errors: found in 80 % of all runs at 5 %, two-sided

Verdict = Literal["worse", "better", "within margin", "undecided", "identical"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference, first minus second, of mean loss: ln(PPL_first / PPL_second)."""

    WORSE: ClassVar[int] = 1  # the sign of a delta that is a loss of quality
    delta: float  # nats per token
    standard_error: float | None  # None below INTERVAL_CLUSTERS and when identical
    df: float
    low: float | None  # ends of the 95 % interval of delta
    high: float | None
    p: float | None  # two-sided; None below TEST_CLUSTERS and when identical
    n: int  # paired units
    clusters: int
    identical: bool  # every single difference is zero
    influence: Floats | None = dataclasses.field(default=None, repr=False, compare=False)  # as Mean.influence

    @property
    def percent(self) -> Interval:
        """The same as a change of perplexity in percent."""
        ends = (None if end is None else percent(end) for end in (self.low, self.high))
        return Interval(percent(self.delta), *ends)

    @property
    def shown(self) -> Interval:
        """As a reader sees it, in `unit`."""
        return self.percent

    @property
    def unit(self) -> str:
        return "percent"

    @property
    def harm(self) -> float:
        """The same difference with worse as positive."""
        return self.WORSE * self.delta

    @property
    def detectable(self) -> float | None:
        """Smallest difference, in the scale of delta, that this many documents would show in 80 % of all cases."""
        return None if self.standard_error is None else DETECTABLE * self.standard_error

    def show(self, amount: float) -> float:
        """An amount in the scale of delta as a reader sees it: in percent of the perplexity."""
        return percent(amount)

    def non_inferior_p(self, margin: float) -> float | None:
        """One-sided p against 'worse by `margin` or more'; None where there is no test."""
        tested = self._tested
        return None if tested is None else t_tail(tested[0] - margin, tested[1], self.df)

    def equivalence_p(self, margin: float) -> float | None:
        """The larger of the two one-sided p values against 'worse' and 'better by `margin` or more' (TOST)."""
        tested = self._tested
        if tested is None:
            return None
        return max(t_tail(tested[0] - margin, tested[1], self.df), t_tail(-tested[0] - margin, tested[1], self.df))

    @property
    def _tested(self) -> tuple[float, float] | None:
        """Harm and its error, for tests against a margin."""
        if self.p is None or self.standard_error is None:
            return None
        return self.harm, self.standard_error


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
        p=None if identical or mean.clusters < TEST_CLUSTERS else two_sided(mean),
        n=difference.size,
        clusters=mean.clusters,
        identical=identical,
        influence=mean.influence,
    )


def count_skewed(differences: Iterable[Difference]) -> int:
    """Those with too few clusters for how unevenly these are spread: their t intervals cover 90 instead of 95 %."""
    alike: dict[int, list[Floats]] = {}  # one call for all of a length: a call costs SciPy a millisecond
    for difference in differences:
        parts = difference.influence
        if parts is not None and difference.low is not None and difference.clusters < SKEW_CLUSTERS and parts.any():
            alike.setdefault(parts.size, []).append(parts)
    return sum(int(np.count_nonzero(np.abs(stats.skew(parts, axis=1)) > SKEW)) for parts in alike.values())


def two_sided(mean: Mean) -> float | None:
    """Two-sided p against 0; None where the mean has no error."""
    return 2 * t_tail(-abs(mean.value), mean.error, mean.df) if math.isfinite(mean.error) else None


def verdict(difference: Difference, p: float | None, margin_p: float | None) -> Verdict | None:
    """One of the four answers, or 'identical'; None where there was too little for a test.

    `p` and `margin_p` are those of the test against zero and of equivalence, adjusted where there is a family. A
    direction comes first: a cell may be worse and still within the margin.
    """
    if difference.identical:
        return "identical"
    if p is None:
        return None
    if p < ALPHA:
        return "worse" if difference.harm > 0 else "better"
    return "within margin" if margin_p is not None and margin_p < ALPHA else "undecided"
