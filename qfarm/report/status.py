"""Status: what a store holds by now, and who is at work on it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from qfarm.beacon import Running
from qfarm.record import CellRow, MetricRow
from qfarm.report.failed import failed_cells
from qfarm.report.figures import duration, plain, plural
from qfarm.report.layout import grid
from qfarm.report.pairs import Readable
from qfarm.report.render import terminal_text
from qfarm.report.rows import Attempt, records

_GONE = "its process is gone: the job was cut off; submit it again to run what is missing"


def render_status(
    store: Readable, location: str, jobs: Sequence[Running], now: datetime.datetime, width: int, color: bool = False
) -> str:
    """`now` is aware of its time zone."""
    return terminal_text(_parts(store, location, jobs, now), width, color)


def _parts(store: Readable, location: str, jobs: Sequence[Running], now: datetime.datetime) -> Iterator[RenderableType]:
    cells = {cell.cell_id: cell for cell in records(store, "cells", CellRow)}
    attempts = records(store, "attempts", Attempt)
    finished = {(metric.cell_id, metric.eval_id) for metric in records(store, "metrics", MetricRow)}
    failed = failed_cells(cells, attempts, finished)
    latest = max((attempt.started for attempt in attempts), default=None)
    words = [plural(len(cells), "cell"), plural(len(finished), "result"), f"{len(failed):,} failed"]
    words += [f"the latest attempt began {_ago(latest, now)} ago"] if latest else []
    yield Text(plain(f"{location}: {', '.join(words)}"), style="bold", overflow="fold")
    for job in jobs:
        who = f"{job.job}, process {job.pid} on {job.host}, {job.where}"
        when = f"running for {_ago(job.started, now)}, last sign {_ago(job.sign, now)} ago"
        yield Text(plain(f"{who}: {_GONE if job.state == 'gone' else when}"), overflow="fold")
        if job.state == "gone":
            continue
        yield Text(f"  {plain(job.summary)}", overflow="fold")
        if job.cells:
            since = _seconds(job.sign, now) or 0.0  # it has run on since its last sign
            lines = [(name, stage, worker, duration(seconds + since)) for name, stage, worker, seconds in job.cells]
            table = grid(("cell", "stage", "worker", "for"), lines, (3,))
            table.columns[0].no_wrap = False  # a name with options would leave the stage a letter's width
            yield table
    if not jobs:
        yield Text("no job is at work on it, as far as the store knows", overflow="fold")


def _ago(then: str, now: datetime.datetime) -> str:
    seconds = _seconds(then, now)
    return "unknown time" if seconds is None else duration(seconds)


def _seconds(then: str, now: datetime.datetime) -> float | None:
    """None for a time that cannot be read."""
    try:
        return max(0.0, (now - datetime.datetime.fromisoformat(then)).total_seconds())
    except (ValueError, TypeError):
        return None
