"""Show: one cell whole. What it is, what was stored, how well it does, every attempt, and where it was made."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from qfarm.record import AnalysisRow, AttemptRow, CellRow, LayerRow, MetricRow
from qfarm.report.data import json_text
from qfarm.report.figures import duration, interval, number, plain, plural, size
from qfarm.report.find import find
from qfarm.report.layer_table import layer_tables
from qfarm.report.layout import grid, pairs, section, words
from qfarm.report.pairs import Readable
from qfarm.report.protocols import flatten
from qfarm.report.render import MIN_WIDTH, terminal_text
from qfarm.report.rows import label, parsed, records

WORST_LAYERS = 5
MODULES_SHOWN = 3
NOT_CAUSAL = "no: a quantizer looks across tokens, so that a prompt and its decoding give different numbers"


def show(store: Readable, prefix: str, *, width: int | None = None, color: bool = False) -> str:
    """Everything about the one cell whose id starts with `prefix`, as text for a terminal of `width` columns.

    A cell that never finished is shown by its attempts. Raises InvalidInput, one line with candidates, when the prefix
    names no cell or several.
    """
    cell_id = find(store, prefix)
    cells = records(store, "cells", CellRow, [cell_id])
    attempts = records(store, "attempts", AttemptRow, [cell_id])
    attempts.sort(key=lambda attempt: (attempt.started, attempt.number))
    accepted: Mapping[str, str] = {}
    columns = max(MIN_WIDTH, width or shutil.get_terminal_size().columns)
    parts: list[RenderableType] = []
    if cells:
        parts += _identity(cells[0])
        parts += _layers(records(store, "layers", LayerRow, [cell_id]))
        metrics = records(store, "metrics", MetricRow, [cell_id])
        accepted = _accepted(cells[0], metrics)
        parts += _metrics(metrics)
        labels = {metric.eval_id: metric.evaluation for metric in metrics}
        parts += layer_tables(records(store, "analysis", AnalysisRow, [cell_id]), labels)
    else:
        parts += section(f"cell {plain(cell_id)}", [Text("no attempt has stored a result")])
    for attempt in attempts:
        parts += _attempt(attempt, accepted.get(attempt.attempt_id, ""))
    for source in [one for one in attempts if one.attempt_id in accepted] or attempts[-1:]:
        made = flatten(parsed(source.provenance, {}))
        title = f"provenance of attempt {plain(source.attempt_id)}"
        parts += section(title, [pairs({plain(key): words(value) for key, value in made.items()})])
    return terminal_text(parts, columns, color)


def show_json(store: Readable, prefix: str) -> str:
    """All rows of that cell, table by table, every column as it is stored; numbers that are not finite are null."""
    cell_id = find(store, prefix)
    tables = ("cells", "layers", "metrics", "analysis", "attempts")
    return json_text({table: store.read(table, cell_ids=[cell_id]).to_pylist() for table in tables})


def _accepted(cell: CellRow, metrics: Iterable[MetricRow]) -> dict[str, str]:
    """By attempt_id: which results of an attempt are the ones stored; evaluations may come long after the cell."""
    evaluated = {metric.attempt_id for metric in metrics}
    accepted = dict.fromkeys(evaluated, "evaluated")
    accepted[cell.attempt_id] = "quantized and evaluated" if cell.attempt_id in evaluated else "quantized"
    return accepted


def _identity(cell: CellRow) -> list[RenderableType]:
    spec = parsed(cell.spec, {})
    axes = {
        "cell": cell.cell_id,
        "job": cell.job,
        "model": f"{cell.model}, fingerprint {cell.fingerprint}",
        "recipe": cell.recipe,
        "scheme": cell.scheme,
        "group": "per channel" if cell.group_size == -1 else str(cell.group_size),
        "weights": f"{'symmetric' if cell.symmetric else 'asymmetric'}, scales {cell.scale_dtype}, rest {cell.dtype}",
        "seed": "none needed" if cell.seed is None else str(cell.seed),
        "statistics": cell.statistics or "none needed",
        "calibration": words(spec.get("calibration") or "none needed"),
    }
    for method in spec.get("methods") or ():
        if isinstance(method, Mapping):
            named = f"version {method.get('version')}: {words(method.get('options') or 'no options')}"
            axes[f"{method.get('name')}"] = named
    sizes = {
        "quantized layers": f"{number(cell.linear_bits, 'bits')} bits per weight, {_payload(cell)}"
        f"{size(cell.linear_bytes)}",
        "whole model": f"{number(cell.model_bits, 'bits')} bits per parameter, {_kept(cell)}{size(cell.model_bytes)}",
        "as kernels read": _kernel(cell),
        "linear inputs": _inputs(cell),
        "KV cache": _cache(cell),
        "causal": {None: "", True: "yes", False: NOT_CAUSAL}[cell.causal],
        "stored": cell.created,
    }
    return section(plain(f"{label(cell)} · {cell.model}"), [pairs(axes | sizes)])


def _payload(cell: CellRow) -> str:
    return "" if cell.payload_bits is None else f"{number(cell.payload_bits, 'bits')} without scales and zeros, "


def _kept(cell: CellRow) -> str:
    return "" if cell.kept_share is None else f"{100 * cell.kept_share:.3g} % of them as loaded, "


def _inputs(cell: CellRow) -> str:
    if cell.activation_bits is None:
        return ""
    stored = f", {size(cell.activation_bytes)} of calibrated grids" if cell.activation_bytes else ""
    return f"{number(cell.activation_bits, 'bits')} bits per number{stored}"


def _kernel(cell: CellRow) -> str:
    """'58.3 MB of quantized layers (padding +1.2 MB, scales 0 B)', or why there is no such layout."""
    causes = parsed(cell.kernel_causes, {})
    if cell.kernel_bytes is None:
        return f"no layout: {causes['no_layout']}" if "no_layout" in causes else ""
    told = [
        f"{cause.replace('_', ' ')} {'-' if more < 0 else '+'}{size(abs(more))}"
        for cause, more in causes.items()
        if more
    ]
    return f"{size(cell.kernel_bytes)} of quantized layers" + (f" ({', '.join(told)})" if told else "")


def _cache(cell: CellRow) -> str:
    return "" if cell.kv_bits is None else f"{number(cell.kv_bits, 'bits')} stored bits per cached number"


def _layers(layers: Sequence[LayerRow]) -> list[RenderableType]:
    made = [layer for layer in layers if layer.solver is not None]
    kinds = collections.Counter(
        f"{layer.solver}, {layer.bits} bits, {'per channel' if layer.group_size == -1 else f'group {layer.group_size}'}"
        for layer in made
    )
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    for layer in layers:
        if layer.solver is None:
            skipped[layer.reason or "no reason given"].append(layer.module)
    lines: list[RenderableType] = [Text(plain(f"{plural(count, 'layer')}: {kind}")) for kind, count in kinds.items()]
    for reason, modules in skipped.items():
        listed = ", ".join(modules[:MODULES_SHOWN]) + (", ..." if len(modules) > MODULES_SHOWN else "")
        lines.append(Text(plain(f"{plural(len(modules), 'layer')} left alone, {reason}: {listed}")))
    worst = sorted(made, key=_error, reverse=True)[:WORST_LAYERS]
    if any(_error(layer) > 0 for layer in worst):
        lines.append(Text("worst by relative output error (by weight error where no inputs were seen):"))
        rows = [
            (layer.module, str(layer.solver), number(layer.output_error, ""), number(layer.weight_error, ""))
            for layer in worst
        ]
        lines.append(grid(("layer", "solver", "output", "weight"), rows, numeric=(2, 3)))
    return section("layers", lines or [Text("none were recorded")])


def _error(layer: LayerRow) -> float:
    return layer.output_error if layer.output_error is not None else layer.weight_error or 0.0


def _metrics(metrics: Sequence[MetricRow]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for eval_id in sorted({metric.eval_id for metric in metrics}):
        group = [metric for metric in metrics if metric.eval_id == eval_id]
        rows = [
            (
                metric.metric,
                number(metric.value, metric.unit),
                interval(metric.low, metric.high, metric.unit),
                metric.unit.removeprefix("fraction "),  # the value says %
                f"{metric.n:,}",
                "" if metric.clusters is None else f"{metric.clusters:,}",
            )
            for metric in group
        ]
        figures = grid(("metric", "value", "95 % interval", "unit", "n", "clusters"), rows, numeric=(1, 2, 4, 5))
        protocol = Text(words(parsed(group[0].protocol, {})), style="dim", overflow="fold")
        parts += section(plain(f"{group[0].evaluation} (evaluation {eval_id})"), [figures, protocol])
    return parts or section("evaluations", [Text("none")])


def _attempt(attempt: AttemptRow, accepted: str) -> list[RenderableType]:
    stages = parsed(attempt.stages, {})
    times = [f"{name} {duration(value)}" for name, value in stages.items() if isinstance(value, (int, float))]
    memory = {"host": size(attempt.peak_host_bytes), "GPU": size(attempt.peak_gpu_bytes)}
    facts = {
        "outcome": f"{attempt.outcome}{f', accepted: {accepted}' if accepted else ''}",
        "stage reached": attempt.stage,
        "where": f"worker {attempt.worker} on {attempt.node}",
        "when": f"{attempt.started}, {duration(attempt.wall_s)}",
        "times": ", ".join(times),
        "peak memory": ", ".join(f"{name} {amount}" for name, amount in memory.items() if amount),
        "notes": "; ".join(map(str, parsed(attempt.notes, []))),
        "error": attempt.error or "",
    }
    parts: list[RenderableType] = [pairs(facts)]
    if attempt.traceback:
        # Line by line, since the line breaks of a traceback are its own.
        lines = (_code_line(line) for line in attempt.traceback.splitlines())
        parts.append(Padding(Text("\n".join(lines), overflow="fold"), (0, 0, 0, 2)))
    return section(f"attempt {attempt.number} ({plain(attempt.attempt_id)})", parts)


def _code_line(line: str) -> str:
    return " " * (len(line) - len(line.lstrip(" "))) + plain(line)
