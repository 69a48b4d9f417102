"""Quantizers of the rotation papers: dynamic grids with a clipped range, per token, per head, or in two widths.

    symmetric    s = c max|x| / (2^(b-1) - 1)              x_hat = s clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = c (max x - min x) / (2^b - 1)         x_hat = s (clamp(round(x / s) + z, 0, 2^b - 1) - z)
                 z = round(-c min x / s), which lies beyond the codes where zero lies outside of the range
    through zero the same with min(x, 0) and max(x, 0)

Rows are what the last axis holds: a token, or one head of it. In two widths the trailing part of a row has more bits
and a grid of its own. Arithmetic is float32, rounding half to even; a row of zeros comes out as zeros, NaN as NaN. A
range that is narrow against its distance from zero is widened to FLATTEST of it, so that z fits its 16 bits.

Differences from the code of QuaRot, SpinQuant and ResQ: scales of the cache are rounded to float16 before use.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qfarm.layers.cache import QuantizedLayer, extend
from qfarm.layers.packing import pack_codes, unpack_codes
from qfarm.layers.rtn import TINY

FLATTEST = 2.0**-14  # smallest step, as a fraction of the largest |x|
ZERO_BITS = {True: torch.uint8, False: torch.int16}  # storage of z, by whether the range goes through zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedSymmetric:
    """A symmetric grid of the full range whose ends are c times the largest |x|."""

    bits: int
    clip: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        top = 2.0 ** (self.bits - 1) - 1
        scale = (self.clip * x.abs().amax(dim=-1, keepdim=True).float() / top).clamp(min=TINY)
        return (x / scale).round_().clamp_(-top - 1, top).mul_(scale).to(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedAsymmetric:
    """A grid from c times the smallest to c times the largest value."""

    bits: int
    clip: float = 1.0
    through_zero: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        scale, zero = self.grid(x.float())
        return (self.codes(x, scale, zero) - zero).mul_(scale).to(x.dtype)

    def grid(self, values: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Scale, as its storage dtype holds it, and zero [..., 1] of rows [..., n], float32."""
        low, high = (self.clip * end for end in torch.aminmax(values, dim=-1, keepdim=True))
        if self.through_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        floor = torch.maximum(low.abs(), high.abs()) * FLATTEST
        scale = torch.maximum((high - low) / (2.0**self.bits - 1), floor)
        scale = scale.clamp(min=torch.finfo(scale_dtype).tiny).to(scale_dtype).float()
        return scale, torch.round(-low / scale)

    def codes(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes in 0 .. 2^bits - 1, float32."""
        return (values / scale).round_().add_(zero).clamp_(0, 2.0**self.bits - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoWidths:
    """Rows whose leading numbers are on one grid, and their last `fraction` on another."""

    low: ClippedAsymmetric
    high: ClippedAsymmetric
    fraction: float

    @property
    def effective_bits(self) -> float:
        """Bits per number of a row that the fraction is a whole number of."""
        return self.low.bits + self.fraction * (self.high.bits - self.low.bits)

    def __call__(self, x: Tensor) -> Tensor:
        split = x.shape[-1] - high_count(self.fraction, x.shape[-1])
        parts = ((self.low, x[..., :split]), (self.high, x[..., split:]))
        return torch.cat([quantize(part) for quantize, part in parts if part.shape[-1]], dim=-1)


def high_count(fraction: float, width: int) -> int:
    """How many of `width` coordinates have the larger width."""
    return int(fraction * width + 1e-9)  # 0.125 of 64 is 8 whatever the fraction's last bit is


class ClippedLayer(QuantizedLayer):
    """Keys and values on asymmetric grids, per token and head: packed codes, a float16 scale and an integer zero.

    With a fraction the last coordinates of every head have `high_bits` and a grid of their own.
    """

    is_croppable = True

    def __init__(
        self,
        bits: int,
        clip: float = 1.0,
        keys_through_zero: bool = False,
        high_bits: int = 8,
        fraction: float = 0.0,
    ) -> None:
        super().__init__()
        self.bits, self.clip, self.high_bits, self.fraction = bits, clip, high_bits, fraction
        self.through_zero = {"k": keys_through_zero, "v": False}

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.width = keys.shape[-1]
        for name, tensor in (("k", keys.float()), ("v", values.float())):
            for part, (start, stop, grid) in self._parts(name).items():
                here = tensor[..., start:stop]
                scale, zero = grid.grid(here, torch.float16)
                codes = grid.codes(here, scale, zero)
                new = {
                    "codes": pack_codes(codes.nan_to_num().to(torch.uint8), grid.bits),  # NaN stays in the scale
                    "scale": scale.half(),
                    "zero": zero.nan_to_num().to(ZERO_BITS[grid.through_zero]),
                }
                extend(self.state, {f"{name}{part}_{what}": value for what, value in new.items()})

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.cat([self._dequantize(f"{name}{part}", *where) for part, where in self._parts(name).items()], dim=-1)
            for name in ("k", "v")
        )
        return keys, values

    def _parts(self, name: str) -> dict[str, tuple[int, int, ClippedAsymmetric]]:
        """First and last coordinate and grid of each part of a head."""
        split = self.width - high_count(self.fraction, self.width)
        ends = {"": (0, split, self.bits), "_high": (split, self.width, self.high_bits)}
        return {
            part: (start, stop, ClippedAsymmetric(bits=bits, clip=self.clip, through_zero=self.through_zero[name]))
            for part, (start, stop, bits) in ends.items()
            if start < stop
        }

    def _dequantize(self, name: str, start: int, stop: int, grid: ClippedAsymmetric) -> Tensor:
        codes = unpack_codes(self.state[f"{name}_codes"], grid.bits, stop - start).float()
        return (codes - self.state[f"{name}_zero"].float()) * self.state[f"{name}_scale"].float()
