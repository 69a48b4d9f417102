"""Changes: where the difference of two cells comes from, document by document and task by task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from scipy import special

from qfarm.report.pairs import Key, Pieces, Readable, Target, difference_of, item_by_item
from qfarm.stats import Difference, accuracy_difference

LARGEST = 10  # documents
HALF = 0.5  # of all change in one document: it is the document that differs, not the cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentChange:
    """How far apart two cells are on one document (article, passage): the cluster of the ledger."""

    document: str
    windows: str  # '3-5, 8': where it stands in the text
    pieces: int
    tokens: int
    change: float  # nats, summed: first minus second
    share: float  # of the sum of all documents' absolute changes, with the sign of the change


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskChange:
    """A task's part of a mean over tasks."""

    task: str
    n: int
    change: float  # share of items
    lost: int
    gained: int
    difference: Difference  # with its interval and test


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemChange:
    """One item that two cells answer differently, or with other probabilities."""

    document: str
    task: str
    answers: tuple[str, str]  # the index of the choice, or the generated text
    right: tuple[int | None, int | None]
    moved: float | None  # share of the choices' probability that moved to others; None without choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerChanges:
    """Answers of two cells to the same items, whether right or wrong."""

    items: int
    changed: int  # answers that differ, from wrong to another wrong included
    largest: tuple[ItemChange, ...]


def answer_changes(store: Readable, first: Key, second: Key) -> AnswerChanges | None:
    """How answers changed; None where the ledgers hold no answers to items that both cells were asked."""
    ours, theirs = _answers(store, first), _answers(store, second)
    found = [_item_change(ours[key], theirs[key]) for key in sorted({*ours} & {*theirs})]
    if not found:
        return None
    differing = [one for one in found if one.answers[0] != one.answers[1]]
    differing.sort(key=lambda one: (one.right[0] == one.right[1], -(one.moved or 0.0)))
    return AnswerChanges(items=len(found), changed=len(differing), largest=tuple(differing[:LARGEST]))


def _answers(store: Readable, key: Key) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Rows of the ledger that hold an answer, by task and item."""
    cell_id, eval_id = key
    columns = ["eval_id", "document", "task", "answer", "correct", "choices"]
    table = store.read("documents", columns=columns, cell_ids=[cell_id])
    table = table.filter(pc.and_(pc.equal(table["eval_id"], eval_id), pc.is_valid(table["answer"])))
    return {(row["task"] or "", row["document"]): row for row in table.to_pylist()}


def _item_change(one: Mapping[str, Any], two: Mapping[str, Any]) -> ItemChange:
    moved = None
    if one["choices"] and two["choices"] and len(one["choices"]) == len(two["choices"]):
        before, after = (special.softmax(row["choices"]) for row in (one, two))
        moved = float(np.abs(before - after).sum() / 2)
    return ItemChange(
        document=one["document"],
        task=one["task"] or "",
        answers=(one["answer"], two["answer"]),
        right=(one["correct"], two["correct"]),
        moved=moved,
    )


def document_changes(pieces: Pieces, target: Target) -> tuple[tuple[DocumentChange, ...], Difference | None]:
    """The documents with the largest changes of loss, and the difference without the first if it carries too much."""
    if target.measure != "perplexity":
        return (), None
    names, index = np.unique(np.asarray(pieces.words("cluster")), return_inverse=True)
    change = np.bincount(index, pieces.numbers("value") - pieces.numbers("value_other"))
    count, tokens, total = np.bincount(index), np.bincount(index, pieces.numbers("tokens")), np.abs(change).sum()
    order = np.argsort(-np.abs(change), kind="stable")[:LARGEST]
    windows = pieces.numbers("window")
    largest = tuple(
        DocumentChange(
            document=str(names[i]),
            windows=_ranges(sorted({int(window) for window in windows[index == i]})),
            pieces=int(count[i]),
            tokens=int(tokens[i]),
            change=float(change[i]),
            share=float(change[i] / total),
        )
        for i in order
        if change[i]
    )
    if not largest or abs(largest[0].share) <= HALF or len(names) < 2:
        return largest, None
    kept = np.flatnonzero(index != order[0])
    assert pieces.table is not None
    return largest, difference_of(dataclasses.replace(pieces, table=pieces.table.take(kept)), target)


def _ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 8] as '3-5, 8'; -1 stands for no window."""
    runs: list[list[int]] = []
    for number in (one for one in numbers if one >= 0):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def task_changes(pieces: Pieces, target: Target) -> tuple[TaskChange, ...]:
    if target.measure != "accuracy" or pieces.tasks() is None:
        return ()
    of_item, first, second = item_by_item(pieces)
    names = np.asarray(pieces.words("task"))[of_item]
    clusters = pieces.numbers("cluster_number")[of_item]
    found = []
    for name in np.unique(names):
        here = names == name
        one = accuracy_difference(first[here], second[here], clusters[here])
        found.append(
            TaskChange(task=str(name), n=one.n, change=one.delta, lost=one.lost, gained=one.gained, difference=one)
        )
    return tuple(found)
