"""The benchmark of memory: the model that it makes, what it holds against the bound, and a real cell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qfarm import cli
from qfarm.bench import memory as bench
from qfarm.bench.show import render_memory
from qfarm.models.architecture import parameter_counts

REPORT = bench.Report(
    settings=bench.Settings(),
    parameters=3_000_000_000,
    model=6 << 30,
    before=300 << 20,
    loaded=310 << 20,
    private=700 << 20,
    resident=6 << 30,
    needs={"model": 6 << 30, "block": 1 << 20},
    allowance=100 << 20,
    bound=800 << 20,
    seconds=12.0,
    stages={},
)


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "memory", *arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("parameters", [1e8, 3e9, 8e9])
def test_a_model_has_about_as_many_parameters_as_asked(parameters: float) -> None:
    config = {"model_type": "llama", **bench.shape(parameters)}
    assert sum(parameter_counts(config, "bench")) == pytest.approx(parameters, rel=0.12)
    assert config["hidden_size"] % config["num_attention_heads"] == 0


def test_a_bound_is_missed_by_what_is_allocated() -> None:
    assert not REPORT.missed
    assert dataclasses.replace(REPORT, private=REPORT.bound + 1).missed
    text = render_memory(REPORT, 100)
    assert "700" in text and "800" in text and "a bound is missed" not in text
    assert "a bound is missed" in render_memory(dataclasses.replace(REPORT, private=1 << 40), 100)


def test_a_method_without_a_bound_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--method", "gtpq") == 2
    assert 'no bound for "gtpq", did you mean "gptq"' in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_stays_below_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--parameters", "1e8", "--samples", "1", "--length", "128", "--windows", "1"]
    assert run_cli(*sizes, "--folder", str(tmp_path), "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    config = bench.shape(1e8)
    norms = config["hidden_size"] * (2 * config["num_hidden_layers"] + 1)  # which the arithmetic leaves out
    assert found["model"] == 2 * (found["parameters"] - norms)
    # The weights cost the process nothing until they are replaced; what loading imports takes some 60 MB.
    assert found["loaded"] - found["before"] < found["model"] / 2
    assert found["private"] > found["before"] + found["needs"]["quantized"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
