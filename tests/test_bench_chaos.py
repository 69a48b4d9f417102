"""The chaos benchmark: its judge sees every kind of harm, its killer strikes only who lives, and the farm stands it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from qfarm import cli
from qfarm.bench import chaos, chaos_run
from qfarm.bench.farm import _attempt_row, publish_as
from qfarm.store import Store

DOCUMENTS = 3
CALM, STRUCK, AGAIN = "c" * 16, "5" * 16, "a" * 16  # ids of attempts


def cell(number: int) -> str:
    return f"{number:016x}"


def publish(folder: Path, *, attempt: str = CALM, numbers: tuple[int, ...] = (0, 1, 2)) -> Store:
    """A store with a cell per place; its numbers follow from what stands there."""
    store = Store.open(folder, create=True)
    for place, number in enumerate(numbers):
        publish_as(store, cell(place), f"{attempt}{place}", number, DOCUMENTS)
    return store


def failed(store: Store, outcome: str, attempt: str = STRUCK, worker: str = "pid 7") -> None:
    row = _attempt_row(0, cell(0), "e", attempt)
    store.publish_attempt(dataclasses.replace(row, outcome=outcome, worker=worker))


def killed(*attempts: str, kind: str = "killed", pids: tuple[int, ...] = ()) -> dict:
    return {"seconds": 1.0, "kills": [{"kind": kind, "attempts": list(attempts), "pids": list(pids)}]}


def harm(verdict: chaos.Verdict) -> dict[str, int]:
    kept = ("missing", "different", "untold", "unexplained", "strays", "faults", "orphans")
    return {name: value for name in kept if (value := getattr(verdict, name))}


def test_a_struck_attempt_that_was_made_good_is_no_harm(tmp_path: Path):
    store = publish(tmp_path / "b", attempt=AGAIN)
    failed(store, "worker_died")
    verdict = chaos.judge(3, publish(tmp_path / "a"), store, killed(STRUCK))
    assert harm(verdict) == {} and (verdict.seed, verdict.kills, verdict.attempts) == (3, 1, 4)
    assert verdict.missed == sum(chaos_run.KINDS.values()) - 1


def _lose_a_cell(store: Store, folder: Path) -> dict:
    for manifest in (folder / "manifests").glob(f"*/{cell(2)}*.json"):
        manifest.unlink()
    return killed()


def _say_another_kind(store: Store, folder: Path) -> dict:
    failed(store, "bug")
    return killed(STRUCK)


def _say_nothing(store: Store, folder: Path) -> dict:
    return killed(STRUCK)


def _fail_by_itself(store: Store, folder: Path) -> dict:
    failed(store, "worker_died")
    return killed()


def _supersede_what_nobody_finished(store: Store, folder: Path) -> dict:
    store.publish_attempt(dataclasses.replace(_attempt_row(0, cell(7), "e", STRUCK), outcome="superseded"))
    return killed()


def _fail_by_itself_beside(store: Store, folder: Path) -> dict:
    failed(store, "bug", worker="pid 7")
    return killed(pids=(7,))


def _leave_a_file(store: Store, folder: Path) -> dict:
    (folder / "parts" / "cells" / f"{cell(9)}.{AGAIN}9.00000000.parquet").write_bytes(b"half")
    return killed()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_lose_a_cell, {"missing": 1 + 4 + 1 + DOCUMENTS, "strays": 5}),  # a file per table
        (_say_another_kind, {"untold": 1}),
        (_say_nothing, {"untold": 1}),
        (_fail_by_itself, {"unexplained": 1}),
        (_fail_by_itself_beside, {"unexplained": 1}),
        (_supersede_what_nobody_finished, {"unexplained": 1}),
        (_leave_a_file, {"strays": 1}),
    ],
)
def test_harm_is_seen(tmp_path: Path, damage: Callable[[Store, Path], dict], expected: dict[str, int]):
    calm, store = publish(tmp_path / "a"), publish(tmp_path / "b")
    verdict = chaos.judge(0, calm, store, damage(store, tmp_path / "b"))
    assert harm(verdict) == expected
    assert len(verdict.details) == sum(count for name, count in expected.items() if name != "missing")


def test_a_number_that_differs_is_seen(tmp_path: Path):
    calm, store = publish(tmp_path / "a"), publish(tmp_path / "b", numbers=(0, 1, 3))
    # The cell's own row, its perplexity and its documents' losses; the layers do not depend on it.
    assert harm(chaos.judge(0, calm, store, killed())) == {"different": 1 + 1 + DOCUMENTS}


def test_leftovers_of_the_dead_are_removed(tmp_path: Path):
    calm, store = publish(tmp_path / "a"), publish(tmp_path / "b")
    failed(store, "worker_died")
    orphan = tmp_path / "b" / "parts" / "cells" / f"{cell(0)}.{STRUCK}.00000000.parquet"
    orphan.write_bytes(b"half")
    assert harm(chaos.judge(0, calm, store, killed(STRUCK))) == {} and not orphan.exists()


@pytest.mark.parametrize("outcome", ["worker_died", "superseded"])
def test_a_cell_that_was_given_in_the_moment_of_the_blow_is_explained(tmp_path: Path, outcome: str):
    calm, store = publish(tmp_path / "a"), publish(tmp_path / "b")
    failed(store, outcome, worker="pid 7" if outcome == "worker_died" else "pid 8")
    assert harm(chaos.judge(0, calm, store, killed(pids=(6, 7)))) == {}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def mark(folder: Path, pid: int, born: float) -> None:
    found = chaos_run.Mark(pid=pid, born=born, node="n", attempt=STRUCK)
    (folder / str(pid)).write_text(json.dumps(dataclasses.asdict(found)))


def test_only_who_lives_and_is_not_stopped_is_struck(tmp_path: Path, sleeper: subprocess.Popen):
    born = psutil.Process(sleeper.pid).create_time()
    mark(tmp_path, sleeper.pid, born)
    (tmp_path / "1.new").write_text("{")  # half written
    assert [found.pid for found in chaos_run.marks(tmp_path)] == [sleeper.pid]
    mark(tmp_path, sleeper.pid, born - 1)  # another process had this pid
    assert chaos_run.marks(tmp_path) == []
    mark(tmp_path, sleeper.pid, born)
    os.kill(sleeper.pid, signal.SIGSTOP)
    os.waitpid(sleeper.pid, os.WUNTRACED)
    assert chaos_run.marks(tmp_path) == []
    sleeper.kill()
    sleeper.wait()
    assert chaos_run.marks(tmp_path) == []


def test_seeds_that_are_none_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "farm", "--parts", "chaos", "--chaos-seeds", "0,x"])
    assert ended.value.code == 2 and '--chaos-seeds "0,x": whole numbers' in capsys.readouterr().err


@pytest.mark.slow
def test_the_farm_stands_the_killing_of_workers_and_nodes():
    [verdict] = chaos.run([0])
    assert harm(verdict) == {}, "\n".join(verdict.details)
    assert verdict.kills >= 7 and verdict.attempts > chaos.CELLS + chaos.MODELS
