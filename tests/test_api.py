"""The Python interface: a job in, tables out, and nothing heavy on import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qfarm
from qfarm.errors import JobError, StoreError
from qfarm.events import Event, JobEnded
from qfarm.record import TABLES

JOB: dict[str, Any] = {
    "methods": ["rtn"],
    "bits": ["w4", "w8"],
    "group_sizes": [16],
    "evaluate": [{"perplexity": {"text": "python-docs", "length": 32, "windows": 8}}],
    "resources": {"gpus": 0},
}


@pytest.fixture
def job(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return {**JOB, "models": [str(tiny)], "store": "out"}


def test_a_job_in_and_tables_out(job: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Event] = []
    results = qfarm.run(job, watch=seen.append)
    assert results.location == str(tmp_path / "out")
    (ended,) = (event for event in seen if isinstance(event, JobEnded))
    assert ended.finished == 3

    table = results.table("cells", columns=["cell_id", "linear_bits"])
    frame = results.frame("cells")
    assert table.column("linear_bits").to_pylist() == list(frame["linear_bits"]) and len(frame) == 3
    assert all(len(results.frame(name)) == len(results.table(name)) for name in TABLES)
    report = results.report()
    assert sorted(report["scheme"]) == ["w16", "w4", "w8"] and report["perplexity"].notna().all()
    assert set(report["cell_id"]) == set(frame["cell_id"])

    # What is there is not run again, and the store can be opened by itself.
    seen.clear()
    assert qfarm.run(job, watch=seen.append).frame("attempts").equals(results.frame("attempts"))
    assert seen == [] and repr(qfarm.load_store("out")) == repr(results)


def test_one_cell_of_a_job(job: dict[str, Any]) -> None:
    assert list(qfarm.run(job, only="baseline w16").frame("cells")["recipe"]) == ["baseline"]


def test_a_cell_that_fails_is_warned_of(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no good")

    monkeypatch.setattr("qfarm.worker.quantize_cell", broken)
    with pytest.warns(UserWarning, match="1 of 1 cells failed for good: see the attempts table"):
        results = qfarm.run({**job, "retries": 0}, only="baseline w16")
    assert list(results.frame("attempts")["outcome"]) == ["bug"]


def test_bad_input(job: dict[str, Any]) -> None:
    with pytest.raises(JobError, match='^job: method: unknown key "method", did you mean "methods"'):
        qfarm.run({**job, "method": ["rtn"]})
    with pytest.raises(JobError, match="cannot read the job file"):
        qfarm.run("absent.yaml")
    with pytest.raises(StoreError, match="no such store"):
        qfarm.load_store("absent")
    assert not Path("out").exists()


def test_the_import_is_light() -> None:
    code = "import sys, qfarm; print({'torch', 'ray', 'pandas', 'pyarrow', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_public_names() -> None:
    assert qfarm.__all__ == ["Results", "__version__", "load_store", "run"]
