"""The benchmark of the farm: what it measures is what it says, and its workloads are whole."""

from __future__ import annotations

import json

import pytest

from qfarm import cli, driver
from qfarm.bench import farm as bench
from qfarm.bench.show import render_figures
from qfarm.store import Store


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "farm", *arguments])
    return int(ended.value.code or 0)


def test_simulated_and_stored_farms_are_measured(tmp_path, capsys):
    store = str(tmp_path / "kept")
    sizes = ["--cells", "3000", "--workers", "20", "--store-cells", "6", "--documents", "12", "--store", store]
    run_cli("--parts", "simulated,store", *sizes, "--format", "json")
    found = json.loads(capsys.readouterr().out)["figures"]
    by_name = {(one["part"], one["what"].rpartition(": ")[2], one["unit"]): one["value"] for one in found}
    assert 1.0 <= by_name["simulated", "makespan / lower bound", ""] < 1.2
    assert by_name["simulated", "finished", "cells"] > 2990
    assert by_name["simulated", "attempts", "attempts"] > 3000 and by_name["store", "append", "ms a cell"] > 0
    kept = Store.open(store)
    assert kept.read("cells").num_rows == 6 and kept.read("documents").num_rows == 6 * 12
    assert kept.check() == ([], []) and list((tmp_path / "kept" / "generations").glob("*.json"))
    assert run_cli("--parts", "store", "--store", store) == 2
    assert "holds a store; the benchmark makes a new one" in capsys.readouterr().err


def test_a_plan_is_measured(capsys):
    assert run_cli("--parts", "plan", "--cells", "1000") == 0
    assert "a plan of 1,010 cells" in capsys.readouterr().out


def test_cells_that_do_nothing_are_handed_out(monkeypatch):
    monkeypatch.setattr(driver, "run", driver.run_local)  # without Ray, so the overhead is that of the books alone
    figures = bench.run(bench.Settings(parts=("ray",), ray_cells=5, ray_sleep_s=0.01), lambda text: None)
    assert [one.unit for one in figures] == ["processor ms a cell", "ms a cell", "percent"]
    assert figures[1].value >= 10.0  # each took 10 ms at least


def test_a_goal_that_is_missed_is_said():
    figures = [bench.Figure(part="ray", what="x", value=31.0, unit="ms", goal=30.0)]
    assert "<= 30 missed" in render_figures(figures, 100)
    assert not bench.Figure(part="ray", what="x", value=30.0, unit="ms", goal=30.0).missed


def test_an_unknown_part_is_refused(capsys):
    assert run_cli("--parts", "stor") == 2
    assert '--parts: unknown part "stor", did you mean "store"?' in capsys.readouterr().err
