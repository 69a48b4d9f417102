"""Act: each granularity and each way of clipping by hand, static ranges against what layers were fed, causality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.errors import InvalidInput
from qfarm.inputs import Collector, Statistic
from qfarm.layers.attention import add_to_sites
from qfarm.layers.install import install_sites
from qfarm.layers.observe import observe
from qfarm.layers.rtn import Asymmetric, Quantizer, Symmetric, Unsigned
from qfarm.layers.sites import Place
from qfarm.methods.act import Act
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid
from qfarm.recipe import Recipe, build_method
from qfarm.scheme import parse_scheme
from tests.job_example import changed, labels, matrix
from tests.test_models import loaded
from tests.test_worker import Farm, make_job

PLACE = Place("linear_in", 0, "q")
WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.manual_seed(0))
PROBE = torch.randint(0, 256, (2, 20), generator=torch.manual_seed(1))
STATIC: list[dict[str, Any]] = [
    {"mode": "static", "granularity": granularity, "clip": clip, "symmetric": symmetric}
    for granularity in ("tensor", "channel")
    for clip in ("none", "percentile", "mse")
    for symmetric in (True, False)
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Values with rare large ones."""
    return noise(*shape, seed=seed).pow(3)


def dynamic(bits: int = 4, **options: Any) -> Quantizer:
    return Act(**options).quantizer(PLACE, bits, {})


def static(inputs: Tensor, bits: int = 4, **options: Any) -> Quantizer:
    method = Act(mode="static", **options)
    collector = Collector(method.statistics(), tokens=inputs.numel() // inputs.shape[-1])
    for part in inputs.split(2):
        collector.add(part)
    return method.quantizer(PLACE, bits, {PLACE: collector.result()})


def power(error: Tensor) -> Tensor:
    return error.abs().pow(2.4).sum(-1)


# -- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8, 15])
def test_defaults_are_what_no_method_does(bits: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = heavy(2, 7, 16).to(dtype)
        assert torch.equal(dynamic(bits)(x), Symmetric(bits=bits)(x))
        assert torch.equal(dynamic(bits, symmetric=False)(x), Asymmetric(bits=bits)(x))


def test_closed_forms() -> None:
    x = torch.tensor([[-1, 0.3, 0.7, 0.9], [-1, 0, 0.45, 2]])
    torch.testing.assert_close(dynamic()(x)[0], torch.tensor([-7, 2, 5, 6]) / 7)
    torch.testing.assert_close(dynamic(symmetric=False)(x)[1], torch.tensor([-1, 0, 0.4, 2]))
    # The whole tensor: largest magnitude 1.6, step 1.6/7.
    whole = torch.stack([x[0], torch.tensor([0, 0.1, 0.2, 1.6])])
    expected = torch.tensor([[-4.0, 1, 3, 4], [0, 0, 1, 7]]) * 1.6 / 7
    torch.testing.assert_close(dynamic(granularity="tensor")(whole), expected)
    # Columns, 3 bits: largest magnitudes 1, 0.3, 0.7, 2, steps of a third.
    expected = torch.tensor([[-1.0, 0.3, 0.7, 2 / 3], [-1.0, 0, 0.7 * 2 / 3, 2]])
    torch.testing.assert_close(dynamic(3, granularity="channel")(x), expected)
    # Pairs: [-1, 0.3] and [0.7, 0.9], [-1, 0] and [0.45, 2].
    pairs = torch.tensor([[-1, 2 / 7, 5 * 0.9 / 7, 0.9], [-1, 0, 4 / 7, 2]])
    torch.testing.assert_close(dynamic(group_size=2)(x), pairs)


@pytest.mark.parametrize("options", [{}, {"clip": "mse"}, {"clip": "percentile"}, {"symmetric": False}])
def test_granularities_that_are_the_same(options: dict[str, Any]) -> None:
    row = heavy(1, 32)
    whole = dynamic(granularity="tensor", **options)(row)
    assert torch.equal(dynamic(**options)(row), whole)
    assert torch.equal(dynamic(group_size=32, **options)(row), whole)
    x = heavy(5, 8)
    assert torch.equal(dynamic(granularity="channel", **options)(x), dynamic(**options)(x.T.contiguous()).T)
    assert torch.equal(dynamic(granularity="tensor", **options)(x), dynamic(**options)(x.reshape(1, -1)).reshape(5, 8))


@pytest.mark.parametrize("clip", ["none", "percentile", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_sequences_of_a_batch_do_not_share_ranges(granularity: str, clip: str) -> None:
    x = heavy(3, 7, 16)
    x[1] *= 50
    quantize = dynamic(granularity=granularity, clip=clip)
    assert torch.equal(quantize(x), torch.stack([quantize(one) for one in x]))


def test_percentile_by_hand() -> None:
    """Of 1 .. 1000, 999 values are at or below 999; what is above is clipped to it."""
    x = torch.arange(1.0, 1001)[None]
    x[0, ::2] *= -1  # signs do not matter to a symmetric grid: -999 .. 1000
    out = dynamic(15, clip="percentile")(x)
    assert out.max().item() == pytest.approx(999) and out.min().item() == pytest.approx(-999)
    out = dynamic(15, clip="percentile", percentile=99.0, symmetric=False)(x)
    # 10 values may lie above the upper end, and 10 below the lower one.
    step = (980 + 979) / 2**15
    assert out.max().item() == pytest.approx(980, abs=step) and out.min().item() == pytest.approx(-979, abs=step)
    assert torch.equal(dynamic(clip="percentile", percentile=100.0)(x), dynamic()(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_is_that_of_weights(bits: int) -> None:
    x = heavy(6, 40)
    for symmetric in (True, False):
        grid = Grid(bits=bits, symmetric=symmetric, search=True, scale_dtype=torch.float32)
        expected = grid.quantize(x).dequantize()
        torch.testing.assert_close(dynamic(bits, clip="mse", symmetric=symmetric)(x), expected, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_search_never_hurts_what_it_minimises(seed: int, bits: int, symmetric: bool) -> None:
    x = heavy(4, 32, seed=seed)
    found = power(dynamic(bits, clip="mse", symmetric=symmetric)(x) - x)
    assert found.le(power(dynamic(bits, symmetric=symmetric)(x) - x) * (1 + 1e-5)).all()


@pytest.mark.parametrize("options", [*STATIC, {"granularity": "tensor"}, {"granularity": "channel"}, {"clip": "mse"}])
def test_invariants(options: dict[str, Any]) -> None:
    x = heavy(6, 5, 16)
    x[:, :, 3] = 0
    make = static if options.get("mode") == "static" else lambda _, **o: dynamic(**o)
    quantize = make(x, **{k: v for k, v in options.items() if k != "mode"})
    out = quantize(x)
    assert out.shape == x.shape and out.isfinite().all() and out[:, :, 3].eq(0).all()
    assert quantize(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert quantize(x[:0]).shape == (0, 5, 16)
    x[0, 0, 0] = float("nan")
    assert quantize(x)[0, 0, 0].isnan()


def test_values_of_one_sign_are_not_clipped() -> None:
    x = noise(4, 32).abs()
    out = dynamic()(x)
    assert (out - x).abs().le(x.amax(-1, keepdim=True) / 7 / 2 + 1e-6).all()


# -- static ranges ----------------------------------------------------------------------------------------------------


def test_extremes_of_calibration() -> None:
    x = heavy(6, 5, 16)
    flat = x.reshape(-1, 16)
    assert torch.equal(static(x, granularity="tensor")(flat), dynamic(granularity="tensor")(flat))
    assert torch.equal(static(x, granularity="channel")(flat), dynamic(granularity="channel")(flat))
    quantize = static(x, 8, granularity="channel", symmetric=False)
    beyond = torch.stack([flat.amin(0) - 5, flat.amax(0) + 5])
    inside = torch.stack([flat.amin(0), flat.amax(0)])
    torch.testing.assert_close(quantize(beyond), quantize(inside))
    step = (flat.amax(0).clamp(min=0) - flat.amin(0).clamp(max=0)) / 255
    assert (quantize(inside) - inside).abs().le(step).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["percentile", "mse"])
def test_clipping_of_a_tensor_takes_all_numbers_of_the_text(clip: str, symmetric: bool) -> None:
    """Massive tokens included; what the same tensor gets at once from dynamic ranges."""
    x = heavy(6, 5, 16).bfloat16()
    x[3, 2] *= 100
    options: dict[str, Any] = {"granularity": "tensor", "clip": clip, "symmetric": symmetric}
    flat = x.reshape(-1, 16)
    assert torch.equal(static(x, **options)(flat), dynamic(**options)(flat))


def test_clipping_of_channels_takes_the_sample_of_ordinary_tokens() -> None:
    """One token a thousand times larger than the others decides the extremes, and nothing else."""
    x = noise(64, 8)
    x[7] *= 1000
    ordinary = torch.cat([x[:7], x[8:]])
    fine = static(x, 8, granularity="channel", clip="percentile", percentile=100.0)
    coarse = static(x, 8, granularity="channel")
    errors = [float((quantize(ordinary) - ordinary).square().mean()) for quantize in (fine, coarse)]
    assert errors[0] < 1e-3 < errors[1]
    assert fine(x[7:8]).abs().max() <= ordinary.abs().max() * 1.01


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_ranges_are_those_of_the_layers_inputs(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    fed: list[Tensor] = []
    with model.temporary():
        model.on_restore(
            model.linears(1)["down"].register_forward_pre_hook(lambda _, args: fed.append(args[0].clone())).remove
        )
        model.body(WINDOWS)
    seen = observe(model, WINDOWS, frozenset({Statistic.RANGE}))[Place("linear_in", 1, "down")]
    flat = fed[0].reshape(-1, fed[0].shape[-1])
    torch.testing.assert_close(seen.low, flat.amin(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.high, flat.amax(0), rtol=1e-4, atol=1e-5)


# -- models and plans -------------------------------------------------------------------------------------------------


def install(model: LoadedModel, **options: Any) -> Any:
    method = Act(**options)
    observed = observe(model, WINDOWS, method.statistics()) if method.statistics() else {}
    return install_sites(model, Recipe((method,)), parse_scheme("a4"), observed)


@pytest.mark.parametrize(
    "options", [{}, {"group_size": 16}, {"granularity": "tensor"}, {"granularity": "channel"}, *STATIC]
)
def test_what_looks_across_tokens_says_so(tiny: Path, options: dict[str, Any]) -> None:
    model = loaded(tiny)
    made = install(model, **options)
    outputs = []
    for last in range(0, 256, 32):  # not every last token moves a range
        other = PROBE.clone()
        other[:, -1] = last
        with torch.no_grad():
            outputs.append(model.model(other).logits[:, :-1])
    assert all(torch.isfinite(output).all() for output in outputs)
    assert all(torch.equal(output, outputs[0]) for output in outputs) == made.causal
    assert made.causal == (options.get("mode") == "static" or options.get("granularity", "token") == "token")


def test_plans() -> None:
    def rule(options: str) -> str:
        (invalid,) = matrix(changed(methods=f"[act: {options}, rtn]", bits="[a8]", group_sizes="[-1]")).invalid
        return invalid.rule.removeprefix("act: ")

    assert rule("{mode: static}").startswith("static ranges are of a tensor or a channel; use granularity: tensor")
    assert rule("{percentile: 99.0}") == "percentile needs clip: percentile"
    assert rule("{group_size: 16, granularity: tensor}") == "group_size needs granularity: token"
    assert rule("{group_size: 100}") == "group_size: 100 does not divide the 256 inputs of q"
    assert rule("{group_size: 0}") == "group_size is -1 or at least 2, not 0"
    found = matrix(changed(methods="[act, gptq+act: {act: {mode: static, granularity: tensor}}]", bits="[w4a8]"))
    assert labels(found)[0] == "act w4a8 g64" and found.invalid == ()
    plain, calibrated = (cell for cell in found.cells if not cell.is_baseline)
    assert plain.calibration is None and plain.rounded == {"weight": 1} and calibrated.rounded == {}
    (invalid,) = matrix(changed(methods="[act, rtn]", bits="[w4]")).invalid
    assert invalid.rule == "act quantizes linear_in, which w4 leaves at 16 bits"


JOB = """
models: [{model}]
methods:
  - rtn
  - act
  - act: {{granularity: tensor}}
  - smoothquant+gptq+act: {{act: {{granularity: tensor, mode: static, clip: mse}}}}
  - gptq+act: {{act: {{granularity: tensor, mode: static, clip: percentile, symmetric: false}}}}
bits: [w8a8]
dtype: float32
calibration: {{text: python-docs, samples: 2, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 8}}]
resources: {{gpus: 0}}
"""


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cells(tmp_path: Path, tiny_models: dict[str, Path], family: str) -> None:
    farms = [Farm(tmp_path / str(i), make_job(tiny_models[family], JOB)) for i in range(2 if family == "llama" else 1)]
    for farm in farms:
        plan = farm.plan()
        assert plan.invalid == ()
        for index, planned in enumerate(plan.cells):
            outcome = farm.run(index)
            assert outcome.failure is None, f"{planned.cell.label}: {outcome.error}"
    values = [sorted((r["cell_id"], r["metric"], r["value"]) for r in farm.table("metrics")) for farm in farms]
    assert values[0] == values[-1]
    cells = {row["cell_id"]: row for row in farms[0].table("cells")}
    kl = {r["cell_id"]: r["value"] for r in farms[0].table("metrics") if r["metric"] == "kl"}
    assert len(kl) == 5 and all(0 < value < 1 for value in kl.values())
    by_recipe = {cells[key]["recipe"]: value for key, value in kl.items() if '"tensor"' not in cells[key]["spec"]}
    assert by_recipe["act"] == by_recipe["rtn"], "its defaults are what rtn does"
    marked = {row["causal"] for row in cells.values() if "tensor" in row["spec"] and "dynamic" in row["spec"]}
    assert marked == {False} and all(row["causal"] for row in cells.values() if "static" in row["spec"])


# -- sites in attention -----------------------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any]] = {
    "q": {"granularity": "tensor"},
    "k": {"pre_rope": True, "group_size": 8},
    "v": {"granularity": "channel", "symmetric": True},
    "probs": {},
}


def test_each_site_has_its_own_format(tiny: Path) -> None:
    """What attention multiplies in a running model, beside both stages of each format written out."""
    model = loaded(tiny)
    found: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(store: dict[str, Tensor], name: str) -> Quantizer:
        def function(x: Tensor) -> Tensor:
            store[name] = x
            return x

        return function

    keys: list[Tensor] = []
    model.key_maker(1).register_forward_hook(lambda module, args, output: keys.append(output))  # before the quantizer
    add_to_sites(model, 1, q=keep(inputs, "q"))
    values = model.linears(1)["v"].register_forward_hook(lambda module, args, out: inputs.update(v=out))
    install_sites(model, Recipe((Act(sites=FORMATS),)), parse_scheme("kv4q3p5"), {})  # type: ignore[arg-type]
    model.key_maker(1).register_forward_hook(lambda module, args, output: inputs.update(k=output))
    add_to_sites(model, 1, q=keep(found, "q"), v=keep(found, "v"), probs=keep(found, "probs"))
    with torch.no_grad():
        model.model(torch.arange(24).reshape(2, 12))
    values.remove()
    q = inputs["q"].reshape(2, -1)
    assert torch.equal(found["q"], Symmetric(bits=3)(q).reshape(found["q"].shape))
    key = keys[-1].reshape(2, 12, 2, 2, 8)  # heads of 16 in groups of 8
    assert torch.equal(inputs["k"], Asymmetric(bits=4)(key).reshape(inputs["k"].shape))
    v = inputs["v"].reshape(2, 12, 2, 16).permute(0, 2, 3, 1)
    assert torch.equal(found["v"], Symmetric(bits=4)(v).transpose(2, 3))
    assert torch.equal(found["probs"], Unsigned(bits=5)(found["probs"]))
    assert len(found["probs"].unique()) > 32  # a scale for each query
    model.restore()


def test_sites_enter_claims_identity_and_causality() -> None:
    plain, more = Act(), Act(sites={"k": {}, "probs": {}})
    assert plain.claims == {"linear_in"} and "sites" not in plain.identity() and plain.optional == frozenset()
    assert more.claims == {"linear_in", "kv_cache", "probs"} and more.identity()["sites"] == {"k": {}, "probs": {}}
    assert more.causal and not Act(sites={"v": {"granularity": "channel"}}).causal
    assert more.quantizer(Place("v", 0), 4, {}) is more.quantizer(Place("k_pre_rope", 0), 4, {}) is None
    found = matrix(changed(methods="[{act: {sites: {k: {}, v: {}}}}]", bits="[w4kv4, w4a8kv4, w4a8]"))
    assert labels(found) == [f'act (sites={{"k": {{}}, "v": {{}}}}) {bits} g64' for bits in ("w4kv4", "w4a8kv4")]
    assert [bad.rule for bad in found.invalid] == ["act quantizes kv_cache, which w4a8 leaves at 16 bits"]


@pytest.mark.parametrize(
    ("sites", "rule"),
    [
        ("q: {group_size: 24}", "sites: q: group_size: 24 does not divide the 64 numbers of a head"),
        ("q: {granularity: tensor, group_size: 8}", "sites: q: group_size needs granularity: token"),
        ("v: {pre_rope: true}", "sites: v: pre_rope is of keys"),
        ("k: {pre_rope: true, granularity: channel}", "sites: k: pre_rope goes with granularity: token or tensor"),
        ("probs: {group_size: 8}", "sites: probs: probabilities have no groups, since a row grows with the text"),
        ("q: {percentile: 99.0}", "sites: q: percentile needs clip: percentile"),
        ("q: {clip: percentile, percentile: 20.0}", "sites: q: percentile is above 50 and at most 100, not 20"),
    ],
)
def test_formats_that_cannot_be(sites: str, rule: str) -> None:
    (invalid,) = matrix(changed(methods=f"[rtn, {{act: {{sites: {{{sites}}}}}}}]", bits="[w4a8kv4q8p8]")).invalid
    assert invalid.rule == f"act: {rule}"


def test_unknown_sites_and_options_of_a_format_are_refused() -> None:
    for sites, fault in (({"keys": {}}, "sites.keys"), ({"k": {"bits": 4}}, 'unknown option "sites.k.bits"')):
        with pytest.raises(InvalidInput, match=fault):
            build_method("act", {"sites": sites})
