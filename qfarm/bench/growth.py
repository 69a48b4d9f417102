"""Growth: how processor time grows with cells, workers, layers, hidden size, calibration text and evaluated text.

Each axis is measured at a few sizes, each twice as large as the last, with everything else held fixed; the exponent is
the slope of a straight line through the logarithms of seconds and sizes. Beside it stands the most that the mathematics
asks for. Fixed costs make small sizes flatter than that, never steeper.

    plan         `qfarm plan` for so many cells: 1
    scheduler    all answers of the scheduler in simulated time (`qfarm.bench.simulated`) for so many cells: that of
                 n log n, 1 + 1 / ln n at the smallest size
    workers      the same for so many workers of a fixed job: 0
    layers       GPTQ of so many blocks of a random Llama: 1
    hidden       GPTQ, everything in proportion: 3 (Hessians and columns, n^3; forward passes, n^2 per token)
    calibration  GPTQ with so many tokens: 1
    windows      perplexity of so many windows: 1

Seconds are this process's, one thread of torch, the least of `repeats` runs: a busy machine can only add to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qfarm import environment
from qfarm.bench import simulated
from qfarm.bench.farm import Figure, plan_seconds
from qfarm.bench.random_model import save_random
from qfarm.errors import QfarmError

ALLOWED = 0.15  # above the mathematics: noise, and caches that a larger size no longer fits
LAYERS, HIDDEN, SAMPLES, WINDOWS, LENGTH = 2, 256, 16, 2, 256  # of a cell where they do not grow
HEAD = 32  # inputs per attention head
JOB = """
models: [{model}]
methods: [gptq]
bits: [w4]
group_sizes: [64]
dtype: bfloat16
calibration: {{text: python-docs, samples: {samples}, length: {length}}}
evaluate: [perplexity: {{text: python-docs, length: {length}, windows: {windows}, divergence: false}}]
resources: {{gpus: 0}}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 4  # sizes per axis
    repeats: int = 3
    scale: float = 1.0  # of the smallest size of cells and workers; tests take less


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]  # processor time at each size
    bound: float  # exponent that the mathematics asks for

    @property
    def exponent(self) -> float:
        """Slope of log seconds over log size, by least squares."""
        logs = [[math.log(value) for value in values] for values in (self.sizes, self.seconds)]
        return statistics.linear_regression(*logs).slope

    @property
    def missed(self) -> bool:
        return self.exponent > self.bound + ALLOWED

    def figure(self) -> Figure:
        """With the exponent as the value and the most that it may be as the goal."""
        taken = ", ".join(f"{seconds:.3g}" for seconds in self.seconds)
        what = f"{self.sizes[0]:,} to {self.sizes[-1]:,}: {taken} processor s"
        return Figure(part=self.axis, what=what, value=self.exponent, unit="exponent", goal=self.bound + ALLOWED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    settings: Settings
    machine: dict[str, Any]
    curves: tuple[Curve, ...]


def run(settings: Settings, say: Callable[[str], None]) -> Report:
    """One curve per axis. Raises QfarmError when a cell fails."""
    curves = []
    with one_thread(), tempfile.TemporaryDirectory(prefix="qfarm-growth-") as folder:
        axes = _axes(Path(folder), settings.scale)
        for axis, (smallest, bound, measure) in axes.items():
            say(f"{axis} ...")
            sizes = tuple(smallest * 2**step for step in range(settings.steps))
            with _without_what_is_there():
                runs = [[measure(size) for size in sizes] for _ in range(settings.repeats)]
            least = tuple(map(min, zip(*runs, strict=True)))
            curves.append(Curve(axis=axis, sizes=sizes, seconds=least, bound=bound))
    return Report(settings=settings, machine=environment.provenance(), curves=tuple(curves))


def _axes(folder: Path, scale: float) -> Mapping[str, tuple[int, float, Callable[[int], float]]]:
    """By name: the smallest size, the exponent that it may have, and processor seconds at a size."""

    def gptq(**sizes: int) -> float:
        return cell_seconds(folder, **sizes)["calibrate + quantize"]

    def perplexity(windows: int) -> float:
        return sum(seconds for stage, seconds in cell_seconds(folder, windows=windows).items() if "perplexity" in stage)

    few, many = int(4_000 * scale), int(8_000 * scale)
    samples, windows = max(1, int(64 * scale)), max(1, int(32 * scale))
    return {
        "plan": (few, 1, plan_seconds),
        "scheduler": (few, 1 + 1 / math.log(few), lambda cells: scheduler_seconds(cells, 100)),
        "workers": (max(1, int(50 * scale)), 0, lambda workers: scheduler_seconds(many, workers)),
        "layers": (LAYERS, 1, lambda layers: gptq(layers=layers)),
        "hidden": (HIDDEN // 2, 3, lambda hidden: gptq(hidden=hidden)),
        "calibration": (samples, 1, lambda samples: gptq(samples=samples)),
        "windows": (windows, 1, perplexity),
    }


def scheduler_seconds(cells: int, workers: int) -> float:
    """Of a simulated job in which nothing goes wrong, setting up included."""
    quiet = simulated.Settings(cells=cells, workers=workers, fail=0, preempt=0, straggle=0)
    report, _ = simulated.simulate(quiet)
    return report.setup_s + report.scheduler_s


def cell_seconds(
    folder: Path, *, layers: int = LAYERS, hidden: int = HIDDEN, samples: int = SAMPLES, windows: int = WINDOWS
) -> dict[str, float]:
    """Processor seconds of one GPTQ cell by stage, in this process, into a store that is thrown away."""
    from qfarm.job import parse_job
    from qfarm.plan import Task, make_plan
    from qfarm.store import Store
    from qfarm.worker import Session, run_cell

    model = folder / f"{layers}x{hidden}"
    if not model.exists():
        save_random(
            model,
            std=hidden**-0.5,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // HEAD,
            max_position_embeddings=LENGTH,
        )
    text = JOB.format(model=model, samples=samples, length=LENGTH, windows=windows)
    marks: list[tuple[str, float]] = []

    def report(stage: str, done: int = 0, total: int = 0) -> None:
        if not marks or marks[-1][0] != stage:
            marks.append((stage, time.process_time()))

    with tempfile.TemporaryDirectory(dir=folder) as name:
        store = Store.open(Path(name) / "store", create=True)
        planned = next(
            one for one in make_plan(parse_job(text, "growth"), store, None).cells if not one.cell.is_baseline
        )
        task = Task(
            job="growth",
            cell=planned.cell,
            evaluations=planned.missing,
            store=store.location,
            attempt_id="growth",
            number=1,
            data=None,
        )
        outcome = run_cell(task, Session(None), report)
        ended = time.process_time()
        if outcome.failure is not None:
            raise QfarmError(f"growth: {outcome.failure}: {outcome.error}")
        [read] = {row["n"] for row in store.read("metrics").to_pylist() if row["metric"] == "perplexity"}
        if read < windows:
            raise QfarmError(f"growth: python-docs has {read} windows of {LENGTH} tokens, {windows} are asked for")
    return _durations([*marks, ("end", ended)])


def _durations(marks: Sequence[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (stage, began), (_, ended) in zip(marks, marks[1:], strict=False):
        found[stage] = found.get(stage, 0.0) + ended - began
    return found


@contextlib.contextmanager
def _without_what_is_there() -> Iterator[None]:
    """Inside, garbage collection does not look through what is there already, such as the axes before have left."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take processor time as well."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
