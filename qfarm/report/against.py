"""Against: measured rows beside published figures of the same cell, and the difference of the two.

A row and a figure belong together when model, recipe, scheme, group size and evaluation agree, and every option that
the figure names. What the figure does not name may be anything; what is known to differ all the same (calibration,
options of ours) is said beside the pair and shuts nothing out. The model is the same id, or the same base name where a
row was measured on a copy of it. Only whole evaluations count: a limited number of windows or items is another number.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qfarm.errors import InvalidInput
from qfarm.published import BASELINE, LOWER_IS_BETTER, Figure, Measure, Published
from qfarm.record import CellRow
from qfarm.report.rows import Results, Row, Table, parsed
from qfarm.scheme import parse_scheme

_WRITTEN = {"fraction": 100.0}  # published accuracies are percent, stored ones fractions; by a unit's first word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One measured number and one published."""

    cell: CellRow
    variant: str  # the options that the row was given
    figure: Figure
    ours: float  # in the figure's unit
    standard_error: float | None
    n: int
    ours_change: float | None  # to our baseline: percent of perplexity, or points of accuracy
    theirs_change: float | None  # to the baseline of the figure's table
    remarks: tuple[str, ...]

    @property
    def difference(self) -> float:
        return self.ours - self.figure.value

    @property
    def percent(self) -> float:
        """The difference as a share of the published value."""
        return 100.0 * self.difference / self.figure.value if self.figure.value else float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    published: Published
    pairs: tuple[Pair, ...]
    cells: int  # measured, baselines among them
    cells_without: int  # of them, those that no figure is of
    figures_without: int  # figures that nothing here was measured for


def compare(
    results: Results,
    published: Published,
    *,
    model: str | None = None,
    recipe: str | None = None,
    scheme: str | None = None,
) -> Comparison:
    """All pairs, in the order of the results and then of the source.

    The filters are names or patterns with * and ?; baselines of the models that are left stay. Raises InvalidInput when
    they leave nothing.
    """
    patterns = {"model": model, "recipe": recipe, "scheme": scheme}
    tables = list(_chosen(results.tables, patterns))
    if not tables and results.tables:
        given = ", ".join(f'{name} "{pattern}"' for name, pattern in patterns.items() if pattern is not None)
        raise InvalidInput(f"no measured row matches {given}")
    baselines = {(f.table, f.model, f.measure): f.value for f in published.figures if f.is_baseline}
    found: dict[tuple[str, int], Pair] = {}
    for table in tables:
        for row in table.rows:
            for pair, number in _pairs(table, row, published.figures, baselines):
                # Under a quantized cache's protocol the baseline is measured once more, with the same numbers.
                found.setdefault((row.cell.cell_id, number), pair)
    cells = {row.cell.cell_id for table in tables for row in table.rows}
    return Comparison(
        published=published,
        pairs=tuple(found.values()),
        cells=len(cells),
        cells_without=len(cells - {cell_id for cell_id, _ in found}),
        figures_without=len(published.figures) - len({number for _, number in found}),
    )


def _chosen(tables: Iterable[Table], patterns: Mapping[str, str | None]) -> Iterator[Table]:
    def wanted(row: Row, names: Iterable[str]) -> bool:
        return all(fnmatch.fnmatchcase(getattr(row.cell, name), patterns[name] or "*") for name in names)

    for table in tables:
        kept = tuple(row for row in table.rows if row.is_baseline or wanted(row, ("recipe", "scheme")))
        if any(wanted(row, patterns) for row in kept):
            yield dataclasses.replace(table, rows=kept)


def _pairs(
    table: Table,
    row: Row,
    figures: Sequence[Figure],
    baselines: Mapping[tuple[int, str, Measure], float],
) -> Iterator[tuple[Pair, int]]:
    """Each pair with the number of its figure."""
    measured = {measure: name for name, measure in measures(table, row).items()}
    whole = next((other for other in table.rows if other.is_baseline), None)
    for number, figure in enumerate(figures):
        name = measured.get(figure.measure)
        if name is None or not same_cell(table, row, figure):
            continue
        remarks = differing(table, row, figure)
        metric, reference = row.metrics[name], whole.metrics.get(name) if whole else None
        ours = _in_unit(metric.value, metric.unit)
        before = None if reference is None else _in_unit(reference.value, reference.unit)
        theirs_before = baselines.get((figure.table, figure.model, figure.measure))
        error = metric.standard_error
        yield (
            Pair(
                cell=row.cell,
                variant=row.variant,
                figure=figure,
                ours=ours,
                standard_error=None if error is None else _in_unit(error, metric.unit),
                n=metric.n,
                ours_change=None if row.is_baseline else _change(figure.measure, ours, before),
                theirs_change=None if row.is_baseline else _change(figure.measure, figure.value, theirs_before),
                remarks=remarks,
            ),
            number,
        )


def _in_unit(value: float, unit: str) -> float:
    return value * _WRITTEN.get(unit.partition(" ")[0], 1.0)


def _change(measure: Measure, value: float, baseline: float | None) -> float | None:
    if baseline is None:
        return None
    return 100.0 * (value / baseline - 1.0) if measure.metric in LOWER_IS_BETTER else value - baseline


# -- evaluations ------------------------------------------------------------------------------------------------------


def measures(table: Table, row: Row) -> dict[str, Measure]:
    """What the metrics of a row are measurements of, by metric; those of partial evaluations are left out."""
    options = table.protocol.get("options")
    if not isinstance(options, Mapping) or row.stopped is not None:
        return {}
    kind = table.protocol.get("evaluator")
    if kind == "perplexity":
        whole = options.get("windows") is None and options.get("convention", "windows") == "windows"
        chunked = (table.protocol.get("kv") or {}).get("chunk") is not None
        if not whole or chunked or "perplexity" not in row.metrics:
            return {}
        text, length = str(options.get("text")), int(options.get("length") or 0)
        return {"perplexity": Measure(metric="perplexity", of=text, length=length)}
    if kind == "tasks" and options.get("limit") is None and not options.get("chat_template"):
        if options.get("few_shot") is not None:  # another number than the task's own, which tables are made with
            return {}
        return {name: _task_measure(name, str(options.get("task"))) for name in row.metrics}
    return {}


def _task_measure(metric: str, task: str) -> Measure:
    """'acc' is the task's own, 'boolq acc' one of several in it."""
    of, _, name = metric.rpartition(" ")
    return Measure(metric=name, of=of or task)


# -- what belongs together --------------------------------------------------------------------------------------------


def base_name(model: str) -> str:
    """'Llama-2-7b' of 'meta-llama/Llama-2-7b-hf@main' and of '/models/Llama-2-7b-hf'; letters in lower case."""
    name = model.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    return name.removeprefix("meta-").removesuffix("-hf")


def same_cell(table: Table, row: Row, figure: Figure) -> bool:
    """Whether the figure is of this row's cell, as far as the figure says."""
    cell = row.cell
    if base_name(cell.model) != base_name(figure.model) or _parts(cell.recipe) != _parts(figure.recipe):
        return False
    try:
        scheme = parse_scheme(cell.scheme)
    except InvalidInput:  # of a newer version
        return False
    if str(scheme) != figure.scheme or (figure.recipe != BASELINE and not _same_grid(cell, figure)):
        return False
    read = (table.protocol.get("kv") or {}).get("prefill") if "kv_cache" in scheme.sites else None
    if figure.prefill is not None and read is not None and read != figure.prefill:
        return False
    return all(
        found.get(option) == value
        for method, options in figure.options.items()
        for found in [_options(cell, method)]
        for option, value in options.items()
    )


def _same_grid(cell: CellRow, figure: Figure) -> bool:
    """Group size and symmetry, which only weights have."""
    if not parse_scheme(cell.scheme).weight_widths:
        return True
    return cell.group_size == figure.group_size and figure.symmetric in (None, cell.symmetric)


def _parts(recipe: str) -> frozenset[str]:
    """The methods of a chain; rounding to nearest goes without saying where there is another."""
    parts = frozenset(part.strip() for part in recipe.split("+"))
    return parts - {"rtn"} or parts


def _methods(cell: CellRow) -> list[Mapping[str, Any]]:
    found = parsed(cell.spec, {}).get("methods")
    return [method for method in found if isinstance(method, Mapping)] if isinstance(found, list) else []


def _options(cell: CellRow, method: str) -> Mapping[str, Any]:
    """A method's options in a cell, those that go without saying in its identity included."""
    for spec in _methods(cell):
        if spec.get("name") == method:
            return {**_usual(method), **(spec.get("options") or {})}
    return {}


@functools.cache
def _usual(method: str) -> Mapping[str, Any]:
    """A method's defaults; none of a method that is not installed here."""
    return _built(method, {}, None) or {}


def _built(method: str, options: Mapping[str, Any], group_size: int | None) -> Mapping[str, Any] | None:
    """Options with the defaults of the rest, resolved for a group size if there is one; None: not installed here."""
    from qfarm.recipe import build_method

    try:
        found = build_method(method, options)
    except InvalidInput:
        return None
    plain: Mapping[str, Any] = json.loads(
        json.dumps((found if group_size is None else found.resolve(group_size)).options(), default=str)
    )
    return plain


def differing(table: Table, row: Row, figure: Figure) -> tuple[str, ...]:
    """What is known to differ between a row and its figure, in words."""
    if figure.is_baseline:
        return tuple(_model_words(row.cell, figure))
    spec = parsed(row.cell.spec, {})
    given = spec.get("calibration") if isinstance(spec.get("calibration"), Mapping) else {}
    words = list(_model_words(row.cell, figure))
    for key, theirs in figure.calibration.items():
        if key in given and given[key] != theirs:
            words.append(f"calibration {key}: {given[key]} here, {theirs} there")
    for option, value in _unnamed(row.cell, figure):
        words.append(f"{option}={json.dumps(value)} here, not named there")
    return tuple(words)


def _model_words(cell: CellRow, figure: Figure) -> Iterable[str]:
    if cell.model.partition("@")[0] != figure.model:
        yield f"model by its name: {cell.model} here, {figure.model} there"


def _unnamed(cell: CellRow, figure: Figure) -> Iterator[tuple[str, Any]]:
    """Options of a cell that are not the defaults and of which the figure says nothing."""
    for spec in _methods(cell):
        name = str(spec.get("name"))
        named = figure.options.get(name, {})
        usual = _built(name, named, cell.group_size)
        if usual is None:  # nothing is known of its defaults
            continue
        for option, value in (spec.get("options") or {}).items():
            if option not in named and value != usual.get(option):
                yield f"{name}.{option}", value
