"""Chaos run: a job on a small Ray cluster of this machine whose workers and nodes are killed while it runs.

    python -m qfarm.bench.chaos_run JOB STORE FOLDER SEED

A process of its own, since Ray's health checks are read when its processes start. Nodes have one CPU and one GPU that
is none. What is killed, and when, follows from SEED: between two kills cells finish, so that the job always ends. An
empty SEED kills nothing. FOLDER/kills.json tells what was killed; only processes that this run started are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from qfarm import driver, worker
from qfarm.events import Event, Finished
from qfarm.job import Resources, load_job
from qfarm.plan import Outcome, Task, make_plan
from qfarm.store import Store
from qfarm.work import open_work

FOLDER = "QFARM_CHAOS_FOLDER"
MARKS, KILLS = "running", "kills.json"
NODES = 2  # workers, beside a head without any
# SIGKILL and SIGSTOP of a worker, a node that is killed, a node that is drained.
KINDS = {"killed": 6, "stopped": 1, "node": 2, "drained": 1}
DELAY_S = 1.5  # at most, between a cell's end and the kill: about what a cell of the small model takes
SILENCE_S = 15.0  # without a heartbeat for so long, a worker counts as hung
RETRIES = 10
NODE_TRIES = 3
OBJECT_STORE_BYTES = 100_000_000  # nothing of size goes through it
HEALTH_CHECKS = {  # so that a lost node is noticed within seconds
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """An attempt that a worker is at."""

    pid: int
    born: float  # of the process, since pids come again
    node: str
    attempt: str

    def __post_init__(self) -> None:
        assert self.pid > 1, "0 and 1 would mean whole groups of processes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """One blow, the attempts that it struck for certain, and the processes that it ended.

    A worker may have been given another cell in the moment of the blow, of which nobody has seen a mark.
    """

    kind: str
    attempts: tuple[str, ...]
    pids: tuple[int, ...]


def run_cell(task: Task, session: worker.Session, report: worker.Progress) -> Outcome:
    """`qfarm.worker.run_cell`, with a mark that says who is at what."""
    me = psutil.Process()
    node = ray.get_runtime_context().get_node_id()
    mark = Mark(pid=me.pid, born=me.create_time(), node=node, attempt=task.attempt_id)
    path = Path(os.environ[FOLDER]) / MARKS / str(me.pid)
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(dataclasses.asdict(mark)))
    aside.rename(path)
    try:
        return worker.run_cell(task, session, report)
    finally:
        path.unlink()


def marks(folder: Path) -> list[Mark]:
    """Attempts of processes that live and are not stopped."""
    found = []
    for path in folder.iterdir():
        if path.suffix:
            continue
        try:
            mark = Mark(**json.loads(path.read_text()))
            process = psutil.Process(mark.pid)
            alive = process.create_time() == mark.born and process.status() not in ("zombie", "stopped")
        except (FileNotFoundError, psutil.NoSuchProcess):
            continue  # it has just ended
        if alive:
            found.append(mark)
    return sorted(found, key=lambda mark: mark.pid)


class Killer:
    """Kills something after each of some finished cells; `blows` holds what it did.

    It works in the main thread, where Ray wants its nodes to be started, and the driver in another, which stands still
    while a node goes and another comes: that takes seconds, in which all other cells might end unharmed.
    """

    def __init__(self, cluster: Any, nodes: list[Any], folder: Path, seed: int, cells: int) -> None:
        self._cluster, self._nodes, self._folder = cluster, nodes, folder
        self._draw = random.Random(seed)
        self._kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
        self._draw.shuffle(self._kinds)
        # The last cells are left alone, so that the last blow finds something to strike.
        self._at = set(self._draw.sample(range(1, cells - 2), k=min(len(self._kinds), cells - 3)))
        self._turns, self._moving = threading.Semaphore(0), threading.Lock()
        self._over = threading.Event()
        self._finished = 0
        self.blows: list[Kill] = []

    def watch(self, event: Event) -> None:
        """Called by the driver with everything that happens."""
        if isinstance(event, Finished):
            self._finished += 1
            if self._finished in self._at:
                self._turns.release()
            with self._moving:
                pass

    def end(self) -> None:
        """The job is over: nothing is there to strike."""
        self._over.set()
        self._turns.release()

    def run(self) -> None:
        """Strike until the job is over."""
        for kind in self._kinds:
            self._turns.acquire()
            if self._over.wait(self._draw.uniform(0, DELAY_S)):
                return
            victim = self._victim()
            if victim is None:
                return
            if kind in ("killed", "stopped"):
                self._strike_worker(kind, victim)
            else:
                with self._moving:
                    self._strike_node(kind, victim.node)

    def _victim(self) -> Mark | None:
        """Somebody who is at work, as soon as there is one; None when the job is over."""
        while not (running := marks(self._folder / MARKS)):
            if self._over.wait(0.02):
                return None
        return self._draw.choice(running)

    def _strike_worker(self, kind: str, victim: Mark) -> None:
        try:
            os.kill(victim.pid, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        except ProcessLookupError:
            return  # it was quicker
        self.blows.append(Kill(kind=kind, attempts=(victim.attempt,), pids=(victim.pid,)))

    def _strike_node(self, kind: str, node_id: str) -> None:
        node = next(node for node in self._nodes if node.node_id == node_id)
        attempts, pids = self._at_node(node_id), _processes(node)
        self._cluster.remove_node(node, allow_graceful=kind == "drained")
        self.blows.append(Kill(kind=kind, attempts=tuple(sorted(attempts)), pids=tuple(sorted(pids))))
        self._nodes.remove(node)
        self._nodes.append(add_node(self._cluster))

    def _at_node(self, node_id: str) -> set[str]:
        return {mark.attempt for mark in marks(self._folder / MARKS) if mark.node == node_id}


def _processes(node: Any) -> set[int]:
    """A node's processes, workers included: those are its raylet's children."""
    found: set[int] = set()
    for _, process in node.live_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    return found


def add_node(cluster: Any) -> Any:
    """A node with one worker's place."""
    before = set(cluster.worker_nodes)

    def start() -> Any:
        for node in set(cluster.worker_nodes) - before:  # one that was not up in time could still take cells
            cluster.remove_node(node, allow_graceful=False)
        return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=OBJECT_STORE_BYTES)

    return _started(start)


def _head() -> Any:
    """A cluster of a head alone, where no cell runs."""
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 0, "num_gpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
    return _started(lambda: Cluster(initialize_head=True, head_node_args={**room, "include_dashboard": False}))


def _started(start: Callable[[], Any]) -> Any:
    """On a busy machine a raylet may not be up within the 30 s that Ray gives it."""
    for left in reversed(range(NODE_TRIES)):
        try:
            return start()
        except Exception as error:  # Ray raises no more special one
            if not left:
                raise
            print(f"a node did not start: {error}; trying again", file=sys.stderr)


def main(job_path: str, location: str, folder_name: str, seed: str) -> int:
    """Run the job. Exit status: 0 when every cell is finished."""
    folder = Path(folder_name)
    (folder / MARKS).mkdir(parents=True)
    job = load_job(job_path)
    work = open_work(make_plan(job, None, None))
    Store.open(location, create=True)
    cluster = _head()
    # Before there is another node on this address: a driver that took its raylet for its own would die with it.
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        nodes = [add_node(cluster) for _ in range(NODES)]
        killer = Killer(cluster, nodes, folder, int(seed or 0), len(work))
        settings = driver.Settings(
            address=cluster.address,
            resources=Resources(gpus=1, cpus=1, workers=NODES),
            real_gpus=False,
            retries=RETRIES,
            env={FOLDER: folder_name},
            silence_s=SILENCE_S,
            runner="qfarm.bench.chaos_run:run_cell",
        )
        began = time.monotonic()
        summaries: list[driver.Summary] = []

        def drive() -> None:
            watch = killer.watch if seed else lambda event: None
            try:
                summaries.append(driver.run(work, settings, watch, job_name=job.file.name, store_location=location))
            finally:
                killer.end()

        driving = threading.Thread(target=drive, name="driver", daemon=True)
        driving.start()
        killer.run()
        driving.join()
        told = {"seconds": time.monotonic() - began, "kills": [dataclasses.asdict(blow) for blow in killer.blows]}
        (folder / KILLS).write_text(json.dumps(told))
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0 if [summary.finished for summary in summaries] == [len(work)] else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
