"""Doctor: what stops everything is a fault, what only some jobs need is a dash with the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qfarm import doctor
from qfarm.doctor import Finding, examine
from tests.test_cli import Run
from tests.test_cli import run as run


def found(name: str, data: str | None = None, **options: bool) -> Finding:
    (one,) = (finding for finding in examine(data, **options) if finding.name == name)
    return one


def test_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    states = {finding.name: finding.state for finding in examine(None)}
    assert all(states[name] == "ok" for name in ("python", "torch", "transformers", "ray", "lm-eval", "disk"))
    assert torch.__version__ in found("torch").text
    assert found("hub").text == "not asked (--hub)"


def test_a_package_that_is_missing_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = doctor.importlib.util.find_spec
    gone = ("ray", "deepspeed", "aiohttp_cors")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in gone else usual(name))
    assert found("ray").state == "fault"
    assert found("deepspeed").state == "missing" and "pip install 'qfarm[deepspeed]'" in found("deepspeed").text
    assert "pip install 'qfarm[cluster]'" in found("ray[default]").text


def test_a_torch_that_does_not_import_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = doctor.importlib.import_module

    def broken(name: str) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file\nmore")
        return usual(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert found("torch").text == "cannot be imported: OSError: libcudart.so.12: cannot open shared object file"
    assert found("torch").state == "fault"


def test_a_gpu_that_is_hidden_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides them" in found("gpu").text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    class Device:
        name, total_memory = "Card", 80_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    assert found("gpu 0").text == "Card, 80 GB"


def test_a_pack_is_looked_into(tmp_path: Path) -> None:
    assert found("data pack", str(tmp_path)).state == "fault"
    (tmp_path / "pack.yaml").write_text("datasets: [{path: a/b, name: null, splits: {test: x.jsonl}}]\n")
    assert "x.jsonl is missing" in found("data pack", str(tmp_path)).text
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert found("data pack", str(tmp_path)).text.endswith(": 1 data sets")


def test_the_hub_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(doctor.socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in found("hub", hub=True).text
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "does not answer (timed out)" in found("hub", hub=True).text


def test_little_space_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int = 10
        used: int = 9
        free: int = 1

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    monkeypatch.setattr(doctor, "available_host_bytes", lambda: 1000)
    assert found("disk").state == found("memory").state == "missing"
    monkeypatch.setattr(doctor, "available_host_bytes", lambda: None)
    assert "not known" in found("memory").text


def test_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("doctor")
    assert (ran.code, ran.err) == (0, "") and max(map(len, ran.out.splitlines())) <= 80
    assert {"name", "state", "text"} == set(json.loads(run("doctor", "--format", "json").out)[0])
    monkeypatch.setattr(doctor, "_python", lambda: iter([Finding(name="python", state="fault", text="3.9")]))
    ran = run("doctor")
    assert ran.code == 1 and ran.out.splitlines()[1].split() == ["FAULT", "python", "3.9"]
