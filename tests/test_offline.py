"""Every evaluation from a job's text to the tables, without a network, on a model of 260,000 parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qfarm.store import Store
from qfarm.tasks.registry import CSQA

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent

JOB = """
name: offline
models: [{model}]
methods: [rtn]
bits: [w4, kv4]
group_sizes: [4]
dtype: float32
evaluate:
  - perplexity: {{text: wikitext2, length: 128, windows: 200}}
  - perplexity: {{text: wikitext2, length: 256, convention: word, documents: 2}}
  - tasks: {{names: [csqa], limit: 10}}
  - tasks: {{names: [mmlu], limit: 1}}
  - tasks: {{names: [gsm8k], limit: 1, few_shot: 1}}
  - generation: {{text: wikitext2, prompts: 12, prompt_tokens: 16, new_tokens: 8}}
margin: {{perplexity: 1 %, accuracy: 1 point}}
resources: {{gpus: 0, cpus: 1}}
store: {store}
"""


@pytest.fixture(scope="module")
def farm(pack: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The store of a finished job, and `qfarm` on it."""
    model = Path(pack) / "tiny_model" / "stories260K"
    if not (model / "model.safetensors").is_file():
        pytest.skip(f"the data pack {pack} holds no {model.name}")
    folder = tmp_path_factory.mktemp("offline")
    job = folder / "job.yaml"
    job.write_text(JOB.format(model=model, store=folder / "store"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "HF_HUB_OFFLINE": "1",
        "QFARM_DATA": pack,
        "QFARM_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "80",
    }

    def qfarm(*arguments: str) -> str:
        command = [sys.executable, "-m", "qfarm", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    qfarm("submit", str(job), "--local")
    return Store(str(folder / "store")), qfarm


def test_every_cell_has_every_evaluation_with_its_ledger(farm: Any) -> None:
    store, _ = farm
    cells = {row["cell_id"]: row for row in store.read("cells").to_pylist()}
    assert sorted((row["recipe"], row["scheme"]) for row in cells.values()) == [
        ("baseline", "w16"),
        ("rtn", "kv4"),
        ("rtn", "w4"),
    ]
    ledger = store.read("documents").to_pylist()
    metrics = store.read("metrics").to_pylist()
    for cell_id, cell in cells.items():
        # A baseline is measured under both protocols: with and without the reading of a quantized cache.
        own = [row for row in metrics if row["cell_id"] == cell_id]
        assert len({row["evaluation"] for row in own}) == 6
        suites = [row for row in own if row["evaluation"] == "csqa x10" and row["metric"] == "acc"]
        assert len(suites) == (2 if cell["recipe"] == "baseline" else 1)
        for suite in suites:
            reading = json.loads(suite["protocol"]).get("kv")
            assert cell["scheme"] != "kv4" or reading == {"prefill": "quantized", "chunk": None}
            items = [row for row in ledger if (row["cell_id"], row["eval_id"]) == (cell_id, suite["eval_id"])]
            assert len(items) == 60 and all(int(row["answer"]) == np.argmax(row["choices"]) for row in items)
            right = {task: [row["correct"] for row in items if row["task"] == task] for task in CSQA}
            assert suite["value"] == pytest.approx(np.mean([np.mean(values) for values in right.values()]))


def test_the_report_and_the_comparison_tell_what_was_found(farm: Any) -> None:
    store, qfarm = farm
    text = qfarm("report")
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert "exact_match,strict-match" in words and "57 items" in words and "12 prompts" in words
    assert "numeric floor: KL" in words and "margin 1 %: not tested below 48 clusters" in words
    ids = {row["scheme"]: row["cell_id"] for row in store.read("cells").to_pylist()}
    pair = qfarm("compare", ids["w4"], ids["w16"])
    assert "answers changed" in pair and "largest changes" in pair and "prefill" not in pair
    kv = " ".join(qfarm("compare", ids["kv4"], ids["w4"]).split())
    assert 'kv.prefill "quantized" against null' in kv
    assert "95 % interval" in qfarm("show", ids["kv4"])
