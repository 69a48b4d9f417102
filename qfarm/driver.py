"""Driver: runs a job's cells to the end, on Ray or in this process, and tells a watcher what happens.

The scheduler decides, the board keeps the books, and the pool owns the Ray workers. Results never pass through here:
workers put them into the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pkgutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qfarm.board import AttemptStore, Board, CellWork, Place
from qfarm.cluster import find_address, lacking_gpu, process_environment
from qfarm.errors import InvalidInput
from qfarm.events import Event, JobEnded
from qfarm.job import Resources

if TYPE_CHECKING:
    from qfarm.plan import Task

__all__ = ["CellWork", "Settings", "Summary", "find_address", "run", "run_local"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Where and how to run."""

    address: str | None = None  # host:port or "auto"; None: a Ray of our own on this machine
    resources: Resources = Resources()
    retries: int = 2
    data: str | None = None  # folder of the data pack
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)  # extra environment of the workers
    poll_s: float = 0.25  # between two looks at progress
    silence_s: float = 300.0  # without a heartbeat for so long, a worker counts as hung
    stall_s: float = 1800.0  # with heartbeats but without progress for so long at least, too
    runner: str = "qfarm.worker:run_cell"
    session: str = "qfarm.worker:Session"
    real_gpus: bool = True  # False: a rehearsal on a Ray whose GPUs are none; workers compute on what there is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    finished: int
    failed: int  # given up
    interrupted: bool
    stopped: str | None = None  # one line: why no more cells were handed out, e.g. a full store


def run(
    tasks: Sequence[CellWork],
    settings: Settings,
    emit: Callable[[Event], None],
    *,
    job_name: str,
    store_location: str,
    store_factory: Callable[[str], AttemptStore] | None = None,
) -> Summary:
    """Run cells on Ray until each is finished or given up; the last event is JobEnded.

    The first is not JobStarted: only the caller knows what the store held before. An interrupt (Ctrl-C or SIGTERM)
    ends the workers and returns a summary; a second one ends this process at once. Raises InvalidInput when Ray cannot
    be reached or the machine lacks what the job asks for, QfarmError when no worker can start.
    """
    # Ray takes a second to import, which --local need not pay. It would print its own account of every lost worker
    # among our output; this documented switch is read at the import.
    with process_environment({"RAY_DEDUP_LOGS_SKIP_REGEX": "."}):
        from qfarm.pool import run_pool

    board = _board(tasks, settings, emit, job_name, store_location, store_factory)
    return _supervised(board, lambda: run_pool(board, settings))


def run_local(
    tasks: Sequence[CellWork],
    settings: Settings,
    emit: Callable[[Event], None],
    *,
    job_name: str,
    store_location: str,
    store_factory: Callable[[str], AttemptStore] | None = None,
) -> Summary:
    """Run cells in this process, one after the other, without Ray; the same events and retries as `run`."""
    board = _board(tasks, settings, emit, job_name, store_location, store_factory)
    with _threads(settings.resources.cpus):
        return _supervised(board, lambda: _run_here(board, settings))


@contextlib.contextmanager
def _threads(cpus: int) -> Iterator[None]:
    """As many threads as a worker has, unless OMP_NUM_THREADS says otherwise: last bits depend on their number."""
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpus)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_here(board: Board, settings: Settings) -> None:
    _require_gpu_here(settings.resources.gpus)
    os.environ.update(settings.env)
    place = Place(worker=f"pid {os.getpid()}", node=socket.gethostname())
    run_cell = pkgutil.resolve_name(settings.runner)
    session = pkgutil.resolve_name(settings.session)(settings.data)
    while not board.scheduler.done and board.stopped is None:
        shares = board.scheduler.open_by_gpus  # one worker here takes cells of every size
        task = next(filter(None, (board.next_task(place.worker, gpus=gpus) for gpus in shares)), None)
        if task is None:
            time.sleep(board.scheduler.next_due(time.monotonic()) or 0.0)
            continue

        def report(stage: str, done: int = 0, total: int = 0, task: Task = task) -> None:
            board.progressed(place.worker, task, stage, done, total)

        try:
            outcome = run_cell(task, session, report)
        except Exception as error:  # `run_cell` keeps a cell's failures to itself
            trace = "".join(traceback.format_exception(error))
            board.raised(place.worker, task, place, error, trace)
        else:
            board.ended(place.worker, task, outcome)


def _require_gpu_here(gpus: float) -> None:
    if not gpus:
        return
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > here:
        raise InvalidInput(lacking_gpu(gpus, here))


def _board(
    tasks: Sequence[CellWork],
    settings: Settings,
    emit: Callable[[Event], None],
    job_name: str,
    store_location: str,
    store_factory: Callable[[str], AttemptStore] | None,
) -> Board:
    store = (store_factory or _open_store)(store_location)
    return Board(
        tasks,
        emit,
        store,
        job_name=job_name,
        store_location=store_location,
        retries=settings.retries,
        data=settings.data,
        gpus=settings.resources.gpus,
    )


def _open_store(location: str) -> AttemptStore:
    from qfarm.store import Store

    return Store.open(location, create=True)


def _supervised(board: Board, body: Callable[[], None]) -> Summary:
    """Run the body to its end or to an interrupt, and say which."""
    began, interrupted = time.monotonic(), False
    try:
        with _sigterm_as_interrupt():
            body()
    except KeyboardInterrupt:
        interrupted = True
    counts = board.scheduler.counts
    summary = Summary(finished=counts.finished, failed=counts.given_up, interrupted=interrupted, stopped=board.stopped)
    seconds = time.monotonic() - began
    board.emit(JobEnded(finished=summary.finished, failed=summary.failed, interrupted=interrupted, seconds=seconds))
    return summary


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt as Ctrl-C does. Signals belong to the main thread; elsewhere nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
