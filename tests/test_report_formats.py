"""Formats of the report: what a reader or a program gets to see, and what foreign text cannot do."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import pytest

from qfarm.errors import InvalidInput
from qfarm.report.render import render
from qfarm.report.tables import load
from tests.report_example import (
    BASELINE,
    FAILED,
    HOSTILE,
    PROTOCOL,
    RTN,
    Example,
    FakeStore,
    cell_row,
    example,
    hostile_store,
    row_of,
)


@pytest.fixture
def small() -> Example:
    return example()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_terminal_lines_fit(width):
    store = example(60).store
    base = [row for row in store.rows["documents"] if row.cell_id == BASELINE]
    losses, tokens = [1.3 * row.loss for row in base], [row.tokens for row in base]
    for cell_id, recipe in (("3333" * 4, "smoothquant+gptq"), ("4444" * 4, "smoothquant+rotation+gptq+kivi")):
        chain = cell_row(cell_id, recipe, "w4a4kv4", group_size=128)
        store.rows["cells"].append(chain)
        store.add(chain, losses, tokens, metrics={"kl": 0.5, "top1_agreement": 0.5})
    text = render(load(store), width=width)
    assert max(map(len, text.splitlines())) <= width
    heading = text.splitlines()[1].split()
    assert heading[:6] == ["recipe", "bits", "group", "stored", "PPL", "change"]
    assert ("95" in heading, "agree" in heading, "cell" in heading) == (True, width > 80, width > 120)
    assert "…" not in text and "smoothquant+gptq" in text


def test_bits_of_the_cache_and_cells_that_are_not_causal_are_marked():
    store = example(60).store
    heading = next(line for line in render(load(store), "markdown").splitlines() if line.startswith("|"))
    assert "KV bits" not in heading and "causal" not in heading
    store.rows["cells"] = [
        dataclasses.replace(cell, kv_bits=4.1875, causal=cell.recipe != "gptq") if cell.recipe != "baseline" else cell
        for cell in store.rows["cells"]
    ]
    lines = [line.strip("|").split(" | ") for line in render(load(store), "markdown").splitlines() if "|" in line]
    heading = [cell.strip() for cell in lines[0]]
    rows = {line[0].split()[0]: dict(zip(heading, map(str.strip, line), strict=True)) for line in lines[2:5]}
    assert [rows[name]["KV bits"] for name in ("baseline", "rtn", "gptq")] == ["", "4.188", "4.188"]
    assert [rows[name]["causal"] for name in ("baseline", "rtn", "gptq")] == ["", "", "no"]
    (found,) = [row for row in json.loads(render(load(store), "json"))["tables"][0]["rows"] if row["recipe"] == "gptq"]
    assert (found["kv_bits"], found["causal"]) == (4.1875, False)


def test_the_same_number_reads_the_same_everywhere():
    store = example(60).store
    terminal, markdown = render(load(store), width=200), render(load(store), "markdown")
    line = next(line for line in terminal.splitlines() if line.startswith("rtn"))
    row = next(line for line in markdown.splitlines() if line.startswith("| rtn"))
    cells = [cell.strip().replace("\\", "") for cell in row.strip("|").split(" | ")]
    assert line.split() == " ".join(cells).split()
    assert "%*" in line
    headings = " ".join(terminal.splitlines()[1].split())
    assert "right flips lost gained KL back model bits Pareto time cell" in headings


def test_quantiles_of_divergence_have_headings():
    made = example(60)
    made.store.rows["metrics"] += [
        dataclasses.replace(row, metric=name)
        for row in made.store.rows["metrics"]
        if row.metric == "kl"
        for name in ("kl_median", "kl_p99")
    ]
    assert "KL back KL median KL p99 model bits" in " ".join(render(load(made.store), width=250).split())
    assert "KL median" in render(load(made.store), "markdown") and "KL median" not in render(load(made.store), "latex")


def test_markdown_tables_are_whole():
    lines = render(load(example().store), "markdown").splitlines()
    table = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("|")]
    assert len(table) == 5 and len({len(cells) for cells in table}) == 1


def test_csv_keeps_every_digit(small):
    rows = list(csv.DictReader(io.StringIO(render(load(small.store), "csv"))))
    assert [row["outcome"] for row in rows] == ["ok", "ok", "ok", "oom"]
    rtn = next(row for row in rows if row["recipe"] == "rtn")
    found = row_of(load(small.store), RTN)
    assert float(rtn["perplexity"]) == found.metrics["perplexity"].value
    assert float(rtn["change_percent"]) == found.difference.percent.value
    assert rtn["p_holm"] == "" and rtn["seed"] == ""
    assert (rows[3]["cell_id"], rows[3]["error"]) == (FAILED, "CUDA out of memory")


def test_json_is_json_even_when_numbers_are_not(small):
    rows = small.store.rows["metrics"]
    rows[:] = [dataclasses.replace(row, value=float("nan")) if row.metric == "kl" else row for row in rows]
    value = json.loads(render(load(small.store), "json"), parse_constant=pytest.fail)
    (table,) = value["tables"]
    assert table["protocol"] == PROTOCOL
    assert [row["recipe"] for row in table["rows"]] == ["baseline", "gptq", "rtn"]
    assert table["rows"][1]["metrics"]["kl"]["value"] is None
    assert table["rows"][2]["log_ratio"] == row_of(load(small.store), RTN).difference.delta
    assert value["failed"][0]["error"] == "CUDA out of memory"


@pytest.mark.parametrize("format", ["terminal", "markdown", "csv", "json"])
def test_order_in_the_store_changes_no_byte(small, format):
    before = render(load(small.store), format, width=120)
    for rows in small.store.rows.values():
        rows.reverse()
    assert render(load(small.store), format, width=120) == before


@pytest.mark.parametrize("format", ["terminal", "markdown", "csv", "json"])
def test_hostile_names_are_harmless(format):
    text = render(load(hostile_store()), format, width=80)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    text.encode()
    if format == "terminal":
        assert "[red]x[/red]</script> | a *b*" in text and max(map(len, text.splitlines())) <= 80
    elif format == "markdown":
        assert "</script>" not in text and r"\[red\]x\[/red\]&lt;/script&gt; \| a \*b\*" in text
        table = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
        assert len({len(cells) for cells in table}) == 1
    elif format == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert rows[0]["model"] == "[red]x[/red]</script> | a *b*" and rows[3]["error"].startswith("'=cmd")
    else:
        assert "</script>" not in text and json.loads(text)["tables"][0]["model"] == HOSTILE


def test_colour_only_where_asked(monkeypatch, small):
    monkeypatch.delenv("NO_COLOR", raising=False)
    results = load(small.store)
    assert "\x1b" not in render(results, width=80)
    assert "\x1b[1m" in render(results, width=80, color=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in render(results, width=80, color=True)


def test_filters(small):
    results = load(small.store)
    text = render(results, "csv", recipe="gptq")
    assert [row["recipe"] for row in csv.DictReader(io.StringIO(text))][:2] == ["baseline", "gptq"]
    assert "no finished evaluations" not in render(results, model="example/*", evaluation="perplexity *", scheme="w4")
    with pytest.raises(InvalidInput, match='no recipe matches "gtpq", did you mean "gptq"'):
        render(results, recipe="gtpq")
    with pytest.raises(InvalidInput, match='unknown format "html"'):
        render(results, "html")


def test_long_tables_are_cut_in_a_terminal_only():
    store = FakeStore()
    for index in range(60):
        cell = cell_row(f"{index:016}", "rtn", "w4", group_size=index + 2)
        store.rows["cells"].append(cell)
        store.add(cell, [1.0], [1])
    text = render(load(store), width=80)
    assert sum(line.startswith("rtn") for line in text.splitlines()) == 50
    assert "10 more rows than a terminal shows: --format csv has all" in text
    assert render(load(store), "markdown").count("| rtn ") == 60


@pytest.mark.parametrize("format", ["terminal", "markdown"])
def test_an_empty_store(format):
    assert render(load(FakeStore()), format, width=80) == "no finished evaluations\n"


def test_an_empty_store_as_data():
    assert json.loads(render(load(FakeStore()), "json")) == {"tables": [], "failed": []}
    assert list(csv.DictReader(io.StringIO(render(load(FakeStore()), "csv")))) == []
