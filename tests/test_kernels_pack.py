"""Layouts of packed tensors: round trips, where each code lies, and bytes to the byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.kernels import pack
from qfarm.methods.lut_gemm import BinaryCodedWeight
from qfarm.quantized import UniformWeight

BITS = sorted(pack.WIDTHS)


def draw_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.manual_seed(seed))


def draw_scale(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.manual_seed(5)) + 0.5).to(torch.float16)


# -- T16 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 63, 512, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back(bits: int, columns: int) -> None:
    for codes in (
        draw_codes(5, columns, bits),
        torch.zeros(5, columns, dtype=torch.uint8),
        torch.full((5, columns), 2**bits - 1, dtype=torch.uint8),  # the top bit of every word set
    ):
        assert torch.equal(pack.unpack_codes(pack.pack_codes(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_each_code_lies_where_the_layout_says(bits: int) -> None:
    """One code of a row set: one field of one word, by the formula k = t P + 16 i + j."""
    tile = pack.tile_inputs(bits)
    for k in {0, 1, 15, 16, tile - 1, tile, tile + 17, 2 * tile - 1}:
        codes = torch.zeros(3, 2 * tile, dtype=torch.uint8)
        codes[1, k] = 2**bits - 1
        for array, width in zip(pack.pack_codes(codes, bits), pack.WIDTHS[bits], strict=True):
            inputs = 512 // width
            t, i, j = k // inputs, k % inputs // 16, k % 16
            expected = torch.zeros(2 * tile // inputs, 3, 16, dtype=torch.int64)
            expected[t, 1, j] = (2**width - 1) << (width * i)
            assert torch.equal(array.long() & 0xFFFFFFFF, expected)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 40),
    planes=st.integers(1, 9),
    tiles=st.integers(1, 3),
    kind=st.sampled_from(["symmetric", "integer", "real"]),
    scale=st.sampled_from([torch.float16, torch.float32]),
)
def test_allocated_bytes_equal_the_formula(
    bits: int, rows: int, planes: int, tiles: int, kind: str, scale: torch.dtype
) -> None:
    tile = pack.tile_inputs(bits)
    group = 16 * planes if tile % (16 * planes) == 0 else tile * tiles
    for columns, size in ((group * 3, group), (16 * planes + 5, -1)):
        groups = 1 if size == -1 else 3
        zero = {"symmetric": None, "integer": torch.ones(rows, groups, dtype=torch.uint8)}.get(
            kind, torch.rand(rows, groups)
        )
        weight = pack.pack_weight(draw_codes(rows, columns, bits), draw_scale(rows, groups).to(scale), zero, bits, size)
        # ceil(K / P) P N b / 8 + (K / g) N (s + z), written out once more
        padded = (columns + tile - 1) // tile * tile
        z = {"symmetric": 0, "integer": 2, "real": 4}[kind]
        expected = padded * rows * bits / 8 + groups * rows * (2 if scale == torch.float16 else 4) + groups * rows * z
        assert weight.nbytes == expected
        assert weight.nbytes == pack.weight_bytes(rows, columns, bits, weight.group, scale.itemsize, z)


def test_bits_per_weight_of_the_common_case() -> None:
    assert pack.weight_bytes(4096, 4096, 4, 128) * 8 / 4096**2 == 4.25


@pytest.mark.parametrize("group", [16, 64, 128, 256, -1])
@pytest.mark.parametrize("kind", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_those_that_are_evaluated(bits: int, kind: str, group: int) -> None:
    rows, columns = 6, 768 if group != -1 else 100
    groups = columns // group if group != -1 else 1
    codes, scale = draw_codes(rows, columns, bits), draw_scale(rows, groups)
    zero = {"symmetric": None, "integer": draw_codes(rows, groups, bits, 1)}.get(kind, torch.rand(rows, groups))
    theirs = UniformWeight(codes=codes, scale=scale, zero=zero, bits=bits, group_size=group).dequantize()
    ours = pack.pack_weight(codes, scale, zero, bits, group).dequantize()
    if kind == "real":  # q s - (s z) in place of (q - z) s
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-22 * 2**bits)
    else:
        assert torch.equal(ours, theirs)


def test_columns_in_the_order_of_their_groups() -> None:
    columns, group = 512, 64
    g_idx = (torch.randperm(columns, generator=torch.manual_seed(3)) // group).to(torch.int32)
    codes, scale, zero = draw_codes(4, columns, 4), draw_scale(4, 8), draw_codes(4, 8, 4, 2)
    theirs = UniformWeight(codes=codes, scale=scale, zero=zero, bits=4, group_size=group, g_idx=g_idx)
    ours = pack.pack_weight(codes, scale, zero, 4, group, g_idx)
    assert ours.order is not None
    assert torch.equal(ours.dequantize(), theirs.dequantize())
    assert torch.equal(ours.codes(), codes[:, ours.order.long()])
    assert ours.nbytes == pack.weight_bytes(4, columns, 4, group) + 4 * columns


def test_bfloat16_scales_become_float32() -> None:
    weight = pack.pack_weight(draw_codes(4, 128, 4), draw_scale(4, 1).bfloat16(), None, 4, 128)
    assert weight.scale.dtype == torch.float32
    assert torch.equal(weight.scale[0], draw_scale(4, 1).bfloat16().float()[:, 0])


def test_what_has_no_layout_is_refused() -> None:
    codes, scale = draw_codes(4, 768, 4), draw_scale(4, 8)
    with pytest.raises(ValueError, match="5 bits: expected one of 1, 2, 3, 4, 8"):
        pack.pack_weight(codes, scale, None, 5, 96)
    with pytest.raises(ValueError, match="groups of 96 at 4 bits: expected a multiple of 16 that divides 128"):
        pack.pack_weight(codes, scale, None, 4, 96)
    with pytest.raises(ValueError, match="groups of 100 do not divide 768"):
        pack.pack_weight(codes, scale, None, 4, 100)
    with pytest.raises(ValueError, match=r"scale \[4, 8\]: expected \[4, 6\]"):
        pack.pack_weight(codes, scale, None, 4, 128)
    with pytest.raises(ValueError, match="codes from 0 to 15: expected 0 to 3"):
        pack.pack_codes(codes, 2)
    with pytest.raises(ValueError, match="zeros from -129 to -129: expected -128 to 255"):
        pack.pack_weight(codes, draw_scale(4, 6), torch.full((4, 6), -129), 4, 128)
    with pytest.raises(ValueError, match="expected 128 columns in each of 6 groups"):
        pack.pack_weight(codes, draw_scale(4, 6), None, 4, 128, torch.zeros(768, dtype=torch.int32))


# -- sign planes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_sign_planes_are_those_of_the_method(bits: int, offset: bool) -> None:
    codes, alpha = draw_codes(10, 256, bits), draw_scale(10, 4, bits)
    low = draw_scale(10, 4) if offset else None
    theirs = BinaryCodedWeight(codes=codes, alpha=alpha, offset=low, group_size=64)
    ours = pack.pack_bcq(codes, alpha, low, 64)
    stored = theirs.packed()
    assert torch.equal(ours.planes, stored["weight_signs"])
    assert torch.equal(ours.alpha, stored["weight_alpha"])
    assert ours.nbytes == theirs.stored_bytes()
    assert torch.equal(ours.codes(), codes)
    assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_sign_planes_of_ragged_rows() -> None:
    codes = draw_codes(3, 77, 2)
    assert torch.equal(pack.pack_bcq(codes, draw_scale(3, 1, 2), None, -1).codes(), codes)
    with pytest.raises(ValueError, match="groups of 16: expected a multiple of 32"):
        pack.pack_bcq(draw_codes(3, 64, 2), draw_scale(3, 4, 2), None, 16)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        pack.pack_bcq(codes, torch.full((3, 1, 2), 1e6), None, -1)


# -- keys and values, INT8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_tokens_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64, 20), dtype=torch.uint8, generator=torch.manual_seed(1))
    codes[0] = 2**bits - 1
    words = pack.pack_tokens(codes, bits)
    assert words.shape == (3, 64 * bits // 32, 20)
    assert torch.equal(pack.unpack_tokens(words, bits), codes)
    token, channel = 37, 11
    field = (int(words[1, token * bits // 32, channel]) >> (token % (32 // bits) * bits)) & (2**bits - 1)
    assert field == codes[1, token, channel]
    with pytest.raises(ValueError, match="50 tokens: expected a multiple of"):
        pack.pack_tokens(codes[:, :50], bits)


@pytest.mark.parametrize("by_channel", [True, False])
def test_keys_and_values(by_channel: bool) -> None:
    codes = torch.randint(0, 4, (2, 64, 32), dtype=torch.uint8, generator=torch.manual_seed(1))
    shape = (2, 4, 32) if by_channel else (2, 64, 2)
    packed = pack.pack_kv(codes, draw_scale(*shape), -draw_scale(*shape), 2, 16, by_channel)
    expected = torch.empty(2, 64, 32)
    for head, token, channel in torch.cartesian_prod(torch.arange(2), torch.arange(64), torch.arange(32)).tolist():
        place = (head, token // 16, channel) if by_channel else (head, token, channel // 16)
        scale = float(packed.scale[place])
        expected[head, token, channel] = float(codes[head, token, channel]) * scale - scale
    assert torch.equal(packed.dequantize(), expected)
    assert packed.shape == (2, 64, 32)
    assert packed.nbytes == 2 * 64 * 32 * 2 // 8 + 2 * 2 * scale_count(shape)
    with pytest.raises(ValueError, match="expected"):
        pack.pack_kv(codes, draw_scale(*shape), draw_scale(*shape), 2, 16, not by_channel)


def scale_count(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] * shape[2]


def test_int8_rows() -> None:
    codes = torch.randint(-127, 128, (5, 50), dtype=torch.int8, generator=torch.manual_seed(1))
    scale = torch.rand(5)
    packed = pack.pack_int8(codes, scale)
    assert packed.values.shape == (5, 64) and int(packed.values[:, 50:].abs().sum()) == 0
    assert torch.equal(packed.codes(), codes) and packed.nbytes == 5 * 64 + 4 * 5
    assert torch.equal(packed.dequantize(), codes * scale[:, None])
    with pytest.raises(ValueError, match="expected int8"):
        pack.pack_int8(codes.int(), scale)


def test_moving_keeps_what_is_there() -> None:
    weight = pack.pack_weight(draw_codes(4, 512, 3), draw_scale(4, 1), None, 3, -1)
    moved = weight.to("meta")
    assert [tensor.device.type for tensor in moved.tensors().values()] == ["meta"] * 3
    assert moved.nbytes == weight.nbytes and sorted(moved.tensors()) == ["scale", "words.0", "words.1"]
