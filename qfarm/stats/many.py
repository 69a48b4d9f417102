"""Many cells at once: families of p values, the cells tied with the best, the Pareto front with uncertainty."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from qfarm.stats.means import Floats
from qfarm.stats.paired import ALPHA

MARK_CLUSTERS = 48  # the tails that multiplicity needs break first: family error of Holm at n = 24 is up to 13 %
FAMILY_ALPHA = 0.05
STRONG_ALPHA = 0.01
_NO_VARIANCE = 1e-30  # of equal cells, whose difference is zero as well


def holm(p: ArrayLike) -> Floats:
    """Holm's adjusted p values of a family, in the given order: for claims."""
    raw = np.asarray(p, np.float64)
    order = np.argsort(raw, kind="stable")
    adjusted = np.empty_like(raw)
    factors = np.arange(raw.size, 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(raw[order] * factors))
    return adjusted


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Benjamini and Hochberg's adjusted p values, in the given order: for lists of what is worth a look."""
    raw = np.asarray(p, np.float64)
    return np.asarray(stats.false_discovery_control(raw), np.float64) if raw.size else raw


def worse_p(
    value: ArrayLike,
    influence: ArrayLike,
    df: ArrayLike,
    extra: ArrayLike | None = None,
    extra_df: ArrayLike = np.inf,
) -> NDArray[np.float64]:
    """p [i, j], one-sided: cell i is worse than cell j.

    value [cell] is each cell's difference to one baseline with worse as positive, influence [cluster, cell] what each
    cluster adds to it (Mean.influence, of one sign for all cells), df the degrees of freedom, a number or [cell] (of a
    pair the smaller counts). extra [cell] is a variance of the cell's own, such as that of its calibration sample,
    known with extra_df; the degrees of freedom then follow Satterthwaite, as if both extras came from one estimate. The
    diagonal is 1.
    """
    values, parts = np.asarray(value, np.float64), np.asarray(influence, np.float64)
    gram = parts.T @ parts
    own = np.diag(gram)
    documents = np.maximum(np.add.outer(own, own) - 2 * gram, _NO_VARIANCE)
    each = np.broadcast_to(np.asarray(0.0 if extra is None else extra, np.float64), values.shape)
    seeds = np.add.outer(each, each)
    variance = documents + seeds
    of_documents, of_seeds = _smaller(df, values.shape), _smaller(extra_df, values.shape)
    with np.errstate(divide="ignore"):  # infinite degrees: the normal distribution
        degrees = variance**2 / (documents**2 / of_documents + seeds**2 / of_seeds)
    t = np.subtract.outer(values, values) / np.sqrt(variance)
    p = np.asarray(special.stdtr(degrees, -t), np.float64)
    np.fill_diagonal(p, 1.0)
    return p


def _smaller(df: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """[i, j]: the smaller degrees of freedom of two cells."""
    each = np.broadcast_to(np.asarray(df, np.float64), shape)
    return np.asarray(np.minimum.outer(each, each), np.float64)


def tied_with_best(p: NDArray[np.float64], alpha: float = ALPHA) -> NDArray[np.bool_]:
    """Cells [cell] not shown worse than any other; holds the true best with probability >= 1 - alpha (Hsu 1984).

    p [cell, cell] as from `worse_p`. The set is no claim that its members are equal.
    """
    if len(p) < 2:
        return np.ones(len(p), bool)
    return np.asarray(p.min(1) > alpha / (len(p) - 1))


def no_more_bits(bits: ArrayLike) -> NDArray[np.bool_]:
    """[i, j]: cell j has no more bits than cell i, in any respect; bits [cell] or [cell, respect], NaN: unknown.

    What is unknown is no more than itself only.
    """
    sizes = np.asarray(bits, np.float64)
    sizes = sizes.reshape(len(sizes), -1)
    return np.asarray((sizes[None, :] <= sizes[:, None]).all(-1) | np.eye(len(sizes), dtype=bool))


def dominated(p: NDArray[np.float64], bits: ArrayLike, alpha: float = ALPHA) -> NDArray[np.bool_]:
    """Cells [cell] that another is shown to beat with no more bits in any respect; p as from `worse_p`.

    bits [cell] or [cell, respect] (weights, activations, KV cache) are exact. Corrected for all pairs that could
    dominate, so that a cell of the true front is dropped with probability <= alpha.
    """
    can = no_more_bits(bits) & ~np.eye(len(p), dtype=bool)
    if not can.any():
        return np.zeros(len(p), bool)
    return np.asarray(((p <= alpha / can.sum()) & can).any(1))
