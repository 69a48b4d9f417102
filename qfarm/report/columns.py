"""Columns: what a table of the report shows, and which of it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rich.cells import cell_len

from qfarm.report.figures import duration, interval, number, plain
from qfarm.report.tables import ID_SHOWN, Row, Table

NARROW = 100  # terminal columns; below, recipes are folded early so that intervals stay
NAME_WIDTHS = (18, 36)  # recipe with its options: narrow, wide
GAP = 2  # blanks between columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    heading: str
    text: Callable[[Row], str]
    rank: int  # what comes first when there is no room for all; 0 stays always
    numeric: bool = True  # right-aligned, and never folded


def _metric(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        metric = row.metrics.get(name)
        return number(metric.value, metric.unit) if metric else ""

    return text


def _change(row: Row) -> str:
    """'+5.2 %*': in percent of the baseline's perplexity; the place of the mark is kept free."""
    if row.difference is None:
        return ""
    if row.difference.identical:
        return "identical "
    value, low, high = row.difference.percent
    error = None if low is None or high is None else (high - low) / 2
    return number(value, "percent", error, signed=True) + ("*" if row.marked else " ")


def _change_interval(row: Row) -> str:
    if row.difference is None:
        return ""
    _, low, high = row.difference.percent
    return interval(low, high, "percent", signed=True)


def _group(row: Row) -> str:
    return "" if row.cell.group_size == -1 else str(row.cell.group_size)


def _seed(row: Row) -> str:
    return "" if row.cell.seed is None else str(row.cell.seed)


_COLUMNS = (
    Column(heading="recipe", text=lambda row: plain(row.name), rank=0, numeric=False),
    Column(heading="bits", text=lambda row: plain(row.cell.scheme), rank=0, numeric=False),
    Column(heading="group", text=_group, rank=2),
    Column(heading="seed", text=_seed, rank=2),
    Column(heading="stored", text=lambda row: number(row.cell.linear_bits, "bits"), rank=3),
    Column(heading="PPL", text=_metric("perplexity"), rank=1),
    Column(heading="change ", text=_change, rank=1),
    Column(heading="95 % interval", text=_change_interval, rank=4),
    Column(heading="KL", text=_metric("kl"), rank=5),
    Column(heading="agree", text=_metric("top1_agreement"), rank=6),
    Column(heading="right", text=_metric("top1_accuracy"), rank=9),
    Column(heading="flips", text=_metric("flips"), rank=10),
    Column(heading="lost", text=_metric("lost"), rank=10),
    Column(heading="gained", text=_metric("gained"), rank=10),
    Column(heading="KL back", text=_metric("kl_reverse"), rank=11),
    Column(heading="model bits", text=lambda row: number(row.cell.model_bits, "bits"), rank=12),
    Column(heading="time", text=lambda row: duration(row.wall_s), rank=7),
    Column(heading="cell", text=lambda row: plain(row.cell.cell_id, ID_SHOWN + 1)[:ID_SHOWN], rank=8, numeric=False),
)
SHOWN_METRICS = frozenset(
    {"perplexity", "kl", "top1_agreement", "top1_accuracy", "flips", "lost", "gained", "kl_reverse"}
)


def columns_of(table: Table) -> list[Column]:
    """The columns in which a table has anything to say, in reading order."""
    columns = list(_COLUMNS)
    others = sorted({name for row in table.rows for name in row.metrics} - SHOWN_METRICS)
    at = [column.heading for column in columns].index("PPL")
    columns[at:at] = [Column(heading=plain(name), text=_metric(name), rank=1) for name in others]
    several_seeds = len({row.cell.seed for row in table.rows} - {None}) > 1
    return [
        column
        for column in columns
        if any(column.text(row).strip() for row in table.rows) and (column.heading != "seed" or several_seeds)
    ]


def name_width(width: int) -> int:
    return NAME_WIDTHS[width >= NARROW]


def fitting(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[Column]:
    """As many columns as `width` holds, the lowest ranks first; one that does not fit shuts out none after it."""
    room, kept = width + GAP, set()
    for column in sorted(columns, key=lambda column: column.rank):
        needed = GAP + max([cell_len(column.heading), *(cell_len(column.text(row)) for row in rows)])
        if column.heading == "recipe":
            needed = min(needed, GAP + name_width(width))
        if column.rank == 0 or needed <= room:
            kept.add(column.heading)
            room -= needed
    return [column for column in columns if column.heading in kept]
