"""Weight-activation and KV cells through run_cell: what is planned, measured and stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qfarm.errors import InvalidInput
from qfarm.evaluate import build_evaluator
from tests.job_example import changed, labels, matrix
from tests.test_worker import Farm, make_job

JOB = """
models: [{model}]
methods: [rtn, gptq, smoothquant, smoothquant+gptq]
bits: [w8a8, w4a8, w4a16, w4kv4, w8a8kv4]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 24}}]
resources: {{gpus: 0}}
"""
METHODS = "[rtn, gptq, smoothquant, smoothquant+gptq]"
SMALL = JOB.replace(METHODS, "[rtn]").replace("windows: 24", "windows: 8")


def run_all(folder: Path, model: Path, text: str = JOB) -> Farm:
    farm = Farm(folder, make_job(model, text))
    plan = farm.plan()
    assert plan.invalid == () and plan.notes == ()
    for index, planned in enumerate(plan.cells):
        outcome = farm.run(index)
        assert outcome.failure is None, f"{planned.cell.label}: {outcome.error}"
    assert all(planned.done for planned in farm.plan().cells)
    return farm


def values(farm: Farm, metric: str) -> dict[tuple[str, str], float]:
    cells = {row["cell_id"]: (row["recipe"], row["scheme"]) for row in farm.table("cells")}
    return {cells[row["cell_id"]]: row["value"] for row in farm.table("metrics") if row["metric"] == metric}


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Farm:
    """The whole matrix on one model."""
    return run_all(tmp_path_factory.mktemp("store"), tiny)


def test_every_combination_runs_and_errors_stand_in_order(farm: Farm) -> None:
    kl = values(farm, "kl")
    assert len(kl) == 20
    for recipe in ("rtn", "gptq", "smoothquant", "smoothquant+gptq"):
        w8a8, w4a8, w4, w4kv4, w8a8kv4 = (kl[recipe, s] for s in ("w8a8", "w4a8", "w4", "w4kv4", "w8a8kv4"))
        assert 0 < w8a8 < 0.2 * min(w4, w8a8kv4) and max(w4, w8a8kv4) < w4kv4
        assert abs(w4a8 - w4) < 0.3 * w4  # eight bits at the inputs cost little beside four in the weights
    assert kl["gptq", "w4a8"] < kl["rtn", "w4a8"] and kl["smoothquant+gptq", "w4"] < kl["smoothquant", "w4"]


def test_cells_say_what_was_installed(farm: Farm) -> None:
    rows = {(row["recipe"], row["scheme"]): row for row in farm.table("cells")}
    assert (rows["rtn", "w4"]["causal"], rows["rtn", "w4"]["kv_bits"]) == (None, None)
    assert (rows["baseline", "w16"]["causal"], rows["baseline", "w16"]["kv_bits"]) == (None, None)
    assert (rows["rtn", "w8a8"]["causal"], rows["rtn", "w8a8"]["kv_bits"]) == (True, None)
    # Heads of 16 numbers: four bits each, and three bytes for scale and zero point.
    assert (rows["gptq", "w4kv4"]["causal"], rows["gptq", "w4kv4"]["kv_bits"]) == (True, 4 + 24 / 16)
    assert json.loads(rows["gptq", "w8a8kv4"]["spec"])["rounded"] == {"kv_cache": 1, "linear_in": 1}
    assert json.loads(rows["smoothquant", "w4"]["spec"])["rounded"] == {"weight": json_version()}
    notes = {row["label"]: json.loads(row["notes"]) for row in farm.table("attempts")}
    assert [note for note in notes["smoothquant w4"] if note.startswith("smoothquant: inputs of q, k, v divided by")]


def json_version() -> int:
    from qfarm.recipe import lookup

    return lookup("rtn").version


def test_only_cells_with_a_quantized_cache_say_how_it_is_read(farm: Farm) -> None:
    cells = {row["cell_id"]: row for row in farm.table("cells")}
    rows = [row for row in farm.table("metrics") if row["metric"] == "perplexity"]
    by_scheme: dict[str, list[Any]] = {}
    for row in rows:
        by_scheme.setdefault(cells[row["cell_id"]]["scheme"], []).append(row)
    for scheme, found in by_scheme.items():
        read = [json.loads(row["protocol"]).get("kv") for row in found]
        if scheme == "w16":  # measured as each of its model's cells is
            assert sorted(read, key=str) == sorted([None, {"prefill": "quantized", "chunk": None}], key=str)
            assert len({row["value"] for row in found}) == 1 and len({row["eval_id"] for row in found}) == 2
        else:
            assert read == [{"prefill": "quantized", "chunk": None} if "kv" in scheme else None] * 4
    plain = {row["eval_id"] for row in rows if "kv" not in cells[row["cell_id"]]["scheme"]}
    kv = {row["eval_id"] for row in rows if "kv" in cells[row["cell_id"]]["scheme"]}
    assert len(plain) == 2 and len(kv) == 1 and kv < plain  # the baseline is in both


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "opt"])
def test_other_families(tmp_path: Path, tiny_models: dict[str, Path], family: str) -> None:
    text = JOB.replace("[w8a8, w4a8, w4a16, w4kv4, w8a8kv4]", "[w8a8kv4q8p8]")
    text = text.replace(METHODS, "[rtn, smoothquant+gptq]").replace("windows: 24", "windows: 8")
    kl = values(run_all(tmp_path / "store", tiny_models[family], text), "kl")
    assert len(kl) == 2 and all(0 < value < 0.5 for value in kl.values())


def test_reading_in_chunks(tmp_path: Path, tiny: Path) -> None:
    """Chunks of the whole window are a full prefill, which shows no error; the shorter they are, the more shows."""
    kl, protocols = {}, {}
    for chunk in (64, 16, 1):
        text = SMALL.replace("windows: 8", f"windows: 8, kv_chunk: {chunk}")
        text = text.replace("[w8a8, w4a8, w4a16, w4kv4, w8a8kv4]", "[kv2, w4]")
        farm = run_all(tmp_path / str(chunk), tiny, text)
        kl[chunk] = values(farm, "kl")["rtn", "kv2"]
        rows = {row["cell_id"]: row for row in farm.table("cells")}
        for row in farm.table("metrics"):
            protocols[chunk, rows[row["cell_id"]]["scheme"]] = row["eval_id"], json.loads(row["protocol"]).get("kv")
    assert abs(kl[64]) < 1e-6 < kl[16] < kl[1]
    assert protocols[16, "kv2"][1] == {"prefill": "windowed", "chunk": 16}
    # Chunks mean nothing to cells without a quantized cache: the same evaluation.
    assert protocols[1, "w4"] == protocols[16, "w4"] and protocols[1, "w4"][1] is None


def test_calibration_shared_between_cells_gives_the_same_bits(tmp_path: Path, tiny: Path) -> None:
    """Independent statistics behind a transform, with cells before it on the same worker."""
    text = JOB.replace("[w8a8, w4a8, w4a16, w4kv4, w8a8kv4]", "[w4a8, w3a8]\nstatistics: independent")
    text = text.replace(METHODS, "[gptq, smoothquant+gptq]").replace("windows: 24", "windows: 8")
    together = values(run_all(tmp_path / "together", tiny, text), "kl")
    alone = Farm(tmp_path / "alone", make_job(tiny, text))
    cells = [planned.cell for planned in alone.plan().cells]
    alone.run(0)
    alone.run(next(i for i, cell in enumerate(cells) if cell.label == "smoothquant+gptq w3a8"))
    assert values(alone, "kl") == {("smoothquant+gptq", "w3a8"): together["smoothquant+gptq", "w3a8"]}


def test_full_prefill_is_no_choice_for_perplexity() -> None:
    with pytest.raises(InvalidInput, match='^perplexity: unknown option "prefill"'):
        build_evaluator("perplexity", {"text": "python-docs", "prefill": "full"})
    with pytest.raises(InvalidInput, match="^perplexity: kv_chunk: "):
        build_evaluator("perplexity", {"text": "python-docs", "kv_chunk": 0})


def test_identity_names_the_rules_of_what_is_rounded() -> None:
    """Cells of weights alone keep their identity; the others' depends on the version of the rule."""
    import dataclasses

    found = matrix(changed(bits="[w4, w4a8]", methods="[gptq]"))
    assert labels(found) == ["gptq w4 g64", "gptq w4a8 g64"]
    (_, weights, both) = found.cells
    assert weights.rounded == {} and both.rounded == {"linear_in": 1}
    later = dataclasses.replace(both, rounded={"linear_in": 2})
    assert later.cell_id != both.cell_id and later.label == "gptq (linear_in rtn v2) w4a8 g64"
