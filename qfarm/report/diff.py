"""Diff: two stores of the same matrix (two runs, commits or clusters), and where they differ significantly.

A result of one store belongs to one of the other when cell and evaluation have the same ids; else when model files,
label and evaluation agree and only the specification differs, as it does when a method's version was raised. Such pairs
are compared on their ledgers, document by document; the family of the tests is one evaluation. Two runs of one cell
should be equal to the bit on one machine: whatever differs is counted, and what differs significantly is listed.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from qfarm.record import CellRow, MetricRow
from qfarm.report.figures import plain
from qfarm.report.pairs import Key, Pairing, Readable, Target, pairing_of, shared_pieces
from qfarm.report.protocols import differing_keys, flatten, machine_of
from qfarm.report.rows import Attempt, label, parsed, records
from qfarm.report.tables import target_of
from qfarm.stats import FAMILY_ALPHA, MARK_CLUSTERS, Difference, holm

SIDES = ("first", "second")
NOT_OF_RESULTS = ("command", "margin")  # of the provenance
Outcome = Literal["identical", "significant", "not significant", "not tested", "not compared"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One cell under one evaluation in both stores; the difference is second minus first."""

    cell: CellRow  # of the second store
    evaluation: str
    outcome: Outcome
    difference: Difference | None
    adjusted_p: float | None  # Holm over the evaluation
    specification: tuple[str, ...]  # keys in which the cells differ; none: the same cell
    metrics: tuple[str, ...]  # names whose stored values are not equal
    remark: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    changes: tuple[Change, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]  # 'label, evaluation' that one store alone holds
    provenance: tuple[str, ...]  # key, and the values on both sides

    @property
    def significant(self) -> list[Change]:
        return [change for change in self.changes if change.outcome == "significant"]


class Both:
    """Two stores as one, in which every cell's id says whose it is."""

    def __init__(self, first: Readable, second: Readable) -> None:
        self.stores = dict(zip(SIDES, (first, second), strict=True))

    def read(
        self, table: str, *, columns: Sequence[str] | None = None, cell_ids: Collection[str] | None = None
    ) -> pa.Table:
        parts = []
        for side, store in self.stores.items():
            mine = None if cell_ids is None else [own for one in cell_ids if (own := _own(side, one)) is not None]
            found = store.read(table, columns=columns, cell_ids=mine)
            if "cell_id" in found.column_names:
                names = pc.binary_join_element_wise(side, found["cell_id"], ":")
                found = found.set_column(found.schema.get_field_index("cell_id"), "cell_id", names)
            parts.append(found)
        return pa.concat_tables(parts, promote_options="permissive")


def _own(side: str, cell_id: str) -> str | None:
    owner, _, own = cell_id.partition(":")
    return own if owner == side else None


def diff(first: Readable, second: Readable) -> Diff:
    """What changed from the first store to the second."""
    both = Both(first, second)
    sides = [_results(store) for store in (first, second)]
    pairs, only = _paired(*sides)
    found = [_change(both, sides[0][one], sides[1][two]) for one, two in pairs]
    provenance = _provenance(first, second)
    return Diff(changes=tuple(_adjusted(found)), only=only, provenance=tuple(provenance))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Result:
    cell: CellRow
    metrics: dict[str, MetricRow]

    @property
    def one(self) -> MetricRow:
        return next(iter(self.metrics.values()))

    @property
    def loosely(self) -> tuple[str, ...]:
        """What two versions of one cell have in common."""
        return (self.cell.fingerprint, label(self.cell), self.cell.dtype, self.one.eval_id)


def _results(store: Readable) -> dict[Key, _Result]:
    cells = {cell.cell_id: cell for cell in records(store, "cells", CellRow)}
    found: dict[Key, dict[str, MetricRow]] = collections.defaultdict(dict)
    for metric in records(store, "metrics", MetricRow):
        if metric.cell_id in cells and machine_of(metric) is None:  # times are never the same twice
            found[metric.cell_id, metric.eval_id][metric.metric] = metric
    return {key: _Result(cell=cells[key[0]], metrics=metrics) for key, metrics in sorted(found.items())}


def _paired(
    first: Mapping[Key, _Result], second: Mapping[Key, _Result]
) -> tuple[list[tuple[Key, Key]], tuple[tuple[str, ...], tuple[str, ...]]]:
    pairs = [(key, key) for key in first if key in second]
    sides = ((first, second), (second, first))
    rest = [{key: result for key, result in side.items() if key not in other} for side, other in sides]
    loose: list[dict[tuple[str, ...], list[Key]]] = []
    for side in rest:
        keys: dict[tuple[str, ...], list[Key]] = collections.defaultdict(list)
        for key, result in side.items():
            keys[result.loosely].append(key)
        loose.append(keys)
    for name, ours in loose[0].items():
        theirs = loose[1].get(name, [])
        if len(ours) == len(theirs) == 1:  # of several, nobody knows which belong together
            pairs.append((ours[0], theirs[0]))
            del rest[0][ours[0]], rest[1][theirs[0]]
    alone = [tuple(sorted(f"{label(one.cell)}, {one.one.evaluation}" for one in side.values())) for side in rest]
    return pairs, (alone[0], alone[1])


def _change(both: Both, first: _Result, second: _Result) -> Change:
    target = target_of(first.metrics.values(), first.cell.cell_id)
    stopped = any(metric.stopped_early is not None for one in (first, second) for metric in one.metrics.values())
    pairing = Pairing(remark="stopped early: no test") if stopped else _pairing(both, first, second, target)
    names = sorted({*first.metrics, *second.metrics})
    values = [[one.metrics[name].value if name in one.metrics else None for name in names] for one in (first, second)]
    changed = tuple(name for name, a, b in zip(names, *values, strict=True) if a != b and not (a != a and b != b))
    keys = differing_keys(parsed(first.cell.spec, {}), parsed(second.cell.spec, {}))
    return Change(
        cell=second.cell,
        evaluation=second.one.evaluation,
        outcome=_outcome(pairing.difference, changed),
        difference=pairing.difference,
        adjusted_p=None,
        specification=tuple(keys) if first.cell.cell_id != second.cell.cell_id else (),
        metrics=changed,
        remark=pairing.remark,
    )


def _pairing(both: Both, first: _Result, second: _Result, target: Target) -> Pairing:
    keys = [(f"{side}:{one.cell.cell_id}", one.one.eval_id) for side, one in zip(SIDES, (first, second), strict=True)]
    pieces = shared_pieces(both, keys[1], keys[0], target)
    return pairing_of(pieces, target, "the first store") if pieces else Pairing()


def _outcome(difference: Difference | None, changed: Sequence[str]) -> Outcome:
    """Before the family is known: 'not significant' stands for 'tested'."""
    if difference is None:
        return "not compared" if changed else "identical"
    if difference.identical:
        return "not tested" if changed else "identical"
    tested = difference.p is not None and difference.clusters >= MARK_CLUSTERS
    return "not significant" if tested else "not tested"


def _adjusted(changes: Sequence[Change]) -> Iterator[Change]:
    """The changes with their p values adjusted, and the outcome that follows."""
    families: dict[tuple[str, str], list[Change]] = collections.defaultdict(list)
    for change in changes:
        families[change.cell.model, change.evaluation].append(change)
    for _, family in sorted(families.items()):
        ordered = sorted(family, key=lambda change: (label(change.cell), change.cell.cell_id))
        tested = [change for change in ordered if change.outcome == "not significant"]
        adjusted = holm(
            [change.difference.p for change in tested if change.difference and change.difference.p is not None]
        )
        by_id = {change.cell.cell_id: float(p) for change, p in zip(tested, adjusted, strict=True)}
        for change in ordered:
            p = by_id.get(change.cell.cell_id)
            differs = p is not None and p < FAMILY_ALPHA
            yield dataclasses.replace(change, adjusted_p=p, outcome="significant" if differs else change.outcome)


def _provenance(first: Readable, second: Readable) -> Iterator[str]:
    """Keys whose values over all attempts are not the same on both sides."""
    one, two = (_values(store) for store in (first, second))
    for key in sorted({*one, *two}):
        if one.get(key) != two.get(key):
            sides = (" or ".join(sorted(side.get(key, {"nothing"}))) for side in (one, two))
            yield f"{key}: {' against '.join(sides)}"


def _values(store: Readable) -> dict[str, set[str]]:
    found: dict[str, set[str]] = collections.defaultdict(set)
    for attempt in records(store, "attempts", Attempt):
        made: dict[str, Any] = parsed(attempt.provenance, {})
        for key, value in flatten({name: part for name, part in made.items() if name not in NOT_OF_RESULTS}).items():
            found[plain(key)].add(plain(value if isinstance(value, str) else json.dumps(value)))
    return found
