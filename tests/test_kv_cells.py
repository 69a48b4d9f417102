"""Cells that quantize weights and cache together, through run_cell: both stay, and the records tell of both."""

from __future__ import annotations

import json
from pathlib import Path

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
