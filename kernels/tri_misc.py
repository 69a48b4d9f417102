"""Hadamard rotations and fake quantization in one pass each.

`hadamard` computes x H_n / sqrt(n), n = 2^p, by butterflies in registers, in natural (Sylvester) order and float32.
CrossQuant's two passes find the largest magnitude of each row and column, and round by the product of their powers,
which torch computes, so that codes equal the reference's bit for bit. `fake_quantize` rounds groups of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfarm.kernels.reference import crossquant_factors
from qfarm.kernels.tri_int8 import rint

LONGEST = 32_768  # values that one program turns
APPLY_ROWS = 8  # of a program; with 16 a thread's true divisions take 48 registers on sm_80, with a budget of 40
TILE = 4096  # values of a program of `fake_quantize`


# -- launchers --------------------------------------------------------------------------------------------------------


def rotate(x: Tensor) -> Tensor:
    """x [..., n], n a power of two up to 32,768 -> x H_n / sqrt(n) in the dtype of x. Raises ValueError."""
    size = x.shape[-1]
    if size & (size - 1) or not 2 <= size <= LONGEST:
        raise ValueError(f"{size} values: expected a power of two from 2 to {LONGEST}")
    rows = x.contiguous().view(-1, size)
    out = torch.empty_like(rows)
    warps = 4 if size <= 1024 else 8 if size <= 8192 else 16
    hadamard[(len(rows),)](
        rows, out, size**-0.5, N=size, LOGN=size.bit_length() - 1, num_warps=warps, enable_fp_fusion=True
    )
    return out.view(x.shape)


def crossquant(x: Tensor, alpha: float, bits: int) -> Tensor:
    """x [M, N] -> rounded by the step of each row and column, in the dtype of x (`reference.crossquant`)."""
    rows, columns = largest(x)
    row, column = crossquant_factors(rows, columns, alpha, bits)
    return apply_steps(x, row, column, bits)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, N] -> float32 largest magnitudes of rows [M] and columns [N]."""
    x = x.contiguous()
    rows, columns = (torch.zeros(size, dtype=torch.float32, device=x.device) for size in x.shape)
    grid = triton.cdiv(x.shape[0], 32), triton.cdiv(x.shape[1], 256)
    cq_absmax[grid](x, rows, columns, *x.shape, BM=32, BN=256, num_warps=8, enable_fp_fusion=True)
    return rows, columns


def apply_steps(x: Tensor, row: Tensor, column: Tensor, bits: int) -> Tensor:
    """x [M, N] by the steps row [M] * column [N], both float32."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grid = triton.cdiv(x.shape[0], APPLY_ROWS), triton.cdiv(x.shape[1], 256)
    top = 2.0 ** (bits - 1) - 1
    cq_apply[grid](x, row, column, out, *x.shape, top, BM=APPLY_ROWS, BN=256, num_warps=8, enable_fp_fusion=True)
    return out


def fake_quantize(x: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """x [M, K] -> rounded in groups of a row, in the dtype of x (`reference.fake_quantize`). Raises ValueError."""
    group = x.shape[1] if group == -1 else group
    if x.shape[1] % group:
        raise ValueError(f"groups of {group} do not divide {x.shape[1]} columns")
    groups = x.contiguous().view(-1, group)
    out = torch.empty_like(groups)
    width = triton.next_power_of_2(group)
    block = max(1, TILE // width)
    top = 2.0 ** (bits - 1) - 1 if symmetric else 2.0**bits - 1
    fake_quant_groups[(triton.cdiv(len(groups), block),)](
        groups,
        out,
        len(groups),
        group,
        top,
        SYMMETRIC=symmetric,
        BR=block,
        BG=width,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out.view(x.shape)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def hadamard(x, y, factor, N: tl.constexpr, LOGN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N
    i = tl.arange(0, N)
    v = tl.load(x + row + i).to(tl.float32)
    for s in tl.static_range(LOGN):
        pairs = tl.permute(tl.reshape(v, (N // (2 << s), 2, 1 << s)), (0, 2, 1))
        first, second = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (N,))
    tl.store(y + row + i, (v * factor).to(y.dtype.element_ty))


@triton.jit
def cq_absmax(x, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr):
    # row [M] and column [N] float32, zeros before
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    v = tl.load(x + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0)
    v = tl.abs(v.to(tl.float32))
    tl.atomic_max(row + m, tl.max(v, 1), mask=m < M, sem="relaxed")
    tl.atomic_max(column + n, tl.max(v, 0), mask=n < N, sem="relaxed")


@triton.jit
def cq_apply(x, row, column, y, M, N, top, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    corner = tl.program_id(0).to(tl.int64) * BM * N + tl.program_id(1) * BN  # 64 bits once, 32 per element
    place = tl.arange(0, BM)[:, None] * N + tl.arange(0, BN)[None, :]
    v = tl.load(x + corner + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(row + m, mask=m < M, other=1.0)[:, None] * tl.load(column + n, mask=n < N, other=1.0)[None, :]
    q = tl.minimum(tl.maximum(rint(tl.div_rn(v, s)), -top), top)
    tl.store(y + corner + place, (q * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def fake_quant_groups(x, y, rows, group, top, SYMMETRIC: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr):
    # x, y [rows, group]: one grid per row
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.arange(0, BG)
    inside = (r < rows)[:, None] & (k < group)[None, :]
    place = r[:, None].to(tl.int64) * group + k[None, :]
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if SYMMETRIC:
        s = tl.maximum(tl.div_rn(tl.max(tl.abs(v), 1), top), 1.1754943508222875e-38)[:, None]
        q = tl.minimum(tl.maximum(rint(tl.div_rn(v, tl.broadcast_to(s, (BR, BG)))), -top), top)
    else:
        low = tl.minimum(tl.min(v, 1), 0.0)
        high = tl.maximum(tl.max(v, 1), 0.0)
        s = tl.maximum(tl.div_rn(high - low, top), 1.1754943508222875e-38)[:, None]
        z = tl.minimum(rint(tl.div_rn(-low[:, None], s)), top)
        q = rint(tl.div_rn(v, tl.broadcast_to(s, (BR, BG)))) + z
        q = tl.minimum(tl.maximum(q, 0.0), top) - z
    tl.store(y + place, (q * s).to(y.dtype.element_ty), mask=inside)
