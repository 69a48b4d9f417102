"""Drawn: the figures of the HTML report, each with its caption, its chart and the numbers that the chart shows."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qfarm.record import LayerRow, MetricRow
from qfarm.report import charts
from qfarm.report.figures import interval, number, plain, plural
from qfarm.report.pairs import Readable
from qfarm.report.rows import ID_SHOWN, Row, Table, headline, parsed, records
from qfarm.stats import Interval

MARKS = 2000  # per chart; above, only Pareto points and the best of each recipe. A guess, not measured
ROWS_DRAWN = 30  # of a dot plot
MAPS = 6  # cells of one model whose layers are mapped
TASK_RECIPES = 6  # recipes that share a chart of tasks
SWEPT = 3  # values of an option that make a curve
ASIDE = 0.006  # of its bits, by which a point is moved aside for each neighbour of the same size
NEAR, NEAR_UP = 0.5, 0.07  # of a chart's width and height: closer names would overlap
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
    drawn = [row for row in table.rows if not row.is_baseline and headline(row.metrics)]
    if not drawn:
        return
    yield _pareto(table, drawn, f"{anchor}-front")
    compared = [row for row in drawn if row.difference is not None]
    if compared:
        yield _changes(table, compared, f"{anchor}-changes")


def name_of(row: Row) -> str:
    return f"{plain(row.name)} {_size(row)}{_seed(row)}"


def _size(row: Row) -> str:
    return plain(row.cell.scheme) + ("" if row.cell.group_size == -1 else f" g{row.cell.group_size}")


def _seed(row: Row) -> str:
    return f" seed {row.cell.seed}" if row.cell.seed else ""


# -- one evaluation ---------------------------------------------------------------------------------------------------


def _pareto(table: Table, rows: Sequence[Row], anchor: str) -> Drawn:
    known = headline(rows[0].metrics)
    assert known is not None
    baseline = headline(table.rows[0].metrics) if table.rows[0].is_baseline else None
    shown = _thinned(rows)
    aside: collections.Counter[float] = collections.Counter()
    points: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    for row in sorted(shown, key=lambda row: (row.cell.linear_bits, name_of(row), row.cell.cell_id)):
        value, (low, high) = _quality(row), _ends(row, baseline)
        if value is None or not math.isfinite(value):
            continue
        bits = row.cell.linear_bits
        step = aside[bits]
        aside[bits] += 1
        ends = interval(low, high, known.unit)
        what = f"{number(bits, 'bits')} bits, {known.metric} {number(value, known.unit)} {ends}".strip()
        place = row.front or "not ranked"
        points.append(
            {
                "x": round(bits * (1 + ASIDE * ((step + 1) // 2) * (-1) ** step), 6),
                "y": _scaled(value, known.unit),
                "low": None if low is None else _scaled(low, known.unit),
                "high": None if high is None else _scaled(high, known.unit),
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
            f"Front: {_listed(front)}. {dominated} of {plural(len(points), 'row')} dominated: shown worse than a row "
            "with no more stored bits, adjusted for all pairs; undecided: not shown so, and not the best of its size. "
            "Bars: 95 % interval of the paired change, laid off from the baseline. Points of one size stand side by "
            f"side{of}"
        ),
        spec=charts.size_against_quality(
            points,
            None if baseline is None else _scaled(baseline.value, known.unit),
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


def _quality(row: Row) -> float | None:
    known = headline(row.metrics)
    return known.value if known else None


def _scaled(value: float, unit: str) -> float:
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
        if _harm(row) < _harm(held):
            best[row.cell.recipe, row.cell.scheme] = row
    kept = {row.cell.cell_id for row in best.values()} | {row.cell.cell_id for row in rows if row.front == "front"}
    return [row for row in rows if row.cell.cell_id in kept][:MARKS]


def _harm(row: Row) -> float:
    return row.difference.harm if row.difference else math.inf


def _changes(table: Table, rows: Sequence[Row], anchor: str) -> Drawn:
    ordered = sorted(rows, key=lambda row: (_harm(row), name_of(row), row.cell.cell_id))
    shown = ordered[:ROWS_DRAWN]
    unit = "%" if table.measure == "perplexity" else "points"
    points: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    for row in shown:
        assert row.difference is not None
        value, low, high = _finite(row.difference.shown)
        written = f"{_signed(row, row.difference.shown)}{row.mark}"
        ends = interval(low, high, row.difference.unit, signed=True)
        place = " (best)" if row.best else " (stopped early)" if row.stopped else ""
        # What a narrow page cuts off is then the end of long options.
        name = f"{written}{place}: {_size(row)} {plain(row.name)}{_seed(row)}"
        judged = "differs" if row.marked else "not shown to differ"
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
    of = f"; the {len(shown):,} best of {len(ordered):,} drawn" if len(shown) < len(ordered) else ""
    return Drawn(
        anchor=anchor,
        title="Difference to the baseline",
        caption=(
            f"Change of {'perplexity in percent' if unit == '%' else 'accuracy in points'}, paired by document, with "
            f"95 % intervals. Not shown worse than the best: {_listed(best)}{of}"
        ),
        spec=charts.changes(points, f"change ({unit})", unit == "%" and largest > SYMLOG),
        headings=("row", "change", "95 % interval", "p (Holm)", "verdict", "cell"),
        rows=tuple(lines),
    )


def _finite(ends: Interval) -> tuple[float | None, float | None, float | None]:
    value, low, high = (None if end is None or not math.isfinite(end) else round(end, 6) for end in ends)
    return value, low, high


def _signed(row: Row, shown: Interval) -> str:
    assert row.difference is not None
    value, low, high = shown
    error = None if low is None or high is None else (high - low) / 2
    return number(value, row.difference.unit, error, signed=True)


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = list(dict.fromkeys(names))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) + more) or "none"


# -- layers -----------------------------------------------------------------------------------------------------------


def of_layers(store: Readable, table: Table, anchor: str) -> Drawn | None:
    """Where the error sits, of the best cells of a table; None where no layer of theirs has an error."""
    rows = [row for row in table.rows if not row.is_baseline and row.stopped is None]
    best: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: (_harm(row), row.cell.cell_id)):
        best.setdefault((row.cell.scheme, row.cell.group_size), row)
    chosen = list(best.values())[:MAPS]
    layers = [
        layer
        for layer in records(store, "layers", LayerRow, [row.cell.cell_id for row in chosen])
        if _relative(layer) is not None
    ]
    if not layers:
        return None
    names = {row.cell.cell_id: name_of(row) for row in chosen}
    cells = [name for cell_id, name in names.items() if any(layer.cell_id == cell_id for layer in layers)]
    roles = list(dict.fromkeys(layer.role for layer in sorted(layers, key=lambda layer: layer.layer)))
    by_output = all(layer.output_error is not None for layer in layers)
    points: list[dict[str, Any]] = [
        {
            "cell": names[layer.cell_id],
            "layer": layer.layer,
            "role": plain(layer.role),
            "value": round(found, 6),
            "label": f"{names[layer.cell_id]}, layer {layer.layer} {plain(layer.role)}: {found:.3g} %",
        }
        for layer in sorted(layers, key=lambda layer: (layer.cell_id, layer.layer, roles.index(layer.role)))
        if (found := _relative(layer, by_output)) is not None
    ]
    worst = max(points, key=lambda point: point["value"])
    what = "||(W - Q)X|| / ||WX|| on calibration inputs" if by_output else "||W - Q|| / ||W||"
    return Drawn(
        anchor=anchor,
        title="Where the error sits",
        caption=(
            f"Relative error {what} of every linear layer; blank: 0. Largest: {worst['label']}. "
            f"{plural(len(cells), 'cell')} of {len(rows):,}: the best of each width and group"
        ),
        spec=charts.heat_map(points, cells, [plain(role) for role in roles], "error (%)"),
        headings=("cell", "layer", *(plain(role) for role in roles)),
        rows=tuple(_by_role(points, [plain(role) for role in roles])),
        fixed=True,
    )


def _relative(layer: LayerRow, by_output: bool | None = None) -> float | None:
    """Percent; of the output where every layer has one, else of the weight."""
    error = (
        layer.output_error
        if by_output or (by_output is None and layer.output_error is not None)
        else layer.weight_error
    )
    return None if error is None or not math.isfinite(error) or error < 0 else 100 * math.sqrt(error)


def _by_role(points: Iterable[Mapping[str, Any]], roles: Sequence[str]) -> Iterator[tuple[str, ...]]:
    found: dict[tuple[str, int], dict[str, str]] = collections.defaultdict(dict)
    for point in points:
        found[point["cell"], point["layer"]][point["role"]] = f"{point['value']:.3g}"
    for (cell, layer), values in found.items():
        yield (cell, str(layer), *(values.get(role, "") for role in roles))


# -- tasks ------------------------------------------------------------------------------------------------------------


def of_tasks(tables: Sequence[Table], anchor: str) -> Drawn | None:
    """Accuracies of one model's tasks side by side, of the baseline and the best cells; None without tasks."""
    tasks = [(table, name) for table in tables if table.measure == "accuracy" for name in _task_metrics(table)]
    if not tasks:
        return None
    chosen = _best_over(table for table, _ in tasks)
    points: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    for table, metric in tasks:
        group = plain(metric.rpartition(" ")[0] or table.evaluation)
        for name in chosen:
            row = next((row for row in table.rows if _named(row) == name), None)
            known = row.metrics.get(metric) if row else None
            if known is None:
                continue
            ends = interval(known.low, known.high, known.unit)
            label = f"{group}, {name}: {number(known.value, known.unit)} {ends}"
            value, low, high = (
                None if end is None else _scaled(end, known.unit) for end in (known.value, known.low, known.high)
            )
            shown = f"{group}: {name} {number(known.value, known.unit)}"
            points.append({"name": shown, "value": value, "low": low, "high": high, "label": label})
            lines.append((group, name, number(known.value, known.unit), ends, f"{known.n:,}"))
    return Drawn(
        anchor=anchor,
        title="Tasks",
        caption=(
            "Share of items right, with the 95 % interval of each cell alone; differences are paired and much more "
            "certain than these overlap: see the tables. The baseline and the best cells over all tasks"
        ),
        spec=charts.bars(points, "right (%)"),
        headings=("task", "row", "right", "95 % interval", "items"),
        rows=tuple(lines),
    )


def _task_metrics(table: Table) -> list[str]:
    """The accuracies of a table: that of each task of a suite, or the one headline."""
    known = next((found for row in table.rows if (found := headline(row.metrics))), None)
    if known is None:
        return []
    ending = f" {known.metric}"
    return sorted({name for row in table.rows for name in row.metrics if name.endswith(ending)}) or [known.metric]


def _named(row: Row) -> str:
    return "baseline" if row.is_baseline else name_of(row)


def _best_over(tables: Iterable[Table]) -> list[str]:
    """Names of the baseline and of the rows with the smallest mean loss over the tables that have them all."""
    harms: dict[str, list[float]] = collections.defaultdict(list)
    for table in {table.eval_id: table for table in tables}.values():
        for row in table.rows:
            harms[_named(row)].append(0.0 if row.is_baseline else _harm(row))
    most = max(map(len, harms.values()))
    mean = {name: float(np.mean(found)) for name, found in harms.items() if len(found) == most}
    others = sorted((name for name in mean if name != "baseline"), key=lambda name: (mean[name], name))
    return ["baseline"] * ("baseline" in mean) + others[: TASK_RECIPES - 1]


# -- sweeps and kernels -----------------------------------------------------------------------------------------------


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
            kept[option][f"{plain(one.cell.recipe)} {_size(one)}"] = found
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
            if shown is None:
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
    return (None, None, None) if row.difference is None else _finite(row.difference.shown)


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
        if value is None or share is None:
            continue
        written, ends = _signed(row, Interval(value, low, high)), interval(low, high, "percent", signed=True)
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
