"""CrossQuant: closed forms of the step, its two ends, the kernel, causality of each mode, the fold, cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.errors import NonFinite, QfarmError
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.install import install_sites
from qfarm.layers.kernel import KernelRemoved, kernel
from qfarm.layers.observe import observe
from qfarm.layers.rtn import Symmetric
from qfarm.layers.sites import Observed, Place
from qfarm.methods.crossquant import Cross, CrossQuant, fold_factors
from qfarm.models.load import LoadedModel
from qfarm.recipe import Recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY
from tests.job_example import changed, labels, matrix
from tests.test_layers_worker import run_all, values
from tests.test_models import loaded

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.manual_seed(0))
PROBE = torch.randint(0, 256, (2, 20), generator=torch.manual_seed(1))
PLACE = Place("linear_in", 0, "q")
every_family = pytest.mark.parametrize("family", TINY)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def outliers(seed: int = 0) -> Tensor:
    """One channel in a hundred is fifty times larger."""
    x = draw(1, 256, 400, seed=seed)
    x[..., :4] *= 50
    return x


@torch.no_grad()
def logits(model: LoadedModel, ids: Tensor = PROBE) -> Tensor:
    out: Tensor = model.model(ids).logits
    return out


# -- the quantizer ----------------------------------------------------------------------------------------------------


def test_closed_form() -> None:
    x = torch.tensor([[8.0, 1.0], [2.0, 4.0]])
    cross = Cross(bits=8, alpha=0.5)
    step = cross.step(x)
    torch.testing.assert_close(step * 127, torch.tensor([[8, 32**0.5], [32**0.5, 4]]))
    assert cross.codes(x, step).tolist() == [[127, 22], [45, 127]]
    torch.testing.assert_close(cross(x), torch.tensor([[127, 22], [45, 127]]) * step)


@pytest.mark.parametrize("bits", [4, 8])
def test_ends_are_per_token_and_per_channel_bit_for_bit(bits: int) -> None:
    x = draw(2, 30, 48) * torch.rand(48, generator=torch.manual_seed(1)) * 10
    assert torch.equal(Cross(bits=bits, alpha=1.0)(x), Symmetric(bits=bits)(x))
    per_channel = Symmetric(bits=bits)(x.transpose(1, 2)).transpose(1, 2)
    assert torch.equal(Cross(bits=bits, alpha=0.0)(x), per_channel)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 1.0])
def test_dynamic_codes_fit_before_they_are_clamped(alpha: float) -> None:
    x = outliers()
    cross = Cross(bits=8, alpha=alpha)
    quotient = x / cross.step(x)
    assert float(quotient.abs().max()) <= 127 * (1 + 1e-6)
    codes = cross.codes(x, cross.step(x)).abs()
    both = (x.abs() == x.abs().amax(-1, keepdim=True)) & (x.abs() == x.abs().amax(-2, keepdim=True))
    assert both.any() and bool((codes[both] == 127).all())


def test_scale_and_transpose() -> None:
    x = draw(1, 12, 20)
    cross = Cross(bits=6, alpha=0.3)
    assert torch.equal(cross.codes(4 * x, cross.step(4 * x)), cross.codes(x, cross.step(x)))
    turned = Cross(bits=6, alpha=0.7)(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(turned, cross(x))
    static = Cross(bits=6, alpha=0.3, columns=torch.ones(20))
    torch.testing.assert_close(static.step(4 * x), 4**0.3 * static.step(x))


def test_zeros_come_out_as_zeros() -> None:
    x = draw(1, 6, 8)
    x[:, 2], x[..., 5] = 0, 0
    for alpha in (0.0, 0.15, 1.0):
        out = Cross(bits=8, alpha=alpha)(x)
        assert torch.isfinite(out).all() and not out[:, 2].any() and not out[..., 5].any()
    silent = torch.ones(8)
    silent[1] = 0  # a channel that calibration never saw
    assert not Cross(bits=8, alpha=0.15, columns=silent)(x)[..., 1].any()


def test_not_a_number_is_not_hidden_and_dtypes_stay() -> None:
    x = draw(1, 6, 8)
    x[0, 1, 1] = float("nan")
    assert torch.isnan(Cross(bits=8, alpha=0.15)(x)[0, 1]).all()
    small = draw(1, 6, 8).half() * 1e-4
    out = Cross(bits=8, alpha=0.15)(small)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, small, rtol=0, atol=2e-6)


def test_the_kernel_shrinks_in_total_though_not_everywhere() -> None:
    x = outliers()
    cross, per_token = Cross(bits=8, alpha=0.15), Cross(bits=8, alpha=1.0)
    before, after = kernel(x, per_token), kernel(x, cross)
    assert before.share > 0.2 and after.share < 0.1 * before.share
    assert before == kernel(x, Symmetric(bits=8))
    assert bool((cross.step(x) > per_token.step(x)).any()), "where a channel's maximum exceeds the token's"
    error, plain = ((q(x) - x)[..., 4:].square().sum() for q in (cross, per_token))
    assert float(error) < 0.1 * float(plain)


def test_sequences_do_not_share_maxima_and_the_first_token_may_be_left_out() -> None:
    x = draw(2, 10, 16)
    x[0, 0] *= 1000
    whole = Cross(bits=8, alpha=0.15)(x)
    assert torch.equal(Cross(bits=8, alpha=0.15)(x[1:]), whole[1:])
    without = Cross(bits=8, alpha=0.15, skip_first=True)
    rest = (0, slice(1, None))
    assert float((without(x) - x)[rest].abs().sum()) < 0.1 * float((whole - x)[rest].abs().sum())
    assert torch.equal(without(x[:, :1]), Cross(bits=8, alpha=0.15)(x[:, :1])), "one token has nothing else"


def test_one_token_at_a_time_hides_the_error() -> None:
    """Why dynamic maxima are no model of decoding."""
    x = draw(1, 64, 32)
    together = float((Cross(bits=4, alpha=0.15)(x) - x).square().mean())
    alone = torch.cat([Cross(bits=4, alpha=0.15)(x[:, t : t + 1]) for t in range(64)], dim=1)
    assert float((alone - x).square().mean()) < 0.2 * together


# -- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.6])
def test_folded_steps_are_never_larger(alpha: float) -> None:
    x = outliers()[0]
    largest = x.abs().amax(0)
    factor = fold_factors(largest, alpha)
    folded = (x / factor).abs().amax(1, keepdim=True) / 127 * factor
    crossed = Cross(bits=8, alpha=alpha, columns=largest).step(x)
    assert bool((folded <= crossed * (1 + 1e-5)).all())
    assert alpha == 0 or bool((folded < 0.9 * crossed).any())


def test_factors_of_channels_that_say_nothing() -> None:
    largest = torch.tensor([0.0, 16.0, float("inf"), float("nan")])
    assert fold_factors(largest, 0.5).tolist() == [1.0, 4.0, 1.0, 1.0]


@every_family
def test_the_folded_model_computes_the_same(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    plain, weight = logits(model), model.linears(1)["down"].weight.clone()
    method = CrossQuant(mode="folded")
    observed = observe(model, WINDOWS, method.statistics())
    (note,) = method.transform(model, observed, 0)
    assert note.startswith("inputs of all linear layers divided by ")
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    assert not torch.equal(model.linears(1)["down"].weight, weight)
    with pytest.raises(QfarmError, match="^channel maxima are folded into the model already$"):
        method.transform(model, observed, 0)
    model.restore()
    assert torch.equal(logits(model), plain)
    assert CrossQuant().transform(model, {}, 0) == [] and torch.equal(logits(model), plain)


def test_what_does_not_fit_is_an_error(tiny: Path) -> None:
    model = loaded(tiny, "float16")
    sizes = {role: linear.in_features for role, linear in model.linears(0).items()}
    huge = {
        Place("linear_in", block, role): InputStatistics(tokens=1, max_abs=torch.full((size,), 1e12))
        for block in range(2)
        for role, size in sizes.items()
    }
    with pytest.raises(NonFinite, match="^linear_in of layer 0 q: a folded weight does not fit torch.float16$"):
        CrossQuant(mode="folded").transform(model, huge, 0)


# -- modes in a model -------------------------------------------------------------------------------------------------


def installed(model: LoadedModel, method: CrossQuant, scheme: str = "a8") -> bool | None:
    wanted = method.site_statistics()
    observed: Observed = observe(model, WINDOWS, wanted) if wanted else {}
    return install_sites(model, Recipe((method,)), parse_scheme(scheme), observed).causal


def moved(model: LoadedModel) -> float:
    """How far earlier predictions move when the last token changes."""
    other = PROBE.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    return float((logits(model, other) - logits(model))[:, :-1].abs().max())


@every_family
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_static_is_causal_and_dynamic_is_not(tiny_models: dict[str, Path], family: str, mode: Any) -> None:
    model = loaded(tiny_models[family])
    assert installed(model, CrossQuant(mode=mode), "a4") is (mode == "static")
    assert (moved(model) == 0) is (mode == "static")
    both, first = logits(model), logits(model, PROBE[:1])
    torch.testing.assert_close(both[:1], first, rtol=0, atol=1e-5)  # sequences of a batch do not see each other


def test_static_columns_are_those_of_calibration(tiny: Path) -> None:
    model = loaded(tiny)
    method = CrossQuant(mode="static", alpha=0.0)
    largest = observe(model, WINDOWS, frozenset({Statistic.MAX_ABS}))[PLACE].max_abs
    assert largest is not None
    quantize = method.quantizer(PLACE, 8, {PLACE: InputStatistics(tokens=1, max_abs=largest)})
    out = quantize((3 * largest).expand(1, 2, -1))
    torch.testing.assert_close(out, largest.expand(1, 2, -1), msg="what exceeds them clips")


def test_what_is_observed_and_when() -> None:
    maxima = frozenset({Statistic.MAX_ABS})
    for mode, transform, site in (("dynamic", set(), set()), ("static", set(), maxima), ("folded", maxima, set())):
        method = CrossQuant(mode=mode)  # type: ignore[arg-type]
        assert (method.statistics(), method.site_statistics()) == (transform, site)
        assert method.needs_text is (mode != "dynamic") is method.causal
    assert isinstance(CrossQuant(remove_only=True).quantizer(PLACE, 8, {}), KernelRemoved)


# -- plans and cells --------------------------------------------------------------------------------------------------


def test_plans() -> None:
    entries = "[crossquant, crossquant+gptq, awq+crossquant, smoothquant+crossquant, crossquant: {mode: static}]"
    found = matrix(changed(methods=entries, bits="[w8a8, w4a4]", group_sizes="[-1]"))
    assert found.invalid == () and len(labels(found)) == 10
    chains = {"crossquant w8a8", "crossquant+gptq w4a4", "crossquant+awq w4a4", "smoothquant+crossquant w4a4"}
    assert chains <= set(labels(found))
    by_label = {cell.label: cell for cell in found.cells}
    assert by_label["crossquant w8a8"].calibration is None and by_label["crossquant+gptq w8a8"].calibration
    assert by_label['crossquant (mode="static") w8a8'].seed == 0
    rules = [
        ("crossquant", "w4", "crossquant quantizes linear_in, which w4 leaves at 16 bits"),
        ("crossquant", "w4a3", "crossquant quantizes linear_in to 4..8 bits, not 3"),
        ("crossquant: {mode: static, skip_first: true}", "w8a8", "crossquant: skip_first is of mode: dynamic, not "),
    ]
    for entry, bits, rule in rules:
        (invalid,) = matrix(changed(methods=f"[crossquant, {entry}]", bits=f"[w8a8, {bits}]")).invalid[-1:]
        assert invalid.rule.startswith(rule)


JOB = """
models: [{model}]
methods:
  - rtn
  - crossquant
  - crossquant: {{mode: static}}
  - crossquant: {{mode: folded}}
  - crossquant: {{remove_only: true, alpha: 1.0}}
  - smoothquant+crossquant+gptq
bits: [w8a4]
symmetric: true
dtype: float32
calibration: {{text: python-docs, samples: 8, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 8}}]
resources: {{gpus: 0}}
"""


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cells_run(tmp_path: Path, tiny_models: dict[str, Path], family: str) -> None:
    farm = run_all(tmp_path, tiny_models[family], JOB)
    rows = {row["cell_id"]: row for row in farm.table("cells")}
    labels_of = {row["cell_id"]: row["label"] for row in farm.table("attempts")}
    kl = {labels_of[row["cell_id"]]: row["value"] for row in farm.table("metrics") if row["metric"] == "kl"}
    assert len(kl) == 6 and all(0 < value < 0.5 for value in kl.values()), kl
    assert kl["crossquant (alpha=1.0, remove_only=true) w8a4"] < kl["rtn w8a4"]
    causal = {labels_of[name]: row["causal"] for name, row in rows.items()}
    assert causal["crossquant w8a4"] is causal["smoothquant+crossquant+gptq w8a4"] is False
    assert causal['crossquant (mode="static") w8a4'] is causal['crossquant (mode="folded") w8a4'] is True
    assert values(farm, "kl")["smoothquant+crossquant+gptq", "w8a4"] > 0
    found = {labels_of[name]: row for name, row in rows.items()}
    plain, static = found["rtn w8a4"], found['crossquant (mode="static") w8a4']
    folded, removed = found['crossquant (mode="folded") w8a4'], found["crossquant (alpha=1.0, remove_only=true) w8a4"]
    # A float32 vector for each tensor that enters linear layers: of 64, 64, 64 and 128 channels in both blocks.
    assert static["activation_bytes"] == 2 * 4 * 320 and folded["activation_bytes"] == plain["activation_bytes"] == 0
    assert static["model_bytes"] == folded["model_bytes"] == plain["model_bytes"] + 2 * 4 * 320
    assert static["linear_bits"] == plain["linear_bits"] and static["model_bits"] > plain["model_bits"]
    assert (plain["activation_bits"], removed["activation_bits"], plain["payload_bits"]) == (4, 16, 8)
    shapes = [(row["rows"], row["columns"]) for row in farm.table("layers") if row["cell_id"] == plain["cell_id"]]
    parameters = 8 * plain["model_bytes"] / plain["model_bits"]
    assert plain["kept_share"] == pytest.approx(1 - sum(n * m for n, m in shapes) / parameters)
    assert found["baseline w16"]["kept_share"] == 1 and found["baseline w16"]["payload_bits"] is None
