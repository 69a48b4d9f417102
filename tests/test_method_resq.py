"""ResQ: eigenbases, subspaces, both widths at every site, exactness, exact bits, GPTQ on its grid, what it gains."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.errors import QfarmError
from qfarm.hadamard import random_orthogonal
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.cache import SimulatedLayer
from qfarm.layers.clipped import ClippedAsymmetric, TwoWidths
from qfarm.layers.inject import install_cache
from qfarm.layers.install import install_sites
from qfarm.layers.observe import observe
from qfarm.layers.sites import Observed, Place
from qfarm.methods.gptq import GPTQ
from qfarm.methods.resq import ResQ, eigenbasis, heads_of
from qfarm.mixed import MixedGrid, MixedWeight, high_columns
from qfarm.models.architecture import linear_shapes
from qfarm.models.load import LoadedModel
from qfarm.plan import statistics_key
from qfarm.quantized import payload_bits
from qfarm.quantizer import Grid
from qfarm.recipe import parse_recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY, save_tiny
from tests.job_example import CONFIG, changed, labels, matrix
from tests.test_fuse import PROBE, lively, logits
from tests.test_layers_worker import JOB, METHODS, run_all, values
from tests.test_models import loaded

MOMENTS = frozenset({Statistic.HESSIAN})
UNROUNDED = [functools.partial(SimulatedLayer, None, None)] * 2  # layers of a cache that turn keys and round nothing
PLAIN = Grid(bits=4, symmetric=True, search=True)


def spectrum(name: str, n: int = 256) -> Tensor:
    """Activations [2048, n] in an unknown basis."""
    draw = torch.manual_seed(0)
    x = torch.randn(2048, n, generator=draw)
    if name == "flat":
        return x
    if name == "power":
        scale = 1 / torch.arange(1, n + 1).float()
        return (x * scale) @ random_orthogonal(n, draw).float()
    x[:, :4] *= 30
    return x


# -- bases ------------------------------------------------------------------------------------------------------------


def test_principal_directions() -> None:
    x = spectrum("power", 64).double()
    moment = x.T @ x / len(x)
    lowest_first, principal = eigenbasis(moment, 0.01)
    eye = torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(principal.T @ principal, eye, rtol=0, atol=1e-10)
    assert bool((lowest_first.diff() >= 0).all())
    damped = moment + 0.01 * moment.diagonal().mean() * eye
    torch.testing.assert_close(principal @ torch.diag(lowest_first) @ principal.T, damped, rtol=0, atol=1e-10)
    trailing = torch.trace(principal[:, -8:].T @ moment @ principal[:, -8:])
    for seed in range(20):
        other = random_orthogonal(64, torch.Generator().manual_seed(seed))[:, :8]
        assert float(trailing) > float(torch.trace(other.T @ moment @ other))


def test_rotations_stay_inside_the_subspaces() -> None:
    inside = ResQ().rotations(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(inside @ inside.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not inside[:56, 56:].any() and not inside[56:, :56].any()
    principal = random_orthogonal(64, torch.Generator().manual_seed(1))
    kept = (principal @ inside)[:, 56:]
    torch.testing.assert_close(kept @ kept.T, principal[:, 56:] @ principal[:, 56:].T, rtol=0, atol=1e-10)
    whole = ResQ(fraction=0).rotations(16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole @ whole.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)


def test_moments_of_single_heads() -> None:
    x = torch.randn(50, 3 * 4, generator=torch.manual_seed(0), dtype=torch.float64)
    apart = heads_of(x.T @ x, 4)
    for head in range(3):
        own = x[:, 4 * head : 4 * head + 4]
        torch.testing.assert_close(apart[head], own.T @ own)


def relative_error(x: Tensor, basis: Tensor, quantize: Any) -> float:
    return float((quantize(x @ basis) @ basis.T - x).norm() / x.norm())


@pytest.mark.parametrize(("name", "gain"), [("flat", 0.98), ("power", 0.7), ("outliers", 0.35)])
def test_eight_bits_belong_to_the_strong_directions(name: str, gain: float) -> None:
    """Against a plain rotation at 4 bits, and against the same basis with the 8 bits at its weak end."""
    x = spectrum(name)
    method = ResQ()
    four, mixed = ClippedAsymmetric(bits=4), method.quantizer(Place("linear_in", 0, "q"), 4, {})
    draw = torch.Generator().manual_seed(1)
    plain = relative_error(x, random_orthogonal(256, draw).float(), four)
    principal = eigenbasis((x.T @ x).double(), 0.01)[1]
    inside = method.rotations(256, draw)
    ours, reverse = (relative_error(x, (basis @ inside).float(), mixed) for basis in (principal, principal.flip(1)))
    assert ours < gain * plain
    if name != "flat":
        assert reverse > 0.9 * plain


# -- weights ----------------------------------------------------------------------------------------------------------


def test_columns_of_both_widths() -> None:
    assert torch.nonzero(high_columns(16, 0.125, 0))[:, 0].tolist() == [14, 15]
    assert torch.nonzero(high_columns(16, 0.25, 8))[:, 0].tolist() == [6, 7, 14, 15]
    assert not high_columns(16, 0.0, 0).any() and int(high_columns(896, 0.125, 0).sum()) == 112


def test_each_part_of_a_row_is_rounded_on_its_own() -> None:
    weight = torch.randn(6, 32, generator=torch.manual_seed(0))
    grid = ResQ().provide(Grid(bits=4), "o", 8)
    assert grid == MixedGrid(bits=4, symmetric=True, search=True, high_bits=8, fraction=0.125, unit=8)
    made, mask = grid.nearest(weight), high_columns(32, 0.125, 8)
    values_ = made.dequantize()
    assert torch.equal(values_[:, ~mask], PLAIN.quantize(weight[:, ~mask]).dequantize())
    fine = Grid(bits=8, symmetric=True, search=True).quantize(weight[:, mask])
    assert torch.equal(values_[:, mask], fine.dequantize())
    down = ResQ().provide(Grid(bits=4), "down", 8).nearest(weight)
    assert down.high is None and torch.equal(down.dequantize(), PLAIN.quantize(weight).dequantize())


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_on_its_grid(act_order: bool) -> None:
    """With an identity Hessian it rounds to nearest; with correlated inputs the output error falls."""
    draw = torch.manual_seed(0)
    weight, x = torch.randn(12, 32, generator=draw), torch.randn(400, 32, generator=draw)
    grid = ResQ(search=False).provide(Grid(bits=4), "q", 8)
    solver = GPTQ(act_order=act_order)
    eye = InputStatistics(tokens=32, hessian=torch.eye(32), sample=torch.eye(32))
    nearest = grid.nearest(weight)
    made = solver.quantize_linear(weight, eye, grid)
    assert isinstance(made, MixedWeight) and torch.equal(made.dequantize(), nearest.dequantize())
    assert made.solver == "gptq+resq" and made.stored_bytes() == nearest.stored_bytes()
    x = x @ torch.randn(32, 32, generator=draw)
    real = InputStatistics(tokens=400, hessian=x.T @ x / 400, sample=x)
    made = solver.quantize_linear(weight, real, grid)
    error, bound = (float(((weight - q.dequantize()) @ x.T).square().sum()) for q in (made, nearest))
    assert error < 0.7 * bound
    steps = made.dequantize()[:, :28] / made.low.scale.float()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_bits_of_a_large_model() -> None:
    """Llama-3-8B: 4.5 bits at mixed layers, 4 at down, 4.365 on average, and the scales on top."""
    llama = CONFIG | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    payload = stored = weights = 0.0
    for role, (rows, columns) in linear_shapes(llama | {"num_key_value_heads": 8}, "x").items():
        made = ResQ().provide(Grid(bits=4), role, 128).nearest(torch.zeros(1, columns))
        scales = 16 * (1 if made.high is None else 2)
        stored += rows * made.stored_bytes() * 8
        assert payload_bits(made) * columns == made.stored_bytes() * 8 - scales
        assert payload_bits(made) == (4 if role == "down" else 4.5)
        payload += rows * columns * payload_bits(made)
        weights += rows * columns
    assert payload / weights == pytest.approx(4.365, abs=1e-3) and stored / weights == pytest.approx(4.371, abs=1e-3)


# -- the whole of it --------------------------------------------------------------------------------------------------


def observed_of(model: LoadedModel, method: ResQ) -> Observed:
    with model.temporary():
        method.prepare(model)
        return observe(model, PROBE, MOMENTS, sites=method.learns_from)


@pytest.mark.parametrize("family", TINY)
def test_the_model_computes_the_same(tiny_models: dict[str, Path], family: str) -> None:
    model, method = lively(loaded(tiny_models[family])), ResQ(pre_rotation_8bit=False)
    plain = logits(model)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    notes = method.transform(model, observed_of(model, method), 0)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    install_cache(model, UNROUNDED)  # U_C, online
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    assert notes[0].startswith("hidden states: 8 of 64 directions hold ") and len(model.turns) == 2
    model.restore()
    assert all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    assert torch.equal(logits(model), plain) and not model.turns


def test_keys_and_queries_are_turned_alike() -> None:
    matrix_ = random_orthogonal(16, torch.Generator().manual_seed(0))
    draw = torch.manual_seed(0)
    q, k = torch.randn(5, 16, generator=draw), torch.randn(7, 16, generator=draw)
    exact = ResQ(pre_rotation_8bit=False).turn(matrix_)
    torch.testing.assert_close(exact.forward(k), (k.double() @ matrix_).float())
    torch.testing.assert_close(exact.back(exact.forward(k)), k)
    assert exact.queries is None
    turn = ResQ().turn(matrix_)
    assert turn.queries == ClippedAsymmetric(bits=8)
    step = float(matrix_.abs().max()) / 127
    coded = turn.forward(torch.eye(16) * 255.0) / 255  # at 8 bits rows of the identity are exact
    torch.testing.assert_close(coded / step, (coded / step).round(), rtol=0, atol=1e-2)
    # (q8 U)(k8 U)^T, as attention finds it from what the cache hands back.
    scores = turn.queries(q) @ turn.back(turn.forward(k)).T
    expected = (turn.queries(q) @ coded) @ turn.forward(k).T
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert float((scores - q @ k.T).abs().max()) < 0.3


def test_greedy_text_is_the_same_with_sixteen_bits_in_the_cache(tiny: Path) -> None:
    model, method = lively(loaded(tiny)), ResQ(pre_rotation_8bit=False)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    plain = model.model.generate(PROBE, **options)
    method.transform(model, observed_of(model, method), 0)
    install_cache(model, UNROUNDED)
    assert torch.equal(model.model.generate(PROBE, **options), plain)


def test_what_each_input_gets(tiny: Path) -> None:
    method = ResQ()
    for role, through in (("q", True), ("gate", True), ("o", False)):
        low, high = (ClippedAsymmetric(bits=bits, through_zero=through) for bits in (3, 8))
        assert method.quantizer(Place("linear_in", 0, role), 3, {}) == TwoWidths(low=low, high=high, fraction=0.125)
    assert method.quantizer(Place("linear_in", 0, "down"), 3, {}) == ClippedAsymmetric(bits=3)
    model = loaded(tiny)
    given: list[Tensor] = []
    install_sites(model, parse_recipe("resq"), parse_scheme("w4a4"), {})
    o: Any = model.linears(0)["o"]
    x = torch.randn(2, 3, 64, generator=torch.manual_seed(0))
    given.append(o.quantize(x))
    expected = method.quantizer(Place("linear_in", 0, "o"), 4, {})
    heads = ResQ().quantizer(Place("linear_in", 0, "o"), 4, {})(x.reshape(2, 3, 4, 16)).reshape(x.shape)
    assert torch.equal(given[0], heads) and expected != method


def test_no_part_in_eight_bits_or_nothing_else() -> None:
    """No high part: QuaRot's grids in a principal basis; no low part: plain grids of 8 bits."""
    x = torch.randn(4, 64, generator=torch.manual_seed(0))
    place = Place("linear_in", 0, "q")
    four, eight = (ClippedAsymmetric(bits=bits) for bits in (4, 8))
    assert torch.equal(ResQ(fraction=0).quantizer(place, 4, {})(x), four(x))
    assert torch.equal(TwoWidths(low=four, high=eight, fraction=1)(x), eight(x))
    whole = MixedGrid(bits=4, symmetric=True, search=True, fraction=1).nearest(x)
    assert torch.equal(whole.dequantize(), Grid(bits=8, symmetric=True, search=True).quantize(x).dequantize())
    assert payload_bits(whole) == 8
    layer: Any = ResQ(fraction=0).cache_layer(0, 4, {})()
    layer.update(x.reshape(1, 1, 4, 64), x.reshape(1, 1, 4, 64))
    assert not any("high" in name for name in layer.state)


def test_refusals_come_with_the_plan() -> None:
    found = matrix(changed(methods="[resq, rtn]", bits="[w4a4kv4, w8a8]", group_sizes="[-1, 64]"))
    assert labels(found) == ["resq w4a4kv4", "rtn w4a4kv4", "rtn w4a4kv4 g64", "rtn w8a8", "rtn w8a8 g64"]
    rules = {invalid.label: invalid.rule for invalid in found.invalid}
    assert rules["resq w4a4kv4 g64"] == "resq: each part of a row has one scale; use group size -1"
    assert rules["resq w8a8"] == "resq quantizes linear_in to 2..7 bits, not 8"
    entries = "[rtn, resq+gptq: {gptq: {search: true}}, smoothquant+resq, resq: {fraction: 0.1}]"
    found = matrix(changed(methods=entries, bits="[w4a4kv4]", group_sizes="[-1]"))
    assert labels(found) == ["rtn w4a4kv4"] and [invalid.rule for invalid in found.invalid] == [
        "resq: gptq's option search is of uniform grids; leave it out beside resq",
        "resq: it folds the norms and rotates all channels, which smoothquant acts on as well; choose one of them",
        "resq: fraction 0.1 of heads of 64 is no whole number of coordinates",
    ]


def test_statistics_of_other_transforms_are_not_reused() -> None:
    job = changed(methods="[gptq, resq+gptq, quarot+gptq]", group_sizes="[-1]", statistics="independent")
    cells = matrix(job).cells
    keys = {statistics_key(cell) for cell in cells if not cell.is_baseline}
    assert len(keys) == 3


def test_a_model_that_is_open_is_not_rotated(tiny: Path) -> None:
    model, method = loaded(tiny), ResQ()
    observed = observed_of(model, method)
    method.transform(model, observed, 0)
    with pytest.raises(QfarmError, match="^the model is rotated already$"):
        method.transform(model, observed, 0)


def test_the_worker_runs_it_far_ahead_of_rounding_to_nearest(tmp_path: Path) -> None:
    """Hidden states with strong directions, which is what real models have."""
    model = loaded(save_tiny(tmp_path / "model", "llama"))
    strong = random_orthogonal(64, torch.Generator().manual_seed(5))[:, :3].float()
    table = model.model.get_input_embeddings().weight
    table.add_(torch.randn(260, 3, generator=torch.manual_seed(6)) * 8 @ strong.T * 0.15)
    model.model.save_pretrained(tmp_path / "model")
    job = JOB.replace(METHODS, "[rtn, resq, resq+gptq]").replace("[w8a8, w4a8, w4a16, w4kv4, w8a8kv4]", "[w4a4kv4, w4]")
    farm = run_all(tmp_path / "store", tmp_path / "model", job + "symmetric: true\n")
    kl = values(farm, "kl")
    assert 0 < kl["resq+gptq", "w4a4kv4"] < kl["resq", "w4a4kv4"] < 0.6 * kl["rtn", "w4a4kv4"]
    rows = {(row["recipe"], row["scheme"]): row for row in farm.table("cells")}
    row, plain = rows["resq", "w4a4kv4"], rows["rtn", "w4a4kv4"]
    # Heads of 16: 14 numbers at 4 bits and 2 at 8, each padded to eights; two scales, and zeros of a byte for keys, of
    # two for values.
    assert row["kv_bits"] == (16 * 4 + 8 * 8) / 16 + (2 * 16 + (2 * 8 + 2 * 16) / 2) / 16
    extra = 2 * (16 * 16 + 2) + 260 * 64 * 4  # U_C, and the head's own weight
    linear = row["linear_bytes"] - plain["linear_bytes"]
    assert row["model_bytes"] - plain["model_bytes"] == extra + linear
    assert rows["resq", "w4"]["model_bytes"] == row["model_bytes"] - 2 * (16 * 16 + 2)
    # By block: 64 x (64 + 2 x 32 + 64 + 2 x 128) weights in two widths and 64 x 128 in one; inputs of 3 x 64 and 128.
    assert row["payload_bits"] == pytest.approx((4.5 * 448 + 4 * 128) / 576, rel=1e-12)
    assert row["activation_bits"] == (4.5 * 192 + 4 * 128) / 320 and plain["activation_bits"] == 4
    layers = [layer for layer in farm.table("layers") if layer["cell_id"] == row["cell_id"]]
    assert {layer["solver"] for layer in layers} == {"resq"}
    notes = {entry["label"]: json.loads(entry["notes"]) for entry in farm.table("attempts")}
    assert f"resq: U_C of all layers: {2 * (16 * 16 + 2)} bytes, counted in the model's" in notes["resq w4a4kv4"]
