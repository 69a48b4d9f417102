"""A whole matrix, three ways: the farm, the farm with nothing shared, and one fresh process per cell.

The matrix is fixed: 20 weight-only cells (rtn, gptq, awq, hqq, sinq at 4 and 3 bits, per channel and in groups of 64),
four at W8A8, and the baseline. All three ways run the same code and evaluate alike, and the report says how far
their numbers differ; they take turns, round by round, each with a store and a cache of baselines of its own.

    farm    `qfarm submit` on a local Ray: a worker per core (or GPU); model, tokens, statistics and baseline are shared
    alone   the same, but a worker forgets everything between cells
    fresh   what a shell loop does: one process per cell, one after the other, with all cores

The floor is the time that the arithmetic which must be done takes at the machine's rate: every cell's evaluation once,
the calibration text and its second moments once, GPTQ's column loops; over the rate measured here of matrix products
of the model's shapes in its dtype.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from qfarm import environment
from qfarm.bench.matrix_way import FOLDER, cache_without_baselines
from qfarm.bench.processes import Usage, watched
from qfarm.errors import InvalidInput, QfarmError
from qfarm.job import Job, load_job
from qfarm.models.load import DTYPES
from qfarm.models.reference import ModelFacts, resolve
from qfarm.plan import Plan, make_plan
from qfarm.store import Store

WAYS = ("farm", "alone", "fresh")
CELLS = 24
RATE_TOKENS = 2048  # rows of the products whose rate is measured
RATE_S = 1.0  # seconds of measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run; checked by `run`."""

    model: str
    text: str = "wikitext2"
    calibration: str = "c4"
    samples: int = 32  # calibration windows of `calibration_length` tokens
    calibration_length: int = 1024
    windows: int = 16  # evaluation windows of `length` tokens
    length: int = 2048
    statistics: str = "independent"  # as in a job
    dtype: str = "bfloat16"
    ways: tuple[str, ...] = WAYS
    rounds: int = 1
    cells: int = CELLS  # of the matrix, for a trial
    data: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WayResult:
    """Medians over rounds."""

    way: str
    rounds: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    tokens: float  # tokens that passed through the whole decoder
    wall_ratio: float  # this way's wall seconds / the first way's
    cpu_ratio: float
    floor_ratio: float  # wall seconds / the floor

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    settings: Settings
    machine: dict[str, Any]
    cells: int  # with the baseline
    workers: int  # of farm and alone
    operations: float  # floating-point operations that must be done
    rate: float  # floating-point operations per second of this machine, measured
    results: tuple[WayResult, ...]
    largest_difference: float  # of a cell's perplexity between ways, relative

    @property
    def floor_s(self) -> float:
        return self.operations / self.rate


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Run the benchmark. Raises InvalidInput for settings that cannot be, QfarmError when a way fails."""
    _check(settings)
    with tempfile.TemporaryDirectory(prefix="qfarm-bench-") as name:
        folder = Path(name)
        path = folder / "job.yaml"
        path.write_text(job_text(settings))
        job = load_job(path)
        plan = make_plan(job, None, settings.data)
        chosen = [planned.cell.cell_id for planned in plan.cells][: settings.cells + 1]
        if len(chosen) < len(plan.cells):
            progress(f"a trial of {len(chosen)} of {len(plan.cells)} cells")
        facts = resolve(settings.model)
        runs: dict[str, list[_Run]] = {way: [] for way in settings.ways}
        for number in range(settings.rounds):
            turn = number % len(settings.ways)  # another way begins each round
            for way in settings.ways[turn:] + settings.ways[:turn]:
                progress(f"round {number + 1} of {settings.rounds}: {way}")
                runs[way].append(_run(way, path, folder, chosen, settings))
        progress("rate of matrix products")
        operations, rate = least_operations(plan, facts, settings, len(chosen)), matrix_rate(facts, settings.dtype)
        return _report(settings, job, len(chosen), operations, rate, runs)


def _check(settings: Settings) -> None:
    for way in settings.ways:
        if way not in WAYS:
            raise InvalidInput(f'--ways: expected some of {", ".join(WAYS)}, got "{way}"')
    if not settings.ways or len(set(settings.ways)) < len(settings.ways):
        raise InvalidInput(f"--ways: expected some of {', '.join(WAYS)}, each once")
    for name, lowest, highest in (("rounds", 1, 99), ("cells", 1, CELLS), ("samples", 1, None), ("windows", 1, None)):
        value = getattr(settings, name)
        if value < lowest or (highest is not None and value > highest):
            raise InvalidInput(f"--{name} is {lowest}..{highest or ''}, got {value}")


def job_text(settings: Settings) -> str:
    """The benchmark's job file."""
    weight_only = {"methods": ["rtn", "gptq", "awq", "hqq", "sinq"], "bits": ["w4", "w3"], "group_sizes": [-1, 64]}
    with_inputs = {"methods": ["rtn", "smoothquant", "smoothquant+gptq", "crossquant"], "bits": ["w8a8"]}
    return yaml.safe_dump(
        {
            "name": "bench-matrix",
            "models": [settings.model],
            **weight_only,
            "include": [{**with_inputs, "group_sizes": [-1]}],
            "statistics": settings.statistics,
            "dtype": settings.dtype,
            "calibration": {
                "text": settings.calibration,
                "samples": settings.samples,
                "length": settings.calibration_length,
            },
            "evaluate": [
                {"perplexity": {"text": settings.text, "length": settings.length, "windows": settings.windows}}
            ],
            "resources": {"gpus": int(torch.cuda.is_available()), "cpus": 1},
        },
        sort_keys=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    wall_s: float
    cpu_s: float
    peak_bytes: int
    tokens: float
    perplexities: dict[str, float]  # by cell


def _run(way: str, job: Path, folder: Path, cells: Sequence[str], settings: Settings) -> _Run:
    here = Path(tempfile.mkdtemp(prefix=f"{way}-", dir=folder))
    counts, store = here / "counts.jsonl", here / "store"
    environ = os.environ | {"QFARM_CACHE": cache_without_baselines(str(here)), FOLDER: str(here)}
    if settings.data:
        environ["QFARM_DATA"] = settings.data
    if way == "fresh":
        environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    command = [sys.executable, "-m", "qfarm.bench.matrix_way", way, str(job), str(store), str(counts)]
    turns = [[cell] for cell in cells] if way == "fresh" else [cells]
    usages = [_checked(way, watched([*command, *turn], environ)) for turn in turns]
    lines = [json.loads(line) for line in counts.read_text().splitlines()]
    rows = Store.open(store).read("metrics", columns=["cell_id", "metric", "value"]).to_pylist()
    return _Run(
        wall_s=sum(usage.wall_s for usage in usages),
        cpu_s=sum(usage.cpu_s for usage in usages),
        peak_bytes=max(usage.peak_bytes for usage in usages),
        tokens=sum(line["tokens"] for line in lines),
        perplexities={row["cell_id"]: row["value"] for row in rows if row["metric"] == "perplexity"},
    )


def _checked(way: str, usage: Usage) -> Usage:
    if usage.code:
        raise QfarmError(f"{way}: exit code {usage.code}: {usage.tail or 'nothing on standard error'}")
    return usage


def least_operations(plan: Plan, facts: ModelFacts, settings: Settings, cells: int) -> float:
    """Floating-point operations of the first `cells` cells that no sharing can spare, two per multiplication.

    Attention is counted for the half of the pairs that the mask leaves. Rounding, searches and the quantizers of
    inputs are left out.
    """
    head = facts.config["vocab_size"] * facts.config["hidden_size"]
    layers: int = facts.config["num_hidden_layers"]
    shapes = facts.linear_shapes.values()
    evaluated, calibrated = settings.windows * settings.length, settings.samples * settings.calibration_length
    chosen = [planned.cell for planned in plan.cells][:cells]
    total = 0.0
    for cell in chosen:
        heads = 1 if cell.is_baseline else 2  # the baseline's logits are made again, to be compared with
        total += sum(decoder_operations(facts, evaluated, settings.length)) + heads * 2.0 * evaluated * head
        if any(spec["name"] == "gptq" for spec in cell.methods):
            total += layers * sum(1.0 * m * n * n for m, n in shapes)  # the column loop's updates
    if any(cell.calibration for cell in chosen):
        total += sum(decoder_operations(facts, calibrated, settings.calibration_length))
        total += layers * sum(1.0 * calibrated * n * n for n in _inputs(facts))
    return total


def decoder_operations(facts: ModelFacts, tokens: int, length: int) -> tuple[float, float]:
    """Of linear layers, and of attention, for tokens in windows of `length`."""
    width = facts.linear_shapes["o"][1]  # all heads side by side
    # Scores and outputs, each for the half of the pairs that the mask leaves.
    return 2.0 * tokens * facts.parameters[0], 2.0 * tokens * facts.config["num_hidden_layers"] * length * width


def _inputs(facts: ModelFacts) -> list[int]:
    """Widths of the inputs that need second moments: q, k and v read one, gate and up another."""
    shapes = facts.linear_shapes
    return [shapes[role][1] for role in shapes if role not in ("k", "v", "up")]


def matrix_rate(facts: ModelFacts, dtype: str) -> float:
    """Operations per second of products of the model's shapes, weighted as the decoder has them, with all threads."""
    return measured_rate(facts, dtype, os.cpu_count() or 1)


def measured_rate(facts: ModelFacts, dtype: str, threads: int) -> float:
    """The same with so many threads, or on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return _rate(facts, dtype, device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return _rate(facts, dtype, device)
    finally:
        torch.set_num_threads(before)


def _rate(facts: ModelFacts, dtype: str, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    draw = torch.Generator().manual_seed(0)
    shapes = list(facts.linear_shapes.values())
    weights = [torch.randn(shape, generator=draw).to(device, DTYPES[dtype]) for shape in shapes]
    inputs = [torch.randn(RATE_TOKENS, n, generator=draw).to(device, DTYPES[dtype]) for _, n in shapes]
    once = sum(2.0 * RATE_TOKENS * m * n for m, n in shapes)
    best, ends = 0.0, time.perf_counter() + RATE_S
    while time.perf_counter() < ends:
        wait()
        started = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(x, weight)
        wait()
        best = max(best, once / (time.perf_counter() - started))
    return best


def _report(
    settings: Settings, job: Job, cells: int, operations: float, rate: float, runs: dict[str, list[_Run]]
) -> Report:
    def middle(way: str, name: str) -> float:
        return float(median(getattr(one, name) for one in runs[way]))

    first = settings.ways[0]
    results = tuple(
        WayResult(
            way=way,
            rounds=len(runs[way]),
            wall_s=middle(way, "wall_s"),
            cpu_s=middle(way, "cpu_s"),
            peak_bytes=int(middle(way, "peak_bytes")),
            tokens=middle(way, "tokens"),
            wall_ratio=middle(way, "wall_s") / middle(first, "wall_s"),
            cpu_ratio=middle(way, "cpu_s") / middle(first, "cpu_s"),
            floor_ratio=middle(way, "wall_s") * rate / operations,
        )
        for way in settings.ways
    )
    found = [one.perplexities for way in settings.ways for one in runs[way]]
    missing = [len(each) for each in found if len(each) != cells]
    if missing:
        raise QfarmError(f"a way ended with {missing[0]} of {cells} results")
    spread = max(abs(each[cell] / found[0][cell] - 1) for each in found for cell in found[0])
    return Report(
        settings=settings,
        machine=environment.provenance(),
        cells=cells,
        workers=_workers(job),
        operations=operations,
        rate=rate,
        results=results,
        largest_difference=spread,
    )


def _workers(job: Job) -> int:
    if job.file.resources.gpus:
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // job.file.resources.cpus)
