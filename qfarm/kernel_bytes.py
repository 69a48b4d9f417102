"""Kernel bytes: what a quantized layer takes in the layout that kernels read, and where it differs from what is stored.

Stored bytes count codes packed along a row, scales and zeros as they are kept. Kernels read tiles of 16 words
(`kernels/pack.py`), whose formula this is:

    ceil(K / P) P N b / 8 + (K / g) N (s + z)     P = 512 / b inputs per tile, b of 1, 2, 3, 4 or 8 bits

s is 2 bytes for a float16 scale, 4 for others (bfloat16 has too few bits for kernels and becomes float32, exactly), z
is 2 for integer zeros in float16, 4 for scale times zero in float32 where zeros are no integers, 0 without. The
difference is told by cause; the causes add up to it exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from qfarm.kernels import pack
from qfarm.quantized import ColumnScaled, LowRank, QuantizedWeight, UniformWeight, packed_words

CAUSES = ("padding", "wider_codes", "scales", "zeros")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelBytes:
    total: int
    # Kernel bytes minus stored bytes: tiles filled up beyond the words of a row, codes held in the next width that has
    # a layout, dtype and number of the scales, dtype of the zeros.
    causes: Mapping[str, int]


def kernel_bytes(quantized: QuantizedWeight) -> KernelBytes | str:
    """Of one layer's weight, or the reason why kernels have no layout for it."""
    base = quantized
    while isinstance(base, ColumnScaled | LowRank):  # what stands around the codes is kept as it is
        base = base.base
    if not isinstance(base, UniformWeight):
        return f"{type(base).__name__} has no tiles"
    rows, columns = base.shape
    groups = base.scale.shape[1]
    bits = pack.held_bits(base.bits)
    group, tile = columns // groups, pack.tile_inputs(bits)
    if group != columns and (group % pack.TILE_WORDS or (tile % group and group % tile)):
        return f"groups of {group} fit no tile of {tile} inputs"
    scale = 2 if base.scale.dtype == torch.float16 else 4
    integers = base.zero is not None and not base.zero.is_floating_point()
    zero = 0 if base.zero is None else 2 if integers else 4
    words = 4 * rows * packed_words(columns, bits)
    stored_zeros = base.stored_bytes() - dataclasses.replace(base, zero=None).stored_bytes()
    causes = {
        "padding": pack.weight_bytes(rows, columns, bits, columns, 0, 0) - words,
        "wider_codes": words - 4 * rows * packed_words(columns, base.bits),
        "scales": rows * groups * scale - base.scale.numel() * base.scale.element_size(),
        "zeros": rows * groups * zero - stored_zeros,
    }
    return KernelBytes(total=quantized.stored_bytes() + sum(causes.values()), causes=causes)


def of_layers(layers: Mapping[str, KernelBytes | str]) -> KernelBytes | str:
    """The sum over layers by name, or the first reason why one has none."""
    causes = dict.fromkeys(CAUSES, 0)
    total = 0
    for name, one in layers.items():
        if isinstance(one, str):
            return f"{name}: {one}"
        total += one.total
        causes = {cause: causes[cause] + one.causes[cause] for cause in CAUSES}
    return KernelBytes(total=total, causes=causes)
