"""BCQ: closed forms, monotony, brute force, uniform grids as a special case, the packed layout and its arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics
from qfarm.methods import lut_gemm
from qfarm.methods.gptq import GPTQ
from qfarm.methods.lut_gemm import (
    LUTGEMM,
    BinaryCodedWeight,
    Levels,
    decode,
    from_uniform,
    greedy,
    importances,
    least_squares,
    lookup_table,
    lut_gemv,
    quantize,
    refine,
)
from qfarm.models.load import LoadedModel
from qfarm.quantized import pack_bits, unpack_bits
from qfarm.quantizer import Grid, relative_error
from qfarm.solver import group_aware_order
from tests.contract import by_threads
from tests.test_models import loaded

FINE: dict[str, Any] = {"scale_dtype": torch.float32}
WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))
UNIFORM: dict[str, Any] = {"start": "uniform", "rounds": 0, "offset": True}


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


def run(weight: Tensor, bits: int, group_size: int = -1, diagonal: Tensor | None = None, **options: Any) -> Any:
    dtype = options.pop("scale_dtype", torch.float32)
    grid = Grid(bits=bits, group_size=group_size, symmetric=options.pop("symmetric", False), scale_dtype=dtype)
    return quantize(weight, diagonal, grid, LUTGEMM(**options))


@pytest.mark.parametrize("rounds", [0, 1, 15])
def test_one_bit_is_the_closed_form(rounds: int) -> None:
    weight = normal(8, 64, 0)
    result = run(weight, 1, 16, rounds=rounds)
    expected = weight.reshape(8, 4, 16).abs().mean(2)
    torch.testing.assert_close(result.alpha[..., 0], expected)
    assert torch.equal(result.codes, (weight >= 0).to(torch.uint8))


def test_greedy_by_hand() -> None:
    """w = (4, -2, 1, 0): a_1 = 7/4; rest (9/4, -1/4, -3/4, -7/4), a_2 = 5/4."""
    codes, alpha = greedy(torch.tensor([[4.0, -2.0, 1.0, 0.0]]), 2, None)
    assert alpha.tolist() == [[1.75, 1.25]]
    assert codes.tolist() == [[0b11, 0b00, 0b01, 0b01]]
    assert run(torch.tensor([[4.0, -2.0, 1.0, 0.0]]), 2, rounds=0).codes.tolist() == codes.tolist()


def test_greedy_planes_are_nested() -> None:
    weight = normal(16, 32, 1)
    codes, alpha = greedy(weight, 4, None)
    fewer, first = greedy(weight, 2, None)
    assert torch.equal(alpha[:, :2], first) and torch.equal(codes & 3, fewer)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_half_step_increases_the_error(bits: int, weighted: bool, offset: bool) -> None:
    values = normal(50, 24, 2).double()
    importance = torch.rand(50, 24, generator=torch.manual_seed(3)).double() if weighted else None

    def error(codes: Tensor, alpha: Tensor, z: Tensor | None) -> Tensor:
        delta = (values - decode(codes, alpha, z)).square()
        return (delta if importance is None else delta * importance).sum(1)

    z = values.mean(1) if offset else None
    codes, alpha = greedy(values if z is None else values - z[:, None], bits, importance)
    before = first = error(codes, alpha, z)
    for _ in range(8):
        alpha, z = least_squares(values, codes, alpha, z, importance)
        assert (error(codes, alpha, z) <= before + 1e-12).all()
        before = error(codes, alpha, z)
        alpha = alpha.abs().sort(dim=1, descending=True).values
        codes = Levels.build(alpha, z, "nearest").assign(values)
        assert (error(codes, alpha, z) <= before + 1e-12).all()
        before = error(codes, alpha, z)
    assert bits == 1 and not offset and not weighted or before.sum() < first.sum()


def test_least_squares_solves_the_normal_equations() -> None:
    values = normal(20, 16, 4).double()
    codes, alpha = greedy(values, 3, None)
    design = ((codes[..., None] >> torch.arange(3, dtype=torch.uint8)) & 1).double() * 2 - 1
    expected = torch.linalg.lstsq(design, values[..., None]).solution[..., 0]
    torch.testing.assert_close(least_squares(values, codes, alpha, None, None)[0], expected, rtol=1e-6, atol=1e-8)


def test_equal_planes_keep_their_scales() -> None:
    """B^T B is singular: only the sum of the scales is determined."""
    values = torch.full((1, 8), 3.0, dtype=torch.float64)
    alpha = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    new, _ = least_squares(values, torch.full((1, 8), 3, dtype=torch.uint8), alpha, None, None)
    torch.testing.assert_close(new, torch.tensor([[2.25, 0.75]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_group_that_cannot_be_solved_keeps_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours are solved all the same. A negative ridge makes what is singular indefinite."""
    monkeypatch.setattr(lut_gemm, "RIDGE", -1e-3)
    values, alpha = normal(2, 4, 40).double(), torch.rand(2, 2).double() + 0.5
    codes = torch.tensor([[3, 3, 3, 0], [0, 1, 2, 3]], dtype=torch.uint8)  # equal planes; orthogonal ones
    new, _ = least_squares(values, codes, alpha, None, None)
    assert torch.equal(new[0], alpha[0])
    signs = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]]).double()
    torch.testing.assert_close(new[1], signs.T @ values[1] / 4, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_uneven_importance_stays_finite(spread: float) -> None:
    diagonal = torch.logspace(0, float(torch.log10(torch.tensor(spread))), 128)[torch.randperm(128)]
    weight = normal(256, 128, 41)
    weight[:64] = weight[:64].sign() * 0.3  # all planes equal
    for bits in (3, 5, 8):
        result = run(weight, bits, 128, diagonal, importance=2.0, offset=True)
        assert torch.isfinite(result.dequantize()).all()


def test_error_falls_with_more_bits_and_smaller_groups() -> None:
    weight = normal(32, 256, 5)
    by_bits = [relative_error(weight, run(weight, bits, 64).dequantize()) for bits in (1, 2, 3, 4, 5)]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[3] < 0.3 * by_bits[1]
    by_size = [relative_error(weight, run(weight, 3, size).dequantize()) for size in (16, 32, 128, 256)]
    assert by_size == sorted(by_size)


@pytest.mark.parametrize("offset", [False, True])
def test_a_representable_group_stays_where_it_is(offset: bool) -> None:
    generator = torch.manual_seed(6)
    alpha = torch.tensor([[1.0, 0.61, 0.23]]).repeat(5, 1).double() + 0.05 * torch.rand(5, 3, generator=generator)
    codes = torch.randint(0, 8, (5, 64), generator=generator).to(torch.uint8)
    z = torch.rand(5, generator=generator).double() if offset else None
    values = decode(codes, alpha, z)
    found, scales, at = refine(values, codes, alpha, z, None, rounds=10)
    assert torch.equal(found, codes)
    torch.testing.assert_close(scales, alpha, rtol=1e-12, atol=0)
    assert (decode(found, scales, at) - values).abs().max() < 1e-12


def test_against_brute_force() -> None:
    """All pairs of sign vectors, least squares each: the optimum is never beaten, and mostly reached."""
    generator = torch.manual_seed(7)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5))).double()
    pairs = torch.stack([torch.stack(pair, 1) for pair in itertools.combinations(signs, 2)])  # [496, 5, 2]
    pairs = pairs[(pairs[:, :, 0] != -pairs[:, :, 1]).any(1)]  # opposite vectors span no more than one
    projector = pairs @ torch.linalg.inv(pairs.mT @ pairs) @ pairs.mT
    reached = 0
    for _ in range(200):
        values = torch.randn(1, 5, generator=generator).double()
        best = float((values - projector @ values[0]).square().sum(1).min())
        codes, alpha, _ = refine(values, *greedy(values, 2, None), None, None, rounds=30)
        ours = float((values - decode(codes, alpha, None)).square().sum())
        assert ours >= best - 1e-9
        reached += ours <= best + 1e-9
    assert 150 <= reached <= 190  # the specification counted 169


@pytest.mark.parametrize("bits,symmetric", [(b, s) for b in (2, 3, 4, 8) for s in (False, True)])
def test_uniform_grids_fit_exactly(bits: int, symmetric: bool) -> None:
    weight = normal(8, 64, 8) + 0.3
    nearest = Grid(bits=bits, group_size=16, symmetric=symmetric, **FINE).quantize(weight)
    converted = from_uniform(nearest)
    scale = float(nearest.dequantize().abs().max())
    assert (converted.dequantize() - nearest.dequantize()).abs().max() < 1e-6 * scale
    assert torch.equal(converted.codes, nearest.codes) and converted.solver == "rtn"
    method = run(weight, bits, 16, symmetric=symmetric, **UNIFORM)
    assert (method.dequantize() - nearest.dequantize()).abs().max() < 1e-6 * scale
    half = from_uniform(Grid(bits=bits, group_size=16, symmetric=symmetric).quantize(weight))
    coarse = Grid(bits=bits, group_size=16, symmetric=symmetric).quantize(weight).dequantize()
    assert (half.dequantize() - coarse).abs().max() < 2**-11 * scale  # the offset's rounding
    refined = run(weight, bits, 16, start="uniform", offset=True)
    assert relative_error(weight, refined.dequantize()) <= relative_error(weight, nearest.dequantize())


def test_permuted_groups_have_no_binary_form() -> None:
    nearest = Grid(bits=3, group_size=16).quantize(normal(4, 32, 9))
    with pytest.raises(ValueError, match="consecutive"):
        from_uniform(dataclasses.replace(nearest, g_idx=torch.zeros(32, dtype=torch.int32)))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_assignment_is_the_nearest_of_all_levels(bits: int, offset: bool) -> None:
    generator = torch.manual_seed(10)
    alpha = torch.rand(6, bits, generator=generator)  # in no order
    z = torch.randn(6, generator=generator) if offset else None
    values = 2 * torch.randn(6, 100, generator=generator)
    every = torch.arange(2**bits).to(torch.uint8).expand(6, -1)
    distance = (values[:, :, None] - decode(every, alpha, z)[:, None]).abs()
    codes = Levels.build(alpha, z, "nearest").assign(values)
    torch.testing.assert_close((values - decode(codes, alpha, z)).abs(), distance.amin(2), rtol=0, atol=1e-6)


def test_scales_are_positive_and_sorted() -> None:
    values = normal(50, 12, 31)
    _, alpha, _ = refine(values, *greedy(values, 4, None), None, None, rounds=5)
    assert (alpha >= 0).all() and (alpha.diff(dim=1) <= 0).all()
    # Least squares alone may give a negative scale.
    codes = torch.tensor([[0, 3, 3, 3]], dtype=torch.uint8)
    _, alpha, _ = refine(torch.tensor([[2.0, -1.0, -1.0, -2.0]]), codes, torch.ones(1, 2), None, None, rounds=1)
    assert (alpha > 0).all()


def test_ties_go_up() -> None:
    levels = Levels.build(torch.tensor([[1.0, 0.5]]), None, "nearest")  # -1.5, -0.5, 0.5, 1.5
    values = torch.tensor([[-1.0, 0.0, 1.0, 9.0, -9.0]])
    assert decode(levels.assign(values), levels.alpha, None).tolist() == [[-0.5, 0.5, 1.5, 1.5, -1.5]]


@pytest.mark.parametrize("options", [{}, {"rounds": 0}, {"assignment": "greedy"}, {"offset": True}])
def test_sign_and_scale_equivariance(options: dict[str, Any]) -> None:
    weight = normal(16, 64, 11)
    result = run(weight, 3, 16, **options).dequantize()
    torch.testing.assert_close(run(-weight, 3, 16, **options).dequantize(), -result, rtol=1e-4, atol=1e-5)
    for factor in (1e-6, 1e4):  # an absolute epsilon of 1e-6 would spoil the small one
        scaled = run(factor * weight, 3, 16, **options).dequantize() / factor
        torch.testing.assert_close(scaled, result, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rounds": 0}, {"assignment": "greedy"}, {"offset": True}, UNIFORM])
def test_degenerate_groups(options: dict[str, Any]) -> None:
    weight = torch.zeros(4, 16)
    weight[1] = 0.7
    weight[2, 5] = 1.0
    weight[3, ::2] = -0.3
    result = run(weight, 3, **options)
    values = result.dequantize()
    assert torch.isfinite(values).all() and (result.codes < 8).all()
    assert values[0].abs().max() < 1e-6
    torch.testing.assert_close(values[1], weight[1], rtol=1e-5, atol=0)
    signs = result.packed()["weight_signs"]
    assert signs.shape == (1, 3, 4)
    if options in ({}, {"rounds": 0}):
        assert (result.alpha[0] == 0).all() and (result.codes[0] == 7).all()  # +1 throughout


@pytest.mark.parametrize("bits,rounds,expected", [(4, 0, 0.0328), (4, 1, 0.0244), (4, 15, 0.0113), (4, 30, 0.0111)])
def test_errors_on_gaussian_weights(bits: int, rounds: int, expected: float) -> None:
    weight = normal(256, 1024, 12)
    result = run(weight, bits, 128, rounds=rounds)
    assert relative_error(weight, result.dequantize()) == pytest.approx(expected, rel=0.05)
    if rounds in (0, 30):  # for the top level at 1.7 and 2.3 sigma
        assert result.notes["clipped"] == pytest.approx({0: 0.087, 30: 0.026}[rounds], rel=0.2)


def test_three_bits_and_what_an_offset_and_a_uniform_start_change() -> None:
    weight = normal(256, 1024, 13)
    plain = relative_error(weight, run(weight, 3, 128, rounds=30).dequantize())
    assert plain == pytest.approx(0.0355, rel=0.05)
    nearest = relative_error(weight, Grid(bits=3, group_size=128, **FINE).quantize(weight).dequantize())
    assert nearest == pytest.approx(0.0478, rel=0.05)
    assert relative_error(weight, run(weight, 3, 128, offset=True).dequantize()) < plain * 1.02


def test_converged_groups_are_left_alone_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(24, 64, 14)
    whole = run(weight, 3, 16, rounds=100)
    monkeypatch.setattr(lut_gemm, "CHUNK", 5 * 16 * 3)
    assert torch.equal(run(weight, 3, 16, rounds=100).dequantize(), whole.dequantize())
    alone = run(weight[3:4], 3, 16, rounds=100)
    assert torch.equal(alone.dequantize(), whole.dequantize()[3:4])


def unpacked(tensors: dict[str, Tensor], columns: int, group_size: int) -> BinaryCodedWeight:
    signs = tensors["weight_signs"]  # [words, k, m]
    codes = torch.zeros(signs.shape[2], columns, dtype=torch.uint8)
    for i in range(signs.shape[1]):
        codes |= unpack_bits(signs[:, i].T.contiguous(), 1, columns) << i
    offset = tensors["weight_offset"].T if "weight_offset" in tensors else None
    return BinaryCodedWeight(
        codes=codes, alpha=tensors["weight_alpha"].permute(2, 0, 1), offset=offset, group_size=group_size
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.integers(1, 40),
    bits=st.integers(1, 8),
    per_channel=st.booleans(),
    offset=st.booleans(),
    rounds=st.sampled_from([0, 1, 3]),
    assignment=st.sampled_from(["nearest", "greedy"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_stored_bytes_and_round_trip(
    rows: int,
    groups: int,
    size: int,
    bits: int,
    per_channel: bool,
    offset: bool,
    rounds: int,
    assignment: Any,
    dtype: torch.dtype,
) -> None:
    n, group_size = groups * size, -1 if per_channel else size
    options = {"offset": offset, "rounds": rounds, "assignment": assignment, "scale_dtype": dtype}
    result = run(normal(rows, n, rows + n), bits, group_size, **options)
    tensors = result.packed()
    assert all(t.is_contiguous() for t in tensors.values())
    assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    assert torch.equal(unpacked(tensors, n, group_size).dequantize(), result.dequantize())
    part = result.row_range(0, max(1, rows - 1))
    assert torch.equal(part.dequantize(), result.dequantize()[: max(1, rows - 1)])
    assert part.stored_bytes() == sum(t.numel() * t.element_size() for t in part.packed().values())


def test_threads_do_not_change_the_result() -> None:
    """Bit for bit: groups are solved apart."""
    one, two = by_threads(lambda: run(normal(222, 770, 43), 3, 77, rounds=3).dequantize(), 1, 2)
    assert torch.equal(one, two)


def test_bits_per_weight() -> None:
    for bits, size, offset, expected in (
        (3, 128, False, 3.375),
        (3, 128, True, 3.5),
        (4, 128, True, 4.625),
        (3, 32, True, 5.0),
        (4, -1, False, 4 + 16 * 4 / 256),
    ):
        result = run(normal(8, 256, 15), bits, size, offset=offset, rounds=0, scale_dtype=torch.float16)
        assert 8 * result.stored_bytes() / (8 * 256) == pytest.approx(expected)


def test_layout_of_the_signs() -> None:
    """A single +1: plane p of input 32 i + t for output o is bit t of word (i, p, o)."""
    codes = torch.zeros(3, 80, dtype=torch.uint8)
    codes[2, 45] = 0b10
    weight = BinaryCodedWeight(codes=codes, alpha=torch.ones(3, 1, 2), offset=None, group_size=-1)
    signs = weight.packed()["weight_signs"]
    assert signs.shape == (3, 2, 3) and signs.dtype == torch.int32
    assert signs.nonzero().tolist() == [[1, 1, 2]] and int(signs[1, 1, 2]) == 1 << 13


def test_lookup_table_by_doubling_equals_direct_sums() -> None:
    inputs = normal(3, 8, 16)
    table = lookup_table(inputs)
    signs = torch.tensor([[1.0 if c >> t & 1 else -1.0 for t in range(8)] for c in range(256)])
    torch.testing.assert_close(table, inputs @ signs.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[:, 255], inputs.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[:, 0], -inputs.sum(1))
    torch.testing.assert_close(table, -table.flip(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("columns,group_size", [(64, 16), (96, 8), (40, 40), (77, -1), (32, -1), (5, -1)])
def test_look_up_product_equals_the_dense_one(columns: int, group_size: int, offset: bool) -> None:
    weight, inputs = run(normal(7, columns, 17), 3, group_size, offset=offset), normal(1, columns, 18)[0]
    expected = inputs @ weight.dequantize().T
    torch.testing.assert_close(lut_gemv(inputs, weight.packed()), expected, rtol=1e-5, atol=1e-5 * columns**0.5)


def test_look_up_product_needs_whole_runs() -> None:
    with pytest.raises(ValueError, match="groups of 12"):
        lut_gemv(torch.ones(24), run(normal(2, 24, 19), 2, 12).packed())


def test_importance_protects_the_columns_that_count() -> None:
    weight = normal(64, 128, 20)
    diagonal = torch.ones(128)
    diagonal[:64:16] = diagonal[69::16] = 100.0
    plain, weighted = run(weight, 3, 64), run(weight, 3, 64, diagonal, importance=1.0)
    errors = [((r.dequantize() - weight).square() * diagonal).sum() for r in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]
    assert torch.equal(run(weight, 3, 64, 7 * diagonal, importance=1.0).codes, weighted.codes)
    assert torch.equal(run(weight, 3, 64, diagonal, importance=0.0).codes, plain.codes)
    dead = importances(torch.tensor([0.0, 0.0, 4.0, 0.0]), 2, 0.5)
    assert dead is not None and dead.tolist() == [[1.0, 1.0], [2.0, 0.0]]


def statistics(n: int, seed: int) -> InputStatistics:
    generator = torch.manual_seed(seed)
    x = torch.randn(512, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return InputStatistics(tokens=512, hessian=x.T @ x / 512, sample=x[:64])


@pytest.mark.parametrize("options", [{}, {"offset": True}, {"importance": 0.5}, {"assignment": "greedy"}])
@pytest.mark.parametrize("group_size", [16, -1])
def test_feedback(options: dict[str, Any], group_size: int) -> None:
    weight, inputs = normal(32, 64, 21), statistics(64, 22)
    grid = Grid(bits=3, group_size=group_size, **FINE)
    plain = LUTGEMM(**options).quantize_linear(weight, inputs, grid)
    result = LUTGEMM(**options, feedback=True).quantize_linear(weight, inputs, grid)
    assert inputs.hessian is not None
    damped = inputs.hessian + 0.01 * inputs.hessian.diagonal().mean() * torch.eye(64)

    def loss(quantized: BinaryCodedWeight) -> float:
        delta = (weight - quantized.dequantize()).double()
        return float((delta @ damped.double() * delta).sum())

    assert result.notes["loss"] == pytest.approx(loss(result), rel=1e-4)
    assert loss(result) < 0.8 * loss(plain)
    assert result.notes["ordinary_error"] < result.notes["ordinary_error_without_feedback"]


def test_feedback_with_a_diagonal_hessian_changes_nothing() -> None:
    weight, diagonal = normal(16, 64, 23), torch.rand(64, generator=torch.manual_seed(24)) + 0.1
    inputs = InputStatistics(tokens=1, hessian=torch.diag(diagonal), sample=normal(4, 64, 25))
    for group_size in (16, -1):
        grid = Grid(bits=3, group_size=group_size, **FINE)
        plain = LUTGEMM().quantize_linear(weight, inputs, grid)
        fed = LUTGEMM(feedback=True).quantize_linear(weight, inputs, grid)
        torch.testing.assert_close(fed.dequantize(), plain.dequantize(), rtol=1e-4, atol=1e-5)
    grid = Grid(bits=3, group_size=16, **FINE)
    plain = LUTGEMM(importance=2.0).quantize_linear(weight, inputs, grid)
    fed = LUTGEMM(importance=2.0, feedback=True).quantize_linear(weight, inputs, grid)
    torch.testing.assert_close(fed.dequantize(), plain.dequantize(), rtol=1e-4, atol=1e-5)
    order = group_aware_order(diagonal, 16)
    assert (order.reshape(-1, 16) // 16 == order.reshape(-1, 16)[:, :1] // 16).all()


def test_feedback_without_a_factor_is_left_out_and_says_so() -> None:
    hopeless = torch.full((16, 16), 10.0).fill_diagonal_(1.0)
    inputs = InputStatistics(tokens=1, hessian=hopeless, sample=torch.eye(16))
    weight, grid = normal(4, 16, 42), Grid(bits=3, **FINE)
    result = LUTGEMM(feedback=True).quantize_linear(weight, inputs, grid)
    assert "could not be factored" in result.notes["reason"] and "loss" not in result.notes
    assert torch.equal(result.dequantize(), LUTGEMM().quantize_linear(weight, None, grid).dequantize())
    inputs.hessian = torch.full((16, 16), torch.nan)
    with pytest.raises(NonFinite, match="calibration"):
        LUTGEMM(feedback=True).quantize_linear(weight, inputs, grid)


def test_uniform_start_with_feedback_is_gptq() -> None:
    """The identity of grids carries through the column loop."""
    weight, inputs = normal(16, 64, 26), statistics(64, 27)
    grid = Grid(bits=3, group_size=16, **FINE)
    ours = LUTGEMM(**UNIFORM, feedback=True).quantize_linear(weight, inputs, grid)
    theirs = GPTQ().quantize_linear(weight, inputs, grid)
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=1e-4, atol=1e-4)


def test_nonfinite_values_are_errors() -> None:
    bad = normal(4, 16, 28)
    bad[2, 2] = float("inf")
    with pytest.raises(NonFinite, match="NaN or Inf"):
        run(bad, 3)
    with pytest.raises(NonFinite, match="does not fit"):
        run(1e6 * normal(4, 16, 29), 3, scale_dtype=torch.float16)
    with pytest.raises(NonFinite, match="calibration"):
        run(normal(4, 16, 30), 3, diagonal=torch.full((16,), torch.nan), importance=1.0)


def test_options_and_refusals() -> None:
    assert LUTGEMM().refusal(128, False) is None and LUTGEMM().refusal(-1, True) is None
    assert "needs offset" in str(LUTGEMM(start="uniform").refusal(128, False))
    assert "not symmetric" in str(LUTGEMM(offset=True).refusal(128, True))
    assert LUTGEMM(**UNIFORM).refusal(128, True) is None
    assert not LUTGEMM().needs_text and LUTGEMM(importance=1.0).needs_text and LUTGEMM(feedback=True).needs_text
    with pytest.raises(ValueError, match="greater than or equal"):
        LUTGEMM(rounds=-1)
    assert pack_bits(torch.ones(1, 32, dtype=torch.uint8), 1).item() == -1  # what a plane of +1 looks like


def quantize_tiny(model: LoadedModel, solver: LUTGEMM, **options: Any) -> list[LayerResult]:
    grid = Grid(bits=options.pop("bits", 3), group_size=16)
    return quantize_weights(model, solver, lambda role: grid, WINDOWS, report=lambda done, total: None, **options)


@pytest.mark.parametrize(
    "family,options", [("llama", {}), ("opt", {"offset": True, "importance": 1.0}), ("llama", {"feedback": True})]
)
def test_tiny_model(tiny_models: dict[str, Path], family: str, options: dict[str, Any]) -> None:
    first, second = loaded(tiny_models[family]), loaded(tiny_models[family])
    results = quantize_tiny(first, LUTGEMM(**options), sequential=True)
    assert results == quantize_tiny(second, LUTGEMM(**options), sequential=True)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(results) == 2 * len(first.architecture.roles) and all(r.solver == "lut_gemm" for r in results)
    assert torch.isfinite(first.model(WINDOWS).logits).all()


def test_feedback_lowers_the_error_of_outputs(tiny: Path) -> None:
    fed = quantize_tiny(loaded(tiny), LUTGEMM(feedback=True), sequential=False)
    weighted = quantize_tiny(loaded(tiny), LUTGEMM(importance=1.0), sequential=False)
    errors = [(a.output_error, b.output_error) for a, b in zip(fed, weighted, strict=True)]
    assert all(a is not None and b is not None and a < b for a, b in errors)
