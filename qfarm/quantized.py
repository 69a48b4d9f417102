"""Quantized weights: what a solver returns for one linear layer, in memory and packed for disk.

`dequantize()` is the only source of the weight that is evaluated; `stored_bytes()` equals the size of the tensors of
`packed()` to the byte. Pieces combine: a low-rank term or a scale per input column goes on top of any base.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qfarm.quantizer import Grid


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


@runtime_checkable
class SignPlanes(QuantizedWeight, Protocol):
    """Codes whose bits are signs of planes, each with a factor per row and group."""

    codes: Tensor  # uint8 [rows, columns]; bit i belongs to plane i

    def sign_planes(self) -> tuple[Tensor, Tensor | None]:
        """Factors [rows, groups, bits], + where bit i is set and - where not, and an offset [rows, groups]: the sum."""
        ...


def input_factor(quantized: QuantizedWeight) -> Tensor | None:
    """What the layer's input is multiplied by before its quantizer, [columns]; None: nothing."""
    if isinstance(quantized, ColumnScaled) and quantized.of_input:
        return quantized.factor
    return input_factor(quantized.base) if isinstance(quantized, _OnTop) else None


def payload_bits(quantized: QuantizedWeight) -> float:
    """Bits per weight without scales and zeros: `bits`, unless the weight has `payload_bits` of its own."""
    if isinstance(quantized, _OnTop):
        return payload_bits(quantized.base)
    return float(getattr(quantized, "payload_bits", quantized.bits))


@dataclasses.dataclass(kw_only=True)
class UniformWeight:
    """Codes on a uniform grid.

    `packed()` holds the tensors of compressed-tensors' pack-quantized format, bit for bit, but for `weight_shape`,
    which a checkpoint adds, and for what that format lacks: `weight_g_idx` and floating zeros.
    """

    codes: Tensor  # uint8 [rows, columns]
    scale: Tensor  # [rows, groups], storage dtype; [1, 1]: one grid for the whole matrix
    zero: Tensor | None  # [rows, groups]: uint8, or floating where a method fits it; None: symmetric, 2^(b-1)
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
        scales, groups = self.scale.shape  # of each column of scales: as many as rows, or one
        total = 4 * rows * packed_words(columns, self.bits) + groups * scales * self.scale.element_size()
        if self.zero is not None:
            floating = self.zero.is_floating_point()
            total += groups * (scales * self.zero.element_size() if floating else 4 * packed_words(scales, self.bits))
        if self.g_idx is not None:
            total += 4 * columns
        return total

    def packed(self) -> dict[str, Tensor]:
        tensors = {"weight_packed": pack_bits(self.codes, self.bits), "weight_scale": self.scale}
        if self.zero is not None and self.zero.is_floating_point():
            tensors["weight_zero_point"] = self.zero
        elif self.zero is not None:
            # Zeros are packed along the output rows, as compressed-tensors does.
            tensors["weight_zero_point"] = pack_bits(self.zero.T.contiguous(), self.bits).T.contiguous()
        if self.g_idx is not None:
            tensors["weight_g_idx"] = self.g_idx.to(torch.int32)
        return tensors

    def row_range(self, start: int, stop: int) -> UniformWeight:
        own = slice(start, stop) if len(self.scale) == len(self.codes) else slice(None)
        zero = None if self.zero is None else self.zero[own]
        part = dataclasses.replace(self, codes=self.codes[start:stop], scale=self.scale[own], zero=zero)
        part.notes = dict(self.notes)
        return part


@dataclasses.dataclass(kw_only=True)
class _OnTop:
    """Something on top of a base: what it is a matrix of is the base's."""

    base: QuantizedWeight
    solver: str
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def bits(self) -> int:
        return self.base.bits

    @property
    def group_size(self) -> int:
        return self.base.group_size


@dataclasses.dataclass(kw_only=True)
class ColumnScaled(_OnTop):
    """A base times one factor per input column. Stored as a vector, unless the producer of the input absorbs it."""

    factor: Tensor  # [columns], storage dtype
    folded: bool  # absorbed by the preceding operator: nothing is stored
    of_input: bool = False  # the input is multiplied by it before it is quantized, where it is

    def dequantize(self) -> Tensor:
        return self.base.dequantize() * self.factor.float()

    def stored_bytes(self) -> int:
        return self.base.stored_bytes() + (0 if self.folded else self.factor.numel() * self.factor.element_size())

    def packed(self) -> dict[str, Tensor]:
        return self.base.packed() | ({} if self.folded else {"weight_column_scale": self.factor})

    def row_range(self, start: int, stop: int) -> ColumnScaled:
        return dataclasses.replace(self, base=self.base.row_range(start, stop), notes=dict(self.notes))


@dataclasses.dataclass(kw_only=True)
class LowRank(_OnTop):
    """A base plus `left @ right`, a low-rank term kept in a floating dtype.

    As a branch it is computed apart from the base, on inputs as they are before a quantizer.
    """

    left: Tensor  # [rows, rank], storage dtype
    right: Tensor  # [rank, columns], storage dtype
    branch: bool = False

    def dequantize(self) -> Tensor:
        return self.base.dequantize() + self.left.float() @ self.right.float()

    def stored_bytes(self) -> int:
        return self.base.stored_bytes() + sum(t.numel() * t.element_size() for t in (self.left, self.right))

    def packed(self) -> dict[str, Tensor]:
        tensors = self.base.packed()
        # A term on top of a term: the inner one keeps its plain names.
        inner = sum(name.startswith("weight_left") for name in tensors)
        suffix = f"_{inner}" if inner else ""
        return tensors | {f"weight_left{suffix}": self.left, f"weight_right{suffix}": self.right}

    def row_range(self, start: int, stop: int) -> LowRank:
        base = self.base.row_range(start, stop)
        return dataclasses.replace(self, base=base, left=self.left[start:stop], notes=dict(self.notes))


def apart(quantized: QuantizedWeight) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The weight without its branches, float32, and these as one: left [rows, rank] and right [rank, columns]."""
    if not isinstance(quantized, LowRank):
        return quantized.dequantize(), None
    left, right = quantized.left.float(), quantized.right.float()
    weight, inner = apart(quantized.base)
    if not quantized.branch:
        return weight + left @ right, inner
    return weight, (left, right) if inner is None else (torch.cat([inner[0], left], 1), torch.cat([inner[1], right]))


def packed_words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, n] -> int32 [rows, ceil(n * bits / 32)]: code i in bits i*b .. i*b+b-1, low end first."""
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
