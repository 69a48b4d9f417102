"""Simulated: a farm without machines, in which workers fail, straggle, die with their nodes and come back.

The scheduler is the real one; time is a number. The lower bound of the makespan is the work that was done, failed
attempts included, spread evenly over all workers: no schedule of these attempts can be shorter.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import random
import time
from collections.abc import Iterator

from qfarm import environment
from qfarm.errors import Failure
from qfarm.matrix import Cell
from qfarm.scheduler import HEDGE_LOOK_S, CellPlan, Scheduler

PER_NODE = 8  # workers
REFUSED = 3  # idle workers that get nothing before the others are not asked
RESTART_S = 60.0  # until a new worker takes a dead one's place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    cells: int = 100_000
    workers: int = 1_000
    models: int = 50
    seed: int = 0
    fail: float = 0.03  # chance that an attempt fails and is charged
    preempt: float = 0.03  # chance that its worker is taken away
    straggle: float = 0.001  # chance that it takes ten times as long
    shortest_s: float = 100.0
    longest_s: float = 900.0
    wrong: float = 0.1  # estimates are off by as much, either way
    retries: int = 5
    hedge: bool = True  # workers stand on nodes, so that stragglers get second copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    settings: Settings
    finished: int
    given_up: int
    attempts: int
    hedged: int  # second copies
    loads: int  # times that a worker had to load a model
    makespan_s: float
    bound_s: float  # lower bound of the makespan
    setup_s: float  # processor seconds to set the scheduler up
    scheduler_s: float  # processor seconds of all its answers, the simulation itself included
    bytes_per_cell: float  # of the scheduler and its cells

    @property
    def ratio(self) -> float:
        return self.makespan_s / self.bound_s


def simulated_cell(number: int, model: str, baseline: bool = False) -> Cell:
    return Cell(
        model=model,
        fingerprint=f"fingerprint of {model}",
        tokenizer="t",
        dtype="float32",
        recipe="baseline" if baseline else "rtn",
        methods=(),
        scheme="w16" if baseline else "w4",
        group_size=-1,
        symmetric=False,
        scale_dtype="float16",
        statistics=None,
        calibration=None,
        seed=None if baseline else number,
    )


@dataclasses.dataclass(slots=True)
class _Running:
    """An attempt under way."""

    worker: str
    cell_id: str
    began: float
    ends: float
    fate: str  # finish, fail, preempt
    over: bool = False  # another copy was first


class Farm:
    """Runs a scheduler's cells in simulated time. What happened stands in its fields afterwards."""

    def __init__(self, settings: Settings, scheduler: Scheduler, seconds: dict[str, float]) -> None:
        self.settings, self.scheduler, self.seconds = settings, scheduler, seconds
        self.chance = random.Random(settings.seed + 1)
        self.now = self.busy_s = self.scheduler_s = 0.0
        self.loads = self.attempts = self.hedged = 0
        self.accepted: dict[str, int] = {}  # times that a cell's result was the first
        self.started: dict[str, float] = {}  # first start of a cell
        self.closed: dict[str, float] = {}
        self._idle = collections.deque(f"w{number}" for number in range(settings.workers))
        self._new = itertools.count(settings.workers)
        self._events: list[tuple[float, int, _Running | str | None]] = []
        self._serial = itertools.count()
        self._model: dict[str, str] = {}
        self._copies: dict[str, list[_Running]] = {}
        self._looks = False  # an event that wakes idle workers lies ahead

    def run(self) -> float:
        """Until every cell is closed; the makespan in simulated seconds."""
        began = time.process_time()
        while not self.scheduler.done:
            self._hand_out()
            due = self.scheduler.next_due(self.now)
            if due is not None and self._idle and (not self._events or self.now + due < self._events[0][0]):
                self.now += due
                continue
            self.now, _, event = heapq.heappop(self._events)
            if isinstance(event, str):
                self._idle.append(event)
            elif event is None:
                self._looks = False
            elif not event.over:
                self._end(event)
        self.scheduler_s = time.process_time() - began
        return self.now

    def _hand_out(self) -> None:
        refused: list[str] = []
        while self._idle and len(refused) < REFUSED:
            worker = self._idle.pop()
            node = f"n{int(worker[1:]) // PER_NODE}" if self.settings.hedge else None
            cell = self.scheduler.ready(worker, self.now, node=node)
            if cell is None:
                refused.append(worker)
            else:
                self._begin(worker, cell)
        self._idle.extendleft(refused)  # others are asked first next time
        if self._idle and not self._looks:
            self._looks = True
            self._push(self.now + HEDGE_LOOK_S, None)

    def _begin(self, worker: str, cell: Cell) -> None:
        cell_id = cell.cell_id
        self.scheduler.started(cell_id, worker, self.now)
        self.attempts += 1
        self.loads += self._model.get(worker) != cell.model
        self._model[worker] = cell.model
        self.started.setdefault(cell_id, self.now)
        settings, draw = self.settings, self.chance.random()
        seconds, fate = self.seconds[cell_id], "finish"
        if draw < settings.fail + settings.preempt:
            fate = "fail" if draw < settings.fail else "preempt"
            seconds *= self.chance.random()
        elif draw < settings.fail + settings.preempt + settings.straggle:
            seconds *= 10
        run = _Running(worker, cell_id, self.now, self.now + seconds, fate)
        copies = self._copies.setdefault(cell_id, [])
        self.hedged += bool(copies)
        copies.append(run)
        self._push(run.ends, run)

    def _end(self, run: _Running) -> None:
        self.busy_s += self.now - run.began
        self._copies[run.cell_id].remove(run)
        if run.fate == "finish":
            if self.scheduler.finished(run.cell_id, run.worker, self.now):
                self.accepted[run.cell_id] = self.accepted.get(run.cell_id, 0) + 1
            self._idle.append(run.worker)
        elif run.fate == "fail":
            self.scheduler.failed(run.cell_id, run.worker, Failure.BUG, self.now)
            self._idle.append(run.worker)
        else:
            self.scheduler.lost(run.worker, self.now, preempted=True)
            self._push(self.now + RESTART_S, f"w{next(self._new)}")
        if self.scheduler.closed(run.cell_id):
            self.closed[run.cell_id] = self.now
            for other in self._copies.pop(run.cell_id):
                other.over = True  # killed: its worker starts anew, and its time is no work that had to be done
                self.scheduler.lost(other.worker, self.now, preempted=False)
                self._push(self.now + RESTART_S, f"w{next(self._new)}")

    def _push(self, at: float, event: _Running | str | None) -> None:
        heapq.heappush(self._events, (at, next(self._serial), event))


def plans_of(settings: Settings) -> tuple[list[CellPlan], dict[str, float], dict[str, float]]:
    """Cells of random models, half of them in need of a baseline; what they take, and what is expected, in seconds."""
    chance = random.Random(settings.seed)
    plans = list(_plans(settings, chance))
    seconds = {plan.cell.cell_id: chance.uniform(settings.shortest_s, settings.longest_s) for plan in plans}
    off = settings.wrong
    estimates = {cell_id: value * chance.uniform(1 - off, 1 + off) for cell_id, value in seconds.items()}
    return plans, seconds, estimates


def _plans(settings: Settings, chance: random.Random) -> Iterator[CellPlan]:
    for number in range(settings.models):
        yield CellPlan(cell=simulated_cell(0, f"m{number}", baseline=True))
    for number in range(settings.cells - settings.models):
        cell = simulated_cell(number, f"m{chance.randrange(settings.models)}")
        yield CellPlan(cell=cell, needs_baseline=chance.random() < 0.5, shared=f"{cell.model} {number % 3}")


def simulate(settings: Settings) -> tuple[Report, Farm]:
    before = _resident_bytes()
    plans, seconds, estimates = plans_of(settings)
    began = time.process_time()
    scheduler = Scheduler(plans, retries=settings.retries, estimates=estimates)
    setup_s, size = time.process_time() - began, _resident_bytes() - before
    farm = Farm(settings, scheduler, seconds)
    makespan = farm.run()
    counts = scheduler.counts
    report = Report(
        settings=settings,
        finished=counts.finished,
        given_up=counts.given_up,
        attempts=farm.attempts,
        hedged=farm.hedged,
        loads=farm.loads,
        makespan_s=makespan,
        bound_s=farm.busy_s / settings.workers,
        setup_s=setup_s,
        scheduler_s=farm.scheduler_s,
        bytes_per_cell=size / settings.cells,
    )
    return report, farm


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    return environment.resident_host_bytes() or 0
