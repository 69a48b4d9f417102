"""GPTQ's identities: closed forms, brute force, invariances, and the failure that massive activations cause."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import Collector, InputStatistics, Statistic
from qfarm.methods.gptq import GPTQ, column_order, gptq
from qfarm.quantized import UniformWeight
from qfarm.quantizer import Grid
from qfarm.solver import Factor, factorise

FINE = {"scale_dtype": torch.float32}


def correlated(n: int, seed: int, tokens: int = 512) -> Tensor:
    """A second moment as calibration gives it, float64-accurate."""
    generator = torch.manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return x.T @ x / tokens


def run(
    weight: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, leaf: int = 32, **options: Any
) -> UniformWeight:
    method = GPTQ(**options).resolve(grid.group_size)
    order = column_order(hessian.diagonal(), grid.group_size, method)
    return gptq(weight, factorise(hessian, order, damping, 0.01), grid, method, leaf=leaf)


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    delta = (weight - values).double()
    return float((delta @ hessian.double() * delta).sum())


NATURAL = {"act_order": False, "group_aware": False}


@pytest.mark.parametrize("options", [NATURAL, {"act_order": True}, {}, NATURAL | {"static_groups": True}])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_diagonal_hessian_gives_rtn(options: dict[str, Any], group_size: int) -> None:
    if group_size == -1 and options.get("static_groups"):
        options = NATURAL
    weight = torch.randn(6, 32, generator=torch.manual_seed(0))
    hessian = torch.diag(torch.rand(32, generator=torch.manual_seed(1)) + 0.1)
    grid = Grid(bits=3, group_size=group_size, **FINE)
    if options.get("act_order") and group_size != -1:
        # Dynamic groups follow the order: RTN of the permuted weight, undone.
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        expected = grid.quantize(weight[:, order]).dequantize()[:, torch.argsort(order)]
    else:
        expected = grid.quantize(weight).dequantize()
    assert torch.equal(run(weight, hessian, grid, **options).dequantize(), expected)


@pytest.mark.parametrize("options", [NATURAL, {"act_order": True}, {}])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_loss_identity(options: dict[str, Any], group_size: int) -> None:
    """Sum of e^2 = tr((W - Q) H_damped (W - Q)^T)."""
    weight, hessian = torch.randn(5, 48, generator=torch.manual_seed(2)), correlated(48, 3)
    result = run(weight, hessian, Grid(bits=3, group_size=group_size, **FINE), **options)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    assert result.notes["loss"] == pytest.approx(loss(weight, result.dequantize(), damped), rel=1e-4)


@pytest.mark.parametrize("group_size", [-1, 4, 12, 48])
@pytest.mark.parametrize("options", [NATURAL, {"act_order": True}])
def test_leaf_size_never_changes_the_result(options: dict[str, Any], group_size: int) -> None:
    weight, hessian = torch.randn(7, 48, generator=torch.manual_seed(4)), correlated(48, 5)
    grid = Grid(bits=3, group_size=group_size, **FINE)
    results = [run(weight, hessian, grid, leaf=leaf, **options) for leaf in (1, 3, 8, 48)]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)


def test_grids_fitted_on_stale_weights_are_another_and_worse_result() -> None:
    """What the published code does when a group is smaller than its block; see the method's docstring."""
    weight, hessian = torch.randn(64, 48, generator=torch.manual_seed(6)), correlated(48, 7)
    grid = Grid(bits=3, group_size=8, **FINE)
    fresh = run(weight, hessian, grid, **NATURAL)
    stale = stale_gptq(weight, hessian, grid)
    assert not torch.equal(fresh.dequantize(), stale)
    assert fresh.notes["loss"] < loss(weight, stale, hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48))


def stale_gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Column loop in natural order with every grid fitted on the untouched weights of one single block."""
    upper = factorise(hessian, torch.arange(len(hessian)), 0.01, 0.01).upper
    work, out = weight.clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        start = j // grid.group_size * grid.group_size
        scale, zero = grid.fit(weight[:, start : start + grid.group_size])
        out[:, j] = grid.round_trip(work[:, j], scale, zero)
        error = (work[:, j] - out[:, j]) / upper[j, j]
        work[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return out


def test_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = torch.randn(5, 32, generator=torch.manual_seed(8)), correlated(32, 9)
    hessian[3] = hessian[:, 3] = 0  # dead inputs included
    grid = Grid(bits=4, group_size=8, **FINE)
    assert torch.equal(run(weight, hessian, grid).codes, run(weight, hessian * 2**20, grid).codes)


def test_act_order_is_natural_order_on_permuted_columns() -> None:
    weight, hessian = torch.randn(5, 32, generator=torch.manual_seed(10)), correlated(32, 11)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    for group_size in (-1, 8):
        grid = Grid(bits=3, group_size=group_size, **FINE)
        permuted = run(weight[:, order], hessian[order][:, order], grid, **NATURAL).dequantize()
        assert torch.equal(run(weight, hessian, grid, act_order=True).dequantize()[:, order], permuted)


def test_weights_on_the_grid_stay() -> None:
    grid = Grid(bits=4, symmetric=True, **FINE)
    weight = grid.quantize(torch.randn(6, 32, generator=torch.manual_seed(12))).dequantize()
    result = run(weight, correlated(32, 13), grid)
    torch.testing.assert_close(result.dequantize(), weight, rtol=0, atol=1e-6)
    assert result.notes["loss"] == pytest.approx(0, abs=1e-6)


def test_two_columns_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: column 2 moves by half of column 1's rounding error."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    factor = factorise(hessian, torch.arange(2), 1e-9, 0.01)
    assert factor.upper[0, 1] / factor.upper[0, 0] == pytest.approx(-0.5, abs=1e-6)
    inverse = factor.upper.T @ factor.upper
    torch.testing.assert_close(inverse, torch.linalg.inv(hessian), rtol=1e-5, atol=1e-6)


def test_factor_equals_the_reference_route() -> None:
    """Cholesky, inverse from the factor, upper Cholesky of the inverse: the published three cubic steps."""
    hessian = correlated(24, 14).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    reference = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    factor = factorise(hessian.float(), torch.arange(24), 0.01, 0.01)
    torch.testing.assert_close(factor.upper.double(), reference, rtol=1e-3, atol=1e-5)
    assert float(factor.upper[-1, -1]) == pytest.approx(float(damped[-1, -1]) ** -0.5, rel=1e-4)


def test_against_brute_force() -> None:
    """Greedy never beats the optimum over all codes, and beats RTN on average (not always: it is greedy)."""
    generator = torch.manual_seed(15)
    grid = Grid(bits=2, **FINE)
    ours, nearest = [], []
    for _ in range(300):
        weight, x = torch.randn(1, 3, generator=generator), torch.randn(8, 3, generator=generator)
        hessian = x.T @ x
        factor = factorise(hessian, torch.arange(3), 1e-6, 0.01)
        result = gptq(weight, factor, grid, GPTQ(**NATURAL))
        scale, zero = grid.fit(weight)
        options = [(torch.tensor([codes]) - zero) * scale for codes in itertools.product(range(4), repeat=3)]
        best = min(loss(weight, values, hessian) for values in options)
        ours.append(loss(weight, result.dequantize(), hessian))
        nearest.append(loss(weight, grid.quantize(weight).dequantize(), hessian))
        assert ours[-1] >= best - 1e-6
    assert sum(ours) < 0.9 * sum(nearest)


def test_better_than_rtn_and_better_with_more_bits() -> None:
    wins = 0
    for seed in range(40):
        weight, hessian = torch.randn(8, 32, generator=torch.manual_seed(seed)), correlated(32, 1000 + seed)
        grids = [Grid(bits=bits, **FINE) for bits in (2, 3, 4, 6)]
        losses = [loss(weight, run(weight, hessian, grid).dequantize(), hessian) for grid in grids]
        assert losses == sorted(losses, reverse=True)
        wins += losses[1] < loss(weight, grids[1].quantize(weight).dequantize(), hessian)
    assert wins >= 38


def test_heavy_damping_gives_rtn() -> None:
    weight, hessian = torch.randn(5, 32, generator=torch.manual_seed(16)), correlated(32, 17)
    grid = Grid(bits=3, **FINE)
    huge = hessian + 1e8 * hessian.diagonal().mean() * torch.eye(32)
    assert torch.equal(run(weight, huge, grid).codes, grid.quantize(weight).codes)


def test_dead_and_duplicated_inputs() -> None:
    weight, hessian = torch.randn(4, 16, generator=torch.manual_seed(18)), correlated(16, 19)
    hessian[[2, 9]] = 0
    hessian[:, [2, 9]] = 0
    hessian[5], hessian[:, 5] = hessian[4].clone(), hessian[:, 4].clone()  # singular: two equal inputs
    hessian[5, 5] = hessian[4, 4]
    for group_size in (-1, 4):
        values = run(weight, hessian, Grid(bits=4, group_size=group_size, **FINE)).dequantize()
        assert torch.isfinite(values).all() and (values[:, [2, 9]] == 0).all()
    everything_dead = run(weight, torch.zeros(16, 16), Grid(bits=4, **FINE)).dequantize()
    assert (everything_dead == 0).all()


def test_failed_factorisation_raises_damping_and_says_so() -> None:
    x = torch.randn(2, 16, generator=torch.manual_seed(20))
    indefinite = x.T @ x - 0.05 * torch.eye(16) * (x.T @ x).diagonal().mean()
    factor = factorise(indefinite, torch.arange(16), 0.01, 0.01)
    assert 0.04 < factor.damping < 0.2
    assert isinstance(factor, Factor) and torch.isfinite(factor.upper).all()


def test_nonfinite_statistics_are_an_error_not_a_fallback() -> None:
    hessian = correlated(8, 21)
    hessian[0, 0] = float("nan")
    inputs = InputStatistics(tokens=1, hessian=hessian, sample=torch.randn(4, 8))
    with pytest.raises(NonFinite, match="calibration"):
        GPTQ().quantize_linear(torch.randn(4, 8), inputs, Grid(bits=4))


def test_group_aware_order_keeps_groups_contiguous() -> None:
    weight, hessian = torch.randn(4, 64, generator=torch.manual_seed(22)), correlated(64, 23)
    result = run(weight, hessian, Grid(bits=2, group_size=16, **FINE))
    assert result.g_idx is None
    for row in result.dequantize().reshape(-1, 16):
        assert len(row.unique()) <= 4
    one_group = run(weight, hessian, Grid(bits=3, group_size=64, **FINE), group_aware=True)
    permuted = run(weight, hessian, Grid(bits=3, group_size=-1, **FINE), act_order=True)
    assert torch.equal(one_group.codes, permuted.codes)


def test_act_order_with_dynamic_groups_stores_its_permutation() -> None:
    weight, hessian = torch.randn(4, 64, generator=torch.manual_seed(24)), correlated(64, 25)
    result = run(weight, hessian, Grid(bits=3, group_size=16, **FINE), act_order=True)
    assert result.g_idx is not None and torch.bincount(result.g_idx.long()).tolist() == [16] * 4
    plain = run(weight, hessian, Grid(bits=3, group_size=16, **FINE))
    assert result.stored_bytes() == plain.stored_bytes() + 4 * 64
    static = run(weight, hessian, Grid(bits=3, group_size=16, **FINE), act_order=True, static_groups=True)
    assert static.g_idx is None
    assert torch.equal(static.scale, Grid(bits=3, group_size=16, **FINE).quantize(weight).scale)


def sink_statistics(n: int, sink: int) -> tuple[Tensor, InputStatistics]:
    """The first token of each sequence is 500 times larger than the rest and always points along one late channel."""
    generator = torch.manual_seed(26)
    collector = Collector(frozenset(Statistic), tokens=16 * 256)
    mixing = torch.eye(n) + torch.randn(n, n, generator=generator) / n**0.5
    direction = torch.randn(n, generator=generator)
    direction[sink] = 60.0
    for _ in range(16):
        x = torch.randn(256, n, generator=generator) @ mixing
        first = direction + 0.05 * torch.randn(n, generator=generator)
        x[0] = first * (500 * x[1:].norm(dim=1).mean() / first.norm())
        collector.add(x)
    return torch.randn(48, n, generator=generator), collector.result()


def test_massive_activation_is_noticed_and_repaired() -> None:
    weight, inputs = sink_statistics(256, sink=250)
    grid = Grid(bits=4, **FINE)

    def ratio(result: UniformWeight) -> float:
        return float(result.notes["ordinary_error"] / result.notes["ordinary_error_rtn"])

    natural = GPTQ(**NATURAL).quantize_linear(weight, inputs, grid)
    assert natural.solver == "gptq" and ratio(natural) > 3 and natural.notes["drift_steps"] > 10
    assert ratio(GPTQ().quantize_linear(weight, inputs, grid)) < 1.1  # act_order: about as good as RTN
    normalised = GPTQ(token_norm=True).quantize_linear(weight, inputs, grid)
    assert ratio(normalised) < 0.7
    retried = GPTQ(**NATURAL, on_worse="retry").quantize_linear(weight, inputs, grid)
    assert retried.solver == "gptq retry token_norm" and ratio(retried) < 0.7
    fallen_back = GPTQ(**NATURAL, on_worse="rtn").quantize_linear(weight, inputs, grid)
    assert fallen_back.solver == "rtn" and "ordinary tokens" in fallen_back.notes["reason"]
    assert torch.equal(fallen_back.codes, grid.quantize(weight).codes)


def test_statistics_are_additive() -> None:
    x = torch.randn(64, 12, generator=torch.manual_seed(27))
    whole, halves = (Collector(frozenset({Statistic.HESSIAN}), 64) for _ in range(2))
    whole.add(x)
    halves.add(x[:40])
    halves.add(x[40:])
    first, second = whole.result().hessian, halves.result().hessian
    assert first is not None and second is not None
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, (x.T @ x) / 64)


def test_options_are_resolved_and_refused() -> None:
    assert GPTQ().resolve(-1) == GPTQ(act_order=True, group_aware=False)
    assert GPTQ().resolve(64) == GPTQ(act_order=False, group_aware=True)
    assert GPTQ(act_order=True).resolve(64) == GPTQ(act_order=True, group_aware=False)
    assert "two orders" in str(GPTQ(act_order=True, group_aware=True).refusal(64, False))
    assert "needs groups" in str(GPTQ(static_groups=True).refusal(-1, False))
    assert GPTQ(static_groups=True).refusal(64, False) is None
    with pytest.raises(ValueError, match="greater than 0"):
        GPTQ(damping=0.0)
    assert dataclasses.replace(GPTQ(), sequential=True).true_sequential
