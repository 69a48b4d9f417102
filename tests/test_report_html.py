"""The HTML report: what the page says and draws, and what foreign text cannot do in it."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re

import pytest

from qfarm.record import LayerRow
from qfarm.report.charts import COLOURS, SHAPES
from qfarm.report.drawn import MARKS, _place_names, of_table
from qfarm.report.drawn_parts import of_tasks
from qfarm.report.html import bundle, island, to_html
from qfarm.report.page import ROWS_OPEN, page_of
from qfarm.report.tables import load
from tests.report_example import (
    BASELINE,
    FAILED,
    GPTQ,
    HOSTILE,
    RTN,
    FakeStore,
    Planted,
    attempt_row,
    cell_row,
    example,
    hostile_store,
)

WRITTEN = "2026-11-27T12:00:00+00:00"
VOID = {"meta", "br", "link"}


class Parsed(html.parser.HTMLParser):
    """Elements in order, the text outside scripts and styles, and whether every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.text = [], [], [], ""
        self.attributes = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


def page(store) -> str:
    return to_html(load(store), store, written=WRITTEN)


def without_library(text: str) -> str:
    return text.replace(bundle(), "")


def planted() -> Planted:
    """A front of two, one dominated, a sweep of three values, three seeds."""
    made = Planted()
    made.cell("11", "gptq", made.noise(0.01) + 0.02)
    made.cell("22", "rtn", made.noise(0.01) + 0.30, linear_bits=4.5)
    made.cell("33", "gptq", made.noise(0.01) + 0.001, scheme="w8", linear_bits=8.25)
    for index, alpha in enumerate((0.3, 0.5, 0.7)):
        made.cell(
            f"4{index}",
            "smooth",
            made.noise(0.01) + 0.05 + 0.1 * alpha,
            options={"alpha": alpha},
            variant=f"alpha={alpha}",
        )
    made.replicates("spqr", 0.05, 0.01, start=50)
    return made


def test_the_page_is_whole_and_names_every_cell() -> None:
    made = planted()
    text = page(made.store)
    parsed = Parsed(text)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids))
    for cell in made.store.rows["cells"]:
        assert any(name.endswith(cell.cell_id) for name in parsed.ids)
    assert dict(parsed.attributes)["lang"] == "en"
    assert "Size against quality" in parsed.text and "Change of perplexity in percent" in parsed.text
    assert "protocol" in parsed.text and "141 windows, 141 clusters" in parsed.text


def test_two_runs_give_the_same_bytes_and_the_order_in_the_store_changes_none() -> None:
    store = planted().store
    before = page(store)
    assert page(store) == before
    for rows in store.rows.values():
        rows.reverse()
    assert page(store) == before


def test_nothing_is_asked_of_a_network() -> None:
    text = without_library(page(planted().store))
    parsed = Parsed(text)
    policy = next(value for name, value in parsed.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none';") and "unsafe-eval" not in policy
    assert not re.search(r"https?://|@import|url\(|\bsrc=|<link", text)
    assert all(value.startswith("#") for name, value in parsed.attributes if name == "href")
    anchors = {f"#{name}" for name in parsed.ids}
    assert {value for name, value in parsed.attributes if name == "href"} <= anchors
    assert len(text) < 300_000


def test_foreign_text_is_only_text() -> None:
    store = hostile_store()
    evil = "</script><script>document.title='PWNED'</script><img src=x onerror=alert(1)>"
    store.rows["cells"] = [dataclasses.replace(cell, model=evil) for cell in store.rows["cells"]]
    failed = attempt_row(FAILED, outcome=evil, stage=evil, error=evil, traceback=f"Traceback\n  {evil}", job=evil)
    store.rows["attempts"][3] = failed
    text = page(store)
    parsed = Parsed(text)
    assert parsed.open == []
    assert parsed.tags.count("script") == 3 and "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "document.title='PWNED'" in parsed.text  # said, not done
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", without_library(text))
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', text)[1])
    assert specs and HOSTILE.splitlines()[0][:5] in json.dumps(specs)


def test_an_island_cannot_be_left() -> None:
    value = {"a": "</script><!--\u2028\u2029", "b": [1.5, None]}
    text = island(value)
    assert not set("<\u2028\u2029") & set(text) and json.loads(text) == value
    with pytest.raises(ValueError):
        island({"x": float("nan")})


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(store) -> dict:
    made = page_of(load(store), store)
    return {
        drawn.anchor.rpartition("-")[2] if "sweep" not in drawn.anchor else "sweep": drawn for drawn in made.figures()
    }


def data(drawn) -> list[dict]:
    """The points of a chart's largest data set."""
    return max(drawn.spec["datasets"].values(), key=len)


def test_size_against_quality_shows_the_classes_of_the_table() -> None:
    store = planted().store
    rows = {row.cell.cell_id: row for row in load(store).tables[0].rows}
    drawn = figures(store)["front"]
    points = {point["name"]: point for point in data(drawn)}
    assert points["gptq w4 g64"]["class"] == "front" and points["rtn w4 g64"]["class"] == "dominated"
    assert {line[0]: line[4] for line in drawn.rows} == {name: point["class"] for name, point in points.items()}
    gptq, base = rows["11" * 8], rows[BASELINE].metrics["perplexity"].value
    assert points["gptq w4 g64"]["y"] == pytest.approx(gptq.metrics["perplexity"].value)
    # The bars are the paired interval laid off from the baseline, not the interval of the cell's own perplexity.
    assert points["gptq w4 g64"]["high"] == pytest.approx(base * (1 + gptq.difference.percent.high / 100), rel=1e-6)
    assert "1 of 8 rows dominated" in drawn.caption or "dominated" in drawn.caption
    assert drawn.spec["width"] == "container"


def test_every_class_has_a_shape_and_a_colour_that_follows_the_page() -> None:
    drawn = figures(planted().store)["front"]
    text = json.dumps(drawn.spec)
    assert set(re.findall(r'"(#[0-9a-f]{3,6})"', text)) == set()
    layer = next(layer for layer in drawn.spec["layer"] if "shape" in layer["encoding"])
    classes = layer["encoding"]["color"]["scale"]
    assert len(set(classes["domain"])) == len(set(layer["encoding"]["shape"]["scale"]["range"])) >= 2
    assert set(classes["range"]) <= set(COLOURS) and len(COLOURS) != len(SHAPES)


def test_points_of_one_size_stand_side_by_side_with_their_size_in_the_data() -> None:
    drawn = figures(planted().store)["front"]
    same = [point["x"] for point in data(drawn) if abs(point["x"] - 4.25) < 0.2]
    assert len(same) == len(set(same)) >= 7 and max(abs(bits / 4.25 - 1) for bits in same) <= 0.03
    assert {line[1] for line in drawn.rows} == {"4.2500", "4.5000", "8.2500"}


def test_names_that_would_overlap_are_left_out() -> None:
    points = [
        {"x": 4.0, "y": 10.0, "class": "front", "name": "a"},
        {"x": 4.01, "y": 10.0, "class": "front", "name": "b"},
        {"x": 4.0, "y": 20.0, "class": "dominated", "name": "c"},
        {"x": 8.0, "y": 9.0, "class": "front", "name": "d"},
    ]
    _place_names(points)
    assert [(point["shown"], point["right"]) for point in points] == [
        ("a", False),
        ("", False),
        ("", False),
        ("d", True),
    ]


def test_differences_are_sorted_and_say_what_is_judged() -> None:
    drawn = figures(planted().store)["changes"]
    values = [point["value"] for point in data(drawn)]
    assert values == sorted(values) and len(values) == 9
    assert {point["name"].split(": ")[1]: point["judged"] for point in data(drawn)}["w4 g64 rtn"] == "differs"
    assert all(point["low"] <= point["value"] <= point["high"] for point in data(drawn))


def test_differences_without_a_test_are_not_called_undecided() -> None:
    made = Planted(windows=21)
    made.cell("11", "gptq", made.noise(0.01) + 0.02)
    made.cell("22", "rtn", made.noise(0.01) + 0.30)
    drawn = figures(made.store)["changes"]
    assert {point["judged"] for point in data(drawn)} == {"not tested"}
    assert "no test below 48 clusters" in drawn.caption
    assert "no test below" not in figures(planted().store)["changes"].caption


def test_a_swept_option_makes_a_curve() -> None:
    drawn = figures(planted().store)["sweep"]
    assert drawn.title == "smooth alpha"
    points = data(drawn)
    assert [point["x"] for point in points] == [0.3, 0.5, 0.7] and len({point["series"] for point in points}) == 1
    assert points[0]["y"] < points[1]["y"] < points[2]["y"]
    assert f"Smallest: {points[0]['label']}" in drawn.caption


def layer(cell_id: str, number: int, role: str, error: float) -> LayerRow:
    return LayerRow(
        **{"cell_id": cell_id, "layer": number, "role": role, "module": f"{number}.{role}", "rows": 8, "columns": 8},
        **{
            "solver": "gptq",
            "bits": 4,
            "group_size": 64,
            "stored_bytes": 40,
            "weight_error": error,
            "output_error": error,
        },
    )


def test_where_the_error_sits() -> None:
    store = planted().store
    cells = ("11" * 8, "33" * 8)
    store.rows["layers"] = [
        layer(cell, n, role, 1e-4 * (n + 1)) for cell in cells for n in (0, 1) for role in ("q", "up")
    ]
    drawn = figures(store)["layers"]
    assert "Largest: gptq w4 g64, layer 1 q: 1.41 %" in drawn.caption and drawn.fixed
    assert drawn.headings == ("cell", "layer", "q", "up")
    assert ("gptq w4 g64", "0", "1", "1") in drawn.rows
    assert drawn.spec["params"][0]["bind"]["options"] == ["gptq w8 g64", "gptq w4 g64"]


def test_tasks_stand_side_by_side() -> None:
    store = FakeStore()
    store.rows["cells"] = [
        cell_row(BASELINE, "baseline", "w16"),
        cell_row(GPTQ, "gptq", "w4"),
        cell_row(RTN, "rtn", "w4"),
    ]
    for cell, wrong in zip(store.rows["cells"], (20, 30, 60), strict=True):
        store.add_items(cell, [0] * wrong + [1] * (100 - wrong))
    tables = load(store).tables
    drawn = of_tasks(tables, "m0-tasks")
    assert [line[1:3] for line in drawn.rows] == [
        ("baseline", "80.00 %"),
        ("gptq w4 g64", "70.00 %"),
        ("rtn w4 g64", "40.00 %"),
    ]
    assert [point["value"] for point in data(drawn)] == [80, 70, 40]


def test_many_points_are_thinned_and_it_is_said() -> None:
    made = Planted(windows=3)
    table = load(made.store).tables[0]
    row = next(iter(table.rows))
    many = [
        dataclasses.replace(row, cell=cell_row(f"{index:016}", f"method{index % 7}", "w4"))
        for index in range(MARKS + 1)
    ]
    drawn = next(of_table(dataclasses.replace(table, rows=tuple(many)), "x"))
    assert len(drawn.rows) == 7 and f"; 7 of {MARKS + 1:,} drawn" in drawn.caption


# -- words ------------------------------------------------------------------------------------------------------------


def test_the_top_says_what_came_out() -> None:
    made = planted()
    made.store.rows["attempts"].append(attempt_row(FAILED, outcome="oom", error="CUDA out of memory"))
    made = page_of(load(made.store), made.store)
    assert made.state == "10 cells measured in 1 evaluation, 1 failed, 0 rows not compared"
    assert made.cards[0].figure.startswith("+2.0") and "gptq w4 g64" in made.cards[0].words
    (failure,) = made.failed
    assert (failure.kind, failure.count) == ("oom", 1) and "CUDA out of memory" in failure.lines[0][0]
    assert [[cell.text for cell in row[:3]] for row in made.attempts.rows] == [["ok", "10", "10"], ["oom", "1", "1"]]


def test_provenance_tells_what_attempts_share() -> None:
    store = example().store
    store.rows["attempts"][0] = attempt_row(BASELINE, provenance='{"qfarm": {"version": "0.2", "commit": "abc"}}')
    made = page_of(load(store), store)
    assert ("qfarm.commit", "abc") in made.shared
    assert ("qfarm.version", "0.1 (3); 0.2 (1)") in made.differing


def test_the_matrix_holds_the_paired_change_of_each_recipe() -> None:
    store = planted().store
    (model,) = page_of(load(store), store).models
    matrix = model.evaluations[0].matrix
    assert [heading for heading, _ in matrix.headings][1:] == ["w8 g64 (8.250)", "w4 g64 (several sizes)"]
    lines = {row[0].text: [cell.text for cell in row[1:]] for row in matrix.rows}
    assert re.fullmatch(r"\+2\.0\d %\*\* ± 0\.1\d( \|)?", lines["gptq"][1])
    assert "3 seeds" in lines["spqr"][1] and lines["spqr"][0] == ""


def test_large_tables_start_folded_and_sort_by_numbers() -> None:
    store = FakeStore()
    for index in range(ROWS_OPEN + 1):
        cell = cell_row(f"{index:016}", "rtn", "w4", group_size=index + 2)
        store.rows["cells"].append(cell)
        store.add(cell, [1.0 + index], [1])
    text = page(store)
    assert f"<details>\n<summary>All rows ({ROWS_OPEN + 1})" in text
    assert re.search(r'<td class="n" data-order="2\.718281\d+">2\.72</td>', text)


def test_numbers_that_are_none_are_not_drawn() -> None:
    store = planted().store
    broken = {"22" * 8: float("nan"), "33" * 8: float("inf")}
    rows = [dataclasses.replace(row, value=broken.get(row.cell_id, row.value)) for row in store.rows["metrics"]]
    kernels = [
        dataclasses.replace(row, metric="kernel", unit="fraction of elements", eval_id="k" * 16, low=None, high=None)
        for row in rows
    ]
    store.rows["metrics"] = rows + [dataclasses.replace(row, value=min(row.value, 1.0)) for row in kernels]
    assert len(data(figures(store)["front"])) == 7
    text = page(store)
    assert 'data-order="nan"' not in text and 'data-order="inf"' not in text and 'data-order="1.79' in text


def test_an_empty_store() -> None:
    text = page(FakeStore())
    assert "No finished evaluations." in Parsed(text).text and len(text) < 20_000
