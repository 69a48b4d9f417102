"""Two submissions of one job at once, on machines whose clocks differ: every cell still has exactly one result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qfarm.bench.farm import publish_as
from qfarm.bench.simulated import simulated_cell
from qfarm.board import CellWork
from qfarm.driver import Settings, run_local
from qfarm.events import Finished
from qfarm.job import Resources
from qfarm.plan import Outcome, Task
from qfarm.report.failed import failed_cells
from qfarm.report.rows import Attempt
from qfarm.store import Store

CELLS = 6
together = threading.Barrier(2)


class Session:
    def __init__(self, data: str | None) -> None:
        pass


def run_cell(task: Task, session: Session, report: Callable[[str, int, int], None]) -> Outcome:
    """Publishes when the other submission is about to publish the same cell."""
    together.wait(60)
    publish_as(Store.open(task.store), task.cell.cell_id, task.attempt_id, int(task.cell.seed or 0), 12)
    return Outcome(attempt_id=task.attempt_id, cell_id=task.cell.cell_id, failure=None, error=None, seconds=0.1)


def test_two_submissions_at_once_leave_one_result_for_each_cell(tmp_path: Path) -> None:
    location = str(tmp_path / "store")
    Store.open(location, create=True)
    work = [CellWork(cell=simulated_cell(number, "m"), evaluations=()) for number in range(CELLS)]
    settings = Settings(
        resources=Resources(gpus=0),
        runner="tests.test_two_submissions:run_cell",
        session="tests.test_two_submissions:Session",
    )
    events: list[Any] = []

    def submit() -> None:
        run_local(work, settings, events.append, job_name="j", store_location=location)

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len([event for event in events if isinstance(event, Finished)]) == 2 * CELLS
    store = Store.open(location)
    for table in ("cells", "metrics"):
        assert sorted(store.read(table)["cell_id"].to_pylist()) == sorted(one.cell.cell_id for one in work)
    assert store.read("documents").num_rows == 12 * CELLS
    assert store.read("attempts").num_rows == 2 * CELLS  # all that was tried is told
    assert store.check() == ([], [])


@pytest.mark.parametrize("skew", ["2030-01-01", "2000-01-01"])
def test_a_wrong_clock_neither_hides_a_result_nor_makes_a_failure_of_it(skew: str) -> None:
    """The failed first attempt ran on a node whose clock is years ahead or behind."""

    def attempt(number: int, outcome: str, started: str) -> Attempt:
        return Attempt(
            attempt_id=f"a{number}",
            cell_id="c",
            model="m",
            label="rtn w4",
            number=number,
            evaluations='["e"]',
            outcome=outcome,
            stage="evaluate",
            error=None,
            started=f"{started}T00:00:00.000+00:00",
            wall_s=1.0,
            notes="[]",
            provenance="{}",
        )

    tries = [attempt(1, "worker_died", skew), attempt(2, "ok", "2026-01-01")]
    assert failed_cells({}, tries, {("c", "e")}) == []
    assert [one.kind for one in failed_cells({}, tries[:1], frozenset())] == ["worker_died"]
