"""The uniform quantizer against closed forms and its invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfarm.errors import NonFinite
from qfarm.quantized import UniformWeight, pack_bits, packed_words, unpack_bits
from qfarm.quantizer import Grid, relative_error

EXACT = torch.float32


def grid(bits: int, **options: object) -> Grid:
    return Grid(bits=bits, scale_dtype=options.pop("scale_dtype", EXACT), **options)  # type: ignore[arg-type]


def test_asymmetric_by_hand() -> None:
    result = grid(4).quantize(torch.tensor([[-1, 0, 0.45, 2]]))
    assert result.scale.item() == pytest.approx(0.2)
    assert result.zero is not None and result.zero.item() == 5
    assert result.codes.tolist() == [[0, 5, 7, 15]]
    torch.testing.assert_close(result.dequantize(), torch.tensor([[-1, 0, 0.4, 2]]))


def test_symmetric_by_hand() -> None:
    result = grid(4, symmetric=True).quantize(torch.tensor([[-1, 0.3, 0.7, 0.9]]))
    assert result.scale.item() == pytest.approx(1 / 7)
    assert (result.codes.int() - 8).tolist() == [[-7, 2, 5, 6]]
    assert result.zero is None


def test_deepspeed_convention_by_hand() -> None:
    deepspeed = grid(4, symmetric=True, convention="deepspeed")
    result = deepspeed.quantize(torch.tensor([[-1, 0.3, 0.7, 0.9]]))
    assert result.scale.item() == 0.125
    assert (result.codes.int() - 8).tolist() == [[-8, 2, 6, 7]]
    assert deepspeed.quantize(torch.tensor([[1.0, 0]])).dequantize().tolist() == [[0.875, 0]]


def test_full_range_offset_does_not_clip_one_sided_rows() -> None:
    """The published code halves the range of rows without negative elements."""
    row = torch.rand(1, 64) + 0.01
    result = grid(4, symmetric=True, convention="full_range_offset").quantize(row)
    assert result.scale.item() == pytest.approx(2 * row.max().item() / 15)
    assert (result.dequantize() - row).abs().max() <= result.scale.item() / 2 * 1.0001


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_zeros_stay_zeros(bits: int, symmetric: bool) -> None:
    result = grid(bits, symmetric=symmetric).quantize(torch.zeros(3, 8))
    assert torch.isfinite(result.scale).all() and (result.scale > 0).all()
    assert result.dequantize().tolist() == torch.zeros(3, 8).tolist()


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("convention", ["restricted", "full_range_offset"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, convention: str, group_size: int) -> None:
    weight = torch.randn(8, 64, generator=torch.manual_seed(bits))
    weight[0] = weight[0].abs()  # a row without negatives
    weight[1] = -weight[1].abs()
    result = grid(bits, symmetric=symmetric, convention=convention, group_size=group_size).quantize(weight)
    step = result.scale.repeat_interleave(64 // result.scale.shape[1], dim=1)
    slack = 0.5 + (0.51 if symmetric and convention == "full_range_offset" else 1e-5)  # -amax ties or clips there
    assert ((result.dequantize() - weight).abs() <= slack * step).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_idempotent(symmetric: bool) -> None:
    weight = torch.randn(16, 64, generator=torch.manual_seed(0))
    if not symmetric:
        weight[:, 0], weight[:, 1] = -4, 8  # scale 0.8, zero 5: both ends of the range lie on the grid
    once = grid(4, symmetric=symmetric).quantize(weight).dequantize()
    twice = grid(4, symmetric=symmetric).quantize(once).dequantize()
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-6)


def test_sign_symmetry_and_scale_equivariance() -> None:
    weight = torch.randn(4, 32, generator=torch.manual_seed(1))
    symmetric = grid(4, symmetric=True)
    assert torch.equal(symmetric.quantize(-weight).dequantize(), -symmetric.quantize(weight).dequantize())
    for each in (symmetric, grid(4)):
        assert torch.equal(each.quantize(8 * weight).dequantize(), 8 * each.quantize(weight).dequantize())


def test_monotone_and_few_values() -> None:
    row = torch.randn(1, 4096, generator=torch.manual_seed(2)).sort().values
    values = grid(3).quantize(row).dequantize()[0]
    assert (values.diff() >= 0).all() and len(values.unique()) <= 8


def test_finer_is_better_on_average() -> None:
    weight = torch.randn(64, 256, generator=torch.manual_seed(3))
    errors = [relative_error(weight, grid(bits).quantize(weight).dequantize()) for bits in range(2, 9)]
    assert all(b < a / 2 for a, b in zip(errors, errors[1:], strict=False))
    by_group = [relative_error(weight, grid(4, group_size=g).quantize(weight).dequantize()) for g in (256, 64, 16)]
    assert by_group[0] > by_group[1] > by_group[2]
    whole_row = grid(4, group_size=256).quantize(weight).dequantize()
    assert torch.equal(whole_row, grid(4).quantize(weight).dequantize())


def test_search_lowers_the_error_of_heavy_tails() -> None:
    weight = torch.randn(32, 128, generator=torch.manual_seed(4)) ** 3
    plain, searched = grid(3).quantize(weight), grid(3, search=True).quantize(weight)

    def norm(result: UniformWeight) -> torch.Tensor:
        return (result.dequantize() - weight).abs().pow(2.4).sum(1)

    assert (norm(searched) <= norm(plain) * 1.0001).all() and norm(searched).sum() < 0.95 * norm(plain).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_is_rounded_with_the_stored_scale(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64, generator=torch.manual_seed(5))
    result = grid(4, scale_dtype=dtype).quantize(weight)
    assert result.scale.dtype == dtype
    scale = result.scale.float()
    assert result.zero is not None
    best = (torch.round(weight / scale) + result.zero).clamp(0, 15)
    assert torch.equal(result.codes.float(), best)


def test_scales_that_do_not_fit_are_refused_and_tiny_ones_stay_normal() -> None:
    with pytest.raises(NonFinite, match="scale_dtype"):
        grid(4, scale_dtype=torch.float16).quantize(torch.full((1, 4), 1e7))
    tiny = grid(4, scale_dtype=torch.float16).quantize(torch.full((1, 4), 1e-9))
    assert torch.isfinite(tiny.dequantize()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_are_refused(bad: float) -> None:
    with pytest.raises(NonFinite):
        grid(4).quantize(torch.tensor([[1.0, bad]]))


def test_groups_never_cross_rows() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        grid(4, group_size=48).quantize(torch.randn(3, 64))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), count=st.integers(1, 130), seed=st.integers(0, 999))
def test_packing_is_exact(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.manual_seed(seed), dtype=torch.uint8)
    words = pack_bits(codes, bits)
    assert words.shape == (rows, packed_words(count, bits)) and words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, bits, count), codes)


def test_packing_layout_by_hand() -> None:
    # Element i occupies bits i*b .. i*b+b-1, low end first, crossing words.
    assert pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x321]]
    crossing = torch.zeros(1, 11, dtype=torch.uint8)
    crossing[0, 10] = 0b110  # bits 30, 31 of word 0 and bit 0 of word 1
    assert pack_bits(crossing, 3).tolist() == [[-(2**31), 1]]


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.sampled_from([2, 8, 24, 64]),
    symmetric=st.booleans(),
    permuted=st.booleans(),
)
def test_stored_bytes_equal_the_packed_tensors(
    bits: int, rows: int, groups: int, size: int, symmetric: bool, permuted: bool
) -> None:
    weight = torch.randn(rows, groups * size)
    result = Grid(bits=bits, group_size=size, symmetric=symmetric).quantize(weight)
    if permuted:
        result.g_idx = torch.arange(groups * size, dtype=torch.int32) // size
    tensors = result.packed()
    assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    assert torch.equal(unpack_bits(tensors["weight_packed"], bits, groups * size), result.codes)
    if result.zero is not None:
        zeros = unpack_bits(tensors["weight_zero_point"].T.contiguous(), bits, rows).T
        assert torch.equal(zeros, result.zero)


def test_g_idx_and_row_ranges() -> None:
    result = Grid(bits=4, group_size=8).quantize(torch.randn(6, 32))
    whole = result.dequantize()
    part = result.row_range(2, 5)
    assert torch.equal(part.dequantize(), whole[2:5]) and part.shape == (3, 32)
    order = torch.randperm(32)
    shuffled = UniformWeight(
        codes=result.codes[:, order],
        scale=result.scale,
        zero=result.zero,
        bits=4,
        group_size=8,
        g_idx=(torch.arange(32) // 8)[order].to(torch.int32),
    )
    assert torch.equal(shuffled.dequantize(), whole[:, order])
