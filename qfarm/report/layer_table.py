"""Layer table: what an `analysis` found, one line per role, and the layers whose outputs are worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from qfarm.record import AnalysisRow
from qfarm.report.figures import number, plain
from qfarm.report.layout import grid, section

TENSORS = ("weight", "input", "output", "accumulated")
WORST_LAYERS = 5

# By layer, role, tensor and statistic.
Figures = Mapping[tuple[int, str, str, str], float]


def layer_tables(rows: Sequence[AnalysisRow], labels: Mapping[str, str]) -> list[RenderableType]:
    """A section per evaluation; `labels` by eval_id."""
    parts: list[RenderableType] = []
    for eval_id in dict.fromkeys(row.eval_id for row in rows):
        found = {(r.layer, r.role, r.tensor, r.statistic): r.value for r in rows if r.eval_id == eval_id}
        title = f"SQNR in dB by layer, {labels.get(eval_id, 'analysis')} (evaluation {eval_id})"
        parts += section(plain(title), [_by_role(found), *_worst(found)])
    return parts


def _by_role(found: Figures) -> RenderableType:
    """Means over the blocks, infinite ones left out; the accumulated error also as the last block sees it."""
    last = max(layer for layer, *_ in found)
    lines = []
    for role in dict.fromkeys(role for _, role, *_ in found):
        means = [_mean(found[key] for key in found if key[1:] == (role, tensor, "sqnr")) for tensor in TENSORS]
        peaks = [found[key] for key in found if key[1:] == (role, "input", "kurtosis")]
        shown = [*means, found.get((last, role, "accumulated", "sqnr")), max(peaks, default=None)]
        lines.append((role, *(number(value, "dB") for value in shown)))
    headings = ("role", "weight", "input", "output", "accumulated", "last block", "input kurtosis, largest")
    return grid(headings, lines, numeric=range(1, len(headings)))


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    finite = [value for value in known if math.isfinite(value)] or known
    return sum(finite) / len(finite) if finite else None


def _worst(found: Figures) -> list[RenderableType]:
    outputs = {key[:2]: value for key, value in found.items() if key[2:] == ("output", "sqnr") and value < math.inf}
    if not outputs:
        return []
    lines = [
        (str(layer), role, *(number(found.get((layer, role, tensor, "sqnr")), "dB") for tensor in TENSORS))
        for layer, role in sorted(outputs, key=lambda key: outputs[key])[:WORST_LAYERS]
    ]
    headings = ("layer", "role", *TENSORS)
    return [Text("worst outputs:"), grid(headings, lines, numeric=(0, *range(2, len(headings))))]
