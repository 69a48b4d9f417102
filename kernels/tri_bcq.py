"""Sign planes times one vector, by tables of sums (LUT-GEMM, arXiv 2206.09557).

For every run of `mu` inputs a table holds the 2^mu sums of them with all combinations of signs; a plane's bits are then
addresses, and mu multiplications become one look-up:

    y[n] = sum over groups of  (sum over planes p of alpha[p, n] * (sum of look-ups)) + offset[n] * (sum of x)

A warp's 32 look-ups cost about one wavefront while a row of the table has at most 128 bytes, so mu is 4 in float32;
mu = 8 halves the instructions and loses more to bank conflicts (a simulation, not measured). Tables and sums are
float32, where the published kernel has float16. A split K is added by torch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfarm.kernels.pack import SIGNS, BCQWeight
from qfarm.kernels.tri_weight import splits

RUN = 4  # inputs per look-up (mu)
CHUNK = 4  # words of a plane that a step of the loop covers, at most
TABLE_ROWS = 64


def gemv(
    x: Tensor, weight: BCQWeight, run: int = RUN, block: int = 512, split: int | None = None, warps: int = 4
) -> Tensor:
    """x [K] -> float32 [N]. Raises ValueError for other shapes, and runs that do not divide 8."""
    if x.shape != (weight.columns,):
        raise ValueError(f"inputs {list(x.shape)}: expected [{weight.columns}]")
    words = len(weight.planes)
    inputs = torch.nn.functional.pad(x, (0, words * SIGNS - weight.columns))
    of_group = words if weight.group == weight.columns else weight.group // SIGNS
    chunk = math.gcd(of_group, CHUNK)
    table = build_table(inputs, run)
    sums = inputs.float().reshape(-1, chunk * SIGNS).sum(1)
    blocks, steps = triton.cdiv(weight.rows, block), words // chunk
    split = splits(blocks, steps, x) if split is None else split
    out = torch.empty(split, weight.rows, dtype=torch.float32, device=x.device)
    bcq_gemv[(blocks, split)](
        table,
        sums,
        weight.planes,
        weight.alpha,
        weight.alpha if weight.offset is None else weight.offset,
        out,
        weight.rows,
        steps,
        BITS=weight.bits,
        MU=run,
        WORDS=chunk,
        PER_GROUP=of_group // chunk,
        OFFSET=weight.offset is not None,
        BN=block,
        SPLIT_K=split,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return out[0] if split == 1 else out.sum(0)


def build_table(x: Tensor, run: int) -> Tensor:
    """x [K] -> float32 [K / run, 2^run]: entry c of a row is the sum of its inputs, + where c has a bit, else -."""
    if 8 % run:
        raise ValueError(f"runs of {run}: expected 1, 2, 4 or 8")
    rows = len(x) // run
    table = torch.empty(rows, 2**run, dtype=torch.float32, device=x.device)
    bcq_lut[(triton.cdiv(rows, TABLE_ROWS),)](x, table, rows, MU=run, BR=TABLE_ROWS, num_warps=4, enable_fp_fusion=True)
    return table


@triton.jit
def bcq_lut(x, table, rows, MU: tl.constexpr, BR: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, 1 << MU)
    v = tl.zeros((BR, 1 << MU), tl.float32)
    for t in tl.static_range(MU):
        xt = tl.load(x + r * MU + t, mask=r < rows, other=0.0).to(tl.float32)
        v += tl.where(((c >> t) & 1)[None, :] != 0, xt[:, None], -xt[:, None])
    tl.store(table + r[:, None] * (1 << MU) + c[None, :], v, mask=(r < rows)[:, None])


@triton.jit
def bcq_gemv(
    table,
    sums,
    planes,
    alpha,
    offset,
    y,
    N,
    steps,
    BITS: tl.constexpr,
    MU: tl.constexpr,
    WORDS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    BN: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    # table float32 [K / MU, 2^MU]; planes int32 [K / 32, BITS, N]; sums float32 [steps], of a step's WORDS * 32 inputs
    part_k = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    row = tl.cast(N, tl.int64)
    acc = tl.zeros((BN,), tl.float32)
    for t in range(part_k, steps, SPLIT_K):
        g = t // PER_GROUP
        for p in tl.static_range(BITS):
            d = tl.zeros((BN,), tl.float32)
            for i in tl.static_range(WORDS):
                w = tl.load(planes + ((t * WORDS + i) * BITS + p) * row + n, mask=inside, other=0)
                for u in tl.static_range(32 // MU):
                    entry = (w >> (MU * u)) & ((1 << MU) - 1)
                    d += tl.load(table + ((t * WORDS + i) * (32 // MU) + u) * (1 << MU) + entry)
            a = tl.load(alpha + (g * BITS + p) * row + n, mask=inside, other=0.0).to(tl.float32)
            acc += a * d
        if OFFSET:
            acc += tl.load(offset + g * row + n, mask=inside, other=0.0).to(tl.float32) * tl.load(sums + t)
    tl.store(y + part_k * row + n, acc, mask=inside)
