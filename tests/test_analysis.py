"""Analysis: closed forms, and that each of its figures is measured between the right two things."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from qfarm.analysis import distance, mean_decibels, moments, over_windows
from qfarm.evaluate import analysis, build_evaluator
from qfarm.evaluate.analysis import Comparison, compare_weights
from qfarm.layers.install import install_sites
from qfarm.layers.linear import Branch, as_given, quantize_input, transform_output
from qfarm.layers.observe import observe
from qfarm.layers.rtn import Symmetric
from qfarm.layers.twin import twin_blocks
from qfarm.models.load import LoadedModel
from qfarm.recipe import Recipe, parse_recipe
from qfarm.report.render import render
from qfarm.report.show import show, show_json
from qfarm.report.tables import load
from qfarm.scheme import parse_scheme
from tests.conftest import TINY
from tests.test_models import loaded
from tests.test_worker import Farm, make_job

PROBE = torch.randint(0, 256, (1, 40), generator=torch.manual_seed(1))
JOB = """
models: [{model}]
methods: [{method}]
bits: [{bits}]
dtype: float32
calibration: {{text: python-docs, samples: 2, length: 32}}
evaluate: [analysis: {{text: python-docs, length: 32, windows: 3}}]
resources: {{gpus: 0}}
"""
every_family = pytest.mark.parametrize("family", TINY)
Figures = dict[tuple[int, str, str, str], list[float]]


@pytest.fixture
def model(tiny_models: dict[str, Path], family: str) -> LoadedModel:
    """With norms that are not all ones and biases that are not zero."""
    made = loaded(tiny_models[family])
    draw = torch.manual_seed(3)
    for name, parameter in made.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5 + ("norm" in name))
    return made


def compared(model: LoadedModel, twins: list[nn.Module], ids: Tensor = PROBE) -> Figures:
    found: Figures = collections.defaultdict(list)
    compare_weights(model, twins, found)
    with torch.no_grad(), Comparison(model, twins, found):
        model.body(ids)
    return found


def twin_linear(model: LoadedModel, twins: list[nn.Module], block: int, role: str) -> nn.Linear:
    found = twins[block].get_submodule(model.architecture.roles[role])
    assert isinstance(found, nn.Linear)
    return found


def linear_inputs(model: LoadedModel) -> dict[tuple[int, str], Tensor]:
    found: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad(), model.temporary():
        for block in range(len(model.blocks)):
            for role, linear in model.linears(block).items():

                def keep(_: Any, args: tuple[Tensor], key: tuple[int, str] = (block, role)) -> None:
                    found[key] = args[0].clone()

                model.on_restore(linear.register_forward_pre_hook(keep).remove)
        model.body(PROBE)
    return found


# -- figures ----------------------------------------------------------------------------------------------------------


def test_sqnr_of_a_known_pair() -> None:
    found = distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    assert found["sqnr"] == pytest.approx(10 * math.log10(25)) and found["mse"] == 0.5


def test_errors_that_cancel_are_errors() -> None:
    found = distance(torch.tensor([5.0, 5.0]), torch.tensor([6.0, 4.0]))
    assert found == {"sqnr": pytest.approx(10 * math.log10(25)), "mse": 1.0}


def test_equal_tensors_are_infinitely_good_and_nothing_against_something_is_infinitely_bad() -> None:
    x = torch.randn(8, generator=torch.manual_seed(0))
    assert distance(x, x.clone()) == {"sqnr": math.inf, "mse": 0.0}
    assert distance(torch.zeros(3), torch.zeros(3))["sqnr"] == math.inf
    assert distance(torch.zeros(3), torch.ones(3))["sqnr"] == -math.inf


def test_moments_of_known_tensors() -> None:
    assert moments(torch.tensor([-1.0, 1.0])) == {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "kurtosis": -2.0}
    # One of four at 2: mean 1/2, variance 3/4, fourth moment (3 + 81) / 64.
    found = moments(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    assert found["mean"] == 0.5 and found["std"] == pytest.approx(0.75**0.5)
    assert found["kurtosis"] == pytest.approx((3 * 0.5**4 + 1.5**4) / 4 / 0.75**2 - 3)
    assert math.isnan(moments(torch.full((5,), 3.0))["kurtosis"])


def test_moments_do_not_lose_a_small_spread_around_a_large_mean() -> None:
    x = torch.tensor([-1.0, 1.0]).repeat(5000)
    shifted = moments(x + 1e5)
    assert shifted["std"] == pytest.approx(1.0, rel=1e-6) and shifted["kurtosis"] == pytest.approx(-2.0, rel=1e-6)


def test_what_becomes_of_several_windows() -> None:
    assert over_windows("mse", [1.0, 3.0]) == over_windows("sqnr", [1.0, 3.0]) == 2.0
    assert (over_windows("min", [-1.0, -3.0]), over_windows("max", [1.0, 3.0])) == (-3.0, 3.0)
    assert mean_decibels([10.0, math.inf, 20.0]) == 15.0 and mean_decibels([math.inf, math.inf]) == math.inf


# -- what is compared with what ---------------------------------------------------------------------------------------


@every_family
def test_a_model_that_is_not_quantized_has_no_error_whatever_its_biases(model: LoadedModel) -> None:
    """A reference output without the bias would show an error in OPT and Qwen2."""
    found = compared(model, twin_blocks(model))
    roles = len(model.architecture.roles)
    for tensor in ("weight", "input", "output", "accumulated"):
        values = {key[:2]: value for key, value in found.items() if key[2:] == (tensor, "sqnr")}
        assert len(values) == 2 * roles and set(map(tuple, values.values())) == {(math.inf,)}
    assert all(value == [0.0] for key, value in found.items() if key[3] == "mse")


@every_family
def test_no_quantizer_is_active_in_the_full_precision_run(model: LoadedModel) -> None:
    """Not at linear inputs, and neither at queries, probabilities and the KV cache."""
    before = linear_inputs(model)
    twins = twin_blocks(model)
    install_sites(model, Recipe(), parse_scheme("w16a3q3p3kv3"), {})
    seen: dict[tuple[int, str], Tensor] = {}
    measure = Comparison._measure

    def spy(self: Comparison, index: int, role: str, *rest: Any) -> None:
        # One block at a time: nothing of the blocks before is held.
        assert set(self.inputs) == set(model.architecture.roles)
        seen[index, role] = self.inputs[role]
        measure(self, index, role, *rest)

    with mock.patch.object(Comparison, "_measure", spy):
        found = compared(model, twins)
    assert seen.keys() == before.keys()
    for key, values in seen.items():
        torch.testing.assert_close(values, before[key], rtol=1e-4, atol=1e-5)
    assert all(found[1, role, "accumulated", "sqnr"][0] < 20 for role in model.architecture.roles)
    model.restore()
    again = compared(model, twins)  # installed and removed again
    assert all(value == [math.inf] for key, value in again.items() if key[3] == "sqnr")


@every_family
def test_local_errors_are_those_of_the_layer_alone(model: LoadedModel) -> None:
    """Weights of the first block's `up` are disturbed, the inputs of all layers are quantized."""
    twins = twin_blocks(model)
    linear = model.linears(0)["up"]
    original = linear.weight
    model.replace_weight(linear, original + 0.01)
    install_sites(model, Recipe(), parse_scheme("w16a4"), {})
    inputs = linear_inputs(model)
    found = compared(model, twins)
    disturbed = {key[:2] for key, value in found.items() if key[2:] == ("weight", "sqnr") and value[0] < math.inf}
    assert disturbed == {(0, "up")}
    assert found[0, "up", "weight", "mse"][0] == pytest.approx(1e-4, rel=1e-3)
    for (block, role), x in inputs.items():
        wanted = distance(x, Symmetric(bits=4)(x))
        assert found[block, role, "input", "sqnr"] == [pytest.approx(wanted["sqnr"], rel=1e-5)]
        twin = twin_linear(model, twins, block, role)
        weight = twin.weight + (0.01 if (block, role) == (0, "up") else 0)
        exact = nn.functional.linear(x, twin.weight, twin.bias)
        given = nn.functional.linear(Symmetric(bits=4)(x), weight, twin.bias)
        assert found[block, role, "output", "sqnr"] == [pytest.approx(distance(exact, given)["sqnr"], rel=1e-4)]
    assert twin_linear(model, twins, 0, "up").weight is original


def test_output_quantizers_are_no_error_of_the_layer(tiny: Path) -> None:
    """Keys rounded right after their projection, as caches before the rotary embedding do it."""
    model = loaded(tiny)
    twins = twin_blocks(model)
    transform_output(model, model.linears(0)["k"], Symmetric(bits=3))
    found = compared(model, twins)
    assert found[0, "k", "output", "sqnr"] == [math.inf] and found[0, "o", "accumulated", "sqnr"][0] < 30


@every_family
def test_the_reference_of_a_smoothed_model_is_smoothed(model: LoadedModel) -> None:
    (method,) = parse_recipe({"smoothquant": {}}).transforms
    observed = observe(model, PROBE, method.statistics())
    original = twin_blocks(model)
    method.transform(model, observed, 0)
    found = compared(model, twin_blocks(model))
    assert all(value == [math.inf] for key, value in found.items() if key[3] == "sqnr")
    assert compared(model, original)[0, "q", "weight", "sqnr"][0] < 40  # the factors are no error


def test_a_branch_is_part_of_the_weight_and_of_the_output(tiny: Path) -> None:
    model = loaded(tiny)
    twins = twin_blocks(model)
    linear = model.linears(0)["down"]
    left, right = (torch.randn(*size, generator=torch.manual_seed(0)) / 10 for size in ((64, 2), (2, 128)))
    model.replace_weight(linear, linear.weight - left @ right)
    quantize_input(model, 0, "down", as_given, Branch(left=left, right=right))
    found = compared(model, twins)
    for tensor in ("weight", "output"):
        assert found[0, "down", tensor, "sqnr"][0] > 100
    assert found[0, "down", "input", "sqnr"] == [math.inf]


def test_twins_cost_no_memory_and_nothing_reaches_them(tiny: Path) -> None:
    model = loaded(tiny)
    twins = twin_blocks(model)
    shared = {id(p) for twin in twins for p in twin.parameters()}
    assert shared == {id(p) for block in model.blocks for p in block.parameters()}
    install_sites(model, Recipe(), parse_scheme("w16a4"), {})
    assert type(twins[0].get_submodule("self_attn.q_proj")) is nn.Linear
    assert not any(module._forward_pre_hooks for twin in twins for module in twin.modules())


# -- the evaluation ---------------------------------------------------------------------------------------------------


def run(folder: Path, model: Path, method: str, bits: str) -> Farm:
    farm = Farm(folder, make_job(model, JOB.replace("{method}", method).replace("{bits}", bits)))
    for index in range(len(farm.plan().cells)):
        outcome = farm.run(index)
        assert outcome.failure is None, outcome.error
    return farm


def figures(farm: Farm, recipe: str) -> dict[tuple[int, str, str, str], float]:
    (cell_id,) = (row["cell_id"] for row in farm.table("cells") if row["recipe"] == recipe)
    rows = [row for row in farm.table("analysis") if row["cell_id"] == cell_id]
    return {(row["layer"], row["role"], row["tensor"], row["statistic"]): row["value"] for row in rows}


def test_rows_and_metrics_of_cells(tiny: Path, tmp_path: Path) -> None:
    with mock.patch.object(analysis, "moments", wraps=moments) as counted:
        farm = run(tmp_path, tiny, "smoothquant+rtn", "w4a8")
    # Two cells of 14 layers: both sides of the weight once, and of input and output in each of three windows.
    assert counted.call_count == 2 * 14 * (2 + 3 * 4)
    base, found = figures(farm, "baseline"), figures(farm, "smoothquant+rtn")
    assert base.keys() == found.keys() and len(found) == 14 * (4 * 2 + 6 * 5)
    assert {value for key, value in base.items() if key[3] == "sqnr"} == {math.inf}
    sqnr = {key[:3]: value for key, value in found.items() if key[3] == "sqnr"}
    assert all(sqnr[i, role, "input"] > sqnr[i, role, "weight"] + 10 for i in range(2) for role in ("q", "up", "down"))
    assert sqnr[0, "q", "accumulated"] == math.inf  # nothing stands before the first layer
    assert sqnr[1, "down", "accumulated"] < sqnr[0, "o", "accumulated"]
    names = {row["cell_id"]: row["recipe"] for row in farm.table("cells")}
    metrics = {row["metric"]: row for row in farm.table("metrics") if names[row["cell_id"]] != "baseline"}
    outputs = [value for key, value in sqnr.items() if key[2] == "output"]
    assert metrics["sqnr_output"]["value"] == pytest.approx(sum(outputs) / 14)
    assert metrics["sqnr_output_worst"]["value"] == min(outputs)
    assert (metrics["sqnr_input"]["unit"], metrics["sqnr_input"]["n"]) == ("dB", 3)
    assert farm.table("documents") == []
    assert farm.session.loaded.model is not None and json.loads(metrics["sqnr_output"]["protocol"])["options"]


def test_a_quantized_cache_adds_to_the_accumulated_error_only(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Mistral's blocks have sliding windows; the cache is one per window of text."""
    farm = run(tmp_path, tiny_models["mistral"], "rtn", "w16kv3")
    found = figures(farm, "rtn")
    local = {value for key, value in found.items() if key[2] in ("weight", "input", "output") and key[3] == "sqnr"}
    assert local == {math.inf} and found[0, "v", "accumulated", "sqnr"] == math.inf
    assert found[0, "o", "accumulated", "sqnr"] < 30 > found[1, "q", "accumulated", "sqnr"]


def test_shown_by_role_and_whole(tiny: Path, tmp_path: Path) -> None:
    farm = run(tmp_path, tiny, "rtn", "w4a8")
    (cell_id,) = (row["cell_id"] for row in farm.table("cells") if row["recipe"] == "rtn")
    found = figures(farm, "rtn")
    text = show(farm.store, cell_id, width=120)
    section = text[text.index("SQNR in dB by layer, analysis python-docs 32 x3") :]
    lines = [line.split() for line in section.splitlines()]
    (q,) = (line for line in lines if line[:1] == ["q"])
    means = [
        mean_decibels(found[i, "q", tensor, "sqnr"] for i in range(2))
        for tensor in ("weight", "input", "output", "accumulated")
    ]
    last, peak = found[1, "q", "accumulated", "sqnr"], max(found[i, "q", "input", "kurtosis"] for i in range(2))
    assert q[1:] == [f"{value:#.3g}".rstrip(".") for value in (*means, last, peak)]
    worst = min((value, key[:2]) for key, value in found.items() if key[2:] == ("output", "sqnr"))[1]
    at = next(i for i, line in enumerate(lines) if line == ["worst", "outputs:"])
    assert lines[at + 2][:2] == [str(worst[0]), worst[1]]
    whole = json.loads(show_json(farm.store, cell_id[:6]))
    assert len(whole["analysis"]) == len(found) and len(whole["layers"]) == 14
    (base_id,) = (row["cell_id"] for row in farm.table("cells") if row["recipe"] == "baseline")
    exact = show(farm.store, base_id, width=120)
    assert " inf " in exact and "worst outputs" not in exact
    assert {row["value"] for row in json.loads(show_json(farm.store, base_id))["metrics"]} == {None}
    report = render(load(farm.store), width=200)
    assert "sqnr_output" in report and "3 windows; " in report


def test_label_and_options() -> None:
    evaluator = build_evaluator("analysis", {"text": "python-docs"})
    assert evaluator.label == "analysis python-docs 2048 x10"
    assert (evaluator.options()["length"], evaluator.options()["windows"]) == (2048, 10)
