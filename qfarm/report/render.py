"""Render: results as text for a terminal, Markdown, LaTeX, CSV or JSON.

Terminal, Markdown and LaTeX (qfarm.report.latex) are for reading: rounded, with captions that say what the numbers rest
on. CSV and JSON are for programs (qfarm.report.data): every digit, one row or object per cell and evaluation.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from qfarm.errors import InvalidInput, nearest
from qfarm.report.captions import LEGEND, ROWS_SHOWN, caption, failures, hidden_rows, over_seeds, row_notes, title
from qfarm.report.choose import chosen
from qfarm.report.columns import GAP, Column, columns_of, fitting, name_width, seed_columns
from qfarm.report.data import to_csv, to_json
from qfarm.report.latex import to_latex
from qfarm.report.rows import Results, Row

Format = Literal["terminal", "markdown", "csv", "json", "latex"]
MIN_WIDTH = 40


def render(
    results: Results,
    format: Format = "terminal",
    *,
    width: int | None = None,
    color: bool = False,
    model: str | None = None,
    evaluation: str | None = None,
    recipe: str | None = None,
    scheme: str | None = None,
    where: str | None = None,
    sort: str | None = None,
) -> str:
    """Results as text, ending in a newline.

    `width` (terminal only) is that of the terminal if None. Which rows are shown, and in which order: `chosen`, which
    raises InvalidInput for a filter that matches nothing.
    """
    if format not in get_args(Format):
        raise InvalidInput(f'unknown format "{format}"{nearest(format, get_args(Format))}')
    patterns = {"model": model, "evaluation": evaluation, "recipe": recipe, "scheme": scheme}
    shown = chosen(results, where=where, sort=sort, **patterns)
    if format == "csv":
        return to_csv(shown)
    if format == "json":
        return to_json(shown)
    if format == "latex":
        return to_latex(shown)
    if format == "markdown":
        return "\n".join(_markdown(shown)) + "\n"
    size = max(MIN_WIDTH, width or shutil.get_terminal_size().columns)
    return terminal_text(_terminal(shown, size), size, color)


def terminal_text(parts: Iterable[RenderableType], width: int, color: bool) -> str:
    """Rich renderables as text; without colour there are no control sequences in it. NO_COLOR wins over `color`."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    for part in parts:
        console.print(part)
    return re.sub(r" +$", "", out.getvalue(), flags=re.MULTILINE)


# -- terminal ---------------------------------------------------------------------------------------------------------


def _terminal(results: Results, width: int) -> Iterator[RenderableType]:
    for table in results.tables:
        yield Text(title(table), style="bold", overflow="fold")
        yield _grid(columns_of(table), table.rows[:ROWS_SHOWN], width)
        if table.replicates:
            yield Text(over_seeds(table), style="bold", overflow="fold")
            yield _grid(seed_columns(table), table.replicates[:ROWS_SHOWN], width)
        for line in (*caption(table), *row_notes(table.rows[:ROWS_SHOWN]), *hidden_rows(table)):
            yield Text(line, style="dim", overflow="fold")
        yield Text("")
    if results.tables:
        yield Text(LEGEND, style="dim", overflow="fold")
    else:
        yield Text("no finished evaluations")
    for line in failures(results.failed):
        yield Text(line, style="red" if line.startswith(" ") else "bold", overflow="fold")
    if results.predicted:
        yield Text(results.predicted, style="dim", overflow="fold")


def _grid(columns: Sequence[Column], rows: Sequence[Any], width: int) -> RichTable:
    grid = RichTable(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    texts = []
    for column in fitting(columns, rows, width):
        heading, *cells = _aligned(column, [column.heading, *(column.text(row) for row in rows)])
        folds = column.heading == "recipe"
        grid.add_column(
            Text(heading),
            no_wrap=not folds,
            overflow="fold" if folds else "ellipsis",
            max_width=name_width(width) if folds else None,
        )
        texts.append(cells)
    for line, row in zip(zip(*texts, strict=True), rows, strict=True):
        grid.add_row(*map(Text, line), style=_style(row))
    return grid


def _style(row: Any) -> str:
    """Beside the marks, never instead of them."""
    if not isinstance(row, Row):
        return ""
    return "yellow" if row.stopped is not None else "green" if row.best else ""


def _aligned(column: Column, texts: Sequence[str]) -> Sequence[str]:
    """Padded here, since rich drops the blank that keeps the place of a mark. Digits are one column wide."""
    size = max(map(len, texts))
    return [text.rjust(size) for text in texts] if column.numeric else texts


# -- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown(results: Results) -> Iterator[str]:
    for table in results.tables:
        yield f"### {_escaped(title(table))}\n"
        yield from _markdown_grid(columns_of(table), table.rows)
        if table.replicates:
            yield f"{_escaped(over_seeds(table))}\n"
            yield from _markdown_grid(seed_columns(table), table.replicates)
        yield from (f"- {_escaped(line)}" for line in (*caption(table), *row_notes(table.rows)))
        yield ""
    yield _escaped(LEGEND if results.tables else "no finished evaluations")
    lines = list(failures(results.failed))
    if lines:
        yield f"\n### {_escaped(lines[0])}\n"
        yield from (f"- {_escaped(line.strip())}" for line in lines[1:])
    if results.predicted:
        yield f"\n{_escaped(results.predicted)}"


def _markdown_grid(columns: Sequence[Column], rows: Sequence[Any]) -> Iterator[str]:
    yield _bar(_escaped(column.heading.strip()) for column in columns)
    yield _bar("---:" if column.numeric else ":---" for column in columns)
    for row in rows:
        yield _bar(_escaped(column.text(row).strip()) for column in columns)
    yield ""


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Foreign text in Markdown: no markup, no HTML, no new cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", text)
