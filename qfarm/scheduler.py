"""Scheduler: which cell runs next on which worker, and what follows when an attempt fails.

It is fed with events and times and answers with cells and delays; it starts nothing, waits for nothing and owns no
clock, so the same code runs in a simulation with a thousand workers and behind Ray. The unit of affinity is the
loaded model: moving a worker to another model costs a load, therefore a worker stays where it is while there is
anything to do. Every event costs O(log n); stale entries of the heaps are dropped when they surface.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
from collections.abc import Mapping, Sequence

from qfarm.errors import Failure
from qfarm.matrix import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What follows a failure of one kind."""

    retry: bool = True
    charged: bool = True  # counts against the job's `retries`
    shrink: bool = False  # the next attempt should need less memory
    first_s: float = 2.0  # seconds before the first retry; doubles with each failure of this kind
    cap_s: float = 60.0  # seconds at most

    def delay(self, failures: int) -> float:
        """Seconds to wait after the n-th failure of this kind. Not random: equal histories give equal schedules."""
        return float(min(self.cap_s, self.first_s * 2.0 ** min(failures - 1, 60)))


RULES: dict[Failure, Rule] = {
    Failure.INVALID: Rule(retry=False),
    Failure.NONFINITE: Rule(retry=False),
    Failure.BUG: Rule(),
    Failure.OOM: Rule(shrink=True),
    Failure.WORKER_DIED: Rule(),
    Failure.NODE_DIED: Rule(),
    Failure.HUNG: Rule(),
    Failure.PREEMPTED: Rule(charged=False, first_s=1.0),
    # A hub that does not answer needs minutes rather than seconds.
    Failure.UNAVAILABLE: Rule(first_s=30.0, cap_s=600.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellPlan:
    """A cell to be scheduled."""

    cell: Cell
    needs_baseline: bool = False  # an evaluation compares with the model's baseline, which still has to run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """The running (or last) try of a cell."""

    number: int  # 1 is the first; 0 before it
    shrink: int  # earlier tries that ran out of memory


class State(enum.Enum):
    BLOCKED = "blocked"  # waits for its model's baseline
    READY = "ready"
    RUNNING = "running"
    BACKOFF = "backoff"  # failed, will be retried
    FINISHED = "finished"
    GIVEN_UP = "given up"


PENDING = frozenset({State.BLOCKED, State.READY, State.BACKOFF})
CLOSED = frozenset({State.FINISHED, State.GIVEN_UP})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Cells by state."""

    blocked: int
    ready: int
    running: int
    backoff: int
    finished: int
    given_up: int

    @property
    def open(self) -> int:
        return self.blocked + self.ready + self.running + self.backoff


@dataclasses.dataclass(slots=True, eq=False)
class _Model:
    """The cells of one model and the workers that hold it."""

    order: int
    baseline: _Item | None = None
    queue: list[tuple[bool, float, int, _Item]] = dataclasses.field(default_factory=list)
    blocked: list[_Item] = dataclasses.field(default_factory=list)
    ready: int = 0  # items of the queue that are really ready
    pending_s: float = 0.0  # expected seconds of everything not started
    workers: int = 0
    stamp: int = 0  # of its newest entry in the ranking


@dataclasses.dataclass(slots=True, eq=False)
class _Item:
    """A cell and what happened to it so far."""

    cell: Cell
    cell_id: str
    order: int
    seconds: float  # expected
    model: _Model
    state: State = State.BLOCKED
    worker: str | None = None
    number: int = 0
    charged: int = 0
    failures: dict[Failure, int] = dataclasses.field(default_factory=dict)
    heard: float = 0.0  # time of the last sign of life


class Scheduler:
    """Cells in, decisions out.

    `estimates` are expected seconds by cell id and order the cells, longest first; without them the job's order
    stands. A cell that needs a baseline which is not among `plans` is ready at once.
    """

    def __init__(
        self, plans: Sequence[CellPlan], *, retries: int, estimates: Mapping[str, float] | None = None
    ) -> None:
        self._retries = retries
        self._items: dict[str, _Item] = {}
        self._models: dict[tuple[str, str, str], _Model] = {}
        self._held: dict[str, dict[str, _Item]] = {}  # running cells by worker
        self._home: dict[str, _Model] = {}  # the model that a worker has loaded
        self._ranking: list[tuple[bool, float, int, int, _Model]] = []  # models with ready cells, most pressing first
        self._backoff: list[tuple[float, int, _Item]] = []
        self._count = dict.fromkeys(State, 0)
        self._add(plans, dict(estimates or {}))

    def _add(self, plans: Sequence[CellPlan], estimates: dict[str, float]) -> None:
        unknown = sum(estimates.values()) / len(estimates) if estimates else 1.0
        needy = set()
        for order, plan in enumerate(plans):
            cell, cell_id = plan.cell, plan.cell.cell_id
            assert cell_id not in self._items, f"cell {cell_id} is planned twice"
            key = (cell.fingerprint, cell.tokenizer, cell.dtype)
            model = self._models.setdefault(key, _Model(len(self._models)))
            seconds = estimates.get(cell_id, unknown)
            item = _Item(cell, cell_id, order, seconds, model)
            self._items[cell_id] = item
            self._count[State.BLOCKED] += 1
            model.pending_s += seconds
            if cell.is_baseline:
                model.baseline = item
            elif plan.needs_baseline:
                needy.add(cell_id)
        for item in self._items.values():
            if item.cell_id in needy and item.model.baseline is not None:
                item.model.blocked.append(item)
            else:
                self._change(item, State.READY)

    @property
    def done(self) -> bool:
        """Every cell is finished or given up."""
        return self._count[State.FINISHED] + self._count[State.GIVEN_UP] == len(self._items)

    @property
    def counts(self) -> Counts:
        return Counts(**{state.name.lower(): number for state, number in self._count.items()})

    @property
    def open_cells(self) -> tuple[Cell, ...]:
        return tuple(item.cell for item in self._items.values() if item.state not in CLOSED)

    @property
    def given_up(self) -> tuple[Cell, ...]:
        return tuple(item.cell for item in self._items.values() if item.state is State.GIVEN_UP)

    def attempt(self, cell_id: str) -> Attempt:
        item = self._items[cell_id]
        shrink = sum(number for kind, number in item.failures.items() if RULES[kind].shrink)
        return Attempt(number=item.number, shrink=shrink)

    def next_due(self, now: float) -> float | None:
        """Seconds until the next retry is due (0 when it is), None when nothing waits."""
        while self._backoff and self._backoff[0][2].state is not State.BACKOFF:
            heapq.heappop(self._backoff)
        return max(0.0, self._backoff[0][0] - now) if self._backoff else None

    def silent(self, now: float, limit_s: float) -> list[tuple[str, str]]:
        """(cell_id, worker) of running cells without a sign of life for more than `limit_s` seconds."""
        running = ((worker, item) for worker, held in self._held.items() for item in held.values())
        return [(item.cell_id, worker) for worker, item in running if now - item.heard > limit_s]

    def ready(self, worker: str, now: float) -> Cell | None:
        """The next cell for an idle worker, which it holds from now on; None when nothing is ready for anybody.

        The worker's own model comes first. Otherwise models without a worker come before others, then the one with
        the most expected work per worker. Within a model the baseline comes first, then the longest cell.
        """
        self.tick(now)
        model = self._home.get(worker)
        if model is None or not model.ready:
            model = self._most_pressing()
            if model is None:
                return None
            self._settle(worker, model)
        item = self._pop(model)
        item.worker, item.heard = worker, now
        self._held.setdefault(worker, {})[item.cell_id] = item
        self._change(item, State.RUNNING)
        return item.cell

    def started(self, cell_id: str, worker: str, now: float) -> None:
        """The worker took the cell that `ready` gave it: a new attempt begins."""
        item = self._running(cell_id, worker)
        item.number += 1
        item.heard = now

    def progressed(self, cell_id: str, now: float) -> None:
        """A sign of life; late ones of cells that run no more are ignored."""
        self._items[cell_id].heard = now

    def finished(self, cell_id: str, worker: str, now: float) -> bool:
        """Results of the cell are in the store, whoever made them. False when it was closed before."""
        item = self._items[cell_id]
        if item.state in CLOSED:
            return False
        self._close(item, State.FINISHED)
        return True

    def failed(self, cell_id: str, worker: str, kind: Failure, now: float) -> float | None:
        """Seconds until the retry; None when the cell is given up."""
        item = self._running(cell_id, worker)
        rule = RULES[kind]
        item.failures[kind] = item.failures.get(kind, 0) + 1
        item.charged += rule.charged
        if not rule.retry or item.charged > self._retries:
            self._close(item, State.GIVEN_UP)
            return None
        delay = rule.delay(item.failures[kind])
        self._release(item)
        self._change(item, State.BACKOFF)
        heapq.heappush(self._backoff, (now + delay, item.order, item))
        return delay

    def returned(self, cell_id: str, worker: str) -> None:
        """The attempt ended for a reason that is not the cell's, and counts as if it had not been."""
        item = self._running(cell_id, worker)
        item.number -= 1
        self._release(item)
        self._change(item, State.READY)

    def lost(self, worker: str, now: float, preempted: bool) -> list[tuple[str, float | None]]:
        """The worker is gone: (cell_id, seconds until the retry or None) of each cell that it held."""
        kind = Failure.PREEMPTED if preempted else Failure.WORKER_DIED
        held = list(self._held.get(worker, ()))
        delays = [(cell_id, self.failed(cell_id, worker, kind, now)) for cell_id in held]
        self._held.pop(worker, None)
        model = self._home.pop(worker, None)
        if model is not None:
            model.workers -= 1
            self._rank(model)
        return delays

    def tick(self, now: float) -> list[Cell]:
        """Cells whose retry is due by now; they are ready from here on."""
        due = []
        while self._backoff and self._backoff[0][0] <= now:
            item = heapq.heappop(self._backoff)[2]
            if item.state is State.BACKOFF:
                self._change(item, State.READY)
                due.append(item.cell)
        return due

    def _running(self, cell_id: str, worker: str) -> _Item:
        item = self._items[cell_id]
        assert item.state is State.RUNNING and item.worker == worker, f"{cell_id} does not run on {worker}"
        return item

    def _change(self, item: _Item, state: State) -> None:
        """Move an item to another state; all counters follow from here."""
        model = item.model
        model.pending_s += item.seconds * ((state in PENDING) - (item.state in PENDING))
        model.ready += (state is State.READY) - (item.state is State.READY)
        self._count[item.state] -= 1
        self._count[state] += 1
        item.state = state
        if state is State.READY:
            heapq.heappush(model.queue, (not item.cell.is_baseline, -item.seconds, item.order, item))
        self._rank(model)

    def _close(self, item: _Item, state: State) -> None:
        """Finish an item or give it up. Either way nobody waits for a baseline any more."""
        self._release(item)
        self._change(item, state)
        if item is item.model.baseline:
            waiting, item.model.blocked = item.model.blocked, []
            for other in waiting:
                if other.state is State.BLOCKED:
                    self._change(other, State.READY)

    def _release(self, item: _Item) -> None:
        if item.worker is not None:
            self._held[item.worker].pop(item.cell_id, None)
            item.worker = None

    def _settle(self, worker: str, model: _Model) -> None:
        """The worker leaves its model and loads another."""
        old = self._home.get(worker)
        if old is not None:
            old.workers -= 1
            self._rank(old)
        self._home[worker] = model
        model.workers += 1

    def _pop(self, model: _Model) -> _Item:
        while True:
            item = heapq.heappop(model.queue)[3]
            if item.state is State.READY:
                return item

    def _rank(self, model: _Model) -> None:
        """Give the model a fresh place in the ranking; older entries of it are stale from now on."""
        model.stamp += 1
        if model.ready:
            share = model.pending_s / (model.workers + 1)
            heapq.heappush(self._ranking, (model.workers > 0, -share, model.order, model.stamp, model))

    def _most_pressing(self) -> _Model | None:
        while self._ranking:
            *_, stamp, model = self._ranking[0]
            if model.ready and stamp == model.stamp:
                return model
            heapq.heappop(self._ranking)
        return None
