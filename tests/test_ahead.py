"""What a worker fetches ahead: the next model's converted weights are there when it is loaded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from qfarm import cache
from qfarm.models import ahead, mapped
from qfarm.models.ahead import Ahead
from qfarm.models.mapped import CONVERTED
from tests.test_worker import Farm, make_job


@pytest.fixture(autouse=True)
def _convert_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "SMALL_BYTES", 0)


def converted() -> list[Path]:
    folder = cache.root() / CONVERTED
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def test_weights_in_another_dtype_are_converted_and_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(ahead, "_read", read.append)
    fetching = Ahead()
    fetching.start(str(tiny), "float16")
    fetching.wait()
    [folder] = converted()
    assert read == [folder / "1.safetensors"]
    fetching.start(str(tiny), "float16")  # the latest
    fetching.wait()
    assert len(read) == 1
    monkeypatch.setattr(ahead, "MOST_MEMORY", 0)
    fetching.start(str(tiny), "bfloat16")
    fetching.wait()
    assert len(converted()) == 2 and len(read) == 1


def test_one_model_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on, fetched = threading.Event(), threading.Event(), []

    def fetch(reference: str, dtype: str) -> None:
        fetched.append(dtype)
        began.set()
        go_on.wait(30)

    monkeypatch.setattr(ahead, "_fetch", fetch)
    fetching = Ahead()
    fetching.start(str(tiny), "float16")
    assert began.wait(30)
    fetching.start(str(tiny), "bfloat16")
    go_on.set()
    fetching.wait()
    assert fetched == ["float16"]


def test_what_cannot_be_fetched_is_left_to_the_load(tmp_path: Path) -> None:
    fetching = Ahead()
    fetching.start(str(tmp_path / "nothing"), "float16")
    fetching.wait()
    assert not converted()


def test_a_cell_fetches_the_model_that_comes_next(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    farm = Farm(tmp_path / "store", make_job(tiny_models["llama"], AHEAD))
    assert farm.run(0, ahead=(str(tiny_models["qwen2"]), "bfloat16")).failure is None
    farm.session.ahead.wait()
    assert len([folder for folder in converted() if "qwen2" in (folder / "config.json").read_text()]) == 1
    assert farm.session.cell.model == str(tiny_models["llama"])


AHEAD = """
models: [{model}]
methods: [rtn]
bits: [w4]
group_sizes: [32]
dtype: float32
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 2}}]
resources: {{gpus: 0}}
"""
