"""Show kernels: what was measured, predicted and compiled, in a table each."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from qfarm.bench.kernels import NO_GPU, Report
from qfarm.bench.show import columns
from qfarm.kernels.roofline import FORMATS, stored_bytes
from qfarm.report.render import terminal_text

LEGEND = (
    "roofline: bytes / bandwidth. goal: 2 us + the largest of roofline / 0.80, instructions / 0.90 and tensor cores / "
    "0.70 (qfarm.kernels.roofline), limit: which of them. x fp16: the goal of fp16 / this one."
)


def render_kernels(report: Report, width: int, color: bool = False) -> str:
    """Times where there are any, then predictions, then what was compiled: a table each, with what it is above it."""
    parts: list[Text | Table] = []
    if report.measured:
        where = f"{report.machine['gpu']}, torch {report.machine['packages']['torch']}"
        parts += [Text(f"measured: {where}\n"), _timings(report)]
    else:
        parts.append(Text(NO_GPU))
    for gpu in report.settings.gpus:
        parts += [
            Text(f"\npredicted for {gpu}, not measured: one row of inputs, groups of 128\n"),
            _predictions(report, gpu),
        ]
    parts.append(Text("\n" + LEGEND))
    if report.compiled:
        parts += [Text("\ncompiled, not run\n"), _compiled(report)]
    return terminal_text(parts, width, color)


def _timings(report: Report) -> Table:
    table = columns(("n x k", "format", "us", "p20", "p80", "samples", "GB/s", "x fp16"), left=2)
    plain = {(row.n, row.k): row.median_s for row in report.measured if row.form == "fp16"}
    for row in report.measured:
        if row.median_s is None or row.p20_s is None or row.p80_s is None:
            table.add_row(f"{row.n} x {row.k}", row.form, f"FAILED: {row.error}")
            continue
        moved = stored_bytes(FORMATS[row.form], row.n, row.k) + 2 * row.m * (row.n + row.k)
        fp16 = plain.get((row.n, row.k))
        times = [f"{seconds * 1e6:.1f}" for seconds in (row.median_s, row.p20_s, row.p80_s)]
        rate = f"{moved / row.median_s / 1e9:.0f}"
        ratio = "-" if fp16 is None else f"{fp16 / row.median_s:.2f}"
        table.add_row(f"{row.n} x {row.k}", row.form, *times, str(row.samples), rate, ratio)
    return table


def _predictions(report: Report, gpu: str) -> Table:
    table = columns(("n x k", "format", "MB", "roofline us", "goal us", "x fp16", "limit"), left=2)
    for row in report.predicted:
        if row.gpu == gpu:
            found = row.prediction
            figures = [f"{found.moved / 1e6:.1f}", f"{found.memory_s * 1e6:.1f}", f"{found.goal_s * 1e6:.1f}"]
            table.add_row(f"{row.n} x {row.k}", row.form, *figures, f"{row.ratio:.2f}", found.limit)
    return table


def _compiled(report: Report) -> Table:
    table = columns(("target", "launch", "registers", "spills", "shared", "per element", "budget"), left=2)
    for row in report.compiled:
        figures = [str(row["registers"]), str(row["spills"]), str(row["shared"])]
        each = f"{row['per_element']:.2f}" if "per_element" in row else "-"
        table.add_row(row["target"], row["launch"], *figures, each, "; ".join(row["breaches"]) or "kept")
    return table
