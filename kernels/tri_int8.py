"""INT8: matrix products with a scale per token and per output channel, and the row quantizer that feeds them.

    y[m, n] = (sum over k of a[m, k] b[n, k], exact in int32) * sa[m] * sb[n]

Both operands have K contiguous. B is loaded as [BN, BK] and transposed in registers: loading it already transposed
through pointers costs 168 byte permutations per 64 tensor-core instructions. Sums stay below 2^31 for K <= 133,143.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfarm.kernels.pack import INT8_ALIGNMENT, Int8Weight

LONGEST = 133_143  # inputs whose int32 sum of products of +-127 cannot overflow
LONGEST_ROW = 65_536  # one program holds a row
QUANTIZER_WARPS = 8


def gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Int8Weight,
    dtype: torch.dtype,
    blocks: tuple[int, int, int] = (128, 128, 64),
    warps: int = 4,
    stages: int = 4,
) -> Tensor:
    """int8 [M, K] (K padded as the weight's) and float32 scale [M] -> [M, N] in `dtype`. Raises ValueError."""
    rows, padded = weight.values.shape
    if codes.shape[1] != padded or codes.dtype != torch.int8:
        raise ValueError(f"inputs {codes.dtype} {list(codes.shape)}: expected int8 [M, {padded}]")
    if padded > LONGEST:
        raise ValueError(f"{padded} inputs: sums of products are exact up to {LONGEST}")
    height, width, depth = blocks
    out = torch.empty(len(codes), rows, dtype=dtype, device=codes.device)
    i8_gemm[(triton.cdiv(len(codes), height), triton.cdiv(rows, width))](
        codes,
        weight.values,
        scale,
        weight.scale,
        out,
        len(codes),
        rows,
        padded,
        codes.stride(0),
        weight.values.stride(0),
        out.stride(0),
        BM=height,
        BN=width,
        BK=depth,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return out


def quantize_rows(x: Tensor, warps: int = QUANTIZER_WARPS) -> tuple[Tensor, Tensor]:
    """x [M, K] of any floating dtype -> int8 codes [M, K padded to 16] (0 there) and float32 scale [M]."""
    count, columns = x.shape
    if columns > LONGEST_ROW:
        raise ValueError(f"{columns} inputs: expected at most {LONGEST_ROW}, of which one program takes care")
    padded = -(-columns // INT8_ALIGNMENT) * INT8_ALIGNMENT
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(count, padded, dtype=torch.int8, device=x.device)
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    quant_rows_i8[(count,)](
        x,
        codes,
        scale,
        columns,
        padded,
        x.stride(0),
        BK=triton.next_power_of_2(padded),
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return codes, scale


@triton.jit
def i8_gemm(
    a,
    b,
    sa,
    sb,
    y,
    M,
    N,
    K,
    a_stride,
    b_stride,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows beyond the last read the first: no mask in the loop, and nothing of them is stored.
    m_read = tl.where(m < M, m, 0).to(tl.int64)
    n_read = tl.where(n < N, n, 0).to(tl.int64)
    left = a + m_read[:, None] * a_stride + k[None, :]
    right = b + n_read[:, None] * b_stride + k[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for first in range(0, K, BK):
        there = (k + first < K)[None, :]
        left_block = tl.load(left, mask=there, other=0)
        right_block = tl.load(right, mask=there, other=0)
        acc = tl.dot(left_block, tl.trans(right_block), acc, out_dtype=tl.int32)
        left += BK
        right += BK
    values = acc.to(tl.float32) * tl.load(sa + m_read)[:, None] * tl.load(sb + n_read)[None, :]
    out = y + m[:, None].to(tl.int64) * y_stride + n[None, :]
    tl.store(out, values.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def rint(v):
    """Round half to even, for |v| < 2^22."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def quant_rows_i8(x, codes, scale, K, padded, x_stride, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    v = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(v), 0)
    s = tl.div_rn(tl.where(largest > 0, largest, 127.0), 127.0)
    q = tl.minimum(tl.maximum(rint(tl.div_rn(v, s)), -127.0), 127.0)
    tl.store(codes + row * padded + k, q.to(tl.int8), mask=k < padded)
    tl.store(scale + row, s)
