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
from qfarm.memory import Arrangement, Needs
from qfarm.report.predicted import predicted
from qfarm.report.rows import Attempt
from qfarm.store import Store
from tests.job_example import FACTS, JOB, PATH, matrix
from tests.report_example import attempt_row
from tests.test_store import cell_row

PARTS = ("block", "tables", "quantized", "walk", "statistics", "solving")
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
    found = expected(gptq, past)
    assert (found.seconds, found.device_bytes, found.source) == (110.0, 7_000, "store")
    assert estimate.history(Store.open(tmp_path / "store"), gpu=True).bytes == {
        estimate.work(dataclasses.asdict(gptq), ["e1"]): 5_000
    }
    other = estimate.estimate(parse_job(JOB, PATH), gptq, FACTS, {"e2": EVALUATOR}, past, RATE)
    assert other == expected(gptq)  # another evaluation is other work


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


@pytest.mark.parametrize(
    "note",
    [
        Arrangement(gpus=1, streamed=True).note,
        Arrangement(gpus=2, streamed=False).note,
        "batches halved up to 1 times after running out of memory; last bits may differ",
    ],
)
def test_an_attempt_that_saved_memory_does_not_tell_what_one_takes(tmp_path: Path, note: str) -> None:
    *_, gptq = matrix().cells
    store = store_with(tmp_path, [gptq], peak_host_bytes=7_000, notes=json.dumps(["else", note]))
    past = estimate.history(store)
    assert past.bytes == {} and len(past.seconds) == 1


@pytest.mark.parametrize(
    ("streamed_bytes", "gpus", "share"),
    [(60e9, 1, 1), (60e9, 8, 1), (66e9, 8, None), (1e9, 0.5, None)],
)
def test_a_streamed_model_takes_one_gpu(streamed_bytes: float, gpus: float, share: float | None) -> None:
    assert estimate.streaming_share(of(200e9, streamed_bytes), gpus, 80) == share


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
    assert estimate.gpu_share(of(device_bytes), gpus, gpu_memory) == share


def of(device_bytes: float, working_bytes: float = 0) -> estimate.Estimate:
    return estimate.Estimate(
        seconds=1.0,
        device_bytes=int(device_bytes),
        needed=Needs(model=int(device_bytes - working_bytes), **dict.fromkeys(PARTS, 0), scoring=int(working_bytes)),
        source="assumed rate",
    )


@pytest.mark.parametrize(
    ("device_bytes", "working_bytes", "gpus", "share"),
    [
        (60e9, 0, 8, 1),
        (66e9, 0, 8, 2),  # 1.2 x 33 + 1.5 of 80 GB each
        (66e9, 0, 1, None),
        (330e9, 0, 8, 6),  # 1.2 x 55 + 1.5; five would take 80.7
        (330e9, 30e9, 8, None),  # 1.2 x (300 / 8 + 30) + 1.5 = 82.5 on eight
        (310e9, 30e9, 8, 8),  # 79.5 on eight, 85.5 on seven
    ],
)
def test_a_cell_takes_the_fewest_gpus_over_which_it_fits(
    device_bytes: float, working_bytes: float, gpus: float, share: float | None
) -> None:
    expected = of(device_bytes, working_bytes)
    assert estimate.gpu_share(expected, gpus, 80) == share
    assert estimate.gpu_share(expected, gpus, 80, spreads=False) == (share if share == 1 else None)


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
