"""`qfarm compare`: two cells of stores whose true differences are known; figures are compared with plain numpy."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from qfarm import stats
from qfarm.cli import main
from qfarm.errors import InvalidInput
from qfarm.margin import read_option
from qfarm.report.compare import compare
from qfarm.report.compare_text import comparison_json, p_text, render_comparison
from tests.report_example import (
    BASELINE,
    HOSTILE,
    LABEL,
    PROTOCOL,
    RTN,
    FakeStore,
    Planted,
    attempt_row,
    cell_row,
    hostile_store,
)


@pytest.fixture
def planted() -> Planted:
    """`good` is better than `bad` by 0.03 nats, `like` differs from `good` by nothing on average."""
    store = Planted()
    shared = store.noise(0.02)
    store.cell("1", "good", 0.01 + shared + store.noise(0.005))
    store.cell("2", "bad", 0.04 + shared + store.noise(0.005))
    store.cell("3", "like", 0.01 + shared + store.noise(0.02))
    return store


def only_result(found):
    assert len(found.results) == 1
    return found.results[0]


def said(found, width=80) -> str:
    text = render_comparison(found, width=width)
    assert max(map(len, text.splitlines())) <= width
    return " ".join(text.split())


def losses(planted, cell_id):
    return np.array([row.loss for row in planted.store.rows["documents"] if row.cell_id == cell_id])


# -- one pair ---------------------------------------------------------------------------------------------------------


def test_the_difference_is_paired_between_the_two(planted):
    result = only_result(compare(planted.store, "1", "2"))
    one, two = (losses(planted, cell_id) for cell_id in ("1" * 16, "2" * 16))
    expected = stats.paired_difference(one, two, planted.tokens, np.arange(141))
    found = result.difference
    assert (found.delta, found.standard_error, found.p) == pytest.approx(
        (expected.delta, expected.standard_error, expected.p), rel=1e-9
    )
    assert found.delta == pytest.approx(-0.03) and result.verdict == "better"
    back = only_result(compare(planted.store, "2", "1"))
    assert (back.verdict, back.difference.delta) == ("worse", pytest.approx(-found.delta, abs=1e-12))


def test_what_is_not_shown_is_undecided_and_not_equal(planted):
    text = said(compare(planted.store, "good w4 g64", "like w4 g64"))
    found = only_result(compare(planted.store, "1", "3")).difference
    detectable = 100 * np.expm1(2.8 * found.standard_error)
    assert f"undecided, which is not 'equal': {detectable:.2f} % would be found in 80 % of cases" in text
    assert "141 pieces, 141 clusters, paired" in text
    within = only_result(compare(planted.store, "1", "3", read_option("perplexity=1%")))
    assert (within.verdict, within.within_margin) == ("within margin", True)
    assert "within 1 %, direction undecided" in said(compare(planted.store, "1", "3", read_option("perplexity=1%")))


def test_worse_and_within_the_margin_are_no_contradiction(planted):
    assert "worse, within 4 %" in said(compare(planted.store, "2", "1", read_option("perplexity=4%")))


def test_a_cell_that_is_better_beyond_the_margin_is_not_worse(planted):
    """Non-inferior, one-sided; not equivalent, which has two sides."""
    planted.cell("7", "finer", -0.05 + planted.noise(0.01))
    found = compare(planted.store, "7", BASELINE, margins=read_option("perplexity=1%"))
    result = only_result(found)
    assert result.non_inferior_p == result.difference.non_inferior_p(np.log1p(0.01)) < 0.001
    assert result.within_margin is False and "not worse by more: p < 0.001, one-sided" in " ".join(said(found).split())


def test_a_margin_of_the_jobs_is_found(planted):
    planted.store.rows["attempts"][1] = attempt_row("1" * 16, provenance='{"margin": {"perplexity": "1 %"}}')
    assert only_result(compare(planted.store, "1", "3")).margin.text == "1 %"


def test_equal_losses_are_identical(planted):
    planted.cell("4", "copy", (losses(planted, "1" * 16) - planted.base) / planted.tokens)
    planted.store.rows["documents"] = [
        dataclasses.replace(row, loss=float(losses(planted, "1" * 16)[row.window])) if row.cell_id == "4" * 16 else row
        for row in planted.store.rows["documents"]
    ]
    result = only_result(compare(planted.store, "1", "4"))
    assert result.verdict == "identical" and result.documents == ()
    assert "identical on 141 pieces" in said(compare(planted.store, "1", "4"))


# -- where it comes from ----------------------------------------------------------------------------------------------


def test_the_largest_documents_and_their_share_by_hand(planted):
    result = only_result(compare(planted.store, "1", "3"))
    d = losses(planted, "1" * 16) - losses(planted, "3" * 16)
    order = np.argsort(-np.abs(d))[:10]
    assert [one.document for one in result.documents] == [f"article {i}" for i in order]
    assert [one.share for one in result.documents] == pytest.approx(list(d[order] / np.abs(d).sum()))
    assert only_result(compare(planted.store, "1", "2")).without_largest is None


def test_one_document_that_carries_most_is_named_with_the_value_without_it():
    store = Planted()
    spike = np.zeros(141)
    spike[7] = 5.0
    store.cell("1", "odd", spike + store.noise(0.001))
    store.cell("2", "plain", 0.0)
    found = compare(store.store, "1", "2")
    result = only_result(found)
    assert result.documents[0].document == "article 7" and result.documents[0].share > 0.9
    d = (losses(store, "1" * 16) - losses(store, "2" * 16))[np.arange(141) != 7]
    assert result.without_largest.delta == pytest.approx(d.sum() / (140 * 2047))
    assert "carries more than half of all change; without it:" in said(found)


def test_changes_that_cancel_are_not_carried_by_one_document():
    """The net change is near nothing, so that any document is a multiple of it; of all change it is a hundredth."""
    store = Planted()
    store.cell("1", "odd", store.noise(0.02) + 1e-6)
    store.cell("2", "plain", 0.0)
    result = only_result(compare(store.store, "1", "2"))
    d = losses(store, "1" * 16) - losses(store, "2" * 16)
    assert np.abs(d).max() > 10 * abs(d.sum())
    assert result.without_largest is None and abs(result.documents[0].share) < 0.05


def test_a_document_in_two_windows_is_one(planted):
    store = FakeStore()
    cells = [cell_row("1" * 16, "a", "w4"), cell_row("2" * 16, "b", "w4")]
    store.rows["cells"] += cells
    pieces = [(f"document {i // 2}", i, f"article {i // 2}") for i in range(24)]
    for cell, loss in zip(cells, (np.arange(24.0), np.zeros(24)), strict=True):
        store.add(cell, loss, np.full(24, 10), pieces=pieces)
        store.rows["attempts"].append(attempt_row(cell.cell_id))
    first = only_result(compare(store, "1", "2")).documents[0]
    assert (first.document, first.pieces, first.tokens, first.change) == ("article 11", 2, 20, 45.0)
    assert first.windows == "22-23"


def test_windows_of_a_document_are_written_as_ranges():
    store = FakeStore()
    pieces = [(f"piece {i}", i, "one" if i in (0, 3, 4, 5, 9) else f"article {i}") for i in range(10)]
    for cell, loss in ((cell_row("1" * 16, "a", "w4"), np.ones(10)), (cell_row("2" * 16, "b", "w4"), np.zeros(10))):
        store.rows["cells"].append(cell)
        store.add(cell, loss, np.full(10, 10), pieces=pieces)
        store.rows["attempts"].append(attempt_row(cell.cell_id))
    assert only_result(compare(store, "1", "2")).documents[0].windows == "0, 3-5, 9"


# -- accuracy ---------------------------------------------------------------------------------------------------------


def items_store(tasks=None) -> FakeStore:
    store = FakeStore()
    for cell_id, recipe, right in (("1", "a", np.arange(400) >= 30), ("2", "b", np.arange(400) < 388)):
        cell = cell_row(cell_id * 16, recipe, "w4")
        store.rows["cells"].append(cell)
        store.rows["attempts"].append(attempt_row(cell.cell_id))
        means = [right[np.asarray(tasks) == task].mean() for task in sorted(set(tasks))] if tasks else [right.mean()]
        store.add_items(cell, right, tasks=tasks, accuracy=float(np.mean(means)))
    return store


def test_accuracy_shows_both_p_flips_lost_and_gained():
    found = compare(items_store(), "1", "2")
    result = only_result(found)
    assert (result.difference.lost, result.difference.gained) == (30, 12)
    assert (result.difference.p, result.difference.exact_p) == (stats.mid_p(30, 12), stats.exact_p(30, 12))
    text = said(found, 100)
    assert f"McNemar mid-p, p = {stats.mid_p(30, 12):.2g}; McNemar exact p = {stats.exact_p(30, 12):.2g}" in text
    assert "30 lost (right in the second only), 12 gained (right in the first only)" in text
    assert "worse" in text and "-4.5 points" in text


def test_tasks_are_listed():
    result = only_result(compare(items_store(["x"] * 100 + ["y"] * 300), "1", "2"))
    assert [(one.task, one.n, one.lost, one.gained) for one in result.tasks] == [("x", 100, 30, 0), ("y", 300, 0, 12)]
    assert result.difference.delta == pytest.approx((-0.3 + 0.04) / 2)


def test_tasks_without_a_mean_are_compared_one_by_one():
    store = items_store(["x"] * 100 + ["y"] * 300)
    store.rows["metrics"] = [
        dataclasses.replace(row, metric=name, n=n)
        for row in store.rows["metrics"]
        for name, n in (("x bleu_acc", 100), ("y acc", 300))
    ]
    found = compare(store, "1", "2")
    result = only_result(found)
    assert result.difference is None and result.verdict is None
    assert [one.difference.p for one in result.tasks] == [stats.mid_p(30, 0), stats.mid_p(0, 12)]
    assert (result.tasks[1].difference.low, result.tasks[1].difference.high) == stats.accuracy_change(0, 12, 300)[1:]
    text = said(found)
    assert "no mean over these tasks is stored, so they have no common difference; each has its own below" in text
    assert "x 100 -30.0" in text and "y 300 +4.0" in text
    tasks = json.loads(comparison_json(found))["evaluations"][0]["tasks"]
    assert [task["p"] for task in tasks] == [stats.mid_p(30, 0), stats.mid_p(0, 12)]


def test_changed_answers_are_counted_and_listed_flips_first():
    """Right to wrong, wrong to another wrong with most of the probability, the same answer with other odds."""
    store = items_store()
    answers = {
        ("1", "item 0"): ("1", 0, [-3.0, -1.0, -2.0]),
        ("2", "item 0"): ("0", 1, [-1.0, -3.0, -2.0]),
        ("1", "item 1"): ("2", 0, [-9.0, -9.0, 0.0]),
        ("2", "item 1"): ("1", 0, [-9.0, 0.0, -9.0]),
        ("1", "item 2"): ("0", 0, [-1.0, -3.0, -5.0]),
        ("2", "item 2"): ("0", 0, [-1.0, -2.0, -5.0]),
    }
    for index, row in enumerate(store.rows["documents"]):
        if given := answers.get((row.cell_id[0], row.document)):
            changed = dict(zip(("answer", "correct", "choices"), given, strict=True))
            store.rows["documents"][index] = dataclasses.replace(row, **changed)
    found = compare(store, "1", "2")
    changes = only_result(found).answers
    assert (changes.items, changes.changed) == (3, 2)
    assert [(one.document, one.answers, one.right) for one in changes.largest] == [
        ("item 0", ("1", "0"), (0, 1)),
        ("item 1", ("2", "1"), (0, 0)),
    ]
    weights = np.exp([-3.0, -1.0, -2.0])
    assert changes.largest[0].moved == pytest.approx((weights[1] - weights[0]) / weights.sum())
    text = said(found, 100)
    assert "2 of 3, from wrong to another wrong included" in text and "1 wrong 0 right" in text
    assert json.loads(comparison_json(found))["evaluations"][0]["answers"]["changed"] == 2


def test_equal_right_and_wrong_is_called_no_flips_and_not_identical():
    store = items_store()
    store.rows["documents"] = [dataclasses.replace(row, correct=1) for row in store.rows["documents"]]
    text = said(compare(store, "1", "2"), 100)
    assert "no flips: right and wrong on the same items, 400 in all" in text and "identical" not in text


def test_tasks_that_are_not_right_or_wrong_are_left_out():
    store = items_store(["x"] * 100 + ["y"] * 300)
    whole = only_result(compare(store, "1", "2")).difference
    store.rows["documents"] = [
        dataclasses.replace(row, correct=None) if row.task == "y" else row for row in store.rows["documents"]
    ]
    store.rows["metrics"] = [dataclasses.replace(row, n=100) for row in store.rows["metrics"]]
    result = only_result(compare(store, "1", "2"))
    assert whole.n == 400 and result.difference.n == 100 and result.difference.lost == 30


def test_one_missing_answer_is_refused():
    store = items_store()
    store.rows["documents"][7] = dataclasses.replace(store.rows["documents"][7], correct=None)
    assert "the answer of 1 of 400 items is missing" in only_result(compare(store, "1", "2")).remark


# -- what forbids a comparison ----------------------------------------------------------------------------------------


def test_other_protocols_are_refused_with_the_key_and_both_values(planted):
    half = PROTOCOL | {"options": PROTOCOL["options"] | {"length": 1024}}
    other = cell_row("4" * 16, "other", "w4")
    planted.store.rows["cells"].append(other)
    planted.store.add(other, planted.base, planted.tokens, eval_id="d" * 16, protocol=half)
    found = compare(planted.store, "1", "4")
    assert found.results == () and found.refused == ((LABEL, "options.length 2048 against 1024"),)
    assert "options.length 2048 against 1024" in said(found)
    assert json.loads(comparison_json(found))["not_compared"][0]["reason"] == "options.length 2048 against 1024"


def test_evaluations_of_one_cell_only_are_named(planted):
    cell = next(cell for cell in planted.store.rows["cells"] if cell.recipe == "good")
    planted.store.add_items(cell, np.ones(200))
    assert compare(planted.store, "1", "2").refused == (("arc_easy", "only the first cell has it"),)
    assert compare(planted.store, "2", "1").refused == (("arc_easy", "only the second cell has it"),)


def test_shared_documents_are_counted_and_too_few_refused(planted):
    ledger = planted.store.rows["documents"]
    planted.store.rows["documents"] = [row for row in ledger if not (row.cell_id == "1" * 16 and row.window < 4)]
    assert only_result(compare(planted.store, "1", "2")).remark == "on 137 of 141 shared pieces"
    planted.store.rows["documents"] = [
        dataclasses.replace(row, document=f"other {row.document}")
        if row.cell_id == "1" * 16 and row.window < 20
        else row
        for row in ledger
    ]
    result = only_result(compare(planted.store, "1", "2"))
    assert result.difference is None
    assert result.remark == "not compared: shares 121 of 141 pieces with the other cell"


def test_a_stopped_cell_is_compared_on_what_it_saw_without_a_test(planted):
    stopped = cell_row("4" * 16, "hopeless", "w2")
    planted.store.rows["cells"].append(stopped)
    planted.store.add(stopped, planted.base[:24] + 2000, planted.tokens[:24], stopped_early=24)
    found = compare(planted.store, "4", "1")
    result = only_result(found)
    assert result.difference.n == 24 and result.difference.p is None and result.verdict is None
    assert "stopped early: on the 24 windows that were measured; no test" in said(found)


# -- seeds, noise, provenance -----------------------------------------------------------------------------------------


def test_shared_seeds_are_paired():
    store = Planted()
    store.replicates("gptq", 0.020, 0.005, start=10)
    store.replicates("awq", 0.024, 0.005, start=20)
    store.cell("30", "rtn", 0.10, seed=None)
    found = only_result(compare(store.store, "10", "20"))
    y = [losses(store, f"{10 + s}" * 8) - losses(store, f"{20 + s}" * 8) for s in range(3)]
    expected = stats.seeds_interval(np.array(y) / 2047)
    assert (found.seeds.value, found.seeds.error) == pytest.approx((expected.value, expected.error), rel=1e-9)
    assert found.seeds.value == pytest.approx(-0.004)
    for one, two in (("10", "30"), ("30", "10")):
        assert only_result(compare(store.store, one, two)).seeds.seeds == 3
    assert "over 3 shared seeds: " in said(compare(store.store, "10", "20"))


def test_the_verdict_over_shared_seeds_is_that_of_the_crossed_interval():
    """One seed is clearly worse on its documents; over three seeds that differ by as much, nothing is shown."""
    store = Planted()
    for seed, away in enumerate((0.02, -0.02, 0.001)):
        store.cell(f"{10 + seed}", "gptq", 0.02 + away + store.noise(0.004), seed=seed)
        store.cell(f"{20 + seed}", "awq", 0.02 + store.noise(0.004), seed=seed)
    result = only_result(compare(store.store, "10", "20", read_option("perplexity=2%")))
    assert result.difference.p < 1e-6 and result.seeds.p > 0.5
    assert result.verdict == "undecided" and result.within_margin is False
    assert "undecided, over 3 shared seeds" in said(compare(store.store, "10", "20"))
    again = only_result(compare(store.store, "20", "10", read_option("perplexity=2%")))
    assert again.verdict == "undecided"


def test_seeds_that_are_not_shared_set_a_floor():
    """As in the report: 2 sigma of alike cells for one cell with a seed, 2 sqrt 2 sigma between two."""
    store = Planted()
    store.replicates("gptq", 0.020, 0.005, start=10)
    store.cell("40", "gptq", 0.034 + store.noise(0.002), seed=0, group_size=128)
    store.cell("50", "rtn", 0.008 + store.noise(0.002), seed=None)
    store.cell("60", "rtn", 0.020 + store.noise(0.002), seed=None, group_size=128)
    for one, two, floor, verdict in (
        ("10", "11", 2 * np.sqrt(2) * 0.005, "undecided"),  # two seeds of one cell, 0.005 apart
        ("40", BASELINE, 2 * 0.005, "worse"),
        ("40", "12", 2 * np.sqrt(2) * 0.005, "undecided"),  # 0.009 apart, seeds 0 and 2
        ("50", "60", None, "better"),
    ):
        result = only_result(compare(store.store, one, two))
        assert result.difference.p < 0.001
        assert result.seed_floor == (None if floor is None else pytest.approx(floor))
        assert (result.verdict, result.below_floor) == (verdict, verdict == "undecided")
    text = said(compare(store.store, "10", "11"))
    assert "noise of seeds 1.4 % (2 sigma of alike cells with several seeds)" in text
    assert "the difference is below the floor: no direction" in text
    assert json.loads(comparison_json(compare(store.store, "40", BASELINE)))["evaluations"][0]["seed_floor"] > 0


def test_one_seed_says_what_the_interval_lacks(planted):
    planted.cell("4", "gptq", 0.02, seed=0)
    assert "1 seed: calibration noise not included" in said(compare(planted.store, "4", "1"))
    assert "calibration noise" not in said(compare(planted.store, "2", "1"))


def test_the_numeric_floor_is_printed_or_said_not_to_be_known(planted):
    assert "numeric floor not known" in said(compare(planted.store, "1", "2"))
    other = cell_row("b" * 16, "baseline", "w16", dtype="float32")
    planted.store.rows["cells"].append(other)
    shifted = planted.base - 0.05 * planted.tokens
    planted.store.add(other, shifted, planted.tokens, eval_id="d" * 16, protocol=PROTOCOL | {"dtype": "float32"})
    result = only_result(compare(planted.store, "1", "2"))
    assert result.numeric.amount == pytest.approx(0.05) and result.verdict == "undecided"


def test_differing_provenance_is_listed(planted):
    for index, host in ((1, "a"), (2, "b")):
        made = {"host": host, "python": "3.11", "command": f"qfarm {host}"}
        planted.store.rows["attempts"][index] = attempt_row(f"{index}" * 16, provenance=json.dumps(made))
    found = compare(planted.store, "1", "2")
    assert found.provenance == ('host "a" against "b"',)
    assert 'host "a" against "b"' in said(found)


# -- names and formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("1", "good w4 g64", "are the same cell, 1111111111111111"),
        ("zz", "1", '"zz" names no cell of this store'),
        ("9", "1", '"9" never finished'),
    ],
)
def test_what_names_no_two_cells_is_refused(planted, first, second, message):
    planted.store.rows["attempts"].append(attempt_row("9" * 16, outcome="oom"))
    with pytest.raises(InvalidInput, match=message):
        compare(planted.store, first, second)


def test_a_label_of_several_cells_is_refused(planted):
    planted.cell("5", "good", 0.0)
    with pytest.raises(InvalidInput, match='"good w4 g64" names 2 cells; cells: 1111'):
        compare(planted.store, "good w4 g64", "2")


def test_json_has_every_digit(planted):
    value = json.loads(comparison_json(compare(planted.store, "1", "2")), parse_constant=pytest.fail)
    (one,) = value["evaluations"]
    result = only_result(compare(planted.store, "1", "2"))
    assert (one["log_ratio"], one["p"]) == (result.difference.delta, result.difference.p)
    assert (one["verdict"], one["numeric_floor"], len(one["largest_documents"])) == ("better", None, 10)
    assert value["first"]["label"] == "good w4 g64"


def test_hostile_names_are_harmless():
    store = hostile_store()
    text = render_comparison(compare(store, RTN, BASELINE), width=80)
    assert "\x1b" not in text and "\u202e" not in text and max(map(len, text.splitlines())) <= 80
    assert "</script>" not in comparison_json(compare(store, RTN, BASELINE)) and HOSTILE not in text


def test_p_values_as_text():
    assert [p_text(p) for p in (0.5, 0.0134, 0.001, 0.0009)] == ["= 0.5", "= 0.013", "= 0.001", "< 0.001"]


def test_the_command(planted, tmp_path, capsys):
    from qfarm.store import Store

    store = Store.open(tmp_path / "store", create=True)
    for cell in planted.store.rows["cells"]:
        store.publish_cell(cell, [])
        mine = {
            name: [row for row in planted.store.rows[name] if row.cell_id == cell.cell_id]
            for name in ("metrics", "documents")
        }
        store.publish_evaluation(cell.cell_id, "e" * 16, cell.attempt_id, mine["metrics"], mine["documents"])
    arguments = ["compare", "good w4 g64", "2", "--store", str(tmp_path / "store")]
    for extra, expected in (([], "better"), (["--format", "json"], '"verdict": "better"')):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *extra, "--margin", "perplexity=1%"])
        assert ended.value.code == 0 and expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--margin", "perplexity=1 point"])
    assert ended.value.code == 2
    assert "a margin of perplexity is written like '1 %', got '1 point'" in capsys.readouterr().err
