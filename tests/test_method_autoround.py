"""AutoRound: its grids by hand, its gradients, its bounds, and what training gains on a toy block and a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfarm.calibrate import quantize_weights
from qfarm.errors import NonFinite
from qfarm.inputs import Collector, Statistic
from qfarm.methods.autoround import AutoRound, LayerVariables, block_loss, first_rate, train
from qfarm.methods.rtn import RTN
from qfarm.quantized import UniformWeight, unpack_bits
from qfarm.quantizer import Grid
from qfarm.recipe import WeightSolver
from qfarm.walk import BlockProblem
from tests.conftest import TINY
from tests.contract import threads
from tests.test_models import loaded

FLOAT32: dict[str, Any] = {"scale_dtype": torch.float32}
WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))


class Toy(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.manual_seed(seed)
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for linear in (self.up, self.down):
            linear.weight = nn.Parameter(torch.randn(width, width, generator=generator) / width**0.5)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(torch.nn.functional.silu(self.up(hidden)))
        return out


def toy(grid: Grid, seed: int = 0, width: int = 32, samples: int = 16) -> BlockProblem:
    block = Toy(width, seed)
    generator = torch.manual_seed(1000 + seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(samples, 8, width, generator=generator) @ mixing
    linears = {"up": block.up, "down": block.down}
    collectors = {role: Collector(AutoRound().statistics(), tokens=8 * samples) for role in linears}
    collectors["up"].add(inputs)
    collectors["down"].add(torch.nn.functional.silu(block.up(inputs)))
    return BlockProblem(
        block=block,
        linears=linears,
        grids=dict.fromkeys(linears, grid),
        inputs=inputs,
        targets=block(inputs),
        keywords={},
        seed=seed,
        statistics={role: collector.result() for role, collector in collectors.items()},
    )


def error_of(problem: BlockProblem, weights: dict[str, Tensor]) -> float:
    return float((problem.forward(problem.inputs, weights) - problem.targets).square().mean())


def values(done: dict[str, Any]) -> dict[str, Tensor]:
    return {role: weight.dequantize() for role, weight in done.items()}


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_iterations_is_rtn(bits: int, group_size: int) -> None:
    grid = Grid(bits=bits, group_size=group_size)
    problem = toy(grid)
    for role, result in AutoRound(iterations=0).quantize_block(problem).items():
        nearest = grid.quantize(problem.linears[role].weight)
        assert isinstance(result, UniformWeight) and nearest.zero is not None and result.zero is not None
        assert torch.equal(result.codes, nearest.codes) and torch.equal(result.scale, nearest.scale)
        assert torch.equal(result.zero, nearest.zero)


def test_symmetric_by_hand() -> None:
    """Row [-1, 0.3, 0.7, 0.9], 4 bits: scale 1/8, codes -8, 2, 6, 7. Negated: scale -1/8 and the same codes."""
    row = torch.tensor([[-1, 0.3, 0.7, 0.9]])
    for weight, sign in ((row, 1), (-row, -1)):
        result = LayerVariables(weight, Grid(bits=4, symmetric=True)).frozen()
        assert result.scale.item() == sign / 8 and result.zero is None
        assert (result.codes.int() - 8).tolist() == [[-8, 2, 6, 7]]
        torch.testing.assert_close(result.dequantize(), sign * torch.tensor([[-1, 0.25, 0.75, 0.875]]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_keeps_the_largest_magnitude(bits: int) -> None:
    weight = torch.randn(64, 32, generator=torch.manual_seed(bits))
    result = LayerVariables(weight, Grid(bits=bits, group_size=16, symmetric=True, **FLOAT32)).frozen()
    grouped, found = weight.reshape(-1, 16), result.dequantize().reshape(-1, 16)
    top = grouped.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(found.gather(1, top), grouped.gather(1, top), rtol=1e-6, atol=0)
    assert (result.scale < 0).any() and (result.scale > 0).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_offsets_stay_within_half_a_step_and_codes_within_one(symmetric: bool) -> None:
    grid = Grid(bits=4, group_size=16, symmetric=symmetric)
    problem = toy(grid)
    layers = {role: LayerVariables(linear.weight, grid) for role, linear in problem.linears.items()}
    nearest = {role: layer.frozen().codes.int() for role, layer in layers.items()}
    train(problem, layers, AutoRound(tune_range=False, keep="last", iterations=100))
    for role, layer in layers.items():
        assert 0.3 < float(layer.offset.detach().abs().max()) <= 0.5 * 101 / 100 + 1e-6
        difference = (layer.frozen().codes.int() - nearest[role]).abs()
        assert difference.max() == 1
        assert all(torch.equal(factor, torch.ones_like(factor)) for factor in layer.factors)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_the_straight_through_ones(symmetric: bool) -> None:
    """By hand from the formulas, for an upstream gradient u, with round() treated as the identity."""
    grid = Grid(bits=3, symmetric=symmetric, **FLOAT32)
    weight = torch.randn(1, 12, generator=torch.manual_seed(5))
    layer = LayerVariables(weight, grid)
    with torch.no_grad():  # clip both ends, away from ties
        layer.low_factor.fill_(0.7)
        layer.high_factor.fill_(0.8)
    upstream = torch.randn(1, 1, 12, generator=torch.manual_seed(6))
    found, codes, scale, zero = layer.fake()
    by_offset, by_low, by_high = torch.autograd.grad((found * upstream).sum(), [layer.offset, *layer.factors])
    low, high = float(layer.low), float(layer.high)
    s, z = scale.item(), zero.item()
    raw = torch.round(weight / s) + z
    inside = ((raw >= 0) & (raw <= 7))[None]
    assert not inside.all() and inside.any()
    torch.testing.assert_close(by_offset, torch.where(inside, s * upstream, 0.0))
    # value = (code - z) s: inside, d(code)/ds = -w / s^2 + dz/ds; outside, code is constant.
    code = codes.detach()
    if symmetric:
        by_scale = torch.where(inside, code - z - weight / s, code - z)
        by_magnitude = float((upstream * by_scale).sum()) * (-1.0 if high * 0.8 >= -low * 0.7 else 1.0)
        expected = [0.0, by_magnitude * high / 4] if high * 0.8 >= -low * 0.7 else [by_magnitude * -low / 4, 0.0]
    else:
        bottom = low * 0.7
        by_scale = torch.where(inside, code - z - weight / s, code - z - bottom / s)
        total, outside = float((upstream * by_scale).sum()), float((upstream * ~inside).sum())
        # zero = -low / s: outside the range, moving low moves the value by -s dz = +dlow.
        expected = [total * -low / 7 + outside * low, total * high / 7]
    assert [by_low.item(), by_high.item()] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_sign_step_by_hand() -> None:
    """One weight 0.4 beside the range's end 3 at 2 bits (scale 1): v moves by the rate, once, in the right direction.

    The input of the second weight is 0, so its gradient is 0 and it stays.
    """
    block = nn.Sequential(nn.Linear(3, 1, bias=False)).requires_grad_(False)
    linear = block[0]
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(torch.tensor([[0.4, 1.2, 3.0]]), requires_grad=False)
    inputs = torch.tensor([[[1.0, 0.0, 0.0]]])
    problem = BlockProblem(
        block=block,
        linears={"up": linear},
        grids={"up": Grid(bits=2, **FLOAT32)},
        inputs=inputs,
        targets=block(inputs),
        keywords={},
        seed=0,
    )
    layers = {"up": LayerVariables(linear.weight, problem.grids["up"])}
    options = AutoRound(iterations=1, learning_rate=0.25, tune_range=False, keep="last")
    train(problem, layers, options)
    # The rounded value 0 is below the target 0.4: d loss / d v < 0, so v rises.
    torch.testing.assert_close(layers["up"].offset.detach(), torch.tensor([[[0.25, 0.0, 0.0]]]))
    loss, elements = block_loss(problem, layers, torch.tensor([0]), options)
    assert elements == 1 and loss.item() == pytest.approx(0.36)  # round(0.65) = 1


@pytest.mark.parametrize("growth", [0.5, 2.0])
def test_range_factors_stay_between_0_and_1(growth: float) -> None:
    """Targets of a block with other weights pull ranges in, or against their bound."""
    problem = toy(Grid(bits=4))
    with torch.no_grad():
        problem.targets = problem.forward(
            problem.inputs, {role: growth * linear.weight for role, linear in problem.linears.items()}
        )
    layers = {role: LayerVariables(linear.weight, problem.grids[role]) for role, linear in problem.linears.items()}
    train(problem, layers, AutoRound(iterations=20, keep="last", range_learning_rate=0.2))
    factors = torch.cat([factor.detach().reshape(-1) for layer in layers.values() for factor in layer.factors])
    assert factors.max() <= 1 and factors.min() >= 0
    assert factors.mean() < 0.6 if growth < 1 else (factors == 1).float().mean() > 0.3


@pytest.mark.parametrize("keep", ["best", "validation"])
def test_kept_variables_are_those_of_the_smallest_loss(keep: Any) -> None:
    problem = toy(Grid(bits=2, group_size=16))
    options = AutoRound(iterations=40, keep=keep, batch=16)  # all samples: every loss is of the same batch
    layers = {role: LayerVariables(linear.weight, problem.grids[role]) for role, linear in problem.linears.items()}
    before = error_of(problem, {role: layer.frozen().dequantize() for role, layer in layers.items()})
    figures = train(problem, layers, options)
    after = error_of(problem, {role: layer.frozen().dequantize() for role, layer in layers.items()})
    assert figures["loss_first"] == pytest.approx(before, rel=1e-4)
    assert figures["loss_kept"] == pytest.approx(after, rel=1e-4) and after < before
    assert 0 < figures["step_kept"] < 40


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_better_than_rtn_on_a_toy_block(bits: int, symmetric: bool) -> None:
    wins = 0
    for seed in range(20):
        problem = toy(Grid(bits=bits, group_size=16, symmetric=symmetric), seed, width=16)
        plain, trained = (
            error_of(problem, values(AutoRound(iterations=count).quantize_block(problem))) for count in (0, 40)
        )
        wins += trained < plain
    assert wins >= 19


def test_first_token_can_be_left_out() -> None:
    problem = toy(Grid(bits=2))
    problem.targets[:, 0] += 1e6
    options = AutoRound(iterations=3, skip_first=True)
    figures = AutoRound(iterations=3).quantize_block(problem)["up"].notes
    assert figures["loss_first"] > 1e9
    assert options.quantize_block(problem)["up"].notes["loss_first"] < 10


def test_layers_come_with_their_output_errors(tiny: Path) -> None:
    """Without training both figures of a layer are RTN's own; with it they differ, and every layer has them."""
    plain, trained = (quantized_tiny(tiny, AutoRound(iterations=n, batch=6), sequential=False)[1] for n in (0, 6))
    nearest = quantized_tiny(tiny, Observed(), sequential=False)[1]
    for first, second, third in zip(plain, trained, nearest, strict=True):
        assert first.output_error == pytest.approx(third.output_error, rel=1e-5)
        assert first.notes["ordinary_error"] == pytest.approx(first.notes["ordinary_error_rtn"], rel=1e-5)
        assert second.notes["ordinary_error_rtn"] == first.notes["ordinary_error_rtn"]
        assert second.output_error is not None and 0 < second.output_error != first.output_error


def test_neither_a_repeat_nor_the_number_of_threads_changes_a_bit() -> None:
    """On one machine: elsewhere a gradient of nearly zero may have another sign."""
    problem, results = toy(Grid(bits=3, group_size=32), width=128, samples=64), []
    for count in (1, 2, 2):
        with threads(count):
            results.append(AutoRound(iterations=5, batch=32).quantize_block(problem))
    for other in results[1:]:
        for role, first in results[0].items():
            second = other[role]
            assert isinstance(first, UniformWeight) and isinstance(second, UniformWeight)
            assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


def test_rates() -> None:
    assert first_rate(AutoRound(), 2) == 1 / 200
    assert first_rate(AutoRound(iterations=1000), 3) == 2 / 1000
    assert first_rate(AutoRound(iterations=1000), 4) == 1 / 1000
    assert first_rate(AutoRound(learning_rate=0.5), 4) == 0.5


def test_refusals_and_broken_numbers() -> None:
    assert AutoRound().refusal(-1, True) is None
    assert "tune_range" in str(AutoRound(tune_range=False, range_learning_rate=0.1).refusal(-1, False))
    assert "iterations: 0" in str(AutoRound(iterations=0, learning_rate=0.1).refusal(-1, False))
    problem = toy(Grid(bits=4))
    problem.inputs[0] = float("nan")
    with pytest.raises(NonFinite, match="loss"):
        AutoRound(iterations=30).quantize_block(problem)
    with pytest.raises(NonFinite, match="does not fit"):
        LayerVariables(torch.tensor([[1e6, 0.0]]), Grid(bits=2)).frozen()
    with pytest.raises(NonFinite, match="NaN"):
        LayerVariables(torch.tensor([[float("nan"), 0.0]]), Grid(bits=2))
    assert (LayerVariables(torch.zeros(2, 8), Grid(bits=4, symmetric=True)).frozen().dequantize() == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.integers(1, 24),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_stored_bytes_and_unpacking(rows: int, groups: int, size: int, bits: int, symmetric: bool) -> None:
    """Negative scales included."""
    weight = torch.randn(rows, groups * size, generator=torch.manual_seed(rows * size))
    result = LayerVariables(weight, Grid(bits=bits, group_size=size, symmetric=symmetric)).frozen()
    packed = result.packed()
    assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in packed.values())
    zero = None
    if not symmetric:
        zero = unpack_bits(packed["weight_zero_point"].T.contiguous(), bits, rows).T
    again = UniformWeight(
        codes=unpack_bits(packed["weight_packed"], bits, groups * size),
        scale=packed["weight_scale"],
        zero=zero,
        bits=bits,
        group_size=size,
    )
    assert torch.equal(again.dequantize(), result.dequantize())
    assert torch.equal(result.row_range(0, 1).dequantize(), result.dequantize()[:1])


class Observed(RTN):
    """RTN that asks for the Hessian, so that its output error is known."""

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.HESSIAN})


def quantized_tiny(
    path: Path, solver: WeightSolver, dtype: str = "float32", sequential: bool = True, grid_of: Any = None
) -> tuple[Any, list[Any]]:
    model, grid = loaded(path, dtype), Grid(bits=2, group_size=32)
    layers = quantize_weights(
        model,
        solver,
        grid_of or (lambda role: grid),
        WINDOWS,
        sequential=sequential,
        report=lambda done, total: None,
        seed=3,
    )
    return model, layers


@pytest.mark.parametrize("family", TINY)
def test_tiny_model(tiny_models: dict[str, Path], family: str) -> None:
    model, layers = quantized_tiny(tiny_models[family], AutoRound(iterations=4, batch=4))
    assert torch.isfinite(model.head(model.body(WINDOWS))).all()
    assert len(layers) == 2 * len(model.architecture.roles)
    assert all(layer.solver == "autoround" and layer.bits == 2 for layer in layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_inputs_same_bits(tiny: Path, dtype: str) -> None:
    (first, a), (second, b) = (quantized_tiny(tiny, AutoRound(iterations=6, batch=4), dtype) for _ in range(2))
    assert a == b
    for x, y in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_layers_left_at_16_bits_are_untouched(tiny: Path) -> None:
    original = loaded(tiny)
    model, layers = quantized_tiny(
        tiny, AutoRound(iterations=2), grid_of=lambda role: None if role == "v" else Grid(bits=3)
    )
    untouched = [layer for layer in layers if layer.solver is None]
    assert [layer.role for layer in untouched] == ["v", "v"]
    for index in range(2):
        assert torch.equal(model.linears(index)["v"].weight, original.linears(index)["v"].weight)


def test_better_than_rtn_on_the_tiny_models_hidden_states(tiny: Path) -> None:
    original = loaded(tiny)
    target = original.body(WINDOWS)
    errors = []
    for count in (0, 60):
        model, _ = quantized_tiny(tiny, AutoRound(iterations=count, batch=6))
        errors.append(float((model.body(WINDOWS) - target).square().mean()))
    assert errors[1] < 0.7 * errors[0]
