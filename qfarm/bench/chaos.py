"""Chaos: forty cells on a cluster whose workers and nodes are killed throughout, held against an undisturbed run.

Both are real runs (`qfarm.bench.chaos_run`) of two small random models, of the same job, on Ray with GPUs that are
none. The undisturbed run is made once for all seeds. Afterwards every number must be there once and be the same to the
last bit, every blow must be told by an attempt, every failed attempt be the work of a blow, every file that cleaning
removes from the store be a struck attempt's, and the store be sound then.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qfarm import cluster
from qfarm.bench.chaos_run import HEALTH_CHECKS, KILLS, KINDS, Kill
from qfarm.bench.random_model import save_random
from qfarm.errors import Failure, QfarmError
from qfarm.store import Store

MODELS = 2
CELLS = 40  # besides a baseline per model
# What an attempt may say that was struck so; "ok" had been published when the blow fell.
OUTCOMES = {
    "killed": {Failure.WORKER_DIED, "ok"},
    "stopped": {Failure.HUNG, "ok"},
    # A worker may die of its raylet's death before the cluster has noticed that the node is gone.
    "node": {Failure.NODE_DIED, Failure.WORKER_DIED, "ok"},
    "drained": {Failure.PREEMPTED, Failure.WORKER_DIED, "ok"},
}
NOT_NUMBERS = {"attempt_id", "created"}  # columns that no two runs share
TABLES = ("cells", "layers", "metrics", "documents")
TIMEOUT_S = 1800.0
JOB = """
name: chaos
models: [{models}]
methods: [rtn, gptq, hqq, sinq, comq]
bits: [w4, w3]
group_sizes: [32, -1]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 128}}
evaluate: [perplexity: {{text: python-docs, length: 128, windows: 6}}]
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one disturbed run came to. What follows the seconds must be 0."""

    seed: int
    kills: int
    missed: int  # blows that were planned and did not fall, because the job was over or the victim quicker
    attempts: int
    seconds: float
    missing: int  # numbers of the undisturbed run that are not there, or not once
    different: int  # numbers that differ
    untold: int  # attempts that were struck and have no row that says so
    unexplained: int  # failed attempts that nothing has struck
    strays: int  # files that no manifest names and no struck attempt has left
    faults: int  # of the store
    orphans: int  # files that no manifest names, after cleaning
    details: tuple[str, ...]  # what is counted from `untold` on


def run(seeds: Sequence[int], folder: Path | None = None) -> list[Verdict]:
    """One disturbed run per seed. Raises QfarmError when a run does not finish its cells."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="qfarm-chaos-") as name:
            return run(seeds, Path(name))
    models = [save_random(folder / f"model{number}", seed=number) for number in range(MODELS)]
    job = folder / "job.yaml"
    job.write_text(JOB.format(models=", ".join(map(str, models))))
    calm, _ = _run(job, folder / "calm", None)
    return [judge(seed, calm, *_run(job, folder / f"seed{seed}", seed)) for seed in seeds]


def _run(job: Path, folder: Path, seed: int | None) -> tuple[Store, dict[str, Any]]:
    store, notes = folder / "store", folder / "notes"
    words = [sys.executable, "-m", "qfarm.bench.chaos_run", str(job), str(store), str(notes)]
    environ = {**os.environ, **cluster.local_environment(), **HEALTH_CHECKS}
    environ.pop("RAY_ADDRESS", None)
    what = "the undisturbed run" if seed is None else f"seed {seed}"
    try:
        ended = subprocess.run(
            [*words, "" if seed is None else str(seed)],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise QfarmError(f"chaos: {what} was not over after {TIMEOUT_S:g} s") from None
    if ended.returncode:
        tail = " ".join(ended.stderr.split())[-600:]
        raise QfarmError(f"chaos: {what} did not finish its cells (exit status {ended.returncode}): {tail}")
    return Store.open(store), json.loads((notes / KILLS).read_text())


def judge(seed: int, calm: Store, store: Store, told: dict[str, Any]) -> Verdict:
    """Hold a disturbed run's store against an undisturbed one's. Cleans it of leftovers."""
    kills = [
        Kill(kind=kill["kind"], attempts=tuple(kill["attempts"]), pids=tuple(kill["pids"])) for kill in told["kills"]
    ]
    rows = store.read("attempts", columns=["attempt_id", "cell_id", "outcome", "worker", "error"]).to_pylist()
    outcomes = {row["attempt_id"]: row["outcome"] for row in rows}
    struck = {attempt: kill.kind for kill in kills for attempt in kill.attempts}
    ended = {f"pid {pid}": kill.kind for kill in kills for pid in kill.pids}
    untold = [attempt for attempt, kind in struck.items() if outcomes.get(attempt) not in OUTCOMES[kind]]
    failed = [row for row in rows if row["outcome"] != "ok"]
    unseen = {row["attempt_id"] for row in failed if row["outcome"] in OUTCOMES.get(ended.get(row["worker"], ""), ())}
    done = {row["cell_id"] for row in rows if row["outcome"] == "ok"}
    # The farm itself ends the slower of two copies, once the other is done.
    unseen |= {row["attempt_id"] for row in failed if row["outcome"] == Failure.SUPERSEDED and row["cell_id"] in done}
    unexplained = [row for row in failed if row["attempt_id"] not in {*struck, *unseen}]
    missing = different = 0
    for table in TABLES:
        expected, found = _numbers(calm, table), _numbers(store, table)
        gone, new = (expected - found).total(), (found - expected).total()
        different += min(gone, new)  # a number that differs is both
        missing += abs(gone - new)
    # The name of a file of the store holds the attempt that wrote it.
    strays = [path for path in store.clean(0.0) if not any(attempt in path for attempt in {*struck, *unseen})]
    faults, leftovers = store.check()
    return Verdict(
        seed=seed,
        kills=len(kills),
        missed=sum(KINDS.values()) - len(kills),
        attempts=len(rows),
        seconds=told["seconds"],
        missing=missing,
        different=different,
        untold=len(untold),
        unexplained=len(unexplained),
        strays=len(strays),
        faults=len(faults),
        orphans=len(leftovers),
        details=(
            *(f"{attempt}: {struck[attempt]}, yet its row says {outcomes.get(attempt)}" for attempt in untold),
            *("{attempt_id} of {worker}: {outcome}: {error}".format_map(row) for row in unexplained),
            *(f"{path}: of no struck attempt" for path in strays),
            *faults,
            *leftovers,
        ),
    )


def _numbers(store: Store, table: str) -> Counter[str]:
    """The rows of a table without what no two runs share, and how often each is there."""
    rows = store.read(table)
    kept = rows.drop_columns([name for name in rows.column_names if name in NOT_NUMBERS])
    return Counter(json.dumps(row, sort_keys=True, default=str) for row in kept.to_pylist())
