"""Page: what the HTML report says, as plain values for its template; the template only places them."""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import qfarm
from qfarm.report.captions import ERROR_SHOWN, LEGEND, caption, failures, over_seeds, row_notes
from qfarm.report.columns import Column, columns_of, seed_columns
from qfarm.report.drawn import Drawn, name_of, of_table
from qfarm.report.drawn_curves import of_kernels, of_sweeps
from qfarm.report.drawn_parts import of_layers, of_tasks
from qfarm.report.figures import duration, interval, number, plain, plural
from qfarm.report.pairs import Readable
from qfarm.report.protocols import flatten
from qfarm.report.rows import ID_SHOWN, Results, Row, Table, headline, parsed

SMALL_BITS = 4.5  # stored bits per weight up to which the first card looks for the best
ROWS_OPEN = 500  # in all; above, tables start folded
ROWS_WRITTEN = 1000  # of one table; the others are in the CSV
TRACEBACK_LINES = 60
VALUES_SHOWN = 6  # of a provenance key that differs between attempts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    figure: str
    words: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    order: float | None = None  # what sorting goes by; None: the text
    numeric: bool = False
    link: str = ""  # anchor of what it is about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of the page. `ids` names its rows."""

    headings: tuple[tuple[str, bool], ...]  # with whether numbers stand below
    rows: tuple[tuple[Cell, ...], ...]
    ids: tuple[str, ...] = ()
    hidden: int = 0  # rows that are not written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything of one table of the results."""

    anchor: str
    title: str
    figures: tuple[Drawn, ...]
    matrix: Grid | None
    cells: Grid
    seeds: Grid | None
    seeds_title: str
    notes: tuple[str, ...]
    row_notes: tuple[str, ...]
    protocol: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    anchor: str
    name: str
    figures: tuple[Drawn, ...]  # of several evaluations together
    evaluations: tuple[Evaluation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    kind: str
    count: int
    lines: tuple[tuple[str, str], ...]  # the line of a cell, and its traceback


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    state: str
    version: str
    cards: tuple[Card, ...]
    models: tuple[Model, ...]
    failed: tuple[Failure, ...]
    attempts: Grid
    shared: tuple[tuple[str, str], ...]  # provenance that all attempts have in common
    differing: tuple[tuple[str, str], ...]
    legend: str
    folded: bool

    def figures(self) -> Iterator[Drawn]:
        for model in self.models:
            yield from model.figures
            for evaluation in model.evaluations:
                yield from evaluation.figures


def page_of(results: Results, store: Readable) -> Page:
    """The page of a store's results, in an order and with words that depend on its contents only."""
    attempts = sorted(store.read("attempts").to_pylist(), key=lambda row: (row["started"], row["attempt_id"]))
    by_model: dict[tuple[str, str], list[Table]] = collections.defaultdict(list)
    for table in results.tables:
        by_model[table.model, table.fingerprint].append(table)
    models = [_model(store, _by_news(tables), f"m{index}") for index, tables in enumerate(by_model.values())]
    shared, differing = _provenance([parsed(row["provenance"], {}) for row in attempts])
    return Page(
        title=", ".join(sorted({plain(row["job"]) for row in attempts})) or "empty store",
        state=_state(results),
        version=_versions([parsed(row["provenance"], {}) for row in attempts]),
        cards=tuple(_cards(results)),
        models=tuple(models),
        failed=tuple(_failures(results, attempts)),
        attempts=_attempts(attempts),
        shared=tuple(shared),
        differing=tuple(differing),
        legend=LEGEND,
        folded=sum(len(table.rows) for table in results.tables) > ROWS_OPEN,
    )


def _by_news(tables: Iterable[Table]) -> list[Table]:
    """Perplexities, then accuracies, baselines alone, and then what explains them."""

    def place(table: Table) -> tuple[bool, bool, bool]:
        known = any(headline(row.metrics) for row in table.rows)
        return not known, not any(row.difference for row in table.rows), table.measure != "perplexity"

    return sorted(tables, key=place)


# -- top --------------------------------------------------------------------------------------------------------------


def _state(results: Results) -> str:
    """'72 cells measured, 0 failed, 2 rows not compared, 1 stopped early'"""
    rows = [row for table in results.tables for row in table.rows]
    cells = {row.cell.cell_id for row in rows}
    stopped = sum(row.stopped is not None for row in rows)
    words = [f"{plural(len(cells), 'cell')} measured in {plural(len(results.tables), 'evaluation')}"]
    words += [f"{len(results.failed):,} failed", f"{plural(_not_compared(results), 'row')} not compared"]
    return ", ".join(words + ([f"{stopped:,} stopped early"] if stopped else []))


def _not_compared(results: Results) -> int:
    return sum(
        row.difference is None and not row.is_baseline and headline(row.metrics) is not None
        for table in results.tables
        for row in table.rows
    )


def _versions(provenance: Sequence[Mapping[str, Any]]) -> str:
    """What measured it: 'qfarm 0.1.0, commit 997f6c6', or how many there were."""
    found = {(plain(one.get("qfarm")), plain(one.get("commit") or "")) for one in provenance if one.get("qfarm")}
    if len(found) == 1:
        ((version, commit),) = found
        return f"measured with qfarm {version}" + (f", commit {commit[:ID_SHOWN]}" if commit else "")
    return f"measured with {plural(len(found), 'version')} of qfarm" if found else f"qfarm {qfarm.__version__}"


def _cards(results: Results) -> Iterator[Card]:
    table = next((found for found in _by_news(results.tables) if found.rows[0].is_baseline and _small(found)), None)
    if table is not None:
        best = min(_small(table), key=lambda row: (row.difference.harm if row.difference else 0.0, name_of(row)))
        assert best.difference is not None
        value, low, high = best.difference.shown
        ends = interval(low, high, best.difference.unit, signed=True)
        unit = "perplexity" if best.difference.unit == "percent" else "points of accuracy"
        error = None if low is None or high is None else (high - low) / 2
        tied = sum(bool(row.best) for row in _small(table)) - bool(best.best)
        beside = f"; {tied} more not shown worse" if tied > 0 else ""
        yield Card(
            figure=number(value, best.difference.unit, error, signed=True),
            words=f"{unit} {ends} of {name_of(best)}, the best up to {SMALL_BITS:g} stored bits on "
            f"{plain(table.model)}, {plain(table.evaluation)}{beside}",
        )
        ratio = table.rows[0].cell.model_bytes / best.cell.model_bytes if best.cell.model_bytes else 0.0
        yield Card(figure=f"{ratio:.2f}x", words="smaller than the baseline: that cell's whole model, packed")
    rows = [row for found in results.tables for row in found.rows]
    yield Card(
        figure=f"{len({row.cell.cell_id for row in rows}):,}",
        words=f"cells measured, {plural(len(rows), 'result')} in all",
    )
    yield Card(
        figure=f"{len(results.failed):,} / {_not_compared(results):,}",
        words="cells failed / rows not compared with their baseline",
    )


def _small(table: Table) -> list[Row]:
    return [
        row
        for row in table.rows
        if row.difference is not None and row.complete and row.cell.linear_bits <= SMALL_BITS and not row.is_baseline
    ]


# -- models and evaluations -------------------------------------------------------------------------------------------


def _model(store: Readable, tables: Sequence[Table], anchor: str) -> Model:
    judged = next((table for table in tables if any(row.difference for row in table.rows)), tables[0])
    together = [of_layers(store, judged, f"{anchor}-layers"), of_tasks(tables, f"{anchor}-tasks")]
    together.append(of_kernels(tables, f"{anchor}-kernel"))
    return Model(
        anchor=anchor,
        name=plain(tables[0].model),
        figures=tuple(drawn for drawn in together if drawn is not None),
        evaluations=tuple(_evaluation(table, f"{anchor}-e{index}") for index, table in enumerate(tables)),
    )


def _evaluation(table: Table, anchor: str) -> Evaluation:
    protocol = flatten(table.protocol) | {"evaluation": table.eval_id}
    seeds = _grid(seed_columns(table), table.replicates, ()) if table.replicates else None
    return Evaluation(
        anchor=anchor,
        title=plain(table.evaluation),
        figures=(*of_table(table, anchor), *of_sweeps(table, anchor)),
        matrix=_matrix(table, anchor),
        cells=_grid(columns_of(table), table.rows, [f"{anchor}-{row.cell.cell_id}" for row in table.rows]),
        seeds=seeds,
        seeds_title=over_seeds(table),
        notes=tuple(caption(table)),
        row_notes=tuple(dict.fromkeys(row_notes(table.rows[:ROWS_WRITTEN]))),
        protocol=tuple((plain(name), plain(value, ERROR_SHOWN)) for name, value in sorted(protocol.items())),
    )


def _grid(columns: Sequence[Column], rows: Sequence[Any], ids: Sequence[str]) -> Grid:
    return Grid(
        headings=tuple((column.heading.strip(), column.numeric) for column in columns),
        rows=tuple(
            tuple(
                Cell(text=column.text(row).strip(), order=_orderly(column.order(row)), numeric=column.numeric)
                for column in columns
            )
            for row in rows[:ROWS_WRITTEN]
        ),
        ids=tuple(ids[:ROWS_WRITTEN]),
        hidden=max(0, len(rows) - ROWS_WRITTEN),
    )


def _orderly(value: float | None) -> float | None:
    """A number that JavaScript can read: what is infinite stays the largest."""
    return None if value is None else max(-sys.float_info.max, min(value, sys.float_info.max))


def _matrix(table: Table, anchor: str) -> Grid | None:
    """Recipes x (bits, group): the paired change with its mark, means over seeds where there are several."""
    rows = [row for row in table.rows if row.difference is not None and not row.is_baseline]
    places = list(dict.fromkeys((row.cell.scheme, row.cell.group_size) for row in rows))
    recipes = list(dict.fromkeys(row.name for row in sorted(rows, key=lambda row: (row.cell.recipe, row.variant))))
    if len(places) * len(recipes) < 2:
        return None
    found: dict[tuple[str, str, int], list[Row]] = collections.defaultdict(list)
    for row in rows:
        found[row.name, row.cell.scheme, row.cell.group_size].append(row)
    headings = [("recipe", False)]
    for scheme, group in places:
        bits = {
            number(row.cell.linear_bits, "bits")
            for row in rows
            if (row.cell.scheme, row.cell.group_size) == (scheme, group)
        }
        size = "" if group == -1 else f" g{group}"
        headings.append(
            (f"{plain(scheme)}{size} ({', '.join(sorted(bits)) if len(bits) == 1 else 'several sizes'})", True)
        )
    lines = [
        (
            Cell(text=plain(recipe)),
            *(_change_of(table, found[recipe, scheme, group], anchor) for scheme, group in places),
        )
        for recipe in recipes
    ]
    return Grid(headings=tuple(headings), rows=tuple(lines))


def _change_of(table: Table, rows: Sequence[Row], anchor: str) -> Cell:
    if not rows:
        return Cell(text="", numeric=True)
    ids = {row.cell.cell_id for row in rows}
    group = next((one for one in table.replicates if ids == {row.cell.cell_id for row in one.rows}), None)
    first = rows[0]
    assert first.difference is not None
    if group is not None and group.difference is not None:
        ends = group.difference.interval()
        value, low, high = (None if end is None else first.difference.show(end) for end in ends)
        mark, seeds = "", f", {len(rows)} seeds"
    else:
        value, low, high = first.difference.shown
        mark, seeds = first.mark, f", 1 of {len(rows)} rows" if len(rows) > 1 else ""
    error = None if low is None or high is None else (high - low) / 2
    best = " |" if any(row.best for row in rows) else ""
    around = f" ± {number(error, 'points', error)}" if error is not None else ""
    text = f"{number(value, first.difference.unit, error, signed=True)}{mark}{around}{seeds}{best}"
    return Cell(text=text, order=value, numeric=True, link=f"{anchor}-{first.cell.cell_id}")


# -- attempts ---------------------------------------------------------------------------------------------------------


def _failures(results: Results, attempts: Sequence[Mapping[str, Any]]) -> Iterator[Failure]:
    """By kind, the most frequent first."""
    last = {row["cell_id"]: row for row in attempts}
    kinds: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for cell in results.failed:
        _, line = failures([cell])
        trace = str((last.get(cell.cell_id) or {}).get("traceback") or "")
        kinds[plain(cell.kind)].append((line.strip(), "\n".join(map(_code, trace.splitlines()[-TRACEBACK_LINES:]))))
    for kind, lines in sorted(kinds.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        yield Failure(kind=kind, count=len(lines), lines=tuple(lines))


def _code(line: str) -> str:
    return " " * (len(line) - len(line.lstrip(" "))) + plain(line)


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> Grid:
    """How often what came out, and what it cost."""
    found: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for row in attempts:
        found[plain(row["outcome"])].append(row)
    lines = []
    for outcome, rows in sorted(found.items(), key=lambda pair: (pair[0] != "ok", -len(pair[1]), pair[0])):
        seconds = [row["wall_s"] for row in rows]
        cells = len({row["cell_id"] for row in rows})
        counts = [(f"{len(rows):,}", float(len(rows))), (f"{cells:,}", float(cells))]
        times = [(duration(total), total) for total in (sum(seconds), max(seconds))]
        lines.append(
            (Cell(text=outcome), *(Cell(text=text, order=order, numeric=True) for text, order in counts + times))
        )
    headings = (("outcome", False), ("attempts", True), ("cells", True), ("time", True), ("longest", True))
    return Grid(headings=headings, rows=tuple(lines))


def _provenance(found: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Keys with one value, and keys with several, each with how many attempts have it."""
    values: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in found:
        for key, value in flatten(one).items():
            values[key][value if isinstance(value, str) else json.dumps(value)] += 1
    shared, differing = [], []
    for key, counts in sorted(values.items()):
        if len(counts) == 1:
            shared.append((plain(key), plain(next(iter(counts)), ERROR_SHOWN)))
            continue
        ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        words = [f"{plain(value, ERROR_SHOWN)} ({count:,})" for value, count in ordered[:VALUES_SHOWN]]
        more = [f"and {len(ordered) - VALUES_SHOWN:,} more"] if len(ordered) > VALUES_SHOWN else []
        differing.append((plain(key), "; ".join(words + more)))
    return shared, differing
