"""Packed runs on a real model: as jobs/packed.yaml has them, without its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qfarm.job import parse_job
from tests.test_layout import ROOT
from tests.test_worker import Farm


@pytest.mark.slow
def test_packed_and_simulated_perplexity_of_smollm2_agree(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "packed.yaml").read_text()
    (speed,) = (line for line in text.splitlines() if "speed:" in line)
    farm = Farm(tmp_path / "store", parse_job(text.replace(speed, ""), "packed.yaml"))
    for index, planned in enumerate(farm.plan().cells):
        outcome = farm.run(index)
        assert outcome.failure is None, f"{planned.cell.label}: {outcome.error}"
    cells = {row["cell_id"]: f"{row['recipe']} {row['scheme']}" for row in farm.table("cells")}
    found: dict[str, dict[str, float]] = {}
    for row in farm.table("metrics"):
        if row["metric"] == "perplexity":
            found.setdefault(cells[row["cell_id"]], {})[json.loads(row["protocol"])["run"]] = row["value"]
    assert found.keys() == {"baseline w16", "gptq w4", "smoothquant w8a8"}
    assert found["baseline w16"]["packed"] == found["baseline w16"]["fake"]
    # Three standard errors of what 1,020 tokens can tell of two roundings whose KL is 0.0022 and 0.016: docs/packed.md.
    for name, bound in (("gptq w4", 0.006), ("smoothquant w8a8", 0.017)):
        assert found[name]["packed"] != found[name]["fake"]  # another arithmetic, or nothing was packed
        assert abs(found[name]["packed"] / found[name]["fake"] - 1) < bound, (name, found[name])
    notes = {row["label"]: " ".join(json.loads(row["notes"])) for row in farm.table("attempts")}
    assert "int4 (torch._weight_int4pack_mm_for_cpu" in notes["gptq w4 g64"]
    assert "int8 (torch._int_mm): 210 of 210 layers" in notes["smoothquant w8a8"]
