"""Matrix way: one way of running the benchmark's job, as a process of its own.

    python -m qfarm.bench.matrix_way WAY JOB STORE COUNTS CELL...

`farm` runs the job on a local Ray as `qfarm submit` does. `alone` does the same with workers that forget everything
between cells. `fresh` runs its cells in this process and forgets likewise. COUNTS gets a line of JSON per cell.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qfarm import depot, driver
from qfarm.cache import root
from qfarm.errors import QfarmError
from qfarm.job import load_job
from qfarm.matrix import Cell
from qfarm.plan import Outcome, Task, make_plan
from qfarm.predictions import HIDDEN
from qfarm.store import Store
from qfarm.work import open_work
from qfarm.worker import Progress, Session, run_cell

COUNTS, FOLDER = "QFARM_BENCH_COUNTS", "QFARM_BENCH_FOLDER"
SESSIONS = {"farm": "Counting", "alone": "Forgetful", "fresh": "Forgetful"}


class Counting(Session):
    """Counts what passes through the decoder's blocks."""

    def __init__(self, data: str | None) -> None:
        super().__init__(data)
        self.block_tokens = 0
        self._counted: object = None

    def begin(self, cell: Cell, shrink: int = 0, share: Sequence[str] = (), **demands: Any) -> None:
        super().begin(cell, shrink, share, **demands)
        if self._counted is not self.loaded:
            self._counted = self.loaded
            for block in self.loaded.blocks:
                block.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.block_tokens += hidden.shape[0] * hidden.shape[1]


class Forgetful(Counting):
    """Starts every cell with nothing: model, texts, tokens, statistics, the baseline's hidden states."""

    def begin(self, cell: Cell, shrink: int = 0, share: Sequence[str] = (), **demands: Any) -> None:
        tokens = self.block_tokens
        self.__init__(self.data)  # type: ignore[misc]  # whatever a session learns to keep is forgotten, too
        self.block_tokens = tokens
        os.environ["QFARM_CACHE"] = cache_without_baselines(os.environ[FOLDER])
        os.environ.pop(depot.VARIABLE, None)
        super().begin(cell, shrink, (), **demands)


def cache_without_baselines(folder: str) -> str:
    """A new cache in a folder, with all that this process's holds (unpacked models, hashes) but baselines' states."""
    new = Path(tempfile.mkdtemp(prefix="cache-", dir=folder))
    for entry in root().iterdir() if root().is_dir() else ():
        if entry.name != HIDDEN:
            (new / entry.name).symlink_to(entry.resolve())
    return str(new)


def counted(task: Task, session: Counting, report: Progress) -> Outcome:
    """`run_cell`, with a line of what it took."""
    before = session.block_tokens
    outcome = run_cell(task, session, report)
    blocks = len(session.loaded.blocks)
    line = {"cell": task.cell.cell_id, "tokens": (session.block_tokens - before) / blocks, "seconds": outcome.seconds}
    with open(os.environ[COUNTS], "a") as file:  # one short write: lines of several workers do not mix
        file.write(json.dumps(line) + "\n")
    return outcome


def main(way: str, job_path: str, store: str, counts: str, *cells: str) -> int:
    """Run cells of a job, by id. Exit status: 0 when every one is finished."""
    job, data = load_job(job_path), os.environ.get("QFARM_DATA")
    plan = make_plan(job, None, data)
    work = [one for one in open_work(plan) if one.cell.cell_id in cells]
    if way != "farm":
        work = [dataclasses.replace(one, share=()) for one in work]
    Store.open(store, create=True)
    settings = driver.Settings(
        resources=job.file.resources,
        retries=0,
        data=data,
        env={COUNTS: counts, FOLDER: os.environ[FOLDER]},
        runner="qfarm.bench.matrix_way:counted",
        session=f"qfarm.bench.matrix_way:{SESSIONS[way]}",
    )
    run = driver.run_local if way == "fresh" else driver.run
    summary = run(work, settings, lambda event: None, job_name=job.file.name, store_location=store)
    return 0 if summary.finished == len(cells) and not summary.stopped else 1


if __name__ == "__main__":
    try:
        status = main(*sys.argv[1:])
    except QfarmError as error:  # for the benchmark's own line
        print(error, file=sys.stderr)
        status = 2
    sys.exit(status)
