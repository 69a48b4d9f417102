"""Answers: what a query of the store found, and what may be asked, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from qfarm.query import Answer, shown, views
from qfarm.report.figures import plain, plural
from qfarm.report.layout import grid, pairs, section
from qfarm.report.render import terminal_text

ROWS_SHOWN = 50
NARROWEST = 12  # columns of text may be folded to
GAP = 2  # between columns


def render_answer(answer: Answer, width: int, color: bool = False) -> str:
    """The first rows as a table; numbers are never cut, text is folded. Rows too wide for that stand line by line."""
    return terminal_text(_answer(answer, width), width, color)


def render_views(width: int, color: bool = False) -> str:
    return terminal_text(_views(), width, color)


def _answer(answer: Answer, width: int) -> Iterator[RenderableType]:
    rows = answer.rows[:ROWS_SHOWN]
    names = [plain(name) for name in answer.columns]
    cells = [[shown(value) for value in row] for row in rows]
    numbers = [
        index
        for index in range(len(answer.columns))
        if rows and all(isinstance(row[index], (int, float, type(None))) for row in rows)
    ]
    if cells and _least_width(names, cells, numbers) > width:
        for at, row in enumerate(cells, 1):
            yield from section(f"row {at}", [pairs(dict(zip(names, row, strict=True)))])
    else:
        yield grid(names, cells, numbers)
    more = len(answer.rows) - len(rows)
    words = f"{plural(len(answer.rows), 'row')}" + (f", {more:,} not shown: --format csv has all" if more else "")
    yield Text(words, style="dim")


def _least_width(names: list[str], cells: list[list[str]], numbers: list[int]) -> int:
    """Characters of a line in which no number, no heading and nothing in the first column is cut or folded."""
    widths = []
    for index, name in enumerate(names):
        longest = max(len(row[index]) for row in cells)
        widths.append(max(len(name), longest if index in numbers or index == 0 else min(longest, NARROWEST)))
    return sum(widths) + GAP * (len(widths) - 1)


def _views() -> Iterator[RenderableType]:
    for name, what, columns in views():
        lines = [(column, kind, unit) for column, kind, unit in columns]
        parts: list[RenderableType] = [Text(what)] if what else []
        parts += [grid(("column", "type", "unit or meaning"), lines, ())] if lines else []
        yield from section(name, parts)
