"""Changes: where the difference of two cells comes from, document by document and task by task."""

from __future__ import annotations

import dataclasses

import numpy as np

from qfarm.report.pairs import Pieces, Target, difference_of, item_by_item
from qfarm.stats import Difference

LARGEST = 10  # documents
HALF = 0.5  # of the total change in one document: it is the document that differs, not the cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentChange:
    """How far apart two cells are on one document (article, passage): the cluster of the ledger."""

    document: str
    pieces: int
    tokens: int
    change: float  # nats, summed: first minus second
    share: float | None  # of the total change; None where that is zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskChange:
    """A task's part of a mean over tasks."""

    task: str
    n: int
    change: float  # share of items
    lost: int
    gained: int


def document_changes(pieces: Pieces, target: Target) -> tuple[tuple[DocumentChange, ...], Difference | None]:
    """The documents with the largest changes of loss, and the difference without the first if it carries too much."""
    if target.measure != "perplexity":
        return (), None
    names, index = np.unique(np.asarray(pieces.words("cluster")), return_inverse=True)
    change = np.bincount(index, pieces.numbers("value") - pieces.numbers("value_other"))
    count, tokens, total = np.bincount(index), np.bincount(index, pieces.numbers("tokens")), change.sum()
    order = np.argsort(-np.abs(change), kind="stable")[:LARGEST]
    largest = tuple(
        DocumentChange(
            document=str(names[i]),
            pieces=int(count[i]),
            tokens=int(tokens[i]),
            change=float(change[i]),
            share=float(change[i] / total) if total else None,
        )
        for i in order
        if change[i]
    )
    share = largest[0].share if largest else None
    if share is None or abs(share) <= HALF or len(names) < 2:
        return largest, None
    kept = np.flatnonzero(index != order[0])
    assert pieces.table is not None
    return largest, difference_of(dataclasses.replace(pieces, table=pieces.table.take(kept)), target)


def task_changes(pieces: Pieces, target: Target) -> tuple[TaskChange, ...]:
    if target.measure != "accuracy" or pieces.tasks() is None:
        return ()
    of_item, first, second = item_by_item(pieces)
    names = np.asarray(pieces.words("task"))[of_item]
    changes = first - second
    return tuple(
        TaskChange(
            task=str(name),
            n=int((names == name).sum()),
            change=float(changes[names == name].mean()),
            lost=int((changes[names == name] < 0).sum()),
            gained=int((changes[names == name] > 0).sum()),
        )
        for name in np.unique(names)
    )
