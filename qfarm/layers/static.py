"""Static quantizers: grids fixed by calibration, one for all tokens. Numbers beyond them are clipped, and counted.

Arithmetic is float32, rounding half to even, the result is cast back to the dtype of x. NaN comes out as NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from qfarm.layers.rtn import TINY


@dataclasses.dataclass
class Clipped:
    """Numbers that passed through a quantizer, and those beyond its grid, added up over calls."""

    numbers: int = 0
    beyond: Tensor | int = 0  # stays on the device, which a forward pass must not wait for

    def count(self, inside: Tensor) -> None:
        self.numbers += inside.numel()
        self.beyond = self.beyond + inside.logical_not().sum()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StaticSymmetric:
    """x_hat = s clamp(round(x / s), +-(2^(b-1) - 1)),  s = largest / (2^(b-1) - 1), one for the whole tensor."""

    bits: int
    largest: float  # |x|
    clipped: Clipped = dataclasses.field(default_factory=Clipped)

    @property
    def scale(self) -> float:
        return max(self.largest / (2.0 ** (self.bits - 1) - 1), TINY)

    def stored(self) -> tuple[Tensor, ...]:
        return (torch.tensor([self.scale]),)

    def __call__(self, x: Tensor) -> Tensor:
        values, top = x.float(), 2.0 ** (self.bits - 1) - 1
        codes = torch.round(values / self.scale)
        self.clipped.count(codes.abs() <= top)
        return (codes.clamp(-top, top) * self.scale).to(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StaticAsymmetric:
    """x_hat = s (clamp(round(x / s) + z, low code, high code) - z) with s and z that broadcast against x."""

    bits: int
    scale: Tensor
    zero: Tensor
    kept: tuple[Tensor, ...]  # what scale and zero are made of when they are stored
    clipped: Clipped = dataclasses.field(default_factory=Clipped)

    def stored(self) -> tuple[Tensor, ...]:
        return self.kept

    def __call__(self, x: Tensor) -> Tensor:
        scale, zero, half = self.scale.to(x.device), self.zero.to(x.device), 2.0 ** (self.bits - 1)
        codes = torch.round(x.float() / scale) + zero
        self.clipped.count((codes >= -half) & (codes <= half - 1))
        return ((codes.clamp(-half, half - 1) - zero) * scale).to(x.dtype)


def share_clipped(quantizers: Iterable[object]) -> float | None:
    """Of all numbers that these quantizers saw, the share beyond their grids; None where none is static."""
    seen = [q.clipped for q in quantizers if isinstance(q, StaticSymmetric | StaticAsymmetric)]
    numbers = sum(one.numbers for one in seen)
    return sum(int(one.beyond) for one in seen) / numbers if numbers else None
