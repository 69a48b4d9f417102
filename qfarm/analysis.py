"""Analysis: how far one tensor is from another, and the shape of its distribution.

    SQNR      10 log10(sum r^2 / sum (r - t)^2) in dB, of a reference r and what is tested t; infinite when all numbers
              are equal, which is asked of the squares: differences that cancel are differences
    MSE       mean (r - t)^2
    moments   mean, standard deviation, smallest, largest and excess kurtosis, mean (x - m)^4 / mean((x - m)^2)^2 - 3,
              all of the population

Numbers are taken in float32 and added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DISTANCES = ("sqnr", "mse")
MOMENTS = ("mean", "std", "min", "max", "kurtosis")


def distance(reference: Tensor, tested: Tensor) -> dict[str, float]:
    """SQNR in dB and MSE of two tensors of one shape."""
    values = reference.float()
    error = values - tested.float()
    signal, noise = float(_total(values.square())), float(_total(error.square_()))
    return {"sqnr": _decibels(signal, noise), "mse": noise / values.numel()}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def moments(x: Tensor) -> dict[str, float]:
    """Of all numbers of a tensor; the kurtosis of a constant is NaN, for it has none."""
    values = x.float()
    mean = _total(values) / values.numel()
    squares = (values.double() - mean).float().square_()
    variance = _total(squares) / values.numel()
    fourth = _total(squares.square_()) / values.numel()
    found = {"mean": mean, "std": variance.sqrt(), "min": values.amin(), "max": values.amax()}
    kurtosis = float(fourth / variance.square()) - 3 if variance > 0 else math.nan
    return {name: float(value) for name, value in found.items()} | {"kurtosis": kurtosis}


def _total(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


def over_windows(statistic: str, values: Iterable[float]) -> float:
    """One figure of a statistic's values in several windows: the extreme of extremes, the mean of everything else.

    Infinite SQNR stays out of a mean of others: one exact window says little about the rest.
    """
    found = list(values)
    if statistic == "sqnr":
        return mean_decibels(found)
    join: Callable[[list[float]], float] = {"min": min, "max": max}.get(statistic, _mean)
    return join(found)


def mean_decibels(values: Iterable[float]) -> float:
    """Mean of SQNR over those that are finite; where all are infinite, that."""
    found = list(values)
    return _mean([value for value in found if math.isfinite(value)] or found)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
