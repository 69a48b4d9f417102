"""What each kernel computes, in plain torch: the definition that kernels are held against.

References take the tensors that kernels take, unpack codes exactly and add up in float64. Quantizers are float32 with
true division and rounding half to even, so that a kernel's codes must be equal to theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qfarm.kernels.pack import BCQWeight, Int8Weight, PackedKV, T16Weight, pack_kv

TINY = torch.finfo(torch.float32).tiny  # below the smallest normal number a scale would lose its precision
INT8_TOP = 127


def linear(x: Tensor, weight: T16Weight | BCQWeight) -> Tensor:
    """x [M, K] -> float64 [M, N]: sum over k of x * s * (q - z), or of sums of signs for BCQ."""
    return x.double() @ weight.dequantize(torch.float64).T


def int8_linear(codes: Tensor, scale: Tensor, weight: Int8Weight) -> Tensor:
    """int8 [M, K] and scale [M] -> float64 [M, N]; the sum of products is exact."""
    total = codes[:, : weight.columns].double() @ weight.codes().double().T
    return total * scale.double()[:, None] * weight.scale.double()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 codes and float32 scale [M] = max|x| / 127, 1 for a row of zeros."""
    largest = x.float().abs().amax(1)
    scale = torch.where(largest > 0, largest, float(INT8_TOP)) / INT8_TOP
    codes = (x.float() / scale[:, None]).round().clamp(-INT8_TOP, INT8_TOP)
    return codes.to(torch.int8), scale


def sign_table(x: Tensor, run: int) -> Tensor:
    """x [K] -> float64 [K / run, 2^run]: entry c of a row is the sum of its inputs, + where c has a bit, else -."""
    entries = torch.arange(2**run, device=x.device)
    signs = ((entries[:, None] >> torch.arange(run, device=x.device)) & 1).double() * 2 - 1  # [2^run, run]
    return x.double().reshape(-1, run) @ signs.T


def kv_scores(queries: Tensor, keys: PackedKV, scaling: float) -> Tensor:
    """queries [heads, R, channels] -> float64 [heads, R, tokens]."""
    return queries.double() @ keys.dequantize(torch.float64).mT * scaling


def kv_values(weights: Tensor, values: PackedKV) -> Tensor:
    """weights [heads, R, tokens] (of the softmax) -> float64 [heads, R, channels]."""
    return weights.double() @ values.dequantize(torch.float64)


def quantize_kv(x: Tensor, bits: int, group: int, by_channel: bool) -> PackedKV:
    """x [heads, tokens, channels] -> q = round(clamp((x - m) / s, 0, 2^b - 1)), s = (max - m) / (2^b - 1) per group.

    Scale and minimum are rounded to float16 before codes are computed; a constant group has s = 1 (section 3.1 of
    arXiv 2402.02750; `qfarm.methods.kivi`).
    """
    heads, tokens, channels = x.shape
    top = 2.0**bits - 1
    shape = (heads, tokens // group, group, channels) if by_channel else (heads, tokens, channels // group, group)
    axis = 2 if by_channel else 3
    grouped = x.float().reshape(shape)
    low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, 1.0)
    minimum = low.half().float()
    codes = ((grouped - minimum) / scale).clamp(0, top).round().to(torch.uint8).reshape(x.shape)
    return pack_kv(codes, scale.squeeze(axis), minimum.squeeze(axis), bits, group, by_channel)


def hadamard(x: Tensor) -> Tensor:
    """x [..., 2^p] -> float64 x H / sqrt(n), H in natural (Sylvester) order, by butterflies."""
    size = x.shape[-1]
    values = x.double()
    step = 1
    while step < size:
        pairs = values.reshape(*x.shape[:-1], size // (2 * step), 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack([first + second, first - second], dim=-2).reshape(x.shape)
        step *= 2
    return values / math.sqrt(size)


def crossquant_factors(rows: Tensor, columns: Tensor, alpha: float, bits: int) -> tuple[Tensor, Tensor]:
    """Largest magnitudes [M] and [N] -> the two factors of CrossQuant's step t^alpha c^(1 - alpha) / (2^(b-1) - 1).

    The power of a row or column of zeros is 1, as its values are then whatever its partner's step rounds 0 to: 0.
    """
    top = 2.0 ** (bits - 1) - 1
    rows, columns = torch.where(rows > 0, rows, 1.0), torch.where(columns > 0, columns, 1.0)
    return rows.float().pow(alpha) / top, columns.float().pow(1 - alpha)


def crossquant(x: Tensor, alpha: float, bits: int) -> Tensor:
    """x [M, N] -> fake quantized in float32 by the step of each row and column (arXiv 2410.07505)."""
    top = 2.0 ** (bits - 1) - 1
    values = x.float()
    row, column = crossquant_factors(values.abs().amax(1), values.abs().amax(0), alpha, bits)
    step = row[:, None] * column
    return (values / step).round().clamp(-top, top) * step


def fake_quantize(x: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """x [M, K] -> float32, in groups of a row, by the rules of round to nearest.

    symmetric    s = max|x| / (2^(b-1) - 1), codes of the restricted range
    asymmetric   s = (max(x, 0) - min(x, 0)) / (2^b - 1), z = round(-min(x, 0) / s)
    """
    values = x.float().reshape(x.shape[0], -1, group)
    if symmetric:
        top = 2.0 ** (bits - 1) - 1
        scale = (values.abs().amax(-1, keepdim=True) / top).clamp(min=TINY)
        return ((values / scale).round().clamp(-top, top) * scale).reshape(x.shape)
    top = 2.0**bits - 1
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp(min=TINY)
    zero = (-low / scale).round().clamp(0, top)
    return ((((values / scale).round() + zero).clamp(0, top) - zero) * scale).reshape(x.shape)
