"""Show kernels: what was measured, predicted and compiled, in a table each."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from qfarm.bench.kernels import NO_GPU, Report
from qfarm.bench.show import columns
from qfarm.record import KernelFigures
from qfarm.report.render import terminal_text

LEGEND = (
    "m: rows of inputs. roofline: bytes / bandwidth. goal: 2 us per launch + the largest of roofline / 0.80, "
    "instructions / 0.90 and tensor cores / 0.70, with what several passes take (qfarm.kernels.roofline); limit: which "
    "of them. x fp16: the goal of fp16 / this one."
)
TIMES_LEGEND = (
    "us: median per launch, cold cache. of memory: roofline / us. x fp16: us of fp16, the library's product / this "
    "one's. copy: of the float16 weight, read and written. goal us: predicted, as below."
)
NONE = "-"


def render_kernels(report: Report, width: int, color: bool = False) -> str:
    """Times where there are any, then predictions, then what was compiled: a table each, with what it is above it."""
    parts: list[Text | Table] = []
    if timed := report.of("measured"):
        where = f"{report.machine['gpu']}, torch {report.machine['packages']['torch']}"
        parts += [Text(f"measured: {where}; groups of 128\n"), _timings(timed), *_errors(timed)]
        parts.append(Text("\n" + TIMES_LEGEND))
    else:
        parts.append(Text(NO_GPU))
    for gpu in report.settings.gpus:
        rows = [row for row in report.of("predicted") if row.gpu == gpu]
        parts += [Text(f"\npredicted for {gpu}, not measured: groups of 128\n"), _predictions(rows), *_errors(rows)]
    parts.append(Text("\n" + LEGEND))
    if compiled := report.of("compiled"):
        parts += [Text("\ncompiled, not run\n"), _compiled(compiled)]
    if report.settings.store is not None:
        parts.append(Text(f"\n{report.settings.store}: run {report.run_id} in table kernels"))
    return terminal_text(parts, width, color)


def _timings(rows: list[KernelFigures]) -> Table:
    names = ("m", "n x k", "format", "us", "p20", "p80", "samples", "GB/s", "of memory", "x fp16", "goal us")
    table = columns(names, left=3)
    for row in rows:
        times = [_us(seconds) for seconds in (row.median_s, row.p20_s, row.p80_s)]
        rate, share = _figure(row.gb_per_s, ".0f"), _figure(row.efficiency, ".0%")
        figures = [str(row.samples), rate, share, _figure(row.ratio_fp16, ".2f"), _us(row.predicted_s)]
        table.add_row(str(row.m), f"{row.n} x {row.k}", row.form, *times, *figures)
    return table


def _predictions(rows: list[KernelFigures]) -> Table:
    table = columns(("m", "n x k", "format", "MB", "roofline us", "goal us", "x fp16", "limit"), left=3)
    for row in rows:
        size = _figure(None if row.moved_bytes is None else row.moved_bytes / 1e6, ".1f")
        figures = [size, _us(row.memory_s), _us(row.predicted_s), _figure(row.ratio_fp16, ".2f"), row.limit or NONE]
        table.add_row(str(row.m), f"{row.n} x {row.k}", row.form, *figures)
    return table


def _compiled(rows: list[KernelFigures]) -> Table:
    table = columns(("target", "launch", "registers", "spills", "shared", "per element", "budget"), left=2)
    for row in rows:
        figures = [str(row.registers), str(row.spills), str(row.shared_bytes), _figure(row.per_weight, ".2f")]
        table.add_row(row.gpu, row.form, *figures, row.verdict or NONE)
    return table


def _errors(rows: list[KernelFigures]) -> list[Text]:
    """Why rows are empty, under their table: one line per reason and shape."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.error is not None:
            reasons.setdefault(f"m {row.m}, {row.n} x {row.k}: {row.error}", []).append(row.form)
    return [Text(f"no figures: {', '.join(forms)}: {reason}") for reason, forms in reasons.items()]


def _us(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds * 1e6:.1f}"


def _figure(value: float | None, style: str) -> str:
    return NONE if value is None else format(value, style)
