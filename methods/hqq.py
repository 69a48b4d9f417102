"""HQQ, half-quadratic quantization: keep the min/max scale, fit a real-valued zero point; no calibration data.

    W [rows, groups, g]   s, z [rows, groups, 1]   Q = 2^b - 1   p norm   beta penalty   We sparse part of the error

Repeat (Badri & Shaji, Mobius Labs, 2023; the solver that github.com/mobiusml/hqq binds by default):

    code = clamp(round(W / s + z), 0, Q)      Wr = (code - z) s
    We   = shrink(W - Wr)                     shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z    = mean(code - (W - We) / s)          until the mean of |W - Wr| no longer falls

From s = (max - min) / Q and z = -min / s; neither zero nor the zero point is forced into the range.

For p = 0.7 and beta = 10, shrink is zero below |x| = 0.17, which errors of language-model weights never reach: We = 0
and the loop alternates least squares in codes and zero. `normalize` divides each group's error by the group's
standard deviation first, so that p and beta mean something and the result no longer depends on the scale of W. Whole
rows as groups are worse than RTN in public tables: use groups of at most 128.

Stored: codes, scale and zero of each group, both in the scale dtype: b + 32 / g bits per weight.

Differences from the reference code: groups are consecutive inputs of one row (axis = 1) and must divide it; there is no
axis 0, whose groups run over output rows and fit no packed format here, no per-tensor grid, and no width of 1.58 bits.
3-bit codes are a bit stream as at every width, where the reference pads ten of them to 32 bits. Arithmetic is float32
on every device (float16 on GPUs there). Scales and, in each iteration, zeros are rounded to their storage dtype before
codes are computed. round_zero leaves flat groups alone, whose value it would destroy. `keep: best` and `kappa` are what
its second solver (v2) adds, group by group rather than tensor by tensor; its search over scales, the gradient solver
and 8-bit scales and zeros are left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics
from qfarm.quantized import UniformWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, WeightSolver

FLAT, FINEST = 1e-4, 1 / 2e4  # ranges up to FLAT get scale 1; no scale is below FINEST (both from the reference code)
SMALLEST = 1e-5  # |x|^(p-1) is taken at this or more: infinite at 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HQQ(WeightSolver):
    source = "Badri & Shaji, Mobius Labs report, November 2023; github.com/mobiusml/hqq"
    widths = range(1, 9)
    stackable = False  # the stop test averages over the whole matrix

    lp_norm: float = Field(0.7, gt=0, le=1, description="p of the norm of the error; 1 = soft threshold")
    beta: float = Field(10.0, gt=0, description="penalty; the threshold of shrinkage is beta^(-1 / (2 - p))")
    kappa: float = Field(1.0, ge=1, description="factor on beta after each iteration; v2 uses 1.01")
    iterations: int = Field(20, ge=0, description="at most that many updates of the zero point")
    keep: Literal["last", "best"] = Field(
        "last", description="last: stop for all groups at the first rise; best: all iterations, each group's best zero"
    )
    round_zero: bool | Literal["at_4_bits"] = Field(
        "at_4_bits", description="round the initial zero: true, false, or in layers of 4 bits only"
    )
    normalize: bool = Field(False, description="shrink errors in units of the group's standard deviation")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        return "hqq fits a real-valued zero point; symmetric: false would be valid" if symmetric else None

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> UniformWeight:
        if not bool(torch.isfinite(weight).all()):
            raise NonFinite("the weights hold NaN or Inf")
        rows, columns = weight.shape
        groups = weight.float().reshape(rows, grid.groups(columns), -1)  # [rows, groups, g]
        unit = spread(groups) if self.normalize else torch.ones_like(groups[..., :1])
        scale, zero = initial(groups, unit, grid, self)
        fit = fit_best if self.keep == "best" else fit_last
        zero, steps = fit(groups, unit, scale, zero, grid, self)
        codes = encode(groups, scale, zero, grid.top)
        return UniformWeight(
            codes=codes.reshape(rows, columns).to(torch.uint8),
            scale=scale[..., 0].to(grid.scale_dtype),
            zero=zero[..., 0].to(grid.scale_dtype),
            bits=grid.bits,
            group_size=grid.group_size,
            solver="hqq",
            notes={"iterations": steps, "mean_abs_error": float(mean_error(groups, codes, scale, zero).mean())},
        )


METHOD = HQQ


def spread(groups: Tensor) -> Tensor:
    """Standard deviation of each group, [rows, groups, 1]; 1 where it is zero."""
    deviation = groups.std(dim=-1, correction=0, keepdim=True)
    return torch.where(deviation > 0, deviation, 1.0)


def initial(groups: Tensor, unit: Tensor, grid: Grid, options: HQQ) -> tuple[Tensor, Tensor]:
    """Scale and zero of the min/max grid, both [rows, groups, 1], as they would be stored."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    flat = high - low <= FLAT * unit
    scale = torch.maximum((high - low) / grid.top, FINEST * unit)
    scale = grid.store(torch.where(flat, 1.0, scale))
    zero = -low / scale
    rounds = grid.bits == 4 if options.round_zero == "at_4_bits" else options.round_zero
    if rounds:
        zero = torch.where(flat, zero, torch.round(zero))
    return scale, stored_zero(zero, grid)


def stored_zero(zero: Tensor, grid: Grid) -> Tensor:
    stored = zero.to(grid.scale_dtype).float()
    if not bool(torch.isfinite(stored).all()):
        raise NonFinite(f"a zero of {zero.abs().max():.3g} does not fit {grid.scale_dtype}; use scale_dtype: float32")
    return stored


def encode(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return torch.clamp(torch.round(groups / scale + zero), 0, top)


def mean_error(groups: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Mean of |W - Wr| per group, [rows, groups, 1]."""
    return (groups - (codes - zero) * scale).abs().mean(-1, keepdim=True)


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """Generalised soft threshold: the minimiser of |y|^p + beta (y - x)^2 / 2 in the report's approximation."""
    return torch.sign(x) * (x.abs() - x.abs().clamp(min=SMALLEST).pow(p - 1) / beta).clamp(min=0)


def update(
    groups: Tensor, unit: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, p: float, beta: float
) -> Tensor:
    """The zero that is optimal for these codes once the sparse part of the error is taken out."""
    error = groups - (codes - zero) * scale
    sparse = unit * shrink(error / unit, p, beta)
    return stored_zero((codes - (groups - sparse) / scale).mean(-1, keepdim=True), grid)


def fit_last(groups: Tensor, unit: Tensor, scale: Tensor, zero: Tensor, grid: Grid, options: HQQ) -> tuple[Tensor, int]:
    """The reference loop: when the error stops falling, the zero fitted last stays, better or not."""
    best, beta = float("inf"), options.beta
    for step in range(options.iterations):
        codes = encode(groups, scale, zero, grid.top)
        error = float(mean_error(groups, codes, scale, zero).mean())
        zero = update(groups, unit, codes, scale, zero, grid, options.lp_norm, beta)
        if error >= best:
            return zero, step + 1
        best, beta = error, beta * options.kappa
    return zero, options.iterations


def fit_best(groups: Tensor, unit: Tensor, scale: Tensor, zero: Tensor, grid: Grid, options: HQQ) -> tuple[Tensor, int]:
    """Every iteration, and of each group the zero with the smallest mean error, the initial one included."""
    kept, best, beta = zero, torch.full_like(zero, torch.inf), options.beta
    for step in range(options.iterations + 1):
        codes = encode(groups, scale, zero, grid.top)
        error = mean_error(groups, codes, scale, zero)
        kept, best = torch.where(error < best, zero, kept), torch.minimum(error, best)
        if step < options.iterations:
            zero = update(groups, unit, codes, scale, zero, grid, options.lp_norm, beta)
            beta *= options.kappa
    return kept, options.iterations
