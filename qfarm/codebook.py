"""Codebooks: a few levels for many numbers, by k-means with weights, or fixed ones. Pure mathematics in one dimension.

K-means in one dimension is solved by dynamic programming on at most 512 bins, which gives the best levels for those,
and refined by Lloyd's iteration on 65,536 finer ones, whose means are exact; segments' are differences of prefix sums.
So the result needs no random start. Where there are no more numbers than bins, every number is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

FINE, COARSE, ITERATIONS = 1 << 16, 512, 50
TINY = torch.finfo(torch.float64).tiny
# Probability at the outermost levels of normal-float codebooks (arXiv 2305.14314, and the code of KVQuant).
EDGE = 0.5 * (1 / 32 + 1 / 30)


def kmeans_levels(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """The `count` levels with about the least weighted squared error, float32, ascending; values, weights [n].

    Fewer distinct values than levels: the largest is repeated; no values: zeros. Weights are relative; all zero:
    all alike.
    """
    values, weights = values.flatten().double(), weights.flatten().double()
    if not len(values):
        return torch.zeros(count)
    mean = weights.mean()
    weights = weights / mean + 1e-12 if mean > 0 else torch.ones_like(weights)
    fine = _bins(values, weights, FINE)
    levels = _best_levels(*_merged(fine, COARSE), count)
    points, below = fine[1] / fine[0], [_prefix(total) for total in fine[:2]]
    for _ in range(ITERATIONS):
        ends = torch.searchsorted(points, midpoints(levels), right=True)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(points))])
        mass, moment = (total[edges[1:]] - total[edges[:-1]] for total in below)
        moved = torch.where(mass > 0, moment / mass, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.float()


Bins = tuple[Tensor, Tensor, Tensor]  # weight, its products with the values and with their squares, of each bin


def _bins(values: Tensor, weights: Tensor, most: int) -> Bins:
    """Bins of equal width in ascending order, none empty; single values where those are few."""
    points, index = torch.unique(values, return_inverse=True) if len(values) <= most else (values[:0], None)
    if index is None:
        low, high = values.aminmax()
        index, count = ((values - low) * (most / (high - low).clamp(min=TINY))).long().clamp_(max=most - 1), most
    else:
        count = len(points)
    totals = [torch.bincount(index, w, count) for w in (weights, weights * values, weights * values.square())]
    seen = totals[0] > 0
    return totals[0][seen], totals[1][seen], totals[2][seen]


def _merged(bins: Bins, most: int) -> Bins:
    """The same in fewer bins."""
    mass, moment, square = bins
    if len(mass) <= most:
        return bins
    points = moment / mass
    low, high = points[0], points[-1]
    index = ((points - low) * (most / (high - low).clamp(min=TINY))).long().clamp_(max=most - 1)
    mass, moment, square = (torch.bincount(index, total, most) for total in bins)
    seen = mass > 0
    return mass[seen], moment[seen], square[seen]


def _best_levels(mass: Tensor, moment: Tensor, square: Tensor, count: int) -> Tensor:
    """The best levels for bins that are not torn apart, by dynamic programming."""
    n = len(mass)
    if n <= count:
        means = moment / mass
        return torch.cat([means, means[-1:].expand(count - n)])
    prefix = [_prefix(total) for total in (mass, moment, square)]
    # cost[i, j]: error of bins i .. j - 1 about their mean
    inside, first, second = (total[None, :] - total[:, None] for total in prefix)
    cost = torch.where(inside > 0, second - first.square() / inside, torch.inf).clamp_(min=0)
    best, cuts = cost[0], []
    for _ in range(count - 1):
        best, cut = (best[:, None] + cost).min(dim=0)
        cuts.append(cut)
    edges = [n]
    for cut in reversed(cuts):
        edges.append(int(cut[edges[-1]]))
    ends = torch.tensor([0, *reversed(edges)], device=mass.device)
    mass, moment = (total[ends[1:]] - total[ends[:-1]] for total in prefix[:2])
    return moment / mass


def _prefix(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def midpoints(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of ascending levels, the lower one on ties; int32, any shape."""
    return torch.bucketize(values, midpoints(levels), out_int32=True)


def normal_levels(bits: int) -> Tensor:
    """Normal-float levels: quantiles of a standard normal in two halves, each scaled to 1, with an exact zero."""
    half = 1 << (bits - 1)
    negative = torch.special.ndtri(torch.linspace(EDGE, 0.5, half, dtype=torch.float64))
    positive = torch.special.ndtri(torch.linspace(0.5, 1 - EDGE, half + 1, dtype=torch.float64))
    return torch.cat([negative / negative[0].abs(), (positive / positive[-1])[1:]]).float()


def percentiles(values: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """Quantiles `upper` and 1 - upper of rows [..., n], each [..., 1], by linear interpolation.

    `torch.quantile` sorts whole rows, and refuses more than 16 million numbers.
    """
    last = values.shape[-1] - 1
    position = upper * last
    below, share = int(position), position - int(position)
    top = values.topk(last - below + 1, dim=-1).values  # from the largest down to the one at `below`
    high = torch.lerp(top[..., -1:], top[..., -2:-1] if share else top[..., -1:], share)
    position = (1 - upper) * last
    below, share = int(position), position - int(position)
    bottom = values.topk(min(below + 2, last + 1), dim=-1, largest=False).values
    low = torch.lerp(bottom[..., below : below + 1], bottom[..., -1:], share)
    return high, low
