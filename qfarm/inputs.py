"""Inputs: what calibration learns of the inputs of a linear layer."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qfarm.errors import NonFinite

SAMPLE_TOKENS = 512  # ordinary tokens kept per layer
NORM_LIMIT = 4.0  # a token is ordinary up to 4x the median norm (an unpublished value)
# Symmetric products are taken panel by panel, below the diagonal only: 5/8 of the arithmetic with 4 panels, 9/16 with
# 8. Narrower panels than these lose it again (two cores, n = 576 and 1536: docs/benchmarks.md).
PANELS, PANEL_WIDTH = 8, 192


class Statistic(enum.StrEnum):
    HESSIAN = "hessian"
    NORMALISED_HESSIAN = "normalised_hessian"  # tokens scaled down to NORM_LIMIT x the median norm of their batch
    SAMPLE = "sample"  # inputs of ordinary tokens
    MEAN_ABS = "mean_abs"
    MAX_ABS = "max_abs"
    RANGE = "range"  # smallest and largest value of each feature
    WINDOW_RANGES = "window_ranges"  # the same of each window of calibration text
    HISTOGRAM = "histogram"  # how often each value occurs, rounded to bfloat16
    SENSITIVITY = "sensitivity"  # every number with its squared gradient; of keys and values only (layers/gradients)

    @property
    def fields(self) -> tuple[str, ...]:
        """Where `InputStatistics` has it."""
        apart = {
            Statistic.RANGE: ("low", "high"),
            Statistic.WINDOW_RANGES: ("lows", "highs"),
            Statistic.SENSITIVITY: ("values", "sensitivity"),
        }
        return apart.get(self, (self.value,))


NORMED = frozenset({Statistic.NORMALISED_HESSIAN, Statistic.SAMPLE})  # what asks for the norms of tokens


@dataclasses.dataclass
class InputStatistics:
    """What is known of the inputs of one linear layer, [n] features wide."""

    tokens: int = 0
    hessian: Tensor | None = None  # float32 [n, n]: mean of x x^T over tokens
    normalised_hessian: Tensor | None = None
    sample: Tensor | None = None  # float32 [k, n]
    mean_abs: Tensor | None = None  # float32 [n]: mean of |x| over tokens
    max_abs: Tensor | None = None  # float32 [n]: largest |x|
    low: Tensor | None = None  # float32 [n]: smallest x
    high: Tensor | None = None  # float32 [n]: largest x
    lows: Tensor | None = None  # float32 [windows, n]: smallest x of each window, in the order of the text
    highs: Tensor | None = None  # float32 [windows, n]: largest x of each window
    histogram: Tensor | None = None  # int64 [65536]: how many x there are of each bfloat16 pattern, see `patterns`
    values: Tensor | None = None  # [windows, length, n], in the model's dtype, in host memory: every x
    sensitivity: Tensor | None = None  # bfloat16, alike: the squared gradient of its window's loss
    divided: Tensor | None = None  # [n]: factors by which a transform has divided these features
    decided: str = ""  # what a transform decided for these features
    heads: int | None = None  # at sites in attention: how many heads the features are of, side by side
    bits: int = 16  # to which these inputs will be quantized; 16: not
    foldable: bool = False  # a factor per input column can be absorbed by the operator before this layer
    roles: tuple[tuple[str, int], ...] = ()  # the layers stacked into one weight, in order: role, rows

    def ordinary_errors(self, weight: Tensor) -> Callable[[Tensor], float]:
        """Quantized weight -> ||(W - Q) X||^2 / ||W X||^2 on the sample of ordinary tokens, for weight [rows, n].

        For comparing several Q with one W, whose own product is taken once.
        """
        assert self.sample is not None
        weight, columns = weight.float(), self.sample.T
        norm = _squares(weight @ columns)

        def error(quantized: Tensor) -> float:
            total = _squares((weight - quantized) @ columns)
            return total / norm if norm else total

        return error

    def ordinary_error(self, weight: Tensor, quantized: Tensor) -> float:
        """||(W - Q) X||^2 / ||W X||^2 on the sample of ordinary tokens."""
        return self.ordinary_errors(weight)(quantized)

    def output_error(self, weight: Tensor, quantized: Tensor) -> float | None:
        """The same on all calibration tokens, from the Hessian; None without one."""
        if self.hessian is None:
            return None
        norm = _energy(weight.float(), self.hessian)
        error = _energy(weight.float() - quantized, self.hessian)
        return error / norm if norm > 0 else error


def _squares(values: Tensor) -> float:
    return float(values.square_().sum())


def _energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T) for symmetric H, of which only the blocks on and below the diagonal are read."""
    parts = []
    for start, stop in _panels(len(hessian)):
        here = weight[:, start:stop]
        product = here @ hessian[start:stop, start:stop]
        product.addmm_(weight[:, stop:], hessian[stop:, start:stop], alpha=2)
        parts.append(product.mul_(here).sum())
    return float(torch.stack(parts).double().sum())


def _panels(n: int) -> list[tuple[int, int]]:
    width = max(PANEL_WIDTH, -(-n // PANELS))
    return [(start, min(start + width, n)) for start in range(0, n, width)]


class Collector:
    """Accumulates statistics of one input over batches. Sums are plain, so shards could be added up."""

    def __init__(self, wanted: frozenset[Statistic], tokens: int, length: int | None = None) -> None:
        """Of `tokens` tokens in windows of `length`, by default all in one."""
        self.wanted = wanted
        self.stats = InputStatistics()
        self._share = SAMPLE_TOKENS / max(tokens, 1)
        self._length = length or tokens
        self._samples: list[Tensor] = []
        self._extremes: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Tensor) -> None:
        """inputs [..., n] in the model's dtype; whole windows where their ranges are wanted."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.stats.tokens += len(x)
        if Statistic.HESSIAN in self.wanted:
            with exact_products(inputs.device.type, inputs.dtype):
                self.stats.hessian = _add_product(self.stats.hessian, x)
        if self.wanted & NORMED:
            norms = x.norm(dim=1)
            limit = NORM_LIMIT * norms.median()
        if Statistic.NORMALISED_HESSIAN in self.wanted:
            shrunk = x * (limit / norms.clamp(min=1e-30)).clamp(max=1)[:, None]
            self.stats.normalised_hessian = _add_product(self.stats.normalised_hessian, shrunk)
        if Statistic.MEAN_ABS in self.wanted:
            total = x.abs().sum(0)
            self.stats.mean_abs = total if self.stats.mean_abs is None else self.stats.mean_abs + total
        if Statistic.MAX_ABS in self.wanted:
            top = x.abs().amax(0)
            self.stats.max_abs = top if self.stats.max_abs is None else torch.maximum(self.stats.max_abs, top)
        if Statistic.RANGE in self.wanted:
            low, high = x.amin(0), x.amax(0)
            self.stats.low = low if self.stats.low is None else torch.minimum(self.stats.low, low)
            self.stats.high = high if self.stats.high is None else torch.maximum(self.stats.high, high)
        if Statistic.WINDOW_RANGES in self.wanted:
            windows = x.reshape(-1, min(self._length, len(x)), x.shape[1])  # some families drop the batch's dimension
            self._extremes.append((windows.amin(1), windows.amax(1)))
        if Statistic.HISTOGRAM in self.wanted:
            counts = torch.bincount(x.bfloat16().view(torch.int16).flatten().long() + 2**15, minlength=2**16)
            self.stats.histogram = counts if self.stats.histogram is None else self.stats.histogram + counts
        if Statistic.SAMPLE in self.wanted:
            ordinary = torch.nonzero(norms <= limit)[:, 0]
            count = max(1, round(self._share * len(x)))
            step = max(1, len(ordinary) // count)
            self._samples.append(x[ordinary[::step][:count]])

    def result(self) -> InputStatistics:
        if not self.stats.tokens:
            raise NonFinite("a linear layer saw no calibration token")
        for name in ("hessian", "normalised_hessian", "mean_abs"):
            total = getattr(self.stats, name)
            if total is not None:
                whole = _mirrored(total) if total.dim() == 2 else total
                setattr(self.stats, name, whole / self.stats.tokens)
        self.stats.sample = torch.cat(self._samples) if self._samples else None
        if self._extremes:
            self.stats.lows, self.stats.highs = (torch.cat(ends) for ends in zip(*self._extremes, strict=True))
        return self.stats


def patterns(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """The values that occur in a histogram, float32 [k], and how often each does, int64 [k]."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=histogram.device).view(torch.bfloat16).float()
    occurs = histogram > 0
    return values[occurs], histogram[occurs]


@contextlib.contextmanager
def exact_products(device: str, dtype: torch.dtype) -> Iterator[None]:
    """float32 products on the matrix units for narrower types, where that loses nothing.

    Numbers that come from bfloat16 go through a bfloat16 unit (CPU) or a TF32 unit (CUDA; 11 significant bits, so that
    float16 fits as well) unrounded, products of two are exact in float32, and sums are taken in float32 all the same.
    Elsewhere, and where this torch has no such setting, nothing changes. Never run on a GPU so far.
    """
    chosen = {"cpu": "bf16", "cuda": "tf32"}.get(device)
    fits = dtype is torch.bfloat16 or (device == "cuda" and dtype is torch.float16)
    backends: dict[str, Any] = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    setting = getattr(backends[device], "matmul", None) if chosen and fits else None
    if not hasattr(setting, "fp32_precision"):
        yield
        return
    assert setting is not None
    before = setting.fp32_precision
    setting.fp32_precision = chosen
    try:
        yield
    finally:
        setting.fp32_precision = before


def _add_product(total: Tensor | None, x: Tensor) -> Tensor:
    """Add x^T x to total [n, n], on and below the diagonal only; x [tokens, n]."""
    n = x.shape[1]
    if total is None:
        total = torch.zeros(n, n, dtype=x.dtype, device=x.device)
    for start, stop in _panels(n):
        total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
    return total


def _mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).T
