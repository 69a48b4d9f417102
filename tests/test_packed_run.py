"""Packed runs: what a job may ask for, which cells can, and that a packed model is the simulated one."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from qfarm.errors import Disagreement, InvalidInput, JobError
from qfarm.evaluate.crosscheck import Crosscheck
from qfarm.layers import packed_run, products
from qfarm.layers.packed_run import PackedLinear, PackedModel, weight_bytes
from qfarm.layers.products import Int4Product
from qfarm.quantized import QuantizedWeight
from qfarm.recipe import method_names, parse_recipe
from qfarm.runs import packed_refusal
from qfarm.scheme import parse_scheme
from qfarm.worker import quantize_cell
from tests.test_worker import Farm, make_job

JOB = """
models: [{model}]
methods: [rtn]
bits: [w4]
group_sizes: [32]
dtype: bfloat16
run: [fake, packed]
calibration: {{text: python-docs, samples: 4, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 4}}]
resources: {{gpus: 0}}
"""


def job(model: Path, **changes: str) -> str:
    text = JOB
    for key, value in changes.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{key}:"))
        text = text.replace(line, f"{key}: {value}")
    return text


def run_all(farm: Farm) -> None:
    for index, planned in enumerate(farm.plan().cells):
        outcome = farm.run(index)
        assert outcome.failure is None, f"{planned.cell.label}: {outcome.error}"
    assert all(planned.done for planned in farm.plan().cells)


def perplexities(farm: Farm) -> dict[tuple[str, str], float]:
    """By recipe with scheme, and by run; a baseline's are the same under the protocol of a quantized cache."""
    cells = {row["cell_id"]: f"{row['recipe']} {row['scheme']}" for row in farm.table("cells")}
    found: dict[tuple[str, str], float] = {}
    for row in farm.table("metrics"):
        if row["metric"] == "perplexity":
            key = (cells[row["cell_id"]], json.loads(row["protocol"])["run"])
            assert found.setdefault(key, row["value"]) == row["value"]
    return found


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_the_run_is_part_of_an_evaluations_identity_and_changes_no_other(tmp_path: Path, tiny: Path) -> None:
    plans = {
        text: Farm(tmp_path / text.strip("[]"), make_job(tiny, job(tiny, run=text))).plan()
        for text in ("fake", "packed", "[packed, fake]", "[fake]")
    }
    usual = Farm(tmp_path / "usual", make_job(tiny, JOB.replace("run: [fake, packed]\n", ""))).plan()
    ids = {text: [[spec.eval_id for spec in one.missing] for one in plan.cells] for text, plan in plans.items()}
    assert ids["fake"] == ids["[fake]"] == [[spec.eval_id for spec in one.missing] for one in usual.cells]
    assert ids["[packed, fake]"] == [[*a, *b] for a, b in zip(ids["fake"], ids["packed"], strict=True)]
    assert ids["fake"] != ids["packed"] and len({*ids["[packed, fake]"][1]}) == 2
    specs = plans["[packed, fake]"].cells[1].missing
    assert [spec.label for spec in specs] == ["perplexity python-docs 64 x4", "perplexity python-docs 64 x4 packed"]
    assert [spec.protocol["run"] for spec in specs] == ["fake", "packed"]
    # What is not given is as it was before there were runs.
    assert "products" not in specs[0].protocol and specs[1].protocol["products"] == 1


def test_products_of_a_gpu_are_another_protocol_and_never_a_cpus(tmp_path: Path, tiny: Path) -> None:
    plans = [
        Farm(tmp_path / str(gpus), make_job(tiny, job(tiny, resources=f"{{{{gpus: {gpus}}}}}"))) for gpus in (0, 1)
    ]
    ids = [[[spec.eval_id for spec in one.missing] for one in farm.plan().cells] for farm in plans]
    assert [fake for fake, _ in ids[0]] == [fake for fake, _ in ids[1]]
    assert not {packed for _, packed in ids[0]} & {packed for _, packed in ids[1]}
    protocols = [farm.plan().cells[1].missing[1].protocol for farm in plans]
    assert [(one["products"], one.get("products_on")) for one in protocols] == [(1, None), (2, "gpu")]
    outcome = plans[1].run(1)
    assert "planned for a GPU, but this worker is on cpu" in str(outcome.error) and not plans[1].table("cells")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "kernel"}, r"line 7: run\[0\]: input should be 'fake' or 'packed'.* got 'kernel'"),
        ({"run": "[]"}, "line 7: run: empty; use fake, packed or both"),
        (
            {"run": "packed", "evaluate": "[analysis: {{text: python-docs}}]"},
            r"line 7: run: analysis is measured in run: fake, not packed; \[fake, packed\] has both",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_with_its_line(tiny: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(JobError, match=message):
        make_job(tiny, job(tiny, **changes))


def test_cells_that_cannot_be_run_packed_are_listed_and_run_fake(tmp_path: Path, tiny: Path) -> None:
    farm = Farm(tmp_path / "a", make_job(tiny, job(tiny, methods="[rtn, spqr]", group_sizes="[16]", bits="[w4]")))
    plan = farm.plan()
    (refused,) = plan.invalid
    assert refused.label == "spqr w4 g16 packed" and refused.rule.startswith("spqr: its weights kept apart")
    runs = {one.cell.recipe: [spec.protocol["run"] for spec in one.missing] for one in plan.cells}
    assert runs == {"baseline": ["fake", "packed"], "rtn": ["fake", "packed"], "spqr": ["fake"]}
    packed = Farm(
        tmp_path / "b", make_job(tiny, job(tiny, methods="[rtn, spqr]", group_sizes="[16]", run="packed"))
    ).plan()
    assert [one.cell.recipe for one in packed.cells] == ["baseline", "rtn"] and packed.invalid == plan.invalid
    alone = Farm(tmp_path / "c", make_job(tiny, job(tiny, methods="[spqr]", group_sizes="[16]", run="packed")))
    with pytest.raises(JobError, match="the matrix is empty: run: packed: spqr: its weights kept apart"):
        alone.plan()


def test_rules_by_method_and_scheme() -> None:
    def rule(recipe: object, scheme: str) -> str | None:
        return packed_refusal(parse_recipe(recipe), parse_scheme(scheme))

    refused = {name for name in method_names() if rule(name, "w8a8") is not None}
    assert refused == {"llm_int8", "ptq161", "qrazor", "resq", "spqr"}
    assert rule("gptq", "w4a8kv4") is None and rule("kivi", "kv2") is None
    assert rule("qrazor", "kv4") is None  # its cache holds codes; the weights are not its own here
    act = {"act": {"sites": {"k": {"granularity": "token"}}}}
    assert "act rounds keys and values in floating point" in str(rule(act, "kv8"))
    assert rule("rtn", "w4q8") == "no operator multiplies codes of queries, which w4q8 rounds"
    assert "softmax probabilities" in str(rule("rtn", "w4p8"))
    assert rule("zeroquant", "w8a8") is None and "run on from row to row" in str(
        rule({"zeroquant": {"number_of_groups": 8}}, "w8a8")
    )


# -- the model --------------------------------------------------------------------------------------------------------


def packed_model(tmp_path: Path, tiny: Path, **changes: str) -> tuple[Farm, PackedModel]:
    """A session whose only quantized cell is ready to be run either way."""
    farm = Farm(tmp_path / "store", make_job(tiny, job(tiny, **changes)))
    farm.session.begin(farm.plan().cells[1].cell)
    weights: dict[str, QuantizedWeight] = {}
    quantize_cell(farm.session, lambda done, total: None, weights.__setitem__)
    return farm, PackedModel(farm.session.loaded, weights)


@torch.no_grad()
def logits(farm: Farm, packed: PackedModel, run: bool) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24) * 5 % 256
    with packed.running(run):
        return farm.session.loaded.model(input_ids=ids).logits.float()


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"methods": "[gptq]"}, "int4"),
        ({"methods": "[smoothquant]", "bits": "[w8a8]", "group_sizes": "[-1]"}, "int8"),
        ({"methods": "[quarot+gptq]", "bits": "[w4a4kv4]", "group_sizes": "[-1]"}, "int4"),
        ({"methods": "[gptq+qera]"}, "int4"),
        ({"methods": "[awq]", "bits": "[w4a8]"}, "int4"),
        ({"methods": "[svdquant]", "bits": "[w4a4]"}, "int4"),
        ({"methods": "[hqq]", "bits": "[w3]"}, "unpack"),
        ({"methods": "[gptq: {{act_order: true}}]"}, "unpack"),
        ({"bits": "[w8]", "group_sizes": "[-1]"}, "unpack"),
        ({"methods": "[lut_gemm]", "bits": "[w3]"}, "unpack"),
        ({"methods": "[bpdq]", "bits": "[w2]"}, "unpack"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_a_packed_model_gives_the_simulations_logits(
    tmp_path: Path, tiny: Path, changes: dict[str, str], path: str
) -> None:
    farm, packed = packed_model(tmp_path, tiny, **changes)
    assert {layer.product.path.partition(" ")[0] for layer in packed.layers.values()} == {path}
    before = logits(farm, packed, False)
    found = logits(farm, packed, True)
    assert torch.equal(logits(farm, packed, False), before)  # and back
    assert torch.equal(found, before) == (path == "unpack")
    farm.session.packed = packed
    with packed.running(True), torch.no_grad():
        Crosscheck(length=24, windows=1).run(farm.session, lambda done, total: None)  # raises Disagreement


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": "[gptq: {{act_order: true}}]"},
        {"methods": "[hqq]", "bits": "[w3]"},
        {"methods": "[sinq+qera]", "bits": "[w5]", "group_sizes": "[-1]"},
        {"methods": "[svdquant]", "bits": "[w4a4]"},
        {"methods": "[lut_gemm+qera]", "bits": "[w3]"},
        {"methods": "[bpdq]", "bits": "[w2]"},
    ],
    ids=lambda changes: changes["methods"],
)
def test_a_gpus_tiles_give_the_simulations_logits(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    """The layers of a GPU, with torch's arithmetic in place of the kernels, which tests/test_kernels.py checks."""
    there = functools.partial(products.product_of, device=torch.device("cuda"))
    monkeypatch.setattr(packed_run, "product_of", lambda *given: there(*given[:4]))
    farm, packed = packed_model(tmp_path, tiny, **changes)
    planes = changes["methods"].startswith(("[lut_gemm", "[bpdq"))
    path = "planes" if planes else "tiles"
    assert {layer.product.path.partition(" ")[0] for layer in packed.layers.values()} == {path}
    farm.session.packed = packed
    with packed.running(True), torch.no_grad():
        Crosscheck(length=24, windows=1).run(farm.session, lambda done, total: None)  # raises Disagreement
    weight = packed.layers["model.layers.0.mlp.down_proj"].product.inner.weight
    (weight.planes if planes else weight.words[0]).add_(1)
    with packed.running(True), torch.no_grad(), pytest.raises(Disagreement):
        Crosscheck(length=24, windows=1).run(farm.session, lambda done, total: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its layers ran with torch's arithmetic")
def test_packed_cells_on_a_gpu(tmp_path: Path, tiny: Path) -> None:
    evaluate = "[crosscheck: {{length: 24, windows: 1}}, perplexity: {{text: python-docs, length: 64, windows: 4}}]"
    changes = {"methods": "[rtn, smoothquant]", "bits": "[w4, w3, w8a8]", "group_sizes": "[32, -1]"}
    changes["resources"] = "{{gpus: 1}}"
    farm = Farm(tmp_path / "store", make_job(tiny, job(tiny, evaluate=evaluate, **changes)))
    run_all(farm)
    notes = " ".join(row["notes"] for row in farm.table("attempts"))
    assert "packed: tiles (qfarm.kernels, 3-bit)" in notes and "packed: int8 (qfarm.kernels)" in notes


def test_float_weights_are_not_there_in_a_packed_run(tmp_path: Path, tiny: Path) -> None:
    farm, packed = packed_model(tmp_path, tiny)
    loaded = farm.session.loaded
    simulated = sum(parameter.numel() * 2 for parameter in loaded.model.parameters())
    linear = sum(one.weight.numel() for block in range(2) for one in loaded.linears(block).values())
    assert weight_bytes(loaded, None) == simulated
    with packed.running(True):
        layers = [one for block in range(2) for one in loaded.linears(block).values()]
        assert all(isinstance(one, PackedLinear) and one.weight.numel() == 0 for one in layers)
        # Half a byte a weight, and a scale and an offset of 16 bits for 32.
        assert packed.nbytes() == linear // 2 + linear // 32 * 4
        assert weight_bytes(loaded, packed) == simulated - 2 * linear + packed.nbytes()
    assert all(one.weight.numel() for block in range(2) for one in loaded.linears(block).values())
    loaded.restore()
    assert not any(isinstance(module, PackedLinear) for module in loaded.model.modules())


def test_one_wrong_group_of_scales_is_seen(tmp_path: Path, tiny: Path) -> None:
    """The bound of the comparison above is one that a mistake does not keep."""
    farm, packed = packed_model(tmp_path, tiny, methods="[gptq]")
    before = logits(farm, packed, False)
    product = packed.layers["model.layers.0.mlp.down_proj"].product.inner
    assert isinstance(product, Int4Product)
    product.scales.copy_(product.scales.flip(0))
    apart = (logits(farm, packed, True) - before).square().mean().sqrt() / before.std()
    assert apart > 0.05


def test_a_quantizer_that_multiplies_by_itself_is_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(InvalidInput, match=r"q_proj: its quantizer multiplies in an arithmetic of its own"):
        packed_model(tmp_path, tiny, methods="[llm_int8]", bits="[w8a8]", group_sizes="[-1]", run="fake")


# -- cells ------------------------------------------------------------------------------------------------------------


def test_both_runs_of_a_matrix_reach_the_store(tmp_path: Path, tiny: Path) -> None:
    changes = {"methods": "[rtn, kivi: {{group: 8, residual: 16}}]", "bits": "[w4, kv2]"}
    farm = Farm(tmp_path / "store", make_job(tiny, job(tiny, **changes)))
    run_all(farm)
    found = perplexities(farm)
    names = ("baseline w16", "rtn w4", "kivi kv2", "rtn kv2")
    assert {name for name, _ in found} == {*names}
    for name in names:
        fake, packed = (found[name, run] for run in ("fake", "packed"))
        assert packed == fake if name != "rtn w4" else 0 < abs(packed / fake - 1) < 2e-3
    # The baseline is measured under the run's protocol too, so that packed cells are compared with it.
    kl = [row for row in farm.table("metrics") if row["metric"] == "kl"]
    assert {json.loads(row["protocol"])["run"] for row in kl} == {"fake", "packed"} and len(kl) == 6
    attempts = {row["label"]: json.loads(row["notes"]) for row in farm.table("attempts")}
    assert attempts["rtn w4 g32"] == [
        "packed: int4 (torch._weight_int4pack_mm_for_cpu, scales and zeros in bfloat16): "
        "14 of 14 layers (q k v o gate up down)"
    ]
    assert any("pack" == stage for stage, _, _ in farm.stages)


def test_a_packed_run_alone_can_be_added_later(tmp_path: Path, tiny: Path) -> None:
    farm = Farm(tmp_path / "store", make_job(tiny, job(tiny, run="fake")))
    run_all(farm)
    assert json.loads(farm.table("attempts")[1]["notes"]) == []
    farm.job = make_job(tiny, job(tiny))
    assert [[spec.protocol["run"] for spec in one.missing] for one in farm.plan().cells] == [["packed"], ["packed"]]
    run_all(farm)
    assert {run for _, run in perplexities(farm)} == {"fake", "packed"}
