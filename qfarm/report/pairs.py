"""Pairs: the same documents under two cells, and the difference between them.

A ledger has one row per piece: a window's part of a document with its loss, or a task's item that is right or wrong.
Pieces are paired by document, window and task; what one side lacks is left out of both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qfarm.errors import NonFinite
from qfarm.margin import Measure
from qfarm.stats import Difference, Weights, accuracy_difference, paired_difference

# Cells whose ledgers are in memory at once: at first, and later as many as have that many rows.
BATCH = 256
BATCH_ROWS = 1_000_000
SHARED = 0.9  # of the smaller ledger: below it, what is missing may be what is hard
NO_MEAN = "no mean over these tasks is stored, so they have no common difference: `qfarm compare` has one for each"
_LEDGER = ("cell_id", "eval_id", "document", "window", "task", "cluster", "tokens", "loss", "correct", "answer")
_KEYS = ["eval_id", "document", "window", "task"]
_TASK = ["cell_id", "eval_id", "task"]
_OWNER = pa.schema([("eval_id", pa.string()), ("cell_id", pa.string())])

Key = tuple[str, str]  # (cell_id, eval_id)


class Readable(Protocol):
    """What a report needs of a store."""

    def read(
        self, table: str, *, columns: Sequence[str] | None = None, cell_ids: Collection[str] | None = None
    ) -> pa.Table: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is compared of an evaluation: the losses, or the answers behind one stored accuracy of the reference."""

    measure: Measure
    accuracy: float | None = None  # from which the weights of a mean over tasks are known
    items: int | None = None  # behind it
    without: frozenset[str] = frozenset()  # tasks whose right and wrong are of another metric than that accuracy
    by_task: bool = False  # there is no such accuracy: only single tasks have differences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Pieces that two cells share, and how many each of them has."""

    table: pa.Table | None  # of `_joined`; None: not one
    of_first: int
    of_second: int
    items_of_second: int

    def __len__(self) -> int:
        return 0 if self.table is None else len(self.table)

    def numbers(self, name: str) -> NDArray[Any]:
        """A column [piece]: tokens, items, window, value (first), value_other (second) or cluster_number."""
        assert self.table is not None
        found: NDArray[Any] = self.table[name].to_numpy()
        return found

    def words(self, name: str) -> list[str]:
        """A column [piece]: document, task (empty: none) or cluster."""
        assert self.table is not None
        found: list[str] = self.table[name].to_pylist()
        return found

    def tasks(self) -> NDArray[Any] | None:
        """Each piece's task [piece] as a number; None where there are none."""
        assert self.table is not None
        encoded = self.table["task"].combine_chunks().dictionary_encode()
        return encoded.indices.to_numpy() if len(encoded.dictionary) > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairing:
    """A cell compared with another, or the reason why there is no comparison."""

    difference: Difference | None = None
    remark: str = ""
    complete: bool = False  # every piece of the other side is there
    by_task: bool = False  # there is no common difference, but each task has one
    answers_changed: int | None = None  # items answered in another way, right or wrong; None: no answers are stored


def pair_with_baselines(
    store: Readable, baselines: Mapping[str, str], cells: Collection[str], targets: Mapping[str, Target]
) -> dict[Key, Pairing]:
    """Pairings by (cell_id, eval_id). `baselines` gives each eval_id's baseline cell, `targets` what is compared.

    Evaluations without a ledger that holds it have no entry.
    """
    reference = _ledger(store, set(baselines.values()), targets)
    owner = pa.table({"eval_id": list(baselines), "cell_id": list(baselines.values())}, schema=_OWNER)
    reference = reference.join(owner, keys=["eval_id", "cell_id"], join_type="inner").drop_columns(["cell_id"])
    counts, items = _counts(reference, ["eval_id"]), _items(reference)
    reference = _numbered(reference)
    found: dict[Key, Pairing] = {}
    for ledger in _ledgers(store, sorted(cells), targets):
        ours = _counts(ledger, ["cell_id", "eval_id"])
        shared = dict(_joined(ledger, reference))
        for (cell_id, eval_id), pieces in ours.items():
            theirs = counts.get((eval_id,))
            if theirs:
                both = Pieces(
                    table=shared.get((cell_id, eval_id)),
                    of_first=pieces,
                    of_second=theirs,
                    items_of_second=items[eval_id],
                )
                found[cell_id, eval_id] = pairing_of(both, targets[eval_id])
    return found


def shared_pieces(store: Readable, first: Key, second: Key, target: Target) -> Pieces | None:
    """The pieces that two cells share, each under one evaluation; None where a ledger holds nothing to compare."""
    sides = []
    for cell_id, eval_id in (first, second):
        ledger = _ledger(store, [cell_id], {eval_id: target})
        same = pa.array(["both"] * len(ledger), pa.string())
        sides.append(ledger.set_column(ledger.schema.get_field_index("eval_id"), "eval_id", same))
    ours, theirs = sides
    if not len(ours) or not len(theirs):
        return None
    joined = dict(_joined(ours, _numbered(theirs.drop_columns(["cell_id"]))))
    return Pieces(
        table=joined.get((first[0], "both")),
        of_first=len(ours),
        of_second=len(theirs),
        items_of_second=_items(theirs)["both"],
    )


def pairing_of(pieces: Pieces, target: Target, other: str = "the baseline") -> Pairing:
    """The difference, first minus second, or why there is none; `other` names the second in remarks."""
    count, smaller = len(pieces), min(pieces.of_first, pieces.of_second)
    if count == 0 or count < SHARED * smaller:
        return Pairing(remark=f"not compared: shares {count:,} of {smaller:,} pieces with {other}")
    if target.items not in (None, pieces.items_of_second):
        return Pairing(
            remark=f"not compared: the stored accuracy is of {target.items:,} items, right or wrong are "
            f"{pieces.items_of_second:,}"
        )
    try:
        difference = difference_of(pieces, target)
    except NonFinite as error:
        return Pairing(remark=f"not compared: {error}")
    if target.by_task and pieces.tasks() is not None:
        return Pairing(remark=NO_MEAN, by_task=True)
    larger = max(pieces.of_first, pieces.of_second)
    remark = f"on {count:,} of {larger:,} shared pieces" if count < larger else ""
    return Pairing(
        difference=difference,
        remark=remark,
        complete=count == pieces.of_second,
        answers_changed=_answers_changed(pieces) if target.measure == "accuracy" else None,
    )


def _answers_changed(pieces: Pieces) -> int | None:
    """Items answered in another way, from wrong to another wrong included; None where an answer is not stored."""
    assert pieces.table is not None
    differ = pc.not_equal(pieces.table["answer"], pieces.table["answer_other"])
    return None if differ.null_count else int(pc.sum(differ).as_py())


def difference_of(pieces: Pieces, target: Target) -> Difference:
    """First minus second. Raises NonFinite where a loss or an answer is missing or no number."""
    first, second = pieces.numbers("value"), pieces.numbers("value_other")
    clusters = pieces.numbers("cluster_number")
    if target.measure == "perplexity":
        return paired_difference(first, second, pieces.numbers("tokens"), clusters)
    missing = int(np.count_nonzero(~np.isfinite(first - second)))
    if missing:
        raise NonFinite(f"the answer of {missing} of {len(pieces)} items is missing")
    of_item, right, right_other = item_by_item(pieces)
    task = pieces.tasks()
    if task is None:
        return accuracy_difference(right, right_other, clusters[of_item])
    weights = _weights(right_other, task[of_item], target.accuracy)
    return accuracy_difference(right, right_other, clusters[of_item], task[of_item], weights)


def _weights(right: NDArray[np.float64], task: NDArray[Any], stored: float | None) -> Weights:
    """Those of the stored mean over tasks, so that the error belongs to the number that is shown."""
    if stored is None:
        return "plain"
    plain = (np.bincount(task, right) / np.bincount(task)).mean()
    return "size" if abs(right.mean() - stored) < abs(plain - stored) else "plain"


def item_by_item(pieces: Pieces) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The piece of each item [item], and whether it is right in the first and in the second cell.

    An item that stands in its task twice is one piece with two items of one cluster.
    """
    items = pieces.numbers("items")
    of_item = np.repeat(np.arange(len(pieces)), items)
    place = np.arange(of_item.size) - np.repeat(np.cumsum(items) - items, items)
    first, second = ((place < pieces.numbers(name)[of_item]).astype(np.float64) for name in ("value", "value_other"))
    return of_item, first, second


def _ledgers(store: Readable, cells: Sequence[str], targets: Mapping[str, Target]) -> Iterator[pa.Table]:
    """The ledgers of all cells, batch by batch. Each costs the store a look at all that it holds, so they are few."""
    start, size = 0, BATCH
    while start < len(cells):
        ledger = _ledger(store, cells[start : start + size], targets)
        yield ledger
        start, rows = start + size, max(1, len(ledger))
        size = max(1, min(BATCH_ROWS * size // rows, 2 * size))  # the next cells may have longer ones


def _ledger(store: Readable, cells: Collection[str], targets: Mapping[str, Target]) -> pa.Table:
    """One row per piece of the evaluations that have what is compared: value, tokens, rows.

    Tasks whose items are not right or wrong (TruthfulQA's mc2), or so by another metric than the one that is compared,
    are left out. A value that is missing is not a number.
    """
    table = store.read("documents", columns=_LEDGER, cell_ids=cells)
    table = table.filter(pc.is_in(table["eval_id"], pa.array(list(targets), pa.string())))
    items = pa.array([eval_id for eval_id, target in targets.items() if target.measure == "accuracy"], pa.string())
    right = pc.cast(table["correct"], pa.float64())
    table = table.append_column("value", pc.if_else(pc.is_in(table["eval_id"], items), right, table["loss"]))
    table = _filled(table, "task", "")  # a join never matches nulls
    for eval_id, target in targets.items():
        if target.without:
            of_others = pc.is_in(table["task"], pa.array(sorted(target.without), pa.string()))
            table = table.filter(pc.invert(pc.and_(pc.equal(table["eval_id"], eval_id), of_others)))
    counted = table.group_by(_TASK).aggregate([("value", "count")])
    kept = counted.filter(pc.greater(counted["value_count"], 0)).select(_TASK)
    table = _filled(_filled(table, "window", -1), "value", math.nan)
    table = table.drop_columns(["loss", "correct"]).join(kept, keys=_TASK, join_type="inner")
    grouped = table.group_by(["cell_id", *_KEYS, "cluster"])
    summed = grouped.aggregate([("tokens", "sum"), ("value", "sum"), ("answer", "max"), ([], "count_all")])
    return summed.rename_columns(["cell_id", *_KEYS, "cluster", "tokens", "value", "answer", "items"])


def _filled(table: pa.Table, name: str, value: object) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pc.fill_null(table[name], value))


def _numbered(reference: pa.Table) -> pa.Table:
    """With clusters numbered in their own order, so that every cell compared with them has the same numbers."""
    names = pc.unique(reference["cluster"])
    ordered = names.take(pc.sort_indices(names))
    return reference.append_column("cluster_number", pc.index_in(reference["cluster"], ordered))


def _counts(ledger: pa.Table, keys: list[str]) -> dict[tuple[str, ...], int]:
    table = ledger.group_by(keys).aggregate([([], "count_all")])
    columns = [table[key].to_pylist() for key in keys]
    return dict(zip(zip(*columns, strict=True), table["count_all"].to_pylist(), strict=True))


def _items(reference: pa.Table) -> dict[str, int]:
    """By eval_id."""
    table = reference.group_by(["eval_id"]).aggregate([("items", "sum")])
    return dict(zip(table["eval_id"].to_pylist(), table["items_sum"].to_pylist(), strict=True))


def _joined(ledger: pa.Table, reference: pa.Table) -> Iterator[tuple[Key, pa.Table]]:
    """(cell_id, eval_id) and the pieces that both have, in a fixed order, so that sums come out the same every time."""
    joined = ledger.join(reference, keys=_KEYS, join_type="inner", right_suffix="_other")
    joined = joined.sort_by([(key, "ascending") for key in ("cell_id", *_KEYS, "cluster")])
    ids = list(zip(joined["cell_id"].to_pylist(), joined["eval_id"].to_pylist(), strict=True))
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or ids[stop] != ids[start]:
            yield ids[start], joined.slice(start, stop - start)
            start = stop
