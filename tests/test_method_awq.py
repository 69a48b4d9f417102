"""AWQ: the scale search against explicit tokens, the fold against a folded model, clipping by brute force."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics
from qfarm.layers.install import install_sites
from qfarm.layers.linear import with_factors
from qfarm.layers.sites import Place
from qfarm.methods.awq import AWQ, Loss, centred, clamp_groups, floored, gram_loss, group_amax, rounded, search_clip
from qfarm.methods.rtn import RTN
from qfarm.models.load import LoadedModel
from qfarm.quantized import ColumnScaled, QuantizedWeight, UniformWeight, unpack_bits
from qfarm.quantizer import Grid
from qfarm.recipe import Recipe, WeightSolver, build_method, solves_blocks
from qfarm.scheme import parse_scheme
from qfarm.walk import BlockProblem
from tests.conftest import TINY, save_tiny
from tests.contract import require_ties_at_most
from tests.job_example import changed, matrix
from tests.test_models import loaded

FINE = {"scale_dtype": torch.float32}


def gaussian(rows: int, columns: int, seed: int = 0, std: float = 0.05) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed)) * std


def statistics(x: Tensor, foldable: bool = True, **more: Any) -> InputStatistics:
    mean = x.T @ x / len(x)
    return InputStatistics(tokens=len(x), hessian=mean, mean_abs=x.abs().mean(0), foldable=foldable, **more)


def tokens(n: int, seed: int = 1, outlier: int | None = None) -> Tensor:
    x = torch.randn(256, n, generator=torch.manual_seed(seed))
    if outlier is not None:
        x[:, outlier] *= 100
    return x


def quantize(weight: Tensor, inputs: InputStatistics, bits: int = 3, group_size: int = 16, **options: Any) -> Any:
    symmetric = options.pop("symmetric", False)
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric, **FINE)
    return AWQ(**options).quantize_linear(weight, inputs, grid)


def output_error(weight: Tensor, values: Tensor, x: Tensor) -> float:
    return float(((values - weight) @ x.T).square().sum() / len(x))


def scale_of(result: QuantizedWeight) -> Tensor:
    return 1 / result.factor if isinstance(result, ColumnScaled) else torch.ones(result.shape[1])


def test_the_gram_loss_is_the_output_error() -> None:
    weight, x = gaussian(6, 32), tokens(32)
    values = rounded(weight, centred(floored(x.abs().mean(0)) ** 0.3), Grid(bits=3, group_size=8, **FINE))
    hessian = statistics(x).hessian
    assert hessian is not None
    assert gram_loss(weight, values, hessian) == pytest.approx(output_error(weight, values, x), rel=1e-4)


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_best_ratio_by_brute_force(duo: bool, symmetric: bool) -> None:
    """Every candidate's output on explicit tokens, s = a^r written out; the smallest error is the method's."""
    x = tokens(32, outlier=5) * torch.exp(torch.randn(32, generator=torch.manual_seed(3)))
    weight, grid = gaussian(12, 32, seed=2), Grid(bits=3, group_size=16, symmetric=symmetric, **FINE)
    result = quantize(weight, statistics(x), clip=False, duo_scaling=duo, symmetric=symmetric)
    errors = {None if duo else 0.0: output_error(weight, grid.quantize(weight).dequantize(), x)}
    groups = weight.abs().reshape(12, 2, 16)
    size = (groups / groups.amax(-1, keepdim=True)).reshape(12, 32).mean(0)
    for i in range(0 if duo else 1, 20):
        s = x.abs().mean(0) ** (i / 20) / ((size ** (1 - i / 20) + 1e-4) if duo else 1)
        s = s / (s.max() * s.min()).sqrt()
        errors[i / 20] = output_error(weight, grid.quantize(weight * s).dequantize() / s, x)
    best = min(errors, key=lambda ratio: errors[ratio])
    assert result.notes["ratio"] == best
    assert result.notes["loss"] == pytest.approx(errors[best], rel=1e-3)
    assert result.notes["loss_unscaled"] == pytest.approx(errors[None if duo else 0.0], rel=1e-3)
    assert output_error(weight, result.dequantize(), x) == pytest.approx(errors[best], rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", [{}, {"clip": False}, {"duo_scaling": True}])
def test_never_worse_than_rtn_before_clipping(seed: int, options: dict[str, Any]) -> None:
    x, weight = tokens(32, seed), gaussian(8, 32, seed + 50)
    result = quantize(weight, statistics(x), **options)
    nearest = Grid(bits=3, group_size=16, **FINE).quantize(weight).dequantize()
    error = output_error(weight, nearest, x)
    assert result.notes["loss"] <= result.notes["loss_unscaled"] == pytest.approx(error, rel=1e-3)
    if not options.get("clip", True):
        assert output_error(weight, result.dequantize(), x) <= error * (1 + 1e-4)


def test_the_first_candidate_is_no_scaling() -> None:
    inputs, grid = statistics(tokens(32, outlier=3)), Grid(bits=3, group_size=16)
    ratio, scale = AWQ().candidates(gaussian(4, 32), inputs, grid)[0]
    assert ratio == 0 and torch.equal(scale, torch.ones(32))
    all_ratios = [r for r, _ in AWQ().candidates(gaussian(4, 32), inputs, grid)]
    assert all_ratios == [i / 20 for i in range(20)]
    for duo in (False, True):
        for _, scale in AWQ(duo_scaling=duo).candidates(gaussian(4, 32), inputs, grid):
            assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)


def test_equal_activations_give_rtn() -> None:
    x = torch.ones(16, 32) * torch.tensor([1.0, -1.0] * 8)[:, None]
    weight = gaussian(4, 32)
    result = quantize(weight, statistics(x), clip=False)
    assert isinstance(result, UniformWeight) and result.notes["ratio"] == 0
    assert torch.equal(result.codes, Grid(bits=3, group_size=16, **FINE).quantize(weight).codes)


def test_planted_outlier_channel() -> None:
    x, weight = tokens(64, outlier=7), gaussian(16, 64, seed=4)
    result = quantize(weight, statistics(x), clip=False)
    nearest = Grid(bits=3, group_size=16, **FINE).quantize(weight).dequantize()
    assert result.notes["ratio"] > 0 and int(scale_of(result).argmax()) == 7
    assert output_error(weight, result.dequantize(), x) < 0.3 * output_error(weight, nearest, x)


def test_doubling_the_inputs_changes_nothing_but_the_loss() -> None:
    x, weight = tokens(64, outlier=7), gaussian(16, 64, seed=5)
    first, second = (quantize(weight, statistics(x * by)) for by in (1.0, 2.0))
    assert torch.equal(scale_of(first), scale_of(second)) and torch.equal(first.base.codes, second.base.codes)
    assert second.notes["loss"] == pytest.approx(4 * first.notes["loss"], rel=1e-6)


def test_weights_on_the_grid_stay() -> None:
    weight = Grid(bits=4, group_size=16, symmetric=True, **FINE).quantize(gaussian(6, 32, seed=6)).dequantize()
    result = quantize(weight, statistics(tokens(32, outlier=2)), bits=4, symmetric=True)
    assert result.notes["ratio"] == 0 and result.notes["loss"] == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(result.dequantize(), weight, rtol=0, atol=1e-7)


def test_inputs_that_never_fire() -> None:
    activity = floored(torch.tensor([0.0, 2.0, 0.5, 0.0]))
    assert torch.equal(activity, torch.tensor([0.25, 1.0, 0.25, 0.25]))
    assert torch.equal(floored(torch.zeros(3)), torch.ones(3))
    assert float(floored(torch.tensor([1.0, 1e-30])).min()) == pytest.approx(1e-8)
    x = tokens(32, outlier=3)
    x[:, [4, 9]] = 0
    assert torch.isfinite(quantize(gaussian(4, 32), statistics(x)).dequantize()).all()
    # Where nothing is heard no bound beats the untouched range.
    nearest = Grid(bits=3, group_size=16, **FINE).quantize(gaussian(4, 32))
    assert torch.equal(quantize(gaussian(4, 32), statistics(torch.zeros(8, 32))).codes, nearest.codes)


def test_the_weight_is_left_as_it_was() -> None:
    weight = gaussian(8, 32, seed=7)
    before = weight.clone()
    quantize(weight, statistics(tokens(32, outlier=1)))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_by_brute_force(symmetric: bool) -> None:
    """Explicit tokens, one group of one row at a time, as the reference code measures it."""
    x, weight = tokens(16, seed=8), gaussian(5, 16, seed=9)
    weight[2, 3] = 1.0
    grid = Grid(bits=3, group_size=8, symmetric=symmetric, **FINE)
    hessian = statistics(x).hessian
    assert hessian is not None
    found = search_clip(weight, hessian, (), grid, AWQ())
    single = Grid(bits=3, symmetric=symmetric, **FINE)
    for row in range(5):
        for group in range(2):
            w, inputs = weight[row : row + 1, group * 8 : group * 8 + 8], x[:, group * 8 : group * 8 + 8]
            errors = []
            for i in range(10):
                c = float(w.abs().max()) * (1 - i / 20)
                values = single.quantize(w.clamp(-c, c)).dequantize()
                errors.append((float(((values - w) @ inputs.T).square().mean()), i))
            assert float(found[row, group] / w.abs().max()) == pytest.approx(1 - min(errors)[1] / 20, rel=1e-5)


def test_clipping_never_raises_a_groups_own_error() -> None:
    x, weight, grid = tokens(64, seed=10), gaussian(32, 64, seed=11), Grid(bits=2, group_size=16, **FINE)
    hessian = statistics(x).hessian
    assert hessian is not None
    bound = search_clip(weight, hessian, (), grid, AWQ())
    clipped = grid.quantize(clamp_groups(weight, bound)).dequantize() - weight
    plain = grid.quantize(weight).dequantize() - weight

    def errors(delta: Tensor) -> Tensor:
        parts, inputs = delta.reshape(32, 4, 16), x.reshape(-1, 4, 16)
        return torch.einsum("rgi,tgi->rgt", parts, inputs).square().mean(-1)

    assert (errors(clipped) <= errors(plain) * (1 + 1e-4)).all()
    assert errors(clipped).sum() < 0.9 * errors(plain).sum()  # two bits: clipping pays


def test_clipping_sees_scaled_inputs() -> None:
    """After scaling, too, no group's share of the output gets worse by clipping."""
    spread = torch.exp(1.5 * torch.randn(64, generator=torch.manual_seed(20)))
    x, weight = tokens(64, seed=18) * spread, gaussian(32, 64, seed=19)
    clipped, plain = (quantize(weight, statistics(x), 3, clip=clip) for clip in (True, False))
    assert clipped.notes["ratio"] == plain.notes["ratio"] > 0 and clipped.notes["clipped_groups"] > 0.3
    deltas = [(result.dequantize() - weight).reshape(32, 4, 16) for result in (clipped, plain)]
    errors = [torch.einsum("rgi,tgi->rgt", d, x.reshape(-1, 4, 16)).square().mean(-1) for d in deltas]
    assert (errors[0] <= errors[1] * (1 + 1e-3)).all()


def test_only_outliers_that_do_not_matter_are_clipped() -> None:
    weight = gaussian(1, 16, seed=12)
    weight[0, 5] = 20 * 0.05
    grid = Grid(bits=4, group_size=16, **FINE)
    for activity, clipped in ((1e-3, True), (30.0, False)):
        x = tokens(16, seed=13)
        x[:, 5] *= activity
        hessian = statistics(x).hessian
        assert hessian is not None
        bound = search_clip(weight, hessian, (), grid, AWQ())
        assert bool(bound < group_amax(weight, grid)) == clipped


def test_queries_and_keys_are_not_clipped() -> None:
    weight, x = gaussian(24, 32, seed=14), tokens(32, outlier=3)
    roles = (("q", 8), ("k", 8), ("v", 8))
    result = quantize(weight, statistics(x, roles=roles), bits=2)
    unclipped = quantize(weight, statistics(x, roles=roles), bits=2, clip=False)
    anonymous = quantize(weight, statistics(x), bits=2)
    assert torch.equal(result.dequantize()[:16], unclipped.dequantize()[:16])
    assert torch.equal(result.dequantize()[16:], anonymous.dequantize()[16:])
    assert not torch.equal(result.dequantize()[16:], unclipped.dequantize()[16:])


def test_without_a_place_for_the_scale_only_clipping_is_left() -> None:
    weight, x = gaussian(8, 32, seed=15), tokens(32, outlier=3)
    result = quantize(weight, statistics(x, foldable=False))
    assert isinstance(result, UniformWeight) and result.solver == "awq" and "absorb" in result.notes["reason"]
    nothing = quantize(weight, statistics(x, foldable=False), clip=False)
    assert nothing.solver == "rtn" and "absorb" in nothing.notes["reason"]
    assert torch.equal(nothing.codes, Grid(bits=3, group_size=16, **FINE).quantize(weight).codes)


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
    inputs = statistics(tokens(columns, outlier=0))
    result = AWQ().quantize_linear(gaussian(rows, columns, seed=size), inputs, grid)
    tensors = result.packed()
    assert result.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    codes = unpack_bits(tensors["weight_packed"], bits, columns).float().reshape(rows, groups, size)
    zero: Any = 2.0 ** (bits - 1)
    if not symmetric:
        zero = unpack_bits(tensors["weight_zero_point"].T.contiguous(), bits, rows).T.float()[..., None]
    stored = ((codes - zero) * tensors["weight_scale"].float()[..., None]).reshape(rows, columns)
    values = stored * result.factor if isinstance(result, ColumnScaled) else stored
    assert torch.equal(values, result.dequantize())
    assert torch.equal(result.row_range(rows // 2, rows).dequantize(), values[rows // 2 :])


def test_a_folded_scale_costs_nothing() -> None:
    result = AWQ().quantize_linear(gaussian(64, 256), statistics(tokens(256, outlier=9)), Grid(bits=4, group_size=128))
    assert isinstance(result, ColumnScaled)
    assert 8 * result.stored_bytes() / (64 * 256) == pytest.approx(4 + 20 / 128)


def test_more_bits_are_better() -> None:
    x, weight = tokens(64, outlier=7), gaussian(16, 64, seed=16)
    errors = [output_error(weight, quantize(weight, statistics(x), bits).dequantize(), x) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_refusals_and_broken_statistics() -> None:
    assert AWQ().refusal(128, True) is None
    assert "clip: false" in str(AWQ(max_shrink=0.05).refusal(128, False))
    assert AWQ(max_shrink=0.05, clip=False).refusal(128, False) is None
    assert "no scaling" in str(AWQ(duo_scaling=True, ratios=1).refusal(128, False))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        AWQ(ratios=0)
    inputs = statistics(torch.full((4, 16), torch.inf))
    with pytest.raises(NonFinite, match="calibration"):
        quantize(gaussian(2, 16), inputs)


def test_threads_change_ties_at_most() -> None:
    """Losses are compared, and clipped groups chosen, by sums whose last bits may depend on the number of threads."""
    require_ties_at_most(AWQ(), seed=73, foldable=True)


class Recorder(AWQ):
    """AWQ that keeps what it was given and what it made."""

    seen: ClassVar[list[tuple[InputStatistics, Any]]] = []

    def solve(self, weight: Tensor, inputs: InputStatistics, grid: Grid, loss: Loss | None = None) -> QuantizedWeight:
        result = super().solve(weight, inputs, grid, loss)
        Recorder.seen.append((inputs, result))
        return result


@pytest.fixture
def recorder() -> Recorder:
    Recorder.seen = []
    return Recorder()


WINDOWS = torch.randint(0, 256, (6, 40), generator=torch.manual_seed(0))
IDS = torch.arange(60)[None]


def quantize_model(
    model: LoadedModel, solver: WeightSolver, grid_of: Any = None, bits: int = 3, sequential: bool = False
) -> list[LayerResult]:
    grid = Grid(bits=bits, group_size=16, **FINE)
    return quantize_weights(
        model,
        solver,
        grid_of or (lambda role: grid),
        WINDOWS,
        sequential=sequential,
        report=lambda done, total: None,
    )


@pytest.mark.parametrize("options", [{}, {"objective": "gram"}])
def test_inputs_are_the_original_models_in_every_job(tiny: Path, options: Any) -> None:
    """Section 3: all inputs are taken from the unquantized model, which is what the cell then says of itself."""
    independent, sequential = loaded(tiny), loaded(tiny)
    rows = quantize_model(independent, AWQ(**options))
    assert quantize_model(sequential, AWQ(**options), sequential=True) == rows
    for one, other in zip(independent.model.parameters(), sequential.model.parameters(), strict=True):
        assert torch.equal(one, other)
    methods = json.dumps([{"awq": options}, {"awq+qera": {"awq": options}}, "gptq"])
    one, other = (matrix(changed(methods=methods, statistics=mode)).cells[1:] for mode in ("independent", "sequential"))
    assert [cell.statistics for cell in other] == ["independent", "independent", "sequential"]
    assert [a.cell_id == b.cell_id for a, b in zip(one, other, strict=True)] == [True, True, False]


@torch.no_grad()
def uneven(model: LoadedModel) -> LoadedModel:
    """The model with norms, values and MLP activations of uneven size, as training makes them."""
    generator = torch.manual_seed(17)

    def spread(parameter: Tensor) -> None:
        parameter *= torch.exp(torch.randn(len(parameter), generator=generator)).reshape(
            -1, *[1] * (parameter.dim() - 1)
        )

    for index, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            if "norm" in name and name.endswith("weight"):
                spread(parameter)
        for role in ("v", "up"):
            spread(model.linears(index)[role].weight)
    return model


NORMS = {"llama": ("input_layernorm", "post_attention_layernorm"), "opt": ("self_attn_layer_norm", "final_layer_norm")}


@torch.no_grad()
def fold(model: LoadedModel, family: str, seen: list[tuple[InputStatistics, Any]]) -> set[str]:
    """Put codes into the layers and 1 / s into what precedes them; the roles that were scaled."""
    scaled: set[str] = set()
    per_block = len(seen) // len(model.blocks)
    for number, (inputs, result) in enumerate(seen):
        index = number // per_block
        linears, block = model.linears(index), model.blocks[index]
        base = result.base if isinstance(result, ColumnScaled) else result
        # Bases are set first; a producer may itself be quantized: its rows are divided afterwards.
        start = 0
        for role, rows in inputs.roles:
            linears[role].weight.copy_(base.row_range(start, start + rows).dequantize())
            start += rows
        if not isinstance(result, ColumnScaled):
            continue
        first = inputs.roles[0][0]
        scaled.add(first)
        attention, mlp = (block.get_submodule(name) for name in NORMS[family])
        producer: Any = {"q": attention, "o": linears["v"], "gate": mlp, "down": linears["up"]}.get(first, mlp)
        factor = result.factor
        producer.weight.mul_(factor[:, None] if producer.weight.dim() == 2 else factor)
        if getattr(producer, "bias", None) is not None:
            producer.bias.mul_(factor)
    return scaled


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_fold_gives_the_same_function(tmp_path: Path, family: str, recorder: Recorder) -> None:
    """What is evaluated, Q(W s) / s, equals a model whose norms, values and up projections carry 1 / s."""
    path = save_tiny(tmp_path, family, num_key_value_heads=4) if family == "llama" else save_tiny(tmp_path, family)
    simulated, folded = uneven(loaded(path)), uneven(loaded(path))
    quantize_model(simulated, dataclasses.replace(recorder, ratios=5))
    scaled = fold(folded, family, Recorder.seen)
    assert scaled == {"q", "o", "down", "gate" if family == "llama" else "up"}
    expected = simulated.model(IDS).logits
    torch.testing.assert_close(folded.model(IDS).logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "options"), [("llama", None), ("opt", None), ("llama", {"alpha": 0.5})])
def test_quantizers_of_inputs_see_what_the_folded_model_feeds_them(
    tmp_path: Path, family: str, options: dict[str, float] | None, recorder: Recorder
) -> None:
    """Q(x / s), not Q(x), by rounding to nearest and by CrossQuant."""
    path = save_tiny(tmp_path, family, num_key_value_heads=4) if family == "llama" else save_tiny(tmp_path, family)
    simulated, folded = uneven(loaded(path)), uneven(loaded(path))
    quantize_model(simulated, dataclasses.replace(recorder, ratios=5))
    fold(folded, family, Recorder.seen)
    recipe = Recipe() if options is None else Recipe((build_method("crossquant", options),))
    for model in (simulated, folded):
        install_sites(model, recipe, parse_scheme("a4"), {})
    with torch.no_grad():
        found, expected = simulated.model(IDS).logits, folded.model(IDS).logits
    # A rounding at a tie moves a token by a whole step now and then.
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < 1e-3
    simulated.restore()
    assert simulated.input_factors == {}


def test_ranges_of_inputs_are_those_behind_the_factors(tiny: Path) -> None:
    model = loaded(tiny)
    model.input_factors[1, "down"] = torch.tensor([0.5, 2.0])
    inputs = InputStatistics(low=torch.tensor([-2.0, -1.0]), high=torch.tensor([8.0, 3.0]), tokens=7)
    found = with_factors(model, {Place("linear_in", layer, "down"): inputs for layer in (0, 1)})
    assert found[Place("linear_in", 0, "down")] is inputs
    there = found[Place("linear_in", 1, "down")]
    assert there.low is not None and there.high is not None and there.max_abs is None and there.tokens == 7
    assert there.low.tolist() == [-1, -2] and there.high.tolist() == [4, 6]


def test_only_cells_whose_inputs_are_quantized_are_other_cells_than_before() -> None:
    cells = matrix(changed(methods="[awq, gptq]", bits="[w4, w4a8, w4kv4]")).cells
    assert {cell.label: cell.rounded for cell in cells if "awq" in cell.label} == {
        "awq w4 g64": {},
        "awq w4a8 g64": {"linear_in": 1, "input_factors": 1},
        "awq w4kv4 g64": {"kv_cache": 1},
    }
    assert not any("input_factors" in cell.rounded for cell in cells if "gptq" in cell.label)


def first_inputs(model: LoadedModel, module: Any) -> list[tuple[Any, Any]]:
    """Positional and keyword arguments of each call of a module while the calibration windows run, one by one."""
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for window in WINDOWS:
        model.body(window[None])
    handle.remove()
    return calls


@torch.no_grad()
@pytest.mark.parametrize("roles,name", [(("q", "k", "v"), "self_attn"), (("gate", "up"), "mlp")])
def test_stacked_layers_are_judged_by_the_module_that_reads_their_input(
    tiny: Path, recorder: Recorder, roles: tuple[str, ...], name: str
) -> None:
    """Brute force: every ratio's weights put into a model of its own, whose attention or MLP is run on the inputs."""
    model = uneven(loaded(tiny))
    module, linears = model.blocks[0].get_submodule(name), model.linears(0)
    calls = first_inputs(model, module)
    targets = [module(*args, **kwargs) for args, kwargs in calls]
    weights = {role: linears[role].weight.clone() for role in roles}
    x = torch.cat([(args[0] if args else kwargs["hidden_states"])[0] for args, kwargs in calls])
    errors = []
    for i in range(20):
        s = x.abs().mean(0) ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        for role in roles:
            linears[role].weight.copy_(Grid(bits=3, group_size=16, **FINE).quantize(weights[role] * s).dequantize() / s)
        outputs = [module(*args, **kwargs) for args, kwargs in calls]
        pairs = zip(outputs, targets, strict=True)
        deltas = [(a[0] - b[0]) if isinstance(a, tuple) else (a - b) for a, b in pairs]
        errors.append(float(sum(delta.square().sum() for delta in deltas)) / len(x))
    for role in roles:
        linears[role].weight.copy_(weights[role])
    quantize_model(model, recorder)
    notes = next(result.notes for inputs, result in Recorder.seen if inputs.roles[0][0] == roles[0])
    assert notes["objective"] == "module"
    assert notes["loss_unscaled"] == pytest.approx(errors[0], rel=1e-3)
    assert notes["loss"] == pytest.approx(min(errors), rel=1e-3)
    assert notes["ratio"] == errors.index(min(errors)) / 20


def test_a_layer_that_reads_alone_is_its_own_module(tiny_models: dict[str, Path]) -> None:
    for family in ("llama", "opt"):
        by_objective = {}
        for objective in ("module", "gram"):
            model = uneven(loaded(tiny_models[family]))
            solver = AWQ(objective=objective)  # type: ignore[arg-type]
            results = quantize_model(model, solver)
            by_objective[objective] = {r.role: r for r in results if r.layer == 0}
        stacked = {"q", "k", "v", "gate"} | ({"up"} if family == "llama" else set())
        for role, ours in by_objective["module"].items():
            assert ours.notes["objective"] == ("module" if role in stacked else "gram")
            assert role in stacked or ours == by_objective["gram"][role]
        assert {r.notes["objective"] for r in by_objective["gram"].values()} == {"gram"}
        assert by_objective["module"]["q"].notes["loss"] != by_objective["gram"]["q"].notes["loss"]


def test_the_gram_objective_needs_no_block(tiny: Path) -> None:
    assert not solves_blocks(AWQ(objective="gram")) and solves_blocks(AWQ())


def test_a_module_is_measured_on_as_many_windows_as_asked(tiny: Path, recorder: Recorder) -> None:
    losses = []
    for samples in (2, 6, 32):
        Recorder.seen = []
        quantize_model(uneven(loaded(tiny)), dataclasses.replace(recorder, samples=samples))
        losses.append(Recorder.seen[0][1].notes["loss"])
    assert losses[0] != losses[1] == losses[2]  # there are six


def test_the_search_leaves_the_block_as_it_was(tiny: Path) -> None:
    model = uneven(loaded(tiny))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    seen = []

    class Watched(AWQ):
        def quantize_block(self, problem: BlockProblem) -> dict[str, QuantizedWeight]:
            result = super().quantize_block(problem)
            now = problem.block.state_dict()
            prefix = f"model.layers.{len(seen)}."
            seen.append(all(torch.equal(before[prefix + name], value) for name, value in now.items()))
            return result

    quantize_model(model, Watched())
    assert seen == [True, True]


def test_a_scale_that_nothing_absorbs_may_be_stored_and_is_counted() -> None:
    x, weight = tokens(64, outlier=7), gaussian(16, 64, seed=4)
    grid = Grid(bits=3, group_size=16)
    skipped, stored = (
        AWQ(unfoldable=choice, clip=False).quantize_linear(weight, statistics(x, foldable=False), grid)  # type: ignore[arg-type]
        for choice in ("skip", "store")
    )
    assert isinstance(stored, ColumnScaled) and not stored.folded and stored.factor.dtype == torch.float16
    assert stored.stored_bytes() == skipped.stored_bytes() + 2 * 64
    assert stored.stored_bytes() == sum(t.numel() * t.element_size() for t in stored.packed().values())
    assert torch.equal(stored.packed()["weight_column_scale"], stored.factor) and "reason" not in stored.notes
    folded = AWQ(clip=False).quantize_linear(weight, statistics(x), grid)
    assert stored.notes["ratio"] == folded.notes["ratio"] and folded.stored_bytes() == skipped.stored_bytes()
    error = output_error(weight, stored.dequantize(), x)
    assert error == pytest.approx(stored.notes["loss"], rel=1e-4)  # measured with the factor that is stored
    assert error < 0.3 * output_error(weight, skipped.dequantize(), x)


def test_stored_scales_reach_the_output_projection_under_grouped_queries(tiny: Path) -> None:
    skipped, stored = (
        [r for r in quantize_model(uneven(loaded(tiny)), AWQ(unfoldable=choice)) if r.role == "o"]  # type: ignore[arg-type]
        for choice in ("skip", "store")
    )
    for before, after in zip(skipped, stored, strict=True):
        assert "absorb" in before.notes["reason"] and "reason" not in after.notes
        assert after.notes["ratio"] > 0 and after.stored_bytes > before.stored_bytes
        assert after.notes["loss"] < before.notes["loss"]


def test_shared_inputs_share_one_scale_and_know_their_roles(tiny: Path, recorder: Recorder) -> None:
    quantize_model(uneven(loaded(tiny)), recorder)
    roles = [tuple(role for role, _ in inputs.roles) for inputs, _ in Recorder.seen]
    assert roles == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)] * 2
    assert Recorder.seen[0][0].roles == (("q", 64), ("k", 32), ("v", 32))
    # Grouped-query attention: several columns of o read one row of v.
    for (inputs, result), group in zip(Recorder.seen, roles, strict=True):
        assert inputs.foldable == (group != ("o",))
        assert isinstance(result, UniformWeight) or group != ("o",)


def test_layers_solved_apart_are_not_scaled(tiny: Path, recorder: Recorder) -> None:
    def grid_of(role: str) -> Grid | None:
        if role == "up":
            return None
        return Grid(bits=8 if role == "k" else 3, group_size=16)

    results = quantize_model(uneven(loaded(tiny)), recorder, grid_of)
    apart = [inputs.foldable for inputs, _ in Recorder.seen if inputs.roles[0][0] in ("q", "k", "gate", "o")]
    assert apart == [False] * 8
    assert any(isinstance(result, ColumnScaled) for _, result in Recorder.seen)  # down
    by_role = {result.role: result for result in results if result.layer == 0}
    assert by_role["k"].solver == "rtn" and by_role["v"].solver == "awq" and by_role["up"].solver is None


def test_grouped_query_attention_leaves_o_to_rounding(tiny: Path) -> None:
    ours, nearest = uneven(loaded(tiny)), uneven(loaded(tiny))
    results = quantize_model(ours, AWQ(clip=False))
    quantize_model(nearest, RTN())
    for index in range(2):
        assert torch.equal(ours.linears(index)["o"].weight, nearest.linears(index)["o"].weight)
    assert {result.solver for result in results if result.role == "o"} == {"rtn"}


@pytest.mark.parametrize("family", TINY)
def test_whole_models(tiny_models: dict[str, Path], family: str) -> None:
    first, second = (uneven(loaded(tiny_models[family])) for _ in range(2))
    results = quantize_model(first, AWQ(ratios=5))
    assert [(r.solver, r.bits, r.group_size) for r in results] == [("awq", 3, 16)] * len(results)
    assert len(results) == 2 * len(first.architecture.roles)
    assert quantize_model(second, AWQ(ratios=5)) == results
    logits = first.model(IDS).logits
    assert torch.isfinite(logits).all() and torch.equal(logits, second.model(IDS).logits)
    first.restore()
    nearest = quantize_model(first, RTNWithStatistics())
    pairs = [(a.output_error, r.output_error) for a, r in zip(results, nearest, strict=True)]
    assert sum(ours < theirs for ours, theirs in pairs if ours and theirs) >= 0.8 * len(pairs)


class RTNWithStatistics(RTN):
    def statistics(self) -> Any:
        return AWQ().statistics()
