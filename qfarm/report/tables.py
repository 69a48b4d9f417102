"""Tables: what a store holds, as one table per model and evaluation, each row paired with the model's baseline."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from qfarm.errors import InvalidInput
from qfarm.margin import Margin, parse_margin
from qfarm.record import CellRow, MetricRow
from qfarm.report.failed import failed_cells
from qfarm.report.family import judged
from qfarm.report.figures import plural
from qfarm.report.floors import NOT_KNOWN, Baseline, NumericFloor, numeric_floors
from qfarm.report.pairs import NO_MEAN, Key, Pairing, Readable, Target, pair_with_baselines
from qfarm.report.predicted import predicted
from qfarm.report.protocols import by_machine, differing_keys, flatten
from qfarm.report.rows import (
    ID_SHOWN,
    RIGHT,
    Attempt,
    Results,
    Row,
    Table,
    given_options,
    headline,
    label,
    parsed,
    records,
    sort_key,
    units_used,
)
from qfarm.stats import Difference

OTHER_PROTOCOLS_SHOWN = 3


def load(store: Readable, margins: Mapping[str, Margin] | None = None) -> Results:
    """Everything a store holds, in an order that depends on its contents only.

    `margins` by measure go before those that the attempts' provenance names.
    """
    cells = {cell.cell_id: cell for cell in records(store, "cells", CellRow)}
    attempts = records(store, "attempts", Attempt)
    metrics = [metric for metric in records(store, "metrics", MetricRow) if metric.cell_id in cells]
    by_attempt = {attempt.attempt_id: attempt for attempt in attempts}
    groups: dict[Key, dict[str, list[MetricRow]]] = {}
    for metric in map(by_machine, metrics):
        group = groups.setdefault((cells[metric.cell_id].fingerprint, metric.eval_id), {})
        group.setdefault(metric.cell_id, []).append(metric)
    targets = _targets(cells, groups)
    pairings = _pairings(store, cells, groups, targets)
    tables = [_table(key, group, cells, by_attempt, pairings, targets[key]) for key, group in groups.items()]
    tables.sort(key=lambda table: (table.model, table.evaluation, table.fingerprint, table.eval_id))
    floors = numeric_floors(
        store, [_measured_baseline(table, targets) for table in tables if table.rows[0].is_baseline]
    )
    tables = [
        _judged(table, floors.get((table.fingerprint, table.eval_id)), by_attempt, margins or {}) for table in tables
    ]
    failed = failed_cells(cells, attempts, {(metric.cell_id, metric.eval_id) for metric in metrics})
    return Results(tables=tuple(_with_protocol_remarks(tables)), failed=tuple(failed), predicted=predicted(attempts))


def target_of(metrics: Iterable[MetricRow], reference: str | None = None) -> Target:
    """What an evaluation's cells are compared by; `reference` is the cell that they are compared with."""
    by_cell: dict[str, dict[str, MetricRow]] = collections.defaultdict(dict)
    for metric in metrics:
        by_cell[metric.cell_id][metric.metric] = metric
    if not any(_of_items(name) for names in by_cell.values() for name in names):
        return Target(measure="perplexity")
    stored = by_cell.get(reference or "", {})
    known = headline(stored)
    if known is None:
        return Target(measure="accuracy", by_task=True)
    of_others = {task for task, metric in _deciding(stored).items() if metric != known.metric}
    return Target(measure="accuracy", accuracy=known.value, items=known.n, without=frozenset(of_others))


def _deciding(names: Iterable[str]) -> dict[str, str]:
    """By task: the metric that decides right and wrong, of 'arc_easy acc', 'gsm8k exact_match,strict-match'."""
    found: dict[str, str] = {}
    for wanted in RIGHT:
        for name in names:  # as stored: of a task's filters, the first decides
            task, _, base = name.partition(",")[0].rpartition(" ")
            if task and base == wanted:
                found.setdefault(task, name.removeprefix(f"{task} "))
    return found


def _of_items(metric: str) -> bool:
    """'acc', 'exact_match,strict-match', 'arc_easy acc'."""
    return metric.partition(",")[0].rpartition(" ")[2] in RIGHT


def _targets(
    cells: Mapping[str, CellRow], groups: Mapping[Key, Mapping[str, Sequence[MetricRow]]]
) -> dict[Key, Target]:
    """By (fingerprint, eval_id)."""
    return {
        key: target_of((metric for metrics in group.values() for metric in metrics), _baseline(cells, group))
        for key, group in groups.items()
    }


def _baseline(cells: Mapping[str, CellRow], group: Iterable[str]) -> str | None:
    """One per model and evaluation, since the protocol holds whatever tells baselines apart."""
    return min((cell_id for cell_id in group if cells[cell_id].recipe == "baseline"), default=None)


def _pairings(
    store: Readable,
    cells: Mapping[str, CellRow],
    groups: Mapping[Key, Mapping[str, object]],
    targets: Mapping[Key, Target],
) -> dict[Key, Pairing]:
    """By (cell_id, eval_id), model by model."""
    found: dict[Key, Pairing] = {}
    for fingerprint in sorted({key[0] for key in groups}):
        here = {eval_id: group for (owner, eval_id), group in groups.items() if owner == fingerprint}
        baselines = {eval_id: one for eval_id, group in here.items() if (one := _baseline(cells, group))}
        others = {cell_id for group in here.values() for cell_id in group} - set(baselines.values())
        of_model = {eval_id: targets[fingerprint, eval_id] for eval_id in here}
        if baselines and others:
            found |= pair_with_baselines(store, baselines, others, of_model)
    return found


def _table(
    key: Key,
    group: Mapping[str, Sequence[MetricRow]],
    cells: Mapping[str, CellRow],
    attempts: Mapping[str, Attempt],
    pairings: Mapping[Key, Pairing],
    target: Target,
) -> Table:
    fingerprint, eval_id = key
    members = sorted((cells[cell_id] for cell_id in group), key=sort_key)
    variants = _variants(members)
    whole = max(units_used({metric.metric: metric for metric in group[cell.cell_id]}) for cell in members)
    rows = [
        _row(
            cell,
            variants[cell.cell_id],
            group[cell.cell_id],
            attempts.get(group[cell.cell_id][0].attempt_id),
            pairings.get((cell.cell_id, eval_id), Pairing()),
            whole,
        )
        for cell in members
    ]
    remarks = [] if rows[0].is_baseline else ["no baseline was measured under this protocol"]
    if any(row.remark == NO_MEAN for row in rows):  # said once
        remarks.append(NO_MEAN)
        rows = [dataclasses.replace(row, remark="") if row.remark == NO_MEAN else row for row in rows]
    first = group[members[0].cell_id][0]
    return Table(
        model=members[0].model,
        fingerprint=fingerprint,
        evaluation=first.evaluation,
        eval_id=eval_id,
        protocol=parsed(first.protocol, {}),
        rows=tuple(rows),
        remarks=tuple(remarks),
        measure=target.measure,
    )


def _row(
    cell: CellRow,
    variant: str,
    metrics: Sequence[MetricRow],
    attempt: Attempt | None,
    pairing: Pairing,
    whole: int,
) -> Row:
    row = Row(
        cell=cell,
        variant=variant,
        metrics={metric.metric: metric for metric in metrics},
        difference=pairing.difference,
        remark=pairing.remark,
        complete=pairing.complete,
        answers_changed=pairing.answers_changed,
        wall_s=attempt.wall_s if attempt else None,
        notes=tuple(map(str, parsed(attempt.notes, []))) if attempt else (),
    )
    if row.stopped is None:
        return row
    remark = f"stopped early, on {row.stopped:,} of {whole:,} windows: not ranked"
    return dataclasses.replace(row, difference=_untested(row.difference), remark=remark, complete=False)


def _untested(difference: Difference | None) -> Difference | None:
    """What was seen until a sequential test stopped it: its size is no estimate that an interval could hold."""
    return difference and dataclasses.replace(difference, standard_error=None, low=None, high=None, p=None)


def _measured_baseline(table: Table, targets: Mapping[Key, Target]) -> Baseline:
    return Baseline(
        fingerprint=table.fingerprint,
        eval_id=table.eval_id,
        cell_id=table.rows[0].cell.cell_id,
        protocol=table.protocol,
        target=targets[table.fingerprint, table.eval_id],
    )


# -- judging ----------------------------------------------------------------------------------------------------------


def _judged(
    table: Table, floor: NumericFloor | None, attempts: Mapping[str, Attempt], given: Mapping[str, Margin]
) -> Table:
    provenance = {
        row.cell.cell_id: parsed(attempt.provenance, {})
        for row in table.rows
        if row.metrics and (attempt := attempts.get(next(iter(row.metrics.values())).attempt_id))
    }
    margin, remarks = given.get(table.measure), list[str]()
    if margin is None:
        margin, remarks = _stored_margin(table, [made.get("margin") for made in provenance.values()])
    remarks += _devices(table, provenance)
    found = judged(table, margin, floor or NumericFloor(amount=None, source=NOT_KNOWN))
    return dataclasses.replace(found, remarks=(*table.remarks, *remarks))


def _stored_margin(table: Table, stored: Iterable[object]) -> tuple[Margin | None, list[str]]:
    """The margin that the jobs gave; of several the narrowest."""
    texts = {str(given[table.measure]) for given in stored if isinstance(given, Mapping) and table.measure in given}
    margins, remarks = [], []
    for text in sorted(texts):
        try:
            margins.append(parse_margin(table.measure, text))
        except InvalidInput as error:
            remarks.append(str(error))
    margins.sort(key=lambda margin: margin.amount)
    if len(margins) > 1:
        remarks.append(f"jobs gave several margins ({', '.join(m.text for m in margins)}): the narrowest is used")
    return (margins[0] if margins else None), remarks


def _devices(table: Table, provenance: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Rows measured on another kind of device than the baseline: compared, but not without a word."""
    kinds = {cell_id: str(made.get("gpu") or "CPU") for cell_id, made in provenance.items()}
    baseline = kinds.get(table.rows[0].cell.cell_id)
    if baseline is None or not table.rows[0].is_baseline:
        return []
    others = collections.Counter(kind for kind in kinds.values() if kind != baseline)
    return [
        f"{plural(count, 'row')} measured on {kind}, the baseline on {baseline}: differences hold the devices' rounding"
        for kind, count in sorted(others.items())
    ]


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
            variants[cell.cell_id] = ", ".join(filter(None, [given_options(cell), *options]))
    return variants


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
