"""Farm: what running many cells costs beside the cells: planning, scheduling, handing out, storing, reporting.

Five measurements, each with a workload that is made here: a plan of a large job; the scheduler in simulated time
(`qfarm.bench.simulated`); a real Ray on this machine with cells that do nothing; a store with a ledger for each cell,
appended to, compacted and reported; and, when asked for, a job whose workers and nodes are killed throughout
(`qfarm.bench.chaos`). Processor seconds are those of this process, all threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qfarm.bench import simulated
from qfarm.board import CellWork
from qfarm.record import AttemptRow, CellRow, DocumentRow, LayerRow, MetricRow, utc_now

PARTS = ("plan", "simulated", "ray", "store", "chaos")
BLOWS_MISSED = 3  # of the planned ones: a run with few says little
PLANNED_MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")  # described by qfarm/models/known.yaml
AXES = 2 * 7 * 3  # models, schemes and groups of the planned job; seeds make up the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    parts: tuple[str, ...] = PARTS[:4]
    cells: int = 100_000  # planned and simulated
    workers: int = 1_000  # simulated
    seed: int = 0
    ray_cells: int = 500
    ray_sleep_s: float = 0.0
    store_cells: int = 1_000
    documents: int = 20  # of each stored cell
    store: str | None = None  # folder for the store that is made; None: a temporary one
    chaos_seeds: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing that was measured."""

    part: str
    what: str
    value: float
    unit: str
    goal: float | None = None  # at most

    @property
    def missed(self) -> bool:
        return self.goal is not None and self.value > self.goal


def run(settings: Settings, say: Callable[[str], None]) -> list[Figure]:
    """The figures, part by part. Ray and stores leave nothing behind, a store that was named excepted."""
    found: list[Figure] = []
    for part in settings.parts:
        say(f"{part} ...")
        found += _MEASURE[part](settings)
    return found


def _plan(settings: Settings) -> list[Figure]:
    count = -(-settings.cells // AXES) * AXES + len(PLANNED_MODELS)  # and the baselines
    taken = plan_seconds(settings.cells)
    return [Figure(part="plan", what=f"a plan of {count:,} cells", value=taken, unit="processor s", goal=30.0)]


def plan_seconds(cells: int) -> float:
    """Processor seconds of the second plan in a process, of about so many cells."""
    from qfarm.job import parse_job
    from qfarm.plan import make_plan

    seeds = -(-cells // AXES)
    text = (
        f"models: [{', '.join(PLANNED_MODELS)}]\nmethods: [gptq]\nbits: [w2, w3, w4, w5, w6, w7, w8]\n"
        f"group_sizes: [-1, 64, 128]\nseeds: [{', '.join(map(str, range(seeds)))}]\n"
        "calibration: {text: python-docs, samples: 128, length: 2048}\n"
        "evaluate: [perplexity: {text: python-docs, length: 2048}, analysis: {text: python-docs}]\n"
    )
    make_plan(parse_job(text.replace("gptq", "rtn"), "bench"), None, None, allow_provisional=True)  # imports, texts
    began = time.process_time()
    plan = make_plan(parse_job(text, "bench"), None, None, allow_provisional=True)
    taken = time.process_time() - began
    assert len(plan.cells) == seeds * AXES + len(PLANNED_MODELS)
    return taken


def _simulated(settings: Settings) -> list[Figure]:
    small, _ = simulated.simulate(_farm(settings, settings.cells // 10))
    whole, _ = simulated.simulate(_farm(settings, settings.cells))
    what = f"{whole.settings.cells:,} cells on {whole.settings.workers:,} workers"

    def figure(what: str, value: float, unit: str, goal: float | None = None) -> Figure:
        return Figure(part="simulated", what=what, value=value, unit=unit, goal=goal)

    return [
        figure(f"{what}: makespan / lower bound", whole.ratio, "", 1.05),
        figure("finished", whole.finished, "cells"),
        figure("attempts", whole.attempts, "attempts"),
        figure("second copies of stragglers", whole.hedged, "attempts"),
        figure("scheduler and simulation", whole.setup_s + whole.scheduler_s, "processor s", 30.0),
        figure("memory of a cell", whole.bytes_per_cell, "bytes"),
        figure("the same with a tenth of the cells", small.bytes_per_cell, "bytes"),
    ]


def _farm(settings: Settings, cells: int) -> simulated.Settings:
    return simulated.Settings(cells=cells, workers=settings.workers, seed=settings.seed)


def _ray(settings: Settings) -> list[Figure]:
    from qfarm import driver
    from qfarm.bench.noop import NoStore
    from qfarm.events import Event, Started
    from qfarm.job import Resources

    cells = [simulated.simulated_cell(number, "noop") for number in range(settings.ray_cells)]
    first: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Started) and not first:
            first.append((time.process_time(), time.monotonic()))

    chosen = driver.Settings(
        resources=Resources(gpus=0, cpus=1, workers=2),
        data=str(settings.ray_sleep_s),
        runner="qfarm.bench.noop:run_cell",
        session="qfarm.bench.noop:Session",
    )
    work = [CellWork(cell=cell, evaluations=()) for cell in cells]
    summary = driver.run(
        work, chosen, watch, job_name="bench", store_location="", store_factory=lambda location: NoStore()
    )
    processor, wall = time.process_time() - first[0][0], time.monotonic() - first[0][1]
    assert summary.finished == len(cells), summary
    count = len(cells)
    busy = settings.ray_sleep_s * count / 2  # two workers
    # While cells last, the driver looks for progress as well.
    goal = None if settings.ray_sleep_s else 30.0
    found: list[tuple[str, float, str, float | None]] = [
        ("driver", 1e3 * processor / count, "processor ms a cell", goal)
    ]
    found.append(("from the first start to the end", 1e3 * wall / count, "ms a cell", None))
    if busy:
        found.append(("overhead over the cells' own time", 100 * (wall - busy) / busy, "percent", 1.0))
    what = f"{count} cells of {settings.ray_sleep_s:g} s: "
    return [
        Figure(part="ray", what=what + name, value=value, unit=unit, goal=goal) for name, value, unit, goal in found
    ]


def _store(settings: Settings) -> list[Figure]:
    if settings.store is not None:
        return _stored(settings, settings.store)
    with tempfile.TemporaryDirectory(prefix="qfarm-bench-") as folder:
        return _stored(settings, str(Path(folder) / "store"))


def _stored(settings: Settings, location: str) -> list[Figure]:
    from qfarm.report.render import render
    from qfarm.report.tables import load
    from qfarm.store import Store

    store = Store.open(location, create=True)
    count = settings.store_cells

    def append() -> None:
        for number in range(count):
            publish(store, number, settings.documents)

    appended = _timed(append)
    read = _timed(lambda: [Store.open(location).read(table) for table in ("metrics", "documents")])
    compacted = _timed(store.compact)
    again = _timed(lambda: [Store.open(location).read(table) for table in ("metrics", "documents")])
    reported = _timed(lambda: render(load(Store.open(location)), "terminal", width=100))
    what = f"{count:,} cells with {settings.documents} documents: "

    def pair(name: str, taken: tuple[float, float], scale: float, unit: str, goal: float | None = None) -> list[Figure]:
        processor, wall = (scale * seconds for seconds in taken)
        return [
            Figure(part="store", what=what + name, value=processor, unit=f"processor {unit}"),
            Figure(part="store", what=what + name, value=wall, unit=unit, goal=goal),
        ]

    return [
        *pair("append", appended, 1e3 / count, "ms a cell", 20.0),
        *pair("read metrics and documents", read, 1.0, "s"),
        *pair("compact", compacted, 1.0, "s"),
        *pair("read them again", again, 1.0, "s"),
        *pair("report", reported, 1.0, "s", 3.0),
    ]


def _chaos(settings: Settings) -> list[Figure]:
    from qfarm.bench import chaos

    found = []
    for verdict in chaos.run(settings.chaos_seeds):
        told: list[tuple[str, float, str, float | None]] = [
            ("workers and nodes killed", verdict.kills, "blows", None),
            ("planned blows that did not fall", verdict.missed, "blows", BLOWS_MISSED),
            ("attempts", verdict.attempts, "attempts", None),
            ("from the first start to the end", verdict.seconds, "s", None),
            ("numbers that are missing or there twice", verdict.missing, "rows", 0),
            ("numbers that differ from an undisturbed run's", verdict.different, "rows", 0),
            ("struck attempts without a row that says so", verdict.untold, "attempts", 0),
            ("failed attempts that nothing has struck", verdict.unexplained, "attempts", 0),
            ("leftover files that no struck attempt has written", verdict.strays, "files", 0),
            ("faults of the store", verdict.faults, "files", 0),
            ("files that no manifest names, after cleaning", verdict.orphans, "files", 0),
        ]
        for line in verdict.details:
            print(f"seed {verdict.seed}: {line}", file=sys.stderr)
        what = f"{chaos.CELLS} cells, seed {verdict.seed}: "
        found += [
            Figure(part="chaos", what=what + name, value=value, unit=unit, goal=goal)
            for name, value, unit, goal in told
        ]
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Processor and wall seconds."""
    processor, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


def publish(store: Any, number: int, documents: int) -> None:
    """One cell with an evaluation and an attempt, as a worker publishes it; the first is the baseline."""
    publish_as(store, _hex(f"cell {number}"), _hex(f"attempt {number}"), number, documents)


def publish_as(store: Any, cell_id: str, attempt_id: str, number: int, documents: int) -> None:
    """The same under other ids; the numbers follow from `number`."""
    eval_id = _hex("evaluation")
    store.publish_cell(_cell_row(number, cell_id, attempt_id), [_layer_row(cell_id, layer) for layer in range(4)])
    rows = [_document_row(cell_id, eval_id, number, index) for index in range(documents)]
    store.publish_evaluation(cell_id, eval_id, attempt_id, _metric_rows(cell_id, eval_id, attempt_id, rows), rows)
    store.publish_attempt(_attempt_row(number, cell_id, eval_id, attempt_id))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cell_row(number: int, cell_id: str, attempt_id: str) -> CellRow:
    baseline = number == 0
    return CellRow(
        cell_id=cell_id,
        attempt_id=attempt_id,
        job="bench",
        model="bench/model",
        fingerprint="bench",
        recipe="baseline" if baseline else "rtn",
        scheme="w16" if baseline else f"w{2 + number % 7}",
        group_size=-1,
        seed=None if baseline else number,
        symmetric=False,
        scale_dtype="float16",
        dtype="bfloat16",
        statistics=None,
        spec="{}",
        linear_bits=16.0 if baseline else 2.0 + number % 7,
        model_bits=16.0 if baseline else 3.0 + number % 7,
        linear_bytes=1,
        model_bytes=1,
        layers_quantized=4,
        layers_skipped=0,
        created=utc_now(),
    )


def _layer_row(cell_id: str, layer: int) -> LayerRow:
    return LayerRow(
        cell_id=cell_id,
        layer=layer,
        role="q",
        module=f"model.layers.{layer}.self_attn.q_proj",
        rows=64,
        columns=64,
        solver="rtn",
        bits=4,
        stored_bytes=2048,
    )


def _document_row(cell_id: str, eval_id: str, number: int, index: int) -> DocumentRow:
    # Losses that differ between cells and documents by a rule, so that every difference has an error.
    loss = 300.0 + index + (number % 97) * (1 + index % 3) / 10
    return DocumentRow(
        cell_id=cell_id,
        eval_id=eval_id,
        document=_hex(f"document {index}"),
        cluster=_hex(f"document {index}"),
        window=index,
        tokens=100,
        loss=loss,
        correct=50,
    )


def _metric_rows(cell_id: str, eval_id: str, attempt_id: str, rows: Sequence[DocumentRow]) -> list[MetricRow]:
    mean = sum(row.loss or 0.0 for row in rows) / (100 * len(rows))
    return [
        MetricRow(
            cell_id=cell_id,
            eval_id=eval_id,
            attempt_id=attempt_id,
            evaluation="perplexity bench",
            protocol="{}",
            created=utc_now(),
            metric="perplexity",
            value=math.exp(mean),
            unit="perplexity",
            better="lower",
            n=len(rows),
        )
    ]


def _attempt_row(number: int, cell_id: str, eval_id: str, attempt_id: str) -> AttemptRow:
    return AttemptRow(
        attempt_id=attempt_id,
        cell_id=cell_id,
        model="bench/model",
        label=f"rtn {number}",
        job="bench",
        number=1,
        evaluations=f'["{eval_id}"]',
        outcome="ok",
        stage="evaluate",
        worker="pid 1",
        node="bench",
        started=utc_now(),
        wall_s=1.0,
        stages="{}",
        provenance="{}",
    )


_MEASURE: dict[str, Callable[[Settings], list[Figure]]] = {
    "plan": _plan,
    "simulated": _simulated,
    "ray": _ray,
    "store": _store,
    "chaos": _chaos,
}
