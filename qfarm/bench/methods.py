"""Weight methods on a real model: seconds and memory of each, beside GPTQ as published.

Every method runs as in a job with its default options and `statistics: sequential`, on the first blocks of the model
and the same calibration windows. Runs of the yardstick and of the methods take turns, so that a machine that slows
down slows down all of them, and medians are reported. Nothing is evaluated and nothing is stored.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from qfarm import environment
from qfarm.bench import yardstick
from qfarm.bench.stopwatch import SECTIONS, Place, Stopwatch, now, timed
from qfarm.calibrate import quantize_weights
from qfarm.errors import InvalidInput, QfarmError
from qfarm.inputs import Collector, Statistic
from qfarm.models.load import LoadedModel, load
from qfarm.models.reference import resolve
from qfarm.quantizer import Grid
from qfarm.recipe import BlockSolver, WeightSolver, lookup, method_names
from qfarm.text import load_text
from qfarm.walk import BATCH_TOKENS, Walk
from qfarm.windows import calibration_windows

YARDSTICK = "yardstick"
TEXT = "python-docs"  # comes with Python
LONG_S = 20.0  # a method that takes longer than this is run once
SQUARES = frozenset({Statistic.HESSIAN, Statistic.NORMALISED_HESSIAN})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run; checked by `run`."""

    model: str
    methods: tuple[str, ...] = ()  # empty: every weight method
    samples: int = 8
    length: int = 512  # tokens per sample
    blocks: int = 2  # decoder blocks, from the first
    bits: int = 4
    group_size: int = 64
    repeats: int = 3
    dtype: str = "bfloat16"  # as in a job
    clock: Literal["wall", "cpu"] = "wall"  # cpu: seconds of all threads, for machines that do other work too


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row; times are medians of `runs` runs."""

    method: str
    runs: int
    seconds: float
    ratio: float  # the yardstick's seconds / these
    ratio_without_forwards: float  # the same of all sections but "forwards"
    shares: dict[str, float]  # section -> share of the seconds
    rest_bytes: int | None  # memory at the start: process or, on CUDA, allocated
    peak_bytes: int | None
    bound_bytes: int | None  # rest + a block's calibration activations + a block's Hessians


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    settings: Settings
    machine: dict[str, Any]  # versions, processor or GPU, threads
    memory: str  # which memory was measured
    results: tuple[MethodResult, ...]  # the yardstick first
    refused: dict[str, str]  # method -> why it was not run


@dataclasses.dataclass(frozen=True)
class _Run:
    seconds: dict[str, float]
    rest: int | None
    peak: int | None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Run the benchmark. Raises InvalidInput for settings that cannot be, and what loading a model raises."""
    _check(settings)
    chosen, refused = _solvers(settings)
    facts = resolve(settings.model)
    columns = {shape[1] for shape in facts.linear_shapes.values()}
    bad = [n for n in sorted(columns) if settings.group_size != -1 and n % settings.group_size]
    if bad:
        raise InvalidInput(f"--group {settings.group_size} does not divide the {bad[0]} columns of a layer")
    progress(f"loading {settings.model}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = first_blocks(load(facts, settings.dtype, device), settings.blocks)
    text = load_text(TEXT, "calibration", None)
    windows = calibration_windows(text, loaded.tokenizer, settings.samples, settings.length, seed=0)
    return measure(loaded, windows, settings, chosen, refused, progress)


def _check(settings: Settings) -> None:
    for name, lowest in (("samples", 1), ("length", 2), ("blocks", 1), ("repeats", 1)):
        if getattr(settings, name) < lowest:
            raise InvalidInput(f"--{name} is at least {lowest}, got {getattr(settings, name)}")
    size = settings.group_size
    if size != -1 and (size < 1 or yardstick.BLOCK % size):
        raise InvalidInput(f"--group is -1 or divides the yardstick's {yardstick.BLOCK} columns, got {size}")
    if not 2 <= settings.bits <= 8:
        raise InvalidInput(f"--bits is 2..8, got {settings.bits}")


def _solvers(settings: Settings) -> tuple[dict[str, WeightSolver], dict[str, str]]:
    """The methods to run, and those of all that cannot; one that was named and cannot is an error."""
    names = settings.methods or tuple(n for n in method_names() if issubclass(lookup(n), WeightSolver))
    chosen: dict[str, WeightSolver] = {}
    refused: dict[str, str] = {}
    for name in names:
        kind = lookup(name)
        if not issubclass(kind, WeightSolver):
            raise InvalidInput(f"{name} is no weight solver; the benchmark runs methods that work alone")
        solver = kind().resolve(settings.group_size)
        rule = solver.refusal(settings.group_size, symmetric=False)
        if settings.bits not in kind.widths:
            rule = f"works with {kind.widths.start}..{kind.widths.stop - 1} bits"
        if rule is None and not settings.methods and issubclass(kind, BlockSolver):
            rule = "works on whole blocks, which can take minutes; name it to run it"
        if rule is None:
            chosen[name] = solver
        elif settings.methods:
            raise InvalidInput(f"{name} cannot run with --bits {settings.bits} --group {settings.group_size}: {rule}")
        else:
            refused[name] = rule
    return chosen, refused


def first_blocks(loaded: LoadedModel, count: int) -> LoadedModel:
    """The same model as one of which only the first blocks are known, which is all that a walk sees."""
    if count > len(loaded.blocks):
        raise InvalidInput(f"--blocks {count}: the model has {len(loaded.blocks)}")
    short = copy.copy(loaded)
    short.blocks = loaded.blocks[:count]
    return short


def measure(
    loaded: LoadedModel,
    windows: Tensor,
    settings: Settings,
    solvers: dict[str, WeightSolver],
    refused: dict[str, str],
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """The benchmark on a loaded model; windows [samples, length]. The model's weights are put back after each run."""
    grid = Grid(bits=settings.bits, group_size=settings.group_size)
    jobs: dict[str, Callable[[Stopwatch], None]] = {
        YARDSTICK: lambda watch: yardstick.quantize_model(loaded, windows, grid, watch)
    }
    for name, solver in solvers.items():
        jobs[name] = _job(loaded, windows, grid, solver)
    progress("warming up")
    clock = time.process_time if settings.clock == "cpu" else now
    _once(first_blocks(loaded, 1), jobs[YARDSTICK], clock, YARDSTICK)
    runs: dict[str, list[_Run]] = {name: [] for name in jobs}
    for repeat in range(settings.repeats):
        for name, job in jobs.items():
            if not runs[name] or runs[name][0].total <= LONG_S:
                progress(f"run {repeat + 1} of {settings.repeats}: {name}")
                runs[name].append(_once(loaded, job, clock, name))
    base = runs[YARDSTICK]
    extra = {YARDSTICK: bound_bytes(loaded, windows.numel(), squares=1, per_layer=True)}
    for name, solver in solvers.items():
        squares = len(SQUARES & solver.statistics())
        extra[name] = bound_bytes(loaded, windows.numel(), squares=squares)
    results = tuple(_summary(name, found, base, extra[name]) for name, found in runs.items())
    memory = "allocated on the GPU" if loaded.device.type == "cuda" else "resident in this process"
    return Report(settings=settings, machine=environment.provenance(), memory=memory, results=results, refused=refused)


def _job(loaded: LoadedModel, windows: Tensor, grid: Grid, solver: WeightSolver) -> Callable[[Stopwatch], None]:
    solve = "quantize_block" if isinstance(solver, BlockSolver) else "quantize_linear"
    places: dict[Place, str] = {
        (Walk, "__init__"): "forwards",
        (Walk, "collect"): "forwards",
        (Walk, "outputs"): "forwards",
        (Walk, "advance"): "forwards",
        (Collector, "add"): "statistics",
        (Collector, "result"): "statistics",
        (type(solver), solve): "solving",
    }

    def job(watch: Stopwatch) -> None:
        with timed(watch, places):
            quantize_weights(loaded, solver, lambda role: grid, windows, sequential=True, report=lambda *_: None)

    return job


def _once(loaded: LoadedModel, job: Callable[[Stopwatch], None], clock: Callable[[], float], name: str) -> _Run:
    gc.collect()
    cuda = loaded.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        rest: int | None = torch.cuda.memory_allocated()
    else:
        environment.reset_peak_host_bytes()
        rest = environment.peak_host_bytes()
    watch = Stopwatch(clock)
    try:
        job(watch)
        watch.stop()
    except QfarmError as error:
        raise type(error)(f"{name}: {error}") from error
    finally:
        loaded.restore()
    peak = torch.cuda.max_memory_allocated() if cuda else environment.peak_host_bytes()
    return _Run(watch.seconds, rest, peak)


def bound_bytes(loaded: LoadedModel, tokens: int, *, squares: int, per_layer: bool = False) -> int:
    """What a run may add to a loaded model: a block's calibration activations and its Hessians.

    Activations are the inputs and outputs of the block for all tokens, and what its linear layers read and write for
    one batch. `squares` Hessians are kept of each distinct input, or with `per_layer` of each layer's.
    """
    linears = loaded.linears(0)
    element = next(loaded.model.parameters()).element_size()
    hidden = loaded.model.config.hidden_size
    batch = min(tokens, BATCH_TOKENS)
    inside = sum(linear.in_features + linear.out_features for linear in linears.values())
    readers = list(linears) if per_layer else [group[0] for group in loaded.architecture.shared_inputs]
    hessians = 4 * squares * sum(linears[role].in_features ** 2 for role in readers)
    return int(element * (2 * tokens * hidden + batch * inside) + hessians)


def _summary(name: str, runs: Sequence[_Run], base: Sequence[_Run], extra: int) -> MethodResult:
    seconds = statistics.median(run.total for run in runs)
    middle = min(runs, key=lambda run: abs(run.total - seconds))
    peaks = [run.peak for run in runs if run.peak is not None]
    rests = [run.rest for run in runs if run.rest is not None]
    rest = max(rests) if rests else None
    return MethodResult(
        method=name,
        runs=len(runs),
        seconds=seconds,
        ratio=statistics.median(run.total for run in base) / seconds,
        ratio_without_forwards=_work(base) / max(_work(runs), 1e-9),
        shares={section: middle.seconds[section] / max(middle.total, 1e-9) for section in SECTIONS},
        rest_bytes=rest,
        peak_bytes=max(peaks) if peaks else None,
        bound_bytes=rest + extra if rest is not None else None,
    )


def _work(runs: Sequence[_Run]) -> float:
    return statistics.median(run.total - run.seconds["forwards"] for run in runs)
