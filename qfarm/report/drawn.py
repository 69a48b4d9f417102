"""Drawn: the figures of the HTML report, each with its caption, its chart and the numbers that the chart shows.

Here are those of one evaluation; `drawn_parts` has layers and tasks, `drawn_curves` swept options and kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from qfarm.record import MetricRow
from qfarm.report import charts
from qfarm.report.figures import interval, number, plain, plural
from qfarm.report.rows import ID_SHOWN, Row, Table, headline
from qfarm.stats import MARK_CLUSTERS, Interval

MARKS = 2000  # per chart; above, only Pareto points and the best of each recipe. A guess, not measured
ROWS_DRAWN = 30  # of a dot plot
ASIDE, ASIDE_MOST = 0.006, 0.03  # of its bits: by this a point is moved aside for each of the same size, and at most
NEAR, NEAR_UP = 0.75, 0.07  # of a chart's width and height: closer names would overlap
SYMLOG = 20.0  # percent: from changes of this size on, an axis is logarithmic on both sides of zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """One figure: `spec` for Vega-Lite, and the same numbers as a table of `rows`."""

    anchor: str
    title: str
    caption: str
    spec: charts.Spec
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    fixed: bool = False  # keeps its own width, and scrolls


def of_table(table: Table, anchor: str) -> Iterator[Drawn]:
    """Size against quality, and the differences to the baseline."""
    drawn = [row for row in table.rows if not row.is_baseline and math.isfinite(_quality(row))]
    if not drawn:
        return
    yield _pareto(table, drawn, f"{anchor}-front")
    compared = [row for row in drawn if row.difference is not None]
    if compared:
        yield _changes(table, compared, f"{anchor}-changes")


def name_of(row: Row) -> str:
    return f"{plain(row.name)} {size_of(row)}{_seed(row)}"


def size_of(row: Row) -> str:
    return plain(row.cell.scheme) + ("" if row.cell.group_size == -1 else f" g{row.cell.group_size}")


def _seed(row: Row) -> str:
    return f" seed {row.cell.seed}" if row.cell.seed else ""


# -- one evaluation ---------------------------------------------------------------------------------------------------


def _pareto(table: Table, rows: Sequence[Row], anchor: str) -> Drawn:
    known = headline(rows[0].metrics)
    assert known is not None
    baseline = headline(table.rows[0].metrics) if math.isfinite(_quality(table.rows[0])) else None
    baseline = baseline if table.rows[0].is_baseline else None
    shown = _thinned(rows)
    alike = collections.Counter(row.cell.linear_bits for row in shown)
    aside: collections.Counter[float] = collections.Counter()
    points: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    for row in sorted(shown, key=lambda row: (row.cell.linear_bits, name_of(row), row.cell.cell_id)):
        value, (low, high) = _quality(row), _ends(row, baseline)
        bits = row.cell.linear_bits
        step, away = aside[bits], min(ASIDE, 2 * ASIDE_MOST / alike[bits])
        aside[bits] += 1
        ends = interval(low, high, known.unit)
        what = f"{number(bits, 'bits')} bits, {known.metric} {number(value, known.unit)} {ends}".strip()
        place = row.front or "not ranked"
        points.append(
            {
                "x": round(bits * (1 + away * ((step + 1) // 2) * (-1) ** step), 6),
                "y": scaled(value, known.unit),
                "low": None if low is None else scaled(low, known.unit),
                "high": None if high is None else scaled(high, known.unit),
                "class": place,
                "name": name_of(row),
                "label": f"{name_of(row)}: {what}; {place}",
            }
        )
        size = f"{row.cell.linear_bits:.4f}"
        lines.append((name_of(row), size, number(value, known.unit), ends, place, row.cell.cell_id[:ID_SHOWN]))
    _place_names(points)
    front = [point["name"] for point in points if point["class"] == "front"]
    of = f"; {len(points):,} of {len(rows):,} drawn" if len(points) < len(rows) else ""
    dominated = sum(point["class"] == "dominated" for point in points)
    return Drawn(
        anchor=anchor,
        title="Size against quality",
        caption=(
            f"Front: {listed(front)}. {dominated} of {plural(len(points), 'row')} dominated: shown worse than a row "
            "with no more stored bits, adjusted for all pairs; undecided: not shown so, and not the best of its size. "
            "Bars: 95 % interval of the paired change, laid off from the baseline. Points of one size stand side by "
            f"side{of}"
        ),
        spec=charts.size_against_quality(
            points,
            None if baseline is None else scaled(baseline.value, known.unit),
            f"{plain(known.metric)}{' (%)' if known.unit.startswith('fraction') else ''}, "
            f"{known.better if known.better != 'none' else 'neither'} is better",
            table.measure == "perplexity" and all(point["y"] > 0 for point in points),
        ),
        headings=("row", "stored bits", plain(known.metric), "95 % interval", "class", "cell"),
        rows=tuple(lines),
    )


def _place_names(points: Sequence[dict[str, Any]]) -> None:
    """Names of Pareto points where none stands close by, to the left of those at the right."""
    if not points:
        return
    across, up = ([math.log(max(abs(point[axis]), 1e-9)) for point in points] for axis in ("x", "y"))
    wide, high = (max(ends) - min(ends) or 1.0 for ends in (across, up))
    placed: list[tuple[float, float]] = []
    for point, x, y in zip(points, across, up, strict=True):
        near = any(abs(x - x0) < NEAR * wide and abs(y - y0) < NEAR_UP * high for x0, y0 in placed)
        named = point["class"] == "front" and not near
        point |= {"shown": point["name"] if named else "", "right": x > min(across) + 0.5 * wide}
        if named:
            placed.append((x, y))


def _quality(row: Row) -> float:
    known = headline(row.metrics)
    return known.value if known else math.nan


def scaled(value: float, unit: str) -> float:
    """As an axis shows it."""
    return round(100 * value if unit.startswith("fraction") else value, 6)


def _ends(row: Row, baseline: MetricRow | None) -> tuple[float | None, float | None]:
    """The interval of the paired change, laid off from the baseline's value."""
    found = row.difference
    if baseline is None or found is None or found.low is None or found.high is None or not row.complete:
        return None, None
    if found.unit == "percent":
        return baseline.value * math.exp(found.low), baseline.value * math.exp(found.high)
    return baseline.value + found.low, baseline.value + found.high


def _thinned(rows: Sequence[Row]) -> Sequence[Row]:
    """All rows, or where they are too many those on the front and the best of each recipe and scheme."""
    if len(rows) <= MARKS:
        return rows
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        held = best.setdefault((row.cell.recipe, row.cell.scheme), row)
        if harm(row) < harm(held):
            best[row.cell.recipe, row.cell.scheme] = row
    kept = {row.cell.cell_id for row in best.values()} | {row.cell.cell_id for row in rows if row.front == "front"}
    return [row for row in rows if row.cell.cell_id in kept][:MARKS]


def harm(row: Row) -> float:
    return row.difference.harm if row.difference else math.inf


def _changes(table: Table, rows: Sequence[Row], anchor: str) -> Drawn:
    ordered = sorted(rows, key=lambda row: (harm(row), name_of(row), row.cell.cell_id))
    shown = ordered[:ROWS_DRAWN]
    unit = "%" if table.measure == "perplexity" else "points"
    points: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    for row in shown:
        assert row.difference is not None
        value, low, high = finite(row.difference.shown)
        written = f"{signed(row, row.difference.shown)}{row.mark}"
        ends = interval(low, high, row.difference.unit, signed=True)
        place = " (best)" if row.best else " (stopped early)" if row.stopped else ""
        # What a narrow page cuts off is then the end of long options.
        name = f"{written}{place}: {size_of(row)} {plain(row.name)}{_seed(row)}"
        judged = "differs" if row.marked else "not shown to differ" if row.verdict else "not tested"
        points.append(
            {
                "id": row.cell.cell_id,
                "name": name,
                "value": value,
                "low": low,
                "high": high,
                "judged": judged,
                "label": f"{name} {ends}",
            }
        )
        p = "" if row.adjusted_p is None else f"{row.adjusted_p:.2g}"
        lines.append((name_of(row), written, ends, p, str(row.verdict or ""), row.cell.cell_id[:ID_SHOWN]))
    largest = max(
        (abs(end) for point in points for end in (point["value"], point["high"]) if end is not None), default=0
    )
    best = [name_of(row) for row in shown if row.best]
    untested = any(point["judged"] == "not tested" for point in points)
    few = f"; no test below {MARK_CLUSTERS} clusters" if untested else ""
    of = f"; the {len(shown):,} best of {len(ordered):,} drawn" if len(shown) < len(ordered) else ""
    return Drawn(
        anchor=anchor,
        title="Difference to the baseline",
        caption=(
            f"Change of {'perplexity in percent' if unit == '%' else 'accuracy in points'}, paired by document, with "
            f"95 % intervals. Not shown worse than the best: {listed(best)}{few}{of}"
        ),
        spec=charts.changes(points, f"change ({unit})", unit == "%" and largest > SYMLOG),
        headings=("row", "change", "95 % interval", "p (Holm)", "verdict", "cell"),
        rows=tuple(lines),
    )


def finite(ends: Interval) -> tuple[float | None, float | None, float | None]:
    value, low, high = (None if end is None or not math.isfinite(end) else round(end, 6) for end in ends)
    return value, low, high


def signed(row: Row, shown: Interval) -> str:
    assert row.difference is not None
    value, low, high = shown
    error = None if low is None or high is None else (high - low) / 2
    return number(value, row.difference.unit, error, signed=True)


def listed(names: Sequence[str], most: int = 6) -> str:
    shown = list(dict.fromkeys(names))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) + more) or "none"
