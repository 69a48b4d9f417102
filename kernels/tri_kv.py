"""Attention over quantized keys and values (qfarm.kernels.pack.PackedKV), and their quantizer.

    scores[r, t] = scaling * sum over c of q[r, c] * (code[t, c] * s + m)      the R query heads of one KV head together
    out[r, c]    = sum over t of p[r, t] * (code[t, c] * s + m)

Field i of a block of words is one token in 16 (8 at 4 bits), so each field is one tensor-core product. Two words are
unpacked together: `prmt` pairs their halves, `lop3` places a code in two float16 mantissas as 1024 + code * 2^(b i),
which is taken back exactly. Of keys, the group's scale and minimum go on top in float16 (error up to 2^-10 of a value);
of values they go on the weights of their token, and codes are multiplied as they are. Softmax and mask lie outside; the
sequence of values is split over programs and added by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfarm.kernels.pack import WORD_BITS, PackedKV
from qfarm.kernels.tri_int8 import rint
from qfarm.kernels.tri_weight import splits, unpack4, unpack_text, uses_ptx

SMALLEST_ROWS = 8  # query rows are padded to this
WORDS = 32  # per program


def scores(
    queries: Tensor, keys: PackedKV, scaling: float, words: int = WORDS, warps: int = 2, asm: bool | None = None
) -> Tensor:
    """queries float16 [heads, R, channels] -> float32 [heads, R, tokens]. Raises ValueError for values."""
    heads, tokens, channels = _checked(queries, keys, by_channel=True)
    count = queries.shape[1]
    out = torch.empty(heads, count, tokens, dtype=torch.float32, device=queries.device)
    fields = WORD_BITS // keys.bits
    kivi_qk[(triton.cdiv(tokens // fields, words), heads)](
        queries.contiguous(),
        keys.words,
        keys.scale,
        keys.minimum,
        out,
        count,
        tokens // fields,
        keys.scale.shape[1],
        scaling,
        BITS=keys.bits,
        FIELDS=fields,
        PER_GROUP=max(1, keys.group // fields),
        ASM=uses_ptx() if asm is None else asm,
        D=channels,
        BR=_rows(count),
        BW=words,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return out


def outputs(
    weights: Tensor,
    values: PackedKV,
    words: int = WORDS,
    split: int | None = None,
    warps: int = 4,
    asm: bool | None = None,
) -> Tensor:
    """weights float16 [heads, R, tokens] -> float32 [heads, R, channels]. Raises ValueError for keys."""
    heads, tokens, channels = _checked(weights, values, by_channel=False)
    count, fields = weights.shape[1], WORD_BITS // values.bits
    steps = triton.cdiv(tokens // fields, words)
    groups = channels // values.group
    split = splits(heads * groups, steps, weights) if split is None else split
    out = torch.empty(split, heads, count, channels, dtype=torch.float32, device=weights.device)
    kivi_pv[(split, heads, groups)](
        weights.contiguous(),
        values.words,
        values.scale,
        values.minimum,
        out,
        count,
        tokens // fields,
        heads,
        groups,
        BITS=values.bits,
        FIELDS=fields,
        GROUP=values.group,
        ASM=uses_ptx() if asm is None else asm,
        BR=_rows(count),
        BW=words,
        SPLIT=split,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return out[0] if split == 1 else out.sum(0)


def quantize(x: Tensor, bits: int, group: int, by_channel: bool) -> PackedKV:
    """x [heads, tokens, channels] of any floating dtype -> codes, scales and minima. Raises ValueError for sizes."""
    heads, tokens, channels = x.shape
    fields = WORD_BITS // bits
    span = max(group, fields) if by_channel else fields  # tokens of a program
    if tokens % span or channels % group * (not by_channel) or span % fields or triton.next_power_of_2(span) != span:
        raise ValueError(f"{tokens} tokens of {channels} channels: no whole groups of {group} and words of {fields}")
    shape = (heads, tokens // group, channels) if by_channel else (heads, tokens, channels // group)
    scale = torch.empty(shape, dtype=torch.float16, device=x.device)
    minimum = torch.empty_like(scale)
    words = torch.empty(heads, tokens // fields, channels, dtype=torch.int32, device=x.device)
    if by_channel:
        block = 32
        grid = (tokens // span, heads, triton.cdiv(channels, block))
    else:
        block = group
        grid = (tokens // span, heads, channels // group)
    kv_quant_pack[grid](
        x.contiguous(),
        words,
        scale,
        minimum,
        tokens,
        channels,
        float(2**bits - 1),
        BITS=bits,
        FIELDS=fields,
        GROUP=group,
        SPAN=span,
        BY_CHANNEL=by_channel,
        BD=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return PackedKV(bits=bits, group=group, words=words, scale=scale, minimum=minimum, by_channel=by_channel)


def _checked(x: Tensor, packed: PackedKV, by_channel: bool) -> tuple[int, int, int]:
    heads, tokens, channels = packed.shape
    if packed.by_channel != by_channel:
        raise ValueError(f"groups along {'channels' if by_channel else 'tokens'}: expected the other packed tensor")
    if x.dim() != 3 or x.shape[0] != heads or x.shape[2] != (channels if by_channel else tokens):
        raise ValueError(f"{list(x.shape)}: expected [{heads}, R, {channels if by_channel else tokens}]")
    if not all(part.is_contiguous() for part in (packed.words, packed.scale, packed.minimum)):
        raise ValueError("a view of words, scales or minima: expected contiguous tensors, since kernels take pointers")
    return heads, tokens, channels


def _rows(count: int) -> int:
    return max(SMALLEST_ROWS, int(triton.next_power_of_2(count)))


UNPACK2 = tl.constexpr(unpack_text(2))
CONSTRAINTS2 = tl.constexpr(",".join(["=r"] * 16 + ["r"] * 2))
HALVES2 = tl.constexpr((tl.float16,) * 16)


@triton.jit
def _fields(w, BITS: tl.constexpr):
    if BITS == 2:
        return tl.inline_asm_elementwise(UNPACK2, CONSTRAINTS2, [w], dtype=HALVES2, is_pure=True, pack=2)
    else:
        return unpack4(w)


@triton.jit
def _code(w, fields, i: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Field i in float16; unpacked by PTX it is 1024 + code * 2^(BITS * place in its half word)."""
    if ASM:
        code = fields[i] * (2.0 ** (0 - BITS * (i % (16 // BITS) % (10 // BITS))))
        code = code - 2.0 ** (10 - BITS * (i % (16 // BITS) % (10 // BITS)))
    else:
        code = ((w >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.float16)
    return code


@triton.jit
def kivi_qk(
    queries,
    words,
    scale,
    minimum,
    y,
    R,
    W,
    groups,
    scaling,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ASM: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
):
    # queries [heads, R, D]; words int32 [heads, W, D]; scale, minimum [heads, groups, D]; y float32 [heads, R, tokens]
    head = tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * BW + tl.arange(0, BW)
    c = tl.arange(0, D)
    r = tl.arange(0, BR)
    inside = (w < W)[:, None]
    codes = tl.load(words + head * W * D + w[:, None] * D + c[None, :], mask=inside, other=0)  # [BW, D]
    group = (w // PER_GROUP)[:, None] * D + c[None, :]
    s = tl.load(scale + head * groups * D + group, mask=inside, other=0.0)
    m = tl.load(minimum + head * groups * D + group, mask=inside, other=0.0)
    q = tl.load(queries + head * R * D + r[None, :] * D + c[:, None], mask=(r < R)[None, :], other=0.0)  # [D, BR]
    q = q.to(tl.float16)
    if ASM:
        fields = _fields(codes, BITS)
    else:
        fields = codes
    out = y + head * R * W * FIELDS + (r[None, :] * (W * FIELDS) + w[:, None] * FIELDS)
    kept = inside & (r < R)[None, :]
    for i in tl.static_range(FIELDS):
        k = tl.fma(_code(codes, fields, i, BITS, ASM), s, m)
        d = tl.dot(k, q)  # [BW, BR]
        tl.store(out + i, d * scaling, mask=kept)


@triton.jit
def kivi_pv(
    weights,
    words,
    scale,
    minimum,
    y,
    R,
    W,
    heads,
    groups,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # weights [heads, R, tokens]; scale, minimum [heads, tokens, groups]; y float32 [SPLIT, heads, R, groups * GROUP].
    # A program has one group of channels: a token's scale goes on its weight, so that codes are multiplied as they are.
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    g = tl.program_id(2)
    channels = groups * GROUP
    c = g * GROUP + tl.arange(0, GROUP)
    r = tl.arange(0, BR)
    above = (r < R)[:, None]
    words += head * W * channels
    weights += head * R * W * FIELDS
    scale += head * W * FIELDS * groups + g
    minimum += head * W * FIELDS * groups + g
    acc = tl.zeros((BR, GROUP), tl.float32)
    low = tl.zeros((BR, BW), tl.float32)  # of the minima
    for first in range(part * BW, W, SPLIT * BW):
        w = first + tl.arange(0, BW)
        inside = w < W
        codes = tl.load(words + w[:, None] * channels + c[None, :], mask=inside[:, None], other=0)  # [BW, GROUP]
        if ASM:
            fields = _fields(codes, BITS)
        else:
            fields = codes
        for i in tl.static_range(FIELDS):
            token = w * FIELDS + i
            s = tl.load(scale + token * groups, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(minimum + token * groups, mask=inside, other=0.0).to(tl.float32)
            place = r[:, None] * (W * FIELDS) + token[None, :]
            p = tl.load(weights + place, mask=above & inside[None, :], other=0.0).to(tl.float32)
            low += p * m[None, :]
            acc = tl.dot((p * s[None, :]).to(tl.float16), _code(codes, fields, i, BITS, ASM), acc)
    out = y + (part * heads + head) * R * channels + r[:, None] * channels + c[None, :]
    tl.store(out, acc + tl.sum(low, 1)[:, None], mask=above)


@triton.jit
def kv_quant_pack(
    x,
    words,
    scale,
    minimum,
    tokens,
    channels,
    top,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BD: tl.constexpr,
):
    # x [heads, tokens, channels]. Keys: SPAN tokens hold whole groups; values: BD channels are one group.
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    t = block * SPAN + tl.arange(0, SPAN)
    c = tl.program_id(2) * BD + tl.arange(0, BD)
    inside = (c < channels)[None, :]
    v = tl.load(x + (head * tokens + t[:, None]) * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if BY_CHANNEL:
        grouped = tl.reshape(v, (SPAN // GROUP, GROUP, BD))
        low = tl.min(grouped, 1)
        high = tl.max(grouped, 1)
        g = block * (SPAN // GROUP) + tl.arange(0, SPAN // GROUP)
        place = (head * (tokens // GROUP) + g[:, None]) * channels + c[None, :]
        kept = inside
    else:
        low = tl.min(v, 1)[:, None]
        high = tl.max(v, 1)[:, None]
        place = (head * tokens + t[:, None]) * (channels // GROUP) + tl.program_id(2)
        kept = t[:, None] < tokens
    s16 = tl.div_rn(high - low, top).to(tl.float16)
    s16 = tl.where(s16.to(tl.float32) > 0, s16, 1.0)  # a constant group
    m16 = low.to(tl.float16)
    tl.store(scale + place, s16, mask=kept)
    tl.store(minimum + place, m16, mask=kept)
    s = s16.to(tl.float32)
    m = m16.to(tl.float32)
    if BY_CHANNEL:
        s = tl.reshape(tl.broadcast_to(s[:, None, :], (SPAN // GROUP, GROUP, BD)), (SPAN, BD))
        m = tl.reshape(tl.broadcast_to(m[:, None, :], (SPAN // GROUP, GROUP, BD)), (SPAN, BD))
    q = rint(tl.minimum(tl.maximum(tl.div_rn(v - m, tl.broadcast_to(s, (SPAN, BD))), 0.0), top)).to(tl.int32)
    field = tl.arange(0, FIELDS)[None, :, None] * BITS
    packed = tl.sum(tl.reshape(q, (SPAN // FIELDS, FIELDS, BD)) << field, 1)  # no two fields overlap
    word = block * (SPAN // FIELDS) + tl.arange(0, SPAN // FIELDS)
    tl.store(words + (head * (tokens // FIELDS) + word[:, None]) * channels + c[None, :], packed, mask=inside)
