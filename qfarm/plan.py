"""Plan: what a submission would run. Cells, the evaluations that each still lacks, and what they will cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qfarm.errors import Failure
from qfarm.matrix import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """Plain data from which a worker rebuilds an evaluator."""

    eval_id: str
    name: str
    label: str
    options: Mapping[str, Any]
    protocol: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One attempt of one cell, as handed to a worker."""

    job: str
    cell: Cell
    evaluations: tuple[EvaluationSpec, ...]  # those that the store lacks, in the job's order
    store: str  # absolute path or URL
    attempt_id: str
    number: int  # 1 is the first try of this submission
    data: str | None  # folder of the data pack
    trust_remote_code: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended. Results are in the store already; this is what the driver needs to go on."""

    attempt_id: str
    cell_id: str
    failure: Failure | None  # None: done
    error: str | None  # one line
    seconds: float
    figures: tuple[tuple[str, float], ...] = ()  # headline value of each evaluation, by label
    linear_bits: float = 16.0
