"""Products on GPUs: x W^T from packed codes by the Triton kernels of `qfarm.kernels`. None of it has run on a GPU.

    tiles     qfarm.kernels.ops.linear: any uniform weight whose groups fit tiles of 16 words; 5 to 7 bits are held in 8
    int8      qfarm.kernels.tri_int8: inputs as codes per token, one grid per weight row; exact int32 sums
    planes    qfarm.kernels.ops.bcq_linear: sign planes, groups of a multiple of 32 or whole rows; factors in float16

Scales of tiles and int8 are as they are stored (bfloat16 becomes float32, which is exact), so that what differs from
the simulation is its own rounding of each weight to the model's dtype. Tests run all three in Triton's interpreter
against the values that the codes stand for. Weights without a layout are unpacked at each call
(`qfarm.layers.products`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from qfarm.errors import InvalidInput
from qfarm.kernel_bytes import kernel_bytes
from qfarm.kernels import ops, pack
from qfarm.layers.operands import Coded, by_row, nbytes, signed, signed_zero
from qfarm.quantized import SignPlanes, UniformWeight


def build(weight: UniformWeight | SignPlanes) -> TileProduct | PlaneProduct | None:
    """None where there is no layout for the weight."""
    return TileProduct.build(weight) if isinstance(weight, UniformWeight) else PlaneProduct.build(weight)


def require_triton() -> None:
    """Raises InvalidInput where there is none."""
    if importlib.util.find_spec("triton") is None:
        raise InvalidInput("run: packed on a GPU needs triton, which is not installed; run: fake measures accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileProduct:
    """y = sum_k x_k s (q_k - z), codes unpacked in registers."""

    weight: pack.T16Weight
    bits: int  # of the codes; fewer than those of the tiles where these have no layout of their own

    @staticmethod
    def build(weight: UniformWeight) -> TileProduct | None:
        """None where `kernel_bytes` has no layout for the weight, or no kernel reads it: 1 bit."""
        if weight.bits == 1 or isinstance(kernel_bytes(weight), str):
            return None
        rows, columns = weight.shape
        bits = pack.held_bits(weight.bits)
        codes, zero = weight.codes, weight.zero
        if zero is None:  # the middle of the range, which is another one where the range is
            codes = codes + ((1 << (bits - 1)) - (1 << (weight.bits - 1)))
        packed = pack.pack_weight(
            codes,
            by_row(weight.scale, rows).contiguous(),
            None if zero is None else by_row(zero, rows).contiguous(),
            bits,
            columns // weight.scale.shape[1],
            weight.g_idx,
        )
        return TileProduct(weight=packed, bits=weight.bits)

    @property
    def path(self) -> str:
        held = "" if self.bits == self.weight.bits else f", {self.bits}-bit codes held in {self.weight.bits} bits"
        return f"tiles (qfarm.kernels, {self.weight.bits}-bit{held})"

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneProduct:
    """y = sum_g (offset sum_k x_k + sum_i factor_i sum_k +-x_k), by tables of sums of a few inputs.

    One pass over the weight per token; more than a few tokens take it dequantized once.
    """

    weight: pack.BCQWeight

    @staticmethod
    def build(weight: SignPlanes) -> PlaneProduct | None:
        """None where groups leave a word of 32 signs open, or float16 cannot hold a factor."""
        factors, offset = weight.sign_planes()
        group = weight.shape[1] // factors.shape[1]
        if factors.shape[1] > 1 and group % pack.SIGNS:
            return None
        if any(value is not None and not bool(value.half().isfinite().all()) for value in (factors, offset)):
            return None
        return PlaneProduct(weight=pack.pack_bcq(weight.codes, factors, offset, group))

    @property
    def path(self) -> str:
        return f"planes (qfarm.kernels, {self.weight.bits} planes, factors in float16)"

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= ops.GEMV_ROWS:
            y = ops.bcq_linear(flat, self.weight)
        else:
            y = flat @ self.weight.dequantize(x.dtype).T
        return y.reshape(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Product:
    """y = s_x s_w (sum q_x q_w - z sum q_x), q_w and z counted from the middle of their range."""

    inputs: Callable[[Tensor], Coded]
    weight: pack.Int8Weight
    zero: Tensor | None  # float32 [out]; None: 0
    bits: int

    @staticmethod
    def build(weight: UniformWeight, inputs: Callable[[Tensor], Coded]) -> Int8Product:
        scale = by_row(weight.scale, len(weight.codes))[:, 0].float().contiguous()
        return Int8Product(
            inputs=inputs, weight=pack.pack_int8(signed(weight), scale), zero=signed_zero(weight), bits=weight.bits
        )

    @property
    def path(self) -> str:
        held = "" if self.bits == 8 else f", {self.bits}-bit codes held in bytes"
        return f"int8 (qfarm.kernels{held})"

    def __call__(self, x: Tensor) -> Tensor:
        from qfarm.kernels import tri_int8  # needs triton

        codes, scale = self.inputs(x)
        flat, scale = codes.reshape(-1, codes.shape[-1]), scale.reshape(-1)
        padded = torch.nn.functional.pad(flat, (0, self.weight.values.shape[1] - flat.shape[1])).contiguous()
        if self.zero is None:
            y = tri_int8.gemm(padded, scale, self.weight, x.dtype)
        else:
            y = tri_int8.gemm(padded, scale, self.weight, torch.float32)
            sums = flat.sum(-1, dtype=torch.int32).float() * scale
            y = (y - sums[:, None] * (self.weight.scale * self.zero)).to(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return self.weight.nbytes + nbytes(self.zero)
