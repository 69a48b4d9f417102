"""The growth benchmark: exponents of known curves, and cells that are really run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qfarm import cli
from qfarm.bench import growth


@pytest.mark.parametrize(("power", "missed"), [(0.9, False), (1.1, False), (1.2, True), (2.0, True)])
def test_the_exponent_of_a_power_is_found(power: float, missed: bool):
    sizes = (3, 6, 12, 24)
    curve = growth.Curve(axis="cells", sizes=sizes, seconds=tuple(0.5 * size**power for size in sizes), bound=1)
    assert curve.exponent == pytest.approx(power) and curve.missed is missed
    assert curve.figure().missed is missed


def test_sizes_double_and_the_least_of_all_runs_counts(monkeypatch: pytest.MonkeyPatch):
    noise = iter([5.0, 0.0, 0.0, 0.0, 7.0, 0.0])
    monkeypatch.setattr(growth, "_axes", lambda folder, scale: {"squares": (10, 2, lambda size: size**2 + next(noise))})
    report = growth.run(growth.Settings(steps=3, repeats=2), lambda text: None)
    assert report.curves == (growth.Curve(axis="squares", sizes=(10, 20, 40), seconds=(100, 400, 1600), bound=2),)


def test_every_axis_can_be_measured(tmp_path: Path):
    axes = growth._axes(tmp_path, 0.02)
    assert list(axes) == ["plan", "scheduler", "workers", "layers", "hidden", "calibration", "windows"]
    assert all(axes[name][2](axes[name][0]) > 0 for name in ("scheduler", "workers", "layers", "windows"))


def test_an_exponent_that_is_too_large_ends_with_one(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(growth, "_axes", lambda folder, scale: {"cells": (1, 1, lambda size: float(size) ** 3)})
    words = ["bench", "growth", "--steps", "2", "--repeats", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 1 and "<= 1.15 missed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*words, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["curves"][0]["seconds"] == [1.0, 8.0]
