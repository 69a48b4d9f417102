"""Products: x W^T from packed codes, by the operators that torch has on this device.

    int8      torch._int_mm: inputs on a symmetric grid per token of at most 8 bits, one grid per weight row; exact
              int32 sums, scaled in float32
    int4      torch._weight_int4pack_mm_for_cpu: 4 bits, groups of 32 to 256, rows in sixteens, a 16-bit model
    w8        torch._weight_int8pack_mm: 8 bits symmetric, one scale per row, bfloat16
    unpack    unpack, dequantize, multiply: what is left, sign planes included, as the simulation has it to the bit

int4 and w8 keep scales (and, for int4, scale times zero) in the model's dtype: with bfloat16 that is 8 bits of the 11
that are stored. int8 holds one code per byte, whatever the width. Inputs that no operator takes as codes are rounded
as in the simulation, in floating point. Each product says all of that in `path`.

w8 reads beyond its rows where the inputs are no multiple of 16 (torch 2.13: a segmentation fault, or rubbish): such
layers are unpacked. These are for CPUs; on GPUs `qfarm.layers.kernel_products` takes the place of the first three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from qfarm.errors import InvalidInput
from qfarm.layers import kernel_products
from qfarm.layers.linear import ReadBySeveral, as_given
from qfarm.layers.operands import Coded, by_row, nbytes, signed, signed_zero
from qfarm.layers.packing import pack_codes, unpack_codes
from qfarm.layers.rtn import Quantizer, Symmetric
from qfarm.quantized import ColumnScaled, LowRank, QuantizedWeight, SignPlanes, UniformWeight, apart

Base = UniformWeight | SignPlanes  # what stands under factors and terms
CPU = torch.device("cpu")
INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = 16  # rows come in blocks of so many
W8_INPUTS = 16  # the same for inputs
SUMS = (2**31 - 1) // (127 * 128)  # products of two codes that int32 always holds


class Product(Protocol):
    """x [..., in] -> x W^T [..., out] in the dtype of x; quantizes x where the cell does."""

    @property
    def path(self) -> str:
        """The operator, and what it changes about the cell."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...
    def nbytes(self) -> int:
        """Bytes of the tensors that it holds."""
        ...


class Sharing:
    """One quantizer of codes for layers that share an input, by the quantizer that they share."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, Callable[[Tensor], Coded]]] = {}

    def codes(self, quantize: Quantizer | None) -> Callable[[Tensor], Coded] | None:
        """Gives codes and scales of the same input; None where the quantizer's values are no such codes."""
        inner = quantize.quantize if isinstance(quantize, ReadBySeveral) else quantize
        if not isinstance(inner, Symmetric) or inner.bits > 8:
            return None
        if not isinstance(quantize, ReadBySeveral):
            return inner.codes
        if id(quantize) not in self._made:
            self._made[id(quantize)] = (quantize, ReadBySeveral(inner.codes, quantize.readers))
        return self._made[id(quantize)][1]


def refuse_device(device: torch.device, planned: str = "") -> None:
    """Raises InvalidInput where nothing multiplies packed codes, or what does is not what was `planned` (cpu, gpu)."""
    kind = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    if kind is None:
        raise InvalidInput(f"run: packed on {device.type}: there are products for cpu and cuda; run: fake has accuracy")
    if planned and planned != kind:
        raise InvalidInput(f"run: packed was planned for a {planned.upper()}, but this worker is on {device.type}")
    if kind == "gpu":
        kernel_products.require_triton()


def product_of(
    quantized: QuantizedWeight,
    quantize: Quantizer | None,
    dtype: torch.dtype,
    sharing: Sharing,
    device: torch.device = CPU,
) -> Product:
    """The product for a layer's weight, inputs quantized by `quantize`, in a model of `dtype` on a device.

    Raises InvalidInput for weights that are neither codes on a uniform grid nor sign planes.
    """
    parts = _Parts.of(quantized)
    if parts is None:
        kinds = type(quantized).__name__
        raise InvalidInput(f"run: packed: {quantized.solver} makes a {kinds}, whose codes no operator multiplies")
    weight, codes = parts.base, sharing.codes(quantize)
    plain, on_gpu = parts.factor is None and not parts.terms, device.type == "cuda"
    uniform = weight if isinstance(weight, UniformWeight) else None
    if uniform and plain and codes is not None and _takes_int8(uniform):
        return (kernel_products.Int8Product if on_gpu else Int8Product).build(uniform, codes)
    inner: Product | None = None
    if on_gpu:
        inner = kernel_products.build(weight)
    elif uniform and _takes_int4(uniform, dtype):
        inner = Int4Product.build(uniform, dtype)
    elif uniform and _takes_w8(uniform, dtype):
        inner = W8Product.build(uniform, dtype)
    rounded = "" if quantize is None else "; inputs rounded in floating point"
    if inner is None:
        return UnpackedProduct.build(quantized, weight, quantize or as_given, dtype, rounded)
    return Around(
        inner=inner,
        quantize=quantize or as_given,
        factor=None if parts.factor is None else parts.factor.to(dtype),
        terms=tuple((left.to(dtype), right.to(dtype)) for left, right in parts.terms),
        rounded=rounded,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """A weight taken apart: codes, one factor per input column, low-rank terms that are added to it."""

    base: Base
    factor: Tensor | None
    terms: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(quantized: QuantizedWeight) -> _Parts | None:
        terms, factor, node = [], None, quantized
        while isinstance(node, LowRank):
            if not node.branch:  # branches see the input as it is, and stay with the layer
                terms.append((node.left, node.right))
            node = node.base
        if isinstance(node, ColumnScaled):
            factor, node = node.factor, node.base
        return _Parts(base=node, factor=factor, terms=tuple(terms)) if isinstance(node, Base) else None


def _takes_int8(weight: UniformWeight) -> bool:
    return weight.scale.shape[1] == 1 and weight.g_idx is None and weight.shape[1] <= SUMS


def _takes_int4(weight: UniformWeight, dtype: torch.dtype) -> bool:
    rows, columns = weight.shape
    group = columns // weight.scale.shape[1]
    fits = group in INT4_GROUPS and rows % INT4_ROWS == 0 and weight.g_idx is None
    return weight.bits == 4 and fits and dtype in (torch.bfloat16, torch.float16)


def _takes_w8(weight: UniformWeight, dtype: torch.dtype) -> bool:
    fits = weight.scale.shape[1] == 1 and weight.g_idx is None and weight.shape[1] % W8_INPUTS == 0
    return weight.bits == 8 and weight.zero is None and fits and dtype == torch.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Product:
    """y = s_x s_w (sum q_x q_w - z sum q_x), q_w and z counted from the middle of their range."""

    inputs: Callable[[Tensor], Coded]
    codes: Tensor  # int8 [out, in]
    scale: Tensor  # float32 [out]
    zero: Tensor | None  # float32 [out]; None: 0
    bits: int

    @staticmethod
    def build(weight: UniformWeight, inputs: Callable[[Tensor], Coded]) -> Int8Product:
        rows = len(weight.codes)
        return Int8Product(
            inputs=inputs,
            codes=signed(weight).contiguous(),
            scale=by_row(weight.scale, rows)[:, 0].float().contiguous(),
            zero=signed_zero(weight),
            bits=weight.bits,
        )

    @property
    def path(self) -> str:
        held = "" if self.bits == 8 else f", {self.bits}-bit codes held in bytes"
        return f"int8 (torch._int_mm{held})"

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self.inputs(x)
        flat = codes.reshape(-1, codes.shape[-1])
        sums = torch._int_mm(flat, self.codes.t()).float()  # a column-major operand is fast, a row-major one is not
        if self.zero is not None:
            sums -= flat.sum(-1, keepdim=True, dtype=torch.int32).float() * self.zero
        y: Tensor = (sums * scale.reshape(-1, 1) * self.scale).to(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return nbytes(self.codes, self.scale, self.zero)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Product:
    """y = sum_g sum_k x (s (q - 8) + o), o = s (8 - z) of the group, both in the model's dtype."""

    words: Tensor  # uint8 [out, in / 2], in the operator's own order
    scales: Tensor  # model's dtype [groups, out, 2]: s and o
    group: int

    @staticmethod
    def build(weight: UniformWeight, dtype: torch.dtype) -> Int4Product:
        rows, columns = weight.shape
        scale = by_row(weight.scale, rows).to(dtype)
        # Of the rounded scale, so that codes at the zero point stay as near to 0 as the dtype allows.
        offset = torch.zeros_like(scale)
        if weight.zero is not None:
            offset = (scale.float() * (8.0 - by_row(weight.zero, rows).float())).to(dtype)
        return Int4Product(
            words=torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32).contiguous(), 1),
            scales=torch.stack([scale.T, offset.T], dim=-1).contiguous(),
            group=columns // weight.scale.shape[1],
        )

    @property
    def path(self) -> str:
        kind = str(self.scales.dtype).removeprefix("torch.")
        return f"int4 (torch._weight_int4pack_mm_for_cpu, scales and zeros in {kind})"

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.words, self.group, self.scales)
        return y.reshape(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return nbytes(self.words, self.scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class W8Product:
    """y = s sum x q, the scale in bfloat16."""

    codes: Tensor  # int8 [out, in]
    scale: Tensor  # bfloat16 [out]

    @staticmethod
    def build(weight: UniformWeight, dtype: torch.dtype) -> W8Product:
        scale = by_row(weight.scale, len(weight.codes))[:, 0].to(dtype)
        return W8Product(codes=signed(weight).contiguous(), scale=scale.contiguous())

    @property
    def path(self) -> str:
        return "w8 (torch._weight_int8pack_mm, scales in bfloat16)"

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), self.codes, self.scale)
        return y.reshape(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return nbytes(self.codes, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Around:
    """An operator's product of rounded inputs, times one factor per input column, with low-rank terms beside it."""

    inner: Product
    quantize: Quantizer
    factor: Tensor | None  # [in]
    terms: tuple[tuple[Tensor, Tensor], ...]  # left [out, rank], right [rank, in]
    rounded: str

    @property
    def path(self) -> str:
        apart = "; column factors and low-rank terms apart" if self.factor is not None or self.terms else ""
        return f"{self.inner.path}{apart}{self.rounded}"

    def __call__(self, x: Tensor) -> Tensor:
        x = self.quantize(x)
        y = self.inner(x if self.factor is None else x * self.factor)
        for left, right in self.terms:
            y = y + nn.functional.linear(nn.functional.linear(x, right), left)
        return y

    def nbytes(self) -> int:
        return self.inner.nbytes() + nbytes(self.factor, *(part for pair in self.terms for part in pair))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnpackedProduct:
    """The weight unpacked and dequantized at each call, as the simulation has it: codes packed without padding."""

    tree: QuantizedWeight  # its codes are data of `pack_codes`
    base: Base  # of the tree
    columns: int
    quantize: Quantizer
    dtype: torch.dtype
    rounded: str

    @staticmethod
    def build(
        quantized: QuantizedWeight, base: Base, quantize: Quantizer, dtype: torch.dtype, rounded: str
    ) -> UnpackedProduct:
        data = base.codes if base.bits == 8 else pack_codes(base.codes, base.bits)
        held = _with_codes(base, data)
        tree = _with_base(quantized, held)
        return UnpackedProduct(
            tree=tree, base=held, columns=base.shape[1], quantize=quantize, dtype=dtype, rounded=rounded
        )

    @property
    def path(self) -> str:
        return f"unpack ({self.base.bits}-bit codes dequantized at each call{self.rounded})"

    def weight(self) -> Tensor:
        """[out, in] in the model's dtype."""
        base = self.base
        codes = base.codes if base.bits == 8 else unpack_codes(base.codes, base.bits, self.columns)
        return apart(_with_base(self.tree, _with_codes(base, codes)))[0].to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.quantize(x), self.weight())

    def nbytes(self) -> int:
        return _held(self.tree)


def _with_codes(base: Base, codes: Tensor) -> Base:
    changed: Base = dataclasses.replace(base, codes=codes)  # type: ignore[type-var]  # both kinds are dataclasses
    return changed


def _with_base(tree: QuantizedWeight, base: Base) -> QuantizedWeight:
    if isinstance(tree, ColumnScaled | LowRank):
        return dataclasses.replace(tree, base=_with_base(tree.base, base))
    return base


def _held(tree: QuantizedWeight) -> int:
    """Bytes of a weight's tensors as they lie in memory."""
    if isinstance(tree, ColumnScaled):
        return _held(tree.base) + nbytes(tree.factor)
    if isinstance(tree, LowRank):
        return _held(tree.base) + (0 if tree.branch else nbytes(tree.left, tree.right))
    return nbytes(*(value for value in vars(tree).values() if isinstance(value, Tensor)))
