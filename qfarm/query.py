"""Query: SQL over a store, by DuckDB, on nothing but the parts that its manifests name.

Views are the store's tables (qfarm.record.TABLES), each with every column of this version, and three that join or count
them. Queries read: one SELECT, no other statement, no file outside the store and no network (`enable_external_access`
is off once the views are made, with the store's parts as the only allowed paths), a limit on memory and on time. Parts
are read as they lie; whether they are what was published is told by `qfarm store check`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb

from qfarm import record
from qfarm.errors import InvalidInput, nearest
from qfarm.report.data import csv_value, difference_data, json_text, judged_data
from qfarm.report.figures import plain
from qfarm.report.tables import load
from qfarm.store import Store

MEMORY = "2GB"
TIMEOUT = 300.0  # seconds
DERIVED = {
    "results": "metrics with the axes and sizes of their cells: one row per cell, evaluation and metric",
    "differences": "each row's paired difference to its baseline, with interval, p values and verdict as in the report",
    "failures": "attempts that did not end well, latest first",
}
DIFFERENCES = """
    cell_id VARCHAR, eval_id VARCHAR, evaluation VARCHAR, measure VARCHAR, change_percent DOUBLE,
    change_percent_low DOUBLE, change_percent_high DOUBLE, log_ratio DOUBLE, log_ratio_standard_error DOUBLE,
    change_points DOUBLE, change_points_low DOUBLE, change_points_high DOUBLE, items_lost BIGINT, items_gained BIGINT,
    share_flipped DOUBLE, test VARCHAR, p DOUBLE, p_exact DOUBLE, detectable DOUBLE, identical BOOLEAN, pairs BIGINT,
    pair_clusters BIGINT, p_holm DOUBLE, p_bh DOUBLE, p_margin DOUBLE, p_non_inferior DOUBLE, verdict VARCHAR,
    within_margin BOOLEAN, non_inferior BOOLEAN, noise_floor DOUBLE, best BOOLEAN, front VARCHAR, stopped_early BIGINT,
    remark VARCHAR
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def query(store: Store, sql: str, timeout: float = TIMEOUT) -> Answer:
    """The rows of one SELECT. Raises InvalidInput for anything else, for an error in it, and after `timeout` s."""
    with tempfile.TemporaryDirectory(prefix="qfarm-query-") as aside:
        connection = connect(store, aside, differences=re.search(r"\bdifferences\b", sql, re.IGNORECASE) is not None)
        try:
            return _answer(connection, sql, timeout)
        finally:
            connection.close()


def connect(store: Store, aside: str, *, differences: bool = True) -> duckdb.DuckDBPyConnection:
    """A connection on which the views are there and nothing else can be reached; `aside` is for what spills.

    `differences` fills the view of that name, for which every ledger of the store has to be read.
    """
    connection = duckdb.connect(":memory:")
    connection.execute(f"SET memory_limit = '{MEMORY}'")
    connection.execute("SET enable_progress_bar = false")
    connection.execute(f"SET temp_directory = {_quoted(aside)}")
    allowed: list[str] = []
    for table in record.TABLES:
        if not store.has_files:
            connection.register(f"rows_{table}", store.read(table))
            connection.execute(f"CREATE VIEW {table} AS SELECT * FROM rows_{table}")
            continue
        files = store.files(table)
        allowed += files
        _view(connection, table, files)
    _derive(connection)
    _differences(connection, store if differences else None)
    connection.execute(f"SET allowed_paths = [{', '.join(map(_quoted, allowed))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def views() -> Iterator[tuple[str, str, tuple[tuple[str, str, str], ...]]]:
    """Name, what a row is, and (column, type, unit) of the store's tables; the derived views have no list."""
    for table, kind in record.TABLES.items():
        fields = record.schema(table)
        units = [(field.metadata or {}).get(b"unit", b"").decode() for field in fields]
        columns = tuple((field.name, str(field.type), unit) for field, unit in zip(fields, units, strict=True))
        yield table, (kind.__doc__ or "").splitlines()[0] if not _generated(kind) else "", columns
    for name, what in DERIVED.items():
        yield name, what, ()


def _generated(kind: type) -> bool:
    """Whether a dataclass has no docstring but the signature that Python gives it."""
    return (kind.__doc__ or "").startswith(f"{kind.__name__}(")


# -- views ------------------------------------------------------------------------------------------------------------


def _view(connection: duckdb.DuckDBPyConnection, table: str, files: Sequence[str]) -> None:
    """All columns of this version, also where the store is older or holds no such part."""
    connection.register("empty", record.schema(table).empty_table())
    connection.execute(f"CREATE TABLE shape_{table} AS SELECT * FROM empty")
    connection.unregister("empty")
    listed = ", ".join(map(_quoted, files))
    parts = f" UNION ALL BY NAME SELECT * FROM read_parquet([{listed}], union_by_name = true)" if files else ""
    connection.execute(f"CREATE VIEW {table} AS SELECT * FROM shape_{table}{parts}")


def _derive(connection: duckdb.DuckDBPyConnection) -> None:
    axes = "model, recipe, scheme, group_size, seed, linear_bits, model_bits, model_bytes"
    connection.execute(
        f"CREATE VIEW results AS SELECT cell_id, {axes}, eval_id, evaluation, metric, value, standard_error, low, "
        "high, n, clusters, unit, better, stopped_early FROM metrics JOIN cells USING (cell_id)"
    )
    connection.execute(
        "CREATE VIEW failures AS SELECT cell_id, model, label, number, outcome, stage, error, worker, node, started, "
        "wall_s FROM attempts WHERE outcome <> 'ok' ORDER BY started DESC"
    )


def _differences(connection: duckdb.DuckDBPyConnection, store: Store | None) -> None:
    connection.execute(f"CREATE TABLE differences ({DIFFERENCES})")
    names = re.findall(r"(\w+) [A-Z]+", DIFFERENCES)
    rows = []
    for table in load(store).tables if store else ():
        for row in table.rows:
            if row.difference is None:
                continue
            known = {"cell_id": row.cell.cell_id, "eval_id": table.eval_id, "evaluation": table.evaluation}
            known |= {"measure": table.measure} | difference_data(row.difference) | judged_data(row)
            rows.append([known[name] for name in names])
    if rows:
        connection.executemany(f"INSERT INTO differences VALUES ({', '.join('?' * len(names))})", rows)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# -- answers ----------------------------------------------------------------------------------------------------------


def _answer(connection: duckdb.DuckDBPyConnection, sql: str, timeout: float) -> Answer:
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise InvalidInput("a query is one SELECT: the store cannot be changed, and nothing else be read")
        timer = threading.Timer(timeout, connection.interrupt)
        timer.start()
        try:
            found = connection.execute(statements[0])
            columns, rows = tuple(column[0] for column in found.description or ()), found.fetchall()
        finally:
            timer.cancel()
    except duckdb.InterruptException as error:
        raise InvalidInput(f"the query took more than {timeout:g} s and was stopped; see --timeout") from error
    except duckdb.CatalogException as error:
        missing = re.search(r"Table with name (\w+) does not exist", str(error))
        if missing is None:
            raise InvalidInput(_line(error)) from error
        names = [*record.TABLES, *DERIVED]
        raise InvalidInput(f'the store has no view "{missing[1]}"{nearest(missing[1], names)}') from error
    except duckdb.Error as error:
        raise InvalidInput(_line(error)) from error
    return Answer(columns=columns, rows=tuple(rows))


def _line(error: Exception) -> str:
    """What DuckDB says, without the picture of the statement."""
    return plain(str(error).split("\n\nLINE")[0].split("\nLINE")[0])


def to_csv(answer: Answer) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(plain, answer.columns))
    writer.writerows([csv_value(_plainer(value)) for value in row] for row in answer.rows)
    return out.getvalue()


def to_json(answer: Answer) -> str:
    """A list of objects; numbers that are not finite are null."""
    rows = [dict(zip(answer.columns, map(_plainer, row), strict=True)) for row in answer.rows]
    return json_text(rows)


def shown(value: Any) -> str:
    """A value in a table for people: numbers to six digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return plain(_plainer(value) if not isinstance(value, (list, dict)) else json.dumps(_plainer(value)))


def _plainer(value: Any) -> Any:
    """What JSON knows: bytes as their length, dates and decimals as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plainer(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plainer(part) for key, part in value.items()}
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
