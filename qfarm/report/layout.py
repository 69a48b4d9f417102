"""Layout: sections, name-value lists and small tables for what is shown of one cell or two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from qfarm.report.figures import plain
from qfarm.report.protocols import flatten


def section(title: str, parts: Iterable[RenderableType]) -> list[RenderableType]:
    return [Text(title, style="bold", overflow="fold"), Padding(Group(*parts), (0, 0, 1, 2))]


def pairs(facts: Mapping[str, str]) -> RichTable:
    """Name and value, line by line; empty values are left out."""
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=30)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            grid.add_row(Text(plain(name)), Text(plain(value)))
    return grid


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int]) -> RichTable:
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, heading in enumerate(headings):
        right = index in numeric
        grid.add_column(heading, justify="right" if right else "left", no_wrap=right or index == 0, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(plain(value)) for value in row))
    return grid


def words(value: Any) -> str:
    """Plain data as 'act_order=true, damp=0.01'."""
    if not isinstance(value, (Mapping, list)):
        return plain(value)
    return plain(", ".join(_assignments(flatten(value))))


def _assignments(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield f"{name}={value if isinstance(value, str) else json.dumps(value)}"
