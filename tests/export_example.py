"""A store of small cells that can be exported, made once for all tests that export."""

from __future__ import annotations

from pathlib import Path

import pytest

from qfarm.export.stored import StoredCell, stored_cell
from qfarm.plan import Task, make_plan
from qfarm.store import Store
from qfarm.worker import Session, run_cell
from tests.conftest import save_tiny
from tests.test_worker import make_job

JOB = """
models: [{model}]
methods: [rtn]
bits: [w8a8]
symmetric: true
calibration: {{text: python-docs, samples: 2, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 8, divergence: false}}]
include:
  - {{methods: [gptq], bits: [w4, w4/8], group_sizes: [16]}}
  - {{methods: [rtn], bits: [w4kv4], group_sizes: [16]}}
  - {{methods: [gptq: {{act_order: true}}, gptq+qera], bits: [w4], group_sizes: [16]}}
resources: {{gpus: 0}}
"""
ASYMMETRIC = (
    JOB[: JOB.index("include:")].replace("symmetric: true\n", "").replace("[w8a8]", "[w4]")
    + """
resources: {{gpus: 0}}
"""
)


def filled_store(folder: Path, model: Path, *texts: str) -> Store:
    """A store with every cell of these jobs."""
    store, session = Store.open(folder, create=True), Session(None)
    for text in texts:
        for number, planned in enumerate(make_plan(make_job(model, text), store, None).cells):
            task = Task(
                job="job",
                cell=planned.cell,
                evaluations=planned.missing,
                store=store.location,
                attempt_id=f"attempt{number}",
                number=1,
                data=None,
            )
            if planned.missing:
                assert run_cell(task, session, lambda *_: None).failure is None
    return store


@pytest.fixture(scope="session")
def export_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Cells of a tiny Llama with a tied head, whose embedding, norms and head stay in bfloat16."""
    model = save_tiny(tmp_path_factory.mktemp("exported"), "llama")
    return filled_store(tmp_path_factory.mktemp("store") / "store", model, JOB, ASYMMETRIC)


def cell(store: Store, label: str) -> StoredCell:
    return stored_cell(store, label)


def say(_: str) -> None:
    """What an export says on its way is of no interest to most tests."""
