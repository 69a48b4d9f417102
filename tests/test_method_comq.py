"""COMQ's identities: explicit form, optimality per coordinate, monotone descent, brute force, edge cases."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.errors import InvalidInput, NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.methods.comq import COMQ, Descent, comq
from qfarm.methods.gptq import GPTQ
from qfarm.methods.rtn import RTN
from qfarm.models.load import LoadedModel
from qfarm.quantized import UniformWeight, unpack_bits
from qfarm.quantizer import Grid
from qfarm.recipe import WeightSolver, build_method
from tests.conftest import TINY
from tests.contract import threads
from tests.test_method_gptq import sink_statistics
from tests.test_models import loaded

FINE: dict[str, Any] = {"scale_dtype": torch.float32}
PLAIN: dict[str, Any] = {"order": "natural", "scale_update": False}
WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))


def inputs_of(n: int, seed: int, tokens: int = 256) -> Tensor:
    generator = torch.manual_seed(seed)
    return torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)


def correlated(n: int, seed: int, tokens: int = 256) -> Tensor:
    x = inputs_of(n, seed, tokens)
    return x.T @ x / tokens


def random(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    delta = (weight - values).double()
    return float((delta @ hessian.double() * delta).sum())


def explicit(weight: Tensor, x: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """The published form: column by column from the inputs themselves, in natural order, float64."""
    scale, zero = (t[:, None].double() for t in grid.fit(weight))
    w, x = weight.double(), x.double()
    q = w.clone()
    for _ in range(sweeps):
        for j in range(w.shape[1]):
            target = x[:, j] @ (x @ (w - q).T + x[:, j, None] * q[:, j]) / x[:, j].square().sum()
            code = torch.clamp(torch.round(target[:, None] / scale) + zero, 0, grid.top)
            q[:, j] = ((code - zero) * scale)[:, 0]
    return q.float()


@pytest.mark.parametrize("sweeps", [1, 3])
def test_gram_form_equals_the_explicit_form(sweeps: int) -> None:
    weight, x = random(6, 24, 0), inputs_of(24, 1)
    made = comq(weight, x.T @ x / len(x), Grid(bits=3, **FINE), COMQ(sweeps=sweeps, **PLAIN))
    torch.testing.assert_close(made.dequantize(), explicit(weight, x, Grid(bits=3, **FINE), sweeps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("order", ["natural", "energy", "greedy"])
def test_diagonal_hessian_gives_the_nearest_values(order: Any, group_size: int) -> None:
    weight, hessian = random(6, 32, 2), torch.diag(torch.rand(32, generator=torch.manual_seed(3)) + 0.1)
    grid = Grid(bits=3, group_size=group_size)
    made = comq(weight, hessian, grid, COMQ(order=order, scale_update=False))
    assert torch.equal(made.codes, grid.quantize(weight).codes)
    assert made.notes["sweeps"] == 2  # the second sweep finds nothing to change


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("order", ["natural", "energy", "greedy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_loss_never_rises_after_the_first_sweep(
    order: str, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight, hessian = random(8, 32, 4), correlated(32, 5)
    grid = Grid(bits=2, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    descent = Descent(weight, hessian, grid)
    columns = torch.arange(32) if order == "natural" else hessian.diagonal().argsort(descending=True)
    per_row = (hessian.diagonal().sqrt()[:, None] * weight.T.abs()).argsort(dim=0, descending=True)
    losses = []
    for _ in range(6):
        descent.sweep_rows(per_row) if order == "greedy" else descent.sweep(columns)
        losses.append(descent.loss())
        descent.update_scales()
        losses.append(descent.loss())
        assert torch.equal(descent.values.T, descent.result().dequantize())  # what is descended on is what ships
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[1] < 0.99 * losses[0] and losses[2] < 0.99 * losses[1]


def test_no_single_code_can_be_improved_at_convergence() -> None:
    weight, hessian = random(5, 20, 6), correlated(20, 7)
    grid = Grid(bits=3, group_size=10, **FINE)
    made = comq(weight, hessian, grid, COMQ(sweeps=100, scale_update=False))
    assert made.notes["sweeps"] < 100
    best = loss(weight, made.dequantize(), hessian)
    for row, column, step in itertools.product(range(5), range(20), (-1, 1)):
        code = int(made.codes[row, column]) + step
        if 0 <= code <= grid.top:
            other = dataclasses.replace(made, codes=made.codes.clone())
            other.codes[row, column] = code
            assert loss(weight, other.dequantize(), hessian) >= best * (1 - 1e-6)


@pytest.mark.parametrize("order", ["energy", "greedy"])
def test_weights_on_the_grid_stay(order: Any) -> None:
    grid = Grid(bits=4, symmetric=True, **FINE)
    weight = grid.quantize(random(6, 32, 8)).dequantize()
    made = comq(weight, correlated(32, 9), grid, COMQ(order=order))
    torch.testing.assert_close(made.dequantize(), weight, rtol=1e-5, atol=1e-6)


def test_against_brute_force() -> None:
    """Never below the optimum over all codes, often equal to it."""
    generator = torch.manual_seed(10)
    grid = Grid(bits=2, **FINE)
    hits = 0
    for _ in range(150):
        weight, x = torch.randn(1, 3, generator=generator), torch.randn(8, 3, generator=generator)
        hessian = x.T @ x
        scale, zero = grid.fit(weight)
        values = [(torch.tensor([codes]) - zero) * scale for codes in itertools.product(range(4), repeat=3)]
        best = min(loss(weight, value, hessian) for value in values)
        ours = loss(weight, comq(weight, hessian, grid, COMQ(scale_update=False)).dequantize(), hessian)
        assert ours >= best - 1e-5
        hits += ours <= best + 1e-5
    assert hits > 75


def swept(group_size: int = -1, symmetric: bool = False) -> tuple[Tensor, Tensor, Descent]:
    weight, hessian = random(6, 32, 11), correlated(32, 12)
    descent = Descent(weight, hessian, Grid(bits=3, group_size=group_size, symmetric=symmetric, **FINE))
    descent.sweep(torch.arange(32))
    return weight, hessian, descent


@pytest.mark.parametrize("symmetric", [False, True])
def test_scale_update_is_the_closed_form(symmetric: bool) -> None:
    """One group: scale = c H w / c H c per row, the stationary point."""
    weight, hessian, descent = swept(symmetric=symmetric)
    steps = (descent.codes - descent.zero).T  # [rows, n]
    expected = (steps @ hessian * weight).sum(1) / (steps @ hessian * steps).sum(1)
    descent.update_scales()
    torch.testing.assert_close(descent.scale[0], expected, rtol=1e-4, atol=1e-6)
    best = loss(weight, steps * descent.scale[0][:, None], hessian)
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert loss(weight, factor * steps * descent.scale[0][:, None], hessian) > best


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_scale_for_the_layer(symmetric: bool) -> None:
    """Section 7: with one row it is the scale of a row; with more, sum_r c H w / sum_r c H c and one grid is stored."""
    weight, hessian, grid = random(6, 32, 11), correlated(32, 12), Grid(bits=3, symmetric=symmetric, **FINE)
    one, other = (comq(weight[:1], hessian, grid, COMQ(layer_scale=value)) for value in (False, True))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.dequantize(), other.dequantize())
    descent = Descent(weight, hessian, grid, layer_scale=True)
    losses = []
    for _ in range(4):
        descent.sweep(torch.arange(32))
        losses.append(descent.loss())
        steps = (descent.codes - descent.zero).T  # [rows, n]
        expected = (steps @ hessian * weight).sum() / (steps @ hessian * steps).sum()
        descent.update_scales()
        torch.testing.assert_close(descent.scale, expected.expand(1, 6), rtol=1e-4, atol=1e-6)
        losses.append(descent.loss())
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses)) and losses[-1] < losses[0]
    made = comq(weight, hessian, grid, COMQ(layer_scale=True))
    values = made.dequantize().unique()
    assert made.scale.shape == (1, 1) and len(values) <= 8
    assert made.stored_bytes() == 6 * 4 * 3 + 4 + (0 if symmetric else 4)  # float32 scale, a zero fills a word
    assert made.stored_bytes() == sum(tensor.numel() * tensor.element_size() for tensor in made.packed().values())
    assert (
        "use group size -1" in str(COMQ(layer_scale=True).refusal(16, False)) and not COMQ(layer_scale=True).stackable
    )
    assert "layer_scale" not in COMQ().identity()


def test_scale_update_of_groups_converges_to_the_joint_optimum() -> None:
    weight, hessian, descent = swept(group_size=8)
    for _ in range(200):
        descent.update_scales()
    for row in range(6):
        basis = torch.zeros(4, 32, dtype=torch.float64)
        for group in range(4):
            part = slice(8 * group, 8 * group + 8)
            basis[group, part] = (descent.codes[part, row] - descent.zero[group, row]).double()
        normal, right = basis @ hessian.double() @ basis.T, basis @ hessian.double() @ weight[row].double()
        torch.testing.assert_close(descent.scale[:, row].double(), torch.linalg.solve(normal, right), rtol=1e-3, atol=0)


def test_scale_that_would_turn_negative_or_unknown_is_kept() -> None:
    weight, hessian, descent = swept()
    before = descent.scale.clone()
    descent.codes = 2 * descent.zero - descent.codes  # the opposite of every value: c H w < 0
    descent.codes[:, 0] = descent.zero[0, 0]  # a row of zeros: c H c = 0
    descent.values = (descent.codes - descent.zero) * descent.scale
    descent.update_scales()
    assert torch.equal(descent.scale, before)


@pytest.mark.parametrize("order", ["energy", "greedy"])
def test_rows_are_independent(order: Any) -> None:
    weight, hessian = random(12, 32, 13), correlated(32, 14)
    grid, options = Grid(bits=3, group_size=16), COMQ(order=order)
    mixed = torch.randperm(12, generator=torch.manual_seed(15))
    made = comq(weight, hessian, grid, options)
    assert torch.equal(comq(weight[mixed], hessian, grid, options).dequantize(), made.dequantize()[mixed])
    part = comq(weight[3:7], hessian, grid, options)
    assert torch.equal(made.row_range(3, 7).dequantize(), part.dequantize())


@pytest.mark.parametrize("order", ["energy", "greedy"])
def test_order_is_equivariant_to_column_permutations(order: Any) -> None:
    weight, hessian = random(6, 24, 16), correlated(24, 17)
    mixed = torch.randperm(24, generator=torch.manual_seed(18))
    grid, options = Grid(bits=3, **FINE), COMQ(order=order)
    made = comq(weight, hessian, grid, options).codes
    assert torch.equal(comq(weight[:, mixed], hessian[mixed][:, mixed], grid, options).codes, made[:, mixed])


def test_an_order_per_row_with_equal_rows_is_one_order() -> None:
    weight, hessian = random(6, 24, 30), correlated(24, 31)
    hessian[7] = hessian[:, 7] = 0
    order = torch.randperm(24, generator=torch.manual_seed(32))
    one, each = (Descent(weight, hessian, Grid(bits=3, group_size=8)) for _ in range(2))
    for _ in range(3):
        one.sweep(order)
        each.sweep_rows(order[:, None].expand(-1, 6))
        assert torch.equal(one.codes, each.codes) and torch.equal(one.values, each.values)
        # A dead input's own weight is rounded, on whatever the grid is by now, and not its last value.
        assert torch.equal(one.codes[7], one.grid.encode(weight[:, 7], one.scale[0], one.zero[0]))
        for descent in (one, each):
            descent.scale *= 0.5
            steps = descent.codes - descent.zero.repeat_interleave(8, 0)
            descent.values = steps * descent.scale.repeat_interleave(8, 0)


def test_greedy_visits_by_contribution() -> None:
    """One row, two inputs, one sweep, by hand: H = [[1, 0.5], [0.5, 1]] and a grid of step 1 from -1 to 2."""
    hessian = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    grid = Grid(bits=2, **FINE)
    weight = torch.tensor([[-1.0, 2.0, 0.4, -0.6]])
    whole = torch.block_diag(torch.eye(2), hessian)
    # Greedy takes -0.6 first: it becomes -1, an error of +0.4, which asks 0.4 for + 0.2: 0.6 becomes 1.
    greedy = comq(weight, whole, grid, COMQ(sweeps=1, order="greedy", scale_update=False))
    assert greedy.dequantize().tolist() == [[-1, 2, 1, -1]]
    # Natural order takes 0.4 first: it becomes 0, and -0.6 + 0.2 becomes 0.
    natural = comq(weight, whole, grid, COMQ(sweeps=1, **PLAIN))
    assert natural.dequantize().tolist() == [[-1, 2, 0, 0]]


@pytest.mark.parametrize("order", ["energy", "greedy"])
def test_block_size_never_changes_the_result(monkeypatch: pytest.MonkeyPatch, order: Any) -> None:
    weight, hessian = random(7, 48, 19), correlated(48, 20)
    results = []
    for block in (1, 7, 48):
        monkeypatch.setattr("qfarm.methods.comq.BLOCK", block)
        monkeypatch.setattr("qfarm.methods.comq.OWN_BLOCK", block)
        results.append(comq(weight, hessian, Grid(bits=3, group_size=12), COMQ(order=order)).codes)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("group_size", [-1, 8])
def test_sweeps_only_improve_on_gptq(group_size: int) -> None:
    for seed in range(10):
        weight, hessian = random(8, 32, seed), correlated(32, 100 + seed)
        descent = Descent(weight, hessian, Grid(bits=3, group_size=group_size, **FINE))
        assert descent.start_from_gptq(torch.arange(32))
        start = descent.loss()
        made = comq(weight, hessian, descent.grid, COMQ(start="gptq", order="natural", sweeps=3, scale_update=False))
        assert made.notes["loss"] <= start * (1 + 1e-6)
        if group_size == -1:  # with groups GPTQ proper fits its grids on the way
            gptq = GPTQ(act_order=False).quantize_linear(weight, statistics(weight, hessian), descent.grid)
            assert torch.equal(descent.result().codes, gptq.codes)


def statistics(weight: Tensor, hessian: Tensor) -> InputStatistics:
    sample = torch.randn(16, weight.shape[1], generator=torch.manual_seed(0))
    return InputStatistics(tokens=1, hessian=hessian, normalised_hessian=hessian, sample=sample)


def test_unfactorable_start_is_said() -> None:
    """Off-diagonals a thousand times the diagonal: no damping that is tried makes that positive definite."""
    hessian = torch.ones(8, 8) - 0.999 * torch.eye(8)
    made = comq(random(4, 8, 21), hessian, Grid(bits=3), COMQ(start="gptq"))
    assert "could not be factored" in made.notes["reason"] and torch.isfinite(made.dequantize()).all()


@pytest.mark.parametrize("options", [{}, {"order": "greedy"}, {"start": "gptq"}])
def test_dead_inputs_and_degenerate_rows(options: dict[str, Any]) -> None:
    weight, hessian = random(4, 16, 22), correlated(16, 23)
    hessian[[2, 9]] = 0
    hessian[:, [2, 9]] = 0
    hessian[5], hessian[:, 5] = hessian[4].clone(), hessian[:, 4].clone()  # two equal inputs: singular
    hessian[5, 5] = hessian[4, 4]
    weight[0], weight[1] = 0.0, 0.7
    for group_size, symmetric in itertools.product((-1, 4), (False, True)):
        grid = Grid(bits=3, group_size=group_size, symmetric=symmetric)
        values = comq(weight, hessian, grid, COMQ(**options)).dequantize()
        assert torch.isfinite(values).all() and (values[0] == 0).all()
        fixed = comq(weight, hessian, grid, COMQ(scale_update=False, **options)).dequantize()
        assert torch.equal(fixed[:, [2, 9]], grid.quantize(weight).dequantize()[:, [2, 9]])
        everything_dead = comq(weight, torch.zeros(16, 16), grid, COMQ(**options)).dequantize()
        assert torch.equal(everything_dead, grid.quantize(weight).dequantize())


def test_nonfinite_statistics_are_an_error() -> None:
    weight, hessian = random(4, 8, 24), correlated(8, 25)
    hessian[0, 0] = math.nan
    with pytest.raises(NonFinite, match="calibration"):
        COMQ().quantize_linear(weight, statistics(weight, hessian), Grid(bits=4))
    with pytest.raises(NonFinite, match="weights"):
        comq(torch.full((4, 8), math.inf), correlated(8, 25), Grid(bits=4), COMQ())


def test_means_over_random_draws_are_ordered_as_in_the_specification() -> None:
    """RTN > one sweep > four sweeps > with scale update; and fewer bits, more loss."""
    rows: dict[str, list[float]] = {}
    runs = {"once": COMQ(sweeps=1, **PLAIN), "four": COMQ(**PLAIN), "scaled": COMQ()}
    for seed in range(20):
        weight, hessian = random(16, 48, seed), correlated(48, 1000 + seed)
        grid = Grid(bits=2, **FINE)
        for name, options in runs.items():
            rows.setdefault(name, []).append(loss(weight, comq(weight, hessian, grid, options).dequantize(), hessian))
        rows.setdefault("rtn", []).append(loss(weight, grid.quantize(weight).dequantize(), hessian))
        by_bits = [comq(weight, hessian, Grid(bits=b, **FINE), COMQ()).notes["loss"] for b in (2, 3, 4, 6, 8)]
        assert by_bits == sorted(by_bits, reverse=True)
    total = {name: sum(values) for name, values in rows.items()}
    assert total["rtn"] > 1.5 * total["once"] > 1.5 * 1.15 * total["four"]
    assert total["four"] > 1.15 * total["scaled"]


def test_shrink_multiplies_the_first_scale_only() -> None:
    weight, hessian = random(4, 16, 26), correlated(16, 27)
    grid = Grid(bits=2, **FINE)
    fixed = comq(weight, hessian, grid, COMQ(shrink=0.65, scale_update=False))
    torch.testing.assert_close(fixed.scale, grid.fit(weight)[0][:, None] * 0.65)
    moved = comq(weight, hessian, grid, COMQ(shrink=0.65))
    assert not torch.equal(moved.scale, fixed.scale) and moved.notes["loss"] < fixed.notes["loss"]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 3),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_stored_bytes(rows: int, groups: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    grid = Grid(bits=bits, group_size=6, symmetric=symmetric, scale_dtype=dtype)
    made = comq(random(rows, 6 * groups, rows), correlated(6 * groups, groups), grid, COMQ(sweeps=2))
    packed = made.packed()
    assert made.stored_bytes() == sum(t.numel() * t.element_size() for t in packed.values())
    assert made.stored_bytes() == grid.quantize(random(rows, 6 * groups, rows)).stored_bytes()
    assert torch.equal(unpack_bits(packed["weight_packed"], bits, 6 * groups), made.codes)
    rebuilt = dataclasses.replace(made, scale=packed["weight_scale"])
    assert torch.equal(rebuilt.dequantize(), made.dequantize()) and made.scale.dtype == dtype


def test_massive_activation_is_noticed_and_repaired() -> None:
    weight, inputs = sink_statistics(256, sink=250)
    grid = Grid(bits=4, **FINE)

    def ratio(made: UniformWeight) -> float:
        return float(made.notes["ordinary_error"] / made.notes["ordinary_error_rtn"])

    # No weight leaves its grid, and yet COMQ suffers more than GPTQ: the columns visited after the massive channel
    # each try to cancel its error alone, by as many steps as the grid has.
    natural = COMQ(order="natural").quantize_linear(weight, inputs, grid)
    assert natural.solver == "comq" and ratio(natural) > 3
    assert 1.5 < ratio(COMQ().quantize_linear(weight, inputs, grid)) < 4
    assert ratio(COMQ(start="gptq").quantize_linear(weight, inputs, grid)) < 1.1
    assert ratio(COMQ(token_norm=True).quantize_linear(weight, inputs, grid)) < 0.7
    fallen_back = COMQ(on_worse="rtn").quantize_linear(weight, inputs, grid)
    assert fallen_back.solver == "rtn" and "ordinary tokens" in fallen_back.notes["reason"]
    assert torch.equal(fallen_back.codes, grid.quantize(weight).codes)


def test_retry_starts_from_gptq_then_normalises_tokens_then_rounds() -> None:
    weight, inputs = sink_statistics(256, sink=250)
    grid = Grid(bits=4, **FINE)
    options: dict[str, Any] = {"order": "natural", "on_worse": "retry"}
    assert COMQ(on_worse="retry").statistics() > COMQ().statistics()
    first = COMQ(**options).quantize_linear(weight, inputs, grid)
    assert first.solver == "comq retry" and torch.equal(
        first.codes, COMQ(start="gptq").quantize_linear(weight, inputs, grid).codes
    )
    # A second moment that tells nothing of ordinary tokens: only the normalised one helps, or none.
    assert inputs.sample is not None
    told = inputs.sample.T @ inputs.sample / len(inputs.sample)
    wrong = dataclasses.replace(inputs, hessian=correlated(256, 42), normalised_hessian=told)
    second = COMQ(**options).quantize_linear(weight, wrong, grid)
    assert (
        second.solver == "comq retry token_norm" and second.notes["ordinary_error"] < second.notes["ordinary_error_rtn"]
    )
    third = COMQ(**options).quantize_linear(weight, dataclasses.replace(wrong, normalised_hessian=wrong.hessian), grid)
    assert third.solver == "rtn" and torch.equal(third.codes, grid.quantize(weight).codes)


@pytest.mark.parametrize("options", [{}, {"order": "greedy"}, {"start": "gptq"}])
def test_neither_a_repeat_nor_the_number_of_threads_changes_a_bit(options: dict[str, Any]) -> None:
    weight, hessian = random(96, 512, 43), correlated(512, 44, tokens=1024)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append(comq(weight, hessian, Grid(bits=3, group_size=128), COMQ(sweeps=2, **options)))
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes) and torch.equal(results[0].scale, other.scale)


def test_options() -> None:
    assert "one order" in str(COMQ(start="gptq", order="greedy").refusal(-1, False))
    assert COMQ(start="gptq").refusal(64, True) is None
    assert COMQ().statistics() == {Statistic.HESSIAN, Statistic.SAMPLE}
    assert COMQ(token_norm=True).statistics() == {Statistic.NORMALISED_HESSIAN, Statistic.SAMPLE}
    for options, field in (({"sweeps": 0}, "sweeps"), ({"shrink": 0.0}, "shrink"), ({"order": "random"}, "order")):
        with pytest.raises(InvalidInput, match=field):
            build_method("comq", options)


def quantize(model: LoadedModel, solver: WeightSolver, bits: int = 3, sequential: bool = True) -> list[LayerResult]:
    return quantize_weights(
        model,
        solver,
        lambda role: Grid(bits=bits, group_size=16),
        WINDOWS,
        sequential=sequential,
        report=lambda done, total: None,
    )


@pytest.mark.parametrize("family", TINY)
def test_tiny_models(tiny_models: dict[str, Path], family: str) -> None:
    model, again = loaded(tiny_models[family]), loaded(tiny_models[family])
    results = quantize(model, COMQ())
    assert results == quantize(again, COMQ())
    assert [(r.layer, r.role) for r in results] == [(i, role) for i in range(2) for role in model.linears(i)]
    assert all(r.solver == "comq" and r.bits == 3 and r.group_size == 16 for r in results)
    for index in range(2):
        pairs = zip(model.linears(index).values(), again.linears(index).values(), strict=True)
        assert all(torch.equal(a.weight, b.weight) for a, b in pairs)
    assert torch.isfinite(model.head(model.body(WINDOWS[:1]))).all()


class Observed(RTN):
    """RTN that asks for the Hessian, so that its output error is known."""

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.HESSIAN})


def test_output_errors_on_a_model(tiny: Path) -> None:
    def errors(solver: WeightSolver) -> Tensor:
        return torch.tensor([r.output_error for r in quantize(loaded(tiny), solver, sequential=False)])

    ours, nearest = errors(COMQ()), errors(Observed())
    assert (ours < nearest).all() and ours.mean() < 0.7 * nearest.mean()
    assert errors(COMQ(start="gptq")).mean() < errors(GPTQ()).mean()
