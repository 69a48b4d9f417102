"""Board: the books of a running job that every way of running it shares.

It feeds the scheduler, tells the watcher, and records the attempts that a worker could not record itself.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import qfarm
from qfarm import environment
from qfarm.errors import Failure, StoreFull, classify
from qfarm.events import Event, Failed, Finished, Note, Progressed, Started
from qfarm.matrix import Cell
from qfarm.record import AttemptRow, utc_now
from qfarm.scheduler import CellPlan, Scheduler

if TYPE_CHECKING:
    from qfarm.plan import EvaluationSpec, Outcome, Task

ERROR_CHARACTERS = 500


class AttemptStore(Protocol):
    """What the driver needs of a store."""

    def publish_attempt(self, attempt: AttemptRow, /) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellWork:
    """A cell that lacks results."""

    cell: Cell
    evaluations: tuple[EvaluationSpec, ...]  # those that the store lacks
    needs_baseline: bool = False  # one of them compares with the baseline, which still has to run
    estimate_s: float | None = None  # expected seconds
    margin: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the job's, by measure, for the record
    share: tuple[str, ...] = ()  # statistics that this submission's cells of the same calibration ask for
    shared: str = ""  # cells with the same key use the same statistics; "": none
    gpus: float | None = None  # of a worker; None: as the job says
    estimate_from: str | None = None  # where the expected seconds come from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where an attempt runs, in the words of its row."""

    worker: str  # "pid 4711"
    node: str  # host name


class Board:
    """A running job. `stopped` says why no more cells are handed out, None while they are."""

    def __init__(
        self,
        tasks: Sequence[CellWork],
        emit: Callable[[Event], None],
        store: AttemptStore,
        *,
        job_name: str,
        store_location: str,
        retries: int,
        data: str | None,
        gpus: float = 0.0,
    ) -> None:
        self.emit = emit
        self.stopped: str | None = None
        self._store, self._job, self._location, self._data = store, job_name, store_location, data
        self._work: Mapping[str, CellWork] = {work.cell.cell_id: work for work in tasks}
        self._running: dict[str, _Attempt] = {}
        plans = [
            CellPlan(
                cell=work.cell,
                needs_baseline=work.needs_baseline,
                shared=work.shared,
                gpus=gpus if work.gpus is None else work.gpus,
            )
            for work in tasks
        ]
        estimates = {cell_id: work.estimate_s for cell_id, work in self._work.items() if work.estimate_s is not None}
        self.scheduler = Scheduler(plans, retries=retries, estimates=estimates)

    def note(self, text: str) -> None:
        self.emit(Note(text=text))

    def stop(self, reason: str) -> None:
        """Hand out no more cells; those that run go on."""
        if self.stopped is None:
            self.stopped = reason
            self.note(f"no more cells are started: {reason}; submit again to run the rest")

    def next_task(self, worker: str, *, gpus: float = 0.0, node: str | None = None) -> Task | None:
        """A new attempt for an idle worker; None when nothing is ready for it or the job is stopping."""
        from qfarm.plan import Task  # brings models and texts along, which a driver's import must not pay

        if self.stopped is not None:
            return None
        now = time.monotonic()
        cell = self.scheduler.ready(worker, now, gpus=gpus, node=node)
        if cell is None:
            return None
        cell_id = cell.cell_id
        self.scheduler.started(cell_id, worker, now)
        number = self.scheduler.attempt(cell_id).number
        following = self.scheduler.next_load(worker, gpus=gpus)
        task = Task(
            job=self._job,
            cell=cell,
            evaluations=self._work[cell_id].evaluations,
            store=self._location,
            attempt_id=uuid.uuid4().hex,
            number=number,
            data=self._data,
            command=shlex.join(sys.argv),
            shrink=self.scheduler.attempt(cell_id).shrink,
            share=self._work[cell_id].share,
            margin=self._work[cell_id].margin,
            expected_s=self._work[cell_id].estimate_s,
            expected_from=self._work[cell_id].estimate_from,
            ahead=None if following is None else (following.model, following.dtype),
        )
        self._running[task.attempt_id] = _Attempt(cell_id=cell_id, started=utc_now(), began=now)
        self.emit(Started(cell=cell, attempt=number, worker=worker, expected_s=task.expected_s))
        return task

    def progressed(self, worker: str, task: Task, stage: str, done: int, total: int) -> None:
        """A sign of life; an event only when it says something new. Late ones of ended attempts are ignored."""
        attempt = self._running.get(task.attempt_id)
        if attempt is None:
            return
        moved = bool(stage) and attempt.progress != (stage, done, total)
        self.scheduler.progressed(attempt.cell_id, worker, time.monotonic(), moved=moved)
        if moved:
            attempt.progress = (stage, done, total)
            self.emit(Progressed(cell_id=attempt.cell_id, worker=worker, stage=stage, done=done, total=total))

    def ended(self, worker: str, task: Task, outcome: Outcome) -> None:
        """The worker's own account of an attempt, which it has recorded."""
        attempt = self._running.pop(task.attempt_id)
        if outcome.failure is not None:
            self._fail(worker, task, attempt, outcome.failure, outcome.error or str(outcome.failure))
        elif self.scheduler.finished(attempt.cell_id, worker, time.monotonic()):
            event = Finished(
                cell=task.cell,
                worker=worker,
                seconds=outcome.seconds,
                figures=outcome.figures,
                linear_bits=outcome.linear_bits,
            )
            self.emit(event)

    def raised(self, worker: str, task: Task, place: Place, error: BaseException, trace: str) -> None:
        """An exception left `run_cell`, which keeps a cell's failures to itself: a full store, or a mistake of ours."""
        if isinstance(error, StoreFull):
            attempt = self._running.pop(task.attempt_id)
            if not self.scheduler.closed(attempt.cell_id):
                self.scheduler.returned(attempt.cell_id, worker)
            self.stop(one_line(str(error)))
        else:
            self.lost(worker, task, place, classify(error), one_line(error), trace)

    def superseded(self, task: Task) -> bool:
        """Whether a running attempt is of no use any more, since another copy of its cell has ended it."""
        return task.attempt_id in self._running and self.scheduler.closed(task.cell.cell_id)

    def lost(self, worker: str, task: Task, place: Place, kind: Failure, error: str, trace: str | None) -> None:
        """An attempt ended without a record of its own, so it is recorded here."""
        attempt = self._running.pop(task.attempt_id)
        row = AttemptRow(
            attempt_id=task.attempt_id,
            cell_id=attempt.cell_id,
            model=task.cell.model,
            label=task.cell.label,
            job=task.job,
            number=task.number,
            evaluations=json.dumps([spec.eval_id for spec in task.evaluations]),
            outcome=str(kind),
            stage=attempt.progress[0],
            error=error,
            traceback=trace,
            worker=place.worker,
            node=place.node,
            started=attempt.started,
            wall_s=time.monotonic() - attempt.began,
            stages="{}",
            expected_s=task.expected_s,
            expected_from=task.expected_from,
            provenance=json.dumps(_provenance()),
        )
        try:
            self._store.publish_attempt(row)
        except StoreFull as full:
            self.stop(one_line(str(full)))
        except OSError as failed:  # a file system that went away is no fault of the cell either
            self.stop(f"{self._location}: the store cannot be written: {one_line(failed)}")
        self._fail(worker, task, attempt, kind, error)

    def _fail(self, worker: str, task: Task, attempt: _Attempt, kind: Failure, error: str) -> None:
        cell = task.cell
        if self.scheduler.closed(attempt.cell_id):  # by another copy, whose end has been told
            return
        retry_in = self.scheduler.failed(attempt.cell_id, worker, kind, time.monotonic())
        self.emit(Failed(cell=cell, worker=worker, kind=kind, error=error, attempt=task.number, retry_in=retry_in))
        if retry_in is None and cell.is_baseline and any(self._needs(work, cell) for work in self._work.values()):
            self.note(
                f"the baseline of {cell.model} was given up; cells that compare with it compute its states themselves"
            )

    @staticmethod
    def _needs(work: CellWork, baseline: Cell) -> bool:
        same_model = (work.cell.fingerprint, work.cell.dtype) == (baseline.fingerprint, baseline.dtype)
        return work.needs_baseline and same_model and not work.cell.is_baseline


@dataclasses.dataclass(slots=True, kw_only=True)
class _Attempt:
    """What is known of a running attempt."""

    cell_id: str
    started: str  # UTC, ISO 8601
    began: float  # monotonic seconds
    progress: tuple[str, int, int] = ("start", 0, 0)  # stage, done, total


def one_line(error: BaseException | str) -> str:
    """An error as one line of bounded length."""
    text = " ".join(str(error).split())
    name = "" if isinstance(error, str) else type(error).__name__
    return (f"{name}: {text}" if name and text else text or name)[:ERROR_CHARACTERS]


def _provenance() -> dict[str, str | None]:
    """What is known without the worker. Its own provenance would need torch here."""
    return {"recorded_by": "driver", "qfarm": qfarm.__version__, "commit": environment.git_commit()}
