"""Weights in 16-word tiles (qfarm.kernels.pack) times a few rows of inputs, and their dequantization.

    y[m, n] = sum over groups of  s * (sum of q x) - s z * (sum of x)

`t16_gemv` runs on CUDA cores. An int32 whose set bits lie in 0 .. 23, read as float32, is that integer times 2^-149
exactly, since subnormal numbers and those of the first exponent are equally spaced. So `w & (15 << 4 i)` is the float
q 2^(4 i - 149); the input of plane i is multiplied by 2^(64 - 4 i) beforehand, which is exact, and the group's sum by
2^85: one AND and one FMA per weight, no shift and no conversion. It needs subnormals (no flush to zero) and inputs
below 2^63 in magnitude; products of less than 2^-64 are lost.

`w4_gemm_small` runs on tensor cores. `prmt` and `lop3` place two codes in the mantissas of two float16 numbers
1024 + q (even planes) or 1024 + 16 q (odd planes); subtracting 1024 + z is exact, so products are, and the scale is
applied to the float32 sum of a group. Zeros that are no integers are corrected after the product by s z * (sum of x).

Partial sums of a split K are added by torch: deterministic, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfarm.kernels.pack import TILE_WORDS, WORD_BITS, T16Weight, tile_inputs

GEMV_ROWS = (
    128  # outputs per program: 80 registers on sm_80, no spills; 256 take 163 and save 0.5 instructions a weight
)
GEMM_ROWS = 128
MULTIPROCESSORS = 108  # where no device says: A100


# -- launchers --------------------------------------------------------------------------------------------------------


def gemv(x: Tensor, weight: T16Weight, block: int = GEMV_ROWS, split: int | None = None, warps: int = 4) -> Tensor:
    """x [M, K] float16, bfloat16 or float32 -> float32 [M, N], every row of x by a pass of its own: for M of 1 to 4."""
    inputs = prepare(x, weight)
    steps = inputs.shape[1] // tile_inputs(weight.bits)
    blocks = triton.cdiv(weight.rows, block)
    split = splits(blocks * len(inputs), steps, inputs) if split is None else split
    out = torch.empty(split, len(inputs), weight.rows, dtype=torch.float32, device=x.device)
    high = weight.words[-1]
    t16_gemv[(blocks, split, len(inputs))](
        inputs,
        weight.words[0],
        high,
        weight.scale,
        _zeros(weight),
        out,
        weight.rows,
        steps,
        len(weight.scale),
        inputs.shape[1],
        len(inputs),
        BITS=weight.bits,
        ZERO=_zero_kind(weight),
        **_groups(weight),
        BN=block,
        SPLIT_K=split,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return _add(out)


def gemm_small(
    x: Tensor,
    weight: T16Weight,
    block: int = GEMM_ROWS,
    split: int | None = None,
    warps: int = 4,
    stages: int = 3,
    asm: bool | None = None,
) -> Tensor:
    """x [M, K] float16 or bfloat16, weight of 4 bits -> float32 [M, N], on tensor cores: for M of 1 to 64.

    `asm` None: PTX where the device is NVIDIA's, shifts and masks elsewhere. Raises ValueError for other widths.
    """
    if weight.bits != 4:
        raise ValueError(f"{weight.bits} bits: expected 4")
    inputs = prepare(x, weight)
    steps = inputs.shape[1] // tile_inputs(4)
    rows = min(64, max(16, triton.next_power_of_2(len(inputs))))
    blocks, heights = triton.cdiv(weight.rows, block), triton.cdiv(len(inputs), rows)
    split = splits(blocks * heights, steps, inputs) if split is None else split
    out = torch.empty(split, len(inputs), weight.rows, dtype=torch.float32, device=x.device)
    sums = inputs
    if weight.scaled_zero is not None:  # float32 [M, groups]: what zeros that are no integers multiply
        sums = x if weight.order is None else x[:, weight.order.long()]
        sums = sums.float().reshape(len(x), -1, weight.group).sum(2)
    w4_gemm_small[(blocks, split, heights)](
        inputs,
        weight.words[0],
        weight.scale,
        _zeros(weight),
        sums,
        out,
        len(inputs),
        weight.rows,
        steps,
        len(weight.scale),
        inputs.shape[1],
        ZERO=_zero_kind(weight),
        **_groups(weight),
        ASM=uses_ptx() if asm is None else asm,
        BM=rows,
        BN=block,
        SPLIT_K=split,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return _add(out)


def dequantize(weight: T16Weight, dtype: torch.dtype, block: int = 64) -> Tensor:
    """The weight [N, K] in float16, bfloat16 or float32, columns in stored order (`T16Weight.order`)."""
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.scale.device)
    steps = weight.padded // tile_inputs(weight.bits)
    t16_dequantize[(triton.cdiv(weight.rows, block), steps)](
        weight.words[0],
        weight.words[-1],
        weight.scale,
        _zeros(weight),
        out,
        weight.rows,
        weight.columns,
        len(weight.scale),
        BITS=weight.bits,
        ZERO=_zero_kind(weight),
        **_groups(weight),
        BN=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def prepare(x: Tensor, weight: T16Weight) -> Tensor:
    """Inputs in the order of the stored columns, padded with zeros to whole tiles, contiguous. Raises ValueError."""
    if x.dim() != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"inputs {list(x.shape)}: expected [M, {weight.columns}]")
    if weight.order is not None:
        x = x[:, weight.order.long()]
    if weight.padded != weight.columns:
        x = torch.nn.functional.pad(x, (0, weight.padded - weight.columns))
    return x.contiguous()


def splits(programs: int, steps: int, like: Tensor) -> int:
    """How many programs share a sum over K: a power of two that gives every multiprocessor two, never an empty one."""
    processors = MULTIPROCESSORS
    if like.is_cuda:
        processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    split = 1
    while programs * split < 2 * processors and split * 2 <= steps:
        split *= 2
    return split


def uses_ptx() -> bool:
    """Whether the current device takes inline PTX: NVIDIA's do. False in the interpreter, which has no device."""
    if triton.knobs.runtime.interpret:
        return False
    return bool(triton.runtime.driver.active.get_current_target().backend == "cuda")


def _zero_kind(weight: T16Weight) -> int:
    return 2 if weight.scaled_zero is not None else 1 if weight.zero is not None else 0


def _zeros(weight: T16Weight) -> Tensor:
    """Zeros as the kernel is given them; any tensor where it reads none."""
    if weight.scaled_zero is not None:
        return weight.scaled_zero
    return weight.scale if weight.zero is None else weight.zero


def _groups(weight: T16Weight) -> dict[str, int]:
    """Planes of a step, of which a group spans GP (all of them: TPG steps per group)."""
    planes = tile_inputs(weight.bits) // TILE_WORDS
    if weight.group == weight.columns:
        return {"PLANES": planes, "GP": planes, "TPG": weight.padded // tile_inputs(weight.bits)}
    spanned = weight.group // TILE_WORDS
    return {"PLANES": planes, "GP": min(spanned, planes), "TPG": max(1, spanned // planes)}


def _add(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


# -- CUDA cores -------------------------------------------------------------------------------------------------------


@triton.jit
def _add_field(w, x, part, BIT: tl.constexpr, WIDTH: tl.constexpr, GAIN: tl.constexpr, BN: tl.constexpr):
    """part + field of w (from bit BIT) * 2^GAIN * x * 2^-85, part and w [BN, 16], x [16]."""
    if BIT + WIDTH <= 24:
        q = (w & (((1 << WIDTH) - 1) << BIT)).to(tl.float32, bitcast=True)
        x = x * (2.0 ** (64 + GAIN - BIT))
    else:
        q = ((w >> 8) & (((1 << WIDTH) - 1) << (BIT - 8))).to(tl.float32, bitcast=True)
        x = x * (2.0 ** (72 + GAIN - BIT))
    return tl.fma(q, tl.broadcast_to(x[None, :], (BN, 16)), part)


@triton.jit
def t16_gemv(
    x,
    words,
    high,
    scale,
    zero,
    y,
    N,
    steps,
    groups,
    x_stride,
    M,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    PLANES: tl.constexpr,
    GP: tl.constexpr,
    TPG: tl.constexpr,
    BN: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    # x [M, x_stride]; words int32 [steps, N, 16] (3 bits: [2 steps, N, 16], high [steps, N, 16]); y [SPLIT_K, M, N]
    part_k = tl.program_id(1)
    m = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    j = tl.arange(0, 16)
    tile = n[:, None] * 16 + j[None, :]
    rows = tl.cast(N, tl.int64) * 16  # of a tile
    x += m * x_stride
    acc = tl.zeros(
        (BN, 16), tl.float32
    )  # reduced once at the end: doing so per step costs 8 to 10 instructions a weight
    for t in range(part_k, steps, SPLIT_K):
        if BITS == 3:
            w = tl.load(words + 2 * t * rows + tile, mask=inside[:, None], other=0)
            w1 = tl.load(words + (2 * t + 1) * rows + tile, mask=inside[:, None], other=0)
            h = tl.load(high + t * rows + tile, mask=inside[:, None], other=0)
        else:
            w = tl.load(words + t * rows + tile, mask=inside[:, None], other=0)
        part = tl.zeros((BN, 16), tl.float32)
        xs = tl.zeros((16,), tl.float32)
        for i in tl.static_range(PLANES):
            xi = tl.load(x + t * (PLANES * 16) + i * 16 + j).to(tl.float32)
            xs += xi
            if BITS == 3:
                if i < 16:
                    part = _add_field(w, xi, part, 2 * i, 2, 0, BN)
                else:
                    part = _add_field(w1, xi, part, 2 * i - 32, 2, 0, BN)
                part = _add_field(h, xi, part, i, 1, 2, BN)
            else:
                part = _add_field(w, xi, part, BITS * i, BITS, 0, BN)
            if i % GP == GP - 1:  # a group ends, or a step of one
                if GP == PLANES:
                    g = t // TPG
                else:
                    g = t * (PLANES // GP) + i // GP
                there = inside & (g + 0 * n < groups)  # padding has no groups; the interpreter wants a vector
                s = tl.load(scale + g * N + n, mask=there, other=0.0).to(tl.float32)
                if ZERO == 0:
                    sz = s * (1 << (BITS - 1))
                elif ZERO == 1:
                    sz = s * tl.load(zero + g * N + n, mask=there, other=0.0).to(tl.float32)
                else:
                    sz = tl.load(zero + g * N + n, mask=there, other=0.0)
                s = s * 38685626227668133590597632.0  # 2^85
                acc = tl.fma(tl.broadcast_to(s[:, None], (BN, 16)), part, acc)
                acc -= sz[:, None] * xs[None, :]
                part = tl.zeros((BN, 16), tl.float32)
                xs = tl.zeros((16,), tl.float32)
    out = y + (part_k * M + m) * tl.cast(N, tl.int64)
    tl.store(out + n, tl.sum(acc, 1), mask=inside)


# -- tensor cores -----------------------------------------------------------------------------------------------------


def unpack_text(bits: int) -> str:
    """PTX: two words, operands F and F + 1, -> their F = 32 / b fields in float16, as 1024 + code * 2^(b * place).

    A field keeps its place in its half word while it fits ten bits of mantissa; what lies above is shifted down first.
    """
    fields, mask, in_place = WORD_BITS // bits, 2**bits - 1, 10 // bits
    lines = [
        ".reg .b32 low, high, rest;",
        f"prmt.b32 low, ${fields}, ${fields + 1}, 0x5410;",
        f"prmt.b32 high, ${fields}, ${fields + 1}, 0x7632;",
    ]
    for first, half in ((0, "low"), (fields // 2, "high")):
        lines.append(f"shr.u32 rest, {half}, {bits * in_place};")
        for i in range(fields // 2):
            source, place = (half, i) if i < in_place else ("rest", i - in_place)
            wanted = mask << (bits * place)
            # Immediate table 0xea: (a & b) | c.
            lines.append(f"lop3.b32 ${first + i}, {source}, {wanted << 16 | wanted:#010x}, 0x64006400, 0xea;")
    return "{\n" + "\n".join(lines) + "\n}"


UNPACK4 = tl.constexpr(unpack_text(4))


@triton.jit
def unpack4(w):
    """Words -> 8 planes in float16: even ones 1024 + q, odd ones 1024 + 16 q."""
    return tl.inline_asm_elementwise(
        UNPACK4,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
        [w],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _less_zero(planes, w, z, i: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr):
    """Codes of plane i less their zero in float16, exact; zeros that are no integers come later."""
    if ASM:
        if i % 2 == 1:
            q = planes[i] * 0.0625  # 64 + code
            if ZERO == 0:
                q = q - 72.0
            elif ZERO == 1:
                q = q - (z + 64.0)[None, :]
            else:
                q = q - 64.0
        else:
            q = planes[i]
            if ZERO == 0:
                q = q - 1032.0
            elif ZERO == 1:
                q = q - (z + 1024.0)[None, :]
            else:
                q = q - 1024.0
    else:
        q = ((w >> (4 * i)) & 15).to(tl.float16)
        if ZERO == 0:
            q = q - 8.0
        elif ZERO == 1:
            q = q - z[None, :]
    return q


@triton.jit
def w4_gemm_small(
    x,
    words,
    scale,
    zero,
    sums,
    y,
    M,
    N,
    steps,
    groups,
    x_stride,
    ZERO: tl.constexpr,
    PLANES: tl.constexpr,
    GP: tl.constexpr,
    TPG: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    # x [M, x_stride]; words int32 [steps, N, 16]; sums float32 [M, groups]; y float32 [SPLIT_K, M, N]
    part_k = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, 16)
    above = (m < M)[:, None]
    inside = n < N
    tile = n[None, :] * 16 + j[:, None]
    rows = tl.cast(N, tl.int64) * 16
    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(part_k, steps, SPLIT_K):
        w = tl.load(words + t * rows + tile, mask=inside[None, :], other=0)  # [16, BN]
        if ASM:
            planes = unpack4(w)
        else:
            planes = w
        inputs = x + m[:, None] * x_stride + t * 128 + j[None, :]
        d = tl.zeros((BM, BN), tl.float32)
        for i in tl.static_range(PLANES):
            if GP == PLANES:
                g = t // TPG
            else:
                g = t * (PLANES // GP) + i // GP
            there = inside & (g + 0 * n < groups)
            if ZERO == 1:
                z = tl.load(zero + g * N + n, mask=there, other=0.0)
            else:
                z = n
            q = _less_zero(planes, w, z, i, ZERO, ASM)
            a = tl.load(inputs + i * 16, mask=above, other=0.0)
            d = tl.dot(a, q.to(a.dtype), d)  # exact in bfloat16 too: |q - z| is an integer below 256
            if i % GP == GP - 1:
                s = tl.load(scale + g * N + n, mask=there, other=0.0).to(tl.float32)
                acc += d * s[None, :]
                d = tl.zeros((BM, BN), tl.float32)
                if ZERO == 2:
                    if t % TPG == TPG - 1:  # once per group
                        sz = tl.load(zero + g * N + n, mask=there, other=0.0)
                        total = tl.load(sums + m * groups + g, mask=(m < M) & (g + 0 * m < groups), other=0.0)
                        acc -= sz[None, :] * total[:, None]
    out = y + part_k * M * tl.cast(N, tl.int64)
    tl.store(out + m[:, None] * tl.cast(N, tl.int64) + n[None, :], acc, mask=above & inside[None, :])


# -- dequantization ---------------------------------------------------------------------------------------------------


@triton.jit
def t16_dequantize(
    words,
    high,
    scale,
    zero,
    y,
    N,
    K,
    groups,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    PLANES: tl.constexpr,
    GP: tl.constexpr,
    TPG: tl.constexpr,
    BN: tl.constexpr,
):
    # y [N, K] of any floating dtype; one program per block of rows and step
    t = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    j = tl.arange(0, 16)
    tile = n[:, None] * 16 + j[None, :]
    rows = tl.cast(N, tl.int64) * 16
    if BITS == 3:
        w = tl.load(words + 2 * t * rows + tile, mask=inside[:, None], other=0)
        w1 = tl.load(words + (2 * t + 1) * rows + tile, mask=inside[:, None], other=0)
        h = tl.load(high + t * rows + tile, mask=inside[:, None], other=0)
    else:
        w = tl.load(words + t * rows + tile, mask=inside[:, None], other=0)
    out = y + n[:, None].to(tl.int64) * K
    for i in tl.static_range(PLANES):
        if BITS == 3:
            if i < 16:
                q = (w >> (2 * i)) & 3
            else:
                q = (w1 >> (2 * i - 32)) & 3
            q = q + ((h >> i) & 1) * 4
        else:
            q = (w >> (BITS * i)) & ((1 << BITS) - 1)
        if GP == PLANES:
            g = t // TPG
        else:
            g = t * (PLANES // GP) + i // GP
        there = inside & (g + 0 * n < groups)
        s = tl.load(scale + g * N + n, mask=there, other=0.0).to(tl.float32)[:, None]
        v = q.to(tl.float32)
        if ZERO == 0:
            v = (v - (1 << (BITS - 1))) * s
        elif ZERO == 1:
            v = (v - tl.load(zero + g * N + n, mask=there, other=0.0).to(tl.float32)[:, None]) * s
        else:
            v = v * s - tl.load(zero + g * N + n, mask=there, other=0.0)[:, None]
        k = t * (PLANES * 16) + i * 16 + j
        tl.store(out + k[None, :], v.to(y.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])
