"""Render: results as text for a terminal, Markdown, CSV or JSON.

Terminal and Markdown are for reading: rounded, with captions that say what the numbers rest on. CSV and JSON are for
programs (qfarm.report.data): every digit, one row or object per cell and evaluation.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from qfarm.errors import InvalidInput, nearest
from qfarm.report.columns import GAP, Column, columns_of, fitting, name_width
from qfarm.report.data import to_csv, to_json
from qfarm.report.figures import plain, plural
from qfarm.report.tables import ID_SHOWN, FailedCell, Results, Row, Table
from qfarm.stats import FAMILY_ALPHA, INTERVAL_CLUSTERS, LEVEL, MARK_CLUSTERS

Format = Literal["terminal", "markdown", "csv", "json"]
ROWS_SHOWN = 50  # of one table in a terminal
MIN_WIDTH = 40
ERROR_SHOWN = 300  # characters of an error's one line
LEGEND = (
    "stored: bits per weight of the quantized layers, scales and zeros included. change: of perplexity against the "
    "baseline. KL: nats per token, baseline against cell (KL back: the reverse). agree: positions whose most probable "
    "token is the baseline's; right: is the true one; lost, gained: right only before, only now; flips: both. time: "
    "the attempt that measured the row. `qfarm show CELL` tells all about a cell."
)


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
) -> str:
    """Results as text, ending in a newline.

    `width` (terminal only) is that of the terminal if None. The filters are names or patterns with * and ?; baselines
    stay, and marks keep the family of the whole table. Raises InvalidInput for a filter that matches nothing.
    """
    if format not in get_args(Format):
        raise InvalidInput(f'unknown format "{format}"{nearest(format, get_args(Format))}')
    chosen = _selected(results, model=model, evaluation=evaluation, recipe=recipe, scheme=scheme)
    if format == "csv":
        return to_csv(chosen)
    if format == "json":
        return to_json(chosen)
    if format == "markdown":
        return "\n".join(_markdown(chosen)) + "\n"
    size = max(MIN_WIDTH, width or shutil.get_terminal_size().columns)
    return terminal_text(_terminal(chosen, size), size, color)


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


def _selected(results: Results, **patterns: str | None) -> Results:
    def matches(name: str, pattern: str | None) -> bool:
        return pattern is None or name == pattern or fnmatch.fnmatchcase(name, pattern)

    known = {
        "model": {table.model for table in results.tables} | {cell.model for cell in results.failed} - {""},
        "evaluation": {table.evaluation for table in results.tables},
        "recipe": {row.cell.recipe for table in results.tables for row in table.rows},
        "scheme": {row.cell.scheme for table in results.tables for row in table.rows},
    }
    for field, pattern in patterns.items():
        if pattern is not None and not any(matches(name, pattern) for name in known[field]):
            raise InvalidInput(f'no {field} matches "{pattern}"{nearest(pattern, known[field])}')

    def wanted(row: Row) -> bool:
        kept = matches(row.cell.recipe, patterns["recipe"]) and matches(row.cell.scheme, patterns["scheme"])
        return row.is_baseline or kept

    tables = (
        dataclasses.replace(table, rows=tuple(filter(wanted, table.rows)))
        for table in results.tables
        if matches(table.model, patterns["model"]) and matches(table.evaluation, patterns["evaluation"])
    )
    # A cell that failed before it was stored has no model and no label to go by; it is never hidden.
    failed = tuple(cell for cell in results.failed if not cell.model or matches(cell.model, patterns["model"]))
    return Results(tables=tuple(table for table in tables if table.rows), failed=failed)


# -- terminal ---------------------------------------------------------------------------------------------------------


def _terminal(results: Results, width: int) -> Iterator[RenderableType]:
    for table in results.tables:
        yield Text(_title(table), style="bold", overflow="fold")
        yield _grid(table, width)
        for line in _caption(table):
            yield Text(line, style="dim", overflow="fold")
        yield Text("")
    if results.tables:
        yield Text(LEGEND, style="dim", overflow="fold")
    else:
        yield Text("no finished evaluations")
    for line in _failures(results.failed):
        yield Text(line, style="red" if line.startswith(" ") else "bold", overflow="fold")


def _grid(table: Table, width: int) -> RichTable:
    rows = table.rows[:ROWS_SHOWN]
    grid = RichTable(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    texts = []
    for column in fitting(columns_of(table), rows, width):
        heading, *cells = _aligned(column, [column.heading, *(column.text(row) for row in rows)])
        folds = column.heading == "recipe"
        grid.add_column(
            Text(heading),
            no_wrap=not folds,
            overflow="fold" if folds else "ellipsis",
            max_width=name_width(width) if folds else None,
        )
        texts.append(cells)
    for line in zip(*texts, strict=True):
        grid.add_row(*map(Text, line))
    return grid


def _aligned(column: Column, texts: Sequence[str]) -> Sequence[str]:
    """Padded here, since rich drops the blank that keeps the place of a mark. Digits are one column wide."""
    size = max(map(len, texts))
    return [text.rjust(size) for text in texts] if column.numeric else texts


# -- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown(results: Results) -> Iterator[str]:
    for table in results.tables:
        columns = columns_of(table)
        yield f"### {_escaped(_title(table))}\n"
        yield _bar(_escaped(column.heading.strip()) for column in columns)
        yield _bar("---:" if column.numeric else ":---" for column in columns)
        for row in table.rows:
            yield _bar(_escaped(column.text(row).strip()) for column in columns)
        yield ""
        yield from (f"- {_escaped(line)}" for line in _caption(table))
        yield ""
    yield _escaped(LEGEND if results.tables else "no finished evaluations")
    lines = list(_failures(results.failed))
    if lines:
        yield f"\n### {_escaped(lines[0])}\n"
        yield from (f"- {_escaped(line.strip())}" for line in lines[1:])


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Foreign text in Markdown: no markup, no HTML, no new cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", text)


# -- words under the tables -------------------------------------------------------------------------------------------


def _title(table: Table) -> str:
    return f"{plain(table.model)} · {plain(table.evaluation)}"


def _caption(table: Table) -> Iterator[str]:
    yield _measured(table)
    differences = [row.difference for row in table.rows if row.difference]
    if differences:
        yield _meaning(table, min(difference.clusters for difference in differences))
    if any(row.marked for row in table.rows):
        family = sum(row.adjusted_p is not None for row in table.rows)
        yield (
            f"* differs from the baseline: Holm-adjusted p < {FAMILY_ALPHA} over {plural(family, 'cell')} of this table"
        )
    for row in table.rows[:ROWS_SHOWN]:
        for text in (row.remark, *row.notes):
            if text:
                yield f"{plain(row.name)} {plain(row.cell.scheme)}: {plain(text, ERROR_SHOWN)}"
    yield from (plain(text, ERROR_SHOWN) for text in table.remarks)
    hidden = len(table.rows) - ROWS_SHOWN
    if hidden > 0:
        yield f"{plural(hidden, 'more row')} than a terminal shows: --format csv has all"


def _measured(table: Table) -> str:
    """'141 windows, 62 clusters; perplexity, text wikitext2, length 2048; bfloat16, fake quantization; ...'"""
    metrics = [metric for row in table.rows for metric in row.metrics.values()]
    unit = "window" if table.protocol.get("evaluator") == "perplexity" else "item"
    counts = [plural(max((metric.n for metric in metrics), default=0), unit)]
    clusters = [metric.clusters for metric in metrics if metric.clusters is not None]
    if clusters:
        counts.append(plural(max(clusters), "cluster"))
    options = table.protocol.get("options")
    said = options.items() if isinstance(options, dict) else ()
    words = [f"{key} {value}" for key, value in said if value is not None and not isinstance(value, bool)]
    words += [str(table.protocol[key]) for key in ("dtype",) if table.protocol.get(key)]
    run = table.protocol.get("run")
    words += [f"{run} quantization"] if run else []
    return plain(f"{', '.join(counts)}; {', '.join([*words, f'protocol {table.eval_id[:ID_SHOWN]}'])}")


def _meaning(table: Table, clusters: int) -> str:
    """What the interval answers, and what it leaves out."""
    if clusters < INTERVAL_CLUSTERS:
        return f"paired by document; no intervals below {INTERVAL_CLUSTERS} clusters"
    words = [
        f"{100 * LEVEL:g} % intervals paired by document: how far the change would move on other text of this kind"
    ]
    seeds = {row.cell.seed for row in table.rows} - {None}
    if seeds:
        words.append(f"{'1 seed' if len(seeds) == 1 else 'each row is one seed'}: calibration noise not included")
    if clusters < MARK_CLUSTERS:
        words.append(f"no marks below {MARK_CLUSTERS} clusters")
    return "; ".join(words)


def _failures(failed: Sequence[FailedCell]) -> Iterator[str]:
    """A heading and one indented line per cell; nothing when there are none."""
    if failed:
        yield f"{plural(len(failed), 'cell')} failed"
    for cell in failed:
        name = " ".join(plain(part) for part in (cell.label, cell.model) if part)
        where = f"{plural(cell.attempts, 'attempt')}, last stage {plain(cell.stage)}"
        error = plain(cell.error, ERROR_SHOWN) or "no message"
        yield f"  {plain(cell.kind)}: {plain(cell.cell_id)[:ID_SHOWN]} {name and f'{name} '}({where}): {error}"
