"""Actors: what runs inside Ray. A worker holds a session (the loaded model) and runs cells; an inbox collects progress.

Plain classes; the pool turns them into actors, a test calls them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pkgutil
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from qfarm.plan import Outcome, Task

PUSH_S = 0.5  # between two looks at whether there is progress to push
DELIVERY_S = 5.0  # a stage's first report waits so long for the inbox
PREDECESSOR_S = 30.0  # a killed process that does not answer signals was seen to live for 5.5 s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hello:
    """Who a worker is."""

    pid: int
    node_id: str
    host: str
    cuda: bool | None  # None: no GPU was asked for, so nobody looked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """Progress of a running attempt, or just a sign of life when the stage is empty."""

    attempt_id: str
    stage: str
    done: int
    total: int


class Inbox:
    """Collects messages until the driver takes them; keeps the newest of each stage, so it cannot grow without end."""

    def __init__(self) -> None:
        self._messages: dict[tuple[str, str], Message] = {}

    def push(self, message: Message) -> None:
        self._messages[message.attempt_id, message.stage] = message

    def take(self) -> list[Message]:
        messages, self._messages = list(self._messages.values()), {}
        return messages


class Worker:
    """One process that runs cells one after the other."""

    def __init__(self, inbox: Any, runner: str, session: str, data: str | None, heartbeat_s: float) -> None:
        self._runner_path, self._session_path, self._data = runner, session, data
        self._reporter = Reporter(inbox, heartbeat_s)
        self._last: Outcome | None = None

    def hello(self, predecessors: Sequence[tuple[str, int]], secrets: Mapping[str, str], look_for_gpu: bool) -> Hello:
        """Get ready and say who this is.

        `predecessors` are (node, pid) of killed workers: until such a process of this node is gone, it holds memory of
        the GPU that we were given. Everything heavy is imported here and not in the constructor, so that what goes
        wrong arrives as the exception that it is.
        """
        node_id = ray.get_runtime_context().get_node_id()
        for node, pid in predecessors:
            if node == node_id:
                _wait_until_gone(pid)
        os.environ.update(secrets)
        self._run_cell = pkgutil.resolve_name(self._runner_path)
        cuda = _cuda_available() if look_for_gpu else None
        if cuda is not False:
            self._session = pkgutil.resolve_name(self._session_path)(self._data)
        return Hello(pid=os.getpid(), node_id=node_id, host=socket.gethostname(), cuda=cuda)

    def run(self, task: Task) -> Outcome:
        """One attempt of a cell."""
        self._reporter.begin(task.attempt_id)
        try:
            outcome: Outcome = self._run_cell(task, self._session, self._reporter.report)
        finally:
            self._reporter.end()
        self._last = outcome
        return outcome

    def recall(self, attempt_id: str) -> Outcome | None:
        """The outcome of the last attempt, for a driver that lost the answer; None when that one never ended here."""
        return self._last if self._last is not None and self._last.attempt_id == attempt_id else None


class Reporter:
    """Carries progress to the inbox: a new stage at once, counts a few times per second, a heartbeat when all is still.

    The first report of a stage waits for delivery, so that the driver knows the stage in which a worker died.
    """

    def __init__(self, inbox: Any, heartbeat_s: float) -> None:
        self._inbox, self._heartbeat_s = inbox, heartbeat_s
        self._attempt: str | None = None
        self._current = ("", 0, 0)
        self._pushed = self._current
        self._pushed_at = 0.0
        threading.Thread(target=self._beat, daemon=True, name="qfarm heartbeat").start()

    def begin(self, attempt_id: str) -> None:
        self._current = self._pushed = ("", 0, 0)
        self._pushed_at = time.monotonic()
        self._attempt = attempt_id

    def end(self) -> None:
        self._attempt = None

    def report(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Progress of the running attempt; `total` is 0 when unknown."""
        new = stage != self._current[0]
        self._current = (stage, done, total)
        if new:
            # A lost inbox costs progress, not the cell.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._push(), timeout=DELIVERY_S)

    def _beat(self) -> None:
        while True:
            time.sleep(PUSH_S)
            silent_s = time.monotonic() - self._pushed_at
            if self._attempt is not None and (self._current != self._pushed or silent_s >= self._heartbeat_s):
                self._push()

    def _push(self) -> Any:
        attempt_id, current = self._attempt, self._current
        self._pushed, self._pushed_at = current, time.monotonic()
        stage, done, total = current
        return self._inbox.push.remote(Message(attempt_id=attempt_id or "", stage=stage, done=done, total=total))


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PREDECESSOR_S
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    """Whether the process holds anything: a zombie does not. Without /proc nobody can tell, so False."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
