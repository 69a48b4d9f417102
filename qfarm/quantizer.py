"""Uniform quantizers: pure mathematics on tensors.

    W [rows, columns]   scale, zero [rows, groups]   codes [rows, columns]   b bits   Q = 2^b - 1

Codes are unsigned. The weight that is evaluated, counted and exported is always `(code - zero) * scale`, with the
scale rounded to its storage dtype *before* the weight is rounded, so that what ships is what was measured.

Asymmetric: the range of a group is widened to contain zero, `scale = (high - low) / Q`, `zero = round(-low / scale)`,
`code = clamp(round(w / scale) + zero, 0, Q)`; w / scale is rounded before zero is added, so zero stays exact.

Symmetric has three conventions in public code:

    restricted          scale = amax / (2^(b-1) - 1), signed codes in +-(2^(b-1) - 1); both ends exact. Our default.
    full_range_offset   scale = 2 amax / (2^b - 1), as GPTQ's reference code. Unlike it, amax is taken over both
                        signs, so a group without negative elements is not clipped at half its range.
    deepspeed           scale = 2 amax / 2^b, signed codes in [-2^(b-1), 2^(b-1) - 1], as DeepSpeed: +amax clips.

Rounding is half to even, arithmetic float32. A group of zeros gets a finite scale and comes out as zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.quantized import UniformWeight

Convention = Literal["restricted", "full_range_offset", "deepspeed"]

# Search for clipped ranges, from the GPTQ reference code (IST-DASLab/gptq, quant.py): shrink factors 1 - i / 100 for
# i < 80, error |x_hat - x|^2.4 summed per group.
SEARCH_STEPS, SEARCH_GRID, SEARCH_NORM = 80, 100, 2.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """How one linear layer's weights are put on a uniform grid."""

    bits: int
    group_size: int = -1  # consecutive input columns that share a scale; -1 = the whole row
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16
    convention: Convention = "restricted"  # of symmetric grids
    search: bool = False  # shrink the range where that lowers the error (SEARCH_*)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def bottom(self) -> int:
        """The smallest code."""
        return 1 if self.symmetric and self.convention == "restricted" else 0

    def fit(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group; values [..., g] -> scale [...], zero [...], both float32.

        The scale already has the precision of its storage dtype. Raises NonFinite on NaN or Inf.
        """
        values = values.float()
        low = values.amin(dim=-1).clamp(max=0)
        high = values.amax(dim=-1).clamp(min=0)
        if not torch.isfinite(low + high).all():
            raise NonFinite("the weights hold NaN or Inf")
        scale, zero = self._parameters(low, high)
        if self.search:
            scale, zero = self._search(values, low, high, scale, zero)
        return scale, zero

    def _parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        empty = (low == 0) & (high == 0)
        if self.symmetric:
            amax = torch.maximum(-low, high)
            half = 2.0 ** (self.bits - 1)
            steps = {"restricted": half - 1, "full_range_offset": (2 * half - 1) / 2, "deepspeed": half}[
                self.convention
            ]
            scale = self.store(torch.where(empty, torch.ones_like(amax), amax / steps))
            return scale, torch.full_like(scale, half)
        scale = self.store(torch.where(empty, torch.full_like(low, 2.0 / self.top), (high - low) / self.top))
        zero = torch.where(empty, torch.full_like(low, round(self.top / 2)), torch.round(-low / scale))
        return scale, zero.clamp(0, self.top)

    def store(self, scale: Tensor) -> Tensor:
        """A scale as its storage dtype holds it, float32. Raises NonFinite when it does not fit."""
        limits = torch.finfo(self.scale_dtype)
        if (scale > limits.max).any():
            raise NonFinite(f"a scale of {scale.max():.3g} does not fit {self.scale_dtype}; use scale_dtype: float32")
        # The smallest subnormal step would lose the scale's precision: stay in the normal range.
        return scale.clamp(min=limits.tiny).to(self.scale_dtype).float()

    def _search(self, values: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        best = torch.full_like(low, torch.inf)
        for step in range(SEARCH_STEPS):
            shrink = 1 - step / SEARCH_GRID
            s, z = self._parameters(low * shrink, high * shrink)
            error = (self.round_trip(values, s[..., None], z[..., None]) - values).abs().pow(SEARCH_NORM).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        return scale, zero

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes as float32; scale and zero broadcast against values."""
        return torch.clamp(torch.round(values / scale) + zero, self.bottom, self.top)

    def round_trip(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Quantize and dequantize, float32."""
        return (self.encode(values, scale, zero) - zero) * scale

    def groups(self, columns: int) -> int:
        """How many groups a row of that many columns has. Groups always divide it: ragged ones are refused."""
        size = columns if self.group_size == -1 else self.group_size
        if columns % size:
            raise ValueError(f"group size {size} does not divide {columns} columns")
        return columns // size

    def quantize(self, weight: Tensor) -> UniformWeight:
        """Round to nearest: weight [rows, columns] -> codes."""
        rows, columns = weight.shape
        grouped = weight.float().reshape(rows, self.groups(columns), -1)
        scale, zero = self.fit(grouped)
        codes = self.encode(grouped, scale[..., None], zero[..., None]).reshape(rows, columns)
        return UniformWeight.build(self, codes, scale, zero, solver="rtn")


def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """||W - Q||^2 / ||W||^2; 0 for an all-zero weight that stays zero."""
    norm = float(weight.float().square().sum())
    error = float((weight.float() - quantized.float()).square().sum())
    return error / norm if norm else error
