"""Inputs: what calibration learns of the inputs of a linear layer."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from qfarm.errors import NonFinite

SAMPLE_TOKENS = 512  # ordinary tokens kept per layer
NORM_LIMIT = 4.0  # a token is ordinary up to 4x the median norm (an unpublished value)


class Statistic(enum.StrEnum):
    HESSIAN = "hessian"
    NORMALISED_HESSIAN = "normalised_hessian"  # tokens scaled down to NORM_LIMIT x the median norm of their batch
    SAMPLE = "sample"  # inputs of ordinary tokens
    MEAN_ABS = "mean_abs"
    MAX_ABS = "max_abs"


@dataclasses.dataclass
class InputStatistics:
    """What is known of the inputs of one linear layer, [n] features wide."""

    tokens: int = 0
    hessian: Tensor | None = None  # float32 [n, n]: mean of x x^T over tokens
    normalised_hessian: Tensor | None = None
    sample: Tensor | None = None  # float32 [k, n]
    mean_abs: Tensor | None = None  # float32 [n]: mean of |x| over tokens
    max_abs: Tensor | None = None  # float32 [n]: largest |x|
    foldable: bool = False  # a factor per input column can be absorbed by the operator before this layer
    roles: tuple[tuple[str, int], ...] = ()  # the layers stacked into one weight, in order: role, rows

    def ordinary_error(self, weight: Tensor, quantized: Tensor) -> float:
        """||(W - Q) X||^2 / ||W X||^2 on the sample of ordinary tokens."""
        assert self.sample is not None
        return _ratio((weight.float() - quantized) @ self.sample.T, weight.float() @ self.sample.T)

    def output_error(self, weight: Tensor, quantized: Tensor) -> float | None:
        """The same on all calibration tokens, from the Hessian; None without one."""
        if self.hessian is None:
            return None
        delta, weight = weight.float() - quantized, weight.float()
        norm = float(((weight @ self.hessian) * weight).sum())
        error = float(((delta @ self.hessian) * delta).sum())
        return error / norm if norm > 0 else error


def _ratio(error: Tensor, reference: Tensor) -> float:
    norm = float(reference.square().sum())
    total = float(error.square().sum())
    return total / norm if norm else total


class Collector:
    """Accumulates statistics of one input over batches. Sums are plain, so shards could be added up."""

    def __init__(self, wanted: frozenset[Statistic], tokens: int) -> None:
        self.wanted = wanted
        self.stats = InputStatistics()
        self._share = SAMPLE_TOKENS / max(tokens, 1)
        self._samples: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """inputs [..., n] in the model's dtype."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.stats.tokens += len(x)
        norms = x.norm(dim=1)
        limit = NORM_LIMIT * norms.median()
        if Statistic.HESSIAN in self.wanted:
            self.stats.hessian = _add_product(self.stats.hessian, x)
        if Statistic.NORMALISED_HESSIAN in self.wanted:
            shrunk = x * (limit / norms.clamp(min=1e-30)).clamp(max=1)[:, None]
            self.stats.normalised_hessian = _add_product(self.stats.normalised_hessian, shrunk)
        if Statistic.MEAN_ABS in self.wanted:
            total = x.abs().sum(0)
            self.stats.mean_abs = total if self.stats.mean_abs is None else self.stats.mean_abs + total
        if Statistic.MAX_ABS in self.wanted:
            top = x.abs().amax(0)
            self.stats.max_abs = top if self.stats.max_abs is None else torch.maximum(self.stats.max_abs, top)
        if Statistic.SAMPLE in self.wanted:
            ordinary = x[norms <= limit]
            count = max(1, round(self._share * len(x)))
            step = max(1, len(ordinary) // count)
            self._samples.append(ordinary[::step][:count].clone())

    def result(self) -> InputStatistics:
        if not self.stats.tokens:
            raise NonFinite("a linear layer saw no calibration token")
        for name in ("hessian", "normalised_hessian", "mean_abs"):
            total = getattr(self.stats, name)
            if total is not None:
                setattr(self.stats, name, total / self.stats.tokens)
        self.stats.sample = torch.cat(self._samples) if self._samples else None
        return self.stats


def _add_product(total: Tensor | None, x: Tensor) -> Tensor:
    return x.T @ x if total is None else total.addmm_(x.T, x)
