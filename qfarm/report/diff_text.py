"""Diff as text for a terminal, or as JSON."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, get_args

from rich.console import RenderableType
from rich.text import Text

from qfarm.report.data import difference_data, json_text
from qfarm.report.diff import Change, Diff, Outcome
from qfarm.report.figures import interval, number, plain, plural
from qfarm.report.layout import grid, section
from qfarm.report.render import terminal_text
from qfarm.report.rows import ID_SHOWN, label

LISTED = 20  # of what only one store holds
HEADINGS = ("cell", "evaluation", "change", "95 % interval", "p (Holm)", "id")


def render_diff(found: Diff, names: tuple[str, str], width: int, color: bool = False) -> str:
    """`names` are the two stores', first and second."""
    return terminal_text(_parts(found, names), width, color)


def diff_json(found: Diff) -> str:
    changes = [
        {
            "cell_id": change.cell.cell_id,
            "model": change.cell.model,
            "label": label(change.cell),
            "evaluation": change.evaluation,
            "outcome": change.outcome,
            "p_holm": change.adjusted_p,
            "specification": list(change.specification),
            "metrics": list(change.metrics),
            "remark": change.remark,
        }
        | difference_data(change.difference)
        for change in found.changes
    ]
    value: dict[str, Any] = {"changes": changes, "provenance": list(found.provenance)}
    value |= {"only_first": list(found.only[0]), "only_second": list(found.only[1])}
    return json_text(value)


def _parts(found: Diff, names: tuple[str, str]) -> Iterator[RenderableType]:
    yield Text(plain(f"from {names[0]} to {names[1]}"), style="bold", overflow="fold")
    counts = collections.Counter(change.outcome for change in found.changes)
    words = ", ".join(f"{counts[outcome]:,} {outcome}" for outcome in get_args(Outcome) if counts[outcome])
    yield Text(f"{plural(len(found.changes), 'shared result')}: {words or 'nothing to compare'}\n", overflow="fold")
    if found.significant:
        numbers = range(2, 5)
        yield from section(
            "significant changes, second against first", [grid(HEADINGS, map(_line, found.significant), numbers)]
        )
        yield Text(
            "change: of perplexity in percent or of accuracy in points, paired by document; Holm over the cells of one "
            "model and evaluation\n",
            style="dim",
            overflow="fold",
        )
    moved = [
        change for change in found.changes if change.outcome not in ("identical", "significant") and change.metrics
    ]
    if moved:
        yield Text(
            f"{plural(len(moved), 'result')} not equal to the bit, and not shown to differ: "
            f"--format json lists them; on one machine with one version they should be equal\n",
            overflow="fold",
        )
    versions = collections.Counter("; ".join(change.specification) for change in found.changes if change.specification)
    if versions:
        lines = [f"{plural(count, 'result')}: {plain(keys, 300)}" for keys, count in sorted(versions.items())]
        yield from section("paired by label, since the cells' specifications differ", [Text("\n".join(lines))])
    for name, alone in zip(names, found.only, strict=True):
        if alone:
            lines = [plain(one) for one in alone[:LISTED]]
            lines += [f"and {len(alone) - LISTED} more"] if len(alone) > LISTED else []
            yield from section(plain(f"only in {name} ({len(alone):,})"), [Text("\n".join(lines), overflow="fold")])
    if found.provenance:
        yield from section("provenance", [Text("\n".join(found.provenance), overflow="fold")])


def _line(change: Change) -> tuple[str, ...]:
    assert change.difference is not None
    value, low, high = change.difference.shown
    unit = change.difference.unit
    error = None if low is None or high is None else (high - low) / 2
    p = "" if change.adjusted_p is None else f"{change.adjusted_p:.2g}"
    ends = interval(low, high, unit, signed=True)
    return (
        plain(label(change.cell)),
        plain(change.evaluation),
        number(value, unit, error, signed=True),
        ends,
        p,
        change.cell.cell_id[:ID_SHOWN],
    )
