"""What a worker fetches ahead: the next model's converted weights are there when it is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qfarm import cache
from qfarm.errors import ModelError
from qfarm.models import ahead, mapped
from qfarm.models.ahead import Ahead, fetch
from qfarm.models.mapped import CONVERTED
from tests.test_worker import Farm, make_job

JOB = """
models: [{model}]
methods: [rtn]
bits: [w4]
group_sizes: [32]
dtype: float32
run: [packed]
evaluate: [%s]
resources: {{gpus: 0}}
"""
PERPLEXITY = "perplexity: {{text: python-docs, length: 32, windows: 2}}"
SPEED = "speed: {{prompt: 4, new_tokens: 2, repeats: 1, warmup: 0}}"


def test_weights_in_another_dtype_are_converted_and_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(ahead, "_read", read.append)
    monkeypatch.setattr(mapped, "SMALL_BYTES", 0)
    fetch(str(tiny), "float32")
    assert read == [tiny / "model.safetensors"]
    fetch(str(tiny), "float16")
    [folder] = (entry for entry in (cache.root() / CONVERTED).iterdir() if entry.is_dir())
    assert read[1:] == [folder / "1.safetensors"]
    monkeypatch.setattr(ahead, "MOST_MEMORY", 0)
    fetch(str(tiny), "float16")
    assert len(read) == 2


def test_a_process_of_its_own_fetches_one_model_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the place of python waits until it may end, and leaves its arguments."""
    gate, log, program = tmp_path / "gate", tmp_path / "log", tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nwhile [ ! -e {gate} ]; do sleep 0.01; done\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    fetching = Ahead()
    fetching.start("a", "float16")
    fetching.start("b", "float16")
    assert fetching.failure() is None  # it is still at work
    gate.touch()
    fetching.wait()
    assert fetching.failure() is None
    fetching.start("a", "float16")  # the latest
    fetching.start("b", "bfloat16")
    fetching.wait()
    assert log.read_text().splitlines() == ["-m qfarm.models.ahead a float16", "-m qfarm.models.ahead b bfloat16"]


def test_what_cannot_be_fetched_is_said_once(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ModelError):
        fetch(missing, "float16")
    fetching = Ahead()
    fetching.start(missing, "float16")
    fetching.wait()
    said = fetching.failure()
    assert said is not None and said.startswith(f"{missing} could not be fetched ahead: ") and "nothing" in said
    assert fetching.failure() is None


@pytest.mark.parametrize(("evaluate", "expected"), [(PERPLEXITY, ["start"]), (f"{PERPLEXITY}, {SPEED}", ["wait"])])
def test_a_cell_fetches_the_model_that_comes_next_unless_it_is_timed(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, evaluate: str, expected: list[str]
) -> None:
    farm = Farm(tmp_path / "store", make_job(tiny, JOB % evaluate))
    called = []
    monkeypatch.setattr(farm.session.ahead, "start", lambda *given: called.append("start"))
    monkeypatch.setattr(farm.session.ahead, "wait", lambda: called.append("wait"))
    monkeypatch.setattr(farm.session.ahead, "failure", lambda: "x could not be fetched ahead: why")
    assert farm.run(0, ahead=("next", "bfloat16")).failure is None
    assert called == expected
    assert "x could not be fetched ahead: why" in farm.table("attempts")[0]["notes"]
