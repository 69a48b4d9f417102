"""The benchmark of a whole matrix: what is counted, what is forgotten, and that all ways end with the same numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from qfarm.bench import matrix as bench
from qfarm.bench import matrix_way
from qfarm.bench.processes import watched
from qfarm.cache import root
from qfarm.errors import InvalidInput, QfarmError
from qfarm.job import load_job, parse_job
from qfarm.models.reference import resolve
from qfarm.plan import make_plan
from qfarm.predictions import HIDDEN
from tests.test_cli import Run
from tests.test_cli import run as run

SMALL = {"samples": 2, "calibration_length": 16, "windows": 2, "length": 32, "dtype": "float32"}


def settings(model: Path, **changes: object) -> bench.Settings:
    known = {"model": str(model), "text": "python-docs", "calibration": "python-docs", **SMALL, **changes}
    return bench.Settings(**known)


# -- processes --------------------------------------------------------------------------------------------------------


def test_what_a_command_and_its_children_take() -> None:
    """A child that computes for a second and a half of processor time and holds 200 MB."""
    child = "import time; x = bytearray(200_000_000); t = time.process_time\nwhile t() < 1.5: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); sys.exit('the end')"
    usage = watched([sys.executable, "-c", parent], os.environ, look_s=0.02)
    assert usage.code == 1 and usage.tail == "the end"
    assert usage.cpu_s > 0.3 and usage.wall_s > 0.3 and usage.peak_bytes > 200e6


# -- the matrix -------------------------------------------------------------------------------------------------------


def test_the_matrix_is_the_stated_one(tiny: Path) -> None:
    job = parse_job(bench.job_text(settings(tiny)), "job.yaml")
    cells = make_plan(job, None, None).cells
    labels = [planned.cell.label for planned in cells]
    assert cells[0].cell.is_baseline and len(cells) == bench.CELLS + 1
    weights = [f"{name} {bits}{group}" for name in ("rtn", "gptq", "awq", "hqq", "sinq") for bits in ("w4", "w3")
               for group in ("", " g64")]  # fmt: skip
    inputs = ["rtn w8a8", "smoothquant w8a8", "smoothquant+gptq w8a8", "crossquant w8a8"]
    assert sorted(labels[1:]) == sorted(weights + inputs)


def test_operations_of_two_cells_by_hand(tiny: Path) -> None:
    """The baseline and one cell that reads calibration text."""
    chosen = settings(tiny)
    facts = resolve(str(tiny))
    plan = make_plan(parse_job(bench.job_text(chosen), "job.yaml"), None, None)
    by_gptq = [p for p in plan.cells if p.cell.label == "gptq w4"]
    config, shapes = facts.config, facts.linear_shapes
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    per_block = sum(m * n for m, n in shapes.values())

    def read(tokens: int, length: int) -> float:
        products = 2 * tokens * layers * per_block
        pairs = tokens * length / 2  # of a query and a key that it may see
        return products + layers * pairs * 2 * 2 * shapes["o"][1]  # scores and mixtures of values

    head = 2 * 64 * config["vocab_size"] * hidden
    evaluation = read(64, 32)
    calibration = read(32, 16) + layers * 32 * (2 * hidden**2 + shapes["o"][1] ** 2 + shapes["down"][1] ** 2)
    loop = layers * sum(m * n * n for m, n in shapes.values())
    plan = dataclasses.replace(plan, cells=(plan.cells[0], *by_gptq))
    assert bench.least_operations(plan, facts, chosen, 1) == pytest.approx(evaluation + head)
    both = evaluation + head + evaluation + 2 * head + loop + calibration
    assert bench.least_operations(plan, facts, chosen, 2) == pytest.approx(both)


def test_the_rate_is_of_this_machine(tiny: Path) -> None:
    assert 1e7 < bench.matrix_rate(resolve(str(tiny)), "float32") < 1e16


# -- ways -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QFARM_CACHE", str(tmp_path / "cache"))
    for name in (HIDDEN, "hashes"):
        (root() / name).mkdir(parents=True)
        (root() / name / "entry").write_text(name)
    return root()


def test_a_cache_without_baselines(own_cache: Path, tmp_path: Path) -> None:
    new = Path(matrix_way.cache_without_baselines(str(tmp_path)))
    assert [entry.name for entry in new.iterdir()] == ["hashes"]
    assert (new / "hashes" / "entry").read_text() == "hashes"
    assert (own_cache / HIDDEN / "entry").exists()


def run_here(way: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str) -> dict[str, float]:
    """One cell of the matrix in this process; what its line says."""
    monkeypatch.setenv(matrix_way.FOLDER, str(tmp_path))
    job, counts = tmp_path / "job.yaml", tmp_path / "counts"
    job.write_text(bench.job_text(settings(tiny)))
    monkeypatch.setenv(matrix_way.COUNTS, str(counts))
    [cell] = [p.cell.cell_id for p in make_plan(load_job(job), None, None).cells if p.cell.label == label]
    assert matrix_way.main(way, str(job), str(tmp_path / "store"), str(counts), cell) == 0
    line: dict[str, float] = json.loads(counts.read_text().splitlines()[-1])
    return line


def test_a_fresh_process_reads_the_baselines_text_again(
    tiny: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows of 32 tokens. The baseline reads one again without its last token, to know what rounding does; a cell
    reads its own and the baseline's, which nobody kept for it."""
    assert run_here("fresh", tiny, tmp_path, monkeypatch, "baseline w16")["tokens"] == 64 + 31
    assert run_here("fresh", tiny, tmp_path, monkeypatch, "rtn w4 g64")["tokens"] == 128
    calibrated = run_here("fresh", tiny, tmp_path, monkeypatch, "gptq w4 g64")["tokens"]
    assert calibrated >= 128 + 32
    assert not list((own_cache / HIDDEN).glob("*.safetensors"))


@pytest.mark.slow
def test_all_ways_end_with_the_same_numbers(run: Run, tiny: Path) -> None:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    texts = ["--text=python-docs", "--calibration=python-docs", "--model", str(tiny)]
    ran = run("bench", "matrix", *texts, *small, "--cells=2", "--format=json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    farm, alone, fresh = report["results"]
    assert report["cells"] == 3 and report["largest_difference"] < 1e-4
    # Nobody kept the baseline's states for the two others; a store of each way's own holds them all.
    assert alone["tokens"] == fresh["tokens"] == farm["tokens"] + 2 * 64
    assert farm["wall_ratio"] == 1.0


def test_settings_that_cannot_be(tiny: Path) -> None:
    for changes, message in (
        ({"ways": ("farm", "slow")}, 'expected some of farm, alone, fresh, got "slow"'),
        ({"ways": ()}, "each once"),
        ({"ways": ("farm", "farm")}, "each once"),
        ({"cells": 25}, "--cells is 1..24, got 25"),
        ({"rounds": 0}, "--rounds is 1..99, got 0"),
    ):
        with pytest.raises(InvalidInput, match=message):
            bench.run(settings(tiny, **changes))


def test_a_way_that_fails_says_why(tiny: Path, tmp_path: Path) -> None:
    """Without a job file, in one line."""
    with pytest.raises(QfarmError, match="^fresh: exit code 2: .*no.yaml: cannot read the job file[^\n]*$"):
        bench._run("fresh", tmp_path / "no.yaml", tmp_path, ["nothing"], settings(tiny))
