"""Tables: what a store holds, as one table per model and evaluation, each row paired with the model's baseline."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

from qfarm.errors import InvalidInput
from qfarm.record import CellRow, MetricRow
from qfarm.report.figures import plain, plural
from qfarm.report.pairs import Pairing, Readable, differing_keys, flatten, pair_with_baselines
from qfarm.scheme import parse_scheme
from qfarm.stats import FAMILY_ALPHA, MARK_CLUSTERS, Difference, holm

ID_SHOWN = 8  # characters of an id that people see; `qfarm show` takes any prefix
OTHER_PROTOCOLS_SHOWN = 3


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One cell under one evaluation."""

    cell: CellRow
    variant: str  # the options given, and what tells it from rows of the same name; mostly empty
    metrics: Mapping[str, MetricRow]
    difference: Difference | None  # of the loss to the baseline's, paired by document
    remark: str  # why there is no difference, or on what it rests
    adjusted_p: float | None  # Holm over the table; None below MARK_CLUSTERS
    wall_s: float | None  # of the attempt that published the metrics
    notes: tuple[str, ...]  # what that attempt did differently

    @property
    def is_baseline(self) -> bool:
        return self.cell.recipe == "baseline"

    @property
    def marked(self) -> bool:
        return self.adjusted_p is not None and self.adjusted_p < FAMILY_ALPHA

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.cell.recipe, self.variant) if part)


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


def load(store: Readable) -> Results:
    """Everything a store holds, in an order that depends on its contents only."""
    cells = {cell.cell_id: cell for cell in records(store, "cells", CellRow)}
    attempts = records(store, "attempts", Attempt)
    metrics = records(store, "metrics", MetricRow)
    groups: dict[tuple[str, str], dict[str, list[MetricRow]]] = {}
    for metric in metrics:
        if metric.cell_id in cells:
            group = groups.setdefault((cells[metric.cell_id].fingerprint, metric.eval_id), {})
            group.setdefault(metric.cell_id, []).append(metric)
    by_attempt = {attempt.attempt_id: attempt for attempt in attempts}
    pairings: dict[tuple[str, str], Pairing] = {}
    for fingerprint in sorted({key[0] for key in groups}):
        pairings |= _pairings(store, cells, {key[1]: group for key, group in groups.items() if key[0] == fingerprint})
    tables = [_table(key, group, cells, by_attempt, pairings) for key, group in groups.items()]
    tables.sort(key=lambda table: (table.model, table.evaluation, table.fingerprint, table.eval_id))
    failed = _failed(cells, attempts, {(metric.cell_id, metric.eval_id) for metric in metrics})
    return Results(tables=tuple(_with_protocol_remarks(tables)), failed=tuple(failed))


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
    variant = _given(cell)
    options = f" ({variant})" if variant else ""
    group = "" if cell.group_size == -1 else f" g{cell.group_size}"
    seed = f" seed {cell.seed}" if cell.seed else ""
    return f"{cell.recipe}{options} {cell.scheme}{group}{seed}"


def _pairings(
    store: Readable, cells: Mapping[str, CellRow], evaluations: Mapping[str, Mapping[str, object]]
) -> dict[tuple[str, str], Pairing]:
    """Of one model's cells; one baseline per evaluation, since the protocol holds whatever tells baselines apart."""
    baselines = {
        eval_id: min(cell_id for cell_id in group if cells[cell_id].recipe == "baseline")
        for eval_id, group in evaluations.items()
        if any(cells[cell_id].recipe == "baseline" for cell_id in group)
    }
    others = {cell_id for group in evaluations.values() for cell_id in group} - set(baselines.values())
    return pair_with_baselines(store, baselines, others) if baselines else {}


def _table(
    key: tuple[str, str],
    group: Mapping[str, Sequence[MetricRow]],
    cells: Mapping[str, CellRow],
    attempts: Mapping[str, Attempt],
    pairings: Mapping[tuple[str, str], Pairing],
) -> Table:
    fingerprint, eval_id = key
    members = sorted((cells[cell_id] for cell_id in group), key=sort_key)
    variants = _variants(members)
    rows = [
        _row(
            cell,
            variants[cell.cell_id],
            group[cell.cell_id],
            attempts.get(group[cell.cell_id][0].attempt_id),
            pairings.get((cell.cell_id, eval_id), Pairing()),
        )
        for cell in members
    ]
    first = group[members[0].cell_id][0]
    return Table(
        model=members[0].model,
        fingerprint=fingerprint,
        evaluation=first.evaluation,
        eval_id=eval_id,
        protocol=parsed(first.protocol, {}),
        rows=tuple(_adjusted(rows)),
        remarks=() if rows[0].is_baseline else ("no baseline was measured under this protocol",),
    )


def _row(cell: CellRow, variant: str, metrics: Sequence[MetricRow], attempt: Attempt | None, pairing: Pairing) -> Row:
    return Row(
        cell=cell,
        variant=variant,
        metrics={metric.metric: metric for metric in metrics},
        difference=pairing.difference,
        remark=pairing.remark,
        adjusted_p=None,
        wall_s=attempt.wall_s if attempt else None,
        notes=tuple(map(str, parsed(attempt.notes, []))) if attempt else (),
    )


def _adjusted(rows: Sequence[Row]) -> list[Row]:
    """Rows with their p values adjusted; the family is the table."""

    def p_value(row: Row) -> float | None:
        found = row.difference
        return found.p if found and found.clusters >= MARK_CLUSTERS else None

    family = [p for row in rows if (p := p_value(row)) is not None]
    adjusted = iter(holm(family))
    return [row if p_value(row) is None else dataclasses.replace(row, adjusted_p=float(next(adjusted))) for row in rows]


def _variants(cells: Iterable[CellRow]) -> dict[str, str]:
    """By cell_id: 'act_order=true', as the cell says; for cells still of the same name, also what differs."""
    namesakes: dict[str, list[CellRow]] = collections.defaultdict(list)
    for cell in cells:
        namesakes[label(cell)].append(cell)
    variants: dict[str, str] = {}
    for group in namesakes.values():
        specs = [flatten(parsed(cell.spec, {})) if len(group) > 1 else {} for cell in group]
        found = {key for spec in specs for key in spec if any(spec[key] != other.get(key) for other in specs)}
        keys = sorted(found - {"model", "variant"})  # one model under two names is still one model
        for cell, spec in zip(group, specs, strict=True):
            options = [f"{key.rpartition('.')[2]}={json.dumps(spec.get(key))}" for key in keys]
            variants[cell.cell_id] = ", ".join(filter(None, [_given(cell), *options]))
    return variants


def _given(cell: CellRow) -> str:
    return str(parsed(cell.spec, {}).get("variant") or "")


def _with_protocol_remarks(tables: Sequence[Table]) -> list[Table]:
    """Tables that a reader might take for comparable say on which protocol key they differ."""
    out = []
    for table in tables:
        remarks = []
        for other in tables:
            if (other.model, other.evaluation) != (table.model, table.evaluation) or other is table:
                continue
            if other.fingerprint != table.fingerprint:
                remarks.append(
                    f"the model's files differ from those of fingerprint {other.fingerprint[:ID_SHOWN]}: "
                    f"here {table.fingerprint[:ID_SHOWN]}"
                )
            else:
                keys = differing_keys(table.protocol, other.protocol) or ["protocols that were not stored"]
                rows = plural(len(other.rows), "row")
                remarks.append(f"not compared with {rows} of evaluation {other.eval_id[:ID_SHOWN]}: {'; '.join(keys)}")
        more = len(remarks) - OTHER_PROTOCOLS_SHOWN
        shown = remarks[:OTHER_PROTOCOLS_SHOWN] + ([f"and with {more} more"] if more > 0 else [])
        out.append(dataclasses.replace(table, remarks=(*table.remarks, *shown)))
    return out


def _failed(
    cells: Mapping[str, CellRow], attempts: Iterable[Attempt], finished: Set[tuple[str, str]]
) -> list[FailedCell]:
    """`finished` holds (cell_id, eval_id): what another attempt has measured is not missing."""
    measured = {cell_id for cell_id, _ in finished}
    tries: dict[str, list[Attempt]] = collections.defaultdict(list)
    for attempt in attempts:
        tries[attempt.cell_id].append(attempt)
    failed = []
    for cell_id, group in tries.items():
        last = max(group, key=lambda attempt: (attempt.started, attempt.number))
        wanted = parsed(last.evaluations, [])
        missing = (
            any((cell_id, str(eval_id)) not in finished for eval_id in wanted) if wanted else cell_id not in measured
        )
        if last.outcome == "ok" or not missing:
            continue
        cell = cells.get(cell_id)
        failed.append(
            FailedCell(
                cell_id=cell_id,
                model=cell.model if cell else last.model,
                label=label(cell) if cell else last.label,
                kind=last.outcome,
                stage=last.stage,
                error=plain(last.error or ""),
                attempts=len(group),
            )
        )
    return sorted(failed, key=lambda cell: (cell.kind, cell.model, cell.label, cell.cell_id))
