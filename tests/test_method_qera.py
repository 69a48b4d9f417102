"""QERA's closed form: optimality, equality of routes, ordering of modes, and the layers it makes."""

from __future__ import annotations

import dataclasses
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
from qfarm.inputs import Collector, InputStatistics, Statistic
from qfarm.methods.gptq import GPTQ
from qfarm.methods.qera import QERA, lqer_scale, reconstruct, weighted_norm
from qfarm.methods.rtn import RTN
from qfarm.models.load import LoadedModel
from qfarm.quantized import LowRank, QuantizedWeight, unpack_bits
from qfarm.quantizer import Grid
from qfarm.recipe import BlockSolver, WeightSolver, build_method, lookup, method_names, parse_recipe
from tests.conftest import TINY
from tests.contract import threads
from tests.test_models import loaded

WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))
EXACT = {"term_dtype": "float32"}
SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(rows: int, columns: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight error and a second moment of correlated inputs, float64."""
    generator = torch.manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x / tokens


def term(error: Tensor, moment: Tensor, rank: int, **options: Any) -> Tensor:
    left, right = reconstruct(error, moment, rank, **options)
    assert left.shape == (len(error), rank) and right.shape == (rank, error.shape[1])
    return left @ right


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_loss_is_the_tail_of_the_spectrum_and_no_neighbour_is_better(rows: int, columns: int, rank: int) -> None:
    error, moment = problem(rows, columns)
    left, right = reconstruct(error, moment, rank)
    best = weighted_norm(error - left @ right, moment)
    tail = torch.linalg.svdvals(error @ root(moment))[rank:].square().sum()
    assert best == pytest.approx(float(tail), rel=1e-10)
    generator = torch.manual_seed(1)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            moved = [t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (left, right)]
            assert weighted_norm(error - moved[0] @ moved[1], moment) >= best


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_square_root_cholesky_and_eigenvectors_give_the_same_term(rows: int, columns: int) -> None:
    error, moment = problem(rows, columns, seed=2)
    ours = term(error, moment, 4)
    for factor in (root(moment), torch.linalg.cholesky(moment).T):  # S^T S = R
        scaled = truncated(factor @ error.T, 4)
        torch.testing.assert_close(ours, torch.linalg.solve(factor, scaled).T, rtol=1e-8, atol=1e-9)


def test_by_hand() -> None:
    """Errors 3 and 2 in two channels: the second one is fed twice the amplitude, so it is the one to repair."""
    error = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).double()
    second, first = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(term(error, torch.tensor([1.0, 4.0]).double(), 1), second.double())
    torch.testing.assert_close(term(error, torch.diag(torch.tensor([1.0, 4.0])).double(), 1), second.double())
    torch.testing.assert_close(term(error, torch.ones(2).double(), 1), first.double())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_identity_is_the_truncated_svd_and_diagonals_agree(rows: int, columns: int) -> None:
    error, _ = problem(rows, columns, seed=3)
    torch.testing.assert_close(term(error, torch.eye(columns).double(), 3), truncated(error, 3))
    torch.testing.assert_close(term(error, torch.ones(columns).double(), 3), truncated(error, 3))
    diagonal = torch.rand(columns, generator=torch.manual_seed(4)).double() + 0.1
    torch.testing.assert_close(term(error, torch.diag(diagonal), 3), term(error, diagonal, 3))


@pytest.mark.parametrize("seed", range(5))
def test_each_mode_is_best_in_its_own_norm(seed: int) -> None:
    error, moment = problem(24, 32, seed=10 + seed)
    mean_abs = moment.diagonal().sqrt() * 0.8
    kinds = {"exact": moment, "approx": moment.diagonal(), "lqer": lqer_scale(mean_abs).square()}
    terms = {name: term(error, found, 6) for name, found in kinds.items()}
    terms["identity"] = term(error, torch.ones(32).double(), 6)
    outputs = {name: weighted_norm(error - found, moment) for name, found in terms.items()}
    weights = {name: float((error - found).square().sum()) for name, found in terms.items()}
    assert all(outputs["exact"] < value for name, value in outputs.items() if name != "exact")
    assert all(weights["identity"] < value for name, value in weights.items() if name != "identity")


def test_approx_is_no_better_than_plain_svd_when_channels_of_equal_size_are_correlated() -> None:
    error, _ = problem(16, 24, seed=20)
    direction = torch.randn(24, generator=torch.manual_seed(21)).double().sign()
    moment = 0.1 * torch.eye(24).double() + 0.9 * torch.outer(direction, direction)  # unit diagonal
    plain = weighted_norm(error - term(error, torch.ones(24).double(), 2), moment)
    approx = weighted_norm(error - term(error, moment.diagonal(), 2), moment)
    exact = weighted_norm(error - term(error, moment, 2), moment)
    assert approx == pytest.approx(plain, rel=1e-9) and exact < 0.5 * plain


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_loss_falls_with_the_rank_to_zero(rows: int, columns: int) -> None:
    error, moment = problem(rows, columns, seed=30)
    losses = [weighted_norm(error - term(error, moment, k), moment) for k in range(1, min(rows, columns) + 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-12 * weighted_norm(error, moment)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_moments_are_optimal_on_their_range(rows: int, columns: int) -> None:
    error, _ = problem(rows, columns, seed=40)
    x = torch.randn(6, columns, generator=torch.manual_seed(41)).double()
    x[:, 3] = 0  # dead
    x[:, 5] = x[:, 4]  # duplicated
    moment = x.T @ x
    found = term(error, moment, 2)
    tail = torch.linalg.svdvals(error @ x.T)[2:].square().sum()
    assert torch.isfinite(found).all()
    assert weighted_norm(error - found, moment) == pytest.approx(float(tail), rel=1e-9)
    full = term(error, moment, 6)  # the rank of the moment
    assert weighted_norm(error - full, moment) < 1e-18 * weighted_norm(error, moment) * columns**2 + 1e-20
    assert torch.isfinite(term(error, torch.zeros_like(moment), 2)).all()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_invariances(rows: int, columns: int) -> None:
    error, moment = problem(rows, columns, seed=50)
    found = term(error, moment, 3)
    torch.testing.assert_close(term(error, 1e4 * moment, 3), found, rtol=1e-7, atol=1e-8)
    rotation = torch.linalg.qr(torch.randn(rows, rows, generator=torch.manual_seed(51)).double()).Q
    torch.testing.assert_close(term(rotation @ error, moment, 3), rotation @ found, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("rows", "columns"), [(96, 128), (128, 96)])
def test_sketch_is_nearly_optimal(rows: int, columns: int) -> None:
    error, moment = problem(rows, columns, seed=60)
    full = weighted_norm(error, moment)
    exact, sketched = (weighted_norm(error - term(error, moment, 16, sketch=s), moment) for s in (False, True))
    assert exact < sketched or sketched == pytest.approx(exact, rel=1e-6)
    assert (full - sketched) > 0.99 * (full - exact)


def layer(rows: int = 24, columns: int = 32, seed: int = 70) -> tuple[Tensor, InputStatistics]:
    _, moment = problem(rows, columns, seed)
    found = InputStatistics(tokens=400, hessian=moment.float(), normalised_hessian=moment.diagonal().diag().float())
    found.mean_abs = moment.diagonal().sqrt().float()
    return torch.randn(rows, columns, generator=torch.manual_seed(seed + 1)), found


@pytest.mark.parametrize("mode", ["exact", "approx", "lqer", "identity"])
def test_modes_of_the_layer_and_their_notes(mode: str) -> None:
    weight, inputs = layer()
    base = Grid(bits=3).quantize(weight)
    method = QERA(mode=mode, rank=4, **EXACT)  # type: ignore[arg-type]
    made = method.wrap(weight, base, inputs if method.needs_text else None)
    assert isinstance(made, LowRank) and made.solver == "rtn+qera" and made.notes["rank"] == 4
    assert inputs.hessian is not None and inputs.mean_abs is not None
    error, moment = (weight - base.dequantize()).double(), inputs.hessian.double()
    expected = {
        "exact": moment,
        "approx": moment.diagonal(),
        "lqer": (inputs.mean_abs / (inputs.mean_abs.min() * inputs.mean_abs.max()).sqrt()).double().square(),
        "identity": torch.ones(32).double(),
    }[mode]
    torch.testing.assert_close((made.left @ made.right).double(), term(error, expected, 4), rtol=1e-4, atol=1e-5)
    left = weighted_norm(error - term(error, expected, 4), expected) / weighted_norm(error, expected)
    assert made.notes["repaired"] == pytest.approx(1 - left, abs=1e-4)


def test_token_norm_reads_the_other_moment() -> None:
    weight, inputs = layer()
    base = Grid(bits=3).quantize(weight)
    assert inputs.normalised_hessian is not None
    swapped = dataclasses.replace(inputs, hessian=inputs.normalised_hessian)
    made = QERA(rank=4, token_norm=True).wrap(weight, base, inputs).dequantize()
    assert torch.equal(made, QERA(rank=4).wrap(weight, base, swapped).dequantize())
    assert not torch.allclose(made, QERA(rank=4).wrap(weight, base, inputs).dequantize(), atol=1e-3)


def test_full_rank_leaves_no_error_and_the_cut_is_noted() -> None:
    weight, inputs = layer(rows=8)
    made = QERA(**EXACT).wrap(weight, Grid(bits=3).quantize(weight), inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(made.dequantize(), weight)
    assert made.notes["rank"] == 8 and "rank 64 cut to 8" in made.notes["reason"]


def test_rank_follows_bits_or_the_price() -> None:
    assert [QERA().affordable(4096, 4096, bits) for bits in (2, 3, 4, 8)] == [64, 64, 32, 32]
    assert QERA(rank=5).affordable(4096, 4096, 4) == 5
    # Spec section 4: rank 32 costs 0.25 bits per weight at 4096 x 4096 and 0.625 at 1024 x 4096.
    assert QERA(extra_bits=0.25).affordable(4096, 4096, 4) == 32
    assert QERA(extra_bits=0.625).affordable(1024, 4096, 4) == 32
    assert QERA(extra_bits=0.255).affordable(4096, 4096, 4) == 32  # never above the price
    assert QERA(extra_bits=0.25, term_dtype="float32").affordable(4096, 4096, 4) == 16
    weight, inputs = layer()
    base = Grid(bits=4).quantize(weight)
    poor = QERA(extra_bits=0.01).wrap(weight, base, inputs)
    assert poor is base and "no rank" in poor.notes["reason"]


BASES = [
    name
    for name in method_names()
    if issubclass(lookup(name), WeightSolver)
    and not issubclass(lookup(name), BlockSolver)
    and name != "svdquant"  # which refuses a second branch
]


@pytest.mark.parametrize("mode", ["exact", "approx", "lqer", "identity"])
@pytest.mark.parametrize("base", BASES)
def test_on_top_of_every_layer_solver(base: str, mode: str) -> None:
    """Whatever the base stores stays, bytes add up exactly, and its own norm of the error falls to the optimum."""
    solver = parse_recipe(base).solver
    assert solver is not None
    generator = torch.manual_seed(90)
    weight = torch.randn(48, 64, generator=generator)
    collector = Collector(frozenset(Statistic), tokens=256)
    collector.add(torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    inputs = dataclasses.replace(collector.result(), roles=(("q", 48),))
    quantized = solver.resolve(32).quantize_linear(weight, inputs, Grid(bits=3, group_size=32))
    notes = dict(quantized.notes)
    method = QERA(mode=mode, rank=5)  # type: ignore[arg-type]
    made = method.wrap(weight, quantized, inputs)
    assert isinstance(made, LowRank) and made.solver == f"{quantized.solver}+qera" and quantized.notes == notes
    assert made.stored_bytes() == quantized.stored_bytes() + 2 * 5 * (48 + 64)
    packed = made.packed()
    assert made.stored_bytes() == sum(t.numel() * t.element_size() for t in packed.values())
    assert all(torch.equal(packed[name], kept) for name, kept in quantized.packed().items())
    product = packed["weight_left"].float() @ packed["weight_right"].float()
    assert torch.equal(made.dequantize(), quantized.dequantize() + product)
    error = (weight - quantized.dequantize()).double()
    moment = method._moment(inputs, error)
    matrix = root(moment) if moment.dim() == 2 else moment.sqrt().diag()
    tail = float(torch.linalg.svdvals(error @ matrix)[5:].square().sum())
    reached = weighted_norm((weight - made.dequantize()).double(), moment)
    assert reached == pytest.approx(tail, rel=1e-3) and tail < weighted_norm(error, moment)
    assert made.notes["ordinary_error_with_term"] == inputs.ordinary_error(weight, made.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 3),
    bits=st.integers(2, 8),
    rank=st.integers(1, 9),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_stored_bytes(rows: int, groups: int, bits: int, rank: int, symmetric: bool, dtype: Any) -> None:
    columns = 8 * groups
    weight, inputs = layer(rows, columns, seed=rows)
    base = Grid(bits=bits, group_size=8, symmetric=symmetric).quantize(weight)
    made = QERA(rank=rank, term_dtype=dtype).wrap(weight, base, inputs)
    packed = made.packed()
    assert made.stored_bytes() == sum(t.numel() * t.element_size() for t in packed.values())
    element = 4 if dtype == "float32" else 2
    assert made.stored_bytes() - base.stored_bytes() == element * min(rank, rows, columns) * (rows + columns)
    # What is evaluated follows from what is packed, to the bit.
    assert torch.equal(unpack_bits(packed["weight_packed"], bits, columns), base.codes)
    rebuilt = base.dequantize() + packed["weight_left"].float() @ packed["weight_right"].float()
    assert torch.equal(rebuilt, made.dequantize())


def test_a_term_on_top_of_a_term_is_stored_beside_it() -> None:
    weight, inputs = layer()
    inner = QERA(rank=3).wrap(weight, Grid(bits=3).quantize(weight), inputs)
    outer = QERA(rank=2).wrap(weight, inner, inputs)
    packed = outer.packed()
    assert outer.stored_bytes() == sum(t.numel() * t.element_size() for t in packed.values())
    assert packed["weight_left"].shape == (24, 3) and packed["weight_left_1"].shape == (24, 2)


def test_broken_inputs_are_errors() -> None:
    weight, inputs = layer()
    base = Grid(bits=4).quantize(weight)
    assert inputs.hessian is not None
    broken = dataclasses.replace(inputs, hessian=torch.full_like(inputs.hessian, math.nan))
    with pytest.raises(NonFinite, match="calibration"):
        QERA().wrap(weight, base, broken)
    with pytest.raises(NonFinite, match="float16"):
        QERA().wrap(weight * 1e7, base, inputs)


@pytest.mark.parametrize("options", [{}, {"mode": "identity"}, {"sketch": True}])
def test_neither_a_repeat_nor_the_number_of_threads_changes_a_bit(options: dict[str, Any]) -> None:
    """Signs and turns of eigenvectors included."""
    weight, inputs = layer(96, 512, seed=80)
    base, results = Grid(bits=3, group_size=64).quantize(weight), []
    for count in (1, 2, 2):
        with threads(count):
            results.append(QERA(rank=16, **options).wrap(weight, base, inputs).packed())
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in results[0])


def test_options() -> None:
    assert "choose one" in str(QERA(rank=4, extra_bits=0.25).refusal(-1, False))
    assert "token_norm needs mode exact" in str(QERA(mode="lqer", token_norm=True).refusal(-1, False))
    assert QERA(token_norm=True).refusal(64, True) is None
    assert QERA().statistics() == QERA(mode="approx").statistics() == {Statistic.HESSIAN}
    assert QERA(token_norm=True).statistics() == {Statistic.NORMALISED_HESSIAN}
    assert QERA(mode="lqer").statistics() == {Statistic.MEAN_ABS}
    assert not QERA(mode="identity").needs_text
    with pytest.raises(InvalidInput, match="rank"):
        build_method("qera", {"rank": 0})
    recipe = parse_recipe("qera+gptq")
    assert recipe.name == "gptq+qera" and recipe.wrappers == (QERA(),) and recipe.solver == GPTQ()
    assert parse_recipe({"qera": {"rank": 8}}).name == "rtn+qera"


def quantize(
    model: LoadedModel, solver: WeightSolver, method: QERA | None, bits: int = 3, sequential: bool = True
) -> list[LayerResult]:
    wrappers = () if method is None else (method,)
    return quantize_weights(
        model,
        solver,
        lambda role: Grid(bits=bits, group_size=16),
        WINDOWS,
        sequential=sequential,
        report=lambda done, total: None,
        wrappers=wrappers,
    )


@pytest.mark.parametrize("family", TINY)
def test_tiny_models(tiny_models: dict[str, Path], family: str) -> None:
    model, again = loaded(tiny_models[family]), loaded(tiny_models[family])
    results = quantize(model, GPTQ(), QERA(rank=6))
    assert results == quantize(again, GPTQ(), QERA(rank=6))
    assert [(r.layer, r.role) for r in results] == [(i, role) for i in range(2) for role in model.linears(i)]
    assert all(r.solver == "gptq+qera" and r.notes["rank"] == 6 and "damping" in r.notes for r in results)
    for index in range(2):
        pairs = zip(model.linears(index).values(), again.linears(index).values(), strict=True)
        assert all(torch.equal(a.weight, b.weight) for a, b in pairs)
    assert torch.isfinite(model.head(model.body(WINDOWS[:1]))).all()


def test_output_errors_of_the_modes_on_a_model(tiny: Path) -> None:
    """Same statistics for all: the term lowers the error of every layer, and exact lowers it more than approx."""

    def errors(solver: WeightSolver, method: QERA | None) -> Tensor:
        results = quantize(loaded(tiny), solver, method, sequential=False)
        return torch.tensor([r.output_error for r in results])

    gptq, exact = errors(GPTQ(), None), errors(GPTQ(), QERA(rank=8))
    assert (exact < gptq).all()
    rtn = {mode: errors(RTN(), QERA(rank=8, mode=mode)) for mode in ("exact", "approx")}  # type: ignore[arg-type]
    assert (rtn["exact"] <= rtn["approx"] * 1.001).all() and rtn["exact"].mean() < rtn["approx"].mean()


def test_layer_computes_the_branch_and_keeps_its_bias(tiny_models: dict[str, Path]) -> None:
    """y = x Q^T + (x right^T) left^T + bias."""
    made: dict[int, QuantizedWeight] = {}

    class Spy(QERA):
        def wrap(self, weight: Tensor, quantized: QuantizedWeight, inputs: InputStatistics | None) -> QuantizedWeight:
            made[len(made)] = super().wrap(weight, quantized, inputs)
            return made[len(made) - 1]

    model = loaded(tiny_models["opt"])
    torch.manual_seed(0)
    for linear in model.linears(0).values():
        torch.nn.init.normal_(linear.bias)
    quantize(model, RTN(), Spy(rank=4))
    x = torch.randn(5, 64)
    linear, found = model.linears(0)["q"], made[0]
    assert isinstance(found, LowRank)
    branch = (x @ found.right.float().T) @ found.left.float().T
    torch.testing.assert_close(linear(x), x @ found.base.dequantize().T + branch + linear.bias)
