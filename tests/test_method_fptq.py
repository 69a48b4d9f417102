"""FPTQ: closed forms of the factors, the policy by range, exactness of the fold, static scales."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.install import install_sites
from qfarm.layers.observe import observe
from qfarm.layers.rtn import Symmetric
from qfarm.layers.sites import Place
from qfarm.layers.static import StaticSymmetric
from qfarm.methods.fptq import FPTQ, factors
from qfarm.models.load import LoadedModel
from qfarm.recipe import Recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY
from tests.job_example import CONFIG, changed, labels, matrix
from tests.test_models import loaded
from tests.test_worker import Farm, make_job

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.manual_seed(0))
MAX = frozenset({Statistic.MAX_ABS})
every_family = pytest.mark.parametrize("family", TINY)


@pytest.fixture
def model(tiny_models: dict[str, Path], family: str) -> LoadedModel:
    """With norms that are not all ones, some of them negative, and biases that are not zero."""
    made = loaded(tiny_models[family])
    draw = torch.manual_seed(3)
    for name, parameter in made.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5 + ("norm" in name) * 0.3)
    return made


@torch.no_grad()
def logits(model: LoadedModel) -> Tensor:
    out: Tensor = model.model(WINDOWS).logits
    return out


def largest(model: LoadedModel, block: int, role: str) -> Tensor:
    found = observe(model, WINDOWS, MAX)[Place("linear_in", block, role)].max_abs
    assert found is not None
    return found


# -- the factors ------------------------------------------------------------------------------------------------------


def test_closed_form() -> None:
    m = torch.tensor([2.0, 6.0, 14.0])
    assert factors(m).tolist() == [1.0, 2.0, 3.5]
    assert (m / factors(m)).tolist() == [2.0, 3.0, 4.0]


def test_factors_rise_and_new_maxima_are_concave_and_closer_together() -> None:
    m = torch.linspace(0.05, 150, 500, dtype=torch.float64)
    s, new = factors(m), m / factors(m)
    torch.testing.assert_close(new, torch.log2(2 + m))
    assert bool((s.diff() > 0).all() and (new.diff() > 0).all() and (new.diff().diff() < 0).all())
    assert bool((new[1:] / new[:-1] < m[1:] / m[:-1]).all())


def test_channels_that_say_nothing_keep_their_scale() -> None:
    """Dividing by zero would make the norm infinite; quiet channels grow to 1, as they are meant to."""
    m = torch.tensor([0.0, math.inf, math.nan, 1e-3])
    s = factors(m)
    assert s[:3].tolist() == [1.0, 1.0, 1.0] and float(m[3] / s[3]) == pytest.approx(1.0, abs=1e-3)


# -- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "policy"),
    [
        (14.9, "static"),
        (15.0, "static"),
        (15.1, "equalised"),
        (149.0, "equalised"),
        (150.0, "per token"),
        (151.0, "per token"),
    ],
)
def test_policy_by_range(tiny: Path, top: float, policy: str) -> None:
    """On real layers: the first norm is made to give a largest |x| of `top`."""
    model = loaded(tiny)
    norm: Any = model.norm(0, ("q", "k", "v"))
    norm.weight *= top / float(largest(model, 0, "q").max())
    measured = float(largest(model, 0, "q").max())
    assert measured == pytest.approx(top, rel=1e-5)
    if top in (15.0, 150.0):  # rounding must not decide
        norm.weight *= 1 - 1e-5 if top == 15.0 else 1 + 1e-5
    method = FPTQ()
    notes = method.transform(model, observe(model, WINDOWS, MAX), 0)
    assert notes[0].startswith(f"largest |x| at q, k, v by layer: {top:.3g} {policy}, ")
    observed = observe(model, WINDOWS, MAX)
    for role in ("q", "k", "v"):
        made = method.quantizer(Place("linear_in", 0, role), 8, observed)
        assert isinstance(made, Symmetric if policy == "per token" else StaticSymmetric)
    assert ((0, ("q", "k", "v")) in model.divided) == (policy == "equalised")
    model.restore()
    assert model.divided == {}


def test_the_policy_is_decided_once(tiny: Path) -> None:
    """The notes say what is installed, though a fold moved a layer's largest input over a threshold."""
    model = loaded(tiny)
    method = FPTQ(v0=float(largest(model, 0, "down").max()), v1=1e9)
    notes = method.transform(model, observe(model, WINDOWS, MAX), 0)
    assert next(note for note in notes if " at down " in note).split(": ")[1].split(", ")[0].endswith(" static")
    up = model.linears(0)["up"]
    model.replace_weight(up, up.weight * 1.001)
    observed = observe(model, WINDOWS, MAX)
    assert float(observed[Place("linear_in", 0, "down")].max_abs.max()) > method.v0  # type: ignore[union-attr]
    assert isinstance(method.quantizer(Place("linear_in", 0, "down"), 8, observed), StaticSymmetric)
    model.restore()
    assert model.decided == {}


def test_layers_without_a_norm_are_per_token_inside_the_band() -> None:
    method, place = FPTQ(), Place("linear_in", 0, "down")
    for top, kind in ((14.0, StaticSymmetric), (100.0, Symmetric), (1000.0, Symmetric)):
        observed = {place: InputStatistics(max_abs=torch.tensor([1.0, top]))}
        assert isinstance(method.quantizer(place, 8, observed), kind)


# -- the fold ---------------------------------------------------------------------------------------------------------


@every_family
def test_the_model_computes_the_same(model: LoadedModel) -> None:
    plain = logits(model)
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    FPTQ(v0=0.01, v1=1000.0).transform(model, observe(model, WINDOWS, MAX), 0)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    changed_names = {name for name, p in model.model.named_parameters() if not torch.equal(p, before[name])}
    assert len([name for name in changed_names if "norm" not in name]) == 2 * sum(map(len, model.architecture.norms))
    model.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())


@every_family
def test_the_static_scale_is_that_of_the_equalised_input(model: LoadedModel) -> None:
    m = largest(model, 1, "up")
    method = FPTQ(v0=0.01, v1=1000.0)
    method.transform(model, observe(model, WINDOWS, MAX), 0)
    made = method.quantizer(Place("linear_in", 1, "up"), 8, observe(model, WINDOWS, MAX))
    assert isinstance(made, StaticSymmetric)
    expected = float(torch.where(m > 0, torch.log2(2 + m), 0.0).max()) / 127
    assert made.scale == pytest.approx(expected, rel=1e-4)


def test_weights_have_no_part_in_the_factors(tiny: Path) -> None:
    found = []
    for factor in (1.0, 7.0):
        model = loaded(tiny)
        model.linears(0)["q"].weight.mul_(factor)
        observed = observe(model, WINDOWS, MAX)
        FPTQ(v0=0.01).transform(model, observed, 0)
        found.append(model.divided[0, ("q", "k", "v")])
    assert torch.equal(*found)


# -- static ranges ----------------------------------------------------------------------------------------------------


def test_what_lies_beyond_a_static_range_is_clipped_and_counted() -> None:
    quantize = StaticSymmetric(bits=8, largest=12.7)
    x = torch.tensor([12.7, -12.7, 0.1, 0.149, 20.0, -99.0])
    assert quantize.scale == pytest.approx(0.1)
    torch.testing.assert_close(quantize(x), torch.tensor([12.7, -12.7, 0.1, 0.1, 12.7, -12.7]))
    assert (quantize.clipped.numbers, quantize.clipped.beyond) == (6, 2)
    assert FPTQ().report({Place("linear_in", 0, "q"): quantize}) == ["fptq: numbers beyond static ranges: q 33.3 %"]
    assert FPTQ().report({Place("linear_in", 0, "q"): Symmetric(bits=8)}) == []


def test_a_range_of_zero_and_what_is_not_finite() -> None:
    quantize = StaticSymmetric(bits=8, largest=0.0)
    assert quantize(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert math.isnan(StaticSymmetric(bits=8, largest=1.0)(torch.tensor([math.nan])).item())


@every_family
def test_equalising_helps_where_channels_differ(model: LoadedModel) -> None:
    """Static per tensor with and without, the worst channels 60 times the others."""
    norm: Any = model.norm(0, ("q", "k", "v"))
    norm.weight[::16] = 60.0
    if getattr(norm, "bias", None) is not None:
        nn.init.zeros_(norm.bias)
    plain = logits(model)
    error = {}
    for name, method in (("static", FPTQ(v0=1e6, v1=1e6)), ("equalised", FPTQ(v0=1.0, v1=1e6))):
        method.transform(model, observe(model, WINDOWS, MAX), 0)
        install_sites(model, Recipe((method,)), parse_scheme("w16a6"), observe(model, WINDOWS, MAX))
        error[name] = float((logits(model) - plain).square().mean())
        model.restore()
    assert error["equalised"] < 0.5 * error["static"]


# -- cells ------------------------------------------------------------------------------------------------------------


def test_refused_at_plan_time() -> None:
    job = changed(methods="[{fptq: {v0: 20.0, v1: 10.0}}, rtn]", bits="[w4a8]")
    assert [bad.rule for bad in matrix(job).invalid] == ["fptq: v0 must not be above v1, got 20 and 10"]
    post_norm = CONFIG | {
        "model_type": "opt",
        "ffn_dim": 640,
        "do_layer_norm_before": False,
        "activation_function": "relu",
    }
    assert "post-norm" in matrix(changed(methods="[fptq, rtn]", bits="[w4a8]"), config=post_norm).invalid[0].rule
    idle = matrix(changed(methods="[fptq, rtn]", bits="[w4]")).invalid
    assert [bad.rule for bad in idle] == ["fptq quantizes linear_in, which w4 leaves at 16 bits"]
    assert labels(matrix(changed(methods="[fptq, fptq+gptq]", bits="[w4a8kv8]", symmetric="true"))) == [
        "fptq w4a8kv8 g64",
        "fptq+gptq w4a8kv8 g64",
    ]


JOB = """
models: [{model}]
methods: [fptq: {{v0: 2.0, v1: 3.5}}, fptq+gptq: {{fptq: {{v0: 2.0, v1: 3.5}}}}]
bits: [w4a8]
group_sizes: [32]
symmetric: true
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 6}}]
resources: {{gpus: 0}}
"""


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cells_run_and_are_repeatable(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    farms = [Farm(tmp_path / str(i), make_job(tiny_models[family], JOB)) for i in range(2)]
    for farm in farms:
        for index in range(3):
            outcome = farm.run(index)
            assert outcome.failure is None, outcome.error
    kl = [{row["cell_id"]: row["value"] for row in f.table("metrics") if row["metric"] == "kl"} for f in farms]
    assert kl[0] == kl[1] and len(kl[0]) == 2 and min(kl[0].values()) > 0
    notes = [note for row in farms[0].table("attempts") for note in json.loads(row["notes"])]
    assert any(note.startswith("fptq: largest |x| at q, k, v by layer: ") for note in notes)
    assert any(note.startswith("fptq: numbers beyond static ranges: ") for note in notes)
    assert {row["causal"] for row in farms[0].table("cells") if row["recipe"] != "baseline"} == {True}
    assert {row["linear_bits"] for row in farms[0].table("cells") if row["scheme"] == "w4a8"} == {4 + 16 / 32}
