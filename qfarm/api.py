"""Api: results as tables and jobs as function calls, for notebooks.

    import qfarm

    results = qfarm.run("jobs/quickstart.yaml")       # or a dict with a job's keys; runs what the store lacks
    results = qfarm.load_store("results/quickstart")  # what is there
    results.report()                                  # a row for each cell and evaluation, as `qfarm report`
    results.frame("layers")                           # a table of the store as it is, for pandas
    results.table("documents")                        # the same for Arrow

`import qfarm` imports neither torch nor Ray nor pandas.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from qfarm.events import Event
    from qfarm.job import Job


class Results:
    """The results in one store. Reading sees what is finished at that moment; nothing is kept in between."""

    def __init__(self, location: str | Path) -> None:
        """Raises StoreError when there is no store at `location`."""
        from qfarm.store import Store

        self._store = Store.open(location)

    @property
    def location(self) -> str:
        return self._store.location

    def __repr__(self) -> str:
        return f"qfarm.load_store({self.location!r})"

    def table(
        self, name: str, *, columns: Sequence[str] | None = None, cell_ids: Collection[str] | None = None
    ) -> pa.Table:
        """One of `cells`, `attempts`, `metrics`, `documents`, `layers`, `analysis`, `kernels`, as Arrow.

        Units are in the fields' metadata. Of kernels, `cell_ids` are ids of runs.

        Raises StoreError for an unknown table or a damaged part.
        """
        return self._store.read(name, columns=columns, cell_ids=cell_ids)

    def frame(
        self, name: str, *, columns: Sequence[str] | None = None, cell_ids: Collection[str] | None = None
    ) -> pd.DataFrame:
        """The same for pandas."""
        return self.table(name, columns=columns, cell_ids=cell_ids).to_pandas()

    def report(self) -> pd.DataFrame:
        """A row for each cell and evaluation, with metrics, paired differences and verdicts; failed cells come last.

        The columns are those of `qfarm report --format csv`.
        """
        import pandas

        from qfarm.report.render import render
        from qfarm.report.tables import load

        text = render(load(self._store), "csv")
        return pandas.read_csv(io.StringIO(text), dtype={"cell_id": str, "eval_id": str, "fingerprint": str})


def load_store(path: str | Path) -> Results:
    """The results in the store at `path`. Raises StoreError."""
    return Results(path)


def run(
    job: str | Path | Mapping[str, Any],
    *,
    only: str | None = None,
    data: str | None = None,
    address: str | None = None,
    ray: bool = False,
    watch: Callable[[Event], None] | None = None,
) -> Results:
    """Run what the job asks for and its store lacks; the results of that store.

    `job` is a file, or a mapping with the keys of one, whose store then is relative to the current folder. Cells run in
    this process unless `ray` is set or `address` names a cluster. `only` names one cell by id or label, `data` a
    data pack's folder (default QFARM_DATA). `watch` is handed every event as it happens. Cells that fail for good are
    warned of and stand in the `attempts` table. Raises InvalidInput for a job that cannot run, KeyboardInterrupt.
    """
    from qfarm import driver
    from qfarm.environment import data_folder, placed_store
    from qfarm.plan import make_plan
    from qfarm.store import Store, is_store
    from qfarm.work import open_work

    checked = _job(job)
    if checked.file.resources.gpus == 0 and not (ray or address):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: the job must not take a GPU by chance
    given = placed_store(checked.file.store)
    location = given if "://" in given else str(Path(given).expanduser().resolve())
    known = Store.open(location) if is_store(location) else None
    planned = make_plan(checked, known, data_folder(data))
    work = open_work(planned, only)
    Store.open(location, create=True)
    if work:
        resources, retries = checked.file.resources, checked.file.retries
        settings = driver.Settings(address=address, resources=resources, retries=retries, data=data_folder(data))
        start = driver.run if ray or address else driver.run_local
        name = checked.file.name
        summary = start(work, settings, watch or _ignore, job_name=name, store_location=location)
        if summary.interrupted:
            raise KeyboardInterrupt
        if summary.failed or summary.stopped:
            reason = summary.stopped or "see the attempts table"
            warnings.warn(f"{summary.failed} of {len(work)} cells failed for good: {reason}", stacklevel=2)
    return Results(location)


def _job(job: str | Path | Mapping[str, Any]) -> Job:
    from qfarm.errors import JobError
    from qfarm.job import load_job, parse_job

    if not isinstance(job, Mapping):
        return load_job(str(job))
    import yaml

    try:
        return parse_job(yaml.safe_dump(dict(job), sort_keys=False), "job")
    except JobError as error:  # its line is of a text that nobody has seen
        raise JobError(re.sub(r"^job: line \d+: ", "job: ", str(error))) from None


def _ignore(_: Event) -> None:
    """Nobody watches."""
