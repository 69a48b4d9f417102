"""Layouts of quantized tensors in memory as the kernels read them, packers and exact unpackers; torch only.

T16, for weights [N out, K in] of 1, 2, 4 or 8 bits. A tile is 16 words of 32 bits of one output row and holds
P = 512 / b consecutive inputs. Field i (bits b i .. b i + b - 1) of word j is input `t P + 16 i + j`, so that field i
of all 16 words is a plane of 16 consecutive inputs:

    words int32 [K / P, N, 16]      4 bits, tile t, one row:       word  0    1    ..  15
                                                         field 0   k =  0    1    ..  15
                                                         field 1       16   17    ..  31
                                                         field 7      112  113    .. 127    (+ 128 t)

For a block of rows a tile is one run of 64 bytes per row, and one plane is the K = 16 of a tensor-core step. 3 bits are
two such arrays, the low two bits and the high bit. K is padded to whole tiles with codes of 0 (inputs there are 0).

A group is a run of whole planes (g a multiple of 16 that divides P), whole tiles, or the row. Scales are [K / g, N],
float16 or float32. A zero is one of three: None is 2^(b-1), `zero` float16 holds integers, `scaled_zero` float32 holds
scale * zero for zeros that are no integers (HQQ; a minimum m is scaled_zero = -m).

BCQ: the layout of LUT-GEMM (arXiv 2206.09557), int32 [K / 32, planes, N]. KV: int32 [heads, tokens b / 32, channels],
a word holds consecutive tokens of one channel, for keys and for values alike. INT8: rows as they are, K padded to 16.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor

WORD_BITS = 32
TILE_WORDS = 16  # of a row, and inputs of a plane
WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code -> bits of the arrays that hold it
ZEROS = (-128, 255)  # integer zeros: kernels form code - zero in bfloat16, where integers are exact up to 256
SIGNS = 32  # inputs per word of a BCQ plane
INT8_ALIGNMENT = 16  # bytes: one vector load


def tile_inputs(bits: int) -> int:
    """Inputs that K is padded to: P, of the widest tile where a code lies in two arrays. Raises ValueError."""
    if bits not in WIDTHS:
        raise ValueError(f"{bits} bits: expected one of {', '.join(map(str, WIDTHS))}")
    return max(TILE_WORDS * WORD_BITS // width for width in WIDTHS[bits])


def held_bits(bits: int) -> int:
    """The narrowest width with a layout that holds codes of so many bits, up to 8."""
    return next(width for width in sorted(WIDTHS) if width >= bits)


def weight_bytes(rows: int, columns: int, bits: int, group: int, scale_bytes: int = 2, zero_bytes: int = 2) -> int:
    """Bytes of a T16 weight; zero_bytes is 2 for integer zeros, 4 for scaled ones, 0 without."""
    tile = tile_inputs(bits)
    codes = -(-columns // tile) * tile * rows * bits // 8
    return codes + columns // group * rows * (scale_bytes + zero_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensors:
    """What the packed tensors have in common; some of their fields are tensors, or tuples of them."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; those of a tuple are numbered."""
        found: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif isinstance(value, tuple):
                found |= {f"{field.name}.{i}": part for i, part in enumerate(value)}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved: dict[str, Tensor | tuple[Tensor, ...]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
            elif isinstance(value, tuple):
                moved[field.name] = tuple(part.to(device) for part in value)
        return dataclasses.replace(self, **moved)


# -- T16 --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class T16Weight(_Tensors):
    """A weight [rows, columns] in tiles."""

    bits: int
    columns: int  # K without padding
    group: int  # inputs per group; `columns`: one group per row
    words: tuple[Tensor, ...]  # int32 [tiles, rows, 16]; 3 bits: of the low two bits, of the high bit
    scale: Tensor  # float16 or float32 [groups, rows]
    zero: Tensor | None  # float16 [groups, rows], integers
    scaled_zero: Tensor | None  # float32 [groups, rows], scale * zero; at most one of the two
    order: Tensor | None = None  # int32 [columns]: the input that column i multiplies; None: input i

    @property
    def rows(self) -> int:
        return self.words[0].shape[1]

    @property
    def padded(self) -> int:
        """K with padding."""
        return -(-self.columns // tile_inputs(self.bits)) * tile_inputs(self.bits)

    def codes(self) -> Tensor:
        """uint8 [rows, columns], columns in stored order."""
        return unpack_codes(self.words, self.bits, self.columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns] with columns in the order of the inputs; computed in float32 (float64 for float64)."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        grouped = self.codes().reshape(self.rows, len(self.scale), -1).to(exact)
        scale = self.scale.T.to(exact)[..., None]
        if self.scaled_zero is not None:
            values = grouped * scale - self.scaled_zero.T.to(exact)[..., None]
        else:
            zero = 2.0 ** (self.bits - 1) if self.zero is None else self.zero.T.to(exact)[..., None]
            values = (grouped - zero) * scale
        values = values.reshape(self.rows, self.columns)
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order.long(), values)
        return values.to(dtype)


def pack_weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, g_idx: Tensor | None = None
) -> T16Weight:
    """Codes [N, K] in [0, 2^b - 1], scale [N, K / group], zero [N, K / group] or None -> tiles.

    A scale in bfloat16 becomes float32, which is exact. A zero of an integer dtype stays an integer, a floating one
    goes the way of scale * zero. `group` -1 is the row. With `g_idx` [K], the group of each column, columns are sorted
    by group, and `order` says where they came from.

    Raises ValueError for widths without a layout, groups that do not fit tiles, and codes or zeros out of range.
    """
    rows, columns = codes.shape
    group = columns if group == -1 else group
    _check_group(bits, columns, group)
    groups = columns // group
    if scale.shape != (rows, groups) or (zero is not None and zero.shape != (rows, groups)):
        raise ValueError(f"scale {list(scale.shape)}: expected [{rows}, {groups}], of each row and group; zeros alike")
    order = None
    if g_idx is not None:
        if not torch.equal(
            torch.bincount(g_idx.long(), minlength=groups), torch.full((groups,), group).to(g_idx.device)
        ):
            raise ValueError(f"g_idx: expected {group} columns in each of {groups} groups")
        order = g_idx.long().argsort(stable=True)
        codes, order = codes[:, order], order.to(torch.int32)
    whole = scaled = None
    stored = scale.float() if scale.dtype not in (torch.float16, torch.float32) else scale
    if zero is not None and zero.is_floating_point():
        scaled = (stored.float() * zero.float()).T.contiguous()
    elif zero is not None:
        if int(zero.min()) < ZEROS[0] or int(zero.max()) > ZEROS[1]:
            raise ValueError(f"zeros from {int(zero.min())} to {int(zero.max())}: expected {ZEROS[0]} to {ZEROS[1]}")
        whole = zero.T.to(torch.float16).contiguous()
    return T16Weight(
        bits=bits,
        columns=columns,
        group=group,
        words=pack_codes(codes, bits),
        scale=stored.T.contiguous(),
        zero=whole,
        scaled_zero=scaled,
        order=order,
    )


def _check_group(bits: int, columns: int, group: int) -> None:
    tile = tile_inputs(bits)
    if group == columns:
        return
    if group <= 0 or columns % group:
        raise ValueError(f"groups of {group} do not divide {columns} columns")
    if group % TILE_WORDS or (tile % group and group % tile):
        raise ValueError(
            f"groups of {group} at {bits} bits: expected a multiple of {TILE_WORDS} that divides {tile}, a multiple of "
            f"{tile}, or whole rows"
        )


def pack_codes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Unsigned codes [N, K] -> the arrays of `T16Weight.words`. Raises ValueError for codes out of range."""
    tile = tile_inputs(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())}: expected 0 to {2**bits - 1}")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % tile))
    arrays, shift = [], 0
    for width in WIDTHS[bits]:
        arrays.append(_to_tiles((padded >> shift) & (2**width - 1), width))
        shift += width
    return tuple(arrays)


def unpack_codes(words: tuple[Tensor, ...], bits: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [N, columns]."""
    codes, shift = _from_tiles(words[0], WIDTHS[bits][0]), WIDTHS[bits][0]
    for array, width in zip(words[1:], WIDTHS[bits][1:], strict=True):
        codes |= _from_tiles(array, width) << shift
        shift += width
    return codes[:, :columns].contiguous()


def _to_tiles(codes: Tensor, bits: int) -> Tensor:
    rows, fields = codes.shape[0], WORD_BITS // bits
    planes = codes.reshape(rows, -1, fields, TILE_WORDS)
    words = torch.zeros(rows, planes.shape[1], TILE_WORDS, dtype=torch.int32, device=codes.device)
    for i in range(fields):
        words |= planes[:, :, i].to(torch.int32) << (bits * i)  # the top field sets the sign, as it should
    return words.transpose(0, 1).contiguous()


def _from_tiles(words: Tensor, bits: int) -> Tensor:
    planes = [((words >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(WORD_BITS // bits)]
    return torch.stack(planes, dim=2).transpose(0, 1).reshape(words.shape[1], -1)  # [N, T, fields, 16] -> [N, K]


# -- sign planes ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BCQWeight(_Tensors):
    """A weight [rows, columns] as scaled sign planes: bit t of word (i, p, n) is plane p of input 32 i + t, 1 = +1."""

    columns: int
    group: int
    planes: Tensor  # int32 [ceil(columns / 32), bits, rows]
    alpha: Tensor  # float16 [groups, bits, rows]
    offset: Tensor | None  # float16 [groups, rows]

    @property
    def rows(self) -> int:
        return self.planes.shape[2]

    @property
    def bits(self) -> int:
        return self.planes.shape[1]

    def codes(self) -> Tensor:
        """uint8 [rows, columns]: bit p of a code is plane p."""
        codes = torch.zeros(self.rows, len(self.planes) * SIGNS, dtype=torch.uint8, device=self.planes.device)
        positions = torch.arange(SIGNS, device=self.planes.device)
        for p in range(self.bits):
            bits = (self.planes[:, p, :, None] >> positions) & 1  # [words, rows, 32]
            codes |= bits.transpose(0, 1).reshape(self.rows, -1).to(torch.uint8) << p
        return codes[:, : self.columns].contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns]; computed in float32 (float64 for float64)."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        codes = self.codes().reshape(self.rows, len(self.alpha), -1)
        values = torch.zeros(codes.shape, dtype=exact, device=codes.device)
        if self.offset is not None:
            values += self.offset.T.to(exact)[..., None]
        for p in range(self.bits):
            values += (((codes >> p) & 1).to(exact) * 2 - 1) * self.alpha[:, p].T.to(exact)[..., None]
        return values.reshape(self.rows, self.columns).to(dtype)


def pack_bcq(codes: Tensor, alpha: Tensor, offset: Tensor | None, group: int) -> BCQWeight:
    """Codes [N, K], alpha [N, K / group, planes], offset [N, K / group] or None; alpha and offset become float16.

    Raises ValueError for groups that are no multiple of 32 (and not the row), codes out of range, and scales that
    float16 cannot hold.
    """
    rows, columns = codes.shape
    group, bits = columns if group == -1 else group, alpha.shape[-1]
    if group != columns and (group % SIGNS or columns % group):
        raise ValueError(f"groups of {group}: expected a multiple of {SIGNS} that divides {columns}, or whole rows")
    if alpha.shape[:2] != (rows, columns // group):
        raise ValueError(f"alpha {list(alpha.shape)}: expected [{rows}, {columns // group}, planes]")
    if int(codes.max()) >= 2**bits:
        raise ValueError(f"codes up to {int(codes.max())}: expected at most {2**bits - 1} for {bits} planes")
    padded = torch.nn.functional.pad(codes, (0, -columns % SIGNS)).reshape(rows, -1, SIGNS)
    planes = torch.zeros(padded.shape[1], bits, rows, dtype=torch.int32, device=codes.device)
    for p in range(bits):
        for t in range(SIGNS):
            planes[:, p] |= (((padded[..., t] >> p) & 1).to(torch.int32) << t).T
    halves = [None if value is None else value.to(torch.float16) for value in (alpha, offset)]
    if any(value is not None and not bool(torch.isfinite(value).all()) for value in halves):
        raise ValueError("scales or offsets that float16 cannot hold")
    half, low = halves
    assert half is not None
    return BCQWeight(
        columns=columns,
        group=group,
        planes=planes,
        alpha=half.permute(1, 2, 0).contiguous(),
        offset=None if low is None else low.T.contiguous(),
    )


# -- keys and values --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedKV(_Tensors):
    """Keys or values [heads, tokens, channels] of 2 or 4 bits, one head per sequence and KV head: q * scale + minimum.

    Keys have groups of consecutive tokens of a channel, values of consecutive channels of a token.
    """

    bits: int
    group: int
    words: Tensor  # int32 [heads, tokens * bits / 32, channels]
    scale: Tensor  # float16; keys [heads, tokens / group, channels], values [heads, tokens, channels / group]
    minimum: Tensor  # like scale
    by_channel: bool  # keys

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, tokens, channels."""
        heads, words, channels = self.words.shape
        return heads, words * (WORD_BITS // self.bits), channels

    def codes(self) -> Tensor:
        """uint8 [heads, tokens, channels]."""
        return unpack_tokens(self.words, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[heads, tokens, channels]; computed in float32 (float64 for float64)."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        axis = 1 if self.by_channel else 2
        scale, minimum = (part.to(exact).repeat_interleave(self.group, axis) for part in (self.scale, self.minimum))
        return (self.codes().to(exact) * scale + minimum).to(dtype)


def pack_tokens(codes: Tensor, bits: int) -> Tensor:
    """Codes [heads, tokens, channels] -> int32 [heads, tokens * bits / 32, channels], field i = token i of a word's.

    Raises ValueError for a number of tokens that leaves a word open.
    """
    per_word = WORD_BITS // bits
    heads, tokens, channels = codes.shape
    if tokens % per_word:
        raise ValueError(f"{tokens} tokens: expected a multiple of {per_word}, which fill a word at {bits} bits")
    fields = codes.reshape(heads, -1, per_word, channels)
    words = torch.zeros(heads, fields.shape[1], channels, dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        words |= fields[:, :, i].to(torch.int32) << (bits * i)
    return words


def unpack_tokens(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_tokens`: uint8 [heads, tokens, channels]."""
    heads, _, channels = words.shape
    fields = [((words >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(WORD_BITS // bits)]
    return torch.stack(fields, dim=2).reshape(heads, -1, channels)


def pack_kv(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int, group: int, by_channel: bool) -> PackedKV:
    """Codes [heads, tokens, channels] with their scales and minima (see `PackedKV`), which become float16."""
    if bits not in (2, 4):
        raise ValueError(f"{bits} bits: keys and values have layouts of 2 and 4")
    heads, tokens, channels = codes.shape
    expected = (heads, tokens // group, channels) if by_channel else (heads, tokens, channels // group)
    if (tokens if by_channel else channels) % group or scale.shape != expected or minimum.shape != expected:
        raise ValueError(f"scale {list(scale.shape)}: expected {list(expected)} for groups of {group}; minima alike")
    halves = scale.to(torch.float16).contiguous(), minimum.to(torch.float16).contiguous()
    words = pack_tokens(codes, bits)
    return PackedKV(bits=bits, group=group, words=words, scale=halves[0], minimum=halves[1], by_channel=by_channel)


# -- INT8 -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Weight(_Tensors):
    """A weight [rows, columns] in int8, one scale per row."""

    columns: int  # K without padding
    values: Tensor  # int8 [rows, K], K padded to 16 with 0
    scale: Tensor  # float32 [rows]

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    def codes(self) -> Tensor:
        """int8 [rows, columns]."""
        return self.values[:, : self.columns]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns]; computed in float32 (float64 for float64)."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.codes().to(exact) * self.scale.to(exact)[:, None]).to(dtype)


def pack_int8(codes: Tensor, scale: Tensor) -> Int8Weight:
    """int8 [N, K] and scale [N] -> rows padded to whole vector loads. Raises ValueError for other shapes or dtypes."""
    if codes.dtype != torch.int8 or scale.shape != (len(codes),):
        raise ValueError(f"codes {codes.dtype}, scale {list(scale.shape)}: expected int8 and [{len(codes)}]")
    values = torch.nn.functional.pad(codes, (0, -codes.shape[1] % INT8_ALIGNMENT)).contiguous()
    return Int8Weight(columns=codes.shape[1], values=values, scale=scale.float())
