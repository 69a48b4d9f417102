"""Tables of the report: a small store in, rows out; figures are compared with plain numpy."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qfarm import stats
from qfarm.record import DocumentRow
from qfarm.report.protocols import differing_keys
from qfarm.report.render import render
from qfarm.report.show import show
from qfarm.report.tables import load
from tests.report_example import (
    BASELINE,
    FAILED,
    GPTQ,
    MODEL,
    PROTOCOL,
    RTN,
    Example,
    FakeStore,
    attempt_row,
    cell_row,
    example,
    row_of,
)


@pytest.fixture
def small() -> Example:
    return example()


def only_table(store):
    results = load(store)
    assert len(results.tables) == 1
    return results.tables[0]


def test_difference_to_the_baseline_is_the_paired_one(small):
    results = load(small.store)
    for cell_id, losses in ((RTN, small.rtn), (GPTQ, small.gptq)):
        d = losses - small.base
        delta = d.sum() / small.tokens.sum()
        residual = d - delta * small.tokens
        error = np.sqrt(30 / 29 * (residual**2).sum()) / small.tokens.sum()
        half = scipy_stats.t.ppf(0.975, 29) * error
        found = row_of(results, cell_id).difference
        assert (found.delta, found.standard_error) == pytest.approx((delta, error), rel=1e-12)
        ends = [100 * (np.exp(x) - 1) for x in (delta, delta - half, delta + half)]
        assert found.percent == pytest.approx(ends, rel=1e-9)
        assert (found.n, found.clusters) == (30, 30)


def test_the_baseline_has_no_difference(small):
    row = row_of(load(small.store), BASELINE)
    assert row.is_baseline and row.difference is None and row.remark == ""


def test_pieces_are_paired_by_document_and_window(small):
    """The order of the ledger says nothing, and one document may stand in two windows."""
    store = FakeStore()
    base, cell = cell_row(BASELINE, "baseline", "w16"), cell_row(RTN, "rtn", "w4")
    store.rows["cells"] += [base, cell]
    pieces = [(f"document {i // 2}", i, f"article {i // 2}") for i in range(24)]
    before, after = np.arange(24.0) ** 2, np.arange(24.0) ** 2 + np.arange(24) % 5
    order = np.random.default_rng(1).permutation(24)
    store.add(base, before, np.full(24, 10), pieces=pieces)
    store.add(cell, after[order], np.full(24, 10), pieces=[pieces[i] for i in order])
    found = row_of(load(store), RTN).difference
    by_hand = stats.paired_difference(after, before, np.full(24, 10), np.arange(24) // 2)
    assert (found.delta, found.standard_error) == pytest.approx((by_hand.delta, by_hand.standard_error), rel=1e-12)
    assert (found.n, found.clusters) == (24, 12)


def test_a_piece_in_two_rows_counts_once_with_its_sum():
    store = FakeStore()
    base, cell = cell_row(BASELINE, "baseline", "w16"), cell_row(RTN, "rtn", "w4")
    store.rows["cells"] += [base, cell]
    twice = [(f"document {i // 2}", None, "article") for i in range(24)]
    store.add(base, np.zeros(24), np.full(24, 5), pieces=twice)
    store.add(cell, np.ones(24), np.full(24, 5), pieces=twice)
    found = row_of(load(store), RTN).difference
    assert (found.n, found.delta) == (12, pytest.approx(24 / 120))
    store.rows["documents"][-1] = dataclasses.replace(store.rows["documents"][-1], loss=None)
    assert row_of(load(store), RTN).remark == "not compared: the loss of 1 of 12 pieces is not finite"


def test_marks_need_enough_clusters_and_holm(small):
    assert [row.adjusted_p for row in only_table(small.store).rows] == [None] * 3
    many = example(60)
    rows = {row.cell.cell_id: row for row in only_table(many.store).rows}
    p = {cell_id: rows[cell_id].difference.p for cell_id in (RTN, GPTQ)}
    assert p[RTN] < p[GPTQ]
    assert rows[RTN].adjusted_p == pytest.approx(2 * p[RTN], abs=0)
    assert rows[GPTQ].adjusted_p == pytest.approx(p[GPTQ], abs=0)
    assert rows[RTN].marked and rows[GPTQ].marked
    barely = dataclasses.replace(rows[GPTQ], adjusted_p=0.05)
    assert not barely.marked


def test_below_ten_clusters_only_the_value_is_shown():
    text = render(load(example(9).store), width=200)
    line = next(line for line in text.splitlines() if line.startswith("rtn"))
    assert re.search(r"\+\d+\.\d\d %", line) and "[" not in line
    assert "no intervals below 10 clusters" in text and "95 %" not in text


def test_documents_that_one_side_lacks_are_left_out_of_both(small):
    ledger = small.store.rows["documents"]
    small.store.rows["documents"] = [
        row for row in ledger if not (row.cell_id == RTN and row.window in (3, 4)) and row.window != 8
    ]
    row = row_of(load(small.store), RTN)
    kept = [i for i in range(30) if i not in (3, 4, 8)]
    delta = (small.rtn - small.base)[kept].sum() / small.tokens[kept].sum()
    assert row.difference.delta == pytest.approx(delta, rel=1e-12)
    assert row.remark == "on 27 of 29 shared pieces"


def test_too_few_shared_documents_are_refused(small):
    small.store.rows["documents"] = [
        dataclasses.replace(row, document=f"other {row.document}") if row.cell_id == RTN and row.window < 4 else row
        for row in small.store.rows["documents"]
    ]
    row = row_of(load(small.store), RTN)
    assert row.difference is None
    assert row.remark == "not compared: shares 26 of 30 pieces with the baseline"


@pytest.mark.parametrize("loss", [np.nan, np.inf, None])
def test_losses_that_are_not_finite_are_refused(small, loss):
    small.store.rows["documents"] = [
        dataclasses.replace(row, loss=loss) if row.cell_id == RTN and row.window == 4 else row
        for row in small.store.rows["documents"]
    ]
    row = row_of(load(small.store), RTN)
    assert (row.difference, row.remark) == (None, "not compared: the loss of 1 of 30 pieces is not finite")


def test_identical_cells_say_so(small):
    copy = cell_row("3333" * 4, "rtn", "w8")
    small.store.rows["cells"].append(copy)
    small.store.add(copy, small.base, small.tokens)
    line = next(line for line in render(load(small.store), width=120).splitlines() if " w8 " in line)
    assert "identical" in line and "[" not in line


def test_evaluations_without_anything_to_compare_have_no_difference():
    store = FakeStore()
    base, cell = cell_row(BASELINE, "baseline", "w16"), cell_row(RTN, "rtn", "w4")
    store.rows["cells"] += [base, cell]
    for one, value in ((base, 0.8), (cell, 0.75)):
        store.rows["documents"].append(
            DocumentRow(cell_id=one.cell_id, eval_id="t", document="d", cluster="d", tokens=1, correct=1)
        )
        store.add(one, [], [], eval_id="t", label="needle", metrics={"found": value})
    table = only_table(store)
    assert [row.difference for row in table.rows] == [None, None]
    assert "found" in render(load(store), width=80) and "75.00 %" in render(load(store), width=80)


def test_rows_are_ordered_baseline_width_group_recipe_seed():
    axes = [
        ("rtn", "w3", 64, None),
        ("rtn", "w4", -1, None),
        ("gptq", "w4", 128, 1),
        ("gptq", "w4", 128, 0),
        ("gptq", "w4", 64, 0),
        ("awq", "w4", 128, 0),
        ("rtn", "w8a8", -1, None),
        ("rtn", "w8", -1, None),
        ("baseline", "w16", -1, None),
        ("rtn", "from the future", -1, None),
    ]
    store = FakeStore()
    for index, (recipe, scheme, group, seed) in enumerate(axes):
        cell = cell_row(f"{index:016}", recipe, scheme, group_size=group, seed=seed)
        store.rows["cells"].append(cell)
        store.add(cell, [1.0], [1])
    found = [int(row.cell.cell_id) for row in only_table(store).rows]
    assert found == [8, 7, 6, 1, 5, 3, 2, 4, 0, 9]


def test_other_protocols_are_kept_apart_and_the_key_is_named(small):
    half = PROTOCOL | {"dtype": "float16", "options": PROTOCOL["options"] | {"length": 1024}}
    other = cell_row("3333" * 4, "rtn", "w8")
    small.store.rows["cells"].append(other)
    small.store.add(other, small.base, small.tokens, eval_id="d" * 16, protocol=half)
    one, two = load(small.store).tables
    assert (len(one.rows), len(two.rows)) == (1, 3)
    said = 'dtype "float16" against "bfloat16"; options.length 1024 against 2048'
    assert one.remarks == (
        "no baseline was measured under this protocol",
        f"not compared with 3 rows of evaluation eeeeeeee: {said}",
    )
    assert one.rows[0].difference is None
    assert "against 1024" in " ".join(two.remarks)
    assert said in " ".join(render(load(small.store), width=80).split())


def test_differing_keys_of_nested_protocols():
    assert differing_keys({"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}, "d": {}}) == [
        "a.b.1 2 against 3",
        "c 1 against null",
        "d null against {}",
    ]


def test_a_model_whose_files_changed_is_another_model(small):
    for row in (cell_row("4444" * 4, "baseline", "w16", fingerprint="9" * 16),):
        small.store.rows["cells"].append(row)
        small.store.add(row, small.base, small.tokens)
    tables = load(small.store).tables
    assert [len(table.rows) for table in tables] == [1, 3]
    assert "fingerprint 99999999" in " ".join(tables[1].remarks)


def test_namesakes_show_the_options_that_differ(small):
    twin = cell_row("3333" * 4, "gptq", "w4", options={"act_order": True, "damp": 0.01})
    small.store.rows["cells"] = [
        dataclasses.replace(cell, spec=cell_row(GPTQ, "gptq", "w4", options={"act_order": False, "damp": 0.01}).spec)
        if cell.cell_id == GPTQ
        else cell
        for cell in small.store.rows["cells"]
    ] + [twin]
    small.store.add(twin, small.gptq, small.tokens)
    assert [row.name for row in only_table(small.store).rows] == [
        *("baseline", "gptq act_order=false", "gptq act_order=true", "rtn"),
    ]
    text = render(load(small.store), width=80)
    assert max(map(len, text.splitlines())) <= 80 and "act_order=true" in text


def test_a_variant_is_shown_once_and_alone():
    store = FakeStore()
    cells = [
        cell_row("1" * 16, "gptq", "w4", options={"act_order": False, "group_aware": True}),
        cell_row("2" * 16, "gptq", "w4", options={"act_order": True, "group_aware": False}, variant="act_order=true"),
        cell_row("3" * 16, "gptq", "w3", options={"act_order": True, "group_aware": False}, variant="act_order=true"),
    ]
    for cell in cells:
        store.rows["cells"].append(cell)
        store.add(cell, [1.0], [1])
    names = {row.cell.cell_id[0]: row.name for row in only_table(store).rows}
    assert names == {"1": "gptq", "2": "gptq act_order=true", "3": "gptq act_order=true"}
    twin = cell_row("4" * 16, "gptq", "w4", options={"act_order": True, "damp": 0.1}, variant="act_order=true")
    store.rows["cells"].append(twin)
    store.add(twin, [1.0], [1])
    names = {row.cell.cell_id[0]: row.name for row in only_table(store).rows}
    assert names["1"] == "gptq" and names["3"] == "gptq act_order=true"
    assert names["4"] == "gptq act_order=true, damp=0.1, group_aware=null"
    assert names["2"] == "gptq act_order=true, damp=null, group_aware=false"


def test_wall_time_and_notes_are_those_of_the_accepted_attempt(small):
    earlier = attempt_row(RTN, attempt_id="earlier", outcome="oom", wall_s=7.0, started="2026-11-20T00:00:00Z")
    accepted = attempt_row(RTN, wall_s=3723.0, notes='["halved the batch"]')
    later = attempt_row(RTN, attempt_id="later", wall_s=9.0, started="2026-11-22T00:00:00Z")
    small.store.rows["attempts"][1:2] = [earlier, accepted, later]
    results = load(small.store)
    assert row_of(results, RTN).wall_s == 3723.0
    text = render(results, width=120)
    assert "1h 02m" in text and "rtn w4: halved the batch" in text


def test_each_evaluation_has_the_time_of_its_own_attempt(small):
    """The attempt that published the cell may have evaluated nothing, or something else."""
    later = attempt_row(RTN, attempt_id="later", wall_s=9.0, notes='["halved the batch"]')
    small.store.rows["attempts"].append(later)
    cell = next(cell for cell in small.store.rows["cells"] if cell.cell_id == RTN)
    small.store.add(cell, small.rtn, small.tokens, eval_id="f" * 16, label="perplexity c4 2048", attempt_id="later")
    results = load(small.store)
    found = {(row.wall_s, row.notes) for table in results.tables for row in table.rows if row.cell.cell_id == RTN}
    assert found == {(125.0, ()), (9.0, ("halved the batch",))}


def test_failed_cells_are_listed_by_their_last_attempt(small):
    attempts = small.store.rows["attempts"]
    attempts.append(attempt_row(FAILED, attempt_id="second", number=2, outcome="hung", started="2026-11-22T00:00:00Z"))
    attempts.append(attempt_row(RTN, attempt_id="before", outcome="oom", started="2026-11-20T00:00:00Z"))
    attempts.append(
        attempt_row(
            GPTQ,
            **{"attempt_id": "after", "outcome": "bug", "error": "KeyError", "started": "2026-11-22T00:00:00Z"},
            evaluations=json.dumps(["e" * 16, "d" * 16]),
        )
    )
    failed = load(small.store).failed
    assert [(cell.cell_id, cell.kind, cell.label, cell.attempts) for cell in failed] == [
        (GPTQ, "bug", "gptq w4 g64", 2),
        (FAILED, "hung", "gptq w4 g128", 2),
    ]
    lines = render(load(small.store), width=120).splitlines()
    assert "2 cells failed" in lines
    assert f"  bug: 11111111 gptq w4 g64 {MODEL} (2 attempts, last stage done): KeyError" in lines


@pytest.mark.parametrize(
    ("cell_id", "evaluations", "listed"),
    [
        (RTN, json.dumps(["e" * 16]), False),
        (RTN, json.dumps(["e" * 16, "d" * 16]), True),
        (RTN, "[]", False),
        (RTN, None, False),
        ("3333" * 4, "[]", True),
        ("3333" * 4, None, True),
    ],
)
def test_a_cell_is_failed_only_if_an_evaluation_is_missing(small, cell_id, evaluations, listed):
    small.store.rows["cells"].append(cell_row("3333" * 4, "rtn", "w3"))
    last = {"attempt_id": "last", "outcome": "oom", "started": "2026-11-22T00:00:00Z"}
    small.store.rows["attempts"].append(attempt_row(cell_id, evaluations=evaluations, **last))
    assert (cell_id in {cell.cell_id for cell in load(small.store).failed}) == listed


def test_a_real_store_reads_the_same(small, tmp_path):
    from qfarm.store import Store

    store = Store.open(tmp_path / "store", create=True)
    for cell in small.store.rows["cells"]:
        store.publish_cell(cell, [])
        mine = {
            name: [row for row in small.store.rows[name] if row.cell_id == cell.cell_id]
            for name in ("metrics", "documents")
        }
        store.publish_evaluation(cell.cell_id, "e" * 16, cell.attempt_id, mine["metrics"], mine["documents"])
    for attempt in small.store.rows["attempts"]:
        store.publish_attempt(attempt)
    assert render(load(store), "json") == render(load(small.store), "json")
    assert show(store, "11", width=80) == show(small.store, "11", width=80)


@pytest.mark.parametrize(
    "module", ["qfarm.stats", "qfarm.console", "qfarm.report.render", "qfarm.report.show", "qfarm.report.tables"]
)
def test_light_imports(module):
    script = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'ray', 'transformers', 'pandas', 'qfarm.driver', 'qfarm.worker'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
