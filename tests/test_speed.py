"""Speed: what is counted and how, under a clock of our own; that times of different machines are never compared."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm import environment
from qfarm.errors import JobError
from qfarm.evaluate import speed
from qfarm.evaluate.speed import Speed, generate, median_interval
from qfarm.report.compare import compare
from qfarm.report.data import to_json
from qfarm.report.html import to_html
from qfarm.report.render import render
from qfarm.report.tables import load
from tests.report_example import attempt_row, cell_row, example
from tests.test_packed_run import job, packed_model
from tests.test_worker import Farm, make_job

EVALUATE = "[speed: {{prompt: 24, new_tokens: 5, repeats: 3, warmup: 2}}]"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds between looks at the clock: of each generation, before the first new token and after it."""
    times: list[float] = []
    passed = itertools.accumulate(step for pair in _pairs(times) for step in (0.0, *pair))
    monkeypatch.setattr(speed, "now", lambda: next(passed))
    yield times


def _pairs(times: list[float]) -> Iterator[tuple[float, float]]:
    for index in itertools.count(step=2):
        yield times[index], times[index + 1]


def test_medians_and_quantiles_over_repeats_after_warm_up(tmp_path: Path, tiny: Path, clock: list[float]) -> None:
    farm, packed = packed_model(tmp_path, tiny)
    farm.session.packed = packed
    clock += [100, 100, 50, 50] + [2, 4, 1, 8, 4, 2]
    with packed.running(True):
        done: list[int] = []
        result = Speed(prompt=24, new_tokens=5, batch=3, repeats=3, warmup=2).run(
            farm.session, lambda count, total: done.append(count)
        )
    found = {metric.metric: metric for metric in result.metrics}
    assert done == [1, 2, 3, 4, 5] and {metric.n for metric in result.metrics} == {3}
    assert found["prefill_tokens_per_s"].value == 3 * 24 / 2 and found["first_token_s"].value == 2
    assert found["decode_tokens_per_s"].value == 3 * 4 / 4
    assert found["decode_tokens_per_s_p20"].value == pytest.approx(1.5 + 0.4 * 1.5)  # of 1.5, 3, 6
    assert found["decode_tokens_per_s_p80"].value == pytest.approx(3 + 0.6 * 3)
    assert found["decode_tokens_per_s"].low is None  # three repeats bound no median with 95 %
    assert found["first_token_s"].better == "lower" and found["decode_tokens_per_s"].better == "higher"
    # 2 blocks, keys and values, 2 heads of 16 numbers in 2 bytes; the last new token is not in the cache.
    assert found["kv_bytes"].value == 2 * 2 * 3 * (24 + 4) * 2 * 16 * 2
    assert found["weight_bytes"].value > packed.nbytes() > 0 and found["peak_bytes"].value > 1e7


def test_one_forward_pass_for_each_new_token(tmp_path: Path, tiny: Path) -> None:
    farm, packed = packed_model(tmp_path, tiny, bits="[w4kv4]")
    loaded, seen = farm.session.loaded, []
    handle = loaded.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with packed.running(True):
        timing = generate(loaded, torch.zeros(2, 7, dtype=torch.long), 4)
    handle.remove()
    assert seen == [(2, 7), (2, 1), (2, 1), (2, 1)] and timing.first_s > 0 and timing.decode_s > 0
    # A packed cache: a token of a head has 16 codes of 4 bits, a float16 scale and a zero of a byte.
    assert timing.kv_bytes == 2 * 2 * 2 * 10 * 2 * (16 // 2 + 2 + 1)


def test_the_interval_of_a_median_covers_it() -> None:
    for n in range(1, 40):
        low, high = median_interval([float(value) for value in range(n)])
        if low is None or high is None:
            assert 2 * 0.5**n > 0.05
            continue
        below = sum(math.comb(n, k) for k in range(int(low) + 1)) / 2**n  # so few values on one side of it
        assert low + high == n - 1 and 2 * below <= 0.05
        tighter = below + math.comb(n, int(low) + 1) / 2**n
        assert 2 * tighter > 0.05
    assert median_interval([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (1.0, 6.0)


def test_it_needs_a_packed_run(tiny: Path) -> None:
    with pytest.raises(JobError, match=r"run: speed is measured in run: packed, not fake"):
        make_job(tiny, job(tiny, evaluate=EVALUATE, run="fake"))


def test_rows_name_their_machine_and_a_second_measurement_may_differ(tmp_path: Path, tiny: Path) -> None:
    farm = Farm(tmp_path / "store", make_job(tiny, job(tiny, evaluate=EVALUATE)))
    planned = farm.plan().cells
    assert [[spec.label for spec in one.missing] for one in planned] == [["speed 24+5"]] * 2
    assert planned[0].missing[0].protocol["worker"] == {"gpus": 0, "cpus": 1}
    for index in (0, 1):
        assert farm.run(index).failure is None
    rows = farm.table("metrics")
    assert {row["eval_id"] for row in rows} == {planned[0].missing[0].eval_id}
    machines = [json.loads(row["protocol"])["machine"] for row in rows]
    assert all(one == environment.machine(torch.device("cpu")) for one in machines)
    assert machines[0]["device"] == "cpu" and machines[0]["threads"] == torch.get_num_threads()
    results = load(farm.store)
    text = render(results, "terminal", width=200)
    page = to_html(results, farm.store, written="2026-11-27")
    for shown in (text, page):
        assert "decode tok/s" in shown and "timed on a CPU: " in shown and "packed weights" in shown
    (table,) = json.loads(to_json(results))["tables"]
    assert table["protocol"]["machine"] == machines[0] and table["rows"][1]["metrics"]["kv_bytes"]["value"] > 0
    assert all(planned.done for planned in farm.plan().cells)
    # Another worker was first with a time of its own: no two are equal, and that is no disagreement.
    farm.store.finished_evaluations = lambda: frozenset()
    assert farm.run(1).failure is None and len(farm.table("metrics")) == len(rows)


def timed(threads: int, **changes: Any) -> dict[str, Any]:
    machine = {"device": "cpu", "name": "Some CPU", "threads": threads, "torch": "2.13.0"}
    return {"evaluator": "speed", "options": {"prompt": 8}, "run": "packed", "machine": machine | changes}


def test_times_of_two_machines_stand_in_two_tables() -> None:
    store = example().store
    cells = [cell_row(f"{i}" * 16, recipe, "w4") for i, recipe in enumerate(("rtn", "hqq", "awq", "gptq"))]
    store.rows["cells"] += cells
    store.rows["attempts"] += [attempt_row(cell.cell_id) for cell in cells]
    for cell, threads in zip(cells, (1, 1, 2, 1), strict=True):
        protocol = timed(threads, name="Other CPU") if cell.recipe == "gptq" else timed(threads)
        store.add(
            cell, [], [], eval_id="5" * 16, label="speed 8+4", protocol=protocol, metrics={"decode_tokens_per_s": 9.0}
        )
    tables = [table for table in load(store).tables if table.evaluation == "speed 8+4"]
    assert sorted(sorted(row.cell.recipe for row in table.rows) for table in tables) == [
        ["awq"],
        ["gptq"],
        ["hqq", "rtn"],
    ]
    assert len({table.eval_id for table in tables}) == 3
    (awq,) = (table for table in tables if table.rows[0].cell.recipe == "awq")
    assert any("machine.threads 2 against 1" in remark for remark in awq.remarks)
    found = json.loads(to_json(load(store)))["tables"]
    assert {table["protocol"]["machine"]["threads"] for table in found if "machine" in table["protocol"]} == {1, 2}
    pairs = compare(store, cells[0].cell_id, cells[2].cell_id)
    assert pairs.results == () and "machine.threads 1 against 2" in str(pairs.refused)
    assert [one.evaluation for one in compare(store, cells[0].cell_id, cells[1].cell_id).results] == ["speed 8+4"]
