"""The trace of a submission: stages in their order on the lane of their worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qfarm.report.timeline import chrome_trace
from tests.test_cli import Run
from tests.test_cli import run as run


def row(worker: str, node: str, second: int, stages: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "attempt_id": f"{worker} {second}",
        "cell_id": "c",
        "label": "rtn w4",
        "model": "m",
        "number": 1,
        "outcome": "ok",
        "worker": worker,
        "node": node,
        "started": f"2026-11-27T10:00:{second:02d}.000+00:00",
        "wall_s": sum(stages.values()) + 0.5,
        "stages": json.dumps(stages),
        **changes,
    }


def test_a_trace_by_hand() -> None:
    """Two workers of one node and one of another; the first began last."""
    rows = [
        row("pid 1", "a", 7, {"load": 1.0, "quantize": 2.0}),
        row("pid 2", "a", 5, {"load": 0.25}),
        row("pid 1", "b", 6, {}, outcome="oom"),
    ]
    events = chrome_trace(rows)["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {(1, None): "a", (2, None): "b", (1, 1): "pid 2", (2, 2): "pid 1", (1, 3): "pid 1"}
    spans = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        (1, 1, "rtn w4", 0.0, 0.75e6),
        (1, 1, "load", 0.0, 0.25e6),
        (2, 2, "rtn w4", 1e6, 0.5e6),
        (1, 3, "rtn w4", 2e6, 3.5e6),
        (1, 3, "load", 2e6, 1e6),
        (1, 3, "quantize", 3e6, 2e6),
    ]
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}


JOB = """
models: [{model}]
methods: [rtn]
bits: [w4]
dtype: float32
evaluate: [{{perplexity: {{text: python-docs, length: 32, windows: 2}}}}]
resources: {{gpus: 0}}
store: {store}
"""


def test_a_submission_writes_its_own(run: Run, tiny: Path, tmp_path: Path) -> None:
    job, out = tmp_path / "job.yaml", tmp_path / "out.json"
    job.write_text(JOB.format(model=tiny, store=tmp_path / "store"))
    submit = ("submit", str(job), "--local", "--trace")
    assert run(*submit, str(out)).code == 0
    names = [event["name"] for event in json.loads(out.read_text())["traceEvents"] if event["ph"] == "X"]
    assert names[:3] == ["baseline w16", "load", "prepare"] and names.count("quantize") == 2
    assert run(*submit, str(out)).code == 0
    assert json.loads(out.read_text())["traceEvents"] == []  # nothing ran
    refused = run(*submit, str(tmp_path / "no" / "out.json"))
    assert refused.code == 2 and "no such folder" in refused.err
    assert run("submit", str(job), "--trace", str(out), "--address", "http://127.0.0.1:1").code == 2
