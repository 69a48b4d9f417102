"""Noop: cells that do nothing but sleep, for what handing them out costs. Stands in for qfarm.worker on the workers."""

from __future__ import annotations

import time
from collections.abc import Callable

from qfarm.plan import Outcome, Task
from qfarm.record import AttemptRow


class Session:
    """`data` is how long a cell takes, in seconds."""

    def __init__(self, data: str | None) -> None:
        self.seconds = float(data or 0)


def run_cell(task: Task, session: Session, report: Callable[[str, int, int], None]) -> Outcome:
    report("sleep", 0, 0)
    time.sleep(session.seconds)
    return Outcome(
        attempt_id=task.attempt_id, cell_id=task.cell.cell_id, failure=None, error=None, seconds=session.seconds
    )


class NoStore:
    """Takes attempts and forgets them."""

    def publish_attempt(self, attempt: AttemptRow, /) -> bool:
        return True
