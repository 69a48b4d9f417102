"""A plan as text: cells with what is done and what they will cost, then the combinations that are not run and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qfarm.report.figures import duration, plain, plural, size
from qfarm.report.render import terminal_text

if TYPE_CHECKING:
    from qfarm.plan import Plan, PlannedCell

WIDE = 100  # columns from which the model's name has room


def render_plan(plan: Plan, width: int, color: bool = False) -> str:
    """The whole plan, ending in a newline."""
    return terminal_text(_parts(plan, width), width, color)


def _parts(plan: Plan, width: int) -> Iterator[RenderableType]:
    missing = [planned for planned in plan.cells if not planned.done]
    done = len(plan.cells) - len(missing)
    yield Text(f"{plain(plan.job.path)}: {plural(len(plan.cells), 'cell')}, {done} done, {len(missing)} to run")
    yield _cells(plan, width)
    yield Text(_total(plan, missing))
    if plan.invalid:
        yield Text(f"\nnot run, with the rule that it breaks ({len(plan.invalid)}):")
        several = len({invalid.model for invalid in plan.invalid}) > 1
        for invalid in plan.invalid:
            model = f"{plain(invalid.model)} " if several else ""
            yield Text(f"  {model}{plain(invalid.label)}: {plain(invalid.rule)}")
    for note in plan.notes:
        yield Text(f"note: {plain(note)}")


def _cells(plan: Plan, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", no_wrap=True)
    if width >= WIDE or len({planned.cell.model for planned in plan.cells}) > 1:
        table.add_column("model", overflow="ellipsis", no_wrap=True, max_width=max(12, width // 3))
    table.add_column("recipe", overflow="fold")  # with the options that are not the defaults
    for name in ("scheme", "group", "seed", "state", "time", "memory"):
        table.add_column(name, no_wrap=True, justify="right")
    for planned in plan.cells:
        cell, estimate = planned.cell, planned.estimate
        row = [
            cell.cell_id[:12],
            plain(" ".join(filter(None, [cell.recipe, cell.variant]))),
            cell.scheme,
            "-" if cell.group_size == -1 else str(cell.group_size),
        ]
        row += ["-" if cell.seed is None else str(cell.seed), _state(planned)]
        row += ["-", "-"] if planned.done else [duration(estimate.seconds), size(estimate.device_bytes)]
        if len(table.columns) == len(row) + 1:
            row.insert(1, plain(cell.model))
        table.add_row(*map(Text, row))
    return table


def _state(planned: PlannedCell) -> str:
    if planned.done:
        return "stopped early" if planned.skipped else "done"
    total = len(planned.missing) + len(planned.finished)
    return f"{len(planned.missing)} of {total} to run" if planned.finished else "to run"


def _total(plan: Plan, missing: list[PlannedCell]) -> str:
    if not missing:
        return "nothing to run: every result is in the store"
    resources = plan.job.file.resources
    seconds = sum(planned.estimate.seconds for planned in missing)
    gpu_hours = sum(planned.estimate.seconds * planned.gpus for planned in missing) / 3600
    sources = sorted({planned.estimate.source for planned in missing})
    unit = f"{gpu_hours:.3g} GPU-hours" if resources.gpus else f"{duration(seconds)} of one worker"
    if resources.price is not None:
        hours = gpu_hours if resources.gpus else seconds / 3600
        unit += f", {hours * resources.price:.2f} at {resources.price:g} per hour"
    memory = size(max(planned.estimate.device_bytes for planned in missing))
    return f"about {unit} (estimated from: {', '.join(sources)}), memory of the largest cell: {memory}"
