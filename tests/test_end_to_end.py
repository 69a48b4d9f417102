"""The farm as a user runs it: real processes, real Ray, killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qfarm.store import Store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 600  # for a condition that must come true; failing earlier would make a slow machine a failure

JOB = """
name: killed
models: [{model}]
methods: [rtn, gptq]
bits: [w4, w3]
group_sizes: [16, 32]
dtype: float32
calibration: {{text: python-docs, samples: 8, length: 128}}
evaluate: [perplexity: {{text: python-docs, length: 128}}]
resources: {{gpus: 0}}
store: {store}
"""


class Run:
    """`qfarm submit` in a process group of its own."""

    def __init__(self, job: Path, cache: Path, *options: str) -> None:
        self.cache = cache
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qfarm", "submit", str(job), *options],
            cwd=job.parent,
            env=environment | {"QFARM_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def workers(self) -> list[int]:
        """Ray workers of this run, told from others by the cache folder in their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
                mine = f"QFARM_CACHE={self.cache}".encode() in (folder / "environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if mine and command.startswith(b"ray::Worker"):
                found.append(int(folder.name))
        return found

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            result = condition()
            if result:
                return result
            if self.process.poll() is not None:
                pytest.fail(f"qfarm ended early:\n{self.process.stdout.read() if self.process.stdout else ''}")
            time.sleep(0.02)
        pytest.fail("the condition never came true")


@pytest.fixture
def submit(tmp_path: Path, tiny: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs on one store per name, all sharing a cache; leaves no process behind."""
    runs: list[Run] = []

    def start(store: str, *options: str) -> Run:
        job = tmp_path / f"{store}.yaml"
        job.write_text(JOB.format(model=tiny, store=tmp_path / store))
        runs.append(Run(job, tmp_path / "cache", *options))
        return runs[-1]

    yield start
    for run in runs:
        for pid in [*run.workers(), run.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        run.process.wait()


def results(folder: Path) -> list[tuple[Any, ...]]:
    """Everything that must not depend on what happened on the way."""
    store = Store.open(folder)
    assert store.check().faults == []
    documents = [
        (row["cell_id"], row["eval_id"], row["window"], row["document"], row["loss"], row["kl"], row["correct"])
        for row in store.read("documents").to_pylist()
    ]
    layers = [
        (row["cell_id"], row["layer"], row["role"], row["stored_bytes"], row["weight_error"], row["output_error"])
        for row in store.read("layers").to_pylist()
    ]
    return sorted(documents, key=str) + sorted(layers, key=str)


def finished(folder: Path) -> list[str]:
    if not (folder / "qfarm-store.json").exists():
        return []
    return sorted(cell for cell, _ in Store.open(folder).finished_evaluations())


def test_killed_driver_and_killed_worker(submit: Callable[..., Run], tmp_path: Path) -> None:
    code, output = submit("undisturbed").finish()
    assert code == 0, output
    expected = results(tmp_path / "undisturbed")
    assert len(finished(tmp_path / "undisturbed")) == 9

    # kill -9 of the driver half-way: no finished cell runs twice, and the results are the same bits.
    run = submit("driver")
    before = run.wait_until(lambda: len(finished(tmp_path / "driver")) >= 3 and finished(tmp_path / "driver"))
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    again = submit("driver")
    code, output = again.finish()
    assert code == 0, output
    assert results(tmp_path / "driver") == expected
    attempts = Store.open(tmp_path / "driver").read("attempts").to_pylist()
    for cell in before:
        assert [row["outcome"] for row in attempts if row["cell_id"] == cell] == ["ok"]

    # Submitting once more runs nothing.
    code, output = submit("driver").finish()
    assert code == 0 and len(Store.open(tmp_path / "driver").read("attempts")) == len(attempts), output

    # kill -9 of a worker in the middle of a cell: retried, and the job ends well.
    run = submit("worker")
    run.wait_until(lambda: finished(tmp_path / "worker"))
    for pid in run.workers():
        os.kill(pid, signal.SIGKILL)
    code, output = run.finish()
    assert code == 0, output
    assert results(tmp_path / "worker") == expected
    outcomes = [row["outcome"] for row in Store.open(tmp_path / "worker").read("attempts").to_pylist()]
    assert outcomes.count("ok") == 9 and "worker_died" in outcomes


def test_interrupt_stops_cleanly_and_says_how_to_resume(submit: Callable[..., Run], tmp_path: Path) -> None:
    run = submit("interrupted")
    run.wait_until(lambda: finished(tmp_path / "interrupted"))
    run.process.send_signal(signal.SIGINT)
    code, output = run.finish()
    assert code == 130 and "run the same command again" in output, output
    # A worker that was busy when it was killed may take a few seconds to go.
    deadline = time.monotonic() + PATIENCE_S
    while run.workers():
        assert time.monotonic() < deadline, "workers outlived the interrupted run"
        time.sleep(0.05)


def test_local_mode_gives_the_same_bits(submit: Callable[..., Run], tmp_path: Path) -> None:
    """One process, no Ray: the way to debug a cell must not change its result."""
    code, output = submit("ray").finish()
    assert code == 0, output
    code, output = submit("local", "--local").finish()
    assert code == 0, output
    assert results(tmp_path / "local") == results(tmp_path / "ray")


def test_quickstart(tmp_path: Path) -> None:
    """README's first command, on the real model from the package index."""
    (tmp_path / "jobs").mkdir()
    job = tmp_path / "jobs" / "quickstart.yaml"
    job.write_text((ROOT / "jobs" / "quickstart.yaml").read_text())
    run = Run(job, tmp_path / "cache")
    code, output = run.finish()
    assert code == 0, output
    store = Store.open(job.parent / "results" / "quickstart")
    cells = {row["cell_id"]: (row["recipe"], row["scheme"]) for row in store.read("cells").to_pylist()}
    rows = [row for row in store.read("metrics").to_pylist() if row["metric"] == "perplexity"]
    perplexity = {cells[row["cell_id"]]: row["value"] for row in rows}
    assert perplexity["baseline", "w16"] < perplexity["gptq", "w4"] < perplexity["rtn", "w4"]
    assert perplexity["gptq", "w3"] < perplexity["rtn", "w3"]
    assert "PPL" in output and "gptq" in output
