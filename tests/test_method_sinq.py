"""SINQ: what the iteration promises, what its factors recover, and storage to the byte."""

from __future__ import annotations

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
from qfarm.methods.rtn import RTN
from qfarm.methods.sinq import SINQ, Factors, column_weights, normalise
from qfarm.models.load import LoadedModel
from qfarm.quantized import ColumnScaled, UniformWeight, unpack_bits
from qfarm.quantizer import Grid, relative_error
from tests.conftest import TINY
from tests.contract import threads
from tests.test_models import loaded

FINE = {"scale_dtype": torch.float32}


def gaussian(rows: int, columns: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed)) * std


def lognormal_columns(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight whose columns differ by log-normal factors of sigma 0.5, and the factors."""
    factors = torch.exp(0.5 * torch.randn(columns, generator=torch.manual_seed(seed + 1000)))
    return gaussian(rows, columns, seed) * factors, factors


def quantize(weight: Tensor, bits: int = 4, group_size: int = 64, symmetric: bool = False, **options: Any) -> Any:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric, **FINE)
    return SINQ(**options).quantize_linear(weight, None, grid)


def imbalance(tile: Tensor) -> float:
    both = torch.cat([tile.std(0), tile.std(1)])
    return float(both.max() / both.min())


def plain_sinkhorn(tile: Tensor, iterations: int) -> tuple[Tensor, Tensor, list[float]]:
    """One tile, step by step as the algorithm is written: factors of columns and rows, every imbalance on the way."""
    log_columns, log_rows = torch.zeros(tile.shape[1]), torch.zeros(tile.shape[0], 1)
    target = min(float(tile.std(0).clamp(1e-3, 1e3).min()), float(tile.std(1).clamp(1e-3, 1e3).min())) + 1e-6
    best, kept, gate, history = imbalance(tile), (log_columns, log_rows), True, []
    for _ in range(iterations):
        current = tile / log_columns.exp() / log_rows.exp()
        history.append(imbalance(current))
        if history[-1] <= best:
            best, kept = history[-1], (log_columns, log_rows)
        if history[-1] > best:
            gate = False
        if gate:
            columns = (current.std(0).clamp(1e-3, 1e3) / target).clamp(0.7, 2).log()
            rows = (current.std(1, keepdim=True).clamp(1e-3, 1e3) / target).clamp(0.7, 2).log()
            log_columns = (log_columns + columns).clamp(-0.3, 10)
            log_rows = (log_rows + rows).clamp(-0.3, 10)
    return kept[0].exp(), kept[1].exp(), history


def one(tile: Tensor, iterations: int = 16) -> Factors:
    return normalise(tile[None], iterations)


def normalised(tile: Tensor, found: Factors) -> Tensor:
    return tile / found.columns[0] / found.rows[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rows", [2, 5, 96])
def test_imbalance_never_rises(seed: int, rows: int) -> None:
    tile = lognormal_columns(rows, 32, seed)[0] * torch.rand(rows, 1, generator=torch.manual_seed(seed)).add(0.1)
    found = one(tile)
    assert float(found.before) == pytest.approx(imbalance(tile), rel=1e-4)
    assert imbalance(normalised(tile, found)) <= imbalance(tile) * (1 + 1e-5)
    assert float(found.after) == pytest.approx(imbalance(normalised(tile, found)), rel=1e-3)


def test_imbalance_of_a_gaussian_tile() -> None:
    tile = gaussian(512, 64, seed=3)
    found = one(tile)
    assert float(found.before) == pytest.approx(1.74, abs=0.12)
    assert float(found.after) < 1.06


@pytest.mark.parametrize("iterations", [1, 2, 5, 16])
def test_follows_the_plain_algorithm(iterations: int) -> None:
    for seed in range(4):
        tile = lognormal_columns(24, 32, seed)[0]
        columns, rows, _ = plain_sinkhorn(tile, iterations)
        found = one(tile, iterations)
        product = found.columns[0] * found.rows[0]
        torch.testing.assert_close(product, columns * rows, rtol=1e-5, atol=0)
        gauge = float((columns / found.columns[0]).mean())
        assert gauge == pytest.approx(2.0 ** round(torch.tensor(gauge).log2().item()), rel=1e-5)


def test_the_first_rise_ends_a_tile() -> None:
    """A tile whose imbalance rises at the second step and would fall below its best value later on."""
    found_one = False
    for seed in range(30):
        tile = gaussian(4, 16, seed, std=1.0) * torch.exp(2 * torch.randn(4, 1, generator=torch.manual_seed(seed)))
        history = plain_sinkhorn(tile, 16)[2]
        rise = next((i for i in range(1, 16) if history[i] > min(history[:i])), None)
        if rise is None:
            continue
        found_one = True
        assert len(set(history[rise:])) == 1  # frozen
        found = one(tile)
        assert float(found.after) == pytest.approx(min(history), rel=1e-4)
        assert torch.equal(found.columns, one(tile, rise).columns)
    assert found_one


def test_reconstruction() -> None:
    weight = lognormal_columns(48, 128, seed=4)[0]
    tiles = weight.reshape(48, 2, 64).transpose(0, 1)
    found = normalise(tiles, 16)
    back = tiles / found.columns / found.rows * found.columns * found.rows
    torch.testing.assert_close(back, tiles, rtol=1e-6, atol=1e-9)
    assert relative_error(weight, quantize(weight, bits=8).dequantize()) < 1e-4


def test_balanced_tile_is_rtn() -> None:
    """A circulant tile: every row and column holds the same values, so all deviations are equal."""
    values = gaussian(1, 32, seed=5)[0]
    weight = torch.stack([values.roll(i) for i in range(32)])
    found = one(weight)
    torch.testing.assert_close(found.columns / found.columns[..., :1], torch.ones(1, 1, 32), rtol=1e-4, atol=0)
    for symmetric in (True, False):
        result = quantize(weight, 4, 32, symmetric)
        nearest = Grid(bits=4, group_size=32, symmetric=symmetric, **FINE).quantize(weight)
        torch.testing.assert_close(result.dequantize(), nearest.dequantize(), rtol=0, atol=1e-5)


def test_permutations_permute_the_result() -> None:
    weight = lognormal_columns(40, 32, seed=6)[0]
    rows, columns = (torch.randperm(n, generator=torch.manual_seed(7)) for n in (40, 32))
    plain, by_row, by_column = (quantize(w, 4, 32) for w in (weight, weight[rows], weight[:, columns]))
    # Sums run in another order: last bits differ, and a code now and then.
    for codes, expected in (
        (by_row.base.codes, plain.base.codes[rows]),
        (by_column.base.codes, plain.base.codes[:, columns]),
    ):
        assert float((codes != expected).float().mean()) < 0.003
    torch.testing.assert_close(by_column.factor, plain.factor[columns], rtol=1e-4, atol=0)


def test_scaling_leaves_codes_alone_while_deviations_are_in_range() -> None:
    weight = lognormal_columns(64, 64, seed=8)[0]
    codes = quantize(weight).base.codes
    assert float((quantize(weight * 16).base.codes != codes).float().mean()) < 0.01
    # Below 1e-3 everything looks flat, unless tiles are scaled first.
    tiny = quantize(weight * 2**-12)
    assert tiny.notes["imbalance_after"] == pytest.approx(tiny.notes["imbalance_before"], rel=1e-3)
    scaled = [quantize(weight * by, prescale=True) for by in (1.0, 2.0**-12)]
    assert torch.equal(scaled[0].base.codes, scaled[1].base.codes)
    assert scaled[1].notes["imbalance_after"] < 1.3


def test_rank_one_scaling_is_recovered() -> None:
    generator = torch.manual_seed(9)
    rows, columns = (torch.exp(0.69 * (2 * torch.rand(n, generator=generator) - 1)) for n in (1024, 256))
    tile = gaussian(1024, 256, seed=10) * rows[:, None] * columns
    found = one(tile)
    for mine, true, samples in ((found.columns.flatten(), columns, 1024), (found.rows.flatten(), rows, 256)):
        ratio = mine / true
        assert float((ratio / ratio.mean() - 1).abs().max()) < 5 / (2 * samples) ** 0.5 + 0.03
    flat = normalised(tile, found)
    spreads = torch.cat([flat.std(0), flat.std(1)])
    assert float((spreads / spreads.mean() - 1).abs().mean()) < 0.03 and imbalance(flat) < 1.2 < 4 < imbalance(tile)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gain_on_uneven_columns_and_none_on_even_ones(bits: int, symmetric: bool) -> None:
    weight, factors = lognormal_columns(1024, 256, seed=11)
    grid = Grid(bits=bits, group_size=64, symmetric=symmetric, **FINE)
    nearest, ours = grid.quantize(weight).dequantize(), quantize(weight, bits, 64, symmetric).dequantize()
    assert relative_error(weight, ours) < 0.65 * relative_error(weight, nearest)
    # Inputs scaled inversely, as training makes them: the output gains more.
    assert relative_error(weight / factors, ours / factors) < 0.5 * relative_error(weight / factors, nearest / factors)
    even = gaussian(1024, 256, seed=12)
    error, error_rtn = (
        relative_error(even, values)
        for values in (
            quantize(even, bits).dequantize(),
            Grid(bits=bits, group_size=64, **FINE).quantize(even).dequantize(),
        )
    )
    assert error == pytest.approx(error_rtn, rel=0.03)


def test_the_column_factor_may_move_to_the_input() -> None:
    weight = lognormal_columns(24, 128, seed=13)[0]
    result = quantize(weight, 4, 32)
    x = torch.randn(5, 128, generator=torch.manual_seed(14))
    torch.testing.assert_close((x * result.factor) @ result.base.dequantize().T, x @ result.dequantize().T)
    assert not torch.allclose(x @ result.base.dequantize().T, x @ result.dequantize().T, rtol=0.1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_degenerate_rows_and_columns(symmetric: bool, dtype: torch.dtype) -> None:
    weight = gaussian(16, 32, seed=15)
    weight[3] = 0
    weight[:, 5] = 0
    weight[7] = 0.31
    weight[9] = -40.0
    weight[11, 20] = 25.0
    grid = Grid(bits=4, group_size=16, symmetric=symmetric, scale_dtype=dtype)
    result = SINQ().quantize_linear(weight, None, grid)
    values = result.dequantize()
    assert torch.isfinite(values).all()
    assert (values[3] == 0).all() and (values[[0, 1, 2], 5] == 0).all()
    assert float((values[11, 20] - 25).abs()) < 2
    assert float(result.factor.max() / result.factor.min()) < 1e4
    zeros = SINQ().quantize_linear(torch.zeros(4, 16), None, grid)
    assert (zeros.dequantize() == 0).all()
    assert torch.isfinite(SINQ().quantize_linear(gaussian(1, 16), None, grid).dequantize()).all()  # one row


def test_dead_lines_do_not_disturb_the_others() -> None:
    weight = lognormal_columns(64, 32, seed=16)[0]
    found = one(weight)
    padded = torch.zeros(66, 34)
    padded[1:65, 1:33] = weight
    ours = one(padded)
    assert float(ours.after) < 1.5
    assert float(ours.columns[0, 0, 0]) == float(ours.columns[0, 0, 33])
    # Zeros do change the deviations of the lines they cross: only about the same factors.
    ratio = ours.columns[0, 0, 1:33] / found.columns[0, 0]
    assert float((ratio / ratio.mean() - 1).abs().max()) < 0.05


def test_symmetric_codes_use_the_whole_restricted_range() -> None:
    codes = quantize(gaussian(64, 64, seed=17), 4, 64, symmetric=True).base.codes
    assert codes.unique().tolist() == list(range(1, 16))


def activations(n: int, seed: int) -> InputStatistics:
    x = torch.randn(256, n, generator=torch.manual_seed(seed)) * torch.exp(
        torch.randn(n, generator=torch.manual_seed(1))
    )
    return InputStatistics(tokens=256, sample=x, mean_abs=x.abs().mean(0))


def test_activation_aware_lowers_the_output_error() -> None:
    weight, inputs, grid = gaussian(96, 128, seed=18), activations(128, 19), Grid(bits=3, group_size=32, **FINE)
    assert inputs.sample is not None
    x = inputs.sample
    aware = SINQ(activation_aware=True)
    assert aware.needs_text and not SINQ().needs_text
    result = aware.quantize_linear(weight, inputs, grid)
    plain = SINQ().quantize_linear(weight, None, grid)

    def output_error(quantized: ColumnScaled) -> float:
        return float(((weight - quantized.dequantize()) @ x.T).abs().mean())

    assert output_error(result) == pytest.approx(result.notes["output_l1"], rel=1e-5)
    assert output_error(result) < 0.9 * output_error(plain) and result.notes["exponent"] > 0


def test_activation_aware_weights() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 2.0]])  # mean |W| = 2, 2
    emphasis = column_weights(torch.tensor([4.0, 1.0]), weight, 0.5)
    torch.testing.assert_close(emphasis, torch.tensor([2**0.5, 0.5**0.5]))  # sqrt(4 / 2), sqrt(1 / 2), normalised
    dead = column_weights(torch.tensor([4.0, 0.0, 1.0]), torch.ones(2, 3), 0.5)
    assert dead[1] == dead[2] and torch.isfinite(column_weights(torch.zeros(3), torch.zeros(2, 3), 0.5)).all()
    broken = InputStatistics(tokens=1, sample=torch.full((2, 16), torch.inf), mean_abs=torch.ones(16))
    with pytest.raises(NonFinite, match="calibration"):
        SINQ(activation_aware=True).quantize_linear(gaussian(2, 16), broken, Grid(bits=4, group_size=16))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 19),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_storage(rows: int, groups: int, size: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    columns = groups * size
    grid = Grid(bits=bits, group_size=size, symmetric=symmetric, scale_dtype=dtype)
    result = SINQ().quantize_linear(gaussian(rows, columns, seed=rows * 100 + size), None, grid)
    tensors = result.packed()
    assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    codes = unpack_bits(tensors["weight_packed"], bits, columns).float().reshape(rows, groups, size)
    scale = tensors["weight_scale"].float()[..., None]
    zero = tensors["weight_zero_point"].float()[..., None] if not symmetric else 2.0 ** (bits - 1)
    values = ((codes - zero) * scale).reshape(rows, columns) * tensors["weight_column_scale"].float()
    assert torch.equal(values, result.dequantize())
    part = result.row_range(rows // 2, rows)
    assert torch.equal(part.dequantize(), values[rows // 2 :])


def test_bits_per_weight() -> None:
    result = SINQ().quantize_linear(gaussian(512, 128), None, Grid(bits=4, group_size=64))
    assert 8 * result.stored_bytes() / (512 * 128) == pytest.approx(4 + 32 / 64 + 16 / 512)
    small = SINQ().quantize_linear(gaussian(512, 128), None, Grid(bits=4, group_size=64, symmetric=True))
    assert 8 * small.stored_bytes() / (512 * 128) == pytest.approx(4 + 16 / 64 + 16 / 512)


def test_codes_are_nearest_for_what_is_stored() -> None:
    weight = lognormal_columns(16, 64, seed=20)[0]
    result = SINQ().quantize_linear(weight, None, Grid(bits=8, group_size=16))
    assert isinstance(result.base, UniformWeight)
    step = result.base.scale.float().repeat_interleave(16, dim=1) * result.factor.float()
    inside = (result.base.codes > 0) & (result.base.codes < 255)
    assert ((weight - result.dequantize()).abs() <= step * 0.501)[inside].all()


def test_monotone_in_bits() -> None:
    weight = lognormal_columns(64, 128, seed=21)[0]
    errors = [relative_error(weight, quantize(weight, bits).dequantize()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_refusals_and_broken_weights() -> None:
    assert "at least 16" in str(SINQ().refusal(8, False))
    assert SINQ().refusal(-1, True) is None and SINQ().refusal(16, False) is None
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        SINQ(iterations=-1)
    broken = gaussian(2, 16)
    broken[0, 3] = float("inf")
    with pytest.raises(NonFinite, match="NaN or Inf"):
        quantize(broken, 4, 16)


@pytest.mark.parametrize("aware", [False, True])
def test_neither_a_repeat_nor_the_number_of_threads_changes_a_bit(aware: bool) -> None:
    weight, inputs = lognormal_columns(96, 512, seed=22)[0], activations(512, 23)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append(SINQ(activation_aware=aware).quantize_linear(weight, inputs, Grid(bits=4, group_size=64)))
    packed = [result.packed() for result in results]
    assert all(torch.equal(packed[0][name], other[name]) for other in packed[1:] for name in packed[0])


WINDOWS = torch.randint(0, 256, (4, 32), generator=torch.manual_seed(0))


def quantize_model(model: LoadedModel, solver: SINQ | RTN) -> list[LayerResult]:
    grid, windows = Grid(bits=4, group_size=16), WINDOWS if solver.needs_text else None
    return quantize_weights(model, solver, lambda role: grid, windows, sequential=True, report=lambda done, total: None)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("aware", [False, True], ids=["plain", "aware"])
def test_whole_models(tiny_models: dict[str, Path], family: str, aware: bool) -> None:
    first, second = loaded(tiny_models[family]), loaded(tiny_models[family])
    results = quantize_model(first, SINQ(activation_aware=aware))
    assert [(r.solver, r.bits, r.group_size) for r in results] == [("sinq", 4, 16)] * len(results)
    assert len(results) == 2 * len(first.architecture.roles)
    assert quantize_model(second, SINQ(activation_aware=aware)) == results
    ids = torch.arange(40)[None]
    logits = first.model(ids).logits
    assert torch.isfinite(logits).all() and torch.equal(logits, second.model(ids).logits)
    first.restore()
    nearest = quantize_model(first, RTN())
    ratios = [s.weight_error / r.weight_error for s, r in zip(results, nearest, strict=True)]  # type: ignore[operator]
    assert aware or max(ratios) < 1.5  # weights may lose where outputs gain
