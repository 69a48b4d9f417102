"""The report's judgements: stores whose true differences are known by construction in, verdicts out."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qfarm import stats
from qfarm.margin import read_option
from qfarm.record import CellRow
from qfarm.report.render import render
from qfarm.report.tables import load
from tests.report_example import BASELINE, GPTQ, PROTOCOL, RTN, FakeStore, Planted, attempt_row, cell_row, row_of


def only_table(store, margins=None):
    results = load(store, margins)
    assert len(results.tables) == 1
    return results.tables[0]


def rows_by_recipe(table):
    return {row.cell.recipe: row for row in table.rows}


# -- real and not real ------------------------------------------------------------------------------------------------


@pytest.fixture
def planted() -> Planted:
    """`real` is worse by 0.02 nats; `chance` differs on every window, and by nothing on average."""
    store = Planted()
    store.cell("1", "real", 0.02 + store.noise(0.02))
    store.cell("2", "chance", store.noise(0.02))
    return store


def test_a_real_difference_is_called_real_and_chance_is_not(planted):
    rows = rows_by_recipe(only_table(planted.store))
    real, chance = rows["real"], rows["chance"]
    assert real.difference.delta == pytest.approx(0.02) and chance.difference.delta == pytest.approx(0, abs=1e-12)
    assert (real.verdict, real.mark) == ("worse", "**")
    assert (chance.verdict, chance.mark) == ("undecided", "")
    text = render(load(planted.store), width=80)
    assert next(line for line in text.splitlines() if line.startswith("real")).count("%**") == 1
    assert next(line for line in text.splitlines() if line.startswith("chance")).count("*") == 0
    assert "1 of 2 with unadjusted p below 0.05; 0.1 expected by chance" in text
    assert max(map(len, text.splitlines())) <= 80


def test_verdicts_are_in_json_and_csv(planted):
    value = json.loads(render(load(planted.store), "json"))
    (table,) = value["tables"]
    assert [row["verdict"] for row in table["rows"]] == [None, "undecided", "worse"]
    assert table["family"] == {"adjusted": 2, "tested": 2, "below": 1, "expected": 0.1}
    chance = table["rows"][1]
    assert chance["detectable"] == pytest.approx(2.8 * chance["log_ratio_standard_error"])
    lines = list(csv.DictReader(io.StringIO(render(load(planted.store), "csv"))))
    assert [line["verdict"] for line in lines] == ["", "undecided", "worse"]


def test_the_filter_keeps_the_family_of_the_whole_table(planted):
    text = render(load(planted.store), width=120, recipe="chance")
    assert "1 of 2 with unadjusted p below 0.05" in text


def test_screening_is_benjamini_hochberg_over_the_table(planted):
    rows = [row for row in only_table(planted.store).rows if row.difference]
    expected = scipy_stats.false_discovery_control([row.difference.p for row in rows])
    assert [row.screened_p for row in rows] == pytest.approx(list(expected))


def test_the_margin_of_the_command_line_finds_equivalence(planted):
    table = only_table(planted.store, read_option("perplexity=1%"))
    rows = rows_by_recipe(table)
    assert rows["chance"].verdict == "within margin" and rows["chance"].mark == "="
    assert (rows["real"].verdict, rows["real"].mark) == ("worse", "**")
    wide = rows_by_recipe(only_table(planted.store, read_option("perplexity=5%")))
    assert (wide["real"].verdict, wide["real"].mark, wide["real"].within_margin) == ("worse", "**=", True)
    text = render(load(planted.store, read_option("perplexity=1%")), width=80)
    assert "= within 1 % of the baseline" in text and "%  =" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_cells_that_are_not_worse_by_the_margin_are_named(planted):
    planted.cell("3", "finer", -0.05 + planted.noise(0.01))
    margins = read_option("perplexity=1%")
    table = only_table(planted.store, margins)
    rows = rows_by_recipe(table)
    raw = [rows[name].difference.non_inferior_p(np.log1p(0.01)) for name in ("chance", "real", "finer")]
    adjusted = [rows[name].non_inferior_p for name in ("chance", "real", "finer")]
    assert adjusted == pytest.approx(list(stats.holm(raw)))
    assert [rows[name].non_inferior for name in ("chance", "real", "finer")] == [True, False, True]
    assert rows["finer"].mark == "**"  # not within: better by more than the margin
    text = " ".join(render(load(planted.store, margins), width=80).split())
    assert "not worse by 1 % or more (one-sided, Holm over 3 cells): chance w4 g64, finer w4 g64" in text


@pytest.mark.parametrize(("windows", "said"), [(30, True), (60, False)])
def test_strong_skew_of_few_clusters_is_said(windows, said):
    store = Planted(windows=windows)
    spike = store.noise(0.001)
    spike[3] += 1.0
    store.cell("1", "odd", spike)
    difference = rows_by_recipe(only_table(store.store))["odd"].difference
    assert stats.count_skewed([difference] * 2) == 2 * said and scipy_stats.skew(difference.influence) > 2
    text = " ".join(render(load(store.store), width=80).split())
    assert ("intervals of 1 row may be too narrow: few clusters, strongly skewed" in text) is said


def test_the_floor_of_kl_stands_in_the_caption_and_names_who_is_below(planted):
    metrics = planted.store.rows["metrics"]
    for cell, figures in ((BASELINE, {"kl_floor": 0.001, "flips_floor": 0.02}), ("1" * 16, {"kl": 0.0019})):
        like = next(row for row in metrics if row.cell_id == cell)
        units = {"kl_floor": "nats per token", "kl": "nats per token"}
        for name, value in figures.items():
            unit = units.get(name, "fraction of tokens")
            metrics.append(dataclasses.replace(like, metric=name, value=value, unit=unit, n=3))
    metrics.append(dataclasses.replace(metrics[-1], cell_id="2" * 16, value=0.0021))
    text = " ".join(render(load(planted.store), width=80).split())
    assert (
        "numeric floor: KL 0.00100, flips 2.00 % (the baseline against itself, 3 windows read in another shape of the "
        "forward pass); below twice that, and not to be ranked by KL: real w4 g64 " in text
    )
    assert "kl_floor" not in render(load(planted.store), width=300)


def test_margins_are_found_in_the_provenance_and_the_narrowest_counts(planted):
    def with_margins(*margins):
        planted.store.rows["attempts"] = [
            attempt_row(cell.cell_id, provenance=json.dumps({"margin": {"perplexity": text}} if text else {}))
            for cell, text in zip(planted.store.rows["cells"], margins, strict=True)
        ]
        return only_table(planted.store)

    assert with_margins(None, None, None).margin is None
    assert with_margins(None, "2 %", "2 %").margin.text == "2 %"
    table = with_margins("1 %", "2 %", None)
    assert table.margin.text == "1 %"
    assert "jobs gave several margins (1 %, 2 %): the narrowest is used" in table.remarks
    assert only_table(planted.store, read_option("perplexity=3%")).margin.text == "3 %"


def test_equivalence_is_adjusted_over_the_table(planted):
    margin = np.log(1.01)
    rows = [row for row in only_table(planted.store, read_option("perplexity=1%")).rows if row.difference]
    raw = [row.difference.equivalence_p(margin) for row in rows]
    assert [row.margin_p for row in rows] == pytest.approx(list(stats.holm(raw)))


def test_cells_tied_with_the_best_share_a_bar_and_the_dominated_are_named():
    store = Planted()
    shared = store.noise(0.02)
    store.cell("1", "best", 0.02 + shared + store.noise(0.004), linear_bits=4.2)
    store.cell("2", "tied", 0.02 + shared + store.noise(0.004), linear_bits=4.3)
    store.cell("3", "worse", 0.04 + shared + store.noise(0.004), linear_bits=4.25)
    store.cell("4", "small", 0.04 + shared + store.noise(0.004), linear_bits=3.1)
    table = only_table(store.store)
    assert {row.cell.recipe: row.best for row in table.rows if row.best is not None} == {
        **{"best": True, "tied": True},
        **{"worse": False, "small": False},
    }
    fronts = {row.cell.recipe: row.front for row in table.rows if row.front}
    assert fronts["worse"] == "dominated" and fronts["small"] == "front"
    assert fronts["best"] != "dominated" and fronts["tied"] != "dominated"
    text = render(load(store.store), width=200)
    assert "not shown worse than the best (|): best w4 g64, tied w4 g64; no claim that these are equal" in text
    assert sum(" | " in line for line in text.splitlines()) == 2


@pytest.mark.parametrize(
    ("cheaper", "dearer", "kv_bits"),
    [("w4kv2", "w4kv4", (2.5, 4.5)), ("w4kv2", "w4kv4", (None, None)), ("w4a8", "w4", (None, None))],
)
def test_a_cell_with_fewer_bits_elsewhere_is_not_dominated(cheaper, dearer, kv_bits):
    """The same bits per weight: what the scheme saves at the cache or at linear inputs counts as well."""
    store = Planted()
    store.cell("1", "less", 0.10 + store.noise(0.004), scheme=cheaper, kv_bits=kv_bits[0])
    store.cell("2", "more", 0.02 + store.noise(0.004), scheme=dearer, kv_bits=kv_bits[1])
    store.cell("3", "worst", 0.20 + store.noise(0.004), scheme=dearer, kv_bits=kv_bits[1])
    fronts = {row.cell.recipe: row.front for row in only_table(store.store).rows if row.front}
    assert fronts == {"less": "front", "more": "front", "worst": "dominated"}


def test_of_two_caches_of_one_width_the_one_with_less_metadata_is_cheaper():
    store = Planted()
    store.cell("1", "less", 0.10 + store.noise(0.004), scheme="w4kv2", kv_bits=2.25)
    store.cell("2", "more", 0.02 + store.noise(0.004), scheme="w4kv2", kv_bits=2.5)
    assert {row.cell.recipe: row.front for row in only_table(store.store).rows if row.front} == {
        **{"less": "front", "more": "front"},
    }


def test_rows_on_fewer_documents_have_no_place(planted):
    planted.cell("3", "third", 0.01 + planted.noise(0.02))
    planted.store.rows["documents"] = [
        row for row in planted.store.rows["documents"] if not (row.cell_id == "2" * 16 and row.window == 5)
    ]
    table = only_table(planted.store)
    rows = rows_by_recipe(table)
    assert rows["chance"].best is None and rows["real"].best is False and rows["third"].best is True
    assert "1 row without a place" in " ".join(render(load(planted.store), width=80).split())


# -- seeds ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def seeded() -> Planted:
    """Two recipes with three seeds each, whose means differ by 0.004 nats; their seeds' means by 0.005."""
    store = Planted()
    store.replicates("gptq", 0.020, 0.005, start=10)
    store.replicates("awq", 0.024, 0.005, start=20)
    store.cell("30", "rtn", 0.10 + store.noise(0.02), seed=None)
    return store


def test_three_seeds_show_a_noise_floor_and_nothing_is_ranked_below_it(seeded):
    table = only_table(seeded.store)
    noise = table.noise.seeds
    assert noise["gptq", "w4"].sigma == pytest.approx(0.005) and noise["gptq", "w4"].df == 2
    assert {row.cell.recipe for row in table.rows if row.best} == {"gptq", "awq"}
    text = " ".join(render(load(seeded.store), width=80).split())
    floor = 100 * np.expm1(2 * np.sqrt(2) * 0.005)
    assert f"noise floor {floor:.1f} %, the largest of: seeds {floor:.1f} %" in text
    detectable = np.median([row.difference.detectable for row in table.rows if row.difference])
    assert f"detectable: {100 * np.expm1(detectable):.2f} % (2.8 standard errors, median row)" in text
    assert "each row is one seed: calibration noise not included" in text


def test_without_the_noise_of_seeds_the_same_cells_would_be_ranked():
    """One seed each of the same two recipes: the interval is of these checkpoints, and they do differ."""
    store = Planted()
    store.cell("10", "gptq", 0.020 + store.noise(0.004), seed=0)
    store.cell("20", "awq", 0.024 + store.noise(0.004), seed=0)
    table = only_table(store.store)
    assert {row.cell.recipe for row in table.rows if row.best} == {"gptq"}
    assert "1 seed: calibration noise not included" in " ".join(render(load(store.store), width=80).split())


def test_replicates_have_the_crossed_interval(seeded):
    table = only_table(seeded.store)
    group = next(group for group in table.replicates if group.first.cell.recipe == "gptq")
    assert [row.cell.seed for row in group.rows] == [0, 1, 2]
    y = np.array([_losses(seeded, row.cell) for row in group.rows])
    expected = stats.seeds_interval(y)
    assert group.difference.value == pytest.approx(0.02)
    assert group.difference.error == pytest.approx(expected.error)
    assert group.difference.spread == pytest.approx(0.005)
    assert group.values["perplexity"] == pytest.approx(np.mean([row.metrics["perplexity"].value for row in group.rows]))
    # Wider than what one checkpoint's documents say.
    low, high = group.difference.interval()[1:]
    assert high - low > 1.5 * (group.first.difference.high - group.first.difference.low)


def test_seeds_that_measured_something_else_are_not_averaged(seeded):
    """Stopped early, or without some documents: a mean over such seeds is of no text at all."""
    seeded.store.rows["metrics"] = [
        dataclasses.replace(row, stopped_early=24) if row.cell_id == "11" * 8 else row
        for row in seeded.store.rows["metrics"]
    ]
    seeded.store.rows["documents"] = [
        row for row in seeded.store.rows["documents"] if not (row.cell_id == "22" * 8 and row.window == 5)
    ]
    table = only_table(seeded.store)
    assert [(group.values, group.difference) for group in table.replicates] == [({}, None)] * 2
    text = " ".join(render(load(seeded.store), width=80).split())
    said = "not averaged over seeds: stopped early or not on all documents with seed"
    assert f"gptq w4 g64: {said} 1" in text and f"awq w4 g64: {said} 2" in text
    (data,) = json.loads(render(load(seeded.store), "json"))["tables"]
    assert [(group["metrics"], group["change"]) for group in data["over_seeds"]] == [({}, None)] * 2
    assert all(group["remark"].startswith(said) for group in data["over_seeds"])


def test_seeds_without_anything_to_pair_are_averaged_where_they_count_as_much():
    store = FakeStore()
    for seed, n in ((0, 5), (1, 5)):
        cell = cell_row(f"{seed}" * 16, "gptq", "w4", seed=seed)
        cell = dataclasses.replace(cell, spec=json.dumps({"seed": seed}))
        store.rows["cells"].append(cell)
        store.add(cell, [], [], label="needle", metrics={"found": 0.5 + seed / 10})
        store.rows["metrics"][-1] = dataclasses.replace(store.rows["metrics"][-1], n=n)
    (group,) = only_table(store).replicates
    assert group.values == {"found": pytest.approx(0.55)} and group.remark == ""
    store.rows["metrics"][-1] = dataclasses.replace(store.rows["metrics"][-1], n=4)
    (group,) = only_table(store).replicates
    assert group.values == {} and group.remark.endswith("with seed 1")


def _losses(planted: Planted, cell: CellRow) -> np.ndarray:
    """Nats per token above the baseline's [window]."""
    rows = [row for row in planted.store.rows["documents"] if row.cell_id == cell.cell_id]
    return (np.array([row.loss for row in rows]) - planted.base) / planted.tokens


def test_filters_hold_over_seeds_too(seeded):
    data = json.loads(render(load(seeded.store), "json", recipe="awq"))["tables"][0]
    assert [group["recipe"] for group in data["over_seeds"]] == ["awq"]


@pytest.mark.parametrize("width", [80, 200])
def test_rows_over_seeds_fit_and_say_how_many(seeded, width):
    text = render(load(seeded.store), width=width)
    assert max(map(len, text.splitlines())) <= width
    lines = text.splitlines()
    start = lines.index("over seeds: means, and intervals for other calibration samples and other text")
    assert lines[start + 1].split()[:4] == ["recipe", "bits", "group", "seeds"]
    assert lines[start + 2].split()[:4] == ["awq", "w4", "64", "3"]
    markdown = render(load(seeded.store), "markdown")
    assert "| awq | w4 | 64 | 3 |" in markdown
    data = json.loads(render(load(seeded.store), "json"))["tables"][0]
    assert [len(group["cell_ids"]) for group in data["over_seeds"]] == [3, 3]
    assert data["noise"]["seeds"][0]["df"] == 2


def test_a_one_seed_row_gets_a_second_interval_from_alike_cells(seeded):
    seeded.cell("40", "gptq", 0.02 + seeded.noise(0.02), seed=0, group_size=128)
    table = only_table(seeded.store)
    row = next(row for row in table.rows if row.cell.group_size == 128)
    found, noise = row.difference, table.noise.seeds["gptq", "w4"]
    assert row.with_seeds == stats.with_seed_noise(found.delta, found.standard_error, found.df, noise)
    assert row.with_seeds.high > found.high
    assert all(row.with_seeds is None for row in table.rows if row.cell.group_size != 128)
    assert "with seed noise" in render(load(seeded.store), width=200)


def test_a_difference_within_the_noise_of_seeds_gets_no_mark(seeded):
    seeded.cell("40", "gptq", 0.008 + seeded.noise(0.004), seed=0, group_size=128)
    row = next(row for row in only_table(seeded.store).rows if row.cell.group_size == 128)
    assert row.adjusted_p < 0.001 and row.noise_floor == pytest.approx(2 * 0.005)
    assert (row.verdict, row.mark) == ("undecided", "")


# -- numeric floor and devices ----------------------------------------------------------------------------------------


def test_the_numeric_floor_is_that_between_baselines_in_two_dtypes(planted):
    assert "arithmetic not known" in " ".join(render(load(planted.store), width=80).split())
    other = cell_row("b" * 16, "baseline", "w16", dtype="float32")
    planted.store.rows["cells"].append(other)
    shifted = planted.base - 0.003 * planted.tokens
    planted.store.add(other, shifted, planted.tokens, eval_id="d" * 16, protocol=PROTOCOL | {"dtype": "float32"})
    table = next(table for table in load(planted.store).tables if table.protocol["dtype"] == "bfloat16")
    assert table.noise.numeric == pytest.approx(0.003)
    assert table.noise.numeric_source == "baseline in bfloat16 against float32"
    assert rows_by_recipe(table)["real"].mark == "**"


def test_below_the_numeric_floor_nothing_is_worse(planted):
    planted.cell("3", "slight", 0.002 + planted.noise(0.002))
    assert rows_by_recipe(only_table(planted.store))["slight"].verdict == "worse"
    other = cell_row("b" * 16, "baseline", "w16", dtype="float32")
    planted.store.rows["cells"].append(other)
    shifted = planted.base - 0.003 * planted.tokens
    planted.store.add(other, shifted, planted.tokens, eval_id="d" * 16, protocol=PROTOCOL | {"dtype": "float32"})
    table = next(table for table in load(planted.store).tables if table.protocol["dtype"] == "bfloat16")
    assert (rows_by_recipe(table)["slight"].verdict, rows_by_recipe(table)["slight"].mark) == ("undecided", "")
    assert rows_by_recipe(table)["chance"].best and rows_by_recipe(table)["slight"].best


def test_cells_closer_than_the_numeric_floor_are_not_ranked(planted):
    planted.cell("3", "near", 0.0100 + planted.noise(0.001))
    planted.cell("4", "next", 0.0120 + planted.noise(0.001))
    planted.cell("5", "far", 0.0150 + planted.noise(0.001))
    rows = rows_by_recipe(only_table(planted.store))
    assert [rows[name].best for name in ("near", "next", "far")] == [False, False, False]  # `chance` is the best

    def best_with_floor(amount):
        other = cell_row("b" * 16, "baseline", "w16", dtype="float32")
        planted.store.rows["cells"].append(other)
        shifted = planted.base - amount * planted.tokens
        planted.store.add(other, shifted, planted.tokens, eval_id="d" * 16, protocol=PROTOCOL | {"dtype": "float32"})
        tables = load(planted.store).tables
        rows = rows_by_recipe(next(table for table in tables if table.protocol["dtype"] == "bfloat16"))
        return [name for name in ("near", "next", "far") if rows[name].best]

    assert best_with_floor(0.0130) == ["near", "next"]


def test_flips_of_items_have_the_floor_of_another_dtype():
    """Of 1,000 items 30 flip between bfloat16 and float32: 50 flips are below twice that, 80 are not."""
    store = accuracy_store(lost=60, gained=20)
    base = np.array([row.correct for row in store.rows["documents"] if row.cell_id == BASELINE])
    protocol = {"evaluator": "tasks", "dtype": "bfloat16"}
    store.rows["metrics"] = [dataclasses.replace(row, protocol=json.dumps(protocol)) for row in store.rows["metrics"]]
    assert only_table(store).noise.numeric_flips is None
    few = base.copy()
    few[:50] = 1 - few[:50]
    other = base.copy()
    other[:20], other[-10:] = 1 - other[:20], 1 - other[-10:]
    for cell, right, eval_id, dtype in (
        (cell_row(GPTQ, "gptq", "w4"), few, "a" * 16, "bfloat16"),
        (cell_row("b" * 16, "baseline", "w16", dtype="float32"), other, "c" * 16, "float32"),
    ):
        store.rows["cells"].append(cell)
        store.add_items(cell, right, eval_id=eval_id, protocol=protocol | {"dtype": dtype})
    results = load(store)
    table = next(table for table in results.tables if table.protocol["dtype"] == "bfloat16")
    assert (table.noise.numeric_flips, table.noise.numeric) == (pytest.approx(0.03), pytest.approx(0.01))
    said = "numeric floor of flips: 3.00 % of items (baseline in bfloat16 against float32); below twice that, which is "
    assert f"{said}no evidence against a cell: gptq w4 g64 " in " ".join(render(results, width=80).split())


@pytest.mark.parametrize(("chunk", "said"), [(None, "KV prefill quantized"), (16, "KV prefill windowed, chunks of 16")])
def test_how_a_quantized_cache_is_read_is_shown(planted, chunk, said):
    kv = {"prefill": "quantized" if chunk is None else "windowed", "chunk": chunk}
    protocol = json.dumps(PROTOCOL | {"kv": kv})
    planted.store.rows["metrics"] = [
        dataclasses.replace(row, protocol=protocol) for row in planted.store.rows["metrics"]
    ]
    text = render(load(planted.store), width=120)
    assert text.splitlines()[0].endswith(f" · {said}") and "; perplexity" not in text.splitlines()[0]
    assert text.count(said) == 2  # title and caption
    line = next(csv.DictReader(io.StringIO(render(load(planted.store), "csv"))))
    assert (line["kv_prefill"], line["kv_chunk"]) == (kv["prefill"], str(chunk or ""))


def test_a_change_beside_a_perplexity_by_word_says_that_it_is_per_token(planted):
    assert " change " in render(load(planted.store), width=200).splitlines()[1]
    planted.store.rows["metrics"] = [
        dataclasses.replace(row, metric="word_perplexity") for row in planted.store.rows["metrics"]
    ]
    assert " change per token " in render(load(planted.store), width=200).splitlines()[1]


def test_rows_of_another_device_say_so(planted):
    planted.store.rows["attempts"][1] = attempt_row("1" * 16, provenance='{"gpu": "NVIDIA H100"}')
    (remark,) = only_table(planted.store).remarks
    assert remark.startswith("1 row measured on NVIDIA H100, the baseline on CPU")


# -- stopped early ----------------------------------------------------------------------------------------------------


def test_a_stopped_cell_is_shown_but_neither_tested_nor_ranked(planted):
    stopped = cell_row("3" * 16, "hopeless", "w2")
    planted.store.rows["cells"].append(stopped)
    seen = planted.base[:24] + planted.tokens[:24] * (1 + planted.noise(0.1)[:24])
    planted.store.add(stopped, seen, planted.tokens[:24], stopped_early=24)
    table = only_table(planted.store)
    row = rows_by_recipe(table)["hopeless"]
    assert row.difference.delta == pytest.approx((seen - planted.base[:24]).sum() / planted.tokens[:24].sum())
    assert (row.difference.p, row.difference.low, row.adjusted_p, row.best, row.front) == (None,) * 5
    assert row.verdict is None and len(table.tested) == 2
    text = " ".join(render(load(planted.store), width=80).split())
    assert "hopeless w2: stopped early, on 24 of 141 windows: not ranked" in text
    assert "1 of 2 with unadjusted p below 0.05" in text


# -- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy_store(lost=60, gained=20, n=1000, **options) -> FakeStore:
    store = FakeStore()
    base, cell = cell_row(BASELINE, "baseline", "w16"), cell_row(RTN, "rtn", "w4")
    store.rows["cells"] += [base, cell]
    store.rows["attempts"] += [attempt_row(one.cell_id) for one in (base, cell)]
    before = np.arange(n) < n // 2 + lost
    after = before.copy()
    after[:lost] = False
    after[n - gained :] = True
    store.add_items(base, before, **options)
    store.add_items(cell, after, **options)
    return store


def test_accuracy_changes_in_points_with_mid_p():
    store = accuracy_store()
    table = only_table(store)
    found = rows_by_recipe(table)["rtn"].difference
    assert (found.lost, found.gained, found.n, found.unit) == (60, 20, 1000, "points")
    assert found.shown.value == pytest.approx(-4.0)
    assert (found.p, found.exact_p) == (stats.mid_p(60, 20), stats.exact_p(60, 20))
    assert rows_by_recipe(table)["rtn"].verdict == "worse"
    text = render(load(store), width=120)
    line = next(line for line in text.splitlines() if line.startswith("rtn"))
    assert "-4.0**" in line and "%" not in line.split("-4.0**")[1].split("]")[0]
    heading = " ".join(text.splitlines()[1].split())
    assert "acc points 95 % interval" in heading and "flips lost gained" in heading
    row = json.loads(render(load(store), "json"))["tables"][0]["rows"][1]
    assert (row["change_points"], row["items_lost"], row["items_gained"]) == (pytest.approx(-4), 60, 20)
    assert row["change_percent"] is None and row["log_ratio"] is None and row["test"] == "McNemar mid-p"


def test_items_that_share_a_passage_are_clustered():
    found = rows_by_recipe(only_table(accuracy_store(clusters=np.arange(1000) // 4)))["rtn"].difference
    assert (found.test, found.clusters, found.n, found.exact_p) == ("t over clusters", 250, 1000, None)


@pytest.mark.parametrize("weights", ["plain", "size"])
def test_a_mean_over_tasks_has_the_weights_of_what_is_stored(weights):
    tasks = np.repeat(["a", "b"], [200, 800])
    store = accuracy_store(tasks=tasks)
    right = {
        cell_id: np.array([row.correct for row in store.rows["documents"] if row.cell_id == cell_id])
        for cell_id in (BASELINE, RTN)
    }
    means = {
        cell_id: np.mean([x[:200].mean(), x[200:].mean()]) if weights == "plain" else x.mean()
        for cell_id, x in right.items()
    }
    store.rows["metrics"] = [dataclasses.replace(row, value=means[row.cell_id]) for row in store.rows["metrics"]]
    found = rows_by_recipe(only_table(store))["rtn"].difference
    assert found.delta == pytest.approx(means[RTN] - means[BASELINE], abs=1e-12)
    assert found.test == "t over tasks"
    d = right[RTN] - right[BASELINE]
    shares = [0.5, 0.5] if weights == "plain" else [0.2, 0.8]
    variance = sum(w**2 * x.var(ddof=1) / x.size for w, x in zip(shares, (d[:200], d[200:]), strict=True))
    assert found.standard_error == pytest.approx(np.sqrt(variance))


def test_one_item_in_two_tasks_is_two_and_one_that_stands_twice_counts_twice():
    store = accuracy_store()
    store.rows["documents"] += [dataclasses.replace(row) for row in store.rows["documents"] if row.document == "item 0"]
    named_metrics(store, {"acc": 1001})
    found = rows_by_recipe(only_table(store))["rtn"].difference
    assert (found.n, found.lost, found.clusters) == (1001, 61, 1000)
    again = next(i for i, row in enumerate(store.rows["documents"]) if row.cell_id == RTN and row.document == "item 0")
    store.rows["documents"][again] = dataclasses.replace(store.rows["documents"][again], correct=1)
    assert rows_by_recipe(only_table(store))["rtn"].difference.lost == 60
    tasked = named_metrics(accuracy_store(tasks=["a"] * 1000), {"acc": 1001})
    tasked.rows["documents"] += [
        dataclasses.replace(row, task="b") for row in tasked.rows["documents"] if row.document == "item 0"
    ]
    assert rows_by_recipe(only_table(tasked))["rtn"].difference.n == 1001


def named_metrics(store: FakeStore, names) -> FakeStore:
    """The stored metric of each cell under other names, with the number of items behind each."""
    store.rows["metrics"] = [
        dataclasses.replace(row, metric=name, n=n) for row in store.rows["metrics"] for name, n in names.items()
    ]
    return store


def test_tasks_without_a_mean_have_no_common_difference():
    """A tag such as `truthfulqa`: the unnamed mean of bleu_acc and acc is a number that no column shows."""
    tasks = np.repeat(["gen", "mc1"], [200, 800])
    store = named_metrics(accuracy_store(tasks=tasks), {"gen bleu_acc": 200, "mc1 acc": 800})
    table = only_table(store)
    assert [(row.difference, row.remark) for row in table.rows] == [(None, "")] * 2
    said = "no mean over these tasks is stored, so they have no common difference: `qfarm compare` has one for each"
    assert table.remarks == (said,) and " ".join(render(load(store), width=80).split()).count(said) == 1
    assert "gen bleu_acc" in render(load(store), width=200)


def test_only_tasks_with_the_metric_of_the_mean_are_paired():
    """A group whose mean is of acc, with a member that is judged by exact_match: lost items of `b` only."""
    tasks = np.repeat(["a", "b"], [500, 500])
    names = {"acc": 500, "a exact_match": 500, "b acc": 500}
    store = named_metrics(accuracy_store(lost=60, gained=20, tasks=tasks), names)
    found = rows_by_recipe(only_table(store))["rtn"].difference
    assert (found.n, found.lost, found.gained) == (500, 0, 20)  # the 60 lost are of `a`


def test_a_mean_of_other_items_than_the_ledger_holds_is_refused():
    """Suites of many tasks store no single ones: then their counts must agree."""
    store = named_metrics(accuracy_store(tasks=np.repeat(["a", "b"], 500)), {"acc": 900})
    row = rows_by_recipe(only_table(store))["rtn"]
    said = "not compared: the stored accuracy is of 900 items, right or wrong are 1,000"
    assert (row.difference, row.remark) == (None, said)


def test_changed_answers_stand_beside_lost_and_gained():
    """From wrong to another wrong counts: 80 flips and 15 more."""
    store = accuracy_store(lost=60, gained=20)
    assert "answers" not in render(load(store), width=200).splitlines()[1]
    before = [row.correct for row in store.rows["documents"] if row.cell_id == BASELINE]
    wrong = np.flatnonzero(np.array(before) == 0)[:15]
    answers = {
        cell_id: [
            "0" if right else "1" for right in (r.correct for r in store.rows["documents"] if r.cell_id == cell_id)
        ]
        for cell_id in (BASELINE, RTN)
    }
    for i in wrong:
        answers[RTN][i] = "2"
    given = {cell_id: iter(found) for cell_id, found in answers.items()}
    store.rows["documents"] = [
        dataclasses.replace(row, answer=next(given[row.cell_id])) for row in store.rows["documents"]
    ]
    row = rows_by_recipe(only_table(store))["rtn"]
    assert row.answers_changed == 60 + 20 + 15
    assert "flips lost gained answers" in " ".join(render(load(store), width=200).splitlines()[1].split())
    assert json.loads(render(load(store), "json"))["tables"][0]["rows"][1]["answers_changed"] == 95


def test_an_item_without_an_answer_is_refused():
    store = accuracy_store()
    store.rows["documents"][-1] = dataclasses.replace(store.rows["documents"][-1], correct=None)
    row = row_of(load(store), RTN)
    assert (row.difference, row.remark) == (None, "not compared: the answer of 1 of 1000 items is missing")


def test_accuracy_has_its_own_margin():
    store = accuracy_store(lost=21, gained=20, n=5000)
    margins = read_option("perplexity=1%,accuracy=1 point")
    row = rows_by_recipe(only_table(store, margins))["rtn"]
    assert (row.verdict, row.mark) == ("within margin", "=")
    assert "= within 1 point of the baseline" in render(load(store, margins), width=120)


def test_the_best_in_accuracy_is_the_most_accurate():
    store = accuracy_store()
    better = cell_row(GPTQ, "gptq", "w4")
    store.rows["cells"].append(better)
    base = [row.correct for row in store.rows["documents"] if row.cell_id == BASELINE]
    store.add_items(better, np.array(base))
    rows = rows_by_recipe(only_table(store))
    assert rows["gptq"].difference.identical and rows["gptq"].verdict == "identical"
    assert "no flips" in render(load(store), width=80)
    assert (rows["gptq"].best, rows["rtn"].best) == (True, False)


def test_four_changed_items_beat_nobody():
    """mid-p of 4 lost and 0 gained is 0.0625, and below ten changed items there is no test at all."""
    store, n = FakeStore(), 1267
    before = np.arange(n) < 800
    worse, clearly = before.copy(), before.copy()
    worse[:4] = False
    clearly[:60] = False
    for cell_id, recipe, right in (("1", "same", before), ("2", "four", worse), ("3", "sixty", clearly)):
        cell = cell_row(cell_id * 16, recipe, "w4")
        store.rows["cells"].append(cell)
        store.add_items(cell, right)
    store.rows["cells"].append(cell_row(BASELINE, "baseline", "w16"))
    store.add_items(store.rows["cells"][-1], before)
    rows = rows_by_recipe(only_table(store))
    assert {name: row.best for name, row in rows.items() if name != "baseline"} == {
        **{"same": True, "four": True},
        **{"sixty": False},
    }
    assert rows["four"].front == "undecided" and rows["sixty"].front == "dominated"


def test_the_headline_leads_and_single_tasks_follow_where_there_is_room():
    store = accuracy_store(tasks=np.repeat(["a", "b"], 500))
    extra = [
        dataclasses.replace(row, metric=name, value=0.5, n=n)
        for row in store.rows["metrics"]
        for name, n in (("a acc", 500), ("a acc_norm", 500), ("scored_tokens", 10**6))
    ]
    store.rows["metrics"] += extra
    narrow, wide = (render(load(store), width=width) for width in (80, 200))
    assert "acc points" in " ".join(narrow.splitlines()[1].split()) and "a acc" not in narrow
    assert "a acc a acc_norm scored_tokens" in " ".join(wide.splitlines()[1].split())
    assert "1,000 items" in narrow  # not the tokens of some other metric


def test_the_filter_that_decides_right_and_wrong_is_the_headline():
    store = accuracy_store()
    store.rows["metrics"] = [
        dataclasses.replace(row, metric=f"exact_match,{name}", value=value)
        for row in store.rows["metrics"]
        for name, value in (("strict-match", row.value), ("flexible-extract", 0.99))
    ]
    assert "exact_match,strict-match" in render(load(store), width=80).splitlines()[1]


@pytest.mark.parametrize("metric", ["exact_match,strict-match", "a acc"])
def test_what_is_right_or_wrong_is_known_by_any_of_its_metrics(metric):
    store = accuracy_store()
    store.rows["metrics"] = [dataclasses.replace(row, metric=metric) for row in store.rows["metrics"]]
    assert only_table(store).measure == "accuracy" and row_of(load(store), RTN).difference.lost == 60
