"""The walk over blocks: what statistics see, what is shared, what stays untouched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.install import install_sites
from qfarm.layers.linear import QuantLinear
from qfarm.layers.rtn import Symmetric
from qfarm.methods.gptq import GPTQ
from qfarm.methods.rtn import RTN
from qfarm.models.load import LoadedModel
from qfarm.quantized import LowRank, QuantizedWeight
from qfarm.quantizer import Grid
from qfarm.recipe import Recipe, WeightSolver, Wrapper
from qfarm.scheme import parse_scheme
from qfarm.walk import Walk
from tests.conftest import TINY
from tests.test_models import loaded

WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))


def quantize(model: LoadedModel, solver: WeightSolver, bits: int = 4, **options: Any) -> list[LayerResult]:
    grid = Grid(bits=bits, group_size=options.pop("group_size", 16))
    options = {"windows": WINDOWS, "sequential": True, "report": lambda done, total: None} | options
    return quantize_weights(model, solver, options.pop("grid_of", lambda role: grid), **options)


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}


@pytest.mark.parametrize("family", TINY)
def test_every_linear_is_quantized_and_nothing_else(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    before = weights(model)
    results = quantize(model, GPTQ())
    assert len(results) == 2 * len(model.architecture.roles) and all(r.solver == "gptq" for r in results)
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{result.module}.weight" for result in results}


@pytest.mark.parametrize("solver", [RTN(), GPTQ(), GPTQ(sequential=True)])
@pytest.mark.parametrize("sequential", [True, False])
def test_same_inputs_same_bits(tiny: Path, solver: WeightSolver, sequential: bool) -> None:
    first, second = loaded(tiny), loaded(tiny)
    a, b = (quantize(model, solver, sequential=sequential) for model in (first, second))
    assert a == b
    assert all(torch.equal(x, y) for x, y in zip(weights(first).values(), weights(second).values(), strict=True))
    # And again on a model that has been used and restored.
    first.restore()
    assert quantize(first, solver, sequential=sequential) == a


class Recorder(RTN):
    """RTN that keeps the statistics it is given."""

    seen: list[Any] = []

    def statistics(self) -> Any:
        return GPTQ().statistics()

    def quantize_linear(self, weight: Tensor, inputs: Any, grid: Grid) -> Any:
        Recorder.seen.append(inputs)
        return super().quantize_linear(weight, inputs, grid)


def second_moments(model: LoadedModel, run: LoadedModel) -> list[Tensor]:
    """Plain hooks: second moments of each input group of `model` when `run` computes (they may be one model)."""
    sums: dict[tuple[int, str], Tensor] = {}

    def hook(key: tuple[int, str]) -> Any:
        def add(_: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            sums[key] = sums.get(key, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x / WINDOWS.numel()

        return add

    handles = [
        model.linears(i)[group[0]].register_forward_pre_hook(hook((i, group[0])))
        for i in range(len(model.blocks))
        for group in model.architecture.shared_inputs
    ]
    run.body(WINDOWS)
    for handle in handles:
        handle.remove()
    return list(sums.values())


@pytest.fixture
def recorder() -> Recorder:
    Recorder.seen = []
    return Recorder()


def test_independent_statistics_are_the_original_models(tiny: Path, recorder: Recorder) -> None:
    model = loaded(tiny)
    expected = second_moments(model, model)
    quantize(model, recorder, bits=2, sequential=False)
    assert len(recorder.seen) == len(expected) == 8
    for inputs, hessian in zip(recorder.seen, expected, strict=True):
        torch.testing.assert_close(inputs.hessian, hessian, rtol=1e-4, atol=1e-5)


def test_sequential_statistics_see_the_quantized_prefix(tiny: Path, recorder: Recorder) -> None:
    model, original = loaded(tiny), loaded(tiny)
    first = second_moments(original, original)
    quantize(model, recorder, bits=2)
    # Block 0 reads embeddings; block 1 reads what the quantized block 0 makes of them, in an unquantized block 1.
    for linear, source in zip(model.linears(1).values(), original.linears(1).values(), strict=True):
        linear.weight = source.weight
    expected = first[:4] + second_moments(model, model)[4:]
    for inputs, hessian in zip(recorder.seen, expected, strict=True):
        torch.testing.assert_close(inputs.hessian, hessian, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[4], first[4], rtol=1e-3)


def test_true_sequential_sees_quantized_layers_of_its_own_block(tiny: Path) -> None:
    class TrueSequential(Recorder):
        true_sequential = True  # type: ignore[assignment]

    Recorder.seen = []
    model = loaded(tiny)
    quantize(model, TrueSequential(), bits=2)
    # In the last block `down` is the only group whose own layer cannot matter to its input.
    expected = second_moments(model, model)
    torch.testing.assert_close(Recorder.seen[-1].hessian, expected[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Recorder.seen[5].hessian, expected[5], rtol=1e-4, atol=1e-5)


def test_statistics_of_shared_inputs_are_computed_once(tiny: Path, recorder: Recorder) -> None:
    quantize(loaded(tiny), recorder)
    assert len(recorder.seen) == 2 * 4  # q/k/v and gate/up are stacked


def test_forward_passes(tiny: Path) -> None:
    """Independent: one pass per block. Sequential: statistics and propagation, except after the last block.

    The first block is entered once more, to learn what it is fed.
    """
    for sequential, passes in ((False, 3), (True, 4)):
        model = loaded(tiny)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for block in model.blocks:
            block.register_forward_pre_hook(count)
        quantize(model, GPTQ(), sequential=sequential)
        assert calls == passes  # all six windows fit one batch


def test_mixed_widths_and_untouched_layers(tiny: Path) -> None:
    model = loaded(tiny)
    before = weights(model)

    def grid_of(role: str) -> Grid | None:
        return {"v": None, "q": Grid(bits=8), "k": Grid(bits=8)}.get(role, Grid(bits=3))

    results = quantize(model, GPTQ(), grid_of=grid_of)
    by_role = {result.role: result for result in results if result.layer == 0}
    assert (by_role["q"].bits, by_role["o"].bits, by_role["v"].bits) == (8, 3, None)
    assert by_role["v"].solver is None and "16 bits" in str(by_role["v"].reason)
    assert torch.equal(model.linears(0)["v"].weight, before["model.layers.0.self_attn.v_proj.weight"])
    assert by_role["v"].stored_bytes == 32 * 64 * 4


def test_stacked_layers_equal_single_ones(tiny: Path) -> None:
    """Rows are independent: solving q, k and v as one matrix changes none of them."""
    stacked = {(r.layer, r.role): r for r in quantize(loaded(tiny), GPTQ(), sequential=False)}
    apart = loaded(tiny)
    grids = {role: Grid(bits=4, group_size=16) for role in apart.architecture.roles}
    # Unequal but equivalent grids keep the layers apart.
    grids |= {"k": dataclasses.replace(grids["k"], convention="deepspeed")}
    grids |= {"v": dataclasses.replace(grids["v"], convention="full_range_offset")}
    single = {(r.layer, r.role): r for r in quantize(apart, GPTQ(), sequential=False, grid_of=lambda role: grids[role])}
    for key, result in stacked.items():
        assert single[key].weight_error == pytest.approx(result.weight_error, rel=1e-5)


def test_gptq_beats_rtn_on_the_outputs(tiny: Path) -> None:
    errors = []
    for solver in (GPTQ(), Recorder()):
        results = quantize(loaded(tiny), solver, bits=3, sequential=False)
        errors.append([result.output_error for result in results])
    assert sum(g < r for g, r in zip(*errors, strict=True)) >= 12  # of 14


def test_a_pass_without_outputs_ends_at_its_last_input(tiny: Path) -> None:
    model = loaded(tiny)
    walk = Walk(model, WINDOWS)
    linears = model.linears(0)
    groups = {group: linears[group[0]] for group in model.architecture.shared_inputs}
    ran = []
    linears["down"].register_forward_hook(lambda *_: ran.append("down"))
    first = walk.collect(0, groups, frozenset({Statistic.HESSIAN}), keep_outputs=False)
    assert ran == []
    again = walk.collect(0, groups, frozenset({Statistic.HESSIAN}), keep_outputs=True)
    assert len(ran) == len(walk.hidden)
    for group in groups:
        a, b = first[group].hessian, again[group].hessian
        assert a is not None and b is not None and torch.equal(a, b)
        assert first[group].tokens == WINDOWS.numel()


# -- branches ---------------------------------------------------------------------------------------------------------


class Term(Wrapper):
    """The best rank-4 approximation of what is left, as a branch or merged."""

    def __init__(self, branch: bool) -> None:
        self.branch = branch

    def wrap(self, weight: Tensor, quantized: QuantizedWeight, inputs: InputStatistics | None) -> QuantizedWeight:
        u, s, v = torch.linalg.svd(weight - quantized.dequantize(), full_matrices=False)
        return LowRank(base=quantized, left=u[:, :4] * s[:4], right=v[:4], branch=self.branch, solver="term")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_branch_sees_inputs_before_their_quantizer(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    before, x = weights(model), torch.randn(3, 5, 64, generator=torch.manual_seed(1))
    results = quantize(model, RTN(), bits=3, wrappers=[Term(branch=True)], windows=None)
    bare = quantize(loaded(tiny_models[family]), RTN(), bits=3, windows=None)
    # Errors and sizes are those of the whole: what is stored is the same as with a merged term.
    merged_model = loaded(tiny_models[family])
    merged = quantize(merged_model, RTN(), bits=3, wrappers=[Term(branch=False)], windows=None)
    assert results == merged and results[0].weight_error < 0.95 * bare[0].weight_error  # type: ignore[operator]
    linear, together = model.linears(0)["q"], merged_model.linears(0)["q"]
    assert isinstance(linear, QuantLinear) and linear.branch is not None
    assert type(together) is torch.nn.Linear
    torch.testing.assert_close(linear(x), together(x))
    install_sites(model, Recipe(), parse_scheme("w3a4"), {})
    linear = model.linears(0)["q"]
    assert isinstance(linear, QuantLinear) and linear.branch is not None
    rest = together.weight - linear.branch.left @ linear.branch.right
    torch.testing.assert_close(linear.weight, rest)
    expected = torch.nn.functional.linear(Symmetric(bits=4)(x), rest, linear.bias) + linear.branch(x)
    torch.testing.assert_close(linear(x), expected)
    model.restore()
    assert type(model.linears(0)["q"]) is torch.nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_later_blocks_see_the_branch(tiny: Path) -> None:
    """Sequential statistics of the second block are the same whether the term is merged or apart."""
    found = []
    for branch in (True, False):
        model = loaded(tiny)
        found.append(quantize(model, GPTQ(), bits=3, wrappers=[Term(branch=branch)]))
    for one, other in zip(*found, strict=True):
        assert one.output_error == pytest.approx(other.output_error, rel=1e-3)
