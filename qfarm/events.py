"""Events: what a running farm tells whoever watches it (the console, a log, a test)."""

from __future__ import annotations

import dataclasses

from qfarm.errors import Failure
from qfarm.matrix import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobStarted:
    job: str
    where: str  # "local Ray, 2 CPUs", "cluster at 10.0.0.1:6379"
    store: str
    cells: int  # to run now
    done_before: int  # finished by earlier submissions
    expected_s: float | None = None  # of all cells together on one worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    cell: Cell
    attempt: int
    worker: str
    expected_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressed:
    """A running cell reached a point of a stage."""

    cell_id: str
    worker: str
    stage: str  # "load", "calibrate + quantize", "evaluate perplexity wikitext2 2048"
    done: int
    total: int  # 0 when unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    cell: Cell
    worker: str
    seconds: float
    figures: tuple[tuple[str, float], ...]  # the evaluations' headline values by label
    linear_bits: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    cell: Cell
    worker: str
    kind: Failure
    error: str  # one line
    attempt: int
    retry_in: float | None  # seconds; None: given up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """Something the user should know: a fallback, a worker lost, a shape that was clamped."""

    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobEnded:
    finished: int
    failed: int
    interrupted: bool
    seconds: float


Event = JobStarted | Started | Progressed | Finished | Failed | Note | JobEnded
