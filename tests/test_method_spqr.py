"""SpQR: leave-one-out by brute force, identities with GPTQ, what outliers and two-level statistics do, storage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.errors import InvalidInput, NonFinite
from qfarm.inputs import InputStatistics
from qfarm.methods.gptq import GPTQ, gptq
from qfarm.methods.rtn import RTN
from qfarm.methods.spqr import (
    Outliers,
    RealGrid,
    SecondLevel,
    SpQR,
    SpQRWeight,
    average_bits,
    column_order,
    decoded,
    least_bytes,
    outlier_scale,
    reductions,
    spqr,
    without_outliers,
)
from qfarm.models.load import LoadedModel
from qfarm.quantized import UniformWeight, unpack_bits
from qfarm.quantizer import Grid
from qfarm.recipe import WeightSolver
from qfarm.solver import factorise
from tests.contract import require_ties_at_most
from tests.job_example import changed, matrix
from tests.test_models import loaded

FINE = {"scale_dtype": torch.float32}
ONE_LEVEL: dict[str, Any] = {"scale_bits": None, "zero_bits": None}
WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


def correlated(n: int, seed: int, tokens: int = 512) -> Tensor:
    generator = torch.manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return x.T @ x / tokens


def run(weight: Tensor, hessian: Tensor, grid: Grid, **options: Any) -> SpQRWeight:
    method = SpQR(**options)
    order = column_order(weight, hessian, method.order)
    return spqr(weight, factorise(hessian, order, method.damping, 0.01), grid, method)


def damped(hessian: Tensor, damping: float = 1.0) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    delta = (weight - values).double()
    return float((delta @ hessian.double() * delta).sum())


def mask(result: SpQRWeight) -> Tensor:
    """Outliers [rows, n] in the original column order."""
    assert result.outliers is not None
    marks = torch.zeros(result.shape)
    Outliers(
        starts=result.outliers.starts,
        columns=result.outliers.columns,
        values=torch.ones_like(result.outliers.values),
    ).write(marks)
    return marks.bool() if result.order is None else marks[:, torch.argsort(result.order)].bool()


@pytest.mark.parametrize("order", ["identity", "act_order"])
def test_without_its_additions_it_is_gptq(order: str) -> None:
    weight, hessian = normal(6, 48, 0), correlated(48, 1)
    grid = Grid(bits=3, **FINE)
    ours = run(weight, hessian, grid, **ONE_LEVEL, outlier_threshold=None, round_zero=True, damping=0.01, order=order)
    method = GPTQ(act_order=order == "act_order", group_aware=False)
    factor = factorise(hessian, column_order(weight, hessian, order), 0.01, 0.01)
    theirs = gptq(weight, factor, grid, method)
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=0, atol=1e-6)
    assert ours.stored_bytes() - (0 if order == "identity" else 4 * 48) == 6 * (4 * 5 + 4) + 4  # 6 x 3 bits of zeros


@pytest.mark.parametrize("threshold", [None, 0.3, 0.05])
@pytest.mark.parametrize("options", [{}, ONE_LEVEL, {"order": "identity", "round_zero": True}])
def test_loss_identity_holds_with_outliers(threshold: float | None, options: dict[str, Any]) -> None:
    weight, hessian = normal(32, 48, 2), correlated(48, 3)
    result = run(weight, hessian, Grid(bits=3, group_size=16, **FINE), outlier_threshold=threshold, **options)
    assert result.notes["loss"] == pytest.approx(loss(weight, result.dequantize(), damped(hessian)), rel=1e-4)


def test_threshold_zero_keeps_every_weight() -> None:
    weight, hessian = normal(16, 32, 4), correlated(32, 5)
    result = run(weight, hessian, Grid(bits=2, group_size=8, **FINE), outlier_threshold=0.0)
    torch.testing.assert_close(result.dequantize(), weight, rtol=0, atol=1e-6)
    assert result.notes["outliers"] > 0.9
    half = run(weight, hessian, Grid(bits=2, group_size=8), outlier_threshold=0.0)
    assert 0 < (half.dequantize() - weight).abs().max() < 1e-2  # rounded to 16 bit, and that error is fed back
    assert half.notes["loss"] == pytest.approx(loss(weight, half.dequantize(), damped(hessian)), rel=0.01)


def test_lower_thresholds_keep_more_and_lose_less() -> None:
    shares, losses = torch.zeros(5), torch.zeros(5)
    for seed in range(6):
        weight, hessian = normal(32, 64, 10 + seed), correlated(64, 20 + seed)
        for i, threshold in enumerate((0.02, 0.1, 0.2, 0.5, None)):
            result = run(weight, hessian, Grid(bits=3, group_size=16, **FINE), outlier_threshold=threshold)
            shares[i] += result.notes["outliers"] / 6
            losses[i] += result.notes["loss"] / 6
    assert (shares.diff() <= 0).all() and shares[0] > 0.05 and shares[-1] == 0
    assert (losses.diff() >= 0).all() and losses[0] < 0.8 * losses[-1]


def brute_force(group: Tensor, pivots: Tensor, grid: RealGrid) -> Tensor:
    """One fit per weight left out."""

    def total(values: Tensor, u: Tensor) -> Tensor:
        scale, zero, _ = grid.fit(values)
        return ((grid.round_trip(values, scale[:, None], zero[:, None]) - values) / u).square().sum(1)

    size, base = group.shape[1], total(group, pivots)
    kept = [[k for k in range(size) if k != left_out] for left_out in range(size)]
    return torch.stack([base - total(group[:, k], pivots[k]) for k in kept], dim=1)


@pytest.mark.parametrize("round_zero", [False, True])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_leave_one_out_equals_brute_force(size: int, round_zero: bool) -> None:
    group, pivots = normal(40, size, 30).double(), torch.rand(size, generator=torch.manual_seed(31)).double() + 0.5
    group[0] = 0.3  # constant
    group[1, :2] = 5.0  # two equal extremes
    group[2, -1] = 50.0
    grid = RealGrid(bits=3, dtype=torch.float32, round_zero=round_zero)
    found, expected = reductions(group, pivots, grid), brute_force(group, pivots, grid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert size == 2 or expected.abs().max() > 0.1  # two weights lie on their grid


def test_likely_outliers_give_way_to_the_mean_of_the_rest() -> None:
    group = torch.tensor([[1.0, 2.0, 3.0, 100.0], [1.0, 2.0, 3.0, 4.0]])
    result = without_outliers(group, torch.ones(4), RealGrid(bits=2, dtype=torch.float32), 4.5)
    assert result.tolist() == [[1.0, 2.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]]
    everything = without_outliers(group, torch.ones(4), RealGrid(bits=2, dtype=torch.float32), -1e9)
    assert everything.tolist() == [[0.0] * 4, [0.0] * 4]  # nothing is left to take the mean of


@pytest.mark.parametrize("weight_factor,hessian_factor", [(2.0**-6, 1.0), (1.0, 2.0**14)])
def test_outliers_do_not_depend_on_the_scale_of_weights_or_inputs(weight_factor: float, hessian_factor: float) -> None:
    weight, hessian = normal(32, 64, 32), correlated(64, 33)
    grid = Grid(bits=3, group_size=16, **FINE)
    plain = run(weight, hessian, grid)
    scaled = run(weight * weight_factor, hessian * hessian_factor, grid)
    assert torch.equal(mask(scaled), mask(plain)) and 0 < plain.notes["outliers"] < 0.1
    torch.testing.assert_close(scaled.dequantize() / weight_factor, plain.dequantize())


def test_a_planted_outlier_is_kept_and_spares_its_row() -> None:
    weight, hessian = normal(32, 64, 34), torch.eye(64)
    planted = weight.clone()
    planted[5, 20] = 50.0
    grid = Grid(bits=3, group_size=16, **FINE)
    clean, result = run(weight, hessian, grid), run(planted, hessian, grid)
    assert mask(result)[5, 20] and result.dequantize()[5, 20] == 50.0

    def error(values: Tensor, target: Tensor) -> float:
        delta = (values - target)[5, 16:32].square()
        return float(delta.sum() - delta[4])

    assert error(result.dequantize(), planted) < 1.5 * error(clean.dequantize(), weight)
    # Without leave-one-out the grid stretches to the outlier, and the weights beside it become outliers in its stead.
    simplified = run(planted, hessian, grid, simplified_outliers=True)
    assert not mask(simplified)[5, 20] and mask(simplified)[5, 16:32].sum() > 6


def test_final_mask_is_the_error_test() -> None:
    """With a diagonal H nothing moves: outliers are the weights whose e^2 exceeds the threshold, and no others."""
    weight = normal(32, 64, 35)
    hessian = torch.diag(torch.rand(64, generator=torch.manual_seed(36)) + 0.1)
    method = SpQR(order="identity")
    factor = factorise(hessian, torch.arange(64), 1.0, 0.01)
    result = spqr(weight, factor, Grid(bits=3, group_size=16, **FINE), method)
    threshold = 0.2 * outlier_scale(weight, factor.upper)
    by_hand = 0.2 * float((weight.var(dim=0) * damped(hessian).diagonal()).mean())
    assert threshold == pytest.approx(by_hand, rel=1e-5)
    scale, zero = decoded(result.scale).repeat_interleave(16, 1), decoded(result.zero).repeat_interleave(16, 1)
    dense = (torch.clamp(torch.round(weight / scale + zero), 0, 7) - zero) * scale
    expected = ((weight - dense) / factor.upper.diagonal()).square() > threshold
    assert torch.equal(mask(result), expected) and expected.any()


def test_eight_bit_statistics_are_nearly_exact_and_fewer_bits_are_worse() -> None:
    weight, hessian = normal(64, 64, 37), torch.eye(64)
    grid = Grid(bits=3, group_size=16, **FINE)
    exact = run(weight, hessian, grid, **ONE_LEVEL, outlier_threshold=None)
    losses = [
        run(weight, hessian, grid, scale_bits=bits, zero_bits=bits, outlier_threshold=None).notes["loss"]
        for bits in (8, 3, 2, 1)
    ]
    assert losses[0] == pytest.approx(exact.notes["loss"], rel=0.01)
    assert losses == sorted(losses) and losses[1] < 1.25 * losses[0]


def test_sixteen_bit_second_level_is_exact() -> None:
    """The grid of the second level itself, at a width beyond the options."""
    scales = torch.rand(16, generator=torch.manual_seed(38)) + 0.1
    grid = RealGrid(bits=16, dtype=torch.float32)
    scale, zero, _ = grid.fit(scales[None])
    torch.testing.assert_close(grid.round_trip(scales[None], scale, zero)[0], scales, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, ONE_LEVEL, {"round_zero": True}])
def test_zeros_decode_to_zero(bits: int, options: dict[str, Any]) -> None:
    """The reference's range [-1, 1] for constant groups would give 1 / (2^b - 1)."""
    for value in (0.0, 0.375, -0.25):
        weight = torch.full((32, 64), value)
        result = run(weight, torch.eye(64), Grid(bits=bits, group_size=16), outlier_threshold=None, **options)
        # With integer zeros the value is a multiple of a rounded scale.
        slack = 1e-3 * abs(value) if options.get("round_zero") else 0
        assert (result.dequantize() - weight).abs().max() <= slack
    group = normal(32, 64, 39)
    group[:, 16:32] = 0
    result = run(group, torch.eye(64), Grid(bits=bits, group_size=16), outlier_threshold=None, **options)
    kept = result.dequantize()[:, 16:32]
    if options != {}:
        assert (kept == 0).all()
    row = normal(32, 64, 40)
    row[3] = 0
    if options == ONE_LEVEL:
        result = run(row, torch.eye(64), Grid(bits=bits, group_size=16), outlier_threshold=None, **options)
        assert (result.dequantize()[3] == 0).all()


def test_a_zero_row_does_not_harm_the_rows_beside_it() -> None:
    """Its scale of 1 would be the largest of the run by far, and leave the others one code."""
    weight = 0.02 * normal(16, 64, 41)
    grid = Grid(bits=3, group_size=16)
    options: dict[str, Any] = {"outlier_threshold": None, "order": "identity"}
    before = run(weight, torch.eye(64), grid, **options)
    pruned = weight.clone()
    pruned[3] = 0
    after = run(pruned, torch.eye(64), grid, **options)
    others = [i for i in range(16) if i != 3]
    error = (after.dequantize() - pruned)[others].square().sum()
    assert error < 1.3 * (before.dequantize() - weight)[others].square().sum()
    step = decoded(after.scale).amin(0).repeat_interleave(16)
    assert (after.dequantize()[3].abs() <= 0.51 * step).all()


def test_statistics_stay_finite_and_scales_positive() -> None:
    weight = normal(16, 32, 42) * torch.logspace(-6, 3, 16)[:, None]
    weight[:, 16:] = 1000 + 1e-4 * weight[:, 16:].clamp(-1, 1)  # constant to 16-bit precision
    for options in ({}, ONE_LEVEL):
        result = run(weight, torch.eye(32), Grid(bits=3, group_size=16), outlier_threshold=None, **options)
        assert all(torch.isfinite(t.float()).all() for t in result.packed().values())
        assert (decoded(result.scale) > 0).all() and torch.isfinite(result.dequantize()).all()
        torch.testing.assert_close(result.dequantize()[:, 16:], weight[:, 16:], rtol=1e-3, atol=0)


def test_average_bits_of_the_published_runs() -> None:
    assert average_bits(2, 32, 0.02358, SpQR()) == pytest.approx(3.067, abs=5e-4)
    assert average_bits(3, 16, 0.01138, SpQR()) == pytest.approx(3.989, abs=5e-4)
    assert average_bits(3, 16, 0.01, SpQR(**ONE_LEVEL)) == pytest.approx(3 + 32 / 16 + 0.32)
    rounded = average_bits(3, 16, 0.01, SpQR(round_zero=True))
    assert rounded == pytest.approx(3 + (3 + 3) / 16 + 32 / 256 + 0.32)


def test_counted_bytes_agree_with_the_formula() -> None:
    weight = normal(256, 1024, 43)
    grid = Grid(bits=3, group_size=16)
    method = SpQR(order="identity")
    result = spqr(weight, factorise(torch.eye(1024), torch.arange(1024), 1.0, 0.01), grid, method)
    counted = 8 * result.stored_bytes() / weight.numel()
    assert counted == pytest.approx(result.notes["formula_bits"] + 32 / 1024, rel=1e-3)  # the row offsets
    assert counted == pytest.approx(result.notes["formula_bits"], rel=0.01)


def unpacked(tensors: dict[str, Tensor], like: SpQRWeight) -> SpQRWeight:
    """Rebuild from what went to disk; `like` gives shapes and widths only."""
    columns, sizes = like.shape[1], {}
    for name, kind in (("weight_scale", like.scale), ("weight_zero_point", like.zero)):
        if isinstance(kind, SecondLevel):
            codes = unpack_bits(tensors[f"{name}_packed"], kind.bits, kind.codes.numel()).reshape(kind.codes.shape)
            second = {"scale": tensors[f"{name}_scale"], "zero": tensors[f"{name}_zero"]}
            sizes[name] = SecondLevel(codes=codes, **second, bits=kind.bits, size=kind.size)
        elif kind.is_floating_point():
            sizes[name] = tensors[name]
        else:
            sizes[name] = unpack_bits(tensors[name], like.bits, kind.numel()).reshape(kind.shape)
    outliers = None
    if "outlier_starts" in tensors:
        outliers = Outliers(
            starts=tensors["outlier_starts"],
            columns=tensors["outlier_columns"].to(torch.int32),
            values=tensors["outlier_values"],
        )
    return SpQRWeight(
        codes=unpack_bits(tensors["weight_packed"], like.bits, columns),
        scale=sizes["weight_scale"],
        zero=sizes["weight_zero_point"],
        outliers=outliers,
        order=tensors.get("weight_order"),
        bits=like.bits,
        group_size=like.group_size,
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.integers(2, 20),
    bits=st.integers(2, 8),
    per_channel=st.booleans(),
    order=st.sampled_from(["identity", "act_order", "spearman"]),
    threshold=st.sampled_from([None, 0.05, 0.5]),
    widths=st.sampled_from([(3, 3), (None, None), (8, None), (None, 2)]),
    round_zero=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_stored_bytes_and_round_trip(
    rows: int,
    groups: int,
    size: int,
    bits: int,
    per_channel: bool,
    order: Any,
    threshold: float | None,
    widths: tuple[int | None, int | None],
    round_zero: bool,
    dtype: torch.dtype,
) -> None:
    n = groups * size
    grid = Grid(bits=bits, group_size=-1 if per_channel else size, scale_dtype=dtype)
    options: dict[str, Any] = {"order": order, "outlier_threshold": threshold, "round_zero": round_zero}
    options |= {"scale_bits": widths[0], "zero_bits": widths[1]}
    result = run(normal(rows, n, rows * n), correlated(n, n, 32), grid, **options)
    tensors = result.packed()
    assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    restored = unpacked(tensors, result)
    assert torch.equal(restored.dequantize(), result.dequantize())
    assert torch.isfinite(result.dequantize()).all()
    start = 16 if rows > 16 else 0
    stop = rows - 1 if rows - start > 1 else rows
    part = result.row_range(start, stop)
    assert part.outliers is None or (part.outliers.starts[0], part.outliers.starts[-1]) == (
        0,
        len(part.outliers.values),
    )
    assert torch.equal(part.dequantize(), result.dequantize()[start:stop])
    assert part.stored_bytes() == sum(t.numel() * t.element_size() for t in part.packed().values())


def test_rows_cannot_be_cut_inside_a_second_level_group() -> None:
    result = run(normal(32, 32, 44), torch.eye(32), Grid(bits=3, group_size=16))
    with pytest.raises(ValueError, match="inside a second-level group of 16"):
        result.row_range(8, 32)


@pytest.mark.parametrize("order", ["act_order", "spearman"])
def test_order_is_undone(order: str) -> None:
    """A permuted run is the natural run on permuted columns, put back."""
    weight, hessian = normal(32, 64, 45), correlated(64, 46)
    grid = Grid(bits=3, group_size=16, **FINE)
    permutation = column_order(weight, hessian, order)
    assert torch.equal(permutation.sort().values, torch.arange(64))
    result = run(weight, hessian, grid, order=order)
    assert result.order is not None and torch.equal(result.order.long(), permutation)
    natural = run(weight[:, permutation], hessian[permutation][:, permutation], grid, order="identity")
    assert torch.equal(result.dequantize()[:, permutation], natural.dequantize())
    assert result.stored_bytes() == natural.stored_bytes() + 4 * 64


def test_spearman_chains_the_columns_that_rank_rows_alike() -> None:
    first, second = normal(64, 1, 47), normal(64, 1, 48)
    weight = torch.cat([first, second, first**3, second.exp(), 2 * first], dim=1)  # monotone maps keep ranks
    order = column_order(weight, torch.eye(5), "spearman").tolist()
    assert order[0] == 0 and set(order[:3]) == {0, 2, 4}


def test_rows_of_one_run_may_change_places() -> None:
    weight, hessian = normal(32, 64, 49), correlated(64, 50)
    grid = Grid(bits=3, group_size=16, **FINE)
    swap = torch.arange(32)
    swap[[3, 11]] = swap[[11, 3]]
    assert torch.equal(run(weight[swap], hessian, grid).dequantize(), run(weight, hessian, grid).dequantize()[swap])
    across = torch.arange(32)
    across[[3, 20]] = across[[20, 3]]
    moved = run(weight[across], hessian, grid).dequantize()
    assert not torch.equal(moved, run(weight, hessian, grid).dequantize()[across])


def test_dead_inputs_are_no_outliers() -> None:
    weight, hessian = normal(16, 32, 51), correlated(32, 52)
    hessian[[2, 9]] = 0
    hessian[:, [2, 9]] = 0
    result = run(weight, hessian, Grid(bits=2, group_size=8), outlier_threshold=0.01)
    assert not mask(result)[:, [2, 9]].any() and mask(result).any()
    everything_dead = run(weight, torch.zeros(32, 32), Grid(bits=3, group_size=8))
    assert (everything_dead.dequantize() == 0).all() and everything_dead.notes["outliers"] == 0


def test_full_damping_is_applied_as_asked() -> None:
    hessian = correlated(16, 53)
    assert run(normal(4, 16, 54), hessian, Grid(bits=3)).notes["damping"] == 1.0
    upper = factorise(hessian, torch.arange(16), 2.5, 0.01).upper
    torch.testing.assert_close(torch.linalg.inv(upper.T @ upper), damped(hessian, 2.5), rtol=1e-3, atol=1e-3)


def statistics(hessian: Tensor, sample: Tensor) -> InputStatistics:
    return InputStatistics(tokens=len(sample), hessian=hessian, sample=sample)


def test_worse_than_rtn_is_reported_or_replaced() -> None:
    weight, sample = normal(16, 32, 55), normal(64, 32, 56)
    misleading = torch.diag(torch.logspace(-6, 6, 32))  # H knows nothing of the sample: compensation goes astray
    misleading += 0.99 * (misleading.diagonal()[:, None] * misleading.diagonal()).sqrt().fill_diagonal_(0)
    grid = Grid(bits=2, group_size=16)
    options: dict[str, Any] = {"damping": 1e-4, "outlier_threshold": None}
    reported = SpQR(**options).quantize_linear(weight, statistics(misleading, sample), grid)
    assert reported.solver == "spqr" and reported.notes["ordinary_error"] > reported.notes["ordinary_error_rtn"]
    replaced = SpQR(**options, on_worse="rtn").quantize_linear(weight, statistics(misleading, sample), grid)
    assert (
        isinstance(replaced, UniformWeight)
        and replaced.solver == "rtn"
        and "spqr was worse" in replaced.notes["reason"]
    )


@pytest.mark.parametrize("budget", [4.05, 4.4, 6.0])
def test_a_bit_budget_is_met_and_not_exceeded(budget: float) -> None:
    weight, hessian = normal(128, 256, 60), correlated(256, 61)
    inputs = statistics(hessian, normal(64, 256, 62))
    grid = Grid(bits=3, group_size=16)
    result = SpQR(target_bits=budget).quantize_linear(weight, inputs, grid)
    assert budget - 0.02 <= 8 * result.stored_bytes() / weight.numel() <= budget
    by_hand = SpQR(outlier_threshold=result.notes["outlier_threshold"]).quantize_linear(weight, inputs, grid)
    assert torch.equal(result.dequantize(), by_hand.dequantize())
    assert result.notes["outliers"] == by_hand.notes["outliers"] > 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.sampled_from([-1, 4, 10, 16]),
    bits=st.integers(2, 8),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    options=st.fixed_dictionaries(
        {
            "scale_bits": st.sampled_from([None, 3]),
            "zero_bits": st.sampled_from([None, 3, 8]),
            "second_group": st.sampled_from([2, 16]),
            "round_zero": st.booleans(),
            "order": st.sampled_from(["identity", "act_order"]),
            "outlier_threshold": st.sampled_from([None, 1e30]),
        }
    ),
)
def test_what_a_layer_takes_without_outliers_is_known_from_its_shape(
    rows: int, groups: int, size: int, bits: int, dtype: torch.dtype, options: Any
) -> None:
    columns = groups * (6 if size == -1 else size)
    weight, inputs = normal(rows, columns, 68), statistics(torch.eye(columns), normal(4, columns, 69))
    solver = SpQR(**options)
    made = solver.quantize_linear(weight, inputs, Grid(bits=bits, group_size=size, scale_dtype=dtype))
    assert made.notes["outliers"] == 0
    assert least_bytes(rows, columns, bits, size, dtype.itemsize, solver) == made.stored_bytes()


def test_a_larger_budget_loses_less() -> None:
    weight, inputs = normal(64, 128, 63), statistics(correlated(128, 64), normal(16, 128, 65))
    grid = Grid(bits=2, group_size=32)
    solver = [SpQR(target_bits=budget) for budget in (3.2, 3.6, 5.0)]
    losses = [each.quantize_linear(weight, inputs, grid).notes["loss"] for each in solver]
    assert losses == sorted(losses, reverse=True) and losses[2] < 0.7 * losses[0]


def test_a_budget_beyond_every_outlier_or_below_none() -> None:
    weight, inputs = normal(16, 32, 66), statistics(torch.eye(32), normal(4, 32, 67))
    grid = Grid(bits=3, group_size=16)
    everything = SpQR(target_bits=60.0).quantize_linear(weight, inputs, grid)
    assert everything.notes["outliers"] > 0.99 and 8 * everything.stored_bytes() / weight.numel() < 60
    with pytest.raises(
        InvalidInput, match=r"target_bits 3 is less than a layer of 16 x 32 takes without outliers, 6.688"
    ):
        SpQR(target_bits=3.0).quantize_linear(weight, inputs, grid)
    cells = matrix(changed(methods="[rtn, spqr: {target_bits: 3.0}]", bits="[w3]"))
    assert [cell.recipe for cell in cells.cells] == ["baseline", "rtn"]
    (refused,) = cells.invalid
    assert refused.rule.startswith(
        "spqr: q: target_bits 3 is less than a layer of 256 x 256 takes without outliers, 3."
    )
    assert "set one of them" in str(SpQR(target_bits=4.0, outlier_threshold=0.3).refusal(16, False))
    assert SpQR(target_bits=4.0).refusal(16, False) is None
    assert "target_bits" not in SpQR().identity() and SpQR(target_bits=4.0).identity()["target_bits"] == 4.0


@pytest.mark.parametrize("order", ["act_order", "spearman"])
def test_layers_that_share_an_input_share_a_factor_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, order: Any
) -> None:
    factored: list[Tensor] = []

    def count(hessian: Tensor, *rest: Any) -> Any:
        factored.append(hessian)
        return factorise(hessian, *rest)

    monkeypatch.setattr("qfarm.methods.spqr.factorise", count)
    heights = (("q", 24), ("k", 10), ("v", 10))  # 16 divides none of them
    weight = torch.cat([normal(rows, 64, 68 + rows) * rows for _, rows in heights])
    inputs = statistics(correlated(64, 69), normal(32, 64, 70))
    grid = Grid(bits=3, group_size=16)
    whole = SpQR(order=order).quantize_linear(weight, dataclasses.replace(inputs, roles=heights), grid)
    assert len(factored) == (1 if order == "act_order" else 3) and whole.shape == (44, 64) and whole.bits == 3
    start = 0
    for _, rows in heights:
        alone = SpQR(order=order).quantize_linear(weight[start : start + rows], inputs, grid)
        part = whole.row_range(start, start + rows)
        assert torch.equal(part.dequantize(), alone.dequantize()) and part.notes == alone.notes
        assert part.stored_bytes() == alone.stored_bytes()
        start += rows
    assert whole.stored_bytes() == sum(t.numel() * t.element_size() for t in whole.packed().values())
    assert torch.equal(whole.row_range(24, 30).dequantize(), whole.dequantize()[24:30])
    with pytest.raises(ValueError, match="several layers"):
        whole.row_range(20, 30)


def test_a_hessian_that_cannot_be_factored_leaves_rtn_and_says_so() -> None:
    hopeless = torch.full((16, 16), 10.0).fill_diagonal_(1.0)
    weight, grid = normal(4, 16, 71), Grid(bits=3, group_size=8)
    result = SpQR(damping=0.01).quantize_linear(weight, statistics(hopeless, torch.eye(16)), grid)
    assert result.solver == "rtn" and "factored" in result.notes["reason"]
    assert torch.equal(result.dequantize(), grid.quantize(weight).dequantize())
    with pytest.raises(NonFinite, match="calibration"):
        SpQR().quantize_linear(weight, statistics(torch.full((16, 16), torch.nan), torch.eye(16)), grid)


def test_threads_change_ties_at_most() -> None:
    """LAPACK sums in an order that depends on the number of threads, so that U differs in the last bits of float64."""
    require_ties_at_most(SpQR(), seed=72)


def test_nonfinite_weights_and_statistics_are_errors() -> None:
    bad = normal(4, 16, 57)
    bad[1, 3] = float("nan")
    with pytest.raises(NonFinite):
        run(bad, torch.eye(16), Grid(bits=3, group_size=8))
    with pytest.raises(NonFinite, match="do not fit"):
        run(1e6 * normal(4, 16, 58), torch.eye(16), Grid(bits=3, group_size=8))
    with pytest.raises(NonFinite, match="calibration"):
        run(normal(4, 16, 59), torch.full((16, 16), torch.nan), Grid(bits=3), order="identity")


def test_options_and_refusals() -> None:
    assert SpQR().refusal(16, False) is None and SpQR().refusal(-1, False) is None
    assert "symmetric: false" in str(SpQR().refusal(16, True))
    assert "group size of 2" in str(SpQR().refusal(1, False))
    assert "needs outliers" in str(SpQR(simplified_outliers=True, outlier_threshold=None).refusal(16, False))
    for wrong in ({"damping": 0.0}, {"outlier_threshold": -1.0}, {"scale_bits": 9}, {"second_group": 1}):
        with pytest.raises(ValueError, match="validation error"):
            SpQR(**wrong)  # type: ignore[arg-type]


def quantize(model: LoadedModel, solver: WeightSolver, bits: int = 3, **options: Any) -> list[LayerResult]:
    grid = Grid(bits=bits, group_size=16)
    return quantize_weights(model, solver, lambda role: grid, WINDOWS, report=lambda done, total: None, **options)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tiny_model(tiny_models: dict[str, Path], family: str) -> None:
    first, second = loaded(tiny_models[family]), loaded(tiny_models[family])
    results = quantize(first, SpQR(), sequential=True)
    assert results == quantize(second, SpQR(), sequential=True)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(results) == 2 * len(first.architecture.roles) and all(r.solver == "spqr" for r in results)
    assert all(0 < r.notes["outliers"] < 0.1 for r in results)
    assert torch.isfinite(first.model(WINDOWS).logits).all()


def test_beats_rtn_on_the_outputs(tiny: Path) -> None:
    ours = quantize(loaded(tiny), SpQR(), sequential=False)
    nearest = quantize(loaded(tiny), _Measured(), sequential=False)
    errors = [(a.output_error, b.output_error) for a, b in zip(ours, nearest, strict=True)]
    assert all(a is not None and b is not None and a < b for a, b in errors)


class _Measured(RTN):
    def statistics(self) -> Any:
        return SpQR().statistics()


def test_token_normalised_statistics(tiny: Path) -> None:
    results = quantize(loaded(tiny), SpQR(token_norm=True), sequential=False)
    assert all(r.solver == "spqr" for r in results)
    assert dataclasses.asdict(results[0]) != dataclasses.asdict(quantize(loaded(tiny), SpQR(), sequential=False)[0])
