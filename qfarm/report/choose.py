"""Choose: which rows of the results are shown, and in which order. Marks keep the family of the whole table.

A condition reads `NAME OPERATOR VALUE`, several are joined by `and`: `stored<=4.5 and change<10`, `best=yes`,
`recipe~smooth*`. Names are headings of columns, with `_` for blanks, and the flags below; numbers are compared as they
are shown (percent, points), `~` takes a pattern with * and ?.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qfarm.errors import InvalidInput, nearest
from qfarm.report.columns import Column, columns_of
from qfarm.report.rows import Results, Row, Table

FLAGS: Mapping[str, Callable[[Row], bool]] = {
    "best": lambda row: bool(row.best),
    "significant": lambda row: row.marked,
    "stopped": lambda row: row.stopped is not None,
    "within_margin": lambda row: row.within_margin,
}
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "~": fnmatch.fnmatchcase,
}
_CONDITION = re.compile(r"\s*([\w %-]+?)\s*(<=|>=|!=|=|<|>|~)\s*(.+?)\s*")
_YES = {"yes": True, "true": True, "no": False, "false": False}


def chosen(results: Results, *, where: str | None = None, sort: str | None = None, **patterns: str | None) -> Results:
    """The rows that match, baselines always among them.

    `patterns` by field (model, evaluation, recipe, scheme) are names or patterns with * and ?. `sort` is a column, with
    a minus before it for falling order. Raises InvalidInput for what matches nothing or names no column.
    """
    found = _selected(results, patterns)
    conditions = [_condition(part) for part in re.split(r"\s+and\s+", where)] if where else []
    wanted = [(name, f"--where {where}") for name, _, _ in conditions]
    wanted += [(_key(sort.removeprefix("-")), f"--sort {sort}")] if sort else []
    names = {name for table in found.tables for name in _columns(table)}
    if wanted and not found.tables:
        raise InvalidInput(f"{wanted[0][1]}: there is no finished evaluation yet to choose from")
    for name, option in wanted:
        if name not in names | FLAGS.keys():
            raise InvalidInput(f'{option}: no column "{name}"{nearest(name, names | FLAGS.keys())}')
    tables = [_filtered(table, conditions) for table in found.tables]
    if conditions:
        tables = [table for table in tables if any(not row.is_baseline for row in table.rows)]
        if not tables:
            raise InvalidInput(f"--where {where}: no row matches")
    return dataclasses.replace(found, tables=tuple(_sorted(table, sort) if sort else table for table in tables))


def _selected(results: Results, patterns: Mapping[str, str | None]) -> Results:
    known = {
        "model": {table.model for table in results.tables} | {cell.model for cell in results.failed} - {""},
        "evaluation": {table.evaluation for table in results.tables},
        "recipe": {row.cell.recipe for table in results.tables for row in table.rows},
        "scheme": {row.cell.scheme for table in results.tables for row in table.rows},
    }
    for field, pattern in patterns.items():
        if pattern is not None and not any(_matches(name, pattern) for name in known[field]):
            raise InvalidInput(f'no {field} matches "{pattern}"{nearest(pattern, known[field])}')

    def wanted(row: Row) -> bool:
        kept = (_matches(getattr(row.cell, field), patterns.get(field)) for field in ("recipe", "scheme"))
        return row.is_baseline or all(kept)

    tables = (
        _kept(table, wanted)
        for table in results.tables
        if _matches(table.model, patterns.get("model")) and _matches(table.evaluation, patterns.get("evaluation"))
    )
    # A cell that failed before it was stored has no model and no label to go by; it is never hidden.
    failed = tuple(cell for cell in results.failed if not cell.model or _matches(cell.model, patterns.get("model")))
    return Results(tables=tuple(table for table in tables if table.rows), failed=failed)


def _matches(name: str, pattern: str | None) -> bool:
    return pattern is None or name == pattern or fnmatch.fnmatchcase(name, pattern)


def _kept(table: Table, wanted: Callable[[Row], bool]) -> Table:
    return dataclasses.replace(
        table,
        rows=tuple(filter(wanted, table.rows)),
        replicates=tuple(group for group in table.replicates if wanted(group.first)),
    )


# -- conditions -------------------------------------------------------------------------------------------------------

Condition = tuple[str, str, str]  # name, operator, value


def _condition(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise InvalidInput(f'--where {text}: expected NAME OPERATOR VALUE, e.g. "stored<=4.5 and change<10"')
    name, sign, value = found.groups()
    if _key(name) in FLAGS and (sign not in ("=", "!=") or value.lower() not in _YES):
        raise InvalidInput(f'--where {text}: "{_key(name)}" is yes or no, e.g. "{_key(name)}=yes"')
    return _key(name), sign, value


def _key(heading: str) -> str:
    """'KV bits' as `kv_bits`."""
    return re.sub(r"\s+", "_", heading.strip().lower())


def _columns(table: Table) -> dict[str, Column]:
    return {_key(column.heading): column for column in columns_of(table)}


def _filtered(table: Table, conditions: Sequence[Condition]) -> Table:
    columns = _columns(table)

    def wanted(row: Row) -> bool:
        return row.is_baseline or all(_holds(row, columns, *condition) for condition in conditions)

    return _kept(table, wanted) if conditions else table


def _holds(row: Row, columns: Mapping[str, Column], name: str, sign: str, value: str) -> bool:
    if name in FLAGS:
        return _OPERATORS[sign](FLAGS[name](row), _YES[value.lower()])
    if name not in columns:
        return False  # a column of other tables
    known = columns[name].shown(row)
    if known is not None and sign != "~":
        try:
            return _OPERATORS[sign](known, float(value.removesuffix("%")))
        except ValueError:
            raise InvalidInput(f'--where {name}{sign}{value}: "{name}" is a number') from None
    text = columns[name].text(row).strip()
    return bool(text or sign in ("=", "!=")) and _OPERATORS[sign](text, value)


def _sorted(table: Table, sort: str) -> Table:
    """The baseline first, rows without a value last."""
    column, falling = _columns(table).get(_key(sort.removeprefix("-"))), sort.startswith("-")
    if column is None:
        return table

    def by_number(row: Row) -> float:
        known = column.order(row)
        return math.inf if known is None else -known if falling else known

    first = [row for row in table.rows if row.is_baseline]
    others: Iterable[Row] = [row for row in table.rows if not row.is_baseline]
    if column.value is not None:
        others = sorted(others, key=by_number)
    else:
        others = sorted(others, key=lambda row: column.text(row).strip(), reverse=falling)
    return dataclasses.replace(table, rows=(*first, *others))
