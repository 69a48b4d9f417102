"""Stands in for qfarm.worker on the workers of driver tests: no model, only behaviour.

What a cell does is said by its model's name, "words:that:do" separated by colons; counts live in the folder that the
session is given as its data, so that they outlive the process.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from qfarm.actors import Inbox, Message
from qfarm.errors import Failure, StoreFull
from qfarm.plan import Outcome, Task

ATTEMPTS = "attempts"
GATES = "gates"  # lets cells of the behaviour "gate" end
GATED = "gated"  # such a cell has arrived


class Session:
    def __init__(self, data: str | None) -> None:
        self.folder = Path(data or ".")
        self.cells = 0


class BrokenSession:
    def __init__(self, data: str | None) -> None:
        raise ImportError("no module named 'flash'")


class MuteInbox(Inbox):
    def take(self) -> list[Message]:
        os._exit(1)


def run_cell(task: Task, session: Session, report: Callable[[str, int, int], None]) -> Outcome:
    session.cells += 1
    name = task.cell.cell_id
    tries = len(list(session.folder.glob(f"{ATTEMPTS}/{name}.*"))) + 1
    (session.folder / ATTEMPTS).mkdir(exist_ok=True)
    (session.folder / ATTEMPTS / f"{name}.{tries}").write_text(f"{os.getpid()} {session.cells}")
    report("load", 0, 0)
    behaviour = task.cell.model.split(":")[-1]
    if behaviour == "always" or (behaviour == "once" and tries == 1):
        return _failed(task, Failure.BUG, "ValueError: as told")
    if behaviour == "invalid":
        return _failed(task, Failure.INVALID, "as told")
    if behaviour == "cuda" and tries == 1:
        return _failed(task, Failure.BUG, "RuntimeError: CUDA error: an illegal memory access was encountered")
    if behaviour == "raises":
        raise RuntimeError("a mistake in run_cell")
    if behaviour == "full":
        _wait_for(session.folder / GATED)  # so that another cell runs for certain
        raise StoreFull("/store: no space left on device; 0 bytes free")
    if behaviour == "killed" and tries == 1:
        report("quantize", 3, 8)
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "stopped" and tries == 1:
        report("quantize", 3, 8)
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "gate":
        (session.folder / GATED).touch()
        report("evaluate", 5, 7)
        _wait_for(session.folder / GATES)
    return Outcome(
        attempt_id=task.attempt_id,
        cell_id=name,
        failure=None,
        error=None,
        seconds=0.5,
        figures=(("perplexity", 7.5), ("threads", float(os.environ.get("OMP_NUM_THREADS", "0")))),
        linear_bits=4.25,
    )


def _failed(task: Task, kind: Failure, error: str) -> Outcome:
    return Outcome(attempt_id=task.attempt_id, cell_id=task.cell.cell_id, failure=kind, error=error, seconds=0.1)


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
