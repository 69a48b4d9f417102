"""Data: results for programs, as CSV or JSON, with every digit."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from qfarm.report.figures import plain
from qfarm.report.tables import FailedCell, Results, Row, Table

_CELL = (
    *("cell_id", "recipe", "scheme", "group_size", "seed", "symmetric", "scale_dtype", "dtype", "statistics"),
    *("linear_bits", "model_bits", "linear_bytes", "model_bytes", "layers_quantized", "layers_skipped"),
)
_METRIC = ("value", "standard_error", "low", "high", "n", "clusters")
_OPENS_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would run


def to_json(results: Results) -> str:
    """One object: tables with their rows, and the failed cells. Numbers that are not finite are null."""
    tables = [
        {
            "model": table.model,
            "fingerprint": table.fingerprint,
            "evaluation": table.evaluation,
            "eval_id": table.eval_id,
            "protocol": table.protocol,
            "remarks": list(table.remarks),
            "rows": [_row(row) | {"notes": list(row.notes), "metrics": _metrics(row)} for row in table.rows],
        }
        for table in results.tables
    ]
    value = {"tables": tables, "failed": [_failed(cell) for cell in results.failed]}
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    # The same text may end up inside a page's script element.
    return text.replace("<", "\\u003c") + "\n"


def to_csv(results: Results) -> str:
    """One line per cell and evaluation, then one per failed cell; a metric takes columns named after it."""
    lines = [
        _of_table(table) | {"outcome": "ok"} | _row(row) | _flat_metrics(row)
        for table in results.tables
        for row in table.rows
    ]
    lines += [_failed(cell) for cell in results.failed]
    header = dict.fromkeys(key for line in lines for key in line) or {"model": None, "cell_id": None}
    out = io.StringIO()
    writer = csv.DictWriter(out, list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_value(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _of_table(table: Table) -> dict[str, Any]:
    names = ("model", "fingerprint", "evaluation", "eval_id")
    return {name: getattr(table, name) for name in names}


def _row(row: Row) -> dict[str, Any]:
    difference = row.difference
    change = difference.percent if difference else None
    return {name: getattr(row.cell, name) for name in _CELL} | {
        "variant": row.variant,
        "wall_s": row.wall_s,
        "change_percent": change.value if change else None,
        "change_percent_low": change.low if change else None,
        "change_percent_high": change.high if change else None,
        "log_ratio": difference.delta if difference else None,
        "log_ratio_standard_error": difference.standard_error if difference else None,
        "p": difference.p if difference else None,
        "p_holm": row.adjusted_p,
        "identical": difference.identical if difference else None,
        "pairs": difference.n if difference else None,
        "pair_clusters": difference.clusters if difference else None,
        "remark": row.remark,
    }


def _metrics(row: Row) -> dict[str, Any]:
    return {
        name: {key: getattr(metric, key) for key in (*_METRIC, "unit", "better")}
        for name, metric in sorted(row.metrics.items())
    }


def _flat_metrics(row: Row) -> dict[str, Any]:
    return {
        plain(name if key == "value" else f"{name}_{key}"): getattr(metric, key)
        for name, metric in sorted(row.metrics.items())
        for key in _METRIC
    }


def _failed(cell: FailedCell) -> dict[str, Any]:
    names = ("model", "cell_id", "label", "stage", "error", "attempts")
    return {"outcome": cell.kind} | {name: getattr(cell, name) for name in names}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def _csv_value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.startswith(_OPENS_FORMULA) else text
