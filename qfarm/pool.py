"""Pool: the workers of a job on Ray. Hires them, hands out cells, notices who is gone, and says why.

Ray's own retries are off: what follows a failure is the scheduler's decision. Nothing here blocks for longer than one
poll, so that an interrupt, a silent worker and a lost node are noticed in time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qfarm import actors, cluster
from qfarm.board import Board, Place, one_line
from qfarm.errors import Failure, InvalidInput, QfarmError

if TYPE_CHECKING:
    from qfarm.driver import Settings
    from qfarm.plan import Outcome, Task

GET_S = 10.0  # to fetch an answer that is there already
SHORT_S = 0.01  # the shortest sleep
EMPTY_S = 2.0  # for the inbox to answer
ASK_AGAIN_S = 1.0  # between two questions to a worker that cannot be reached for the moment
HEARTBEATS = 6  # that fit into the silence after which a worker counts as hung
HEARTBEAT_S = 5.0  # at most
WAIT_NOTE_S = 60.0  # without any worker, tell the user what is being waited for
BAD_STARTS = 3  # in a row, then no more workers are hired
DEPARTED = 256  # killed processes that new workers are told of
# common_pb2.NodeDeathInfo.Reason: a raylet that got SIGTERM, and one that was drained for preemption.
PREEMPTION_REASONS = frozenset({1, 3})
NODE_DIED = "its node has died"  # in Ray's account of an actor whose node is not in our books yet


def run_pool(board: Board, settings: Settings) -> None:
    """Run the board's cells on Ray until all are closed, or until the job stops and nothing runs any more."""
    with cluster.connected(settings.address):
        capacity = cluster.capacity(settings.address is None, settings.resources, board.note)
        pool = Pool(board, settings, capacity)
        try:
            pool.run()
        finally:
            with cluster.exit_on_interrupt():
                pool.close()


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class _Worker:
    """An actor and what we wait for from it."""

    name: str
    actor: Any
    answer: Any  # reference to the answer we wait for; None while there is none
    gpus: float = 0.0
    hello: actors.Hello | None = None  # None until it has greeted
    task: Task | None = None
    ask_at: float | None = None  # when to ask a worker that could not be reached

    @property
    def idle(self) -> bool:
        return self.hello is not None and self.task is None

    @property
    def place(self) -> Place:
        assert self.hello is not None
        return Place(worker=f"pid {self.hello.pid}", node=self.hello.host)


class Pool:
    """At most as many workers as there are open cells; each is kept while it can be useful."""

    def __init__(self, board: Board, settings: Settings, capacity: cluster.Capacity) -> None:
        self._board, self._settings, self._capacity = board, settings, capacity
        self._limit = capacity.workers
        self._workers: list[_Worker] = []
        self._numbers = itertools.count(1)
        self._departed: list[tuple[str, int]] = []  # node and pid of killed workers
        self._bad_starts = 0
        self._secrets = {name: os.environ[name] for name in cluster.SECRETS if name in os.environ}
        # On the driver's node: it lives exactly as long as the driver does.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._inbox = ray.remote(actors.Inbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self._letters: Any = None  # reference to messages on their way
        self._read_at = 0.0
        self._deaf = False  # the inbox is lost, so silence means nothing
        self._alone_since: float | None = time.monotonic()
        self._actor_class = ray.remote(actors.Worker)
        self._options = {
            "num_cpus": capacity.cpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": cluster.worker_environment(os.environ, settings.env, capacity.cpus)},
        }

    def run(self) -> None:
        while not self._over():
            self._resize()
            self._hand_out()
            for worker in self._answered():
                self._take(worker)
            self._end_copies()
            self._read_inbox()
            self._end_silent()
            self._end_stalled()
            self._complain()

    def close(self) -> None:
        """Kill everything at once. Nothing is asked to finish, and what still ran has not failed."""
        for actor in [*(worker.actor for worker in self._workers), self._inbox]:
            _kill(actor)

    def _over(self) -> bool:
        if self._board.stopped is not None:
            return not any(worker.task for worker in self._workers)
        return self._board.scheduler.done

    def _resize(self) -> None:
        """Hire or dismiss, so that there are as many workers as open cells but never more than fit.

        On a cluster, actors that wait for a place are what its autoscaler sees.
        """
        wanted = {} if self._board.stopped is not None else self._wanted()
        have: dict[float, list[_Worker]] = {gpus: [] for gpus in wanted}
        for worker in self._workers:
            have.setdefault(worker.gpus, []).append(worker)
        for gpus, workers in have.items():
            # On a cluster an idle worker may still take a second copy of a straggler.
            enough = wanted.get(gpus, 0) * (1 if self._capacity.local else 2)
            spare = sorted((w for w in workers if w.task is None), key=lambda w: w.hello is not None)
            for worker in spare[: max(0, len(workers) - enough)]:
                self._dismiss(worker)
            for _ in range(wanted.get(gpus, 0) - len(workers)):
                self._hire(gpus)

    def _wanted(self) -> dict[float, int]:
        """How many workers of how many GPUs each: those with most first, for they are the hardest to place."""
        left, room, wanted = self._limit, self._capacity.room, {}
        for gpus, cells in self._board.scheduler.open_by_gpus.items():
            count = min(left, cells)
            if room is not None and gpus:
                count = min(count, int(room / gpus + 1e-9))  # the small addition is for sums like 3 * 0.1
                room -= count * gpus
            left -= count
            wanted[gpus] = count
        return wanted

    def _hire(self, gpus: float) -> None:
        settings = self._settings
        heartbeat_s = min(HEARTBEAT_S, settings.silence_s / HEARTBEATS)
        actor_class = self._actor_class.options(**self._options, num_gpus=gpus)
        actor = actor_class.remote(self._inbox, settings.runner, settings.session, settings.data, heartbeat_s)
        answer = actor.hello.remote(tuple(self._departed), self._secrets, gpus > 0 and settings.real_gpus)
        self._workers.append(_Worker(name=f"w{next(self._numbers)}", actor=actor, answer=answer, gpus=gpus))

    def _dismiss(self, worker: _Worker) -> None:
        _kill(worker.actor)
        self._workers.remove(worker)
        self._board.scheduler.lost(worker.name, time.monotonic(), preempted=False)
        if worker.hello is not None:
            self._departed = [*self._departed, (worker.hello.node_id, worker.hello.pid)][-DEPARTED:]

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.idle and worker.hello is not None:
                task = self._board.next_task(worker.name, gpus=worker.gpus, node=worker.hello.node_id)
                if task is not None:
                    worker.task = task
                    worker.answer = worker.actor.run.remote(task)

    def _answered(self) -> list[_Worker]:
        """Workers whose answer has come, after a wait of one poll at most."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.ask_at is not None and worker.ask_at <= now and worker.task is not None:
                worker.ask_at = None
                worker.answer = worker.actor.recall.remote(worker.task.attempt_id)
        waiting = {worker.answer: worker for worker in self._workers if worker.answer is not None}
        if not waiting:
            due = self._board.scheduler.next_due(now)
            time.sleep(self._settings.poll_s if due is None else min(self._settings.poll_s, max(due, SHORT_S)))
            return []
        come, _ = ray.wait(list(waiting), timeout=self._settings.poll_s)
        if come:
            come, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [waiting[answer] for answer in come]

    def _take(self, worker: _Worker) -> None:
        try:
            answer = ray.get(worker.answer, timeout=GET_S)
        except GetTimeoutError:
            return  # still on its way
        except RayTaskError as error:
            self._raised(worker, error)
        except ActorUnavailableError as error:
            self._unreachable(worker, error)
        except RayError as error:
            self._gone(worker, error)
        else:
            worker.answer = None
            if worker.hello is None:
                self._greeted(worker, answer)
            elif answer is None:
                self._never_ran(worker)
            else:
                self._ended(worker, answer)

    def _greeted(self, worker: _Worker, hello: actors.Hello) -> None:
        worker.hello = hello
        if hello.cuda is False:
            self._refuse(
                worker,
                InvalidInput(
                    f"a worker on {hello.host} was given {worker.gpus:g} GPU(s), but torch sees no CUDA device "
                    "there; install a CUDA build of torch on that machine"
                ),
            )
            return
        worker.name = f"{worker.name}@{hello.host}"
        self._bad_starts, self._alone_since = 0, None

    def _refuse(self, worker: _Worker, reason: QfarmError, final: bool = True) -> None:
        """A worker that cannot start. The job goes on while others can; `final`: another try here is no use."""
        self._dismiss(worker)
        self._bad_starts += 1
        usable = any(other.hello is not None for other in self._workers)
        if not usable and ((final and self._capacity.local) or self._bad_starts >= BAD_STARTS):
            raise reason
        self._board.note(str(reason))
        if self._bad_starts >= BAD_STARTS:
            self._limit = max(1, len(self._workers))

    def _ended(self, worker: _Worker, outcome: Outcome) -> None:
        assert worker.task is not None
        task, worker.task = worker.task, None
        self._board.ended(worker.name, task, outcome)
        # After an error of the device its context may be poisoned: everything that follows would fail as well.
        broken = outcome.failure is Failure.BUG and "cuda" in (outcome.error or "").lower()
        if outcome.failure is Failure.OOM or broken:
            self._dismiss(worker)

    def _raised(self, worker: _Worker, error: RayTaskError) -> None:
        """The worker lives, but its code raised."""
        cause = getattr(error, "cause", None) or error
        worker.answer = None
        if worker.hello is None:
            reason = f"a worker cannot start: {one_line(cause)}"
            self._refuse(worker, InvalidInput(reason) if isinstance(cause, InvalidInput) else QfarmError(reason))
            return
        assert worker.task is not None
        task, worker.task = worker.task, None
        self._board.raised(worker.name, task, worker.place, cause, str(error))

    def _unreachable(self, worker: _Worker, error: ActorUnavailableError) -> None:
        """The connection broke; the attempt may go on, may have ended, or may never have arrived. Ask again later."""
        if worker.task is None:
            self._gone(worker, error)
            return
        worker.answer = None
        worker.ask_at = time.monotonic() + ASK_AGAIN_S

    def _never_ran(self, worker: _Worker) -> None:
        assert worker.task is not None
        task, worker.task = worker.task, None
        text = "the connection to the worker broke before the attempt reached it"
        self._board.lost(worker.name, task, worker.place, Failure.WORKER_DIED, text, None)

    def _gone(self, worker: _Worker, error: RayError) -> None:
        """The process is dead, alone or with its node."""
        kind = kind_of_death(worker.hello, error)
        if worker.task is not None:
            self._empty_inbox()  # the stage in which it died may still lie there
            task, worker.task = worker.task, None
            self._board.lost(worker.name, task, worker.place, kind, cause_of_death(error), str(error))
            self._dismiss(worker)
        elif worker.hello is None and NODE_DIED not in str(error):
            reason = QfarmError(f"a worker died while it started: {cause_of_death(error)}")
            self._refuse(worker, reason, final=False)
        else:
            self._dismiss(worker)

    def _read_inbox(self) -> None:
        """Pass on messages that have come; ask for more once per poll."""
        if self._letters is None and time.monotonic() >= self._read_at:
            self._ask_inbox()
        self._receive(wait_s=0.0)

    def _empty_inbox(self) -> None:
        """Pass on everything that lies there now."""
        self._receive(wait_s=EMPTY_S)  # asked for before now, so perhaps not all
        if self._letters is None:
            self._ask_inbox()
            self._receive(wait_s=EMPTY_S)

    def _ask_inbox(self) -> None:
        if not self._deaf:
            self._letters = self._inbox.take.remote()
            self._read_at = time.monotonic() + self._settings.poll_s

    def _receive(self, wait_s: float) -> None:
        if self._letters is None or not ray.wait([self._letters], timeout=wait_s)[0]:
            return
        letters, self._letters = self._letters, None
        try:
            messages = ray.get(letters, timeout=GET_S)
        except RayError as error:
            self._deaf = True
            self._board.note(f"progress is no longer shown: {one_line(error)}")
            return
        running = {worker.task.attempt_id: worker for worker in self._workers if worker.task is not None}
        for message in messages:
            worker = running.get(message.attempt_id)
            if worker is not None and worker.task is not None:
                self._board.progressed(worker.name, worker.task, message.stage, message.done, message.total)

    def _end_silent(self) -> None:
        """A worker without a heartbeat hangs, or its node is cut off; either way its cell goes to another."""
        if self._deaf or not self._silent():
            return
        # Perhaps it was us who stood still (a stopped process, a slow file system); then signs of life lie unread.
        self._empty_inbox()
        if self._deaf or self._letters is not None:
            return  # the inbox did not answer, so nobody can tell
        names = self._silent()
        for worker in [worker for worker in self._workers if worker.name in names]:
            kind = kind_of_death(worker.hello, None)
            kind = Failure.HUNG if kind is Failure.WORKER_DIED else kind
            self._end(worker, kind, f"no sign of life for {self._settings.silence_s:g} s")

    def _end_stalled(self) -> None:
        """A worker that gives signs of life but makes no progress hangs as well: a deadlock leaves its thread alive."""
        if self._deaf or self._letters is not None and not ray.wait([self._letters], timeout=0)[0]:
            return  # progress may lie unread
        stalled = self._board.scheduler.stalled(time.monotonic(), self._settings.stall_s)
        if not stalled:
            return
        self._empty_inbox()
        limits = {
            name: limit for _, name, limit in self._board.scheduler.stalled(time.monotonic(), self._settings.stall_s)
        }
        for worker in [worker for worker in self._workers if worker.name in limits and worker.task is not None]:
            text = f"no progress for {limits[worker.name]:.0f} s, though the process lives"
            self._end(worker, Failure.HUNG, text)

    def _end_copies(self) -> None:
        """Of a cell that ran twice, end the attempt that was not first."""
        for worker in [w for w in self._workers if w.task is not None and self._board.superseded(w.task)]:
            self._end(worker, Failure.SUPERSEDED, "another copy of the cell was first")

    def _end(self, worker: _Worker, kind: Failure, text: str) -> None:
        """Kill a worker in the middle of an attempt, which is recorded."""
        assert worker.task is not None
        task, worker.task = worker.task, None
        self._board.lost(worker.name, task, worker.place, kind, text, None)
        self._dismiss(worker)

    def _silent(self) -> set[str]:
        """Workers whose last sign of life that was read is too old."""
        silent = self._board.scheduler.silent(time.monotonic(), self._settings.silence_s)
        return {name for _, name in silent}

    def _complain(self) -> None:
        """Say once what is being waited for when no worker comes."""
        now = time.monotonic()
        if self._alone_since is None or now - self._alone_since < WAIT_NOTE_S:
            return
        self._alone_since = None
        have = ray.cluster_resources()
        self._board.note(
            f"still waiting for a first worker with {self._capacity.cpus} CPU(s) and {self._capacity.gpus:g} GPU(s); "
            f"the cluster has {have.get('CPU', 0):g} CPU(s) and {have.get('GPU', 0):g} GPU(s) in all"
        )


def kind_of_death(hello: actors.Hello | None, error: RayError | None) -> Failure:
    """Whether a worker died alone, with its node, or because its node was taken away; `error` is None for silence."""
    if isinstance(error, OutOfMemoryError):
        return Failure.OOM
    if getattr(error, "preempted", False):
        return Failure.PREEMPTED
    known = hello.node_id if hello is not None else None
    node = next((node for node in ray.nodes() if node["NodeID"] == known), None)
    if node is None or node["Alive"]:
        # Ray may tell of an actor's node before its own table does.
        return Failure.NODE_DIED if error is not None and NODE_DIED in str(error) else Failure.WORKER_DIED
    return Failure.PREEMPTED if node["DeathReason"] in PREEMPTION_REASONS else Failure.NODE_DIED


def cause_of_death(error: RayError) -> str:
    """Ray's account in one line, without the ids above it and the guesses after it."""
    lines = [line for line in str(error).splitlines() if not re.match(r"\t\w+: ", line)]
    return one_line(" ".join(lines[1:] or lines).partition(" Some common causes")[0])


def _kill(actor: Any) -> None:
    # What is dead already, or out of reach, needs no killing.
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor, no_restart=True)
