"""Drawn parts: figures of a model's layers, and of its tasks side by side."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qfarm.record import LayerRow
from qfarm.report import charts
from qfarm.report.drawn import Drawn, harm, name_of, scaled
from qfarm.report.figures import interval, number, plain, plural
from qfarm.report.pairs import Readable
from qfarm.report.rows import Row, Table, headline, records

MAPS = 6  # cells of one model whose layers are mapped
TASK_RECIPES = 6  # recipes that share a chart of tasks


def of_layers(store: Readable, table: Table, anchor: str) -> Drawn | None:
    """Where the error sits, of the best cells of a table; None where no layer of theirs has an error."""
    rows = [row for row in table.rows if not row.is_baseline and row.stopped is None]
    best: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: (harm(row), row.cell.cell_id)):
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
            if known is None or not math.isfinite(known.value):
                continue
            ends = interval(known.low, known.high, known.unit)
            label = f"{group}, {name}: {number(known.value, known.unit)} {ends}"
            value, low, high = (
                None if end is None else scaled(end, known.unit) for end in (known.value, known.low, known.high)
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
            harms[_named(row)].append(0.0 if row.is_baseline else harm(row))
    most = max(map(len, harms.values()))
    mean = {name: float(np.mean(found)) for name, found in harms.items() if len(found) == most}
    others = sorted((name for name in mean if name != "baseline"), key=lambda name: (mean[name], name))
    return ["baseline"] * ("baseline" in mean) + others[: TASK_RECIPES - 1]
