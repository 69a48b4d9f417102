"""Show the benchmarks' reports: tables for a terminal, or JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from qfarm import environment
from qfarm.report.render import terminal_text

if TYPE_CHECKING:
    from qfarm.bench import evaluation, farm, growth, kernels, matrix, memory, tasks
    from qfarm.bench.farm import Figure
    from qfarm.bench.methods import MethodResult, Report

COLUMNS = (
    *("method", "seconds", "runs", "ratio", "w/o forwards"),
    *("forwards", "statistics", "solving", "rest", "peak MiB", "bound MiB"),
)
LEGEND = (
    "ratio: the yardstick's seconds / the method's, above 1 = faster; w/o forwards: the same without the calibration "
    "forwards. Shares: forwards of the calibration text, statistics of the inputs, the method's own work, rest "
    "(errors, putting weights in place). bound: memory before the run + a block's activations + a block's Hessians. "
    "The yardstick is GPTQ as published, one layer at a time, blocks of 128 columns."
)

TASK_COLUMNS = ("task", "items", "acc", "lm-eval's", "same answer", "same score", "max diff", "prepare", "s", "ratio")
TASK_LEGEND = (
    "same answer: items in which both prefer the same choice; same score: both right or both wrong; max diff: largest "
    "difference of a choice's log-likelihood, nats. prepare: prompts to tokens, once per model; s: the rest of ours; "
    "ratio: lm-eval's seconds / ours with the preparation, above 1 = faster."
)

MATRIX_COLUMNS = ("way", "wall s", "ratio", "cpu s", "ratio", "peak MiB", "tokens read", "tokens/s", "x floor")
MATRIX_LEGEND = (
    "farm: workers share the model, tokens, statistics and the baseline; alone: they forget everything between cells; "
    "fresh: one process per cell, one after the other, with all cores. Ratios are to the first. tokens read: passed "
    "through the whole decoder, evaluation and calibration; x floor: wall seconds / the seconds that the operations "
    "which must be done take at the measured rate of matrix products. Peak: sum over processes, shared pages in each."
)


def columns(names: Sequence[str], left: int = 1) -> Table:
    """An empty table with columns of figures behind `left` columns of words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def render_json(
    report: Report | tasks.Report | matrix.Report | evaluation.Report | kernels.Report | memory.Report | growth.Report,
) -> str:
    return json.dumps(dataclasses.asdict(report), indent=2) + "\n"


def render_terminal(report: Report, width: int, color: bool = False) -> str:
    """The table with what was run and where it ran."""
    table = columns(COLUMNS)
    for result in report.results:
        table.add_row(*_cells(result))
    settings, machine = report.settings, report.machine
    tokens = settings.samples * settings.length
    group = "per channel" if settings.group_size == -1 else f"g{settings.group_size}"
    blocks = f"{settings.blocks} block{'s' if settings.blocks > 1 else ''}"
    what = f"{settings.model}: {blocks}, {tokens} tokens, w{settings.bits} {group}, {settings.dtype}"
    what += f", {settings.clock} seconds"
    where = f"{_where(machine)}; memory {report.memory}"
    refused = [Text(f"not run: {name}: {rule}") for name, rule in report.refused.items()]
    return terminal_text([Text(what), Text(where + "\n"), table, Text("\n" + LEGEND), *refused], width, color)


def render_tasks(report: tasks.Report, width: int, color: bool = False) -> str:
    """Every task asked both ways, with where it ran."""
    table = columns(TASK_COLUMNS)
    for result in report.results:
        table.add_row(
            result.task,
            str(result.items),
            f"{result.accuracy:.4f}",
            f"{result.accuracy_lm_eval:.4f}",
            str(result.same_answer),
            str(result.same_score),
            f"{result.largest_difference:.1e}",
            f"{result.prepare_s:.1f}",
            f"{result.seconds:.1f}",
            f"{result.ratio:.2f}",
        )
    settings = report.settings
    what = f"{settings.model}: {settings.dtype}, lm-eval in batches of {settings.batch_size}, {settings.clock} seconds"
    return terminal_text(
        [Text(what), Text(_where(report.machine) + "\n"), table, Text("\n" + TASK_LEGEND)], width, color
    )


def render_matrix(report: matrix.Report, width: int, color: bool = False) -> str:
    """The ways side by side, with what was run and the floor."""
    table = columns(MATRIX_COLUMNS)
    for result in report.results:
        table.add_row(
            result.way,
            f"{result.wall_s:.1f}",
            f"{result.wall_ratio:.2f}",
            f"{result.cpu_s:.1f}",
            f"{result.cpu_ratio:.2f}",
            _mebibytes(result.peak_bytes),
            f"{result.tokens:,.0f}",
            f"{result.tokens_per_s:,.0f}",
            f"{result.floor_ratio:.2f}",
        )
    settings = report.settings
    what = (
        f"{settings.model}: {report.cells} cells, {settings.text} {settings.length} x{settings.windows}, calibration "
        f"{settings.calibration} {settings.calibration_length} x{settings.samples}, {settings.statistics}, "
        f"{settings.dtype}; {report.workers} workers; rounds: {settings.rounds}"
    )
    floor = (
        f"floor: {report.operations:.3g} operations / {report.rate:.3g} per second = {report.floor_s:.1f} s; "
        f"largest difference of a perplexity between ways: {report.largest_difference:.1e}"
    )
    head, foot = [Text(what), Text(_where(report.machine) + "\n")], [Text("\n" + floor), Text(MATRIX_LEGEND)]
    return terminal_text([*head, table, *foot], width, color)


def render_evaluation(report: evaluation.Report, width: int, color: bool = False) -> str:
    """Every part of an evaluation with its share of the time and of the machine's rate."""
    table = columns(("part", "s", "of the time", "operations", "of the rate"))
    for part in report.parts:
        share = f"{part.operations / part.seconds / report.rate:.0%}" if part.operations else ""
        operations = f"{part.operations:.3g}" if part.operations else ""
        table.add_row(part.name, f"{part.seconds:.2f}", f"{part.seconds / report.seconds:.0%}", operations, share)
    settings = report.settings
    what = f"{settings.model}: {settings.text} {settings.length}, {report.tokens:,} tokens, {settings.dtype}"
    foot = (
        f"{report.tokens / report.seconds:,.0f} tokens/s; what must be done at {report.share:.0%} of the measured rate "
        f"of matrix products, {report.rate:.3g} operations per second"
    )
    return terminal_text([Text(what), Text(_where(report.machine) + "\n"), table, Text("\n" + foot)], width, color)


def render_figures(figures: Sequence[Figure], width: int, color: bool = False) -> str:
    """Every figure of the farm with its goal, and where it was taken."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part")
    table.add_column("what", overflow="fold")
    for name in ("figure", "unit", "goal"):
        table.add_column(name, justify="right" if name != "unit" else "left", no_wrap=True)
    for one in figures:
        goal = "" if one.goal is None else f"<= {one.goal:g}{' missed' if one.missed else ''}"
        table.add_row(one.part, one.what, f"{one.value:,.3f}".rstrip("0").rstrip("."), one.unit, goal)
    where = f"{environment.cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} over the last minute"
    return terminal_text([table, Text(f"\n{where}")], width, color)


def render_figures_json(settings: farm.Settings, figures: Sequence[Figure]) -> str:
    found = {"settings": dataclasses.asdict(settings), "figures": [dataclasses.asdict(one) for one in figures]}
    return json.dumps(found, indent=2) + "\n"


def render_memory(report: memory.Report, width: int, color: bool = False) -> str:
    """What was measured beside what was bound, then the bound's parts."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MiB")
    for name in ("measured", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("before loading", _mebibytes(report.before), "")
    table.add_row("with the model loaded", _mebibytes(report.loaded), "")
    table.add_row("peak, allocated", _mebibytes(report.private), _mebibytes(report.bound))
    table.add_row("peak with pages of files", _mebibytes(report.resident), "")
    settings, parts = report.settings, report.needs
    what = (
        f"random Llama of {report.parameters:,} parameters in bfloat16, {settings.method} w4 g128, calibration "
        f"{settings.length} x{settings.samples}, perplexity {settings.length} x{settings.windows}; "
        f"{report.seconds:.0f} s{'; a bound is missed' if report.missed else ''}"
    )
    sums = ", ".join(f"{name} {_mebibytes(size)}" for name, size in parts.items())
    rule = f"bound: before + {_mebibytes(report.allowance)} of the process's own + what qfarm.memory says: {sums}"
    return terminal_text([Text(f"{what}\n"), table, Text(f"\n{rule}")], width, color)


def _where(machine: dict[str, Any]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{device}; torch {machine['packages']['torch']}"


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
