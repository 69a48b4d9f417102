"""Estimates: what a cell will take, from earlier rows of the store where there are any, else from arithmetic.

The arithmetic counts two floating-point operations per parameter and token for forwards, the calibration's passes,
the second moments and the column loop, and divides by a rate: measured on this machine for CPU jobs, assumed for GPUs.
It leaves out loading and kernels' start-up, so it is a lower bound in spirit.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qfarm.job import Job
from qfarm.matrix import Cell
from qfarm.models.reference import ModelFacts
from qfarm.scheme import parse_scheme

if TYPE_CHECKING:
    from qfarm.store import Store

ASSUMED_GPU_RATE = 1.5e14  # operations per second of one GPU, about half of an A100's dense bfloat16 rate
FACTOR_BYTES = 52  # per entry of a Hessian while it is factored: six float64 copies and the float32 sum
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    seconds: float
    device_bytes: int
    source: str  # "store", "measured rate", "assumed rate"


def machine_rate(gpus: float) -> tuple[float, str]:
    """Operations per second, and where that number comes from."""
    if gpus:
        return ASSUMED_GPU_RATE * max(gpus, 1), "assumed rate"
    import torch

    a = torch.randn(512, 512, dtype=torch.bfloat16)
    a @ a
    runs, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        a @ a
        runs += 1
    return 2 * 512**3 * runs / (time.perf_counter() - started), "measured rate"


Work = tuple[str, str, str, frozenset[str]]  # fingerprint, recipe, calibration, eval_ids: what takes equally long


def work(cell: Mapping[str, Any], eval_ids: Iterable[str]) -> Work:
    """What two attempts must share for the time of one to predict the other's."""
    return (cell["fingerprint"], cell["recipe"], json.dumps(cell["calibration"], sort_keys=True), frozenset(eval_ids))


def history(store: Store | None) -> dict[Work, float]:
    """Median seconds of successful attempts, by the work they did."""
    if store is None:
        return {}
    cells = store.read("cells", columns=["cell_id", "spec"]).to_pylist()
    specs = {row["cell_id"]: json.loads(row["spec"]) for row in cells}
    seconds: dict[Work, list[float]] = {}
    for row in store.read("attempts", columns=["cell_id", "outcome", "wall_s", "evaluations"]).to_pylist():
        if row["outcome"] == "ok" and row["cell_id"] in specs:
            done = json.loads(row["evaluations"] or "[]")
            seconds.setdefault(work(specs[row["cell_id"]], done), []).append(row["wall_s"])
    return {key: statistics.median(values) for key, values in seconds.items()}


def estimate(
    job: Job,
    cell: Cell,
    facts: ModelFacts,
    evaluators: Mapping[str, Any],
    past: Mapping[Work, float],
    rate: tuple[float, str],
) -> Estimate:
    """Seconds and device memory of one cell with these evaluations (by eval_id) still to run."""
    linear, tables = facts.parameters
    size = DTYPE_BYTES[cell.dtype]
    hidden = facts.config["hidden_size"]
    shapes = facts.linear_shapes.values()
    layers = facts.config["num_hidden_layers"]
    operations = sum(2.0 * evaluator.tokens() * (linear + tables) for evaluator in evaluators.values())
    # Originals are kept beside the quantized weights so that the next cell starts from them.
    memory = (linear * (1 if cell.is_baseline else 2) + tables) * size
    if cell.calibration:
        tokens = cell.calibration["samples"] * cell.calibration["length"]
        operations += 4.0 * tokens * linear
        operations += layers * sum(2.0 * tokens * n * n for n in {n for _, n in shapes})
        memory += tokens * hidden * size + FACTOR_BYTES * max(n for _, n in shapes) ** 2
    if "weight" in parse_scheme(cell.scheme).sites and cell.calibration:
        operations += layers * sum(2.0 * m * n * n for m, n in shapes)
    known = past.get(work(dataclasses.asdict(cell), evaluators))
    seconds = known if known is not None else operations / rate[0]
    return Estimate(seconds=seconds, device_bytes=int(memory), source="store" if known is not None else rate[1])
