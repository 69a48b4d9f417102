"""Crosscheck: rounding passes, one wrong tensor in one layer does not, and nothing packed is measured after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qfarm.evaluate import crosscheck
from qfarm.evaluate.crosscheck import ALLOWED, Layers, compared, one_unit
from qfarm.layers import packed_run
from qfarm.layers.products import Around, Int4Product, Product
from tests.test_packed_run import job, packed_model
from tests.test_worker import Farm, make_job

EVALUATE = "[perplexity: {{text: python-docs, length: 32, windows: 4}}, crosscheck: {{length: 32}}]"


def test_one_unit_in_the_last_place() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.tensor([[1.0, -1.5, 2.0, 0.1, 0.0, -3e-3]]).to(dtype)
        moved = values + one_unit(values, 0)
        assert moved.dtype == dtype and moved[0, 4] == 0
        unit = torch.finfo(dtype).eps * 2.0 ** torch.tensor([0, 0, 1, -4, 0, -9]).double()
        steps = ((moved.double() - values.double()) / unit)[0]
        assert torch.equal(steps.abs(), torch.tensor([1.0, 1, 1, 1, 0, 1]).double())
    signs = one_unit(torch.ones(100, 100), 3).sign()
    assert 0.45 < (signs > 0).float().mean() < 0.55 and torch.equal(signs, one_unit(torch.ones(100, 100), 3).sign())


def test_figures_by_hand() -> None:
    one = torch.tensor([[0.0, 0.0, 3.0], [1.0, 5.0, 0.0]])
    found = compared(one, one + 7.0, one + torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.0]]))
    assert found["logit_difference"] < 1e-6  # a constant added to a token's logits is nothing
    assert found["logit_rounding"] == pytest.approx((0.3**2 * (2 / 3) / 6) ** 0.5, rel=1e-5)
    assert found["packed_kl"] == pytest.approx(0, abs=1e-6) and found["packed_agreement"] == 1
    swapped = compared(one, one.flip(-1), one)
    before, after = one.log_softmax(-1), one.flip(-1).log_softmax(-1)
    assert swapped["packed_kl"] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-5)
    assert swapped["packed_agreement"] == 0.5


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Farm:
    changes = {"methods": "[rtn, smoothquant]", "bits": "[w4, w4a8]", "run": "[fake, packed]", "evaluate": EVALUATE}
    text = job(tiny, **changes, group_sizes="[32]") + "exclude: [{{method: smoothquant, bits: w4}}]\n"
    farm = Farm(tmp_path_factory.mktemp("store"), make_job(tiny, text))
    for index, planned in enumerate(farm.plan().cells):
        outcome = farm.run(index)
        assert outcome.failure is None, f"{planned.cell.label}: {outcome.error}"
    return farm


def test_it_comes_before_everything_else_that_runs_packed(farm: Farm) -> None:
    for planned in farm.plan().cells:
        labels = [spec.label for spec in planned.finished]
        assert labels == [
            "perplexity python-docs 32 x4",
            "crosscheck python-docs 32 x2",
            "perplexity python-docs 32 x4 packed",
        ]


def test_rounding_is_within_the_bound_and_stored(farm: Farm) -> None:
    cells = {row["cell_id"]: f"{row['recipe']} {row['scheme']}" for row in farm.table("cells")}
    rows: dict[str, dict[str, float]] = {}
    for row in farm.table("metrics"):
        if row["evaluation"].startswith("crosscheck"):
            rows.setdefault(cells[row["cell_id"]], {})[row["metric"]] = row["value"]
    assert rows.pop("baseline w16") == {
        "logit_difference": 0,
        "logit_rounding": 0,
        "packed_kl": pytest.approx(0, abs=1e-6),
        "packed_agreement": 1,
    }
    assert set(rows) == {"rtn w4", "rtn w4a8", "smoothquant w4a8"}
    for found in rows.values():
        assert 0 < found["logit_difference"] < ALLOWED / 2 * found["logit_rounding"]
        assert 0 < found["worst_layer"] < ALLOWED / 2
        assert 0 <= found["packed_kl"] < 0.01 and found["packed_agreement"] > 0.9


def spoil(product: Product) -> None:
    assert isinstance(product, Around) and isinstance(product.inner, Int4Product)
    scales = product.inner.scales
    scales[:, :, 1] += scales[:, :, 0]  # every zero point one too low


def test_one_wrong_layer_fails_the_cell_and_what_follows(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm = Farm(tmp_path / "store", make_job(tiny, job(tiny, evaluate=EVALUATE)))
    real = packed_run.product_of
    made: list[Product] = []

    def product_of(*args: object) -> Product:
        made.append(real(*args))
        if len(made) == 10:
            spoil(made[-1])
        return made[-1]

    monkeypatch.setattr(packed_run, "product_of", product_of)
    assert farm.run(0).failure is None
    outcome = farm.run(1)
    assert outcome.failure == "bug" and outcome.error is not None
    assert (
        "Disagreement: crosscheck python-docs 32 x2: model.layers.1.self_attn.v_proj: packed and simulated output"
        in (outcome.error)
    )
    assert "times what moving the weights by one unit in the last place of bfloat16 does, at most 4" in outcome.error
    done = {json.loads(row["protocol"])["run"] for row in farm.table("metrics") if row["cell_id"] == outcome.cell_id}
    assert done == {"fake"}


def test_logits_are_judged_too(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no layer shows alone: here, a layer that is not compared."""
    farm = Farm(tmp_path / "store", make_job(tiny, job(tiny, evaluate=EVALUATE)))
    real = packed_run.product_of
    made: list[Product] = []

    def product_of(*args: object) -> Product:
        made.append(real(*args))
        spoil(made[-1])
        return made[-1]

    monkeypatch.setattr(packed_run, "product_of", product_of)
    monkeypatch.setattr(Layers, "worst", lambda self: {})
    assert farm.run(0).failure is None
    error = farm.run(1).error
    assert error is not None and "packed and simulated logits differ by" in error
    assert "at most 4 times that is rounding; worst layer none" in error


def test_the_simulation_is_as_it_was_afterwards(tmp_path: Path, tiny: Path) -> None:
    farm, packed = packed_model(tmp_path, tiny)
    session = farm.session
    session.packed = packed
    names = list(packed.layers)
    before = {name: session.loaded.model.get_submodule(name) for name in names}
    weights = {name: module.weight.clone() for name, module in before.items()}
    with packed.running(True), torch.no_grad():
        crosscheck.Crosscheck(length=16, windows=1).run(session, lambda done, total: None)
        assert session.loaded.model.get_submodule(names[0]) is packed.layers[names[0]]
    for name in names:
        module = session.loaded.model.get_submodule(name)
        assert module is before[name] and torch.equal(module.weight, weights[name])
        assert not module._forward_hooks
