"""Columns: what a table of the report shows, and which of it fits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.cells import cell_len

from qfarm.report.figures import duration, interval, number, plain, size
from qfarm.report.rows import ID_SHOWN, Replicates, Row, Table, headline
from qfarm.stats import AccuracyDifference, Interval

NARROW = 100  # terminal columns; below, recipes are folded early so that intervals stay
NAME_WIDTHS = (18, 36)  # recipe with its options: narrow, wide
GAP = 2  # blanks between columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    heading: str
    text: Callable[[Any], str]  # of a Row, or of Replicates
    rank: int  # what comes first when there is no room for all; 0 stays always
    numeric: bool = True  # right-aligned, and never folded
    value: Callable[[Any], float | None] | None = None  # the number behind the text, where there is one
    may_be_share: bool = False  # a metric: fractions are shown in percent

    def order(self, row: Any) -> float | None:
        """What rows are sorted and filtered by; None: nothing is known, or the text decides."""
        found = self.value(row) if self.value else None
        return None if found is None or math.isnan(found) else float(found)

    def shown(self, row: Any) -> float | None:
        """The same as a reader sees it: fractions in percent."""
        found = self.order(row)
        is_share = self.may_be_share and self.text(row).endswith(" %")
        return None if found is None else found * (100.0 if is_share else 1.0)


def _metric(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        metric = row.metrics.get(name)
        return number(metric.value, metric.unit) if metric else ""

    return text


def _value(name: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        metric = row.metrics.get(name)
        return metric.value if metric else None

    return value


def _figure(heading: str, name: str, rank: int) -> Column:
    """A metric under a heading of its own."""
    return Column(heading=heading, text=_metric(name), rank=rank, value=_value(name), may_be_share=True)


def _bytes(heading: str, name: str, rank: int) -> Column:
    """The same for sizes."""

    def text(row: Row) -> str:
        metric = row.metrics.get(name)
        return size(int(metric.value)) if metric else ""

    return Column(heading=heading, text=text, rank=rank, value=_value(name))


def _decode_spread(row: Row) -> str:
    low, high = (row.metrics.get(f"decode_tokens_per_s_{share}") for share in ("p20", "p80"))
    return interval(low.value, high.value, low.unit) if low and high else ""


def _counted(heading: str) -> Column:
    """Flips, lost or gained: of items where accuracies are compared, else the metric."""
    value = functools.partial(_items_value, heading)
    return Column(heading=heading, text=_items(heading), rank=10, value=value, may_be_share=True)


def _change(mark_width: int, row: Row) -> str:
    """'+5.2 %*' of the baseline's perplexity, '-1.20*' points; the place of the mark is kept free."""
    if row.difference is None:
        return ""
    if row.difference.identical:
        same = "no flips" if isinstance(row.difference, AccuracyDifference) else "identical"
        return same + " " * mark_width
    return _shown(row.difference.shown, row.difference.unit) + row.mark.ljust(mark_width)


def _shown(interval: Interval, unit: str) -> str:
    value, low, high = interval
    error = None if low is None or high is None else (high - low) / 2
    return number(value, unit, error, signed=True)


def _change_interval(row: Row) -> str:
    if row.difference is None:
        return ""
    _, low, high = row.difference.shown
    return interval(low, high, row.difference.unit, signed=True)


def _with_seeds(row: Row) -> str:
    if row.difference is None or row.with_seeds is None:
        return ""
    _, low, high = in_reading_units(row, row.with_seeds)
    return interval(low, high, row.difference.unit, signed=True)


def in_reading_units(row: Row, ends: Interval) -> Interval:
    """An interval in the scale of differences as percent or points."""
    assert row.difference is not None
    value, low, high = (None if end is None else row.difference.show(end) for end in ends)
    assert value is not None
    return Interval(value, low, high)


def _items(name: str) -> Callable[[Row], str]:
    """Of items where accuracies are compared, else the metric."""

    def text(row: Row) -> str:
        if isinstance(row.difference, AccuracyDifference):
            found = row.difference
            return number(found.flips.value, "fraction") if name == "flips" else f"{getattr(found, name):,}"
        return _metric(name)(row)

    return text


def _items_value(name: str, row: Row) -> float | None:
    if isinstance(row.difference, AccuracyDifference):
        return row.difference.flips.value if name == "flips" else float(getattr(row.difference, name))
    return _value(name)(row)


def _answers(row: Row) -> str:
    return "" if row.answers_changed is None else f"{row.answers_changed:,}"


def _group(row: Row) -> str:
    return "" if row.cell.group_size == -1 else str(row.cell.group_size)


def _seed(row: Row) -> str:
    return "" if row.cell.seed is None else str(row.cell.seed)


def _causal(row: Row) -> str:
    return "no" if row.cell.causal is False else ""


def _best(row: Row) -> str:
    return "stopped" if row.stopped is not None else "|" if row.best else ""


def _front(row: Row) -> str:
    return row.front or ""


def _columns(change: str, mark_width: int) -> tuple[Column, ...]:
    return (
        Column(heading="recipe", text=lambda row: plain(row.name), rank=0, numeric=False),
        Column(heading="bits", text=lambda row: plain(row.cell.scheme), rank=0, numeric=False),
        Column(heading="group", text=_group, rank=2, value=lambda row: row.cell.group_size),
        Column(heading="seed", text=_seed, rank=2, value=lambda row: row.cell.seed),
        Column(
            heading="stored",
            text=lambda row: number(row.cell.linear_bits, "bits"),
            rank=3,
            value=lambda row: row.cell.linear_bits,
        ),
        Column(
            heading="KV bits",
            text=lambda row: number(row.cell.kv_bits, "bits"),
            rank=3,
            value=lambda row: row.cell.kv_bits,
        ),
        Column(
            heading="input bits",
            text=lambda row: number(row.cell.activation_bits, "bits"),
            rank=8,
            value=lambda row: row.cell.activation_bits,
        ),
        _figure("PPL", "perplexity", 1),
        Column(
            heading=change + " " * mark_width,
            text=functools.partial(_change, mark_width),
            rank=1,
            value=lambda row: row.difference.shown.value if row.difference else None,
        ),
        Column(heading="95 % interval", text=_change_interval, rank=4),
        Column(heading="with seed noise", text=_with_seeds, rank=5),
        _figure("decode tok/s", "decode_tokens_per_s", 1),
        Column(heading="p20, p80", text=_decode_spread, rank=4),
        _figure("prefill tok/s", "prefill_tokens_per_s", 1),
        _figure("first token s", "first_token_s", 4),
        _bytes("weights", "weight_bytes", 2),
        _bytes("KV cache", "kv_bytes", 3),
        _bytes("peak memory", "peak_bytes", 5),
        _figure("difference", "logit_difference", 2),
        _figure("rounding", "logit_rounding", 2),
        _figure("worst layer", "worst_layer", 2),
        _figure("KL to fake", "packed_kl", 2),
        _figure("agree with fake", "packed_agreement", 3),
        Column(heading="best", text=_best, rank=5),
        _figure("KL", "kl", 5),
        _figure("agree", "top1_agreement", 6),
        _figure("right", "top1_accuracy", 9),
        _counted("flips"),
        _counted("lost"),
        _counted("gained"),
        Column(heading="answers", text=_answers, rank=10, value=lambda row: row.answers_changed),
        _figure("KL back", "kl_reverse", 11),
        _figure("KL median", "kl_median", 11),
        _figure("KL p99", "kl_p99", 11),
        Column(
            heading="model bits",
            text=lambda row: number(row.cell.model_bits, "bits"),
            rank=12,
            value=lambda row: row.cell.model_bits,
        ),
        Column(heading="causal", text=_causal, rank=6),
        Column(heading="Pareto", text=_front, rank=13, numeric=False),
        Column(heading="time", text=lambda row: duration(row.wall_s), rank=7, value=lambda row: row.wall_s),
        Column(
            heading="cell", text=lambda row: plain(row.cell.cell_id, ID_SHOWN + 1)[:ID_SHOWN], rank=8, numeric=False
        ),
    )


SHOWN_METRICS = frozenset(
    {"perplexity", "kl", "top1_agreement", "top1_accuracy", "flips", "lost", "gained", "kl_reverse"}
    | {"kl_median", "kl_p99"}
    | {"kl_floor", "flips_floor"}  # in the caption
    | {
        f"{time}{share}"  # quantiles other than those of decoding: for programs
        for time in ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_s")
        for share in ("", "_p20", "_p80")
    }
    | {"weight_bytes", "kv_bytes", "peak_bytes"}
    | {"logit_difference", "logit_rounding", "worst_layer", "packed_kl", "packed_agreement"}
)


def columns_of(table: Table) -> list[Column]:
    """The columns in which a table has anything to say, in reading order."""
    mark_width = max([1, *(len(row.mark) for row in table.rows)])
    columns = list(_columns(_change_heading(table), mark_width))
    known = {found.metric for row in table.rows if (found := headline(row.metrics))}
    others = sorted({name for row in table.rows for name in row.metrics} - SHOWN_METRICS)
    leading = [name for name in others if name in known or not known]
    for before, names, rank in (("PPL", leading, 1), ("model bits", sorted({*others} - {*leading}), 11)):
        at = [column.heading for column in columns].index(before)
        columns[at:at] = [_figure(plain(name), name, rank) for name in names]
    several_seeds = len({row.cell.seed for row in table.rows} - {None}) > 1
    return [
        column
        for column in columns
        if any(column.text(row).strip() for row in table.rows) and (column.heading != "seed" or several_seeds)
    ]


def _change_heading(table: Table) -> str:
    """Of perplexity per token, which is said where another one stands beside it."""
    if table.measure == "accuracy":
        return "points"
    by_word = any("word_perplexity" in row.metrics for row in table.rows)
    return "change per token" if by_word else "change"


def seed_columns(table: Table) -> list[Column]:
    """Columns of the rows that were measured with several seeds."""
    known = next((found for row in table.rows if (found := headline(row.metrics))), None)
    name = known.metric if known else ""
    heading = f"mean {'PPL' if name == 'perplexity' else plain(name)}"

    def mean(group: Replicates) -> str:
        return number(group.values.get(name), known.unit if known else "")

    columns = (
        Column(heading="recipe", text=lambda group: plain(group.first.name), rank=0, numeric=False),
        Column(heading="bits", text=lambda group: plain(group.first.cell.scheme), rank=0, numeric=False),
        Column(heading="group", text=lambda group: _group(group.first), rank=2),
        Column(heading="seeds", text=lambda group: str(len(group.rows)), rank=0),
        Column(heading=heading, text=mean, rank=3),
        Column(heading=_change_heading(table), text=_seeds_change, rank=1),
        Column(heading="95 % interval", text=_seeds_interval, rank=1),
        Column(heading="spread", text=_spread, rank=1),
    )
    return [column for column in columns if any(column.text(group) for group in table.replicates)]


def _seeds_change(group: Replicates) -> str:
    found = group.first.difference
    if found is None or group.difference is None:
        return ""
    return _shown(in_reading_units(group.first, group.difference.interval()), found.unit)


def _seeds_interval(group: Replicates) -> str:
    found = group.first.difference
    if found is None or group.difference is None:
        return ""
    _, low, high = in_reading_units(group.first, group.difference.interval())
    return interval(low, high, found.unit, signed=True)


def _spread(group: Replicates) -> str:
    found = group.first.difference
    if found is None or group.difference is None:
        return ""
    return number(found.show(group.difference.spread), found.unit)


def name_width(width: int) -> int:
    return NAME_WIDTHS[width >= NARROW]


def fitting(columns: Sequence[Column], rows: Sequence[Any], width: int) -> list[Column]:
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
