"""Drawn curves: what a swept option does, and what the share of zeroed activations has to do with the loss."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qfarm.report import charts
from qfarm.report.drawn import SYMLOG, Drawn, finite, name_of, signed, size_of
from qfarm.report.figures import interval, number, plain
from qfarm.report.rows import Row, Table, parsed
from qfarm.stats import Interval

SWEPT = 3  # values of an option that make a curve


def of_sweeps(table: Table, anchor: str) -> Iterator[Drawn]:
    """A curve for every numeric option of which a recipe has several values and nothing else differs."""
    series: dict[tuple[str, str], list[tuple[float, Row]]] = collections.defaultdict(list)
    for row in table.rows:
        for option, value, rest in _numeric_options(row):
            series[option, rest].append((value, row))
    kept: dict[str, dict[str, list[tuple[float, Row]]]] = collections.defaultdict(dict)
    for (option, _), found in series.items():
        if len({value for value, _ in found}) >= SWEPT:
            one = found[0][1]
            kept[option][f"{plain(one.cell.recipe)} {size_of(one)}"] = found
    for index, (option, lines) in enumerate(sorted(kept.items())):
        drawn = _sweep(table, option, lines, f"{anchor}-sweep-{index}")
        if drawn.rows:
            yield drawn


def _numeric_options(row: Row) -> Iterator[tuple[str, float, str]]:
    """Option, its value, and all that a curve must hold fast: the spec without the option, the seed and the name."""
    spec = parsed(row.cell.spec, {})
    methods = spec.get("methods") or []
    for place, method in enumerate(methods):
        options = method.get("options") or {}
        for option, value in options.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            others = [
                one | {"options": {name: given for name, given in one.get("options", {}).items() if name != option}}
                if number == place
                else one
                for number, one in enumerate(methods)
            ]
            rest = {key: given for key, given in spec.items() if key not in ("seed", "variant", "methods")}
            yield f"{method.get('name')} {option}", float(value), repr((sorted(rest.items(), key=str), others))


def _sweep(table: Table, option: str, lines: Mapping[str, Sequence[tuple[float, Row]]], anchor: str) -> Drawn:
    points: list[dict[str, Any]] = []
    data: list[tuple[str, ...]] = []
    shares = all("kernel" in row.metrics for found in lines.values() for _, row in found)
    unit = "%" if shares or table.measure == "perplexity" else "points"
    for series, found in sorted(lines.items()):
        for value, row in sorted(found, key=lambda pair: (pair[0], pair[1].cell.cell_id)):
            shown, low, high = (100 * row.metrics["kernel"].value, None, None) if shares else _shown_change(row)
            if shown is None or not math.isfinite(shown):
                continue
            written = number(shown, "points", None if low is None or high is None else (high - low) / 2, not shares)
            label = f"{series}, {plain(option)} {value:g}: {written} {unit}"
            points.append({"series": series, "x": value, "y": shown, "low": low, "high": high, "label": label})
            seed = "" if row.cell.seed is None else str(row.cell.seed)
            data.append((series, f"{value:g}", seed, f"{written} {unit}", interval(low, high, "points", signed=True)))
    largest = max((abs(point["y"]) for point in points), default=0.0)
    what = "share of activations that become zero (%)" if shares else f"change ({unit})"
    best = min(points, key=lambda point: point["y"], default=None) if unit == "%" else None
    return Drawn(
        anchor=anchor,
        title=f"{plain(option)}",
        caption=(
            f"{what.capitalize()} over {plain(option)}, nothing else differing; one point per seed, the line through "
            f"their means{'' if shares else '; 95 % intervals, paired'}"
            + (f". Smallest: {best['label']}" if best else "")
        ),
        spec=charts.curves(points, plain(option), what, wide=unit == "%" and not shares and largest > SYMLOG),
        headings=("series", plain(option), "seed", what, "95 % interval"),
        rows=tuple(data),
    )


def _shown_change(row: Row) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if row.difference is None else finite(row.difference.shown)


def of_kernels(tables: Sequence[Table], anchor: str) -> Drawn | None:
    """Share of activations that become zero against the change of perplexity; None where not both were measured."""
    shares = {
        row.cell.cell_id: row.metrics["kernel"].value
        for table in tables
        for row in table.rows
        if "kernel" in row.metrics
    }
    quality = next((table for table in tables if table.measure == "perplexity" and _both(table, shares)), None)
    if quality is None:
        return None
    points: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    for row in sorted(quality.rows, key=lambda row: (shares.get(row.cell.cell_id, -1.0), row.cell.cell_id)):
        value, low, high = _shown_change(row)
        share = shares.get(row.cell.cell_id)
        if value is None or share is None or not math.isfinite(share):
            continue
        written, ends = signed(row, Interval(value, low, high)), interval(low, high, "percent", signed=True)
        label = f"{name_of(row)}: {number(share, 'fraction')} zero, {written} {ends}"
        scheme = plain(row.cell.scheme)
        point = {"series": scheme, "x": round(100 * share, 6), "y": 100 + value, "label": label}
        points.append(point | {"low": None if low is None else 100 + low, "high": None if high is None else 100 + high})
        lines.append((name_of(row), number(share, "fraction"), written, ends))
    return Drawn(
        anchor=anchor,
        title="Kernel proportion",
        caption=(
            f"Share of activations that their quantizer makes zero against perplexity in percent of the baseline's, on "
            f"{plain(quality.evaluation)}"
        ),
        spec=charts.curves(
            points,
            "activations that become zero (%)",
            "perplexity (% of the baseline's)",
            logarithmic=True,
            joined=False,
        ),
        headings=("row", "zero", "change", "95 % interval"),
        rows=tuple(lines),
    )


def _both(table: Table, shares: Mapping[str, float]) -> bool:
    return sum(row.cell.cell_id in shares and row.difference is not None for row in table.rows) >= SWEPT
