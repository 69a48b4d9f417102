"""QuaRot: vectors of its quantizers, exactness through the recipe, what it gains, what it leaves to others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm.hadamard import Hadamard
from qfarm.inputs import InputStatistics
from qfarm.layers.clipped import ClippedAsymmetric, ClippedLayer, ClippedSymmetric, TwoWidths
from qfarm.layers.inject import stored_bits
from qfarm.layers.install import install_sites
from qfarm.layers.sites import Place
from qfarm.methods.gptq import GPTQ
from qfarm.methods.quarot import QuaRot
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid
from qfarm.recipe import Recipe, parse_recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY, save_tiny
from tests.job_example import CONFIG, changed, labels, matrix
from tests.test_fuse import lively, logits
from tests.test_layers_worker import JOB, METHODS, run_all, values
from tests.test_models import loaded

SCHEMES = "[w8a8, w4a8, w4a16, w4kv4, w8a8kv4]"

# -- quantizers -------------------------------------------------------------------------------------------------------

ROW = torch.tensor([-1.0, 0.0, 0.45, 2.0])


def test_symmetric_vector() -> None:
    made = ClippedSymmetric(bits=4, clip=0.9)(ROW)
    assert (made / 0.25714286).round().tolist() == [-4, 0, 2, 7]
    torch.testing.assert_close(made, torch.tensor([-4.0, 0, 2, 7]) * (0.9 * 2 / 7))
    both = ClippedSymmetric(bits=4, clip=0.7)(torch.tensor([-10.0, 10.0]))  # one end has a code more
    assert both.tolist() == pytest.approx([-8.0, 7.0])


def test_asymmetric_vectors() -> None:
    grid = ClippedAsymmetric(bits=4, clip=0.95)
    scale, zero = grid.grid(ROW)
    assert float(scale) == pytest.approx(0.19) and float(zero) == 5
    assert grid.codes(ROW, scale, zero).tolist() == [0, 5, 7, 15]
    torch.testing.assert_close(grid(ROW), torch.tensor([-0.95, 0, 0.38, 1.9]))
    group = torch.tensor([1.0, 1.2, 1.5, 1.75])
    apart, through = ClippedAsymmetric(bits=4, through_zero=False), ClippedAsymmetric(bits=4)
    scale, zero = apart.grid(group)
    assert float(scale) == pytest.approx(0.05) and float(zero) == -20
    torch.testing.assert_close(apart(group), group)
    scale, zero = through.grid(group)
    assert float(scale) == pytest.approx(0.116667, abs=1e-6)
    assert through.codes(group, scale, zero).tolist() == [9, 10, 13, 15]


def test_degenerate_rows() -> None:
    rows = torch.stack([torch.zeros(8), torch.full((8,), 3.7), torch.full((8,), -1e-3)])
    asymmetric = [ClippedAsymmetric(bits=4, through_zero=through) for through in (False, True)]
    for quantize in (ClippedSymmetric(bits=4), *asymmetric):
        assert torch.equal(quantize(rows)[0], rows[0])
        torch.testing.assert_close(quantize(rows), rows, rtol=1e-3, atol=0)
        assert quantize(torch.tensor([[float("nan"), 1.0]])).isnan().any()


def test_two_widths_have_two_scales() -> None:
    x = torch.randn(4, 64, generator=torch.manual_seed(0))
    low, high = ClippedAsymmetric(bits=4), ClippedAsymmetric(bits=8)
    mixed = TwoWidths(low=low, high=high, fraction=0.125)(x)
    assert torch.equal(mixed[:, :56], low(x[:, :56])) and torch.equal(mixed[:, 56:], high(x[:, 56:]))
    assert torch.equal(TwoWidths(low=low, high=low, fraction=0)(x), low(x))


@pytest.mark.parametrize(("fraction", "bits"), [(0.0, 4 + 32 / 64), (0.125, 4.5 + 64 / 64)])
def test_the_cache_holds_what_the_quantizers_make(tiny: Path, fraction: float, bits: float) -> None:
    draw = torch.manual_seed(0)
    keys, values_ = (torch.randn(2, 3, 5, 64, generator=draw) + shift for shift in (0.0, 0.4))
    layer = ClippedLayer(4, 0.95, fraction=fraction)
    read = layer.update(keys, values_)
    more = layer.update(keys[:, :, :1], values_[:, :, :1])
    assert torch.equal(more[0][:, :, :5], read[0]) and layer.get_seq_length() == 6
    for made, given in zip(read, (keys, values_), strict=True):
        plain = [ClippedAsymmetric(bits=b, clip=0.95, through_zero=False) for b in (4, 8)]
        expected = TwoWidths(low=plain[0], high=plain[1], fraction=fraction)(given) if fraction else plain[0](given)
        # A scale in float16 moves what lies on the edge of two codes.
        assert float(((made - expected).abs() < 5e-3).float().mean()) > 0.98
    assert 8 * layer.stored_bytes() / (6 * 2 * 3 * 64 * 2) == bits
    layer.crop(-2)
    assert torch.equal(layer._dense()[0], read[0][:, :, :4])


# -- the rotation -----------------------------------------------------------------------------------------------------


def rotate(model: LoadedModel, seed: int = 0, **options: Any) -> list[str]:
    (method,) = parse_recipe({"quarot": options}).transforms
    return method.transform(model, {}, seed)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("mode", ["hadamard", "random"])
def test_the_model_computes_the_same(tiny_models: dict[str, Path], family: str, mode: str) -> None:
    model = lively(loaded(tiny_models[family]))
    plain = logits(model)
    notes = rotate(model, mode=mode)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    assert {"input of down, online: Hadamard of 128", "heads of the input of o, online: Hadamard of 4"} <= set(notes)
    assert len(model.turns) == 2 and not model.model.config.tie_word_embeddings
    model.restore()
    assert torch.equal(logits(model), plain) and not model.turns


def test_another_seed_is_another_rotation(tiny: Path) -> None:
    model = loaded(tiny)
    found = []
    for seed in (0, 0, 1):
        rotate(model, seed)
        found.append(model.linears(0)["q"].weight.clone())
        model.restore()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_sizes_without_a_hadamard_matrix_are_noted(tmp_path: Path) -> None:
    changes = {"hidden_size": 84, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 6}
    model = loaded(save_tiny(tmp_path, "llama", **changes))
    plain = logits(model)
    notes = rotate(model)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    assert "14 heads have no Hadamard matrix: they are not mixed" in notes
    assert any("random orthogonal matrix of 3 instead" in note for note in notes)


def with_outliers(model: LoadedModel) -> LoadedModel:
    """A hidden channel and a channel of the MLP that are far larger than the others."""
    for block in range(2):
        linears = model.linears(block)
        linears["down"].weight[7] *= 30
        linears["up"].weight[3] *= 100
    return model


def test_an_outlier_channel_stops_hurting(tiny: Path) -> None:
    model = with_outliers(loaded(tiny))
    plain = logits(model)

    def error(rotated: bool) -> float:
        recipe = parse_recipe("quarot")
        if rotated:
            rotate(model)
        install_sites(model, recipe if rotated else Recipe(), parse_scheme("a4kv4"), {})
        found = float((logits(model) - plain).square().mean())
        model.restore()
        return found

    assert error(True) < 0.5 * error(False)


def test_sixteen_bits_leave_the_rotated_model_alone(tiny: Path) -> None:
    model = loaded(tiny)
    rotate(model)
    rotated = logits(model)
    made = install_sites(model, parse_recipe("quarot"), parse_scheme("w4"), {})
    assert torch.equal(logits(model), rotated) and made.causal is None


def test_options_reach_the_quantizers() -> None:
    place = Place("linear_in", 0, "q")
    assert QuaRot().quantizer(place, 4, {}) == ClippedSymmetric(bits=4, clip=0.9)
    assert QuaRot(clip=1.0).quantizer(place, 4, {}) == ClippedSymmetric(bits=4, clip=1.0)
    assert QuaRot(symmetric=False).quantizer(place, 4, {}) == ClippedAsymmetric(bits=4, clip=1.0)
    assert QuaRot(cache_clip=0.8).cache_layer(0, 3, {})().clip == 0.8  # type: ignore[attr-defined]


def test_gptq_with_an_identity_hessian_is_rounding_to_nearest() -> None:
    weight = Hadamard(64)(torch.randn(16, 64, generator=torch.manual_seed(0)))
    inputs = InputStatistics(tokens=64, hessian=torch.eye(64), sample=torch.eye(64))
    grid = Grid(bits=4, symmetric=True, search=True)
    made = GPTQ(search=True, act_order=False).quantize_linear(weight, inputs, grid)
    assert torch.equal(made.dequantize(), grid.quantize(weight).dequantize())


# -- in a recipe ------------------------------------------------------------------------------------------------------


def test_another_method_has_the_site_where_there_is_one(tiny: Path) -> None:
    recipe = parse_recipe("act+quarot+gptq")
    assert recipe.name == "quarot+gptq+act"
    owners = {site: recipe.claimant(site) for site in ("linear_in", "kv_cache", "q")}
    assert [method.name if method else None for method in owners.values()] == ["act", "quarot", None]


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (
            "smoothquant+quarot",
            "quarot: it folds the norms and rotates all channels, which smoothquant acts on as well",
        ),
        ("quarot+qrazor: {qrazor: {pre_rope: true}}", "keys are rotated after the rotary embedding, and qrazor quanti"),
    ],
)
def test_chains_that_cannot_be_are_refused_in_the_plan(entry: str, rule: str) -> None:
    found = matrix(changed(methods=f"[rtn, {entry}]", bits="[w4a4kv4]", group_sizes="[-1]"))
    assert labels(found) == ["rtn w4a4kv4"] and rule in found.invalid[0].rule


def test_models_that_cannot_be_rotated_are_refused_in_the_plan() -> None:
    opt = CONFIG | {"model_type": "opt", "ffn_dim": 640, "do_layer_norm_before": False, "activation_function": "relu"}
    (invalid,) = matrix(changed(methods="[quarot, rtn]", group_sizes="[-1]"), config=opt).invalid
    assert invalid.label == "quarot w4" and "post-norm" in invalid.rule


def test_cells_of_rotations_have_a_seed_and_read_no_text() -> None:
    found = matrix(changed(methods="[quarot, quarot+gptq]", bits="[w4a4kv4, w4]", group_sizes="[-1]", seeds="[0, 3]"))
    cells = [cell for cell in found.cells if not cell.is_baseline]
    assert len(cells) == 8 and {cell.seed for cell in cells} == {0, 3}
    assert [cell.calibration is None for cell in cells[:4]] == [True] * 4 and cells[-1].calibration
    assert {json.dumps(dict(cell.rounded)) for cell in cells if cell.recipe == "quarot"} == {'{"weight": 1}'}


def test_the_worker_runs_chains_of_it(tmp_path: Path, tiny: Path) -> None:
    """On a model with outlier channels, which rounding to nearest alone does not survive."""
    model = with_outliers(loaded(tiny))
    folder = tmp_path / "model"
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    job = JOB.replace(METHODS, "[rtn, quarot, quarot+gptq, quarot+qera, quarot+qrazor]").replace(SCHEMES, "[w4a4kv4]")
    farm = run_all(tmp_path / "store", folder, job + "symmetric: true\nstatistics: independent\n")
    kl = {recipe: value for (recipe, _), value in values(farm, "kl").items()}
    assert 0 < kl["quarot+gptq"] < kl["quarot"] < kl["rtn"]
    rows = {row["recipe"]: row for row in farm.table("cells")}
    assert rows["quarot"]["kv_bits"] == 4 + 32 / 16 and rows["quarot+qrazor"]["kv_bits"] == 4 + 3 / 8 + 16 / 16
    # The head's own weight is counted, the number of parameters is the model's.
    table = 260 * 64 * 4
    assert rows["quarot"]["model_bytes"] == rows["rtn"]["model_bytes"] + table
    (notes,) = (row["notes"] for row in farm.table("attempts") if row["label"] == "quarot w4a4kv4")
    assert "quarot: hidden states: Hadamard of 64" in json.loads(notes)


def test_stored_bits_of_its_cache(tiny: Path) -> None:
    model = loaded(tiny)
    makers = [QuaRot().cache_layer(block, 4, {}) for block in range(2)]
    assert stored_bits(model, makers) == 4 + 32 / model.head_dim
