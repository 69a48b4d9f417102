"""Beacon and status: what a running job says of itself, what another terminal reads, and that it decides nothing."""

from __future__ import annotations

import datetime
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qfarm.beacon import EVERY, FOLDER, Beacon, running
from qfarm.console import Console
from qfarm.events import JobEnded, JobStarted, Progressed, Started
from qfarm.report.status import render_status
from qfarm.store import Store
from tests.report_example import example
from tests.test_console import cell
from tests.test_query import published

NOW = datetime.datetime(2026, 11, 21, 0, 5, tzinfo=datetime.UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def beacon(store: Path, clock: Clock) -> Beacon:
    console = Console(stream=io.StringIO(), live=False, width=80, clock=clock)
    return Beacon(str(store), console, clock)


def begin(one: Beacon) -> None:
    one.handle(JobStarted(job="tiny", where="local Ray", store="s", cells=3, done_before=0))
    one.handle(Started(cell=cell(), attempt=1, worker="worker-0"))


def test_another_terminal_sees_how_far_a_job_is(tmp_path: Path, clock: Clock) -> None:
    with beacon(tmp_path, clock) as one:
        begin(one)
        clock.now = 42.0
        one.handle(Progressed(cell_id=cell().cell_id, worker="worker-0", stage="evaluate", done=3, total=12))
        (job,) = running(str(tmp_path))
        assert (job.job, job.where, job.pid, job.host) == ("tiny", "local Ray", os.getpid(), socket.gethostname())
        assert job.state == "alive" and job.summary == "0 of 3 done"
        ((_, stage, worker, seconds),) = job.cells
        assert (stage, worker, seconds) == ("evaluate 3/12", "worker-0", 42.0)
    assert running(str(tmp_path)) == [] and list(tmp_path.iterdir()) == []


def test_progress_is_written_once_a_second(tmp_path: Path, clock: Clock) -> None:
    with beacon(tmp_path, clock) as one:
        begin(one)
        for done in range(5):
            clock.now += EVERY / 4
            one.handle(Progressed(cell_id=cell().cell_id, worker="worker-0", stage="evaluate", done=done, total=9))
        (job,) = running(str(tmp_path))
        assert job.cells[0][1] == "evaluate 3/9"  # the fifth came too soon after the fourth
        one.handle(JobEnded(finished=0, failed=0, interrupted=True, seconds=1))
        assert running(str(tmp_path))[0].cells == ()


def test_a_killed_job_is_told_from_a_running_one(tmp_path: Path, clock: Clock) -> None:
    with beacon(tmp_path, clock) as one:
        begin(one)
        (path,) = (tmp_path / FOLDER).glob("*.json")
        known = json.loads(path.read_text())
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        for name, changes in (("a", {"pid": ended.pid}), ("b", {"host": "elsewhere"})):
            (path.parent / f"{name}.json").write_text(json.dumps(known | changes))
        (path.parent / "torn.json").write_text("{")
        assert sorted(job.state for job in running(str(tmp_path))) == ["alive", "gone", "not known"]


def test_a_store_that_takes_no_file_stops_nothing(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    with beacon(tmp_path, clock) as one:
        begin(one)
    assert len([record for record in caplog.records if "will not see this job" in record.message]) == 1
    assert (tmp_path / FOLDER).read_text() == "in the way"


def test_a_beacon_is_no_fault_of_a_store(tmp_path: Path, clock: Clock) -> None:
    store = published(tmp_path / "store", example())
    with beacon(tmp_path / "store", clock) as one:
        begin(one)
        assert store.check() == ([], []) and len(store.read("cells")) == 3


def test_status_in_words(tmp_path: Path, clock: Clock) -> None:
    store: Store = published(tmp_path / "store", example())
    text = render_status(store, "store", [], NOW, 100)
    assert "store: 3 cells, 3 results, 1 failed, the latest attempt began 5m 00s ago" in text
    assert "no job is at work on it, as far as the store knows" in text
    with beacon(tmp_path / "store", clock) as one:
        begin(one)
        jobs = running(str(tmp_path / "store"))
        text = render_status(store, "store", jobs, datetime.datetime.now(datetime.UTC), 80)
        assert "tiny, process" in text and "0 of 3 done" in text and "worker-0" in text
        assert max(map(len, text.splitlines())) <= 80
