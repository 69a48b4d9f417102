"""Blocks: GGUF's types of 32 columns with one float16 scale d. Packed by hand: the library would round again.

    Q4_0  18 bytes  d (n - 8)    byte j holds n[j], and n[j + 16] above it
    Q5_0  22 bytes  d (n - 16)   after d four bytes whose bit j is bit 4 of n[j], the low bits then as in Q4_0
    Q8_0  34 bytes  d n          n is an int8

A grid is held exactly where code less zero fits: in b bits for symmetric grids of b bits, which have no zero point but
the middle, in b + 1 bits for asymmetric ones. So 4 bits asymmetric go into Q5_0, and 8 bits asymmetric into none.
A group of more than 32 columns, or a whole row, has its scale in each of its blocks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qfarm.quantized import UniformWeight

COLUMNS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockType:
    name: str  # in the library's `GGMLQuantizationType`
    bits: int

    @property
    def bytes(self) -> int:
        """Of one block: d and the numbers."""
        return 2 + COLUMNS * self.bits // 8


TYPES = tuple(BlockType(name=name, bits=bits) for name, bits in (("Q4_0", 4), ("Q5_0", 5), ("Q8_0", 8)))


def block_type(bits: int, symmetric: bool) -> BlockType | None:
    """The smallest type that holds every code of such a grid less its zero; None where there is none."""
    needed = bits if symmetric else bits + 1
    return next((one for one in TYPES if one.bits >= needed), None)


def blocks(layer: UniformWeight) -> Tensor:
    """uint8 [rows, columns / 32 * bytes of a block], of a layer that has a block type and groups of whole blocks."""
    kind = block_type(layer.bits, layer.zero is None)
    assert kind is not None
    rows, columns = layer.shape
    width = columns // layer.scale.shape[1]  # of a group
    zero = torch.full_like(layer.scale, 2 ** (layer.bits - 1)) if layer.zero is None else layer.zero
    zeros = zero.cpu().to(torch.int16).repeat_interleave(width, 1)
    numbers = (layer.codes.cpu().to(torch.int16) - zeros).reshape(rows, -1, COLUMNS)
    scales = layer.scale.cpu().to(torch.float16).repeat_interleave(width // COLUMNS, 1)  # [rows, blocks]
    parts = [scales[..., None].contiguous().view(torch.uint8)]
    if kind.bits == 8:
        parts.append(numbers.to(torch.int8).view(torch.uint8))
    else:
        unsigned = (numbers + 2 ** (kind.bits - 1)).to(torch.uint8)
        if kind.bits == 5:
            fifth = (unsigned >> 4).reshape(rows, -1, 4, 8)
            parts.append((fifth << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8))
        low = unsigned & 15
        parts.append(low[..., :16] | low[..., 16:] << 4)
    return torch.cat(parts, dim=-1).reshape(rows, -1)


def interleaved(rows: int, heads: int) -> Tensor:
    """The order in which this format has the rows of queries and keys: of each head, pairs that are turned together.

    transformers keeps the first halves of all pairs before the second ones.
    """
    return torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
