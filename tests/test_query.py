"""Queries: what the views hold, and that nothing but the store's own parts can be read or changed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import duckdb
import pytest

from qfarm import query, record
from qfarm.errors import InvalidInput
from qfarm.report.answers import render_answer, render_views
from qfarm.report.tables import load
from qfarm.store import Store
from tests.report_example import BASELINE, FAILED, GPTQ, HOSTILE, RTN, Example, example


def published(folder: Path, small: Example) -> Store:
    """The example as a store on disk."""
    store, rows = Store.open(folder, create=True), small.store.rows
    for cell in rows["cells"]:
        store.publish_cell(cell, [])
        for eval_id in {metric.eval_id for metric in rows["metrics"] if metric.cell_id == cell.cell_id}:
            mine = [
                [row for row in rows[table] if (row.cell_id, row.eval_id) == (cell.cell_id, eval_id)]
                for table in ("metrics", "documents")
            ]
            store.publish_evaluation(cell.cell_id, eval_id, cell.attempt_id, *mine)
    for attempt in rows["attempts"]:
        store.publish_attempt(attempt)
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published(tmp_path_factory.mktemp("store"), example(60))


def test_views_hold_what_the_store_holds(store: Store) -> None:
    for table in record.TABLES:
        assert query.query(store, f"SELECT count(*) FROM {table}").rows == ((len(store.read(table)),),)
        columns = query.query(store, f"SELECT * FROM {table} LIMIT 0").columns
        assert columns == tuple(record.schema(table).names)
    found = query.query(store, "SELECT recipe, value FROM results WHERE metric = 'perplexity' ORDER BY value")
    assert [recipe for recipe, _ in found.rows] == ["baseline", "gptq", "rtn"]
    assert query.query(store, "SELECT cell_id, outcome FROM failures").rows == ((FAILED, "oom"),)


def test_differences_are_those_of_the_report(store: Store) -> None:
    found = query.query(store, "SELECT cell_id, log_ratio, p_holm, verdict, best FROM differences ORDER BY log_ratio")
    rows = {row.cell.cell_id: row for row in load(store).tables[0].rows}
    assert [row[0] for row in found.rows] == [GPTQ, RTN] and BASELINE not in found.rows
    for cell_id, log_ratio, p, verdict, best in found.rows:
        row = rows[cell_id]
        assert (log_ratio, p, verdict, best) == (row.difference.delta, row.adjusted_p, row.verdict, row.best)


def test_only_published_parts_are_read(tmp_path: Path) -> None:
    """A glob would see what losers and killed writers left behind."""
    store = published(tmp_path, example())
    part = next((tmp_path / "parts" / "cells").glob("*.parquet"))
    (part.parent / "orphan.parquet").write_bytes(part.read_bytes())
    assert query.query(store, "SELECT count(*) FROM cells").rows == ((3,),)


def test_an_empty_store_has_all_views(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "empty", create=True)
    for view in (*record.TABLES, *query.DERIVED):
        assert query.query(store, f"SELECT * FROM {view}").rows == ()


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT * FROM read_csv('{outside}')", "file system operations are disabled"),
        ("SELECT * FROM '{outside}'", "file system operations are disabled"),
        ("SELECT content FROM read_text('{outside}')", "file system operations are disabled"),
        ("SELECT * FROM glob('/*')", "file system operations are disabled"),
        ("SELECT * FROM 'https://example.com/x.parquet'", "file system operations are disabled"),
        ("COPY cells TO '{outside}'", "a query is one SELECT"),
        ("INSERT INTO differences (cell_id) VALUES ('x')", "a query is one SELECT"),
        ("DROP VIEW cells", "a query is one SELECT"),
        ("SET enable_external_access = true", "a query is one SELECT"),
        ("ATTACH '{outside}'", "a query is one SELECT"),
        ("INSTALL httpfs", "a query is one SELECT"),
        ("SELECT 1; SELECT 2", "a query is one SELECT"),
        ("", "a query is one SELECT"),
        ("SELECT * FROM metrcs", 'the store has no view "metrcs", did you mean "metrics"'),
        ("SELECT recip FROM cells", "recip"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM store", 'the store has no view "store"'),  # a Python name of the caller
    ],
)
def test_nothing_else_can_be_reached(store: Store, tmp_path: Path, sql: str, message: str) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_text("secret\n1\n")
    with pytest.raises(InvalidInput, match=message) as error:
        query.query(store, sql.format(outside=outside))
    assert "\n" not in str(error.value)
    assert outside.read_text() == "secret\n1\n"


def test_settings_stay_shut_behind_the_check_of_statements(store: Store, tmp_path: Path) -> None:
    """Were a statement to slip through, the connection itself would still refuse it."""
    (tmp_path / "aside").mkdir()
    connection = query.connect(store, str(tmp_path / "aside"), differences=False)
    settings = ["SET enable_external_access = true", "SET memory_limit = '1TB'"]
    for sql in (*settings, f"COPY cells TO '{tmp_path}/x.csv'", "INSTALL httpfs"):
        with pytest.raises(duckdb.Error):
            connection.execute(sql)
    connection.close()


def test_a_query_that_takes_too_long_is_stopped(store: Store) -> None:
    with pytest.raises(InvalidInput, match="took more than 0.2 s and was stopped"):
        query.query(store, "SELECT count(*) FROM range(100000000000) a, range(1000) b", timeout=0.2)


# -- formats ----------------------------------------------------------------------------------------------------------


def answer(store: Store) -> query.Answer:
    sql = "SELECT cell_id, linear_bits, 'nan'::DOUBLE AS x, NULL AS y, [1, 2] AS z, DATE '2026-11-27' AS day FROM cells"
    return query.query(store, sql + " ORDER BY cell_id")


def test_formats(store: Store) -> None:
    found = answer(store)
    rows = json.loads(query.to_json(found), parse_constant=pytest.fail)
    assert rows[0] == {"cell_id": GPTQ, "linear_bits": 4.25, "x": None, "y": None, "z": [1, 2], "day": "2026-11-27"}
    lines = list(csv.DictReader(io.StringIO(query.to_csv(found))))
    assert [line["cell_id"] for line in lines] == sorted((GPTQ, RTN, BASELINE)) and lines[0]["x"] == ""
    text = render_answer(found, 120)
    assert "3 rows" in text and max(map(len, text.splitlines())) <= 120


def test_foreign_text_in_answers(store: Store) -> None:
    quoted = HOSTILE.replace("'", "''")
    found = query.query(store, f"SELECT '{quoted}' AS name, '=cmd' AS formula")
    assert "\x1b" not in render_answer(found, 80)
    assert "'=cmd" in query.to_csv(found) and "\x1b" not in query.to_csv(found)
    assert "</script>" not in query.to_json(found)


def test_long_answers_say_that_there_is_more(store: Store) -> None:
    text = render_answer(query.query(store, "SELECT * FROM range(60)"), 80)
    assert "60 rows, 10 not shown: --format csv has all" in text and len(text.splitlines()) == 52


def test_rows_too_wide_for_the_terminal_stand_line_by_line(store: Store) -> None:
    found = query.query(store, "SELECT * FROM cells ORDER BY cell_id")
    text = render_answer(found, 80)
    assert max(map(len, text.splitlines())) <= 80 and "row 3" in text
    lines = [line.split(maxsplit=1) for line in text.partition("row 2")[0].splitlines()]
    for name, value in zip(found.columns, found.rows[0], strict=True):
        if isinstance(value, (int, float)):
            assert [name, query.shown(value)] in lines
    assert "row 1" not in render_answer(found, 1000)


def test_every_view_is_listed_and_documented() -> None:
    text, page = render_views(120), (Path(__file__).parents[1] / "docs" / "query.md").read_text()
    for view in (*record.TABLES, *query.DERIVED):
        assert f"\n{view}\n" in f"\n{text}" and f"| `{view}` |" in page
    assert "stored bits per weight of the quantized layers, metadata included" in " ".join(text.split())
