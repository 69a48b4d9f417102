"""Scheduler: which cell runs next on which worker, and what follows when an attempt fails.

It is fed with events and times and answers with cells and delays; it starts nothing, waits for nothing and owns no
clock, so the same code runs in a simulation with a thousand workers and behind Ray. The unit of affinity is the
loaded model: moving a worker to another model costs a load, therefore a worker stays where it is while there is
anything to do; within a model it stays with the statistics that it has collected. When nothing is left to hand out, a
cell that takes far longer than expected is given to an idle worker of another node as well, and the first result wins.
Every event costs O(log n); stale entries of the heaps are dropped when they surface.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
from collections.abc import Iterator, Mapping, Sequence

from qfarm.errors import Failure
from qfarm.matrix import Cell

HEDGE_FACTOR = 2.0  # times the expected seconds after which a second copy may run
HEDGE_FLOOR_S = 60.0  # never before: shorter cells end sooner than a copy would help
HEDGE_LOOK_S = 10.0  # between two looks for stragglers
HEDGE_FINISHED = 3  # cells that must have shown how good expectations are
STALL_FACTOR = 10.0  # times the expected seconds without any progress: the attempt hangs


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
    Failure.SUPERSEDED: Rule(charged=False),
    # A hub that does not answer needs minutes rather than seconds.
    Failure.UNAVAILABLE: Rule(first_s=30.0, cap_s=600.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellPlan:
    """A cell to be scheduled."""

    cell: Cell
    needs_baseline: bool = False  # an evaluation compares with the model's baseline, which still has to run
    shared: str = ""  # cells with the same key use the same statistics of one worker; "": none
    gpus: float = 0.0  # of a worker; only workers with exactly as many take the cell


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
class _Group:
    """The cells of one model that share statistics."""

    shared: str
    queue: list[tuple[float, int, _Item]] = dataclasses.field(default_factory=list)  # longest first
    workers: int = 0  # that have collected the statistics last

    def first(self) -> tuple[float, int, _Item] | None:
        """The longest ready cell."""
        while self.queue and self.queue[0][2].state is not State.READY:
            heapq.heappop(self.queue)
        return self.queue[0] if self.queue else None


@dataclasses.dataclass(slots=True, eq=False)
class _Model:
    """The cells of one model that want as many GPUs, and the workers that hold it."""

    order: int
    gpus: float
    baseline: _Item | None = None
    groups: dict[str, _Group] = dataclasses.field(default_factory=dict)
    blocked: list[_Item] = dataclasses.field(default_factory=list)
    ready: int = 0
    pending_s: float = 0.0  # expected seconds of everything not started
    workers: int = 0
    stamp: int = 0  # of its newest entry in the ranking


@dataclasses.dataclass(slots=True)
class _Copy:
    """A running attempt; a cell has more than one only while it is hedged."""

    node: str | None
    began: float
    heard: float  # time of the last sign of life
    moved: float  # time of the last progress


@dataclasses.dataclass(slots=True, eq=False)
class _Item:
    """A cell and what happened to it so far."""

    cell: Cell
    cell_id: str
    order: int
    seconds: float  # expected
    model: _Model
    group: _Group
    state: State = State.BLOCKED
    copies: dict[str, _Copy] = dataclasses.field(default_factory=dict)  # by worker
    number: int = 0
    charged: int = 0
    failures: dict[Failure, int] = dataclasses.field(default_factory=dict)
    hired_for: bool = False  # counted among the cells that workers may be hired for


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
        self._models: dict[tuple[str, str, str, float], _Model] = {}
        self._held: dict[str, dict[str, _Item]] = {}  # running cells by worker
        self._home: dict[str, _Model] = {}  # the model that a worker has loaded
        self._group: dict[str, _Group] = {}  # the statistics that it has collected last
        # Models with ready cells, most pressing first, by the GPUs of a worker.
        self._ranking: dict[float, list[tuple[bool, float, int, int, _Model]]] = {}
        self._backoff: list[tuple[float, int, _Item]] = []
        self._count = dict.fromkeys(State, 0)
        self._open: dict[float, int] = {}  # cells that workers may be hired for, by GPUs
        self._estimated = estimates is not None and len(estimates) > 0
        self._taken_s = self._expected_s = 0.0  # of finished cells
        self._look_at = 0.0  # when to look for stragglers again
        self._add(plans, dict(estimates or {}))

    def _add(self, plans: Sequence[CellPlan], estimates: dict[str, float]) -> None:
        unknown = sum(estimates.values()) / len(estimates) if estimates else 1.0
        baselines: dict[tuple[str, str, str], _Item] = {}
        needy = set()
        for order, plan in enumerate(plans):
            cell, cell_id = plan.cell, plan.cell.cell_id
            assert cell_id not in self._items, f"cell {cell_id} is planned twice"
            loaded = (cell.fingerprint, cell.tokenizer, cell.dtype)
            model = self._models.setdefault((*loaded, plan.gpus), _Model(len(self._models), plan.gpus))
            group = model.groups.setdefault(plan.shared, _Group(plan.shared))
            seconds = estimates.get(cell_id, unknown)
            item = _Item(cell, cell_id, order, seconds, model, group)
            self._items[cell_id] = item
            self._count[State.BLOCKED] += 1
            model.pending_s += seconds
            if cell.is_baseline:
                baselines[loaded] = item
            elif plan.needs_baseline:
                needy.add(cell_id)
        for key, model in self._models.items():
            model.baseline = baselines.get(key[:3])
        for item in self._items.values():
            if item.cell_id in needy and item.model.baseline is not None:
                item.model.blocked.append(item)
                self._count_open(item)
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
    def open_by_gpus(self) -> dict[float, int]:
        """Cells that workers may be hired for, by the GPUs of these; most GPUs first.

        Not those that wait for a baseline which other workers take: theirs would hold the GPUs that it needs.
        """
        return {gpus: count for gpus, count in sorted(self._open.items(), reverse=True) if count}

    @property
    def open_cells(self) -> tuple[Cell, ...]:
        return tuple(item.cell for item in self._items.values() if item.state not in CLOSED)

    @property
    def given_up(self) -> tuple[Cell, ...]:
        return tuple(item.cell for item in self._items.values() if item.state is State.GIVEN_UP)

    @property
    def pace(self) -> float | None:
        """Seconds that cells took per second that was expected; None before enough of them have finished."""
        enough = self._estimated and self._count[State.FINISHED] >= HEDGE_FINISHED and self._expected_s > 0
        return self._taken_s / self._expected_s if enough else None

    def closed(self, cell_id: str) -> bool:
        """Finished or given up."""
        return self._items[cell_id].state in CLOSED

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
        return [(cell_id, worker) for cell_id, worker, _, copy in self._copies() if now - copy.heard > limit_s]

    def stalled(self, now: float, floor_s: float) -> list[tuple[str, str, float]]:
        """(cell_id, worker, limit in seconds) of running cells that live but make no progress.

        The limit is ten times what the cell is expected to take in all, and `floor_s` at least: a stage may be long.
        """
        found = []
        for cell_id, worker, item, copy in self._copies():
            limit = floor_s
            if self._estimated:
                limit = max(limit, STALL_FACTOR * item.seconds * max(1.0, self.pace or 1.0))
            if now - copy.moved > limit:
                found.append((cell_id, worker, limit))
        return found

    def _copies(self) -> Iterator[tuple[str, str, _Item, _Copy]]:
        for worker, held in self._held.items():
            for item in held.values():
                yield item.cell_id, worker, item, item.copies[worker]

    def ready(self, worker: str, now: float, *, gpus: float = 0.0, node: str | None = None) -> Cell | None:
        """The next cell for an idle worker, which it holds from now on; None when there is nothing for it.

        The worker's own model comes first. Otherwise models without a worker come before others, then the one with
        the most expected work per worker. Within a model the baseline comes first, then cells that use the statistics
        that the worker has, then the longest cell of statistics that nobody has. When nothing is ready, a straggler
        of another node.
        """
        self.tick(now)
        model = self._home.get(worker)
        if model is None or not model.ready:
            model = self._most_pressing(gpus)
            if model is None:
                return self._hedge(worker, now, gpus, node)
            self._settle(worker, model)
        item = self._first(worker, model)
        self._hold(item, worker, now, node)
        self._change(item, State.RUNNING)
        return item.cell

    def next_load(self, worker: str, *, gpus: float = 0.0) -> Cell | None:
        """A cell of the model that the worker will most likely load next; None while its own has cells to hand out."""
        model = self._home.get(worker)
        if model is None or model.ready or model.blocked:
            return None
        other = self._most_pressing(gpus)
        return None if other is None else self._first(worker, other).cell

    def started(self, cell_id: str, worker: str, now: float) -> None:
        """The worker took the cell that `ready` gave it: a new attempt begins."""
        item = self._running(cell_id, worker)
        item.number += 1
        copy = item.copies[worker]
        copy.began = copy.heard = copy.moved = now

    def progressed(self, cell_id: str, worker: str, now: float, *, moved: bool = True) -> None:
        """A sign of life, with progress or without; late ones of attempts that run no more are ignored."""
        copy = self._items[cell_id].copies.get(worker)
        if copy is not None:
            copy.heard = now
            copy.moved = now if moved else copy.moved

    def finished(self, cell_id: str, worker: str, now: float) -> bool:
        """Results of the cell are in the store, whoever made them. False when it was closed before.

        Other copies of it are nobody's from here on: who runs them may end them.
        """
        item = self._items[cell_id]
        if item.state in CLOSED:
            return False
        copy = item.copies.get(worker)
        if copy is not None:
            self._taken_s += now - copy.began
            self._expected_s += item.seconds
        self._close(item, State.FINISHED)
        return True

    def failed(self, cell_id: str, worker: str, kind: Failure, now: float) -> float | None:
        """Seconds until the retry, 0 while another copy of the cell runs on; None when the cell is given up."""
        item = self._running(cell_id, worker)
        rule = RULES[kind]
        item.failures[kind] = item.failures.get(kind, 0) + 1
        item.charged += rule.charged
        self._release(item, worker)
        if item.copies and rule.retry:
            return 0.0
        if not rule.retry or item.charged > self._retries:
            self._close(item, State.GIVEN_UP)
            return None
        delay = rule.delay(item.failures[kind])
        self._change(item, State.BACKOFF)
        heapq.heappush(self._backoff, (now + delay, item.order, item))
        return delay

    def returned(self, cell_id: str, worker: str) -> None:
        """The attempt ended for a reason that is not the cell's, and counts as if it had not been."""
        item = self._running(cell_id, worker)
        item.number -= 1
        self._release(item, worker)
        if not item.copies:
            self._change(item, State.READY)

    def lost(self, worker: str, now: float, preempted: bool) -> list[tuple[str, float | None]]:
        """The worker is gone: (cell_id, seconds until the retry or None) of each cell that it held."""
        kind = Failure.PREEMPTED if preempted else Failure.WORKER_DIED
        held = list(self._held.get(worker, ()))
        delays = [(cell_id, self.failed(cell_id, worker, kind, now)) for cell_id in held]
        self._held.pop(worker, None)
        group = self._group.pop(worker, None)
        if group is not None:
            group.workers -= 1
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

    def _hedge(self, worker: str, now: float, gpus: float, node: str | None) -> Cell | None:
        """A second copy of the cell that is latest, for a worker of another node.

        On the same node it would share what makes the first slow, and its memory.
        """
        if now < self._look_at or node is None or self.pace is None:
            return None
        late: list[tuple[float, _Item]] = []
        foreign = False
        for _, _, item, copy in self._copies():
            after = max(HEDGE_FLOOR_S, HEDGE_FACTOR * item.seconds * self.pace)
            if len(item.copies) == 1 and item.model.gpus == gpus and now - copy.began > after:
                if copy.node in (None, node):
                    foreign = True
                else:
                    late.append((now - copy.began - after, item))
        if not late:
            if not foreign:  # else a worker of another node may take it now
                self._look_at = now + HEDGE_LOOK_S
            return None
        item = max(late, key=lambda pair: (pair[0], -pair[1].order))[1]
        if self._home.get(worker) is not item.model:
            self._settle(worker, item.model)
        self._hold(item, worker, now, node)
        return item.cell

    def _hold(self, item: _Item, worker: str, now: float, node: str | None) -> None:
        item.copies[worker] = _Copy(node, now, now, now)
        self._held.setdefault(worker, {})[item.cell_id] = item
        group, old = item.group, self._group.get(worker)
        if group.shared and group is not old:
            if old is not None:
                old.workers -= 1
            group.workers += 1
            self._group[worker] = group

    def _running(self, cell_id: str, worker: str) -> _Item:
        item = self._items[cell_id]
        assert item.state is State.RUNNING and worker in item.copies, f"{cell_id} does not run on {worker}"
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
            heapq.heappush(item.group.queue, (-item.seconds, item.order, item))
        self._count_open(item)
        self._rank(model)

    def _count_open(self, item: _Item) -> None:
        """Whether workers may be hired for the item, as its state has it now."""
        model = item.model
        waits = item.state is State.BLOCKED and model.baseline is not None and model.baseline.model is not model
        counts = item.state not in CLOSED and not waits
        self._open[model.gpus] = self._open.get(model.gpus, 0) + counts - item.hired_for
        item.hired_for = counts

    def _close(self, item: _Item, state: State) -> None:
        """Finish an item or give it up. Either way nobody waits for a baseline any more."""
        for worker in list(item.copies):
            self._release(item, worker)
        self._change(item, state)
        if not item.cell.is_baseline:
            return
        for model in self._models.values():
            if item is model.baseline:
                waiting, model.blocked = model.blocked, []
                for other in waiting:
                    if other.state is State.BLOCKED:
                        self._change(other, State.READY)

    def _release(self, item: _Item, worker: str) -> None:
        if item.copies.pop(worker, None) is not None:
            self._held[worker].pop(item.cell_id, None)

    def _settle(self, worker: str, model: _Model) -> None:
        """The worker leaves its model and loads another."""
        old = self._home.get(worker)
        if old is not None:
            old.workers -= 1
            self._rank(old)
        self._home[worker] = model
        model.workers += 1

    def _first(self, worker: str, model: _Model) -> _Item:
        """The cell of this model, of which some are ready, that the worker takes."""
        baseline = model.baseline
        if baseline is not None and baseline.model is model and baseline.state is State.READY:
            return baseline  # its entry in the queue is stale from now on
        own = self._group.get(worker)
        if own is not None and model.groups.get(own.shared) is own and (first := own.first()):
            return first[2]
        found = [(group.workers > 0, *first) for group in model.groups.values() if (first := group.first())]
        return min(found, key=lambda entry: entry[:3])[3]

    def _rank(self, model: _Model) -> None:
        """Give the model a fresh place in the ranking; older entries of it are stale from now on."""
        model.stamp += 1
        if model.ready:
            share = model.pending_s / (model.workers + 1)
            entry = (model.workers > 0, -share, model.order, model.stamp, model)
            heapq.heappush(self._ranking.setdefault(model.gpus, []), entry)

    def _most_pressing(self, gpus: float) -> _Model | None:
        ranking = self._ranking.get(gpus, [])
        while ranking:
            *_, stamp, model = ranking[0]
            if model.ready and stamp == model.stamp:
                return model
            heapq.heappop(ranking)
        return None
