"""PTQ1.61: its mask, closed forms without training, gradients against finite differences, storage to the bit."""

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
from qfarm.inputs import Collector
from qfarm.methods.ptq161 import (
    PTQ161,
    BinaryVariables,
    PartlyBinary,
    block_loss,
    distance,
    salient_columns,
    train,
)
from qfarm.quantized import unpack_bits
from qfarm.quantizer import Grid
from qfarm.walk import BlockProblem
from tests.conftest import TINY
from tests.contract import threads
from tests.test_models import loaded

FLOAT32 = Grid(bits=2, scale_dtype=torch.float32)
WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))


class Toy(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.manual_seed(seed)
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        for linear in (self.up, self.down):
            linear.weight = nn.Parameter(torch.randn(linear.weight.shape, generator=generator) / width**0.5)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(torch.nn.functional.silu(self.up(hidden)))
        return out


def toy(seed: int = 0, width: int = 16, samples: int = 8) -> BlockProblem:
    block = Toy(width, seed)
    generator = torch.manual_seed(1000 + seed)
    inputs = torch.randn(samples, 6, width, generator=generator) * torch.linspace(0.2, 2, width)
    linears = {"up": block.up, "down": block.down}
    wanted = PTQ161().statistics() | PTQ161(salient_by="mean").statistics()
    collectors = {role: Collector(wanted, tokens=6 * samples) for role in linears}
    collectors["up"].add(inputs)
    collectors["down"].add(torch.nn.functional.silu(block.up(inputs)))
    return BlockProblem(
        block=block,
        linears=linears,
        grids=dict.fromkeys(linears, FLOAT32),
        inputs=inputs,
        targets=block(inputs * 1.02),
        keywords={},
        seed=seed,
        statistics={role: collector.result() for role, collector in collectors.items()},
    )


def variables(problem: BlockProblem, **options: Any) -> dict[str, BinaryVariables]:
    method = PTQ161(**options)
    return {
        role: BinaryVariables(
            linear.weight, salient_columns(found.max_abs, method.salient_share), problem.grids[role], method
        )
        for (role, linear), found in zip(problem.linears.items(), problem.statistics.values(), strict=True)
        if found.max_abs is not None
    }


def layer(weight: Tensor, share: float = 0.2, grid: Grid = FLOAT32, **options: Any) -> BinaryVariables:
    strength = torch.rand(weight.shape[1], generator=torch.manual_seed(1)) + 0.1
    return BinaryVariables(weight, salient_columns(strength, share), grid, PTQ161(**options))


def random(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


@pytest.mark.parametrize("n", [5, 10, 64, 99])
def test_mask_has_a_fifth_of_the_columns_and_one(n: int) -> None:
    strength = torch.rand(n, generator=torch.manual_seed(n)) + 0.01
    mask = salient_columns(strength, 0.2)
    assert int(mask.sum()) == int(0.2 * n) + 1
    threshold = strength.sort(descending=True).values[int(0.2 * n)]
    assert torch.equal(mask, strength >= threshold)  # the released code's rule
    order = torch.randperm(n, generator=torch.manual_seed(0))
    assert torch.equal(salient_columns(strength[order], 0.2), mask[order])


def test_mask_with_ties_and_dead_inputs() -> None:
    assert salient_columns(torch.ones(10), 0.2).tolist() == [True] * 3 + [False] * 7
    assert salient_columns(torch.tensor([0.0, 0, 0, 5, 0]), 0.4).tolist() == [False] * 3 + [True, False]
    assert not salient_columns(torch.ones(5), 0.0).any() and salient_columns(torch.ones(5), 1.0).all()


def test_mask_is_of_the_statistic_that_was_asked_for() -> None:
    """Both may be there: a term on top of this method can ask for its own."""
    problem = toy(width=4)
    problem.linears = {"up": problem.linears["up"]}
    both = problem.statistics["up"]
    both.max_abs, both.mean_abs = torch.tensor([4.0, 3, 2, 1]), torch.tensor([1.0, 2, 3, 4])
    for by, first in (("max", True), ("mean", False)):
        result = PTQ161(epochs=0, salient_by=by).quantize_block(problem)["up"]  # type: ignore[arg-type]
        assert isinstance(result, PartlyBinary)
        assert result.salient.tolist() == [first, False, False, not first]


def test_closed_form_by_hand() -> None:
    """Column 3 is salient. mu = (1 - 2 + 4) / 3 = 1, alpha = 7 / 3; 1 is not below mu, so its sign is +."""
    weight = torch.tensor([[1.0, -2.0, 4.0, 6.0]])
    mask = torch.tensor([False, False, False, True])
    values = BinaryVariables(weight, mask, FLOAT32, PTQ161()).frozen().dequantize()
    high, low = 7 / 3 + 1, -7 / 3 + 1
    salient = round(6 / (8 / 15)) * 8 / 15  # range -2..6 of the whole row, scale 8 / 15
    torch.testing.assert_close(values, torch.tensor([[high, low, high, salient]]))


def test_no_epochs_is_the_closed_form() -> None:
    problem = toy()
    done = PTQ161(epochs=0).quantize_block(problem)
    for role, result in done.items():
        assert isinstance(result, PartlyBinary)
        weight, mask = problem.linears[role].weight, result.salient
        values = result.dequantize()
        rest = weight[:, ~mask]
        mean, alpha = rest.mean(1, keepdim=True), rest.abs().mean(1, keepdim=True)
        torch.testing.assert_close(values[:, ~mask], torch.where(rest >= mean, mean + alpha, mean - alpha))
        assert all(len(row.unique()) == 2 for row in values[:, ~mask])
        rtn = Grid(bits=4, scale_dtype=torch.float32).quantize(weight).dequantize()
        assert torch.equal(values[:, mask], rtn[:, mask])


def test_all_salient_is_rtn_and_none_is_row_binarisation() -> None:
    weight = random(6, 20, 2)
    whole = layer(weight, 1.0).frozen()
    assert torch.equal(whole.dequantize(), Grid(bits=4, scale_dtype=torch.float32).quantize(weight).dequantize())
    binary = layer(weight, 0.0).frozen()
    mean, alpha = weight.mean(1, keepdim=True), weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(binary.dequantize(), mean + alpha * torch.where(weight >= mean, 1.0, -1.0))
    assert set(whole.packed()) & set(binary.packed()) == {"weight_salient"}


def test_range_over_salient_weights_only() -> None:
    weight = random(6, 20, 3)
    weight[:, ~layer(weight).salient] *= 50
    near, far = (layer(weight, salient_range=over).frozen() for over in ("salient", "row"))
    mask = near.salient
    rtn = Grid(bits=4, scale_dtype=torch.float32).quantize(weight[:, mask]).dequantize()
    assert torch.equal(near.dequantize()[:, mask], rtn)
    errors = [(found.dequantize() - weight)[:, mask].square().sum() for found in (near, far)]
    assert errors[0] < 0.1 * errors[1]


def test_zeros_are_positive_and_zero_rows_stay_finite() -> None:
    weight = random(4, 20, 4)
    weight[1] = 0
    weight[2] = torch.cat([torch.zeros(10), torch.tensor([1.0, -1.0]).repeat(5)])
    weight[3, ~layer(weight).salient] = 0  # nothing to binarise
    values = layer(weight, 0.2).frozen().dequantize()
    assert torch.isfinite(values).all() and (values[1] == 0).all()
    assert (values[3, ~layer(weight).salient] == 0).all()
    # Zeros do not count in mu and alpha, but get a level: +1 where mu <= 0. Never a third one.
    row = layer(weight[2:3], 0.0).frozen().dequantize()
    assert row.unique().tolist() == [-1, 1] and (row[0, :10] == 1).all()


def test_gradients_are_those_of_finite_differences() -> None:
    problem = toy()
    layers = variables(problem)
    second = problem.forward(problem.inputs, {}) + 0.1
    whole = slice(0, len(problem.inputs))
    tensors = [t for found in layers.values() for t in (found.amplitude, found.row, found.column)]
    block_loss(problem, layers, whole, second).backward()
    assert all(parameter.grad is None for parameter in problem.block.parameters())
    step = 1e-2
    for tensor in tensors:
        assert tensor.grad is not None
        direction = torch.randn(tensor.shape, generator=torch.manual_seed(5))
        direction = direction / direction.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(direction, alpha=sign * step)
                ends.append(float(block_loss(problem, layers, whole, second)))
                tensor.sub_(direction, alpha=sign * step)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((tensor.grad * direction).sum()), rel=0.02, abs=1e-4)


def test_salient_columns_get_no_gradient_through_r2() -> None:
    problem = toy()
    layers = variables(problem)
    block_loss(problem, layers, slice(0, 4), problem.targets[:4]).backward()
    for found in layers.values():
        assert found.column.grad is not None
        assert (found.column.grad[0, found.salient] == 0).all()
        assert (found.column.grad[0, ~found.salient] != 0).all()


def test_distance_by_hand() -> None:
    target, output = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
    assert distance(target, output).item() == pytest.approx(1 - torch.tensor(24 / 25).log().item(), rel=1e-5)
    orthogonal = distance(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
    assert orthogonal.item() == pytest.approx(1 - torch.tensor(1e-6).log().item(), rel=1e-5)


def test_loss_looks_at_both_targets() -> None:
    problem = toy()
    layers = variables(problem)
    first, second = problem.targets[2:5], problem.targets[2:5] + random(6, 16, 7)
    output = problem.forward(problem.inputs[2:5], {role: found.values() for role, found in layers.items()})
    expected = distance(first, output) + distance(second, output)
    assert expected > distance(first, output) > 0 and expected > distance(second, output)
    torch.testing.assert_close(block_loss(problem, layers, slice(2, 5), second), expected)


def test_training_lowers_the_loss() -> None:
    for seed in range(3):
        problem = toy(seed)
        layers = variables(problem)
        second = problem.forward(problem.inputs, {})
        whole = slice(0, len(problem.inputs))

        def loss(layers: Any = layers, problem: Any = problem, second: Any = second, whole: Any = whole) -> float:
            return float(block_loss(problem, layers, whole, second).detach())

        before = loss()
        figures = train(problem, layers, PTQ161(epochs=15, learning_rate=9e-5, factor_learning_rate=9e-3))
        assert loss() < 0.9 * before and figures["loss_last"] < figures["loss_first"]


def test_the_free_factor_of_r1_and_r2_changes_nothing() -> None:
    plain, scaled = (layer(random(6, 20, 6)) for _ in range(2))
    with torch.no_grad():
        for found in (plain, scaled):
            found.column.copy_(torch.linspace(0.5, 2, 20)[None])
        scaled.row.mul_(8)
        scaled.column.div_(8)
    torch.testing.assert_close(plain.values(), scaled.values())
    first, second = plain.frozen(), scaled.frozen()
    assert torch.equal(first.factor, second.factor) and first.factor.mean() == pytest.approx(1)
    torch.testing.assert_close(first.dequantize(), plain.values().detach())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.1, 0.2, 0.33, 1.0]),
    bits=st.integers(2, 8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_stored_bytes_and_unpacking(rows: int, columns: int, share: float, bits: int, dtype: torch.dtype) -> None:
    found = layer(random(rows, columns, rows), share, Grid(bits=2, scale_dtype=dtype), salient_bits=bits)
    with torch.no_grad():
        found.column.add_(0.2 * random(1, columns, columns))
    whole = found.frozen()
    for result in (whole, whole.row_range(rows // 2, rows)):
        packed = result.packed()
        assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in packed.values())
        assert torch.equal(unpacked(packed, result.shape, bits, dtype).dequantize(), result.dequantize())
    assert torch.equal(whole.row_range(rows // 2, rows).dequantize(), whole.dequantize()[rows // 2 :])


def unpacked(packed: dict[str, Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype) -> PartlyBinary:
    rows, columns = shape
    salient = unpack_bits(packed["weight_salient"][None], 1, columns)[0].bool()
    count = int(salient.sum())
    parts: dict[str, Tensor] = {
        "codes": torch.empty(rows, 0, dtype=torch.uint8),
        "scale": torch.ones(rows, dtype=dtype),
        "zero": torch.zeros(rows, dtype=torch.uint8),
        "positive": torch.empty(rows, 0, dtype=torch.bool),
        "amplitude": torch.zeros(rows, dtype=dtype),
        "offset": torch.zeros(rows, dtype=dtype),
        "factor": torch.empty(0, dtype=dtype),
    }
    if count:
        parts["codes"] = unpack_bits(packed["weight_packed"], bits, count)
        parts["zero"] = unpack_bits(packed["weight_zero_point"][None], bits, rows)[0]
        parts["scale"] = packed["weight_scale"]
    if count < columns:
        parts["positive"] = unpack_bits(packed["weight_signs"], 1, columns - count).bool()
        parts["amplitude"], parts["offset"] = packed["weight_amplitude"], packed["weight_offset"]
        parts["factor"] = packed["weight_column_scale"]
    return PartlyBinary(salient=salient, salient_bits=bits, **parts)


def test_bits_per_weight() -> None:
    """4096 inputs: 820 salient columns; 4-bit codes and signs in whole words, 3 + 1/4 numbers per row, mask and r2."""
    result = layer(torch.zeros(64, 4096), grid=Grid(bits=2)).frozen()
    by_row = 103 * 32 + 103 * 32 + 3 * 16 + 4  # 820 * 4 / 32 = 102.5 words; 3276 / 32 = 102.4
    expected = (64 * by_row + 4096 + 16 * 3276) / (64 * 4096)
    assert 8 * result.stored_bytes() / (64 * 4096) == pytest.approx(expected)
    square = (4096 * by_row + 4096 + 16 * 3276) / 4096**2
    assert square == pytest.approx(1.6254, abs=1e-4)
    # By the paper's terms: codes, mask, r2, three numbers and a zero per row. The rest fills rows up to whole words.
    plain = (4 * 820 + 3276) / 4096 + 1 / 4096 + 16 * 3276 / 4096**2 + (3 * 16 + 4) / 4096
    assert plain == pytest.approx(1.617, abs=5e-4) and square - plain == pytest.approx((16 + 20) / 4096)


def test_refusals_and_broken_numbers() -> None:
    method = PTQ161()
    assert method.refusal(-1, False) is None
    assert "must be -1, not 128" in str(method.refusal(128, False))
    assert "symmetric: false" in str(method.refusal(-1, True))
    assert "2.2 bits" in str(PTQ161(salient_share=0.4).refusal(-1, False))
    assert PTQ161(salient_share=0.4, salient_bits=3).refusal(-1, False) is None
    assert list(PTQ161.widths) == [2]
    problem = toy()
    problem.targets[0] = float("inf")
    with pytest.raises(NonFinite, match="loss"):
        PTQ161(epochs=1).quantize_block(problem)
    problem.statistics["up"].max_abs = torch.full((16,), float("nan"))
    with pytest.raises(NonFinite, match="calibration"):
        PTQ161(epochs=1).quantize_block(problem)
    with pytest.raises(NonFinite, match="float16"):
        layer(torch.full((1, 5), 1e5) * torch.tensor([1, -1, 1, 1, 1]), 0.0, Grid(bits=2)).frozen()


def test_neither_a_repeat_nor_the_number_of_threads_changes_a_bit() -> None:
    problem, results = toy(width=128, samples=16), []
    for count in (1, 2, 2):
        with threads(count):
            results.append(PTQ161(epochs=2, batch=8).quantize_block(problem))
    for other in results[1:]:
        for role, first in results[0].items():
            assert torch.equal(first.dequantize(), other[role].dequantize())


def quantized_tiny(path: Path, solver: PTQ161, sequential: bool = True) -> tuple[Any, list[Any]]:
    model, grid = loaded(path), Grid(bits=2)
    layers = quantize_weights(
        model, solver, lambda role: grid, WINDOWS, sequential=sequential, report=lambda done, total: None
    )
    return model, layers


@pytest.mark.parametrize("family", TINY)
def test_tiny_model(tiny_models: dict[str, Path], family: str) -> None:
    model, layers = quantized_tiny(tiny_models[family], PTQ161(epochs=1))
    assert torch.isfinite(model.head(model.body(WINDOWS))).all()
    assert len(layers) == 2 * len(model.architecture.roles)
    assert all(found.solver == "ptq161" and found.bits == 2 for found in layers)
    assert all(0 < found.output_error < 1 and 0 < found.notes["ordinary_error"] < 1 for found in layers)
    assert all(found.notes["salient_columns"] == int(0.2 * found.shape[1]) + 1 for found in layers)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("salient_by", ["max", "mean"])
def test_same_inputs_same_bits(tiny: Path, sequential: bool, salient_by: Any) -> None:
    solver = PTQ161(epochs=1, salient_by=salient_by)
    (first, a), (second, b) = (quantized_tiny(tiny, solver, sequential) for _ in range(2))
    assert a == b
    for x, y in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_training_helps_on_the_tiny_model(tiny: Path) -> None:
    target = loaded(tiny).body(WINDOWS)
    errors = []
    for epochs in (0, 20):
        model, _ = quantized_tiny(tiny, PTQ161(epochs=epochs, factor_learning_rate=9e-3))
        errors.append(float((model.body(WINDOWS) - target).square().mean()))
    assert errors[1] < 0.9 * errors[0]
