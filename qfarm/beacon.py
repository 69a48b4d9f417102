"""Beacon: a running job says in its store how far it is, so that another terminal can look (`qfarm status`).

    STORE/running/HOST-PID.json    written anew at every event, gone when the job ends

It is news, not a result: no manifest names it, and nothing is decided by it. A job that was killed leaves its file
behind; on the same machine its process tells that it is gone, elsewhere only the time of the last sign does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from qfarm import record
from qfarm.events import Event, JobStarted, Progressed

if TYPE_CHECKING:
    from qfarm.console import Console

logger = logging.getLogger(__name__)

FOLDER = "running"
EVERY = 1.0  # seconds between signs while a stage makes progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """A job that is at work on a store, or was when it last gave a sign."""

    job: str
    where: str
    host: str
    pid: int
    started: str  # UTC, ISO 8601
    sign: str  # UTC, ISO 8601: the last
    summary: str  # '3 of 12 done, about 2m left'
    cells: tuple[tuple[str, str, str, float], ...]  # name, stage, worker, seconds until the sign
    state: Literal["alive", "gone", "not known"]  # of its process


class Beacon:
    """Passes events on to the console and writes what they add up to. A store that takes no file only warns."""

    def __init__(self, store: str, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(store) / FOLDER / f"{socket.gethostname()}-{os.getpid()}.json"
        self._console, self._clock, self._written = console, clock, -EVERY
        self._job: dict[str, Any] = {}
        self._works = "://" not in store  # an object store takes no file that is written over

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()  # unless another job is at work

    def handle(self, event: Event) -> None:
        self._console.handle(event)
        if isinstance(event, JobStarted):
            self._job = {"job": event.job, "where": event.where, "started": record.utc_now()}
        if not isinstance(event, Progressed) or self._clock() - self._written >= EVERY:
            self._write()

    def _write(self) -> None:
        if not self._works:
            return
        known = {"host": socket.gethostname(), "pid": os.getpid(), "sign": record.utc_now()}
        aside = self._path.with_suffix(".aside")
        try:
            self._path.parent.mkdir(exist_ok=True)
            aside.write_text(json.dumps(self._job | known | self._console.snapshot()))
            aside.replace(self._path)
        except OSError as error:
            self._works = False
            logger.warning("%s: `qfarm status` will not see this job: %s", self._path, error.strerror)
        self._written = self._clock()


def running(store: str) -> list[Running]:
    """The jobs that say they are at work on a store, the earliest first."""
    found = []
    for path in sorted((Path(store) / FOLDER).glob("*.json")):
        try:
            known = json.loads(path.read_text())
            cells = tuple((str(a), str(b), str(c), float(d)) for a, b, c, d in known.pop("cells"))
            state = _state(str(known["host"]), int(known["pid"]))
            found.append(Running(cells=cells, state=state, **known))
        except (OSError, ValueError, KeyError, TypeError) as error:  # ended meanwhile, or of another version
            logger.warning("%s: passed over: %s", path, error)
    return sorted(found, key=lambda one: one.started)


def _state(host: str, pid: int) -> Literal["alive", "gone", "not known"]:
    if host != socket.gethostname():
        return "not known"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:  # another user's, so there is one
        return "alive"
    return "alive"
