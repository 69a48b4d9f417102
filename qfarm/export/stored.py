"""Stored: what a store says of the cell that is to be exported, and whether this code can make the same one again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import qfarm
from qfarm.environment import git_commit
from qfarm.errors import InvalidInput
from qfarm.layers.sites import RTN_VERSIONS
from qfarm.matrix import Cell
from qfarm.recipe import Recipe, lookup
from qfarm.record import AttemptRow, CellRow, LayerRow, MetricRow
from qfarm.report.figures import interval, number
from qfarm.report.find import find
from qfarm.report.pairs import Readable
from qfarm.report.rows import headline, parsed, records
from qfarm.report.tables import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredCell:
    """A cell of a store, with what was measured of it and of its baseline."""

    cell: Cell
    row: CellRow
    layers: Mapping[str, LayerRow]  # by module
    metrics: tuple[MetricRow, ...]
    baseline: tuple[MetricRow, ...]  # of the same evaluations
    changes: Mapping[tuple[str, str], str]  # by eval_id and metric: '+12.4 % [+10.4, +14.4]', paired with the baseline
    provenance: Mapping[str, Any]  # of the attempt that quantized it
    notes: tuple[str, ...]  # in what this code differs from the one that measured

    @property
    def on_gpu(self) -> bool:
        return bool(self.provenance.get("gpu"))


def stored_cell(store: Readable, text: str) -> StoredCell:
    """The cell that `text` names, by id or label, ready to be quantized again.

    Raises InvalidInput when there is nothing to export, or when this code would make another cell.
    """
    cell_id = find(store, text)
    rows = records(store, "cells", CellRow, [cell_id])
    if not rows:
        raise InvalidInput(f"cell {cell_id} never finished: there are no results that an export could stand for")
    row = rows[0]
    if row.recipe == "baseline":
        raise InvalidInput(f"cell {cell_id} is the baseline of {row.model}: nothing in it is quantized")
    attempts = {one.attempt_id: one for one in records(store, "attempts", AttemptRow, [cell_id])}
    made = attempts.get(row.attempt_id)
    provenance = parsed(made.provenance if made else None, {})
    metrics = records(store, "metrics", MetricRow, [cell_id])
    return StoredCell(
        cell=_same_cell(row, provenance),
        row=row,
        layers={layer.module: layer for layer in records(store, "layers", LayerRow, [cell_id])},
        metrics=tuple(metrics),
        baseline=_baseline(store, row, {metric.eval_id for metric in metrics}),
        changes=_changes(store, cell_id),
        provenance=provenance,
        notes=tuple(_differences(provenance)),
    )


def _same_cell(row: CellRow, provenance: Mapping[str, Any]) -> Cell:
    spec = dict(parsed(row.spec, {}))
    made_by, here = provenance.get("qfarm"), qfarm.__version__
    remedy = "export with that version, or submit the job again with this one"
    if made_by not in (None, here):
        raise InvalidInput(f"cell {row.cell_id} was measured by qfarm {made_by}, this is {here}: {remedy}")
    try:
        cell = Cell(**spec | {"methods": tuple(spec["methods"])})
        Recipe.from_specs(cell.methods)
    except (TypeError, KeyError) as error:
        raise InvalidInput(f"cell {row.cell_id}: its row is of another version of qfarm ({error}): {remedy}") from error
    except InvalidInput as error:
        raise InvalidInput(f"cell {row.cell_id}: {error}: {remedy}") from error
    for site, version in cell.rounded.items():
        now = lookup("rtn").version if site == "weight" else RTN_VERSIONS.get(site)
        if now != version:
            raise InvalidInput(f"cell {row.cell_id}: {site} was rounded by rule {version}, here is {now}: {remedy}")
    if cell.cell_id != row.cell_id:
        raise InvalidInput(f"cell {row.cell_id}: its row describes cell {cell.cell_id}, so the row was altered")
    return cell


def _differences(provenance: Mapping[str, Any]) -> list[str]:
    """What may move last bits; whether it did, the layers' errors tell."""
    found = []
    then, now = provenance.get("commit"), git_commit()
    if then != now:
        found.append(f"measured by the code of commit {then or 'unknown'}, quantized again by {now or 'unknown'}")
    return found


def _baseline(store: Readable, row: CellRow, evaluations: set[str]) -> tuple[MetricRow, ...]:
    """What the model's baseline scored in the same evaluations."""
    cells = store.read("cells", columns=["cell_id", "fingerprint", "recipe"]).to_pylist()
    same = [c["cell_id"] for c in cells if c["fingerprint"] == row.fingerprint and c["recipe"] == "baseline"]
    found = records(store, "metrics", MetricRow, same) if same else []
    return tuple(metric for metric in found if metric.eval_id in evaluations)


def _changes(store: Readable, cell_id: str) -> dict[tuple[str, str], str]:
    """As the report has them."""
    found = {}
    for table in load(store).tables:
        for row in table.rows:
            known = headline(row.metrics)
            if row.cell.cell_id == cell_id and row.difference is not None and known is not None:
                value, low, high = row.difference.shown
                error = None if low is None or high is None else (high - low) / 2
                words = [number(value, row.difference.unit, error, signed=True)]
                words.append(interval(low, high, row.difference.unit, signed=True) or "no interval")
                found[table.eval_id, known.metric] = " ".join(words)
    return found
