"""Timeline: what each worker did when, from the attempts' rows, as a trace for chrome://tracing or ui.perfetto.dev.

A node is a process of the trace, a worker a thread of it; gaps are idle time. A stage that an attempt entered several
times is drawn once, with the sum of its seconds.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from typing import Any

NAMED = ("cell_id", "attempt_id", "model", "number", "outcome")  # in a span's details
COLUMNS = (*NAMED, "label", "worker", "node", "started", "wall_s", "stages")
MICROSECONDS = 1e6


def chrome_trace(attempts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The trace of rows with COLUMNS, in the Trace Event Format; time 0 is the first attempt's start."""
    rows = sorted(attempts, key=lambda row: _seconds(row["started"]))
    zero = _seconds(rows[0]["started"]) if rows else 0.0
    nodes = {name: number for number, name in enumerate(dict.fromkeys(row["node"] for row in rows), 1)}
    places = list(dict.fromkeys((row["node"], row["worker"]) for row in rows))
    workers = {place: number for number, place in enumerate(places, 1)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}} for name, number in nodes.items()
    ]
    for (node, worker), number in workers.items():
        events.append({"ph": "M", "name": "thread_name", "pid": nodes[node], "tid": number, "args": {"name": worker}})
    for row in rows:
        place = {"ph": "X", "pid": nodes[row["node"]], "tid": workers[row["node"], row["worker"]]}
        at = (_seconds(row["started"]) - zero) * MICROSECONDS
        told = {name: row[name] for name in NAMED}
        events.append(place | {"name": row["label"], "ts": at, "dur": row["wall_s"] * MICROSECONDS, "args": told})
        for stage, seconds in json.loads(row["stages"]).items():
            events.append(place | {"name": stage, "ts": at, "dur": seconds * MICROSECONDS})
            at += seconds * MICROSECONDS
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _seconds(time: str) -> float:
    return datetime.datetime.fromisoformat(time).timestamp()
