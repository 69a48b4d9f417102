"""Estimates: rows of the store before arithmetic, arithmetic corrected by rows, and a cell's share of a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qfarm import estimate
from qfarm.evaluate import build_evaluator
from qfarm.job import parse_job
from qfarm.matrix import Cell
from qfarm.report.predicted import predicted
from qfarm.report.rows import Attempt
from qfarm.store import Store
from tests.job_example import FACTS, JOB, PATH, matrix
from tests.report_example import attempt_row
from tests.test_store import cell_row

RATE = (1e9, "measured rate")
EVALUATOR = build_evaluator("perplexity", {"text": "python-docs", "length": 32})


def expected(cell: Cell, past: estimate.History = estimate.NOTHING) -> estimate.Estimate:
    return estimate.estimate(parse_job(JOB, PATH), cell, FACTS, {"e1": EVALUATOR}, past, RATE)


def store_with(tmp_path: Path, cells: list[Cell], **columns: object) -> Store:
    """Attempts of 100, 300 and 110 s of each cell."""
    store = Store.open(tmp_path / "store", create=True)
    for cell in cells:
        row = dataclasses.replace(cell_row(cell.cell_id), spec=json.dumps(dataclasses.asdict(cell)))
        store.publish_cell(row, [])
        for number, seconds in enumerate((100.0, 300.0, 110.0)):
            attempt = attempt_row(
                cell.cell_id, attempt_id=f"a{number}", wall_s=seconds, evaluations='["e1"]', **columns
            )
            store.publish_attempt(attempt)
    return store


def test_rows_of_the_same_work_come_before_arithmetic(tmp_path: Path) -> None:
    baseline, rtn, gptq = matrix().cells
    past = estimate.history(store_with(tmp_path, [gptq], peak_host_bytes=7_000, peak_gpu_bytes=5_000))
    assert expected(gptq, past) == estimate.Estimate(seconds=110.0, device_bytes=7_000, source="store")
    assert estimate.history(Store.open(tmp_path / "store"), gpu=True).bytes == {
        estimate.work(dataclasses.asdict(gptq), ["e1"]): 5_000
    }
    other = estimate.estimate(parse_job(JOB, PATH), gptq, FACTS, {"e2": EVALUATOR}, past, RATE)
    assert other == dataclasses.replace(expected(gptq), source="measured rate")  # another evaluation is other work


def test_arithmetic_is_corrected_by_what_it_was_wrong_by(tmp_path: Path) -> None:
    baseline, rtn, gptq = matrix().cells
    raw = expected(rtn).seconds
    past = estimate.history(store_with(tmp_path, [gptq], expected_s=55.0, expected_from="measured rate"))
    found = expected(rtn, past)
    assert found.source == "measured rate, corrected" and found.seconds == pytest.approx(2 * raw)


def test_a_correction_is_not_made_of_corrected_or_stored_times(tmp_path: Path) -> None:
    _, rtn, gptq = matrix().cells
    store = store_with(tmp_path, [gptq], expected_s=55.0, expected_from="measured rate, corrected")
    assert expected(rtn, estimate.history(store)).source == "measured rate"


def test_failed_attempts_predict_nothing(tmp_path: Path) -> None:
    *_, gptq = matrix().cells
    store = store_with(tmp_path, [gptq], outcome="oom", expected_s=1.0, expected_from="measured rate")
    assert estimate.history(store) == estimate.NOTHING == estimate.history(None)


@pytest.mark.parametrize(
    ("device_bytes", "gpus", "gpu_memory", "share"),
    [
        (200e9, 1, None, 1),  # nothing is known of the GPUs
        (200e9, 0, 80, 0),
        (5e9, 1, 80, 0.125),  # 1.2 x 5 + 1.5 of 80 GB
        (7.1e9, 1, 80, 0.25),  # 10.02 GB
        (30e9, 1, 80, 0.5),
        (60e9, 1, 80, 1),
        (66e9, 1, 80, None),  # 80.7 GB
        (30e9, 0.25, 80, None),
    ],
)
def test_a_cell_takes_the_smallest_share_in_which_it_fits(
    device_bytes: float, gpus: float, gpu_memory: float | None, share: float | None
) -> None:
    assert estimate.gpu_share(int(device_bytes), gpus, gpu_memory) == share


def test_the_report_says_how_well_expectations_held() -> None:
    def attempt(wall_s: float, **changes: object) -> Attempt:
        row = attempt_row("c", wall_s=wall_s, expected_s=10.0, expected_from="store", **changes)
        names = {field.name for field in dataclasses.fields(Attempt)}
        return Attempt(**{name: value for name, value in dataclasses.asdict(row).items() if name in names})

    assert predicted([attempt(10.0), attempt(20.0)]) == ""
    rows = [attempt(10.0), attempt(20.0), attempt(40.0), attempt(900.0, outcome="oom")]
    assert predicted(rows) == (
        "times: 3 attempts took 2 times as long as the plan expected (1 to 4); expected from: store"
    )
    assert "(the middle 80 %: 2 to 9)" in predicted([attempt(10.0 * n) for n in range(1, 11)])
