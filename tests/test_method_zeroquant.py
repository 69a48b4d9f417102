"""ZeroQuant: DeepSpeed's quantizers by hand and against the library, groups across rows, distillation of blocks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfarm import distil as distil_module
from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.distil import Distillation, distil, loss, straight_through, train
from qfarm.errors import NonFinite, QfarmError
from qfarm.layers.sites import Place
from qfarm.methods.zeroquant import FlatGroups, TokenWise, ZeroQuant
from qfarm.models.load import LoadedModel
from qfarm.quantized import UniformWeight
from qfarm.quantizer import Grid
from qfarm.recipe import BlockSolver
from qfarm.scheme import parse_scheme
from qfarm.walk import BlockProblem
from tests.conftest import TINY
from tests.job_example import CONFIG, changed, labels, matrix
from tests.test_models import loaded
from tests.test_worker import Farm, make_job

EXACT = torch.float32
WINDOWS = torch.randint(0, 256, (8, 24), generator=torch.manual_seed(0))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, bits: int = 4, group_size: int = -1, **options: Any) -> Any:
    return ZeroQuant(**options).quantize_linear(weight, None, Grid(bits=bits, group_size=group_size, scale_dtype=EXACT))


# -- quantizers -------------------------------------------------------------------------------------------------------


def test_closed_forms() -> None:
    made = rounded(torch.tensor([[1.0, -1.0, 0.3]]))
    assert made.scale.item() == 0.125 and made.dequantize().tolist() == [[0.875, -1.0, 0.25]]
    made = rounded(torch.tensor([[-1, 0.3, 0.7, 0.9]]))
    assert made.scale.item() == 0.125 and (made.codes.int() - 8).tolist() == [[-8, 2, 6, 7]]
    assert rounded(torch.tensor([[1.0, 0]])).dequantize().tolist() == [[0.875, 0]]
    assert TokenWise(bits=4)(torch.tensor([[1.0, -1, 0.3], [0.5, 0, -0.5]])).tolist() == [
        [0.875, -1.0, 0.25],
        [0.4375, 0, -0.5],
    ]


def test_asymmetric_by_hand() -> None:
    """[2, 3, 6]: scale 4/16, z = 8, codes 0, 4, and 16 clipped to 15: the range need not contain zero."""
    made = rounded(torch.tensor([[2.0, 3.0, 6.0]]), symmetric=False)
    assert made.scale.item() == 0.25 and made.zero.item() == -8 and made.codes.tolist() == [[0, 4, 15]]
    assert made.dequantize().tolist() == [[2.0, 3.0, 5.75]]
    constant = rounded(torch.tensor([[0.07, 0.07], [0.0, 0.0], [-3.0, -3.0]]), symmetric=False)
    torch.testing.assert_close(constant.dequantize(), torch.tensor([[0.07, 0.07], [0.0, 0.0], [-3.0, -3.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_asymmetric_offsets_are_exact_in_their_dtype(dtype: torch.dtype) -> None:
    """Groups far from zero compared with their width."""
    weight = noise(32, 16) * torch.logspace(-5, 0, 32)[:, None] + 0.5
    made = ZeroQuant(symmetric=False).quantize_linear(weight, None, Grid(bits=8, scale_dtype=dtype))
    assert isinstance(made, UniformWeight) and made.zero is not None
    assert made.zero.dtype == dtype and torch.equal(made.zero.float(), made.zero.float().round())
    scale = made.scale.float()
    # Half a step inside; the largest value may lose one more, and z is off by half a step at most.
    assert (made.dequantize() - weight).abs().le(1.6 * scale).all()


def test_groups_of_the_whole_matrix_cross_rows() -> None:
    """4 x 6 with three groups of 8: scales by hand."""
    weight = torch.arange(1.0, 25).reshape(4, 6)
    made = rounded(weight, number_of_groups=3)
    assert isinstance(made, FlatGroups) and made.base.scale.flatten().tolist() == [1, 2, 3]  # 2 * 8, 16, 24 / 16
    expected = torch.cat([torch.arange(1.0, 9).clamp(max=7), torch.round(torch.arange(9.0, 17) / 2).clamp(max=7) * 2])
    assert torch.equal(made.dequantize().flatten()[:16], expected)
    assert made.shape == (4, 6) and made.group_size == 8 and made.notes["number_of_groups"] == 3
    halves = rounded(weight, number_of_groups=2)
    assert torch.equal(halves.row_range(2, 4).dequantize(), halves.dequantize()[2:])
    with pytest.raises(QfarmError, match=r"^zeroquant: rows 0\.\.1 cut a group of 8 weights$"):
        made.row_range(0, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_per_row_is_per_channel(symmetric: bool) -> None:
    weight = noise(8, 12)
    rows = rounded(weight, symmetric=symmetric)
    groups = rounded(weight, symmetric=symmetric, number_of_groups=8)
    assert torch.equal(rows.dequantize(), groups.dequantize()) and rows.stored_bytes() == groups.stored_bytes()
    quarter = rounded(weight, symmetric=symmetric, number_of_groups=32)
    assert torch.equal(quarter.dequantize(), rounded(weight, group_size=3, symmetric=symmetric).dequantize())


def test_zeros_stay_zeros() -> None:
    weight = noise(4, 6)
    weight[2] = 0
    for options in ({}, {"symmetric": False}, {"number_of_groups": 2}):
        out = rounded(weight, **options).dequantize()
        assert out.isfinite().all() and (out[2] == 0).all()
    x = noise(2, 3, 5)
    x[1, 1] = 0
    out = TokenWise(bits=8)(x)
    assert out.isfinite().all() and (out[1, 1] == 0).all()
    with pytest.raises(NonFinite):
        rounded(torch.full((2, 2), float("nan")), symmetric=False)


@given(
    seed=st.integers(0, 10**6), bits=st.integers(3, 8), rows=st.sampled_from([2, 4, 6]), symmetric=st.booleans(),
    groups=st.sampled_from([None, 1, 2, 4, 12]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_stored_bytes_are_those_of_the_packed_tensors(
    seed: int, bits: int, rows: int, symmetric: bool, groups: int | None
) -> None:
    method = ZeroQuant(symmetric=symmetric, number_of_groups=groups)
    made = method.quantize_linear(noise(rows, 96, seed=seed), None, Grid(bits=bits))
    assert made.stored_bytes() == sum(t.numel() * t.element_size() for t in made.packed().values())
    count = groups or rows
    if 96 * rows // count * bits % 32 == 0:  # no padding: codes, and per group a scale and with an offset one more
        assert 8 * made.stored_bytes() == 96 * rows * bits + 16 * count * (1 if symmetric else 2)


def test_tokens_are_rounded_by_themselves() -> None:
    x = noise(2, 5, 16).to(torch.bfloat16)
    whole = TokenWise(bits=8)(x)
    assert whole.dtype == torch.bfloat16
    assert torch.equal(torch.stack([TokenWise(bits=8)(row) for row in x.flatten(0, 1)]).reshape(x.shape), whole)
    assert torch.equal(TokenWise(bits=8)(4 * x), 4 * whole)


def test_the_library_computes_the_same() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install 'qfarm[deepspeed]'")
    library = pytest.importorskip("deepspeed.compression.utils")
    for bits in (3, 4, 8):
        weight = noise(12, 16, seed=bits)
        for groups in (1, 3, 12, 48):
            theirs = library.SymQuantizer.apply(weight, bits, None, None, groups)
            assert torch.equal(rounded(weight, bits, number_of_groups=groups).dequantize(), theirs)
            theirs = library.AsymQuantizer.apply(weight, bits, None, None, groups)
            ours = rounded(weight, bits, number_of_groups=groups, symmetric=False).dequantize()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        x = noise(2, 7, 16, seed=bits)
        assert torch.equal(TokenWise(bits=bits)(x), library.SymQuantizer.apply(x, bits, None, None, 14))


# -- distillation -----------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two linear layers with a norm before and something between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        for i, linear in enumerate((self.up, self.down)):
            linear.weight = nn.Parameter(noise(width, width, seed=i) / width**0.5)
        self.up.bias = nn.Parameter(noise(width, seed=2) / 4)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(torch.nn.functional.silu(self.up(self.norm(hidden))))
        return out


def toy(bits: int = 4, **changes: Any) -> BlockProblem:
    block = Toy(16)
    inputs = noise(8, 6, 16, seed=9)
    linears = {"up": block.up, "down": block.down}
    return BlockProblem(
        block=block,
        linears=linears,
        grids=dict.fromkeys(linears, Grid(bits=bits)),
        inputs=inputs,
        targets=block(inputs),
        keywords={},
        seed=0,
        **changes,
    )


def options_of(problem: BlockProblem, **options: Any) -> Distillation:
    return ZeroQuant(lkd=True, **options)._distillation(problem)


def test_gradients_pass_straight_through() -> None:
    w = torch.tensor([[1.0, -1.0, 0.3, 0.04]], requires_grad=True)
    straight_through(w, rounded(w.detach()).dequantize()).sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.ones_like(w))


def test_a_student_at_sixteen_bits_has_no_loss() -> None:
    problem = toy()
    plain = dataclasses.replace(options_of(problem, lkd_steps=3), weight=lambda role, weight: weight)
    names = distil_module._weight_names(problem)
    parameters, curve = train(problem, plain, names)
    assert curve[0] == 0 and curve == [0.0] * 4
    # AdamW still decays matrices, by rate times decay a step, and nothing else.
    assert all(torch.equal(parameters[n], p) for n, p in problem.block.named_parameters() if p.dim() == 1)
    drift = parameters["up.weight"].detach() - problem.linears["up"].weight
    assert float(drift.abs().max()) < 1e-8


@pytest.mark.parametrize("input_bits", [16, 4])
def test_the_loss_falls_and_the_teacher_stays(input_bits: int) -> None:
    problem = toy(input_bits=input_bits)
    before = {name: p.clone() for name, p in problem.block.named_parameters()}
    options = options_of(problem, lkd_steps=50, lkd_learning_rate=2e-4, lkd_batch=8)
    weights, curve = distil(problem, options)
    assert len(curve) == 51 and curve[-1] < 0.7 * curve[0]
    assert all(torch.equal(p, before[name]) for name, p in problem.block.named_parameters())
    assert weights.keys() == {"up", "down"} and problem.learned.keys() == {"norm.weight", "norm.bias", "up.bias"}
    assert all(not torch.equal(value, before[name]) for name, value in problem.learned.items())

    # The first loss by hand, and the last from what is returned.
    masters = {f"{role}.weight": weight for role, weight in weights.items()} | problem.learned
    assert curve[0] == pytest.approx(loss_by_hand(problem, options, before))
    assert curve[-1] == pytest.approx(loss_by_hand(problem, options, masters))


def loss_by_hand(problem: BlockProblem, options: Distillation, parameters: dict[str, Tensor]) -> float:
    """Of the toy block with these parameters, on all its windows."""

    def fed(x: Tensor) -> Tensor:
        return x if problem.input_bits == 16 else TokenWise(bits=problem.input_bits)(x)

    up, down = (options.weight(role, parameters[f"{role}.weight"]) for role in ("up", "down"))
    normed = nn.functional.layer_norm(problem.inputs, (16,), parameters["norm.weight"], parameters["norm.bias"])
    inner = nn.functional.silu(fed(normed) @ up.T + parameters["up.bias"])
    return float((problem.inputs + fed(inner) @ down.T - problem.targets).square().mean())


def test_small_gradients_survive_in_half_precision() -> None:
    """Those of a mean over a million elements, which are below the smallest number of float16 on their way."""
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        problem = toy(bits=8)
        problem.block.to(dtype)
        problem.inputs = (noise(256, 256, 16, seed=4) / 8).to(dtype)
        names = distil_module._weight_names(problem)
        found: dict[str, Tensor] = {}

        def keep(self: Any, found: dict[str, Tensor] = found) -> None:
            for group in self.param_groups:
                found |= {f"{i} {tuple(p.shape)}": p.grad.clone() for i, p in enumerate(group["params"])}

        with mock.patch.object(torch.optim.AdamW, "step", keep):
            train(problem, options_of(problem, lkd_steps=1, lkd_batch=256), names)
        gradients[dtype] = found
    for name, exact in gradients[torch.float32].items():
        half = gradients[torch.float16][name]
        assert 0 < float((half - exact).norm()) < 0.7 * float(exact.norm()), name  # 0.9 and more if they are lost


def test_masters_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that a bfloat16 weight cannot take: half a unit in the last place of 0.1 is 2.4e-4."""
    problem = toy(bits=8)
    problem.block.to(torch.bfloat16)
    problem.inputs = problem.inputs.to(torch.bfloat16)
    before = {name: parameter.float().clone() for name, parameter in problem.block.named_parameters()}
    options = options_of(problem, lkd_steps=3, lkd_learning_rate=1e-6, lkd_weight_decay=0.0)
    after, _ = train(problem, options, distil_module._weight_names(problem))
    for name, parameter in after.items():
        moved = (parameter.detach().double() - before[name].double()).abs()
        assert parameter.dtype == torch.float32 and float(moved.max()) < 3.3e-6, name
        assert float((moved > 0).float().mean()) > 0.5, name


def test_batches_are_consecutive_windows_and_a_normalised_loss_is_relative() -> None:
    problem = toy()
    names = distil_module._weight_names(problem)
    _, curve = train(problem, options_of(problem, lkd_steps=4, lkd_batch=3, lkd_learning_rate=1e-12), names)
    masters = {name: p.clone() for name, p in problem.block.named_parameters()}
    plain, relative = options_of(problem), options_of(problem, lkd_normalise=True)
    batches = (slice(0, 3), slice(3, 6), slice(6, 9), slice(0, 3))
    expected = [float(loss(problem, plain, names, masters, batch)) for batch in batches]
    assert curve[:4] == pytest.approx(expected) and len(set(expected)) == 3
    scaled = float(loss(problem, relative, names, masters, slice(0, 8)))
    mean_square = float(problem.targets.square().mean())
    assert scaled == pytest.approx(float(loss(problem, plain, names, masters, slice(0, 8))) / mean_square)


def test_a_nonfinite_loss_ends_it() -> None:
    problem = toy()
    problem.inputs[0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match="distillation loss is NaN or Inf"):
        distil(problem, options_of(problem, lkd_steps=2))


def quantize(model: LoadedModel, scheme: str, **options: Any) -> list[LayerResult]:
    parsed = parse_scheme(scheme)
    return quantize_weights(
        model,
        ZeroQuant(**options),
        lambda role: Grid(bits=parsed.weight_bits(role), symmetric=True) if parsed.weight_bits(role) < 16 else None,
        WINDOWS if options.get("lkd") else None,
        sequential=True,
        report=lambda done, total: None,
        input_bits=parsed.linear_in,
    )


def state(model: LoadedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


@pytest.mark.parametrize(("blocks", "trained"), [("last", [1]), ("all", [0, 1]), ([0], [0])])
def test_only_the_chosen_blocks_learn(tiny: Path, blocks: Any, trained: list[int]) -> None:
    model = loaded(tiny)
    plain = state(model)
    quantize(model, "w4/8a8")
    nearest = state(model)
    model.restore()
    results = quantize(model, "w4/8a8", lkd=True, lkd_blocks=blocks, lkd_steps=4, lkd_learning_rate=1e-3)
    learned = state(model)
    differing = {int(n.split(".")[2]) for n in learned if not torch.equal(learned[n], nearest[n])}
    assert differing == set(trained)
    assert torch.equal(learned["model.norm.weight"], plain["model.norm.weight"])
    norm = f"model.layers.{trained[-1]}.input_layernorm.weight"
    assert not torch.equal(learned[norm], plain[norm])
    with_curve = {(r.layer, r.role) for r in results if "lkd_loss" in r.notes}
    assert with_curve == {(block, "q") for block in trained}
    assert all(len(r.notes["lkd_loss"]) == 5 for r in results if "lkd_loss" in r.notes)
    assert {r.layer for r in results if "lkd_loss_last" in r.notes} == set(trained)
    model.restore()
    assert all(torch.equal(p, plain[name]) for name, p in model.model.named_parameters())


def test_teacher_inputs_are_the_original_models(tiny: Path) -> None:
    """Block 1 is fed what block 0 gives before it was quantized, whatever the job's mode."""
    model = loaded(tiny)
    states = model.model(WINDOWS, output_hidden_states=True).hidden_states
    seen: dict[int, BlockProblem] = {}

    def spy(self: ZeroQuant, problem: BlockProblem) -> Any:
        seen[problem.index] = problem
        return original(self, problem)

    original = ZeroQuant.quantize_block
    with mock.patch.object(ZeroQuant, "quantize_block", spy):
        quantize(model, "w3", lkd=True, lkd_steps=1)
    assert [p.blocks for p in seen.values()] == [2, 2]
    for index, problem in seen.items():
        torch.testing.assert_close(problem.inputs, states[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_earlier_positions_do_not_see_the_last_token(tiny_models: dict[str, Path], family: str) -> None:
    """For teacher and student alike: the mask of the whole model is used."""
    model = loaded(tiny_models[family])
    found: list[BlockProblem] = []
    with mock.patch.object(ZeroQuant, "trains", lambda self, index, blocks: False):
        original = ZeroQuant.quantize_block
        with mock.patch.object(ZeroQuant, "quantize_block", lambda s, p: found.append(p) or original(s, p)):
            quantize(model, "w4", lkd=True)
    model.restore()
    problem = found[0]
    options = options_of(problem)
    names = distil_module._weight_names(problem)
    weights = {name: options.weight(role, problem.linears[role].weight) for name, role in names.items()}
    hidden = problem.inputs.clone()
    hidden[:, -1] += 1
    for parameters in ({}, weights):
        before, after = problem.call(problem.inputs, parameters), problem.call(hidden, parameters)
        assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])


def test_an_interrupted_run_trains_only_what_is_missing(tiny: Path) -> None:
    model = loaded(tiny)
    options: dict[str, Any] = {"lkd": True, "lkd_blocks": "all", "lkd_steps": 3, "lkd_learning_rate": 1e-3}
    calls: list[int] = []
    original = distil_module.train

    def counted(problem: BlockProblem, *rest: Any) -> Any:
        calls.append(problem.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(problem, *rest)

    with mock.patch.object(distil_module, "train", counted):
        with pytest.raises(KeyboardInterrupt):
            quantize(model, "w4a8", **options)
        model.restore()
        resumed = quantize(model, "w4a8", **options)
        assert calls == [0, 1, 1], "the first block came from the cache"
        kept = state(model)
        model.restore()
        quantize(model, "w4a8", **options | {"lkd_learning_rate": 2e-3})
        assert calls == [0, 1, 1, 0, 1], "other options are other blocks"
        model.restore()
        quantize(model, "w4", **options)
        assert len(calls) == 7, "so is another width of the inputs"
    model.restore()
    with mock.patch("qfarm.cache.find_file", lambda *_: None):
        again = quantize(model, "w4a8", **options)
    assert again == resumed and all(torch.equal(p, kept[name]) for name, p in model.model.named_parameters())


# -- plans and models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_attention_at_eight_bits_and_mlp_at_four_in_every_family(tiny_models: dict[str, Path], family: str) -> None:
    """OPT's fc1 and fc2 are the MLP, though no name says so."""
    model = loaded(tiny_models[family])
    before = state(model)
    results = quantize(model, "w4/8a8")
    assert {r.role: r.bits for r in results} == {
        role: 8 if role in ("q", "k", "v", "o") else 4 for role in model.architecture.roles
    }
    changed_names = {name for name, p in model.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed_names == {f"{r.module}.weight" for r in results}


def test_plans() -> None:
    def plan(entry: str, bits: str, group_size: int = -1) -> Any:
        return matrix(changed(methods=f"[{entry}, rtn]", bits=f"[{bits}]", group_sizes=f"[{group_size}]"))

    def rule(*arguments: Any) -> str:
        (invalid,) = plan(*arguments).invalid
        return invalid.rule

    found = plan("zeroquant", "w8a8, w4/8, w4/8a8, w4a4")
    assert found.invalid == () and labels(found)[:4] == [f"zeroquant {s}" for s in ("w8a8", "w4/8", "w4/8a8", "w4a4")]
    assert all(cell.calibration is None and cell.seed is None for cell in found.cells)
    assert rule("zeroquant", "a8") == "zeroquant quantizes weight, which a8 leaves at 16 bits"
    assert rule("zeroquant", "w2") == "zeroquant quantizes weights to 3..8 bits, not 2"
    assert rule("zeroquant: {number_of_groups: 7}", "w4").startswith("zeroquant: number_of_groups: 7 does not divide")
    assert "use group size -1" in rule("zeroquant: {number_of_groups: 64}", "w4", 64)
    assert rule("zeroquant: {lkd_steps: 5}", "w4") == "zeroquant: lkd_steps needs lkd: true"
    assert "the model has blocks 0..1, got [2]" in rule("zeroquant: {lkd: true, lkd_blocks: [0, 2]}", "w4")
    cells = plan("zeroquant: {lkd: true, lkd_blocks: [1]}", "w4").cells
    (cell,) = (cell for cell in cells if cell.recipe == "zeroquant")
    assert cell.statistics == "independent" and cell.calibration and cell.seed == 0
    assert CONFIG["num_hidden_layers"] == 2
    assert isinstance(ZeroQuant(), BlockSolver) and not ZeroQuant().whole_blocks
    assert ZeroQuant().quantizer(Place("linear_in", 0, "q"), 8, {}) == TokenWise(bits=8)


JOB = """
models: [{model}]
methods: [rtn, zeroquant, zeroquant: {{number_of_groups: 32}}, smoothquant+zeroquant, zeroquant: {{lkd: true, lkd_steps: 20, lkd_learning_rate: 0.001, lkd_blocks: all}}]
bits: [w4/8a8, w4/8]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 12}}]
resources: {{gpus: 0}}
"""  # noqa: E501


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cells(tmp_path: Path, tiny_models: dict[str, Path], family: str) -> None:
    farm = Farm(tmp_path, make_job(tiny_models[family], JOB))
    plan = farm.plan()
    assert plan.invalid == () and len(plan.cells) == 11
    for index, planned in enumerate(plan.cells):
        outcome = farm.run(index)
        assert outcome.failure is None, f"{planned.cell.label}: {outcome.error}"
    cells = {row["cell_id"]: row for row in farm.table("cells")}
    kl = {}
    for row in farm.table("metrics"):
        cell = cells[row["cell_id"]]
        if row["metric"] == "kl" and cell["recipe"] == "zeroquant" and '"number_of_groups": null' in cell["spec"]:
            kl['"lkd": true' in cell["spec"], cell["scheme"]] = row["value"]
    for scheme in ("w4/8a8", "w4/8"):
        assert 0 < kl[True, scheme] < kl[False, scheme] < 1
    curves = [json.loads(row["notes"]) for row in farm.table("layers") if "lkd_loss" in json.loads(row["notes"])]
    assert len(curves) == 4 and all(c["lkd_loss_last"] < c["lkd_loss_first"] for c in curves)
