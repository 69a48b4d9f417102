"""Pairs: the same documents under a cell and under its baseline, and what forbids to compare two evaluations."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qfarm.errors import NonFinite
from qfarm.stats import Difference, paired_difference

BATCH = 256  # cells whose ledgers are in memory at once
SHARED = 0.9  # of the smaller ledger: below it, what is missing may be what is hard
_LEDGER = ("cell_id", "eval_id", "document", "window", "cluster", "tokens", "loss")
_KEYS = ["eval_id", "document", "window"]


class Readable(Protocol):
    """What a report needs of a store."""

    def read(
        self, table: str, *, columns: Sequence[str] | None = None, cell_ids: Collection[str] | None = None
    ) -> pa.Table: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairing:
    """A cell's loss compared with the baseline's, or the reason why there is no comparison."""

    difference: Difference | None = None
    remark: str = ""


def pair_with_baselines(
    store: Readable, baselines: Mapping[str, str], cells: Collection[str]
) -> dict[tuple[str, str], Pairing]:
    """Pairings by (cell_id, eval_id). `baselines` gives each eval_id's baseline cell.

    Evaluations without losses (or without a ledger) have no entry. Documents that one side lacks are left out of both.
    """
    reference = _ledger(store, set(baselines.values()))
    owner = pa.table({"eval_id": list(baselines), "cell_id": list(baselines.values())}, schema=_OWNER)
    reference = reference.join(owner, keys=["eval_id", "cell_id"], join_type="inner").drop_columns(["cell_id"])
    counts = _counts(reference, ["eval_id"])
    ordered = sorted(cells)
    found: dict[tuple[str, str], Pairing] = {}
    for start in range(0, len(ordered), BATCH):
        ledger = _ledger(store, ordered[start : start + BATCH])
        ours = _counts(ledger, ["cell_id", "eval_id"])
        shared = dict(_shared(ledger, reference))
        for (cell_id, eval_id), pieces in ours.items():
            theirs = counts.get((eval_id,))
            if theirs:
                found[cell_id, eval_id] = _pairing(shared.get((cell_id, eval_id)), pieces, theirs)
    return found


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """'options.length 2048 against 512' for each key on which two protocols disagree."""
    one, two = flatten(first), flatten(second)
    return [
        f"{key} {json.dumps(one.get(key))} against {json.dumps(two.get(key))}"
        for key in sorted({*one, *two})
        if one.get(key) != two.get(key)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as one level: {"a": {"b": [1]}} is {"a.b.0": 1}; what is empty stays as it is."""
    if not isinstance(value, (Mapping, list)) or not value:
        return {prefix: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    out: dict[str, Any] = {}
    for key, part in items:
        out |= flatten(part, f"{prefix}.{key}" if prefix else str(key))
    return out


_OWNER = pa.schema([("eval_id", pa.string()), ("cell_id", pa.string())])


def _ledger(store: Readable, cells: Collection[str]) -> pa.Table:
    """One row per piece that has a loss column: a piece stands once, and a loss that is missing is not a number."""
    table = store.read("documents", columns=_LEDGER, cell_ids=cells)
    has_loss = table.group_by(["cell_id", "eval_id"]).aggregate([("loss", "count")])
    kept = has_loss.filter(pc.greater(has_loss["loss_count"], 0)).select(["cell_id", "eval_id"])
    # A join never matches nulls.
    table = table.set_column(table.schema.get_field_index("window"), "window", pc.fill_null(table["window"], -1))
    table = table.set_column(table.schema.get_field_index("loss"), "loss", pc.fill_null(table["loss"], math.nan))
    table = table.join(kept, keys=["cell_id", "eval_id"], join_type="inner")
    grouped = table.group_by(["cell_id", *_KEYS, "cluster"]).aggregate([("tokens", "sum"), ("loss", "sum")])
    return grouped.rename_columns(["cell_id", *_KEYS, "cluster", "tokens", "loss"])


def _counts(ledger: pa.Table, keys: list[str]) -> dict[tuple[str, ...], int]:
    table = ledger.group_by(keys).aggregate([([], "count_all")])
    columns = [table[key].to_pylist() for key in keys]
    return dict(zip(zip(*columns, strict=True), table["count_all"].to_pylist(), strict=True))


def _shared(ledger: pa.Table, reference: pa.Table) -> Iterator[tuple[tuple[str, str], pa.Table]]:
    """((cell_id, eval_id), pieces that both have) in a fixed order, so that sums come out the same every time."""
    joined = ledger.join(reference, keys=_KEYS, join_type="inner", right_suffix="_baseline")
    joined = joined.sort_by([(key, "ascending") for key in ("cell_id", *_KEYS, "cluster")])
    ids = list(zip(joined["cell_id"].to_pylist(), joined["eval_id"].to_pylist(), strict=True))
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or ids[stop] != ids[start]:
            yield ids[start], joined.slice(start, stop - start)
            start = stop


def _pairing(shared: pa.Table | None, ours: int, theirs: int) -> Pairing:
    count = 0 if shared is None else len(shared)
    if shared is None or count < SHARED * min(ours, theirs):
        return Pairing(remark=f"not compared: shares {count:,} of {min(ours, theirs):,} pieces with the baseline")
    columns = {name: shared[name].to_numpy() for name in ("loss", "loss_baseline", "tokens")}
    clusters = np.asarray(shared["cluster"].to_pylist())
    try:
        difference = paired_difference(columns["loss"], columns["loss_baseline"], columns["tokens"], clusters)
    except NonFinite as error:
        return Pairing(remark=f"not compared: {error}")
    remark = f"on {count:,} of {max(ours, theirs):,} shared pieces" if count < max(ours, theirs) else ""
    return Pairing(difference=difference, remark=remark)
