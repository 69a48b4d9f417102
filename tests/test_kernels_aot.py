"""Compiled kernels keep their budgets, and budgets catch what they are for. No GPU: compilers alone, in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def compiled(targets: str, only: str, folder: Path) -> list[dict[str, Any]]:
    ran = run(
        "qfarm.kernels.aot", "--targets", targets, "--only", only, "--json", str(folder / "facts.json"), cache=folder
    )
    assert ran.returncode in (0, 1), ran.stderr
    rows: list[dict[str, Any]] = json.loads((folder / "facts.json").read_text())
    return rows


@pytest.mark.slow
def test_a_launch_keeps_its_budget(tmp_path: Path) -> None:
    [row] = compiled("sm_80", "cq_apply 8x256", tmp_path)
    assert row["breaches"] == []
    assert row["registers"] > 0 and row["instructions"] > 50 and row["names"]["EXIT"] >= 1


@pytest.mark.slow
def test_budgets_catch_spills_and_narrow_loads(tmp_path: Path) -> None:
    ran = run("tests.planted_kernels", cache=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["sound"] == []
    assert any(breach.startswith("no LDG") for breach in found["narrow"])
    assert any(breach.endswith(" spills") for breach in found["spill"])


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    ran = run("qfarm.kernels.aot", "--targets", "sm_70", cache=tmp_path)
    assert ran.returncode == 2 and 'unknown "sm_70": expected some of sm_80' in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_launch_keeps_its_budget(target: str, tmp_path: Path) -> None:
    rows = compiled(target, "", tmp_path)
    assert [f"{row['launch']}: {breach}" for row in rows for breach in row["breaches"]] == []
