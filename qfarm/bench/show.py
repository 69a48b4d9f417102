"""Show a benchmark's report: a table for a terminal, or JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from qfarm.report.render import terminal_text

if TYPE_CHECKING:
    from qfarm.bench.methods import MethodResult, Report

COLUMNS = (
    ("method", "left"),
    ("seconds", "right"),
    ("runs", "right"),
    ("ratio", "right"),
    ("w/o forwards", "right"),
    ("forwards", "right"),
    ("statistics", "right"),
    ("solving", "right"),
    ("rest", "right"),
    ("peak MiB", "right"),
    ("bound MiB", "right"),
)
LEGEND = (
    "ratio: the yardstick's seconds / the method's, above 1 = faster; w/o forwards: the same without the calibration "
    "forwards. Shares: forwards of the calibration text, statistics of the inputs, the method's own work, rest "
    "(errors, putting weights in place). bound: memory before the run + a block's activations + a block's Hessians. "
    "The yardstick is GPTQ as published, one layer at a time, blocks of 128 columns."
)


def render_json(report: Report) -> str:
    return json.dumps(dataclasses.asdict(report), indent=2) + "\n"


def render_terminal(report: Report, width: int, color: bool = False) -> str:
    """The table with what was run and where it ran."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in COLUMNS:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    for result in report.results:
        table.add_row(*_cells(result))
    settings, machine = report.settings, report.machine
    tokens = settings.samples * settings.length
    group = "per channel" if settings.group_size == -1 else f"g{settings.group_size}"
    blocks = f"{settings.blocks} block{'s' if settings.blocks > 1 else ''}"
    what = f"{settings.model}: {blocks}, {tokens} tokens, w{settings.bits} {group}, {settings.dtype}"
    what += f", {settings.clock} seconds"
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    where = f"{device}; torch {machine['packages']['torch']}; memory {report.memory}"
    refused = [Text(f"not run: {name}: {rule}") for name, rule in report.refused.items()]
    return terminal_text([Text(what), Text(where + "\n"), table, Text("\n" + LEGEND), *refused], width, color)


def _cells(result: MethodResult) -> list[str]:
    times = [f"{result.seconds:.2f}", str(result.runs), f"{result.ratio:.2f}", f"{result.ratio_without_forwards:.2f}"]
    return [
        result.method,
        *times,
        *(f"{share:.0%}" for share in result.shares.values()),
        _mebibytes(result.peak_bytes),
        _mebibytes(result.bound_bytes),
    ]


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"
