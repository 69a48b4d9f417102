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
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qfarm.errors import NonFinite

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
            scale = self._store(torch.where(empty, torch.ones_like(amax), amax / steps))
            return scale, torch.full_like(scale, half)
        scale = self._store(torch.where(empty, torch.full_like(low, 2.0 / self.top), (high - low) / self.top))
        zero = torch.where(empty, torch.full_like(low, round(self.top / 2)), torch.round(-low / scale))
        return scale, zero.clamp(0, self.top)

    def _store(self, scale: Tensor) -> Tensor:
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
        lowest = 1 if self.symmetric and self.convention == "restricted" else 0
        return torch.clamp(torch.round(values / scale) + zero, lowest, self.top)

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


class QuantizedWeight(Protocol):
    """What a solver returns for one linear layer: codes and metadata; the float weight is derived from it."""

    solver: str  # the solver that made it
    notes: dict[str, Any]  # figures worth storing: damping used, clipped share, ...

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    def dequantize(self) -> Tensor:
        """The weight [rows, columns] in float32."""
        ...

    def stored_bytes(self) -> int:
        """Bytes of `packed()`, computed from shapes alone."""
        ...

    def packed(self) -> dict[str, Tensor]:
        """The tensors that go to disk."""
        ...

    def row_range(self, start: int, stop: int) -> QuantizedWeight:
        """The same for rows [start, stop), for layers that were solved as one stacked matrix."""
        ...


@dataclasses.dataclass(kw_only=True)
class UniformWeight:
    """Codes on a uniform grid. Storage is the bit stream of compressed-tensors' pack-quantized format."""

    codes: Tensor  # uint8 [rows, columns]
    scale: Tensor  # [rows, groups], storage dtype
    zero: Tensor | None  # uint8 [rows, groups]; None when symmetric (the zero is then 2^(b-1))
    bits: int
    group_size: int
    g_idx: Tensor | None = None  # int32 [columns], group of each column; None when groups are consecutive columns
    solver: str = "rtn"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def build(
        grid: Grid, codes: Tensor, scale: Tensor, zero: Tensor, solver: str, g_idx: Tensor | None = None
    ) -> UniformWeight:
        """From float32 codes, scales and zeros as the grid computes them."""
        return UniformWeight(
            codes=codes.to(torch.uint8),
            scale=scale.to(grid.scale_dtype),
            zero=None if grid.symmetric else zero.to(torch.uint8),
            bits=grid.bits,
            group_size=grid.group_size,
            g_idx=g_idx,
            solver=solver,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        zero = torch.full_like(self.scale, 2.0 ** (self.bits - 1)) if self.zero is None else self.zero
        scale, zero = self.scale.float(), zero.float()
        if self.g_idx is not None:
            index = self.g_idx.long()
            return (self.codes.float() - zero[:, index]) * scale[:, index]
        grouped = self.codes.float().reshape(rows, scale.shape[1], -1)
        return ((grouped - zero[..., None]) * scale[..., None]).reshape(rows, columns)

    def stored_bytes(self) -> int:
        rows, columns = self.shape
        groups = self.scale.shape[1]
        total = 4 * rows * packed_words(columns, self.bits) + groups * rows * self.scale.element_size()
        if self.zero is not None:
            total += 4 * packed_words(rows, self.bits) * groups
        if self.g_idx is not None:
            total += 4 * columns
        return total

    def packed(self) -> dict[str, Tensor]:
        tensors = {"weight_packed": pack_bits(self.codes, self.bits), "weight_scale": self.scale}
        if self.zero is not None:
            # Zeros are packed along the output rows, as compressed-tensors does.
            tensors["weight_zero_point"] = pack_bits(self.zero.T.contiguous(), self.bits).T.contiguous()
        if self.g_idx is not None:
            tensors["weight_g_idx"] = self.g_idx.to(torch.int32)
        return tensors

    def row_range(self, start: int, stop: int) -> UniformWeight:
        zero = None if self.zero is None else self.zero[start:stop]
        part = dataclasses.replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=zero)
        part.notes = dict(self.notes)
        return part


def packed_words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, n] -> int32 [rows, ceil(n * bits / 32)]; code i fills bits i*b .. i*b+b-1, low end first."""
    rows, count = codes.shape
    stream = torch.zeros(rows, packed_words(count, bits) * 32, dtype=torch.uint8, device=codes.device)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream[:, : count * bits] = ((codes[:, :, None] >> shifts) & 1).reshape(rows, -1)
    weights = 2 ** torch.arange(32, dtype=torch.int64, device=codes.device)
    words = (stream.reshape(rows, -1, 32).long() * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: int32 [rows, words] -> uint8 [rows, count]."""
    rows = words.shape[0]
    positions = torch.arange(32, device=words.device)
    stream = ((words.long()[:, :, None] >> positions) & 1).reshape(rows, -1)[:, : count * bits]
    weights = 2 ** torch.arange(bits, device=words.device)
    return (stream.reshape(rows, count, bits) * weights).sum(-1).to(torch.uint8)


def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """||W - Q||^2 / ||W||^2; 0 for an all-zero weight that stays zero."""
    norm = float(weight.float().square().sum())
    error = float((weight.float() - quantized.float()).square().sum())
    return error / norm if norm else error
