"""Packing codes of any width into bytes along the last axis: eight codes of b bits fill b bytes, low end first."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n], values below 2^bits, -> uint8 [..., ceil(n / 8) x bits]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % _GROUP))
    groups = padded.reshape(*codes.shape[:-1], -1, _GROUP).long()
    words = (groups << _shifts(bits, codes.device)).sum(-1, keepdim=True)  # int64, the low bits of which are used
    data: Tensor = words.view(torch.uint8)[..., :bits].flatten(-2)
    return data


def unpack_codes(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: uint8 [..., count]."""
    groups = torch.nn.functional.pad(data.reshape(*data.shape[:-1], -1, bits), (0, _GROUP - bits))
    words = groups.contiguous().view(torch.int64)
    codes = (words >> _shifts(bits, data.device)) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(_GROUP, device=device) * bits
