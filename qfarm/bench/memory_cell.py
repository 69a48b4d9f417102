"""Memory cell: the cell of `qfarm bench memory`, as a process of its own.

    python -m qfarm.bench.memory_cell JOB STORE

Runs the job's one quantized cell and prints what it needed by `qfarm.memory`, and what it allocated before and after
loading the model, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from qfarm import environment
from qfarm.driver import run_local  # noqa: F401  # what a worker has imported before its first cell
from qfarm.job import load_job
from qfarm.memory import needs
from qfarm.models.reference import resolve
from qfarm.plan import Task, make_plan
from qfarm.store import Store
from qfarm.worker import Session, run_cell


def main(job_path: str, location: str) -> int:
    store = Store.open(location, create=True)
    plan = make_plan(load_job(job_path), store, None)
    planned = next(one for one in plan.cells if not one.cell.is_baseline)
    facts = resolve(planned.cell.model)
    found = needs(facts, planned.cell, window=plan.job.evaluations[0].window)
    session = Session(None)
    allocated: list[int | None] = []

    def report(stage: str, done: int = 0, total: int = 0) -> None:
        if stage in ("load", "prepare") and not done:
            allocated.append(environment.allocated_host_bytes())

    task = Task(
        job="bench",
        cell=planned.cell,
        evaluations=planned.missing,
        store=str(location),
        attempt_id="bench",
        number=1,
        data=None,
    )
    outcome = run_cell(task, session, report)
    if outcome.failure is not None:
        print(f"{outcome.failure}: {outcome.error}", file=sys.stderr)
        return 1
    attempt = store.read("attempts", columns=["stages", "peak_host_bytes"]).to_pylist()[0]
    answer = {
        "parameters": session.loaded.parameter_count(),
        "needs": dataclasses.asdict(found),
        "private": found.private,
        "before": allocated[0],
        "loaded": allocated[1],
        "peak_host_bytes": attempt["peak_host_bytes"],
        "stages": json.loads(attempt["stages"]),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
