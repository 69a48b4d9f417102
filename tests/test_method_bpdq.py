"""BPDQ's identities, its fit against ordinary least squares, its loss against GPTQ's, and what it stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.calibrate import quantize_weights
from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics
from qfarm.methods.bpdq import (
    BPDQ,
    BitPlaneWeight,
    assign,
    bpdq,
    column_order,
    fit_coefficients,
    levels_of,
    normalised,
    signed_planes,
    solve_group,
)
from qfarm.methods.gptq import GPTQ, gptq
from qfarm.methods.gptq import column_order as gptq_order
from qfarm.methods.rtn import RTN
from qfarm.quantized import unpack_bits
from qfarm.quantizer import Grid
from qfarm.solver import factorise
from tests.conftest import TINY
from tests.contract import threads
from tests.test_models import loaded

FLOAT32: dict[str, Any] = {"scale_dtype": torch.float32}
WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))


def correlated(n: int, seed: int, tokens: int = 512) -> Tensor:
    generator = torch.manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return normalised(x.T @ x / tokens)


def run(weight: Tensor, hessian: Tensor, grid: Grid, **options: Any) -> BitPlaneWeight:
    method = BPDQ(**options)
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    order = column_order(hessian.diagonal(), size if method.group_aware else None)
    return bpdq(weight, factorise(normalised(hessian), order, method.damping, 0.01), grid, method)


def block(g: int, seed: int) -> Tensor:
    """A diagonal block of U."""
    return factorise(correlated(2 * g, seed), torch.arange(2 * g), 0.05, 0.01).upper[:g, :g]


def group(weight: Tensor, upper: Tensor, bits: int = 2, **options: Any) -> Any:
    return solve_group(weight, upper, torch.ones(len(upper)), Grid(bits=bits, **FLOAT32), BPDQ(**options))


def random(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


@pytest.mark.parametrize("g", [8, 32, 48])
def test_errors_times_the_factor_are_the_weight_error(g: int) -> None:
    """E U_l = W_t - Q, for the column loop and after the refit of the coefficients."""
    weight, upper = random(6, g, 0), block(g, 1)
    levels = levels_of(torch.tensor([-1.5, 1.0, 2.0]).expand(6, 3))
    codes, errors = assign(weight, upper, levels)
    torch.testing.assert_close(errors @ upper, weight - levels.gather(1, codes.long()), rtol=1e-5, atol=1e-5)
    best = group(weight, upper)
    values = levels_of(best.coefficients).gather(1, best.codes.long())
    torch.testing.assert_close(best.errors @ upper, weight - values, rtol=1e-5, atol=1e-5)


def test_fit_is_least_squares() -> None:
    codes = torch.randint(0, 8, (5, 32), generator=torch.manual_seed(2), dtype=torch.uint8)
    weight = random(5, 32, 3).double()
    found = fit_coefficients(codes, 3, weight, torch.eye(32).double(), 1e-12)
    for row in range(5):
        design = torch.stack([torch.ones(32), *(((codes[row] >> i) & 1).float() for i in range(3))], dim=1).double()
        expected = torch.linalg.lstsq(design, weight[row][:, None]).solution[:, 0]
        torch.testing.assert_close(found[row], expected, rtol=1e-8, atol=1e-8)


def test_fit_is_the_optimum_in_the_whitened_metric() -> None:
    codes = torch.randint(0, 4, (4, 24), generator=torch.manual_seed(4), dtype=torch.uint8)
    weight, upper = random(4, 24, 5).double(), block(24, 6).double()
    whiten = torch.linalg.inv(upper)
    best = fit_coefficients(codes, 2, weight, whiten, 1e-12)

    def score(coefficients: Tensor) -> Tensor:
        return ((weight - levels_of(coefficients).gather(1, codes.long())) @ whiten).square().sum(1)

    for seed in range(20):
        step = 1e-2 * random(4, 3, seed).double()
        assert (score(best + step) > score(best)).all()


def test_singular_fit_has_the_smallest_norm() -> None:
    """All codes 0: the planes are empty; all codes 3: each plane equals the constant, which shares its value."""
    for code, expected in ((0, [2.0, 0, 0]), (3, [2 / 3] * 3)):
        codes = torch.full((1, 16), code, dtype=torch.uint8)
        found = fit_coefficients(codes, 2, torch.full((1, 16), 2.0), torch.eye(16), 0.0)
        torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-5, atol=1e-5)


def test_more_iterations_are_never_worse() -> None:
    weight, upper = random(8, 32, 7), block(32, 8)
    scores = [group(weight, upper, iterations=count).score for count in (1, 2, 5, 10)]
    for fewer, more in zip(scores, scores[1:], strict=False):
        assert (more <= fewer).all()
    assert (scores[-1] < scores[0]).any()


def test_kept_score_is_the_minimum_over_iterations() -> None:
    """The alternation by hand, row by row, without early ends."""
    weight, upper = random(8, 32, 9), block(32, 10)
    options = BPDQ(iterations=6)
    whiten = torch.linalg.solve_triangular(upper, torch.eye(32), upper=True)
    code = torch.clamp(torch.floor(quantize8(weight) / 64), 0, 3).to(torch.uint8)
    scores = []
    for _ in range(options.iterations):
        levels = levels_of(fit_coefficients(code, 2, weight, whiten, options.ridge))
        code, _ = assign(weight, upper, levels)
        refitted = levels_of(fit_coefficients(code, 2, weight, whiten, options.ridge))
        scores.append(((weight - refitted.gather(1, code.long())) @ whiten).square().sum(1))
    torch.testing.assert_close(group(weight, upper, iterations=6).score, torch.stack(scores).amin(0))


def quantize8(weight: Tensor) -> Tensor:
    return Grid(bits=8, **FLOAT32).quantize(weight).codes.float()


def test_fixed_uniform_levels_are_gptq() -> None:
    """c = (offset, d, 2 d, 4 d): the same codes as a column loop that rounds (w - offset) / d."""
    weight, upper = random(16, 40, 11), block(40, 12)
    step, offset = torch.rand(16) + 0.3, -1.3 - torch.rand(16)
    levels = levels_of(torch.stack([offset, step, 2 * step, 4 * step], dim=1))
    codes, _ = assign(weight, upper, levels)
    work, expected = weight.clone(), torch.empty_like(weight)
    for j in range(40):
        expected[:, j] = torch.clamp(torch.round((work[:, j] - offset) / step), 0, 7)
        error = (work[:, j] - offset - step * expected[:, j]) / upper[j, j]
        work -= error[:, None] * upper[j]
    assert torch.equal(codes.float(), expected)


@pytest.mark.parametrize("bits", [2, 3])
def test_loss_is_below_gptqs(bits: int) -> None:
    ours, theirs = 0.0, 0.0
    for seed in range(50):
        weight, hessian = random(4, 64, seed), correlated(64, 100 + seed)
        grid = Grid(bits=bits, group_size=32)
        ours += run(weight, hessian, grid).notes["loss"]
        method = GPTQ(damping=0.05).resolve(32)
        factor = factorise(hessian, gptq_order(hessian.diagonal(), 32, method), 0.05, 0.01)
        theirs += gptq(weight, factor, grid, method).notes["loss"]
    assert ours < (0.75 if bits == 2 else 0.95) * theirs


def test_weights_of_the_form_are_reproduced() -> None:
    # Levels 0, 1, 2.3, 3.3 of every group: uneven, but the first planes already separate them.
    codes = torch.arange(4).repeat(16)[torch.randperm(64, generator=torch.manual_seed(13))].repeat(6, 1)
    weight = torch.tensor([-1.4, -0.4, 0.9, 1.9])[codes] * (torch.rand(6, 1, generator=torch.manual_seed(14)) + 0.5)
    result = run(weight, correlated(64, 15), Grid(bits=2, group_size=64, **FLOAT32), ridge=0.0)
    torch.testing.assert_close(result.dequantize(), weight, rtol=1e-4, atol=1e-4)
    assert result.notes["loss"] < 1e-6


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("group_aware", [True, False])
def test_whole_layer_identity(group_size: int, group_aware: bool) -> None:
    """Sum E^2 = tr((W - Q) H_damped (W - Q)^T); wrong if the order were not undone."""
    weight, hessian = random(6, 64, 16), correlated(64, 17)
    result = run(weight, hessian, Grid(bits=3, group_size=group_size), group_aware=group_aware)
    delta = (weight - result.dequantize()).double()
    damped = (hessian + 0.05 * torch.eye(64)).double()
    assert result.notes["loss"] == pytest.approx(float((delta @ damped * delta).sum()), rel=1e-3)


def test_group_aware_order_is_gptqs_and_keeps_groups_whole() -> None:
    diagonal = torch.rand(64, generator=torch.manual_seed(18))
    order = column_order(diagonal, 16)
    assert torch.equal(order, gptq_order(diagonal, 16, GPTQ().resolve(16)))
    assert all(len((part // 16).unique()) == 1 for part in order.reshape(-1, 16))
    result = run(random(4, 64, 19), correlated(64, 20), Grid(bits=2, group_size=16))
    assert all(len(values.unique()) <= 4 for values in result.dequantize().reshape(-1, 16))


def test_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = random(6, 64, 21), correlated(64, 22)
    grid = Grid(bits=2, group_size=32)
    first, second = run(weight, hessian, grid), run(weight, hessian * 2**20, grid)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.coefficients, second.coefficients)


def test_coefficients_are_rounded_before_the_error_is_measured() -> None:
    """The kept errors are those of what is stored: the identity holds tightly at a coarse storage dtype."""
    weight, upper = random(6, 32, 23), block(32, 24)
    grid = Grid(bits=2, scale_dtype=torch.bfloat16)
    best = solve_group(weight, upper, torch.ones(32), grid, BPDQ())
    assert torch.equal(best.coefficients, best.coefficients.bfloat16().float())
    values = levels_of(best.coefficients).gather(1, best.codes.long())
    torch.testing.assert_close(best.errors @ upper, weight - values, rtol=1e-5, atol=1e-5)
    with pytest.raises(NonFinite, match="float16"):
        run(weight * 1e6, correlated(32, 25), Grid(bits=2))


def test_equal_rows_constant_groups_and_dead_columns() -> None:
    weight, hessian = random(6, 64, 26), correlated(64, 27)
    weight[1] = weight[0]
    weight[2] = 0.7  # constant groups
    weight[3] = 0
    dead = [3, 40]
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = run(weight, hessian, Grid(bits=2, group_size=32))
    values = result.dequantize()
    assert torch.isfinite(values).all() and torch.equal(values[0], values[1])
    alive = [j for j in range(64) if j not in dead]
    torch.testing.assert_close(values[2, alive], torch.full((62,), 0.7), rtol=1e-3, atol=1e-3)
    assert values[3].abs().max() < 1e-6
    # The dead weights themselves have no influence.
    weight[:, dead] = 50.0
    assert torch.equal(run(weight, hessian, Grid(bits=2, group_size=32)).dequantize(), values)
    assert torch.isfinite(run(weight, torch.zeros(64, 64), Grid(bits=2, group_size=32)).dequantize()).all()


def test_dead_columns_do_not_pull_the_fit() -> None:
    """A group with two dead inputs has the codes and coefficients of the group without them."""
    weight, hessian = random(6, 32, 36) + 2, correlated(32, 37)
    live = torch.ones(32, dtype=torch.bool)
    live[[3, 17]] = False
    hessian = hessian * live * live[:, None]
    whole = factorise(hessian, torch.arange(32), 0.05, 0.01).upper
    rest = factorise(hessian[live][:, live], torch.arange(30), 0.05, 0.01).upper
    grid = Grid(bits=2, **FLOAT32)
    found = solve_group(weight * live, whole, live.float(), grid, BPDQ())
    expected = solve_group(weight[:, live], rest, torch.ones(30), grid, BPDQ())
    assert torch.equal(found.codes[:, live], expected.codes)
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-3, atol=1e-5)


def test_neither_a_repeat_nor_the_number_of_threads_changes_a_bit() -> None:
    weight, hessian = random(96, 512, 38), correlated(512, 39, tokens=1024)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append(run(weight, hessian, Grid(bits=2, group_size=128), iterations=3))
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes) and torch.equal(results[0].coefficients, other.coefficients)


def test_rows_at_rest_are_left_out_without_a_trace() -> None:
    """Each row alone, which runs until it rests itself, is what it is among rows that go on longer."""
    weight, upper = random(12, 32, 40), block(32, 41)
    together = group(weight, upper, iterations=20)
    for row in range(12):
        alone = group(weight[row : row + 1], upper, iterations=20)
        assert torch.equal(alone.codes[0], together.codes[row])
        torch.testing.assert_close(alone.score[0], together.score[row], rtol=1e-5, atol=0)


def test_signed_planes_give_the_same_weight() -> None:
    coefficients = random(5, 4, 28)
    factors, offset = signed_planes(coefficients)
    for code in range(8):
        signs = torch.tensor([2.0 * ((code >> i) & 1) - 1 for i in range(3)])
        torch.testing.assert_close((factors * signs).sum(1) + offset, levels_of(coefficients)[:, code])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.integers(1, 40),
    bits=st.integers(2, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_stored_bytes_and_unpacking(rows: int, groups: int, size: int, bits: int, dtype: torch.dtype) -> None:
    columns = groups * size
    generator = torch.manual_seed(rows * columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    coefficients = torch.randn(groups, bits + 1, rows, generator=generator).to(dtype)
    weight = BitPlaneWeight(codes=codes, coefficients=coefficients, bits=bits, group_size=size)
    for part in (weight, weight.row_range(rows // 2, rows)):
        packed = part.packed()
        assert part.stored_bytes() == sum(t.numel() * t.element_size() for t in packed.values())
        planes = packed["weight_planes"].permute(1, 2, 0)
        unpacked = sum(unpack_bits(planes[i], 1, columns) << i for i in range(bits))
        again = BitPlaneWeight(
            codes=torch.as_tensor(unpacked), coefficients=packed["weight_coefficients"], bits=bits, group_size=size
        )
        assert torch.equal(again.dequantize(), part.dequantize())
    assert torch.equal(weight.row_range(rows // 2, rows).dequantize(), weight.dequantize()[rows // 2 :])


def test_bits_per_weight() -> None:
    """k = 2, g = 64: 2 + 16 * 3 / 64 = 2.75."""
    result = run(random(16, 128, 29), correlated(128, 30), Grid(bits=2, group_size=64))
    assert 8 * result.stored_bytes() / (16 * 128) == 2.75


def statistics(n: int, hessian: Tensor) -> InputStatistics:
    return InputStatistics(tokens=64, hessian=hessian, sample=random(64, n, 31))


def test_refusals_fallbacks_and_broken_inputs() -> None:
    assert "symmetric: false" in str(BPDQ().refusal(64, True)) and BPDQ().refusal(-1, False) is None
    weight, grid = random(4, 32, 32), Grid(bits=3)
    indefinite = correlated(32, 33)
    indefinite[0, 1] = indefinite[1, 0] = 1e4
    result = BPDQ().quantize_linear(weight, statistics(32, indefinite), grid)
    assert result.solver == "rtn" and "factored" in result.notes["reason"]
    assert torch.equal(result.dequantize(), grid.quantize(weight).dequantize())
    with pytest.raises(NonFinite, match="calibration"):
        BPDQ().quantize_linear(weight, statistics(32, indefinite * float("nan")), grid)
    # Weights that lie on the uniform grid: nearest cannot be beaten.
    weight = grid.quantize(weight).dequantize()
    report, chosen = (BPDQ(on_worse=rule) for rule in ("report", "rtn"))  # type: ignore[arg-type]
    inputs = statistics(32, correlated(32, 35))
    kept = report.quantize_linear(weight, inputs, grid)
    assert kept.solver == "bpdq" and kept.notes["ordinary_error"] > kept.notes["ordinary_error_rtn"]
    replaced = chosen.quantize_linear(weight, inputs, grid)
    assert replaced.solver == "rtn" and "ordinary tokens" in replaced.notes["reason"]


def quantized_tiny(path: Path, solver: Any, sequential: bool = True) -> tuple[Any, list[Any]]:
    model, grid = loaded(path), Grid(bits=2, group_size=32)
    layers = quantize_weights(
        model, solver, lambda role: grid, WINDOWS, sequential=sequential, report=lambda done, total: None
    )
    return model, layers


@pytest.mark.parametrize("family", TINY)
def test_tiny_model(tiny_models: dict[str, Path], family: str) -> None:
    model, layers = quantized_tiny(tiny_models[family], BPDQ(iterations=3))
    assert torch.isfinite(model.head(model.body(WINDOWS))).all()
    assert len(layers) == 2 * len(model.architecture.roles)
    assert all(layer.solver == "bpdq" and layer.bits == 2 for layer in layers)


def test_same_inputs_same_bits(tiny: Path) -> None:
    (first, a), (second, b) = (quantized_tiny(tiny, BPDQ()) for _ in range(2))
    assert a == b
    for x, y in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_better_than_rtn_on_the_tiny_models_outputs(tiny: Path) -> None:
    class Measured(RTN):
        def statistics(self) -> Any:
            return BPDQ().statistics()

    ours, nearest = (
        [layer.output_error for layer in quantized_tiny(tiny, solver, sequential=False)[1]]
        for solver in (BPDQ(), Measured())
    )
    assert all(a < 0.7 * b for a, b in zip(ours, nearest, strict=True))
