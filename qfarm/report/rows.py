"""Rows: what the report's tables are made of, and how they are read from a store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from qfarm.errors import InvalidInput
from qfarm.margin import Margin, Measure
from qfarm.record import CellRow, MetricRow
from qfarm.report.pairs import Readable
from qfarm.scheme import parse_scheme
from qfarm.stats import FAMILY_ALPHA, STRONG_ALPHA, Difference, Interval, SeedsMean, SeedVariance, Verdict, verdict

ID_SHOWN = 8  # characters of an id that people see; `qfarm show` takes any prefix

RIGHT = ("acc", "exact_match", "bleu_acc")  # `correct` in the ledger of tasks: the first of these that a task has
HEADLINES = ("perplexity", "word_perplexity", *RIGHT)  # what an evaluation is known by, before any filter's name

Front = Literal["front", "undecided", "dominated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """What the tables need of an attempt; the fields are columns of the store."""

    attempt_id: str
    cell_id: str
    model: str
    label: str
    number: int
    evaluations: str | None  # JSON list of the eval_ids that it was to run; older rows hold none
    outcome: str
    stage: str
    error: str | None
    started: str
    wall_s: float
    notes: str  # JSON list
    provenance: str  # JSON
    expected_s: float | None = None  # by the plan
    expected_from: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One cell under one evaluation."""

    cell: CellRow
    variant: str  # the options given, and what tells it from rows of the same name; mostly empty
    metrics: Mapping[str, MetricRow]
    difference: Difference | None  # of loss or accuracy to the baseline's, paired by document
    remark: str  # why there is no difference, or on what it rests
    complete: bool  # every document of the baseline was measured
    wall_s: float | None  # of the attempt that published the metrics
    notes: tuple[str, ...]  # what that attempt did differently
    answers_changed: int | None = None  # items answered in another way than by the baseline; None: no answers
    adjusted_p: float | None = None  # Holm over the table; None below MARK_CLUSTERS
    screened_p: float | None = None  # Benjamini-Hochberg over the same family
    margin_p: float | None = None  # of equivalence within the table's margin, Holm over the table
    non_inferior_p: float | None = None  # one-sided: against a loss of the margin or more, Holm over the table
    noise_floor: float = 0.0  # differences to the baseline below it are not judged; in the scale of the difference
    with_seeds: Interval | None = None  # of a one-seed row, the noise of its calibration sample included
    best: bool | None = None  # not shown worse than any other; None: not ranked
    front: Front | None = None

    @property
    def is_baseline(self) -> bool:
        return self.cell.recipe == "baseline"

    @property
    def stopped(self) -> int | None:
        """Windows seen when the hopeless stop ended the evaluation."""
        return next(
            (metric.stopped_early for metric in self.metrics.values() if metric.stopped_early is not None), None
        )

    @property
    def marked(self) -> bool:
        return self.adjusted_p is not None and self.adjusted_p < FAMILY_ALPHA and not self.below_floor

    @property
    def below_floor(self) -> bool:
        return self.difference is not None and abs(self.difference.delta) < self.noise_floor

    @property
    def verdict(self) -> Verdict | None:
        """The table's answer about this row; None where there is no test. Within the noise floor no direction."""
        if self.difference is None or (self.adjusted_p is None and not self.difference.identical):
            return None
        return verdict(self.difference, 1.0 if self.below_floor else self.adjusted_p, self.margin_p)

    @property
    def within_margin(self) -> bool:
        return self.margin_p is not None and self.margin_p < FAMILY_ALPHA

    @property
    def non_inferior(self) -> bool:
        return self.non_inferior_p is not None and self.non_inferior_p < FAMILY_ALPHA

    @property
    def mark(self) -> str:
        """'*' or '**' where it differs, '=' where it lies within the margin, or both."""
        strong = self.adjusted_p is not None and self.adjusted_p < STRONG_ALPHA
        return ("**" if strong else "*") * self.marked + "=" * self.within_margin

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.cell.recipe, self.variant) if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicates:
    """Rows that differ in nothing but the seed."""

    rows: tuple[Row, ...]
    values: Mapping[str, float]  # each metric's mean over the seeds; none where a seed stopped early or lacks documents
    difference: SeedsMean | None  # to the baseline; None where the rows were not measured on the same documents

    remark: str = ""  # why there are no means

    @property
    def first(self) -> Row:
        return self.rows[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """How large differences come from nothing at all."""

    seeds: Mapping[tuple[str, str], SeedVariance]  # by recipe and scheme
    numeric: float | None  # between baselines in two dtypes, in the scale of the difference; None: not known
    numeric_source: str  # what it was measured between, or why it is not known
    numeric_flips: float | None = None  # of items between the same baselines, a share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """All cells of one model under one evaluation: rows that may be compared, the baseline first."""

    model: str
    fingerprint: str
    evaluation: str
    eval_id: str
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]  # what is missing, or stands in another table and why
    measure: Measure = "perplexity"
    margin: Margin | None = None
    replicates: tuple[Replicates, ...] = ()
    noise: Noise = Noise(seeds={}, numeric=None, numeric_source="")
    # Of all rows, also where only some are shown:
    tested: tuple[float, ...] = ()  # unadjusted p values against the baseline
    family: int = 0  # rows whose p values were adjusted together
    left_out: int = 0  # rows with a difference that are not ranked


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailedCell:
    """A cell whose last attempt failed and left an evaluation missing."""

    cell_id: str
    model: str  # empty when the cell was never stored
    label: str
    kind: str
    stage: str
    error: str
    attempts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    tables: tuple[Table, ...]
    failed: tuple[FailedCell, ...]
    predicted: str = ""  # how well the plan's expectations of time held; empty: not known


def headline(metrics: Mapping[str, MetricRow]) -> MetricRow | None:
    """What an evaluation is known by; None where it has nothing of the kind."""
    for wanted in HEADLINES:
        for name in metrics:  # as stored: of a task's filters, the first is the one that decides right and wrong
            if name.partition(",")[0] == wanted:
                return metrics[name]
    return None


def units_used(metrics: Mapping[str, MetricRow]) -> int:
    """Windows or items behind the headline; where there is none, behind whatever has most."""
    known = headline(metrics)
    return known.n if known else max((metric.n for metric in metrics.values()), default=0)


Record = TypeVar("Record")


def records(store: Readable, table: str, kind: type[Record], cell_ids: Sequence[str] | None = None) -> list[Record]:
    """The rows of a table as dataclasses, whose fields choose the columns."""
    columns = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    read = store.read(table, columns=columns, cell_ids=cell_ids)
    return [kind(**row) for row in read.to_pylist()]


def sort_key(cell: CellRow) -> tuple[Any, ...]:
    """Baseline, then widths falling, groups from per-channel down, recipe, seed."""
    try:
        scheme = parse_scheme(cell.scheme)
        widths = (-scheme.weight, -scheme.linear_in, -scheme.kv_cache)
    except InvalidInput:
        widths = (0, 0, 0)  # a scheme of a newer version; last
    group = (cell.group_size != -1, -cell.group_size)
    seed = -1 if cell.seed is None else cell.seed
    return (cell.recipe != "baseline", widths, cell.scheme, group, cell.recipe, seed, cell.cell_id)


def parsed(text: str | None, default: Any) -> Any:
    """A JSON column, or the default where an older or broken row holds none."""
    try:
        value = json.loads(text or "")
    except ValueError:
        return default
    return value if isinstance(value, type(default)) else default


def label(cell: CellRow) -> str:
    """As qfarm.matrix.Cell.label: 'gptq (act_order=true) w4 g128'."""
    variant = given_options(cell)
    options = f" ({variant})" if variant else ""
    group = "" if cell.group_size == -1 else f" g{cell.group_size}"
    seed = f" seed {cell.seed}" if cell.seed else ""
    return f"{cell.recipe}{options} {cell.scheme}{group}{seed}"


def given_options(cell: CellRow) -> str:
    """'act_order=true': the options that are not the defaults, as the cell says."""
    return str(parsed(cell.spec, {}).get("variant") or "")
