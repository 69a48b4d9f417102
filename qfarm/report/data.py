"""Data: results for programs, as CSV or JSON, with every digit."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from qfarm.report.columns import in_reading_units
from qfarm.report.figures import plain
from qfarm.report.rows import FailedCell, Replicates, Results, Row, Table
from qfarm.stats import FAMILY_ALPHA, AccuracyDifference, Difference, Interval

_CELL = (
    *("cell_id", "recipe", "scheme", "group_size", "seed", "symmetric", "scale_dtype", "dtype", "statistics"),
    *("linear_bits", "model_bits", "linear_bytes", "model_bytes", "layers_quantized", "layers_skipped"),
    *("kv_bits", "payload_bits", "activation_bits", "activation_bytes", "kept_share", "causal"),
    *("kernel_bytes", "kernel_causes"),
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
            "measure": table.measure,
            "margin": {"text": table.margin.text, "amount": table.margin.amount} if table.margin else None,
            "family": _family(table),
            "noise": _noise(table),
            "rows": [_row(row) | {"notes": list(row.notes), "metrics": _metrics(row)} for row in table.rows],
            "over_seeds": [_replicates(group) for group in table.replicates],
        }
        for table in results.tables
    ]
    value = {"tables": tables, "failed": [_failed(cell) for cell in results.failed]}
    return json_text(value)


def json_text(value: Any) -> str:
    """Plain data as JSON; numbers that are not finite are null."""
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
    writer.writerows({key: csv_value(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _of_table(table: Table) -> dict[str, Any]:
    names = ("model", "fingerprint", "evaluation", "eval_id")
    kv = table.protocol.get("kv") or {}
    return {name: getattr(table, name) for name in names} | {
        "kv_prefill": kv.get("prefill"),
        "kv_chunk": kv.get("chunk"),
    }


def _row(row: Row) -> dict[str, Any]:
    """Differences of perplexity as change_percent and log_ratio, of accuracy as change_points; the others are null."""
    axes = {name: getattr(row.cell, name) for name in _CELL} | {"variant": row.variant, "wall_s": row.wall_s}
    answers = {"answers_changed": row.answers_changed}
    return axes | difference_data(row.difference) | answers | _with_seeds(row) | judged_data(row)


def judged_data(row: Row) -> dict[str, Any]:
    """What the table's tests say of a row."""
    return {
        "p_holm": row.adjusted_p,
        "p_bh": row.screened_p,
        "p_margin": row.margin_p,
        "p_non_inferior": row.non_inferior_p,
        "verdict": row.verdict,
        "within_margin": row.within_margin if row.margin_p is not None else None,
        "non_inferior": row.non_inferior if row.non_inferior_p is not None else None,
        "noise_floor": row.noise_floor,
        "best": row.best,
        "front": row.front,
        "stopped_early": row.stopped,
        "remark": row.remark,
    }


def difference_data(difference: Difference | None) -> dict[str, Any]:
    """A difference with every digit; the keys are the same whatever it is of."""
    nothing = Interval(math.nan, None, None)
    of_items = difference if isinstance(difference, AccuracyDifference) else None
    of_loss = difference if of_items is None else None
    percent, points = of_loss.shown if of_loss else nothing, of_items.shown if of_items else nothing
    return {
        "change_percent": percent.value if of_loss else None,
        "change_percent_low": percent.low,
        "change_percent_high": percent.high,
        "log_ratio": of_loss.delta if of_loss else None,
        "log_ratio_standard_error": of_loss.standard_error if of_loss else None,
        "change_points": points.value if of_items else None,
        "change_points_low": points.low,
        "change_points_high": points.high,
        "items_lost": of_items.lost if of_items else None,
        "items_gained": of_items.gained if of_items else None,
        "share_flipped": of_items.flips.value if of_items else None,
        "test": of_items.test if of_items else "t over clusters" if of_loss else None,
        "p": difference.p if difference else None,
        "p_exact": of_items.exact_p if of_items else None,
        "detectable": difference.detectable if difference else None,
        "identical": difference.identical if difference else None,
        "pairs": difference.n if difference else None,
        "pair_clusters": difference.clusters if difference else None,
    }


def _with_seeds(row: Row) -> dict[str, Any]:
    ends = in_reading_units(row, row.with_seeds) if row.with_seeds else None
    return {"low_with_seed_noise": ends.low if ends else None, "high_with_seed_noise": ends.high if ends else None}


def _family(table: Table) -> dict[str, Any]:
    """Which rows were judged together, and how many small p values are no news."""
    return {
        "adjusted": table.family,
        "tested": len(table.tested),
        "below": sum(p < FAMILY_ALPHA for p in table.tested),
        "expected": FAMILY_ALPHA * len(table.tested),
    }


def _noise(table: Table) -> dict[str, Any]:
    """In the scale of differences: ln of a ratio of perplexities, or a share of items."""
    seeds = [
        {"recipe": recipe, "scheme": scheme, "sigma": found.sigma, "df": found.df, "cells": found.cells}
        for (recipe, scheme), found in table.noise.seeds.items()
    ]
    return {
        "seeds": seeds,
        "numeric": table.noise.numeric,
        "numeric_flips": table.noise.numeric_flips,
        "numeric_source": table.noise.numeric_source,
    }


def _replicates(group: Replicates) -> dict[str, Any]:
    found = group.difference
    ends = in_reading_units(group.first, found.interval()) if found else None
    return {
        "cell_ids": [row.cell.cell_id for row in group.rows],
        "recipe": group.first.cell.recipe,
        "scheme": group.first.cell.scheme,
        "group_size": group.first.cell.group_size,
        "variant": group.first.variant,
        "metrics": dict(group.values),
        "remark": group.remark,
        "unit": group.first.difference.unit if group.first.difference else None,
        "change": ends.value if ends else None,
        "change_low": ends.low if ends else None,
        "change_high": ends.high if ends else None,
        "spread": found.spread if found else None,
        "standard_error": found.error if found else None,
        "df": found.df if found else None,
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


def csv_value(value: Any) -> Any:
    """Text on one line that no spreadsheet takes for a formula; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.startswith(_OPENS_FORMULA) else text
