"""Cells that quantize weights and cache together, through run_cell: both stay, and the records tell of both."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qfarm import cli
from tests.test_layers_worker import values
from tests.test_worker import Farm, make_job

JOB = """
models: [{model}]
methods:
  - gptq
  - gptq+kivi: {{kivi: {{group: 8, residual: 16}}}}
  - gptq+kvquant
bits: [w4kv4]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 8}}]
resources: {{gpus: 0}}
"""

MATRIX = """
models: [{model}]
methods:
  - gptq+kivi: {{kivi: {{group: 8, residual: 16}}}}
  - resq
  - quarot+kivi: {{kivi: {{group: 8, residual: 16}}}}
bits: [w4a4kv4]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 4}}]
resources: {{gpus: 0}}
"""


def test_caches_and_rotations_run_in_one_matrix(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `qfarm submit JOB --local` runs it, in this process, which ends with exit code 0."""
    path = tmp_path / "job.yaml"
    path.write_text(f"{MATRIX.format(model=tiny)}store: {tmp_path / 'store'}\n")
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY"):  # set by the command line for its own process
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(SystemExit) as done:
        cli.main(["submit", str(path), "--local"])
    assert done.value.code == 0
    farm = Farm(tmp_path / "store", make_job(tiny, MATRIX))
    cells = {row["recipe"]: row for row in farm.table("cells")}
    assert cells.keys() == {"baseline", "gptq+kivi", "resq", "quarot+kivi"}
    # KIVI's cache is the same behind both, ResQ has its own; inputs are quantized by the method, or to nearest.
    kivi, resq = (4 + 4 + (2032 / 2048) * 8 + 16 / 2048 * 32) / 2, (16 * 4 + 8 * 8) / 16 + (2 * 16 + 24) / 16
    assert [cells[name]["kv_bits"] for name in ("gptq+kivi", "quarot+kivi", "resq")] == [kivi, kivi, resq]
    assert [cells[name]["layers_quantized"] for name in ("gptq+kivi", "quarot+kivi", "resq")] == [14, 14, 14]
    assert [cells[name]["activation_bits"] for name in ("gptq+kivi", "quarot+kivi", "resq")] == [4, 4, 4.3]
    kl = values(farm, "kl")
    assert len({kl[name, "w4a4kv4"] for name in cells if name != "baseline"}) == 3 and min(kl.values()) >= 0
    notes = {row["label"]: json.loads(row["notes"]) for row in farm.table("attempts")}
    (rotated,) = (lines for label, lines in notes.items() if label.startswith("quarot+kivi"))
    assert "quarot: queries and keys where they are rounded: Hadamard of 16" in rotated


def test_weights_and_cache_are_quantized_in_one_cell(tmp_path: Path, tiny: Path) -> None:
    farm = Farm(tmp_path / "store", make_job(tiny, JOB))
    for index, planned in enumerate(farm.plan().cells):
        outcome = farm.run(index)
        assert outcome.failure is None, f"{planned.cell.label}: {outcome.error}"
    cells = {row["recipe"]: row for row in farm.table("cells")}
    assert cells.keys() == {"baseline", "gptq", "gptq+kivi", "gptq+kvquant"}
    layers: dict[str, dict[tuple[int, str], float]] = {name: {} for name in cells}
    notes = {}
    for row in farm.table("layers"):
        (name,) = (name for name, cell in cells.items() if cell["cell_id"] == row["cell_id"])
        layers[name][row["layer"], row["role"]] = row["weight_error"]
        notes[name, row["layer"], row["role"]] = json.loads(row["notes"])
    # The same quantized weights under each cache: what was done to them is neither lost nor done again.
    assert layers["gptq"] == layers["gptq+kivi"] == layers["gptq+kvquant"]
    assert min(layers["gptq"].values()) > 0 and cells["gptq+kivi"]["layers_quantized"] == 14
    assert [cells[name]["causal"] for name in ("gptq", "gptq+kivi", "gptq+kvquant")] == [True, False, True]
    kl = values(farm, "kl")
    assert len({kl[name, "w4kv4"] for name in cells if name != "baseline"}) == 3 and min(kl.values()) >= 0
    # Heads of 16 numbers, 256 tokens of calibration text in one sequence; 2,048 of noise for kivi, 32-bit residual.
    assert cells["gptq+kivi"]["kv_bits"] == (4 + 4 + (2032 / 2048) * 8 + 16 / 2048 * 32) / 2
    assert 4 < cells["gptq+kvquant"]["kv_bits"] < 10
    table = notes["gptq+kvquant", 1, "k"]["kv_cache"]
    assert len(table["levels"]) == 16 and len(table["low"]) == 32
    assert len(notes["gptq+kvquant", 0, "v"]["kv_cache"]["levels"]) == 16
    assert "kv_cache" not in notes["gptq+kvquant", 0, "q"] and "kv_cache" not in notes["gptq+kivi", 0, "k"]
