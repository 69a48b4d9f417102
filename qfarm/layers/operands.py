"""Operands: a uniform weight's codes and grids in the forms that operators and kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from qfarm.quantized import UniformWeight

Coded = tuple[Tensor, Tensor]  # inputs: codes int8 [..., n], scales float32 [..., 1]


def by_row(values: Tensor, rows: int) -> Tensor:
    """[rows, groups], also where one grid serves the whole matrix."""
    return values.expand(rows, values.shape[1])


def signed(weight: UniformWeight) -> Tensor:
    """Codes minus half their range, int8 [rows, columns]."""
    return (weight.codes.to(torch.int16) - (1 << (weight.bits - 1))).to(torch.int8)


def signed_zero(weight: UniformWeight) -> Tensor | None:
    """Zeros of a weight with one grid per row, counted from the middle of the range, float32 [rows]; None: 0."""
    if weight.zero is None:
        return None
    return by_row(weight.zero, len(weight.codes))[:, 0].float() - 2.0 ** (weight.bits - 1)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
