"""Quantization kernel: the elements of a tensor that its quantizer makes zero (CrossQuant, arXiv 2410.07505).

Elements that were zero already belong to it by definition; ReLU makes many. They are counted apart, so that the share
can be given without them as well.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qfarm.layers.account import kept_tensors
from qfarm.layers.rtn import TINY, Quantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Counts of one quantizer on some tensors; they add up."""

    elements: int = 0
    zeroed: int = 0  # zero after the quantizer: the kernel
    zeros: int = 0  # of those, zero before

    def __add__(self, other: Kernel) -> Kernel:
        return Kernel(
            elements=self.elements + other.elements,
            zeroed=self.zeroed + other.zeroed,
            zeros=self.zeros + other.zeros,
        )

    @property
    def share(self) -> float:
        """The kernel's share of all elements."""
        return self.zeroed / self.elements if self.elements else 0.0

    @property
    def share_of_nonzero(self) -> float:
        """The share of elements other than zero that become zero."""
        nonzero = self.elements - self.zeros
        return (self.zeroed - self.zeros) / nonzero if nonzero else 0.0


def kernel(x: Tensor, quantize: Quantizer | None) -> Kernel:
    """The kernel of a quantizer on x; None leaves x as it is."""
    zero = x == 0
    after = zero if quantize is None else quantize(x) == 0
    return Kernel(elements=x.numel(), zeroed=int((after | zero).sum()), zeros=int(zero.sum()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerTensor:
    """Round to nearest on one symmetric grid per sequence, for x [batch, tokens, features]; looks across tokens."""

    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        top = 2.0 ** (self.bits - 1) - 1
        scale = (values.abs().amax(dim=(-2, -1), keepdim=True) / top).clamp(min=TINY)
        return (torch.round(values / scale).clamp(-top, top) * scale).to(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRemoved:
    """Sets a quantizer's kernel to zero and leaves everything else in floating point."""

    quantize: Quantizer
    effective_bits = 16.0

    def stored(self) -> tuple[Tensor, ...]:
        return kept_tensors(self.quantize) or ()

    def __call__(self, x: Tensor) -> Tensor:
        return x.masked_fill(self.quantize(x) == 0, 0.0)
