"""The driver on a real local Ray with runners that have no model, the local way without Ray, and finding a cluster."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qfarm import actors, cluster, launcher, pool, remote
from qfarm.actors import Hello, Message
from qfarm.bench.simulated import simulated_cell
from qfarm.board import Board, CellWork, Place, one_line
from qfarm.driver import Settings, Summary, find_address, run, run_local
from qfarm.errors import Failure, InvalidInput, QfarmError, StoreFull, Unavailable
from qfarm.events import Event, Failed, Finished, JobEnded, Note, Progressed, Started
from qfarm.job import Resources
from qfarm.matrix import Cell
from qfarm.plan import Outcome, Task
from qfarm.record import AttemptRow
from tests.fake_runner import MuteInbox

ROOT = Path(__file__).resolve().parent.parent
CPU = Resources(gpus=0, cpus=1)


def make_cell(model: str, number: int = 0, baseline: bool = False) -> Cell:
    return simulated_cell(number, model, baseline)


def work(*models: str) -> list[CellWork]:
    return [CellWork(cell=make_cell(model, number), evaluations=()) for number, model in enumerate(models)]


class FakeStore:
    """Keeps attempts; raises what it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.rows: list[AttemptRow] = []
        self.error = error

    def publish_attempt(self, attempt: AttemptRow, /) -> bool:
        if self.error:
            raise self.error
        self.rows.append(attempt)
        return True


@dataclasses.dataclass
class Ran:
    summary: Summary
    events: list[Event]
    store: FakeStore
    folder: Path

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.of(Note)]

    def finished(self) -> set[str]:
        return {event.cell.model for event in self.of(Finished)}

    def attempts(self, model: str) -> list[tuple[int, int]]:
        """(pid, how many cells the process had run) of each try of a model's only cell."""
        [cell_id] = {event.cell.cell_id for event in self.of(Started) if event.cell.model == model}
        files = sorted(self.folder.glob(f"attempts/{cell_id}.*"), key=lambda path: int(path.suffix[1:]))
        return [tuple(int(word) for word in path.read_text().split()) for path in files]


def farm(tasks, folder: Path, *, local: bool = False, watch=None, store: FakeStore | None = None, **settings) -> Ran:
    """Run tasks with the fake runner; `watch` sees each event and may act or raise."""
    events: list[Event] = []
    store = store or FakeStore()

    def emit(event: Event) -> None:
        events.append(event)
        if watch:
            watch(event)

    chosen = Settings(
        **{
            "resources": CPU,
            "retries": 1,
            "data": str(folder),
            "env": {"PYTHONPATH": str(ROOT)},
            "poll_s": 0.05,
            "runner": "tests.fake_runner:run_cell",
            "session": "tests.fake_runner:Session",
            **settings,
        }
    )
    way = run_local if local else run
    summary = way(tasks, chosen, emit, job_name="j", store_location="/s", store_factory=lambda location: store)
    return Ran(summary, events, store, folder)


@pytest.fixture(scope="module")
def on_ray() -> Iterator[None]:
    """A Ray with two CPUs and a GPU that is none, for all tests of this file."""
    import ray

    with cluster.ray_environment(cluster.local_environment()):
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100_000_000,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def mixed(on_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One job in which nearly everything goes wrong somewhere."""
    tasks = work("a", "a", "a", "b", "1:once", "2:always", "3:killed", "4:raises", "5:invalid", "6:cuda", "7:gate")
    folder = tmp_path_factory.mktemp("mixed")

    def open_gate(event: Event) -> None:
        if isinstance(event, Progressed) and event.stage == "evaluate":
            (folder / "gates").touch()

    return farm(tasks, folder, watch=open_gate, resources=Resources(gpus=0, cpus=99, workers=1))


def test_every_cell_ends_finished_or_given_up(mixed: Ran):
    assert mixed.finished() == {"a", "b", "1:once", "3:killed", "6:cuda", "7:gate"}
    assert mixed.summary == Summary(finished=8, failed=3, interrupted=False)
    given_up = {event.cell.model: event for event in mixed.of(Failed) if event.retry_in is None}
    assert set(given_up) == {"2:always", "4:raises", "5:invalid"}
    assert (given_up["2:always"].attempt, given_up["5:invalid"].attempt) == (2, 1)
    assert given_up["5:invalid"].kind is Failure.INVALID
    [last] = [event for event in mixed.events if isinstance(event, JobEnded)]
    assert mixed.events[-1] is last and (last.finished, last.failed, last.interrupted) == (8, 3, False)


def test_the_outcomes_figures_reach_the_event(mixed: Ran):
    event = next(event for event in mixed.of(Finished) if event.cell.model == "b")
    assert dict(event.figures)["perplexity"] == 7.5 and event.linear_bits == 4.25 and event.seconds == 0.5
    assert event.worker.startswith("w") and event.worker.endswith(f"@{socket.gethostname()}")


def test_each_attempt_is_announced_with_its_number(mixed: Ran):
    numbers = [event.attempt for event in mixed.of(Started) if event.cell.model == "1:once"]
    assert numbers == [1, 2]


def test_a_worker_keeps_its_session_between_cells(mixed: Ran):
    pids = [pid for model in ("b", "1:once", "5:invalid") for pid, _ in mixed.attempts(model)]
    counts = [count for model in ("b", "1:once", "5:invalid") for _, count in mixed.attempts(model)]
    assert max(counts) > 3 and len(set(pids)) < len(pids)


def test_a_killed_worker_costs_a_retry_and_leaves_a_row(mixed: Ran):
    [failed] = [event for event in mixed.of(Failed) if event.cell.model == "3:killed"]
    assert failed.kind is Failure.WORKER_DIED and failed.retry_in == 2.0
    [row] = [row for row in mixed.store.rows if row.cell_id == failed.cell.cell_id]
    assert (row.outcome, row.stage, row.number, row.job) == ("worker_died", "quantize", 1, "j")
    assert row.node == socket.gethostname() and row.error and "\n" not in row.error
    (first, _), (second, _) = mixed.attempts("3:killed")
    assert row.error.startswith("The actor is dead because its worker process has died") and "actor_id" not in row.error
    assert row.worker == f"pid {first}" and str(first) in row.traceback and first != second


def test_an_exception_out_of_the_runner_is_recorded_by_the_driver(mixed: Ran):
    rows = [row for row in mixed.store.rows if row.cell_id == work("4:raises")[0].cell.cell_id]
    failed = [event for event in mixed.of(Failed) if event.cell.model == "4:raises"]
    rows = [row for row in mixed.store.rows if row.cell_id == failed[0].cell.cell_id]
    assert [(row.outcome, row.number, row.error) for row in rows] == [
        ("bug", number, "RuntimeError: a mistake in run_cell") for number in (1, 2)
    ]
    assert "fake_runner.py" in rows[0].traceback


def test_only_attempts_that_nobody_else_recorded_are_recorded(mixed: Ran):
    assert sorted(row.outcome for row in mixed.store.rows) == ["bug", "bug", "worker_died"]


def test_a_worker_is_replaced_after_an_error_of_its_device(mixed: Ran):
    (first, _), (second, _) = mixed.attempts("6:cuda")
    assert first != second


def test_progress_arrives(mixed: Ran):
    gate = next(event for event in mixed.of(Started) if event.cell.model == "7:gate")
    progress = [event for event in mixed.of(Progressed) if event.cell_id == gate.cell.cell_id]
    assert (progress[-1].stage, progress[-1].done, progress[-1].total) == ("evaluate", 5, 7)
    assert progress[-1].worker == gate.worker


def test_more_cpus_than_there_are_is_clamped_and_said(mixed: Ran):
    assert mixed.notes[0] == "the job asks for 99 CPUs per worker but this machine has 2; using 2"
    threads = {dict(event.figures)["threads"] for event in mixed.of(Finished)}
    assert threads == {2.0}


def test_an_interrupt_ends_the_job_and_says_so(on_ray: None, tmp_path: Path):
    def interrupt(event: Event) -> None:
        if isinstance(event, Finished):
            raise KeyboardInterrupt

    ran = farm(work("a", "7:gate", "7:gate"), tmp_path, watch=interrupt, retries=0)
    assert ran.summary == Summary(finished=1, failed=0, interrupted=True)
    assert ran.events[-1].interrupted and ran.of(Failed) == []


def test_a_full_store_stops_the_job_without_blaming_the_cell(on_ray: None, tmp_path: Path):
    def open_gate(event: Event) -> None:
        if isinstance(event, Note):
            (tmp_path / "gates").touch()

    ran = farm(work("1:full", "7:gate", "a"), tmp_path, watch=open_gate, retries=0)
    assert ran.summary.stopped == "/store: no space left on device; 0 bytes free"
    assert ran.finished() == {"7:gate"}  # it was running and could finish
    assert (ran.summary.finished, ran.summary.failed, ran.of(Failed), ran.store.rows) == (1, 0, [], [])
    assert "submit again" in ran.notes[0]


def test_a_session_that_cannot_be_made_ends_the_job(on_ray: None, tmp_path: Path):
    with pytest.raises(QfarmError, match="a worker cannot start: ImportError: no module named 'flash'"):
        farm(work("a"), tmp_path, session="tests.fake_runner:BrokenSession")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_worker_without_cuda_is_refused_when_a_gpu_was_asked_for(on_ray: None, tmp_path: Path):
    with pytest.raises(InvalidInput, match="was given 1 GPU.*torch sees no CUDA device"):
        farm(work("a"), tmp_path, resources=Resources(gpus=1, cpus=1))
    assert not (tmp_path / "attempts").exists()


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 0.5})
    with pytest.raises(InvalidInput, match="asks for 1 GPU.*has only 0.5; set resources"):
        cluster.capacity(True, Resources(gpus=1, cpus=1), pytest.fail)


def test_an_answer_that_got_lost_is_asked_for_again(on_ray: None, tmp_path: Path, monkeypatch):
    import ray

    get, lost = ray.get, []

    def unreliable(reference, *, timeout=None):
        answer = get(reference, timeout=timeout)
        if isinstance(answer, Outcome) and not lost:
            lost.append(answer)
            raise ray.exceptions.ActorUnavailableError("the network is down", None)
        return answer

    monkeypatch.setattr(pool.ray, "get", unreliable)
    ran = farm(work("a"), tmp_path)
    assert lost and ran.finished() == {"a"} and len(ran.attempts("a")) == 1
    assert ran.of(Failed) == [] and ran.store.rows == []


def test_a_lost_inbox_costs_progress_only(on_ray: None, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pool.actors, "Inbox", MuteInbox)
    ran = farm(work("7:gate"), tmp_path, watch=lambda event: isinstance(event, Note) and (tmp_path / "gates").touch())
    assert ran.finished() == {"7:gate"} and ran.of(Progressed) == []
    assert [note.startswith("progress is no longer shown: ") for note in ran.notes] == [True]


@pytest.mark.slow
def test_a_stopped_worker_counts_as_hung(on_ray: None, tmp_path: Path):
    ran = farm(work("1:stopped"), tmp_path, silence_s=3.0)
    [failed] = ran.of(Failed)
    assert failed.kind is Failure.HUNG and ran.finished() == {"1:stopped"}
    assert [(row.outcome, row.stage) for row in ran.store.rows] == [("hung", "quantize")]


def without_ray(**values: str) -> dict[str, str]:
    """An environment for another process that knows nothing of the Ray of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | values


OWN_RAY = """
import sys
sys.path.insert(0, {root!r})
from tests.test_driver import *
def watch(event):
    print(type(event).__name__, getattr(event, "stage", ""), flush=True)
ran = farm(work("1:gate"), Path({folder!r}), watch=watch)
print(ran.summary, os.environ.get("RAY_AUTH_MODE"), flush=True)
"""


@pytest.mark.slow
def test_a_ray_of_our_own_starts_and_ends_with_the_job(tmp_path: Path):
    """In a process of its own, with HOME elsewhere: no token may be left there. SIGTERM is like Ctrl-C."""
    code = OWN_RAY.format(root=str(ROOT), folder=str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    environ = without_ray(HOME=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("Progressed evaluate"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    assert lines[-2:] == ["JobEnded", f"{Summary(finished=0, failed=0, interrupted=True)} None"]
    assert not (tmp_path / ".ray").exists()
    [attempt] = (tmp_path / "work" / "attempts").iterdir()
    assert not Path("/proc", attempt.read_text().split()[0]).exists()


NODES = """
import sys
sys.path.insert(0, {root!r})
import ray
from ray.cluster_utils import Cluster
from tests.test_driver import *
nodes = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False}})
# Before there is another node on this address: a driver that took the victim's raylet for its own would die with it.
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
victim = nodes.add_node(num_cpus=1)
folder = Path({folder!r})
removed = []
def watch(event):
    if isinstance(event, Progressed) and event.stage == "evaluate" and not removed:
        removed.append(victim)
        nodes.remove_node(victim, allow_graceful={graceful})
        nodes.add_node(num_cpus=1)
    if isinstance(event, Started) and removed:  # the second attempt: only now may a cell end
        (folder / "gates").touch()
ran = farm(work("1:gate"), folder, watch=watch, address=nodes.address, retries=0 if {graceful} else 1)
(folder / "told").write_text(repr([(row.outcome, row.error) for row in ran.store.rows] + [ran.summary]))
ray.shutdown()
nodes.shutdown()
"""
TIGHT_CHECKS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.mark.slow
@pytest.mark.parametrize(("graceful", "outcome"), [(True, "preempted"), (False, "node_died")])
def test_a_lost_node_is_told_from_a_preempted_one(tmp_path: Path, graceful: bool, outcome: str):
    code = NODES.format(root=str(ROOT), folder=str(tmp_path), graceful=graceful)
    answer = subprocess.run(
        [sys.executable, "-c", code], env=without_ray(**TIGHT_CHECKS), capture_output=True, text=True, timeout=180
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    told = (tmp_path / "told").read_text()  # not its output, where Ray speaks as well
    assert told.startswith(f"[('{outcome}', "), told
    assert told.endswith(f", {Summary(finished=1, failed=0, interrupted=False)}]") and told.count("('") == 1, told


def test_local_runs_the_same_way_without_ray(tmp_path: Path):
    ran = farm(work("a", "1:once", "4:raises", "5:invalid", "a"), tmp_path, local=True)
    assert ran.finished() == {"a", "1:once"}
    assert ran.summary == Summary(finished=3, failed=2, interrupted=False)
    assert [row.outcome for row in ran.store.rows] == ["bug", "bug"]
    assert {event.stage for event in ran.of(Progressed)} == {"load"}
    assert isinstance(ran.events[-1], JobEnded)


def test_local_takes_cells_of_every_share_of_a_gpu(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("qfarm.driver._require_gpu_here", lambda gpus: None)
    cells = [
        CellWork(cell=make_cell("m", 1), evaluations=(), needs_baseline=True, gpus=1.0),
        CellWork(cell=make_cell("m", baseline=True), evaluations=(), gpus=0.25),
        CellWork(cell=make_cell("m", 2), evaluations=(), gpus=0.5),
    ]
    assert farm(cells, tmp_path, local=True, resources=Resources(gpus=1)).summary.finished == 3


def test_local_stops_when_the_store_is_full(tmp_path: Path):
    (tmp_path / "gated").touch()
    ran = farm(work("1:full", "a"), tmp_path, local=True)
    assert ran.summary.stopped and ran.finished() == set() and ran.of(Failed) == []


def test_local_stops_on_an_interrupt(tmp_path: Path):
    def interrupt(event: Event) -> None:
        if isinstance(event, Progressed):
            raise KeyboardInterrupt

    ran = farm(work("a", "a"), tmp_path, local=True, watch=interrupt)
    assert ran.summary == Summary(finished=0, failed=0, interrupted=True)


def test_sigterm_is_like_an_interrupt(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(event: Event) -> None:
        if isinstance(event, Started):
            signal.raise_signal(signal.SIGTERM)

    assert farm(work("a"), tmp_path, local=True, watch=terminate).summary.interrupted
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_local_never_runs_on_the_cpu_in_silence(tmp_path: Path):
    with pytest.raises(InvalidInput, match="asks for 1 GPU.*has none; set resources: {gpus: 0}"):
        farm(work("a"), tmp_path, local=True, resources=Resources())


def test_a_given_up_baseline_is_said_and_blocks_nobody(tmp_path: Path):
    baseline = CellWork(cell=make_cell("1:invalid", baseline=True), evaluations=())
    dependant = dataclasses.replace(
        baseline, cell=dataclasses.replace(baseline.cell, recipe="rtn", scheme="w4", seed=1)
    )
    ran = farm([dataclasses.replace(dependant, needs_baseline=True), baseline], tmp_path, local=True)
    assert [event.cell.recipe for event in ran.of(Started)] == ["baseline", "rtn"]
    assert ran.notes == [
        "the baseline of 1:invalid was given up; cells that compare with it compute its states themselves"
    ]


HELLO = Hello(pid=1, node_id="n1", host="h", cuda=None)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"NodeID": "n1", "Alive": True, "DeathReason": 0}, Failure.WORKER_DIED),
        ({"NodeID": "n1", "Alive": False, "DeathReason": 1}, Failure.PREEMPTED),
        ({"NodeID": "n1", "Alive": False, "DeathReason": 2}, Failure.NODE_DIED),
        ({"NodeID": "n1", "Alive": False, "DeathReason": 3}, Failure.PREEMPTED),
        ({"NodeID": "n2", "Alive": False, "DeathReason": 2}, Failure.WORKER_DIED),
    ],
)
def test_the_nodes_fate_says_how_a_worker_died(monkeypatch, node: dict, expected: Failure):
    monkeypatch.setattr(pool.ray, "nodes", lambda: [node])
    assert pool.kind_of_death(HELLO, pool.ray.exceptions.ActorDiedError()) is expected
    assert pool.kind_of_death(HELLO, None) is expected
    assert pool.kind_of_death(None, None) is Failure.WORKER_DIED


def test_ray_may_tell_of_a_nodes_death_before_its_table_does(monkeypatch):
    monkeypatch.setattr(pool.ray, "nodes", lambda: [{"NodeID": HELLO.node_id, "Alive": True}])
    told = pool.RayError("The actor died because its node has died. Node Id: n1")
    assert pool.kind_of_death(HELLO, told) is Failure.NODE_DIED
    assert pool.kind_of_death(HELLO, pool.RayError("its worker process has died")) is Failure.WORKER_DIED


def test_the_memory_monitors_victim_ran_out_of_memory(monkeypatch):
    monkeypatch.setattr(pool.ray, "nodes", pytest.fail)
    assert (
        pool.kind_of_death(HELLO, pool.OutOfMemoryError("Task was killed due to the node running low")) is Failure.OOM
    )


def test_the_cause_of_a_death_is_short():
    error = pool.RayError(
        "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n\tpid: 7\n"
        "The actor is dead because its worker process has died. Some common causes include: (1) anything"
    )
    assert pool.cause_of_death(error) == "The actor is dead because its worker process has died."
    assert pool.cause_of_death(pool.RayError("just this")) == "just this"


class Letters:
    """An inbox that keeps what is pushed, in the shape of an actor's handle."""

    def __init__(self) -> None:
        self.push = self
        self.messages: list[Message] = []

    def remote(self, message: Message) -> None:
        self.messages.append(message)


def test_a_new_stage_is_reported_at_once_and_counts_wait(monkeypatch):
    monkeypatch.setattr(actors.ray, "get", lambda reference, timeout: None)
    monkeypatch.setattr(actors, "PUSH_S", 3600.0)
    letters = Letters()
    reporter = actors.Reporter(letters, heartbeat_s=5.0)
    reporter.begin("a1")
    for done in range(3):
        reporter.report("load", done, 3)
    reporter.report("evaluate", 0, 0)
    assert [(message.stage, message.done) for message in letters.messages] == [("load", 0), ("evaluate", 0)]


def test_a_quiet_attempt_still_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(actors, "PUSH_S", 0.001)
    letters = Letters()
    reporter = actors.Reporter(letters, heartbeat_s=0.0)
    reporter.begin("a1")
    while len(letters.messages) < 3:
        pass
    reporter.end()
    assert {message.stage for message in letters.messages} == {""}


def test_the_inbox_keeps_the_newest_of_each_stage():
    inbox = actors.Inbox()
    for stage, done in (("load", 1), ("load", 2), ("quantize", 1)):
        inbox.push(Message(attempt_id="a1", stage=stage, done=done, total=9))
    assert [(message.stage, message.done) for message in inbox.take()] == [("load", 2), ("quantize", 1)]
    assert inbox.take() == []


def test_a_new_worker_waits_for_the_process_before_it():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert actors._alive(process.pid)
        process.kill()
        while actors._alive(process.pid):
            pass  # dead but not yet reaped by us: it holds nothing any more
    assert not actors._alive(process.pid)


@pytest.mark.parametrize(
    ("node", "most", "fault"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, None, None),
        ({"CPU": 2.0}, {"CPU": 64, "GPU": 8}, None),  # an autoscaler may add such nodes
        (
            {"CPU": 2.0},
            {"CPU": 64},
            "wants 4 CPU\\(s\\) and 1 GPU\\(s\\), .* it may not grow so far; .* 2 CPU\\(s\\) and 0",
        ),
        ({"CPU": 8.0, "GPU": 0.5}, None, "has no autoscaler; its nodes have 8 CPU\\(s\\) and 0.5 GPU\\(s\\)"),
    ],
)
def test_workers_that_fit_nowhere_are_refused_at_once(monkeypatch, node: dict, most: dict | None, fault: str | None):
    from ray._private.state import state

    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node}, {"Alive": False, "Resources": {}}])
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: most)
    with pytest.raises(InvalidInput, match=fault) if fault else contextlib.nullcontext():
        cluster.capacity(False, Resources(gpus=1, cpus=4), pytest.fail)


@pytest.mark.parametrize(
    ("shares", "limit", "room", "expected"),
    [
        ((1.0, 1.0, 0.25, 0.25, 0.25), 9, 1.5, {1.0: 1, 0.25: 2}),
        ((1.0, 1.0, 0.25, 0.25, 0.25), 9, None, {1.0: 2, 0.25: 3}),
        ((1.0, 1.0, 0.25, 0.25, 0.25), 3, 8.0, {1.0: 2, 0.25: 1}),
        ((0.1, 0.1, 0.1, 0.1), 9, 0.3, {0.1: 3}),
        ((0.0, 0.0), 9, 0.0, {0.0: 2}),
    ],
)
def test_larger_workers_come_first_and_never_more_than_fit(
    shares: tuple, limit: int, room: float | None, expected: dict
):
    cells = [dataclasses.replace(one, gpus=gpus) for one, gpus in zip(work(*"abcde"), shares, strict=False)]
    board = Board(cells, print, FakeStore(), job_name="j", store_location="/s", retries=1, data=None)
    farmed = object.__new__(pool.Pool)
    farmed._board, farmed._limit = board, limit
    farmed._capacity = cluster.Capacity(workers=limit, cpus=1, gpus=1, local=room is not None, room=room)
    assert farmed._wanted() == expected


def hedged(monkeypatch, store: FakeStore, events: list[Event]) -> tuple[Board, Task, Task]:
    """A board on which one cell runs twice."""
    now = [1000.0]
    monkeypatch.setattr("qfarm.board.time.monotonic", lambda: now[0])
    cells = [dataclasses.replace(one, estimate_s=10.0) for one in work("a", "b", "c", "late")]
    board = Board(cells, events.append, store, job_name="j", store_location="/s", retries=1, data=None)
    first = {task.cell.model: task for task in (board.next_task(f"w{i}", node="n1") for i in range(4))}
    now[0] += 10.0
    for worker, model in (("w0", "a"), ("w1", "b"), ("w2", "c")):
        board.ended(worker, first[model], outcome_of(first[model]))
    now[0] += 100.0
    assert board.next_task("w1", node="n1") is None  # on the same node as the straggler
    second = board.next_task("w9", node="n2")
    assert second.cell == first["late"].cell and second.number == 2
    return board, first["late"], second


def outcome_of(task: Task, failure: Failure | None = None) -> Outcome:
    return Outcome(attempt_id=task.attempt_id, cell_id=task.cell.cell_id, failure=failure, error="as told", seconds=1.0)


def test_of_two_copies_the_first_wins_and_the_other_leaves_a_row(monkeypatch):
    store, events = FakeStore(), []
    board, first, second = hedged(monkeypatch, store, events)
    assert not board.superseded(first)
    board.ended("w9", second, outcome_of(second))
    assert board.superseded(first) and board.scheduler.done
    farmed = object.__new__(pool.Pool)
    farmed._board, farmed._departed = board, []
    monkeypatch.setattr(pool.ray, "kill", lambda actor, no_restart: None)
    farmed._workers = [pool._Worker(name="w3", actor=None, answer=None, hello=HELLO, task=first)]
    farmed._end_copies()
    assert farmed._workers == [] and not board.superseded(first)
    [row] = store.rows
    assert (row.outcome, row.number, row.expected_s) == ("superseded", 1, 10.0)
    assert len([event for event in events if isinstance(event, Finished)]) == 4
    assert [event for event in events if isinstance(event, Failed)] == []


def test_a_late_answer_of_a_superseded_copy_changes_nothing(monkeypatch):
    events: list[Event] = []
    board, first, second = hedged(monkeypatch, FakeStore(), events)
    board.ended("w9", second, outcome_of(second))
    before = list(events)
    board.ended("w3", first, outcome_of(first, Failure.OOM))
    assert events == before and board.scheduler.counts.finished == 4


def test_a_copy_that_fails_leaves_the_other_alone(monkeypatch):
    events: list[Event] = []
    board, first, second = hedged(monkeypatch, FakeStore(), events)
    board.lost("w9", second, PLACE, Failure.WORKER_DIED, "gone", None)
    assert events[-1].retry_in == 0.0 and board.scheduler.counts.running == 1
    board.ended("w3", first, outcome_of(first))
    assert board.scheduler.done and board.scheduler.counts.finished == 4


def test_a_worker_that_lives_without_progress_counts_as_hung(monkeypatch):
    events: list[Event] = []
    board = make_board(FakeStore(), events)
    task = board.next_task("w1")
    board.progressed("w1", task, "quantize", 1, 8)
    later = time.monotonic() + 100
    monkeypatch.setattr(pool.time, "monotonic", lambda: later)
    board.progressed("w1", task, "quantize", 1, 8)  # a heartbeat that says nothing new
    monkeypatch.setattr(pool.ray, "kill", lambda actor, no_restart: None)
    monkeypatch.setattr(pool.Pool, "_empty_inbox", lambda self: None)
    farmed = object.__new__(pool.Pool)
    farmed._board, farmed._deaf, farmed._letters, farmed._departed = board, False, None, []
    farmed._workers = [pool._Worker(name="w1", actor=None, answer=None, hello=HELLO, task=task)]
    for stall_s, hung in ((101.0, False), (99.0, True)):
        farmed._settings = Settings(stall_s=stall_s)
        farmed._end_silent()
        farmed._end_stalled()
        assert bool(farmed._workers) is not hung
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.kind is Failure.HUNG and failed.error == "no progress for 99 s, though the process lives"


def make_board(store: FakeStore, events: list[Event], retries: int = 1) -> Board:
    return Board(work("a"), events.append, store, job_name="j", store_location="/s", retries=retries, data=None)


PLACE = Place(worker="pid 1", node="n")


@pytest.mark.parametrize(("heard", "dies"), [(True, False), (False, True), (None, False)])
def test_unread_signs_of_life_count_when_the_driver_stood_still(monkeypatch, heard: bool | None, dies: bool):
    """`heard` is None when the inbox does not answer."""
    events: list[Event] = []
    board = make_board(FakeStore(), events)
    task = board.next_task("w1")
    stalled = time.monotonic() + 1000
    monkeypatch.setattr(pool.time, "monotonic", lambda: stalled)
    messages = [Message(attempt_id=task.attempt_id, stage="", done=0, total=0)] if heard else []
    monkeypatch.setattr(pool.ray, "wait", lambda letters, timeout: ([] if heard is None else letters, []))
    monkeypatch.setattr(pool.ray, "get", lambda letters, timeout: messages)
    monkeypatch.setattr(pool.ray, "kill", lambda actor, no_restart: None)
    monkeypatch.setattr(pool.ray, "nodes", lambda: [])
    farmed = object.__new__(pool.Pool)
    farmed._board, farmed._settings, farmed._deaf, farmed._departed = board, Settings(), False, []
    farmed._inbox, farmed._letters = SimpleNamespace(take=SimpleNamespace(remote=lambda: "letters")), None
    worker = pool._Worker(name="w1", actor=None, answer=None, hello=HELLO, task=task)
    farmed._workers = [worker]
    farmed._end_silent()
    assert [event.kind for event in events if isinstance(event, Failed)] == ([Failure.HUNG] if dies else [])
    assert farmed._workers == ([] if dies else [worker])


def test_a_store_that_went_away_stops_the_job_like_a_full_one():
    board = make_board(FakeStore(OSError(116, "Stale file handle")), [])
    board.lost("w1", board.next_task("w1"), PLACE, Failure.WORKER_DIED, "gone", None)
    assert board.stopped == "/s: the store cannot be written: OSError: [Errno 116] Stale file handle"


def test_a_ray_that_does_not_start_here_is_one_line(monkeypatch):
    import ray

    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore. And more")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(QfarmError, match="cannot start Ray on this machine: The current node timed out .*; --local"):
        cluster._join(None)


def test_a_store_that_is_full_for_the_drivers_own_row_stops_the_job():
    events: list[Event] = []
    board = make_board(FakeStore(StoreFull("/s: full")), events)
    task = board.next_task("w1")
    board.lost("w1", task, PLACE, Failure.WORKER_DIED, "gone", None)
    assert board.stopped == "/s: full" and board.next_task("w2") is None


def test_progress_of_an_ended_attempt_is_ignored():
    events: list[Event] = []
    board = make_board(FakeStore(), events)
    task = board.next_task("w1")
    board.progressed("w1", task, "load", 0, 0)
    board.progressed("w1", task, "load", 0, 0)
    board.progressed("w1", task, "", 0, 0)
    board.lost("w1", task, PLACE, Failure.HUNG, "silent", None)
    board.progressed("w1", task, "load", 1, 0)
    assert [type(event) for event in events] == [Started, Progressed, Failed]


def test_a_task_carries_what_the_worker_needs():
    board = make_board(FakeStore(), [])
    task = board.next_task("w1")
    assert (task.job, task.store, task.number, task.data) == ("j", "/s", 1, None)
    assert board.next_task("w2") is None
    outcome = Outcome(attempt_id=task.attempt_id, cell_id=task.cell.cell_id, failure=None, error=None, seconds=1.0)
    board.ended("w1", task, outcome)
    assert board.scheduler.done and isinstance(task, Task)


def test_one_line_is_one_line():
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("a\nb") == "a b"
    assert len(one_line(ValueError("x" * 9999))) == 500


def test_importing_the_driver_loads_neither_ray_nor_torch_nor_rich():
    code = "import sys, qfarm.driver; print(sorted({'ray', 'torch', 'transformers', 'rich'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("total", "resources", "expected"),
    [
        ({"CPU": 8.0}, Resources(gpus=0, cpus=3), (2, 3)),
        ({"CPU": 8.0}, Resources(gpus=0, cpus=1, workers=3), (3, 1)),
        ({"CPU": 8.0}, Resources(gpus=0, cpus=1, workers=99), (8, 1)),
        ({"CPU": 8.0, "GPU": 2.0}, Resources(gpus=1, cpus=1), (2, 1)),
        ({"CPU": 8.0, "GPU": 1.0}, Resources(gpus=0.1, cpus=1), (8, 1)),
        ({"CPU": 2.0, "GPU": 4.0}, Resources(gpus=1, cpus=4), (1, 2)),
    ],
)
def test_capacity_of_one_machine(monkeypatch, total: dict, resources: Resources, expected: tuple):
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    found = cluster.capacity(True, resources, lambda text: None)
    assert (found.workers, found.cpus) == expected


def test_a_machine_without_gpus_is_no_place_for_a_job_that_wants_one(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(InvalidInput, match="has none; set resources: {gpus: 0} in the job"):
        cluster.capacity(True, Resources(gpus=1), pytest.fail)


def test_a_cluster_is_asked_for_as_many_as_it_may_grow_to(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}])
    assert cluster.capacity(False, Resources(gpus=1, cpus=8), pytest.fail).workers == 64
    assert cluster.capacity(False, Resources(gpus=1, cpus=8, workers=500), pytest.fail).workers == 500


def test_workers_start_with_threads_and_without_secrets():
    environ = {"HF_TOKEN": "secret", "HF_HOME": "/h", "HF_HUB_OFFLINE": "1", "OPENBLAS_CORETYPE": "x", "HOME": "/r"}
    found = cluster.worker_environment(environ, {"A": "b"}, 3)
    assert found == {
        "HF_HOME": "/h",
        "HF_HUB_OFFLINE": "1",
        "OPENBLAS_CORETYPE": "x",
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "A": "b",
    }


def test_a_local_ray_wants_a_token_unless_the_user_decided(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    values = cluster.local_environment()
    assert values["RAY_AUTH_MODE"] == "token" and len(values["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(cluster.local_environment())


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("QFARM_TEST_A", "1")
    with (
        contextlib.suppress(ZeroDivisionError),
        cluster.process_environment({"QFARM_TEST_A": None, "QFARM_TEST_B": "2"}),
    ):
        assert "QFARM_TEST_A" not in os.environ and os.environ["QFARM_TEST_B"] == "2"
        raise ZeroDivisionError
    assert os.environ["QFARM_TEST_A"] == "1" and "QFARM_TEST_B" not in os.environ


NO_YAML = Path("/nonexistent/cluster.yaml")


def test_the_address_given_wins():
    environ = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert find_address("http://h:8265", environ, NO_YAML) == ("http://h:8265", "cluster at http://h:8265")
    assert find_address(None, environ, NO_YAML) == ("10.0.0.1:6379", "cluster at 10.0.0.1:6379")
    address, where = find_address(None, {}, NO_YAML)
    assert address is None and where.startswith("local Ray, ") and where.endswith(" CPUs")
    assert find_address("local", environ, NO_YAML)[0] is None
    assert find_address("auto", {}, NO_YAML)[0] == "auto"


@pytest.mark.parametrize("address", ["nohost", "10.0.0.1", "http://", "h:port", "ftp://h:1", "h:99999"])
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(InvalidInput, match="not an address; use HOST:6379"):
        find_address(address, {}, NO_YAML)


def test_ray_client_is_refused():
    with pytest.raises(InvalidInput, match="RAY_ADDRESS ray://h:10001: Ray Client addresses are not supported"):
        find_address(None, {"RAY_ADDRESS": "ray://h:10001"}, NO_YAML)


def test_a_cluster_file_counts_when_its_cluster_runs(monkeypatch, tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster_name: x\n")
    monkeypatch.setattr(launcher, "look_up", lambda file: launcher.Found(head="10.0.0.9"))
    assert find_address(None, {}, path) == (str(path), f"cluster of {path}, head 10.0.0.9")
    assert remote.is_remote(str(path))
    monkeypatch.setattr(launcher, "look_up", lambda file: launcher.Found(head=None, reason="none runs"))
    address, where = find_address(None, {}, path)
    assert address is None and where.endswith(f"(no cluster of {path}: none runs)")
    monkeypatch.setattr(launcher, "look_up", pytest.fail)
    assert find_address("local", {}, path)[0] is None
    assert find_address(str(path), {}, NO_YAML) == (str(path), f"cluster at {path}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("provider: [", "not a file for Ray's cluster launcher"),
        ("[]", "not a file for Ray's cluster launcher"),
        ("cluster_name: nobody-has-this\nprovider: {type: external}\n", "KeyError: 'module'"),
    ],
)
def test_a_cluster_file_that_leads_nowhere_finds_nothing(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    found = launcher.look_up(path)
    assert found.head is None and reason in found.reason


def test_a_cloud_that_cannot_be_asked_is_not_waited_for(tmp_path: Path, monkeypatch):
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster_name: x\nprovider: {type: aws, region: r}\n")
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(launcher.subprocess, "run", pytest.fail)
    assert launcher.look_up(path) == launcher.Found(head=None, reason="not asked for, boto3 is not installed")


def test_a_head_that_cannot_be_reached_is_one_line(tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster_name: x\nprovider: {type: nonesuch}\n")
    with pytest.raises(Unavailable, match="yaml: the head cannot be reached: ") as raised, launcher.tunnel(path):
        pass
    assert "\n" not in str(raised.value)


@dataclasses.dataclass
class FakeServer:
    """A job server's client that knows some jobs."""

    known: dict[str, str]
    stopped: list[str] = dataclasses.field(default_factory=list)

    def list_jobs(self):
        return [self.get_job_info(name) for name in self.known] + [self._job(None, "RUNNING")]

    def get_job_info(self, name):
        return self._job(name, self.known[name])

    def _job(self, name, status):
        from ray.job_submission import JobStatus

        return SimpleNamespace(
            submission_id=name, status=JobStatus(status), start_time=1000, end_time=None, message="the message"
        )

    def get_job_logs(self, name):
        return "first\nlast\n\n"

    def stop_job(self, name):
        self.stopped.append(name)
        self.known[name] = "STOPPED"
        return True


@pytest.fixture
def server(monkeypatch) -> FakeServer:
    fake = FakeServer({})
    monkeypatch.setattr(remote, "_client", lambda url, address: fake)
    return fake


def test_a_job_at_work_is_not_submitted_twice_and_later_ones_are_numbered(server: FakeServer):
    assert remote._free_name(server, "http://h", "qfarm-a") == "qfarm-a"
    server.known = {"qfarm-a": "FAILED", "qfarm-a.2": "STOPPED", "qfarm-ab": "RUNNING", "qfarm-a.x": "RUNNING"}
    assert remote._free_name(server, "http://h", "qfarm-a") == "qfarm-a.3"
    server.known["qfarm-a.3"] = "PENDING"
    with pytest.raises(InvalidInput, match=r"at work there already, as qfarm-a\.3 \(pending\); look at it with: qfarm"):
        remote._free_name(server, "http://h", "qfarm-a")


def test_what_a_cluster_was_handed_is_listed_and_ended(server: FakeServer):
    server.known = {"qfarm-a": "RUNNING", "qfarm-b": "SUCCEEDED"}
    found = {job.name: job for job in remote.jobs("http://h")}
    assert set(found) == {"qfarm-a", "qfarm-b"} and found["qfarm-a"].at_work and found["qfarm-a"].said == "last"
    assert [job.name for job in remote.jobs("http://h", "qfarm-b")] == ["qfarm-b"]
    ended = remote.cancel("http://h", "qfarm-a")
    assert (ended.status, ended.at_work, server.stopped) == ("stopped", False, ["qfarm-a"])
    with pytest.raises(InvalidInput, match=r"the job qfarm-a has ended already \(stopped\)"):
        remote.cancel("http://h", "qfarm-a")
    with pytest.raises(InvalidInput, match="no job qfarm-c there; its jobs: qfarm-a, qfarm-b"):
        remote.cancel("http://h", "qfarm-c")
    assert server.stopped == ["qfarm-a"]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_no_cluster_at_the_address_is_one_line(closed_port: int):
    # In a thread of its own, since this process may have a Ray that counts as the one to use.
    address = f"127.0.0.1:{closed_port}"
    with pytest.raises(InvalidInput, match=f"no Ray cluster answers at {address}"):
        cluster._join(address)


def test_no_job_server_at_the_address_is_one_line(closed_port: int, tmp_path: Path):
    with pytest.raises(InvalidInput, match=f"127.0.0.1:{closed_port}: no Ray job server answers there"):
        remote.submit(f"http://127.0.0.1:{closed_port}", ["submit", "j.yaml"], tmp_path, submission_id="x")


def test_some_other_web_server_is_one_line(tmp_path: Path):
    import http.server

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InvalidInput, match="this is no Ray job server"):
            remote.submit(f"http://127.0.0.1:{server.server_port}", [], tmp_path, submission_id="x")
        server.shutdown()


def test_a_shared_store_is_accepted():
    remote.require_shared_store("/data/results")


def test_an_object_store_is_accepted_by_scheme():
    remote.require_shared_store("s3://bucket/x")
    with pytest.raises(InvalidInput, match="file:///data: no object store that is known; give s3:// or gs://"):
        remote.require_shared_store("file:///data")


def test_paths_are_sent_relative_to_what_is_sent(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("jobs/a.yaml", f"{tmp_path}/jobs/a.yaml", "x/../jobs/a.yaml"):
        assert remote.path_there(given, tmp_path, "") == "jobs/a.yaml"
    for given in ("..", "/data", "../x"):
        with pytest.raises(InvalidInput, match=f"{given}: outside the current folder.*; put it there"):
            remote.path_there(given, tmp_path, "put it there")


@pytest.mark.parametrize("store", ["results", "./results", "~/results"])
def test_a_relative_store_is_refused(store: str):
    with pytest.raises(InvalidInput, match="is relative, and the job does not run on this machine"):
        remote.require_shared_store(store)


def test_a_broken_link_is_refused_before_anything_is_sent(tmp_path: Path):
    (tmp_path / "kernels").symlink_to("../nowhere")
    with pytest.raises(InvalidInput, match="kernels: a link to ../nowhere, which is not there"):
        remote.submit("http://127.0.0.1:1", [], tmp_path, submission_id="x")


@pytest.mark.parametrize("target", [".", "..", "../../inner"])
def test_a_link_that_leads_back_up_is_refused(tmp_path: Path, target: str):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "loop").symlink_to(target)
    (tmp_path / "inner").symlink_to("outer/inner")
    with pytest.raises(InvalidInput, match="a link to .* leads back to where it is"):
        remote.check_upload(tmp_path)


def test_links_to_folders_beside_are_fine(tmp_path: Path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "rtn.py").write_text("")
    (tmp_path / "qfarm").mkdir()
    (tmp_path / "qfarm" / "methods").symlink_to("../methods")
    remote.check_upload(tmp_path)
    remote.check_upload(ROOT)


def test_too_much_to_send_is_refused_with_the_largest_files(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_UPLOAD_BYTES", 2**20)
    (tmp_path / "small").write_bytes(b"x")
    (tmp_path / "weights.bin").write_bytes(bytes(2 * 2**20))
    with pytest.raises(InvalidInput, match=r"2\.0 MiB to send, at most 1\.0 MiB can be; the largest: weights\.bin"):
        remote.check_upload(tmp_path)
    (tmp_path / ".rayignore").write_text("*.bin\n")
    remote.check_upload(tmp_path)


def test_what_ray_leaves_out_may_be_broken(tmp_path: Path):
    (tmp_path / ".gitignore").write_text("build/\n")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "gone").symlink_to("nowhere")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "gone").symlink_to("nowhere")
    remote.check_upload(tmp_path)


def test_the_driver_on_the_cluster_is_not_told_to_submit_itself():
    assert remote._without_address(["submit", "--address", "http://h", "j.yaml"]) == ["submit", "j.yaml"]
    assert remote._without_address(["submit", "j.yaml", "--address=http://h"]) == ["submit", "j.yaml"]


CLIENT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from qfarm import remote
from qfarm.errors import InvalidInput
try:
    code = remote.submit({address!r}, {argv!r}, Path({folder!r}), submission_id={name!r}, detach={detach})
    print("exit code", code, flush=True)
except InvalidInput as error:
    print("refused:", error, flush=True)
"""
FAKE_QFARM = """
import os, sys
print("arguments", sys.argv[1:], flush=True)
print("linked", os.listdir("linked"), flush=True)
sys.exit(3)
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """A head with a job server that wants a token; what it prints is the address."""
    import requests

    gcs, dashboard, agent, client = free_ports(4)
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    sizes = ["--num-cpus=1", "--object-store-memory=100000000", f"--dashboard-agent-listen-port={agent}"]
    with tempfile.TemporaryDirectory(prefix="qf", dir="/tmp", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
            + [*ports, *sizes, f"--temp-dir={folder}"],
            env=without_ray(**TOKEN, HOME=str(tmp_path)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            for _ in range(600):
                with contextlib.suppress(requests.exceptions.ConnectionError):
                    if requests.get(f"{address}/api/version", timeout=5).status_code == 401:
                        break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait(30)


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}


@pytest.mark.slow
def test_a_job_is_submitted_followed_and_refused(head: str, tmp_path: Path):
    (tmp_path / "job" / "qfarm").mkdir(parents=True)
    (tmp_path / "job" / "qfarm" / "__init__.py").touch()
    (tmp_path / "job" / "qfarm" / "__main__.py").write_text(FAKE_QFARM)
    (tmp_path / "job" / "beside").mkdir()
    (tmp_path / "job" / "beside" / "file").touch()
    (tmp_path / "job" / "linked").symlink_to("beside")

    def client(name: str, environ: dict[str, str], detach: bool = False) -> list[str]:
        argv = ["submit", "a job.yaml", "--address", head]
        folder = str(tmp_path / "job")
        code = CLIENT.format(root=str(ROOT), address=head, argv=argv, folder=folder, name=name, detach=detach)
        environ = without_ray(HOME=str(tmp_path), RAY_ADDRESS="http://127.0.0.1:9") | environ
        answer = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.splitlines()

    lines = client("first", TOKEN)
    assert lines[-1] == "exit code 3"
    assert "arguments ['submit', 'a job.yaml']" in lines and "linked ['file']" in lines
    lines = client("first", TOKEN, detach=True)
    assert lines[0].startswith("submitted as first.2; look at it with: qfarm status; follow it with: ray job logs")
    assert lines[-1] == "exit code 0"
    [line] = client("third", {"RAY_AUTH_MODE": "disabled"})
    nowhere = "RAY_AUTH_MODE is disabled, the token comes from nowhere"
    assert line == f"refused: {head}: the cluster refuses our token; {nowhere}"
    [line] = client("third", TOKEN | {"RAY_AUTH_TOKEN": "6" * 64})
    assert line.endswith("RAY_AUTH_MODE is token, the token comes from RAY_AUTH_TOKEN") and "666" not in line


@pytest.mark.parametrize("given", [None, "3"])
def test_one_process_computes_with_as_many_threads_as_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    """Or its last bits would not be a worker's; OMP_NUM_THREADS, which torch has read by then, has the last word."""
    import torch

    before, seen = torch.get_num_threads(), set()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    resources = Resources(gpus=0, cpus=before + 1)
    farm(work("a"), tmp_path, local=True, resources=resources, watch=lambda _: seen.add(torch.get_num_threads()))
    assert seen == {before if given else before + 1} and torch.get_num_threads() == before
