"""SINQ, Sinkhorn-normalised quantization: a second scale, one per input column, evens out rows and columns.

    M [R, g] tile: all rows of one group   mu1 [g] column factors   mu2 [R, 1] row factors   C = M / mu1 / mu2
    I(M) = largest / smallest standard deviation of all rows and columns: the imbalance

Both factors start at 1 and grow together until every row and column of C has about the standard deviation
t = smallest of the tile (arXiv 2509.22944), 16 times:

    log mu1 += log clamp(std_columns(C) / t, 0.7, 2)      log mu2 += log clamp(std_rows(C) / t, 0.7, 2)

both logarithms clipped to [-0.3, 10]. The factors with the smallest imbalance are kept; the first rise ends the tile.
Then C is rounded to nearest with one min/max grid per row, and with s2 = mu1, s1 = s mu2:

    W ~ s1 (Q - z) s2        y = grouped_product(Q, s1, z, x * s2)

Without activation_aware no calibration is needed. Gains exist only where variances are uneven: none on Gaussian
weights. With activation_aware (A-SINQ) columns are weighted by w = a^r mean|W|^(r-1), a = mean |x|, before
the inner rounding: s2 = mu1 / w. Of 20 exponents r and w = 1 that with the smallest L1 error of the layer's output on
a sample of ordinary tokens is used.

Stored: codes, s1 [rows, groups], s2 [columns], and for asymmetric grids z [rows, groups], all in the scale dtype:
b + 32 / g + 16 / rows bits per weight, 16 / g instead of 32 / g for symmetric ones.

Differences from huawei-csl/SINQ: s1 and s2 are rounded to their storage dtype before the grid is fitted and weights
are rounded, so mu2 matters only through mu1 and the smallest range. mu1 is divided by a power of two near its
geometric mean, which moves into s1: s1 then stays in float16's normal range. Constant rows and columns are left out of
t and of the imbalance, and keep factor 1. z is not clamped, but where it would exceed the integers that the storage
dtype holds exactly, the range is widened to contain zero. Symmetric grids (there: noz) use amax / (2^(b-1) - 1) and
all their codes; the reference reaches only 13 of 16. A group that does not divide the columns is refused rather than
halved. `prescale` is ours: without it a tile of standard deviations below 1e-3 looks flat. For A-SINQ, factors w with
a largest of 1e4 times the smallest and the tokens of the L1 error are ours. Left out: square tiles, NF4 levels, HQQ
zeros, 8-bit scales and zeros (quantAux), and pre-SINQ, whose factors go into norms and neighbouring layers: that is a
transform of the model, where this file rounds one layer at a time.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import ColumnScaled, UniformWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, WeightSolver

DEVIATION = (1e-3, 1e3)  # standard deviations are clamped to this range
STEP = (0.7, 2.0)  # factor of one iteration
LOG_FACTOR = (-0.3, 10.0)
SMALLEST_RANGE, SMALLEST_AMAX = 1e-4, 1e-5  # of a row of C: asymmetric, symmetric
EXPONENTS = 20  # of A-SINQ: i / 20
WEIGHT_RATIO = 1e-4  # smallest factor w over the largest


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SINQ(WeightSolver):
    source = "Mueller et al., arXiv 2509.22944; github.com/huawei-csl/SINQ"
    stackable = False  # column factors depend on all rows, and each layer has its own

    iterations: int = Field(16, ge=0, le=100, description="updates of the factors")
    prescale: bool = Field(False, description="bring each tile to a mean standard deviation of 1 first")
    activation_aware: bool = Field(False, description="A-SINQ: weight columns by their activations; reads text")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if 0 < group_size < 16:
            return f"sinq needs tiles of at least 16 columns, not {group_size}"
        return None

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.MEAN_ABS, Statistic.SAMPLE}) if self.activation_aware else frozenset()

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> ColumnScaled:
        if not bool(torch.isfinite(weight).all()):
            raise NonFinite("the weights hold NaN or Inf")
        rows, columns = weight.shape
        tiles = weight.float().reshape(rows, grid.groups(columns), -1).transpose(0, 1)  # [groups, rows, g]
        unit = mean_deviation(tiles) if self.prescale else torch.ones_like(tiles[:, :1, :1])
        found = normalise(tiles / unit, self.iterations)
        if self.activation_aware:
            assert inputs is not None
            result = activation_aware(weight, tiles, found, unit, inputs, grid)
        else:
            result = assemble(tiles, found.columns, found.rows * unit, grid)
        before, after = float(found.before.mean()), float(found.after.mean())
        result.notes |= {"imbalance_before": before, "imbalance_after": after}
        return result


METHOD = SINQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """Factors of all tiles: C = M / columns / rows."""

    columns: Tensor  # mu1 [groups, 1, g]
    rows: Tensor  # mu2 [groups, rows, 1]
    before: Tensor  # [groups, 1, 1]: imbalance with both factors 1
    after: Tensor  # [groups, 1, 1]: imbalance of C


def deviations(tiles: Tensor, dim: int, live: Tensor) -> Tensor:
    """Unbiased standard deviation along a dimension, kept; NaN where a line is not live."""
    correction = min(1, tiles.shape[dim] - 1)  # a single value has none; it is not live either
    return torch.where(live, tiles.std(dim=dim, keepdim=True, correction=correction), torch.nan)


def varies(tiles: Tensor, dim: int) -> Tensor:
    """Which lines are not constant; a line of one value is constant."""
    return tiles.amax(dim=dim, keepdim=True) > tiles.amin(dim=dim, keepdim=True)


def extremes(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest deviation of each tile, [groups, 1, 1]; NaN does not count, 1 when nothing counts."""
    both = torch.cat([rows, columns.transpose(1, 2)], dim=1)
    counts = ~both.isnan()
    low = torch.where(counts, both, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(counts, both, 0.0).amax(dim=1, keepdim=True)
    none = ~counts.any(dim=1, keepdim=True)
    return torch.where(none, 1.0, low), torch.where(none, 1.0, high)


def mean_deviation(tiles: Tensor) -> Tensor:
    """Mean standard deviation of the rows that vary, [groups, 1, 1]; 1 without any."""
    rows = deviations(tiles, 2, varies(tiles, 2))
    mean = rows.nanmean(dim=1, keepdim=True)
    return torch.where(mean > 0, mean, 1.0)


def normalise(tiles: Tensor, iterations: int) -> Factors:
    """Even out rows and columns of tiles [groups, rows, g]; each tile is on its own."""
    live = {dim: varies(tiles, dim) for dim in (1, 2)}
    log = {dim: torch.zeros_like(live[dim], dtype=tiles.dtype) for dim in (1, 2)}  # 1: columns, 2: rows
    now = {dim: deviations(tiles, dim, live[dim]) for dim in (1, 2)}
    low, high = extremes(now[2].clamp(*DEVIATION), now[1].clamp(*DEVIATION))
    target = low + 1e-6
    low, high = extremes(now[2], now[1])
    before = best = high / low.clamp(min=1e-12)
    kept = dict(log)
    is_open = torch.ones_like(best, dtype=torch.bool)
    for _ in range(iterations):
        current = tiles / log[1].exp() / log[2].exp()
        now = {dim: deviations(current, dim, live[dim]) for dim in (1, 2)}
        low, high = extremes(now[2], now[1])
        imbalance = high / low.clamp(min=1e-12)
        better = imbalance <= best
        kept = {dim: torch.where(better & is_open, log[dim], kept[dim]) for dim in (1, 2)}
        best = torch.minimum(best, imbalance)
        is_open = is_open & better
        for dim in (1, 2):
            step = (now[dim].clamp(*DEVIATION) / target).clamp(*STEP).log()
            moved = (log[dim] + step).clamp(*LOG_FACTOR)
            log[dim] = torch.where(is_open & live[dim], moved, log[dim])
    # A power of two moves from one factor to the other without rounding.
    gauge = torch.exp2(torch.round(kept[1].mean(dim=2, keepdim=True) / math.log(2)))
    return Factors(columns=kept[1].exp() / gauge, rows=kept[2].exp() * gauge, before=before, after=best)


def assemble(tiles: Tensor, columns: Tensor, rows: Tensor, grid: Grid) -> ColumnScaled:
    """Round tiles [groups, rows, g] with column factors [groups, 1, g] to nearest.

    `rows` [groups, rows, 1] are the row factors: in their unit a row's range has a smallest value.
    """
    groups, count, size = tiles.shape
    factor = grid.store(columns)
    flat = tiles / factor
    fit = fit_symmetric if grid.symmetric else fit_asymmetric
    scale, zero = fit(flat, rows, grid)
    lowest = 1 if grid.symmetric else 0
    codes = torch.clamp(torch.round(flat / scale) + zero, lowest, grid.top)
    base = UniformWeight(
        codes=codes.transpose(0, 1).reshape(count, groups * size).to(torch.uint8),
        scale=scale[..., 0].T.contiguous().to(grid.scale_dtype),
        zero=None if grid.symmetric else zero[..., 0].T.contiguous().to(grid.scale_dtype),
        bits=grid.bits,
        group_size=grid.group_size,
        solver="sinq",
    )
    return ColumnScaled(base=base, factor=factor.reshape(-1).to(grid.scale_dtype), folded=False, solver="sinq")


def fit_symmetric(flat: Tensor, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """s1 and the offset of the codes, [groups, rows, 1]."""
    amax = torch.maximum(flat.abs().amax(dim=2, keepdim=True), SMALLEST_AMAX * rows)
    half = 2.0 ** (grid.bits - 1)
    scale = grid.store(amax / (half - 1))
    return scale, torch.full_like(scale, half)


def fit_asymmetric(flat: Tensor, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """s1 and z, [groups, rows, 1]; z is an integer of the storage dtype and need not lie among the codes."""
    low, high = flat.amin(dim=2, keepdim=True), flat.amax(dim=2, keepdim=True)
    exact = 2 / torch.finfo(grid.scale_dtype).eps  # integers up to this one are exact
    scale = grid.store(torch.maximum(high - low, SMALLEST_RANGE * rows) / grid.top)
    far = (low / scale).abs() > exact
    low, high = torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)
    scale = grid.store(torch.maximum(high - low, SMALLEST_RANGE * rows) / grid.top)
    return scale, -torch.round(low / scale)


def activation_aware(
    weight: Tensor, tiles: Tensor, found: Factors, unit: Tensor, inputs: InputStatistics, grid: Grid
) -> ColumnScaled:
    """A-SINQ: the column weighting with the smallest L1 error of the outputs; unweighted columns win ties."""
    assert inputs.mean_abs is not None and inputs.sample is not None
    if not bool(torch.isfinite(inputs.sample).all() & torch.isfinite(inputs.mean_abs).all()):
        raise NonFinite("the calibration inputs hold NaN or Inf")
    best, least, chosen = None, torch.inf, None
    for exponent in [None, *(i / EXPONENTS for i in range(EXPONENTS))]:
        emphasis = torch.ones_like(inputs.mean_abs)
        if exponent is not None:
            emphasis = column_weights(inputs.mean_abs, weight, exponent)
        columns = found.columns / emphasis.reshape(found.columns.shape)
        result = assemble(tiles, columns, found.rows * unit, grid)
        error = float(((weight.float() - result.dequantize()) @ inputs.sample.T).abs().mean())
        if best is None or error < least:
            best, least, chosen = result, error, exponent
    assert best is not None
    best.notes |= {"exponent": chosen, "output_l1": least}
    return best


def column_weights(mean_abs: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """a^r mean|W|^(r-1), [columns], scaled to largest x smallest = 1; inputs that never fire count as the faintest."""
    fires = mean_abs > 0
    faintest = mean_abs[fires].min() if bool(fires.any()) else mean_abs.new_ones(())
    activity = torch.where(fires, mean_abs, faintest)
    magnitude = weight.float().abs().mean(dim=0).clamp(min=1e-12)
    emphasis = activity**exponent * magnitude ** (exponent - 1)
    emphasis = emphasis.clamp(min=WEIGHT_RATIO * float(emphasis.max()))
    return emphasis / (emphasis.max() * emphasis.min()).sqrt()
