"""Answers: what a query of the store found, and what may be asked, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from qfarm.query import Answer, shown, views
from qfarm.report.figures import plain, plural
from qfarm.report.layout import grid, section
from qfarm.report.render import terminal_text

ROWS_SHOWN = 50


def render_answer(answer: Answer, width: int, color: bool = False) -> str:
    """The first rows as a table; numbers are never cut, text is folded."""
    return terminal_text(_table(answer), width, color)


def render_views(width: int, color: bool = False) -> str:
    return terminal_text(_views(), width, color)


def _table(answer: Answer) -> Iterator[RenderableType]:
    rows = answer.rows[:ROWS_SHOWN]
    numbers = [
        index
        for index in range(len(answer.columns))
        if rows and all(isinstance(row[index], (int, float, type(None))) for row in rows)
    ]
    yield grid([plain(name) for name in answer.columns], [[shown(value) for value in row] for row in rows], numbers)
    more = len(answer.rows) - len(rows)
    words = f"{plural(len(answer.rows), 'row')}" + (f", {more:,} not shown: --format csv has all" if more else "")
    yield Text(words, style="dim")


def _views() -> Iterator[RenderableType]:
    for name, what, columns in views():
        lines = [(column, kind, unit) for column, kind, unit in columns]
        parts: list[RenderableType] = [Text(what)] if what else []
        parts += [grid(("column", "type", "unit or meaning"), lines, ())] if lines else []
        yield from section(name, parts)
