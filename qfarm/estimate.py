"""Estimates: what a cell will take, from earlier rows of the store where there are any, else from arithmetic.

The arithmetic counts two floating-point operations per parameter and token for forwards, the calibration's passes,
the second moments and the column loop, and divides by a rate: measured on this machine for CPU jobs, assumed for GPUs.
It leaves out loading and kernels' start-up, so it is a lower bound in spirit; where the store holds attempts that it
was made for, it is multiplied by what it was wrong by there. `report.predicted` says how well expectations held.
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
from qfarm.memory import BLOCKS_ELSEWHERE, OFFLOADED, SHRUNK, SLACK, Needs, needs
from qfarm.models.reference import ModelFacts
from qfarm.scheme import parse_scheme

if TYPE_CHECKING:
    from qfarm.store import Store

ASSUMED_GPU_RATE = 1.5e14  # operations per second of one GPU, about half of an A100's dense bfloat16 rate
# Of one GPU, that cells may share. A context and the allocator's slack are assumed to take as much beside.
FRACTIONS = (0.125, 0.25, 0.5)
CONTEXT_BYTES = 1.5e9
RATES = ("assumed rate", "measured rate")
LESS_MEMORY = (BLOCKS_ELSEWHERE, SHRUNK, OFFLOADED)  # notes of attempts that took less than a first one does
RECENT = 200  # attempts that the arithmetic is corrected by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    seconds: float
    device_bytes: int
    needed: Needs  # by part, for models that lie in several places
    source: str  # "store", "measured rate", "assumed rate", each rate also with ", corrected"

    def on_each(self, gpus: int) -> float:
        """Bytes of tensors on each GPU when so many have the model's blocks."""
        return self.device_bytes if gpus == 1 else self.needed.on_each(gpus)


def machine_rate(gpus: float) -> tuple[float, str]:
    """Operations per second, and where that number comes from."""
    if gpus:
        return ASSUMED_GPU_RATE, RATES[0]
    import torch

    a = torch.randn(512, 512, dtype=torch.bfloat16)
    a @ a
    runs, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        a @ a
        runs += 1
    return 2 * 512**3 * runs / (time.perf_counter() - started), RATES[1]


Work = tuple[str, str, str, frozenset[str]]  # fingerprint, recipe, calibration, eval_ids: what takes equally long


def work(cell: Mapping[str, Any], eval_ids: Iterable[str]) -> Work:
    """What two attempts must share for the time of one to predict the other's."""
    return (cell["fingerprint"], cell["recipe"], json.dumps(cell["calibration"], sort_keys=True), frozenset(eval_ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What a store's successful attempts tell of attempts to come."""

    seconds: Mapping[Work, float]  # median
    bytes: Mapping[Work, int]  # largest peak, of the GPU or of the process, with the whole model in one place
    corrections: Mapping[str, float]  # by model fingerprint: seconds taken per second of the arithmetic, median

    def correction(self, fingerprint: str) -> float | None:
        """Of the model, else of all models; None without attempts that the arithmetic was made for."""
        if fingerprint in self.corrections:
            return self.corrections[fingerprint]
        return statistics.median(self.corrections.values()) if self.corrections else None


NOTHING = History(seconds={}, bytes={}, corrections={})


def history(store: Store | None, *, gpu: bool = False) -> History:
    """`gpu`: memory is the device's, not the process's."""
    if store is None:
        return NOTHING
    cells = store.read("cells", columns=["cell_id", "spec"]).to_pylist()
    specs = {row["cell_id"]: json.loads(row["spec"]) for row in cells}
    seconds: dict[Work, list[float]] = {}
    peaks: dict[Work, int] = {}
    wrong: dict[str, list[float]] = {}
    peak = "peak_gpu_bytes" if gpu else "peak_host_bytes"
    columns = ["cell_id", "outcome", "wall_s", "evaluations", "started", "expected_s", "expected_from", "notes", peak]
    rows = store.read("attempts", columns=columns).to_pylist()
    for row in sorted(rows, key=lambda row: str(row["started"])):
        if row["outcome"] != "ok" or row["cell_id"] not in specs:
            continue
        spec = specs[row["cell_id"]]
        done = work(spec, json.loads(row["evaluations"] or "[]"))
        seconds.setdefault(done, []).append(row["wall_s"])
        if not any(note.startswith(LESS_MEMORY) for note in json.loads(row["notes"] or "[]")):
            peaks[done] = max(peaks.get(done, 0), row[peak] or 0)
        if row["expected_s"] and row["expected_from"] in RATES:
            wrong.setdefault(spec["fingerprint"], []).append(row["wall_s"] / row["expected_s"])
    return History(
        seconds={key: statistics.median(values) for key, values in seconds.items()},
        bytes={key: value for key, value in peaks.items() if value},
        corrections={key: statistics.median(values[-RECENT:]) for key, values in wrong.items()},
    )


def gpu_share(expected: Estimate, gpus: float, gpu_memory: float | None, *, spreads: bool = True) -> float | None:
    """GPUs of a worker for a cell: the smallest fraction or the fewest in which it fits, None when `gpus` are too few.

    `gpu_memory` is in GB of one GPU; without it every worker has `gpus`. `spreads`: the model's blocks can lie on
    several GPUs.
    """
    if gpu_memory is None or not gpus:
        return gpus
    shares: set[float] = {*FRACTIONS, *range(1, int(gpus) + 1), gpus}
    for share in sorted(shares):
        parts = max(1, int(share))
        if share > gpus or (parts > 1 and not spreads):
            continue
        if with_slack(expected.on_each(parts)) <= min(share, 1) * gpu_memory * 1e9:
            return share
    return None


def with_slack(size: float) -> float:
    """Bytes of a GPU for so many bytes of tensors: what the allocator and the context take beside."""
    return size * SLACK + CONTEXT_BYTES


def streaming_share(expected: Estimate, gpus: float, gpu_memory: float) -> float | None:
    """The one GPU of a worker for a cell whose blocks come from the host's memory one by one; None when that is short.

    Not a part of one: a worker takes for its own what is free, and would lay the model there as a whole.
    """
    return 1 if gpus >= 1 and with_slack(expected.needed.blockwise) <= gpu_memory * 1e9 else None


def estimate(
    job: Job,
    cell: Cell,
    facts: ModelFacts,
    evaluators: Mapping[str, Any],
    past: History,
    rate: tuple[float, str],
    packed: bool = False,
) -> Estimate:
    """Seconds and device memory of one cell with these evaluations (by eval_id) still to run, some of them packed."""
    linear, tables = facts.parameters
    shapes = facts.linear_shapes.values()
    layers = facts.config["num_hidden_layers"]
    window = max((evaluator.window or 0 for evaluator in evaluators.values()), default=0)
    device = "cuda" if job.file.resources.gpus else "cpu"
    needed = needs(facts, cell, window=window, device=device, packed=packed)
    operations = sum(2.0 * evaluator.tokens() * (linear + tables) for evaluator in evaluators.values())
    if cell.calibration:
        tokens = cell.calibration["samples"] * cell.calibration["length"]
        operations += 4.0 * tokens * linear
        operations += layers * sum(2.0 * tokens * n * n for n in {n for _, n in shapes})
    if "weight" in parse_scheme(cell.scheme).sites and cell.calibration:
        operations += layers * sum(2.0 * m * n * n for m, n in shapes)
    same = work(vars(cell), evaluators)
    whole = past.bytes.get(same, needed.peak)
    known = past.seconds.get(same)
    if known is not None:
        return Estimate(seconds=known, source="store", device_bytes=whole, needed=needed)
    seconds, correction = operations / rate[0], past.correction(cell.fingerprint)
    if correction is None:
        return Estimate(seconds=seconds, source=rate[1], device_bytes=whole, needed=needed)
    corrected = f"{rate[1]}, corrected"
    return Estimate(seconds=seconds * correction, source=corrected, device_bytes=whole, needed=needed)
