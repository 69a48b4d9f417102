"""SmoothQuant: closed forms of the factors, exactness of the fold in every family, what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.errors import NonFinite, QfarmError
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.install import install_sites
from qfarm.layers.observe import observe
from qfarm.layers.sites import Place
from qfarm.methods.smoothquant import SmoothQuant, factors
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid
from qfarm.recipe import Recipe, parse_recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY, save_tiny
from tests.job_example import CONFIG, changed, labels, matrix
from tests.test_models import loaded

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.manual_seed(0))
PROBE = torch.randint(0, 256, (2, 30), generator=torch.manual_seed(1))
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
def logits(model: LoadedModel, ids: Tensor = PROBE) -> Tensor:
    out: Tensor = model.model(ids).logits
    return out


def smooth(model: LoadedModel, windows: Tensor = WINDOWS, **options: Any) -> list[str]:
    (method,) = parse_recipe({"smoothquant": options}).transforms
    return method.transform(model, observe(model, windows, MAX), 0)


def weight_max(model: LoadedModel, block: int, group: tuple[str, ...]) -> Tensor:
    return torch.cat([model.linears(block)[role].weight.float() for role in group]).abs().amax(0)


# -- factors ----------------------------------------------------------------------------------------------------------


def test_closed_form() -> None:
    """a = [16, 1], w = [1, 4]: s = [4, 0.5], and both maxima become [4, 2]."""
    a, w = torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0])
    scale = factors(a, w, 0.5)
    assert scale.tolist() == [4.0, 0.5]
    assert (a / scale).tolist() == (w * scale).tolist() == [4.0, 2.0]
    assert (a / factors(a, w, 1.0)).tolist() == [1.0, 1.0]
    assert (w * factors(a, w, 0.0)).tolist() == [1.0, 1.0]


def test_factors_follow_the_scale_of_a_channel() -> None:
    draw = torch.manual_seed(0)
    a, w = torch.rand(8, generator=draw) + 0.1, torch.rand(8, generator=draw) + 0.1
    for alpha in (0.0, 0.3, 0.85):
        grown = factors(a * 100, w, alpha)
        torch.testing.assert_close(grown, factors(a, w, alpha) * 100**alpha)


def test_channels_that_say_nothing_are_left_alone() -> None:
    a = torch.tensor([0.0, float("inf"), float("nan"), 2.0])
    assert factors(a, torch.ones(4), 0.5).tolist() == [1.0, 1.0, 1.0, pytest.approx(2**0.5)]
    assert factors(torch.tensor([4.0]), torch.zeros(1), 0.5).item() == pytest.approx((4 / 1e-5) ** 0.5)


# -- the fold ---------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("options", [{}, {"alpha": 0.85}, {"down": True}, {"out": True}, {"down": True, "out": True}])
def test_the_model_computes_the_same(model: LoadedModel, options: dict[str, Any]) -> None:
    plain = logits(model)
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    notes = smooth(model, **options)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    assert len(notes) == 2 + len(options.keys() - {"alpha"})
    changed_names = {name for name, p in model.model.named_parameters() if not torch.equal(p, before[name])}
    allowed = {model.module_name(b, role) + ".weight" for b in range(2) for role in model.architecture.roles}
    untouched_roles = ({"o"} if "out" not in options else set()) | ({"down"} if "down" not in options else set())
    untouched = {model.module_name(b, role) + ".weight" for b in range(2) for role in untouched_roles}
    assert not changed_names & untouched and allowed - untouched <= changed_names
    beyond = {name for name in changed_names - allowed if "norm" not in name}
    producers = {"down": "up", "out": "v"}
    biases = {model.module_name(b, producers[o]) + ".bias" for b in range(2) for o in options.keys() & producers}
    assert beyond <= biases, "biases of smoothed linears, embeddings and head stay as they are"
    model.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_float32_in_half_precision(tiny: Path, dtype: torch.dtype) -> None:
    """The published code casts the maxima first, which moves a factor by 2^-9; only folded tensors are rounded here."""
    model = loaded(tiny)
    model.model.to(dtype)
    observed = observe(model, WINDOWS, MAX)
    group, norm = ("q", "k", "v"), model.norm(1, ("q", "k", "v"))
    activity = observed[Place("linear_in", 1, "q")].max_abs
    assert activity is not None and norm is not None
    exact = activity.double().pow(0.3) / weight_max(model, 1, group).double().pow(0.7)
    gain, weight = norm.weight.double(), model.linears(1)["q"].weight.double()
    scale = SmoothQuant(alpha=0.3).smooth(model, 1, group, observed)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), exact, rtol=1e-6, atol=0)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(norm.weight.double(), gain / exact, rtol=0.51 * unit, atol=0)
    torch.testing.assert_close(model.linears(1)["q"].weight.double(), weight * exact, rtol=0.51 * unit, atol=1e-7)


@every_family
def test_both_maxima_meet_at_one_half(model: LoadedModel) -> None:
    observed = observe(model, WINDOWS, MAX)
    groups = [group for group in model.architecture.shared_inputs if model.norm(0, group) is not None]
    expected = {}
    for group in groups:
        activity = observed[Place("linear_in", 1, group[0])].max_abs
        assert activity is not None
        expected[group] = (activity * weight_max(model, 1, group)).sqrt()
    smooth(model, alpha=0.5)
    again = observe(model, WINDOWS, MAX)
    for group in groups:
        torch.testing.assert_close(weight_max(model, 1, group), expected[group], rtol=1e-4, atol=1e-6)
        activity = again[Place("linear_in", 1, group[0])].max_abs
        torch.testing.assert_close(activity, expected[group], rtol=1e-3, atol=1e-5)


def test_query_heads_of_a_value_head_share_a_factor(tiny: Path) -> None:
    """Four query heads on two value heads: brute force over the heads that read a channel."""
    model = loaded(tiny)
    before = model.linears(0)["v"].weight.clone()
    activity = observe(model, WINDOWS, MAX)[Place("linear_in", 0, "o")].max_abs
    weights = weight_max(model, 0, ("o",))
    assert activity is not None
    width = model.head_dim
    smooth(model, alpha=0.5, out=True)
    # The fold into v comes after that into q, k, v, which only scales columns.
    scaled = model.linears(0)["v"].weight / before
    for channel in (0, 3, width, 2 * width - 1):
        head, place = divmod(channel, width)
        copies = [(2 * head + copy) * width + place for copy in range(2)]
        expected = (activity[copies].max() / weights[copies].max()).sqrt()
        others = scaled[0] / scaled[channel]  # the columns' factors cancel
        first = (activity[[0, width]].max() / weights[[0, width]].max()).sqrt()
        torch.testing.assert_close(others, (expected / first).expand_as(others), rtol=1e-4, atol=1e-5)


def test_a_running_maximum_does_not_depend_on_order_or_batches(tiny: Path) -> None:
    model = loaded(tiny)

    def maxima(windows: Tensor, **options: Any) -> Tensor:
        found = observe(model, windows, MAX, **options)[Place("linear_in", 1, "gate")].max_abs
        assert found is not None
        return found

    whole = maxima(WINDOWS)
    parts = torch.maximum(maxima(WINDOWS[:2]), maxima(WINDOWS[2:]))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maxima(WINDOWS.flip(0), batch_tokens=24), whole, rtol=1e-5, atol=1e-6)


def test_a_dead_channel_stays_finite_in_half_precision(tiny: Path) -> None:
    model = loaded(tiny, "float16")
    norm: Any = model.norm(0, ("q", "k", "v"))
    norm.weight[5] = 0
    smooth(model, alpha=0.9)
    assert torch.isfinite(torch.cat([p.flatten() for p in model.model.parameters()])).all()
    assert norm.weight[5] == 0 and torch.isfinite(logits(model)).all()


def test_what_does_not_fit_is_an_error(tiny: Path) -> None:
    model = loaded(tiny, "float16")
    faint = {
        Place("linear_in", block, role): InputStatistics(tokens=1, max_abs=torch.full((size,), 1e-30))
        for block in range(2)
        for role, size in {"q": 64, "k": 64, "v": 64, "gate": 64, "up": 64}.items()
    }
    with pytest.raises(NonFinite, match="^layer 0: a folded weight does not fit torch.float16$"):
        parse_recipe({"smoothquant": {"alpha": 1.0}}).transforms[0].transform(model, faint, 0)


def test_smoothing_twice_is_refused(tiny: Path) -> None:
    model = loaded(tiny)
    smooth(model)
    with pytest.raises(QfarmError, match="^the model is smoothed already$"):
        smooth(model)
    model.restore()
    smooth(model)


def test_models_that_cannot_be_smoothed_are_refused_in_the_plan() -> None:
    opt = CONFIG | {"model_type": "opt", "ffn_dim": 640, "do_layer_norm_before": False, "activation_function": "gelu"}
    (invalid,) = matrix(changed(methods="[smoothquant, rtn]", group_sizes="[-1]"), config=opt).invalid
    assert invalid.label == "smoothquant w4" and "post-norm" in invalid.rule
    opt["do_layer_norm_before"] = True
    found = matrix(changed(methods="[smoothquant, smoothquant: {down: true}]", group_sizes="[-1]"), config=opt)
    assert labels(found) == ["smoothquant w4"]
    assert [i.rule for i in found.invalid] == ["smoothquant: down: true needs a gated MLP or ReLU between up and down"]


def test_entries_with_other_options_are_other_cells() -> None:
    entries = "[smoothquant: {alpha: 0.3}, smoothquant: {alpha: 0.7}, smoothquant+gptq: {smoothquant: {alpha: 0.7}}]"
    found = matrix(changed(methods=entries, bits="[w8a8]", group_sizes="[-1]"))
    assert labels(found) == [
        "smoothquant (alpha=0.3) w8a8",
        "smoothquant (alpha=0.7) w8a8",
        "smoothquant+gptq (smoothquant.alpha=0.7) w8a8",
    ]
    assert len({cell.cell_id for cell in found.cells}) == 4 and found.invalid == ()
    assert all(cell.calibration and cell.seed == 0 for cell in found.cells if not cell.is_baseline)


# -- what it gains ----------------------------------------------------------------------------------------------------


def queries(model: LoadedModel) -> Tensor:
    """What the first block's query projection gives."""
    found: list[Tensor] = []
    with model.temporary():
        hook = model.linears(0)["q"].register_forward_hook(lambda module, args, output: found.append(output))
        model.on_restore(hook.remove)
        logits(model)
    return found[0]


def rounded_error(model: LoadedModel, plain: Tensor) -> float:
    """Mean squared error of the queries at w8a8, weights symmetric per channel."""
    grid = Grid(bits=8, symmetric=True)
    for block in range(len(model.blocks)):
        for linear in model.linears(block).values():
            model.replace_weight(linear, grid.quantize(linear.weight).dequantize())
    install_sites(model, Recipe(), parse_scheme("w8a8"), {})
    error = float((queries(model) - plain).square().mean())
    model.restore()
    return error


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_outlier_channel_stops_hurting(tmp_path: Path, family: str) -> None:
    model = loaded(save_tiny(tmp_path, family))
    for block in range(2):
        for group in model.architecture.norms:
            norm: Any = model.norm(block, group)
            norm.weight[7] *= 100
    plain = queries(model)
    before = rounded_error(model, plain)
    smooth(model)
    torch.testing.assert_close(queries(model), plain, rtol=0, atol=1e-4)
    assert rounded_error(model, plain) < 0.1 * before
