"""Kernels on the shapes of LUT-GEMM's latency table: timed where there is a GPU, predicted where there is none.

Rows of the three kinds, measured, predicted and compiled, are never mixed in one table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qfarm import environment
from qfarm.errors import InvalidInput, QfarmError
from qfarm.kernels.bench import Timing, time_products
from qfarm.kernels.roofline import FORMATS, GPUS, SHAPES, Prediction, predict

NO_GPU = "No CUDA or ROCm device found: no kernel was timed. Below: predictions and compile facts, not measurements."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is shown; checked by `run`."""

    gpus: tuple[str, ...] = ("a100", "h100")  # of roofline.GPUS, to predict for
    targets: tuple[str, ...] = ()  # to compile for: sm_80, sm_90, gfx942; empty: nothing is compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted:
    kind: str = "predicted"
    gpu: str
    form: str
    n: int
    k: int
    prediction: Prediction
    ratio: float  # predicted time of fp16 over this one's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    settings: Settings
    machine: dict[str, Any]
    measured: tuple[Timing, ...]  # empty without a GPU
    predicted: tuple[Predicted, ...]
    compiled: tuple[dict[str, Any], ...]  # rows of qfarm.kernels.aot


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Time what can be timed, predict and compile the rest. Raises InvalidInput for names that are not known."""
    for name in settings.gpus:
        if name not in GPUS:
            raise InvalidInput(f'--gpus: unknown "{name}": expected some of {", ".join(GPUS)}')
    measured: list[Timing] = []
    if torch.cuda.is_available():
        for n, k in SHAPES:
            progress(f"{n} x {k}")
            measured += time_products(n, k, tuple(FORMATS))
    return Report(
        settings=settings,
        machine=environment.provenance(),
        measured=tuple(measured),
        predicted=tuple(predictions(settings.gpus)),
        compiled=tuple(compile_all(settings.targets, progress)),
    )


def predictions(gpus: tuple[str, ...]) -> list[Predicted]:
    """Every format and shape on every GPU, one row of inputs."""
    rows = []
    for gpu in gpus:
        for n, k in SHAPES:
            plain = predict(GPUS[gpu], FORMATS["fp16"], 1, n, k).goal_s
            for name, form in FORMATS.items():
                found = predict(GPUS[gpu], form, 1, n, k)
                rows.append(Predicted(gpu=gpu, form=name, n=n, k=k, prediction=found, ratio=plain / found.goal_s))
    return rows


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
