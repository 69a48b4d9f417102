"""HQQ: closed forms of its two steps, what stopping and normalising mean, storage to the byte."""

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
from qfarm.methods.hqq import HQQ, encode, initial, shrink, spread, update
from qfarm.methods.rtn import RTN
from qfarm.models.load import LoadedModel
from qfarm.quantized import UniformWeight, unpack_bits
from qfarm.quantizer import Grid, relative_error
from tests.conftest import TINY
from tests.contract import by_threads
from tests.test_models import loaded

FINE = {"scale_dtype": torch.float32}


def gaussian(rows: int, columns: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed)) * std


def quantize(weight: Tensor, bits: int = 4, group_size: int = 16, **options: Any) -> UniformWeight:
    return HQQ(**options).quantize_linear(weight, None, Grid(bits=bits, group_size=group_size, **FINE))


def error(weight: Tensor, bits: int, group_size: int, **options: Any) -> float:
    return relative_error(weight, quantize(weight, bits, group_size, **options).dequantize())


def test_shrinkage_has_the_stated_threshold() -> None:
    x = torch.tensor([0.169, 0.171, 0.0, 1e-9])
    small, large, zero, tiny = shrink(x, 0.7, 10.0).tolist()
    assert small == zero == tiny == 0 and large > 0
    assert 10.0 ** (-1 / 1.3) == pytest.approx(0.170, abs=5e-4)
    soft = shrink(torch.tensor([0.09, 0.1, 0.3]), 1.0, 10.0)
    torch.testing.assert_close(soft, torch.tensor([0.0, 0.0, 0.2]), atol=1e-7, rtol=0)
    values = torch.linspace(-3, 3, 101)
    assert torch.equal(shrink(-values, 0.7, 10.0), -shrink(values, 0.7, 10.0))


def test_no_iterations_is_rtn_with_a_real_zero() -> None:
    weight = gaussian(4, 32) + 0.01
    result = quantize(weight, bits=3, iterations=0, round_zero=False)
    grouped = weight.reshape(4, 2, 16)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / 7
    codes = torch.clamp(torch.round((grouped - low) / scale), 0, 7)
    torch.testing.assert_close(result.dequantize(), (codes * scale + low).reshape(4, 32), rtol=0, atol=1e-7)
    assert result.notes["iterations"] == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_keeping_the_best_never_loses_to_the_start(bits: int) -> None:
    weight = gaussian(16, 64, seed=1)

    def errors(**options: Any) -> Tensor:
        values = quantize(weight, bits, keep="best", **options).dequantize()
        return (values - weight).abs().reshape(16, 4, 16).mean(-1)

    start, end = errors(iterations=0), errors(iterations=20)
    assert (end <= start + 1e-7).all() and end.mean() < start.mean()


def test_least_squares_falls_in_every_iteration_below_the_threshold() -> None:
    groups, grid, options = gaussian(32, 64).reshape(32, 4, 16), Grid(bits=3, group_size=16, **FINE), HQQ()
    unit = torch.ones(32, 4, 1)
    scale, zero = initial(groups, unit, grid, options)
    losses = []
    for _ in range(12):
        codes = encode(groups, scale, zero, grid.top)
        losses.append(float((groups - (codes - zero) * scale).double().square().sum()))
        zero = update(groups, unit, codes, scale, zero, grid, 0.7, 10.0)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]


def test_the_zero_is_the_minimiser_for_fixed_codes() -> None:
    groups, grid = gaussian(8, 16).reshape(8, 1, 16), Grid(bits=3, group_size=16, **FINE)
    unit = torch.ones(8, 1, 1)
    scale, zero = initial(groups, unit, grid, HQQ())
    codes = encode(groups, scale, zero, grid.top)
    best = update(groups, unit, codes, scale, zero, grid, 0.7, 10.0)

    def loss(z: Tensor) -> Tensor:
        return (groups - (codes - z) * scale).double().square().sum(-1)

    for shift in (-0.05, 0.05):
        assert (loss(best + shift) > loss(best)).all()
    torch.testing.assert_close(best, codes.mean(-1, keepdim=True) - groups.mean(-1, keepdim=True) / scale)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_uniform_spacing_is_exact(bits: int) -> None:
    weight = (torch.arange(2**bits).float() * 0.125 - 0.375).repeat(3, 2)
    result = quantize(weight, bits, 2 ** (bits + 1))
    torch.testing.assert_close(result.dequantize(), weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("round_zero", [True, False, "at_4_bits"])
def test_flat_groups_keep_their_value(round_zero: bool | str) -> None:
    weight = torch.tensor([[0.0] * 16, [0.02] * 16, [-0.7] * 16, [5.0] * 16])
    for iterations in (0, 20):
        values = quantize(weight, round_zero=round_zero, iterations=iterations).dequantize()
        assert torch.equal(values[0], weight[0])
        torch.testing.assert_close(values, weight, rtol=1e-6, atol=0)
    nearly = torch.full((1, 16), 0.02) + torch.linspace(0, 9e-5, 16)
    assert len(quantize(nearly).dequantize().unique()) == 1  # the reference's jump: collapses up to 1e-4 ...
    wider = torch.full((1, 16), 0.02) + torch.linspace(0, 1.2e-4, 16)
    assert len(quantize(wider).dequantize().unique()) > 1  # ... and not above


def test_initial_zeros_are_rounded_at_four_bits_only() -> None:
    """What the default means is spelled out in the identity, and depends on nothing but the layer's width."""
    assert HQQ().resolve(64).identity()["round_zero"] == "at_4_bits"
    groups = (gaussian(4, 32, seed=13) + 0.01).reshape(4, 2, 16)
    for bits in (3, 4, 5):
        _, zero = initial(groups, torch.ones(4, 2, 1), Grid(bits=bits, group_size=16, **FINE), HQQ())
        assert torch.equal(zero, zero.round()) == (bits == 4)
    weight = groups.reshape(4, 32)
    for bits in (3, 4):
        default, same, other = (
            quantize(weight, bits, iterations=0, round_zero=flag).dequantize()
            for flag in ("at_4_bits", bits == 4, bits != 4)
        )
        assert torch.equal(default, same) and not torch.equal(default, other)
    with pytest.raises(ValueError, match="at_4_bits"):
        HQQ(round_zero=None)  # type: ignore[arg-type]


def test_gain_on_gaussian_weights() -> None:
    """Relative squared error of min/max and of HQQ for groups of 64; figures of an independent simulation."""
    weight = gaussian(1000, 1024, seed=3)
    for bits, start, end in ((4, 0.00808, 0.00761), (3, 0.0372, 0.0344), (2, 0.203, 0.187)):
        assert error(weight, bits, 64, iterations=0, round_zero=False) == pytest.approx(start, rel=0.03)
        assert error(weight, bits, 64) == pytest.approx(end, rel=0.03)


def test_scale_equivariance() -> None:
    weight = gaussian(16, 64, seed=4)

    def changed(factor: float, std: float, normalize: bool) -> float:
        """Share of codes that differ; float32 rounding may flip one now and then, another solution changes many."""
        codes = [quantize(weight / 0.02 * std * by, 3, normalize=normalize).codes for by in (1.0, factor)]
        return float((codes[0] != codes[1]).float().mean())

    assert all(changed(factor, 0.02, True) < 0.002 for factor in (2.0, 0.37, 1000.0))
    assert changed(2.0, 0.02, False) == 0
    assert changed(2.0, 1.0, False) > 0.02
    scaled, plain = (quantize(weight * by, 3, normalize=True).dequantize() for by in (2.0**10, 1.0))
    assert torch.equal(scaled, plain * 2**10)


def test_normalising_counts_errors_in_standard_deviations() -> None:
    groups = torch.stack([gaussian(1, 64, seed=5)[0], torch.zeros(64)]).reshape(2, 1, 64)
    deviation = spread(groups)
    assert float(deviation[0]) == pytest.approx(0.02, rel=0.3) and float(deviation[1]) == 1
    weight = gaussian(64, 64, seed=6)
    assert not torch.equal(quantize(weight, 2, normalize=True).codes, quantize(weight, 2).codes)


def test_monotone_in_bits_and_group_size() -> None:
    weight = gaussian(64, 128, seed=7)
    by_bits = [error(weight, bits, 32) for bits in range(1, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [error(weight, 3, group_size) for group_size in (8, 16, 32, 64, 128, -1)]
    assert by_group[:5] == sorted(by_group[:5]) and by_group[4] == by_group[5]


def test_the_stop_is_global_unless_the_best_is_kept() -> None:
    """Why layers are not stacked: rows influence each other through the stop test, and only through it."""
    weight, other = gaussian(8, 64, seed=8), gaussian(8, 64, seed=9, std=3.0)
    assert not HQQ.stackable
    options: dict[str, Any] = {"bits": 2, "keep": "best"}
    stacked = quantize(torch.cat([weight, other]), **options).row_range(0, 8)
    alone = quantize(weight, **options)
    assert torch.equal(stacked.codes, alone.codes) and torch.equal(stacked.dequantize(), alone.dequantize())
    legacy = quantize(torch.cat([weight, other]), 2)
    assert legacy.notes["iterations"] != quantize(weight, 2).notes["iterations"]


def test_the_last_zero_stays() -> None:
    """The reference stops after the first rise and ships the zero of that very iteration."""
    weight = gaussian(16, 64, seed=10, std=1.0)  # above the threshold of shrinkage, where the error does rise
    result = quantize(weight, 3)
    stop = result.notes["iterations"]
    assert 2 <= stop < 20
    longer, shorter = (quantize(weight, 3, iterations=count) for count in (stop, stop - 1))
    assert torch.equal(longer.dequantize(), result.dequantize())
    assert not torch.equal(shorter.dequantize(), result.dequantize())


def test_penalty_may_grow() -> None:
    weight = gaussian(8, 64, seed=11, std=1.0)
    assert not torch.equal(quantize(weight, 2, kappa=1.5).dequantize(), quantize(weight, 2).dequantize())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 19),
    bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_storage(rows: int, groups: int, size: int, bits: int, dtype: torch.dtype) -> None:
    weight = gaussian(rows, groups * size, seed=rows * 100 + size)
    result = HQQ().quantize_linear(weight, None, Grid(bits=bits, group_size=size, scale_dtype=dtype))
    tensors = result.packed()
    assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    codes = unpack_bits(tensors["weight_packed"], bits, groups * size).float().reshape(rows, groups, size)
    scale, zero = (tensors[name].float()[..., None] for name in ("weight_scale", "weight_zero_point"))
    assert torch.equal(((codes - zero) * scale).reshape(rows, -1), result.dequantize())
    assert tensors["weight_scale"].dtype == tensors["weight_zero_point"].dtype == dtype


def test_threads_do_not_change_the_result() -> None:
    """Bit for bit, also where the error that stops the loop is a mean over the whole matrix."""
    one, two = by_threads(lambda: quantize(gaussian(333, 770, seed=14, std=1.0), 3, 77).dequantize(), 1, 2)
    assert torch.equal(one, two)


def test_four_and_a_quarter_bits() -> None:
    result = HQQ().quantize_linear(gaussian(32, 256), None, Grid(bits=4, group_size=128))
    assert 8 * result.stored_bytes() / (32 * 256) == 4.25


def test_codes_are_nearest_for_the_stored_zero() -> None:
    """No other code is closer once scale and zero have been rounded to float16."""
    weight = gaussian(8, 64, seed=12)
    result = HQQ().quantize_linear(weight, None, Grid(bits=3, group_size=16))
    scale = result.scale.float().repeat_interleave(16, dim=1)
    inside = (result.codes > 0) & (result.codes < 7)
    assert ((weight - result.dequantize()).abs() <= scale * 0.5001)[inside].all()


def test_refusals_and_broken_weights() -> None:
    assert "symmetric: false" in str(HQQ().refusal(64, True)) and HQQ().refusal(64, False) is None
    for options in ({"lp_norm": 0.0}, {"lp_norm": 1.1}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": -1}):
        with pytest.raises(ValueError, match="greater than|less than"):
            HQQ(**options)
    broken = gaussian(2, 16)
    broken[0, 3] = float("nan")
    with pytest.raises(NonFinite, match="NaN"):
        quantize(broken)
    far = torch.full((1, 16), 1e5) + torch.linspace(0, 1, 16)
    with pytest.raises(NonFinite, match="scale_dtype: float32"):
        HQQ().quantize_linear(far, None, Grid(bits=4, group_size=16))


def quantize_model(model: LoadedModel, solver: HQQ | RTN, bits: int = 3) -> list[LayerResult]:
    grid = Grid(bits=bits, group_size=16)
    return quantize_weights(model, solver, lambda role: grid, None, sequential=True, report=lambda done, total: None)


@pytest.mark.parametrize("family", TINY)
def test_whole_models(tiny_models: dict[str, Path], family: str) -> None:
    first, second = loaded(tiny_models[family]), loaded(tiny_models[family])
    results = quantize_model(first, HQQ())
    assert [(r.solver, r.bits, r.group_size) for r in results] == [("hqq", 3, 16)] * len(results)
    assert len(results) == 2 * len(first.architecture.roles)
    assert quantize_model(second, HQQ()) == results
    ids = torch.arange(40)[None]
    logits = first.model(ids).logits
    assert torch.isfinite(logits).all() and torch.equal(logits, second.model(ids).logits)
    first.restore()
    nearest = quantize_model(first, RTN())
    better = [h.weight_error < r.weight_error for h, r in zip(results, nearest, strict=True)]  # type: ignore[operator]
    assert all(better)
