"""Kernels on the shapes of LUT-GEMM's latency table or of a job's models: timed on a GPU, predicted without one.

Figures are rows of the store's table `kernels` (qfarm.record.KernelFigures), whose `kind` says where they come from.
Rows of the three kinds, measured, predicted and compiled, are never mixed in one table of the terminal.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qfarm import environment
from qfarm.errors import InvalidInput, QfarmError
from qfarm.kernels.bench import CANDIDATES, SEED, Timing, time_products, timings
from qfarm.kernels.roofline import FORMATS, GPU, GPUS, SHAPES, predict, profile, refusal, stored_bytes
from qfarm.record import KernelFigures, KernelRow, utc_now
from qfarm.store import Store

NO_GPU = "No CUDA or ROCm device found: no kernel was timed. Below: predictions and compile facts, not measurements."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is shown; checked by `run`."""

    gpus: tuple[str, ...] = ("a100", "h100")  # of roofline.GPUS, to predict for
    targets: tuple[str, ...] = ()  # to compile for: sm_80, sm_90, gfx942; empty: nothing is compiled
    shapes: tuple[tuple[int, int], ...] = SHAPES  # (n, k)
    rows: tuple[int, ...] = (1,)  # m
    store: str | None = None  # where the rows go; made where there is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    run_id: str
    settings: Settings
    machine: dict[str, Any]  # provenance
    rows: tuple[KernelFigures, ...]

    def of(self, kind: str) -> list[KernelFigures]:
        return [row for row in self.rows if row.kind == kind]


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Time what can be timed, predict and compile the rest, and publish it all where a store is named.

    Raises InvalidInput for names and numbers that cannot be, StoreError for a store that cannot, before anything is
    timed.
    """
    for name in settings.gpus:
        if name not in GPUS:
            raise InvalidInput(f'--gpus: unknown "{name}": expected some of {", ".join(GPUS)}')
    if not settings.rows or min(settings.rows) < 1:
        raise InvalidInput(f"--rows {','.join(map(str, settings.rows))}: expected numbers from 1, as in 1,16")
    compiled = compile_all(settings.targets, progress)
    store = Store.open(settings.store, create=True) if settings.store else None
    machine = dict(environment.provenance())
    rows: list[KernelFigures] = []
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        machine |= {"seed": SEED, "gpu_before": environment.gpu_state(str(properties.uuid))}
        for n, k in settings.shapes:
            for m in settings.rows:
                progress(f"m = {m}, {n} x {k}")
                rows += measured(timed(m, n, k, device, int(properties.L2_cache_size)), machine["gpu"])
        machine |= {"gpu_after": environment.gpu_state(str(properties.uuid))}
    for gpu in settings.gpus:
        rows += [row for n, k in settings.shapes for m in settings.rows for row in predicted(gpu, m, n, k)]
    rows += map(compiled_row, compiled)
    report = Report(run_id=_run_id(), settings=settings, machine=machine, rows=tuple(rows))
    if store is not None:
        publish(store, report)
    return report


def shapes_of(job: str) -> tuple[tuple[int, int], ...]:
    """(n, k) of the decoder's linear layers of a job's models, each once; models out of reach may be known ones.

    Raises InvalidInput, Unavailable.
    """
    from qfarm.job import load_job
    from qfarm.models.reference import resolve

    found: set[tuple[int, int]] = set()
    for block in load_job(job).blocks:
        for model in block.models:
            found |= set(resolve(model, allow_provisional=True).linear_shapes.values())
    return tuple(sorted(found))


def timed(m: int, n: int, k: int, device: torch.device, cache_bytes: int) -> list[Timing]:
    """Timings of one shape; the reason instead of times where copies and references do not fit on the GPU."""
    try:
        return time_products(m, n, k, device, cache_bytes)
    except torch.OutOfMemoryError:
        return timings(m, n, k, {}, dict.fromkeys(CANDIDATES, "copies of the weight and its reference do not fit"))


def publish(store: Store, report: Report) -> None:
    """One publication per run, so that none is ever in the way of another."""
    own: dict[str, Any] = {"run_id": report.run_id, "created": utc_now(), "provenance": json.dumps(report.machine)}
    store.publish_kernels(report.run_id, [KernelRow(**vars(row), **own) for row in report.rows])


def _run_id() -> str:
    """Sorts by time; the token keeps apart what starts in the same second."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


# -- rows -------------------------------------------------------------------------------------------------------------


def measured(found: Sequence[Timing], device: str) -> list[KernelFigures]:
    """Rows of timings of one shape, beside what was predicted where the GPU's figures are known."""
    gpu = profile(device)
    plain = next((timing.median_s for timing in found if timing.form == "fp16"), None)
    return [_measured(timing, device, GPUS[gpu] if gpu else None, plain) for timing in found]


def _measured(timing: Timing, device: str, gpu: GPU | None, plain: float | None) -> KernelFigures:
    form, m, n, k, median = timing.form, timing.m, timing.n, timing.k, timing.median_s
    kept = FORMATS.get(form, FORMATS["fp16"])
    refused = refusal(kept, k) is not None
    if form == "copy":
        moved = 2 * stored_bytes(kept, n, k)
    else:
        moved = stored_bytes(kept, n, k) + 2 * m * (n + k)
    model = None if gpu is None or refused or form == "copy" else predict(gpu, kept, m, n, k)
    memory = None if gpu is None else moved / gpu.bandwidth
    return KernelFigures(
        kind="measured",
        gpu=device,
        form=form,
        m=m,
        n=n,
        k=k,
        median_s=median,
        p20_s=timing.p20_s,
        p80_s=timing.p80_s,
        samples=timing.samples,
        moved_bytes=None if refused else moved,
        gb_per_s=moved / median / 1e9 if median else None,
        memory_s=None if refused else memory,
        efficiency=memory / median if memory and median else None,
        predicted_s=model.goal_s if model else None,
        limit=model.limit if model else None,
        ratio_fp16=plain / median if plain and median and form != "copy" else None,
        error=timing.error,
    )


def predicted(gpu: str, m: int, n: int, k: int) -> list[KernelFigures]:
    """Rows of every format on one shape."""
    plain = predict(GPUS[gpu], FORMATS["fp16"], m, n, k).goal_s
    rows = []
    for name, form in FORMATS.items():
        figures: dict[str, Any] = {"error": refusal(form, k)}
        if figures["error"] is None:
            found = predict(GPUS[gpu], form, m, n, k)
            figures |= {"moved_bytes": found.moved, "memory_s": found.memory_s, "predicted_s": found.goal_s}
            figures |= {"limit": found.limit, "ratio_fp16": plain / found.goal_s}
        rows.append(KernelFigures(kind="predicted", gpu=gpu, form=name, m=m, n=n, k=k, **figures))
    return rows


def compiled_row(facts: dict[str, Any]) -> KernelFigures:
    """A row of `qfarm.kernels.aot`, which knows more than is kept here."""
    return KernelFigures(
        kind="compiled",
        gpu=facts["target"],
        form=facts["launch"],
        registers=facts["registers"],
        spills=facts["spills"],
        shared_bytes=facts["shared"],
        per_weight=facts.get("per_element"),
        verdict="; ".join(facts["breaches"]) or "kept",
    )


# -- compiling --------------------------------------------------------------------------------------------------------


def compile_all(targets: tuple[str, ...], progress: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Rows of the compile report, made in a process of its own. Raises InvalidInput for targets, QfarmError."""
    if not targets:
        return []
    progress(f"compiling for {', '.join(targets)}")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.json"
        command = [sys.executable, "-m", "qfarm.kernels.aot", "--targets", ",".join(targets), "--json", str(path)]
        ran = subprocess.run(command, env=clean, capture_output=True, text=True)
        if ran.returncode == 2:
            raise InvalidInput(f"--compile: {ran.stderr.strip().splitlines()[-1].rpartition('error: ')[2]}")
        if not path.is_file():
            raise QfarmError(f"compiling kernels failed: {ran.stderr.strip().splitlines()[-1]}")
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows
