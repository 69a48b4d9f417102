"""Margins: read from jobs and from the command line, refused with one line, part of no identity."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from qfarm import cli
from qfarm.errors import InvalidInput, JobError
from qfarm.job import parse_job
from qfarm.margin import read_option
from qfarm.store import Store
from tests.job_example import JOB, changed, ids


def test_margins_are_read_and_change_no_identity():
    margin = "\nmargin: {perplexity: 1 %, accuracy: 1 point}\n"
    found = parse_job(JOB + margin, "j.yaml").margins
    assert found["perplexity"].amount == pytest.approx(math.log(1.01)) and found["perplexity"].text == "1 %"
    assert (found["accuracy"].amount, found["accuracy"].text) == (0.01, "1 point")
    assert parse_job(JOB, "j.yaml").margins == {}
    assert ids(JOB + margin) == ids(JOB)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{perplexity: 1 point}", "margin.perplexity: a margin of perplexity is written like '1 %', got '1 point'"),
        ("{accuracy: 1 %}", "margin.accuracy: a margin of accuracy is written like '1 point', got '1 %'"),
        ("{perplexity: 0 %}", "margin.perplexity: a margin lies between 0 and 100 %, got '0 %'"),
        ("{perplexity: 1}", "margin.perplexity: a margin of perplexity is written like '1 %', got 1"),
        ("{perplexty: 1 %}", 'margin.perplexty: unknown key "perplexty", did you mean "perplexity"?'),
        ("1 %", "margin: a mapping with the keys perplexity, accuracy is needed, got '1 %'"),
    ],
)
def test_margins_that_say_nothing_are_refused(given, message):
    with pytest.raises(JobError) as error:
        parse_job(f"{JOB}\nmargin: {given}\n", "j.yaml")
    assert message in str(error.value) and str(error.value).startswith("j.yaml: line ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity", "--margin is written like"),
        ("perplexity=1%,perplexity=2%", "--margin names perplexity twice"),
        ("ppl=1%", 'no margin for "ppl"'),
    ],
)
def test_margins_of_the_command_line(text, message):
    both = read_option("perplexity=1%, accuracy = 0.5 points")
    assert {measure: margin.text for measure, margin in both.items()} == {
        "perplexity": "1 %",
        "accuracy": "0.5 points",
    }
    with pytest.raises(InvalidInput, match=message):
        read_option(text)


def test_a_jobs_margin_reaches_the_provenance_and_the_report(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY"):  # what the command sets must not outlive the test
        monkeypatch.setenv(name, os.environ.get(name, ""))
    evaluate = "[{perplexity: {text: python-docs, length: 32, windows: 20}}]"
    job = tmp_path / "margin.yaml"
    job.write_text(
        changed(
            **{"models": f"['{tiny}']", "methods": "[rtn]", "resources": "{gpus: 0}", "evaluate": evaluate},
            **{"store": str(tmp_path / "out"), "margin": "{perplexity: 30 %}"},
        )
    )
    said = []
    for arguments in (["submit", str(job), "--local"], ["report", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    rows = Store.open(str(tmp_path / "out")).read("attempts").to_pylist()
    assert [json.loads(row["provenance"])["margin"] for row in rows] == [{"perplexity": "30 %"}] * 2
    assert all("margin 30 %: not tested below 48 clusters" in text for text in said)
