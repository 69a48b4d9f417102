"""Against as text: pairs of measured and published numbers for a terminal, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from qfarm.report.against import Comparison, Pair
from qfarm.report.columns import Column, fitting
from qfarm.report.data import json_text
from qfarm.report.figures import number, plain, plural
from qfarm.report.layout import grid
from qfarm.report.render import MIN_WIDTH, Format, terminal_text

_OPENS_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would run
LEGEND = (
    "difference: ours - theirs in the unit of the figure; change: of perplexity in percent, of accuracy in points, "
    "ours to our baseline, theirs to that of their table"
)


def render_against(found: Comparison, format: Format, *, width: int, color: bool = False) -> str:
    """The comparison as text, ending in a newline."""
    if format == "json":
        return json_text(_data(found))
    if format == "csv":
        return _csv(found)
    if format == "markdown":
        return "\n".join(_markdown(found)) + "\n"
    size = max(MIN_WIDTH, width)
    return terminal_text(_terminal(found, size), size, color)


# -- for reading ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Line:
    """Pairs of one cell that say the same: a source often prints one number in several sections."""

    pairs: tuple[Pair, ...]

    @property
    def one(self) -> Pair:
        return self.pairs[0]

    @property
    def remarks(self) -> list[str]:
        """What is to be known: of the figures first, then what differs."""
        doubt = [] if all(pair.figure.confirmed for pair in self.pairs) else ["not confirmed"]
        notes = (remark for pair in self.pairs for remark in (*pair.figure.notes, *pair.remarks))
        return [*doubt, *dict.fromkeys(notes)]

    @property
    def sections(self) -> str:
        return "; ".join(dict.fromkeys(pair.figure.section for pair in self.pairs))


def _columns(notes: Sequence[str]) -> list[Column]:
    return [
        Column(heading="recipe", text=_name, rank=0, numeric=False),
        Column(heading="bits", text=lambda line: plain(line.one.cell.scheme), rank=0, numeric=False),
        Column(heading="group", text=_group, rank=2),
        Column(heading="measured", text=lambda line: str(line.one.figure.measure), rank=1, numeric=False),
        Column(heading="ours", text=lambda line: _number(line, line.one.ours), rank=0),
        Column(heading="theirs", text=lambda line: _number(line, line.one.figure.value), rank=0),
        Column(heading="difference", text=_difference, rank=0),
        Column(heading="in %", text=lambda line: _signed(line.one.percent), rank=3),
        Column(heading="our change", text=lambda line: _signed(line.one.ours_change), rank=4),
        Column(heading="their change", text=lambda line: _signed(line.one.theirs_change), rank=4),
        Column(heading="section", text=lambda line: plain(line.sections), rank=5, numeric=False),
        Column(heading="notes", text=lambda line: _marks(line, notes), rank=1, numeric=False),
    ]


def _name(line: Line) -> str:
    return plain(" ".join(filter(None, (line.one.cell.recipe, line.one.variant))))


def _group(line: Line) -> str:
    size = line.one.cell.group_size
    return "" if size == -1 else str(size)


def _number(line: Line, value: float) -> str:
    return number(value, line.one.figure.measure.unit or "count").removesuffix(" %")


def _difference(line: Line) -> str:
    unit = line.one.figure.measure.unit
    return number(line.one.difference, "points" if unit == "percent" else unit or "count", None, signed=True)


def _signed(value: float | None) -> str:
    return number(value, "points", None, signed=True)


def _marks(line: Line, notes: Sequence[str]) -> str:
    """'1, 3': which of the table's notes are of this line."""
    return ", ".join(str(notes.index(remark) + 1) for remark in line.remarks)


def _lines(pairs: Iterable[Pair]) -> list[Line]:
    found: dict[Any, list[Pair]] = {}
    for pair in pairs:
        key = (pair.cell.cell_id, pair.figure.measure, pair.figure.value, pair.theirs_change, pair.figure.confirmed)
        found.setdefault(key, []).append(pair)
    return [Line(tuple(same)) for same in found.values()]


def _by_model(found: Comparison) -> Iterator[tuple[str, list[Line], list[str]]]:
    """Model, its lines, their notes in order of appearance."""
    ordered = sorted(found.pairs, key=lambda pair: pair.cell.model)
    for model, group in itertools.groupby(ordered, key=lambda pair: pair.cell.model):
        lines = _lines(group)
        yield model, lines, list(dict.fromkeys(remark for line in lines for remark in line.remarks))


def _shown(lines: Sequence[Line], notes: Sequence[str]) -> list[Column]:
    """The columns in which any line has something to say."""
    return [column for column in _columns(notes) if any(column.text(line) for line in lines)]


def summary(found: Comparison) -> list[str]:
    """What was compared, and how much of either side has no counterpart."""
    figures = len(found.published.figures)
    lines = [
        f"{plural(len(found.pairs), 'pair')} of a measured and a published number; {found.cells_without} of "
        f"{plural(found.cells, 'measured cell')} have no counterpart, {found.figures_without} of "
        f"{plural(figures, 'figure')} of {found.published.name} have none here"
    ]
    if found.pairs:
        lines += [LEGEND, *(f"of the source: {note}" for note in found.published.notes)]
    return lines


def _terminal(found: Comparison, width: int) -> Iterator[RenderableType]:
    yield Text(f"{plain(found.published.title)}, {plain(found.published.address)}\n", style="bold", overflow="fold")
    for model, lines, notes in _by_model(found):
        yield Text(plain(model), style="bold", overflow="fold")
        columns = fitting(_shown(lines, notes), lines, width)
        numeric = [index for index, column in enumerate(columns) if column.numeric]
        rows = [[column.text(line) for column in columns] for line in lines]
        yield grid([column.heading for column in columns], rows, numeric)
        for index, note in enumerate(notes):
            yield Text(f"{index + 1}: {plain(note)}", style="dim", overflow="fold")
        yield Text("")
    for text in summary(found):
        yield Text(plain(text), style="dim", overflow="fold")


def _markdown(found: Comparison) -> Iterator[str]:
    yield f"### {_escaped(plain(found.published.title))}\n"
    for model, lines, notes in _by_model(found):
        yield f"#### {_escaped(plain(model))}\n"
        columns = _shown(lines, notes)
        yield _bar(column.heading.strip() for column in columns)
        yield _bar("---:" if column.numeric else ":---" for column in columns)
        yield from (_bar(_escaped(column.text(line)) for column in columns) for line in lines)
        yield ""
        yield from (f"- {index + 1}: {_escaped(plain(note))}" for index, note in enumerate(notes))
        yield ""
    yield from (f"- {_escaped(plain(text))}" for text in summary(found))


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Foreign text in Markdown: no markup, no HTML, no new cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", text)


# -- for programs -----------------------------------------------------------------------------------------------------


def _data(found: Comparison) -> dict[str, Any]:
    source = found.published
    return {
        "published": {
            "name": source.name,
            "title": source.title,
            "address": source.address,
            "notes": list(source.notes),
            "figures": len(source.figures),
        },
        "pairs": [_pair(pair) for pair in found.pairs],
        "cells": found.cells,
        "cells_without_counterpart": found.cells_without,
        "figures_without_counterpart": found.figures_without,
    }


def _pair(pair: Pair) -> dict[str, Any]:
    cell, figure = pair.cell, pair.figure
    axes = ("cell_id", "model", "recipe", "scheme", "group_size", "seed", "symmetric", "dtype", "linear_bits")
    return {name: getattr(cell, name) for name in axes} | {
        "variant": pair.variant,
        "measure": str(figure.measure),
        "unit": figure.measure.unit,
        "ours": pair.ours,
        "ours_standard_error": pair.standard_error,
        "ours_n": pair.n,
        "theirs": figure.value,
        "difference": pair.difference,
        "difference_percent": pair.percent,
        "ours_change": pair.ours_change,
        "theirs_change": pair.theirs_change,
        "section": figure.section,
        "theirs_model": figure.model,
        "theirs_options": {name: dict(options) for name, options in figure.options.items()},
        "theirs_settings": dict(figure.settings),
        "theirs_calibration": dict(figure.calibration),
        "confirmed": figure.confirmed,
        "notes": list(figure.notes),
        "remarks": list(pair.remarks),
    }


def _csv(found: Comparison) -> str:
    lines = [{"published": found.published.name} | _pair(pair) for pair in found.pairs]
    header = list(lines[0]) if lines else ["published", "cell_id"]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_value(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = "; ".join(f"{key}={part}" for key, part in value.items())
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.startswith(_OPENS_FORMULA) else text
