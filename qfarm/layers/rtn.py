"""RTN of activations: uniform grids fitted anew at every call, one per row of the last axis.

    symmetric    s = max|x| / (2^(b-1) - 1)          x_hat = s clamp(round(x / s), +-(2^(b-1) - 1))
    asymmetric   s = (max(x, 0) - min(x, 0)) / (2^b - 1)   z = round(-min(x, 0) / s)
                 x_hat = s (clamp(round(x / s) + z, 0, 2^b - 1) - z)
    unsigned     the asymmetric grid of what is never negative: s = max(x) / (2^b - 1), z = 0

Arithmetic is float32 (which x / s is for any dtype of x, as s is), rounding half to even, the result is cast back to
the dtype of x. Ranges are exact in the dtype of x. A row of zeros comes out as zeros. NaN and Inf come out as NaN, for
the evaluation to find. A row is a token (linear inputs), a token of a head (queries, keys, values) or a query of a head
(probabilities), so no quantizer here looks at another token.

Raise the version in `qfarm.layers.sites` when a rule changes results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Quantizer = Callable[[Tensor], Tensor]  # any shape, rows on the last axis; same shape and dtype out; holds no state
TINY = torch.finfo(torch.float32).tiny  # below the smallest normal number a scale would lose its precision
# Elements that a CPU rounds at once: what a rule makes on the way then stays in a core's cache (1.8 times as fast on
# [2048, 1536] in bfloat16, one thread of a Xeon with AMX; 32 to 128 rows of 1536 within 15 % of each other).
PART = 1 << 17


def in_parts(rule: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A rule for rows, handed a large tensor on a CPU in parts of whole rows; what comes out is the same."""

    @functools.wraps(rule)
    def apply(self: Any, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() <= PART:
            return rule(self, x)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        size = max(1, PART // rows.shape[1])
        for given, made in zip(torch.split(rows, size), torch.split(out, size), strict=True):
            made.copy_(rule(self, given))
        return out.view(x.shape)

    return apply


@dataclasses.dataclass(frozen=True, kw_only=True)
class Symmetric:
    """Round to nearest on a symmetric grid of the restricted range."""

    bits: int

    @in_parts
    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self._rounded(x)
        return codes.mul_(scale).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same as codes int8 [..., n] and scales float32 [..., 1], for widths up to 8 bits."""
        codes, scale = self._rounded(x)
        return codes.to(torch.int8), scale

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top = 2.0 ** (self.bits - 1) - 1
        scale = (x.abs().amax(dim=-1, keepdim=True).float() / top).clamp(min=TINY)
        return (x / scale).round_().clamp_(-top, top), scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asymmetric:
    """Round to nearest on a grid that reaches from the smallest to the largest value and contains zero."""

    bits: int

    @in_parts
    def __call__(self, x: Tensor) -> Tensor:
        scale, zero = asymmetric_grid(x, self.bits)
        return asymmetric_codes(x, scale, zero, self.bits).sub_(zero).mul_(scale).to(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unsigned:
    """Round to nearest on a grid from zero up, for values that are never negative."""

    bits: int

    @in_parts
    def __call__(self, x: Tensor) -> Tensor:
        top = 2.0**self.bits - 1
        scale = (x.amax(dim=-1, keepdim=True).float() / top).clamp(min=TINY)
        return (x / scale).round_().clamp_(0, top).mul_(scale).to(x.dtype)


def asymmetric_grid(values: Tensor, bits: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scale and zero [..., 1], float32, of rows [..., n]; the scale has the precision of its storage."""
    low = values.amin(dim=-1, keepdim=True).float().clamp(max=0)
    high = values.amax(dim=-1, keepdim=True).float().clamp(min=0)
    scale = (high - low) / (2.0**bits - 1)
    scale = scale.clamp(min=torch.finfo(scale_dtype).tiny).to(scale_dtype).float()
    return scale, torch.round(-low / scale).clamp(0, 2.0**bits - 1)


def asymmetric_codes(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes in 0 .. 2^bits - 1, float32."""
    return (values / scale).round_().add_(zero).clamp_(0, 2.0**bits - 1)


def rtn_quantizer(site: str, bits: int) -> Quantizer:
    """The quantizer of a site that no method claims."""
    return Unsigned(bits=bits) if site == "probs" else Symmetric(bits=bits)
