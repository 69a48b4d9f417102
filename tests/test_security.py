"""What foreign input must not be able to do. Rules that are tested elsewhere are named here.

Names that leave the store: test_store, test_pack, test_generation. YAML aliases, depth and size: test_job. HTML and
terminal sequences in errors and tracebacks: test_report_html, test_report_formats, test_console. Credentials in store
URLs: test_objects. Pickled weights: test_reference.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from qfarm import environment
from qfarm.bench.simulated import simulated_cell
from qfarm.board import Board, CellWork, Place
from qfarm.errors import Failure, JobError
from qfarm.job import parse_job
from qfarm.record import AttemptRow
from tests.job_example import changed
from tests.test_layout import ROOT

SOURCES = sorted(path for folder in ("qfarm", "methods", "kernels") for path in (ROOT / folder).rglob("*.py"))
# Calls that run what a file or a user says.
FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "os.system", "os.popen", "yaml.unsafe_load"}
SECRETS = {
    "HF_TOKEN": "hf_sEcReT",
    "AWS_SECRET_ACCESS_KEY": "aWsSeCrEt",
    "AWS_SESSION_TOKEN": "sEsSiOn",
    "RAY_AUTH_TOKEN": "rAyToKeN",
}


def dangers(text: str) -> list[str]:
    """Calls and arguments in a source that would run foreign code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {one.arg: ast.unparse(one.value) for one in node.keywords}
            if name in FORBIDDEN or arguments.get("shell") == "True" or arguments.get("trust_remote_code") == "True":
                found.append(ast.unparse(node))
            if name == "yaml.load" and not arguments.get("Loader", "").startswith(("yaml.SafeLoader", "_loader(")):
                found.append(ast.unparse(node))
    return found


def test_no_source_runs_what_a_file_says() -> None:
    assert len(SOURCES) > 100
    assert {path.name: found for path in SOURCES if (found := dangers(path.read_text()))} == {}


def test_the_check_sees_what_it_should() -> None:
    text = (
        "eval(x); torch.load(p); run(c, shell=True); load(n, trust_remote_code=True); yaml.load(t, Loader=yaml.Loader)"
    )
    assert len(dangers(text)) == 5 and dangers("yaml.load(t, Loader=yaml.SafeLoader); model.eval()") == []


def test_the_loader_of_task_files_is_a_safe_one(tmp_path: Path) -> None:
    import yaml

    from qfarm.tasks.registry import _loader

    assert issubclass(_loader(tmp_path), yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.system [true]", Loader=_loader(tmp_path))


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", ".hidden", "a b", "a\x1b[31m", "x" * 101, ""])
def test_a_jobs_name_cannot_be_a_path(name: str) -> None:
    with pytest.raises(JobError):
        parse_job(changed(name=json.dumps(name)), "job.yaml")


def test_no_secret_of_the_environment_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    environment.provenance.cache_clear()
    rows: list[AttemptRow] = []

    class Kept:
        def publish_attempt(self, attempt: AttemptRow, /) -> bool:
            rows.append(attempt)
            return True

    work = [CellWork(cell=simulated_cell(0, "m"), evaluations=())]
    board = Board(work, lambda event: None, Kept(), job_name="j", store_location="/s", retries=0, data=None)
    task = board.next_task("w")
    assert task is not None
    board.lost("w", task, Place(worker="pid 1", node="n"), Failure.WORKER_DIED, "gone", None)
    written = json.dumps(environment.provenance()) + repr(rows) + repr(task)
    assert rows and not [value for value in SECRETS.values() if value in written]
