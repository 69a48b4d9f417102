"""Compare: two cells of a store, evaluation by evaluation, on the documents that both were measured on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qfarm.errors import InvalidInput
from qfarm.margin import Margin, parse_margin
from qfarm.record import CellRow, MetricRow
from qfarm.report.changes import (
    AnswerChanges,
    DocumentChange,
    TaskChange,
    answer_changes,
    document_changes,
    task_changes,
)
from qfarm.report.find import find
from qfarm.report.floors import NOT_KNOWN, Baseline, NumericFloor, numeric_floors
from qfarm.report.pairs import NO_MEAN, Pairing, Readable, Target, pair_with_baselines, pairing_of, shared_pieces
from qfarm.report.protocols import by_machine, differing_keys
from qfarm.report.rows import Attempt, parsed, records
from qfarm.report.seeds import without_seed
from qfarm.report.tables import target_of
from qfarm.stats import (
    ALPHA,
    AccuracyDifference,
    Difference,
    SeedsMean,
    Verdict,
    pooled_seed_variance,
    rows_of_seeds,
    seeds_interval,
    verdict,
)

_THERE = "the other cell"
_BY_TASK = "no mean over these tasks is stored, so they have no common difference; each has its own below"
_UNPAIRED = "each cell on its own: this evaluation has no losses or right and wrong answers to pair"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairResult:
    """Two cells under one evaluation."""

    evaluation: str
    eval_id: str
    protocol: Mapping[str, Any]
    metrics: Mapping[str, tuple[MetricRow, MetricRow]]
    difference: Difference | None
    remark: str
    margin: Margin | None
    verdict: Verdict | None
    within_margin: bool | None
    non_inferior_p: float | None  # one-sided, against a loss of the margin or more
    numeric: NumericFloor
    seed_floor: float | None  # 2 sigma of the difference between one-seed cells, from alike cells; None: not known
    below_floor: bool  # a difference within noise gets no direction
    documents: tuple[DocumentChange, ...]  # the largest changes
    without_largest: Difference | None  # where one document carries more than half of all change
    tasks: tuple[TaskChange, ...]
    answers: AnswerChanges | None  # of items
    seeds: SeedsMean | None  # over the seeds that both have
    one_seed: bool  # a seed was drawn, and its noise is not in the interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the first cell differs from the second."""

    first: CellRow
    second: CellRow
    results: tuple[PairResult, ...]
    refused: tuple[tuple[str, str], ...]  # evaluation, and the protocol keys that differ or what is missing
    provenance: tuple[str, ...]  # "host a against b"


def compare(store: Readable, first: str, second: str, margins: Mapping[str, Margin] | None = None) -> Comparison:
    """Compare two cells, each given by the beginning of its id or by its label.

    Raises InvalidInput when a text names no cell or several, the same cell twice, or a cell without results.
    """
    ids = [find(store, text) for text in (first, second)]
    if ids[0] == ids[1]:
        raise InvalidInput(f'"{first}" and "{second}" are the same cell, {ids[0]}')
    cells = {cell.cell_id: cell for cell in records(store, "cells", CellRow)}
    missing = [text for text, cell_id in zip((first, second), ids, strict=True) if cell_id not in cells]
    if missing:
        raise InvalidInput(f'"{missing[0]}" never finished: there is nothing to compare (`qfarm show` tells why)')
    context = _Context(store, cells, margins or {})
    one, two = (context.evaluations(cell_id) for cell_id in ids)
    shared = sorted(set(one) & set(two), key=lambda eval_id: (next(iter(one[eval_id])).evaluation, eval_id))
    results = tuple(_result(context, ids[0], ids[1], one[eval_id], two[eval_id]) for eval_id in shared)
    return Comparison(
        first=cells[ids[0]],
        second=cells[ids[1]],
        results=results,
        refused=tuple(_refused(one, two)),
        provenance=tuple(_provenance(context, one, two)),
    )


class _Context:
    """What the store holds of the cells that a comparison looks at."""

    def __init__(self, store: Readable, cells: Mapping[str, CellRow], margins: Mapping[str, Margin]) -> None:
        self.store, self.cells, self.given = store, cells, margins
        self._metrics: dict[str, list[MetricRow]] = {}

    def evaluations(self, cell_id: str) -> dict[str, list[MetricRow]]:
        """Metrics of a cell by eval_id."""
        if cell_id not in self._metrics:
            self._metrics[cell_id] = records(self.store, "metrics", MetricRow, [cell_id])
        found: dict[str, list[MetricRow]] = {}
        for metric in map(by_machine, self._metrics[cell_id]):
            found.setdefault(metric.eval_id, []).append(metric)
        return found

    def provenance(self, metrics: Iterable[MetricRow]) -> dict[str, Any]:
        """Of the attempt that published the metrics."""
        metric = next(iter(metrics))
        attempts = records(self.store, "attempts", Attempt, [metric.cell_id])
        found = {attempt.attempt_id: attempt.provenance for attempt in attempts}
        return dict(parsed(found.get(metric.attempt_id), {}))

    def margin(self, target: Target, sides: Iterable[Sequence[MetricRow]]) -> Margin | None:
        """The one given now, else the narrowest that the cells' jobs gave."""
        if target.measure in self.given:
            return self.given[target.measure]
        stored = [(self.provenance(metrics).get("margin") or {}).get(target.measure) for metrics in sides]
        found = [parse_margin(target.measure, text) for text in stored if text]
        return min(found, key=lambda margin: margin.amount, default=None)

    def seed_floor(self, first: str, second: str, eval_id: str) -> float | None:
        """2 sigma of the difference of two cells from their seeds alone, as pooled over alike cells by the report.

        None where neither has a seed, or no cells of its recipe and scheme were measured with several.
        """
        drawn = [cell for cell in (self.cells[first], self.cells[second]) if cell.seed is not None]
        pools = {(cell.recipe, cell.scheme) for cell in drawn}
        alike = [
            cell
            for cell in self.cells.values()
            if cell.fingerprint == self.cells[second].fingerprint
            and (cell.recipe == "baseline" or cell.seed is not None and (cell.recipe, cell.scheme) in pools)
            and eval_id in self.evaluations(cell.cell_id)
        ]
        baseline = min((cell.cell_id for cell in alike if cell.recipe == "baseline"), default=None)
        wanted = {cell.cell_id: cell for cell in alike if cell.recipe != "baseline"}
        if baseline is None or not wanted:
            return None
        target = target_of(self.evaluations(baseline)[eval_id], baseline)
        paired = pair_with_baselines(self.store, {eval_id: baseline}, wanted, {eval_id: target})
        groups: dict[tuple[str, str], dict[str, list[float]]] = {}
        for cell_id, cell in wanted.items():
            pairing = paired.get((cell_id, eval_id), Pairing())
            stopped = any(metric.stopped_early is not None for metric in self.evaluations(cell_id)[eval_id])
            if pairing.difference and pairing.complete and not stopped:
                group = groups.setdefault((cell.recipe, cell.scheme), {})
                group.setdefault(without_seed(cell), []).append(pairing.difference.delta)
        known = {pool: pooled_seed_variance(found.values()) for pool, found in groups.items()}
        variances = [found.variance for cell in drawn if (found := known.get((cell.recipe, cell.scheme)))]
        return 2 * math.sqrt(sum(variances)) if variances else None

    def numeric(self, fingerprint: str, eval_id: str) -> NumericFloor:
        baselines = [
            Baseline(
                fingerprint=fingerprint,
                eval_id=one,
                cell_id=cell.cell_id,
                protocol=parsed(metrics[0].protocol, {}),
                target=target_of(metrics, cell.cell_id),
            )
            for cell in sorted(self.cells.values(), key=lambda cell: cell.cell_id)
            if cell.fingerprint == fingerprint and cell.recipe == "baseline"
            for one, metrics in sorted(self.evaluations(cell.cell_id).items())
        ]
        unknown = NumericFloor(amount=None, source=NOT_KNOWN)
        return numeric_floors(self.store, baselines).get((fingerprint, eval_id), unknown)


def _result(
    context: _Context, first: str, second: str, ours: Sequence[MetricRow], theirs: Sequence[MetricRow]
) -> PairResult:
    eval_id, target = ours[0].eval_id, target_of(theirs, second)
    pieces = shared_pieces(context.store, (first, eval_id), (second, eval_id), target)
    pairing = pairing_of(pieces, target, _THERE) if pieces else Pairing(remark=_UNPAIRED)
    stopped = [metric.stopped_early for metric in (*ours, *theirs) if metric.stopped_early is not None]
    if stopped:
        pairing = _of_prefix(pairing, min(stopped))
    difference, margin = pairing.difference, context.margin(target, (ours, theirs))
    numeric = context.numeric(context.cells[second].fingerprint, eval_id)
    seeds = _over_seeds(context, first, second, eval_id, target) if difference and not stopped else None
    # Shared seeds bring their noise into the error; without them it is a floor.
    seed_floor = context.seed_floor(first, second, eval_id) if difference and seeds is None else None
    judged = _with_seeds(difference, seeds) if difference and seeds else difference
    floor = max(numeric.amount or 0.0, seed_floor or 0.0)
    below_floor = judged is not None and not judged.identical and abs(judged.delta) < floor
    margin_p = judged.equivalence_p(margin.amount) if judged and margin else None
    documents, without = document_changes(pieces, target) if difference and pieces else ((), None)
    by_name = ({metric.metric: metric for metric in side} for side in (ours, theirs))
    one, two = by_name
    return PairResult(
        evaluation=ours[0].evaluation,
        eval_id=eval_id,
        protocol=parsed(ours[0].protocol, {}),
        metrics={name: (one[name], two[name]) for name in one if name in two},
        difference=difference,
        remark=_BY_TASK if pairing.remark == NO_MEAN else pairing.remark,
        margin=margin,
        verdict=_verdict(judged, below_floor, margin_p) if judged else None,
        within_margin=None if margin_p is None else margin_p < ALPHA,
        non_inferior_p=judged.non_inferior_p(margin.amount) if judged and margin else None,
        numeric=numeric,
        seed_floor=seed_floor,
        below_floor=below_floor,
        documents=documents,
        without_largest=without,
        tasks=task_changes(pieces, target) if pieces and (difference or pairing.by_task) else (),
        answers=answer_changes(context.store, (first, eval_id), (second, eval_id))
        if difference or pairing.by_task
        else None,
        seeds=seeds,
        one_seed=seeds is None and any(context.cells[cell].seed is not None for cell in (first, second)),
    )


def _verdict(difference: Difference, below_floor: bool, margin_p: float | None) -> Verdict | None:
    return verdict(difference, 1.0 if below_floor and difference.p is not None else difference.p, margin_p)


def _with_seeds(difference: Difference, seeds: SeedsMean) -> Difference:
    """What is judged where seeds are shared: the mean over them, with an error for other seeds and documents."""
    if difference.identical:
        return difference
    _, low, high = seeds.interval()
    tested = None if difference.p is None else seeds.p
    if isinstance(difference, AccuracyDifference):
        difference = dataclasses.replace(difference, centre=seeds.value, centre_error=seeds.error)
    return dataclasses.replace(
        difference, delta=seeds.value, standard_error=seeds.error, df=seeds.df, low=low, high=high, p=tested
    )


def _of_prefix(pairing: Pairing, seen: int) -> Pairing:
    """Of a cell that the hopeless stop ended: what both saw, without an error, since the stop chose the moment."""
    if pairing.difference is None:
        return pairing
    untested = dataclasses.replace(pairing.difference, standard_error=None, low=None, high=None, p=None)
    return Pairing(difference=untested, remark=f"stopped early: on the {seen:,} windows that were measured; no test")


# -- seeds ------------------------------------------------------------------------------------------------------------


def _over_seeds(context: _Context, first: str, second: str, eval_id: str, target: Target) -> SeedsMean | None:
    """Over the calibration samples that both have, paired by their seed; a cell without a seed is the same for all."""
    if without_seed(context.cells[first]) == without_seed(context.cells[second]):
        return None  # two seeds of one cell: what differs is the noise
    found = []
    for one, two in _seed_pairs(context, first, second, eval_id):
        pieces = shared_pieces(context.store, (one, eval_id), (two, eval_id), target)
        if pieces is None or not len(pieces) == pieces.of_first == pieces.of_second:
            continue
        difference = pairing_of(pieces, target).difference
        if difference is not None and difference.influence is not None:
            found.append(difference)
    sizes = {one.clusters for one in found}
    if len(found) < 2 or len(sizes) > 1:
        return None
    parts = [one.influence for one in found if one.influence is not None]
    return seeds_interval(rows_of_seeds([one.delta for one in found], parts))


def _seed_pairs(context: _Context, first: str, second: str, eval_id: str) -> list[tuple[str, str]]:
    def by_seed(cell_id: str) -> dict[int | None, str]:
        kind = without_seed(context.cells[cell_id])
        alike = (cell for cell in context.cells.values() if cell.fingerprint == context.cells[cell_id].fingerprint)
        return {
            cell.seed: cell.cell_id
            for cell in sorted(alike, key=lambda cell: cell.cell_id, reverse=True)
            if without_seed(cell) == kind and eval_id in context.evaluations(cell.cell_id)
        }

    one, two = by_seed(first), by_seed(second)
    seeds = sorted(seed for seed in {*one, *two} if seed is not None)
    pairs = [(one.get(seed, one.get(None)), two.get(seed, two.get(None))) for seed in seeds]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


# -- what cannot be compared ------------------------------------------------------------------------------------------


def _refused(
    one: Mapping[str, Sequence[MetricRow]], two: Mapping[str, Sequence[MetricRow]]
) -> Iterable[tuple[str, str]]:
    """Evaluations that only one cell has, with the protocol keys in which the other's nearest differs."""
    alone = [eval_id for eval_id in one if eval_id not in two]
    others = [eval_id for eval_id in two if eval_id not in one]
    for eval_id in sorted(alone, key=lambda eval_id: (one[eval_id][0].evaluation, eval_id)):
        metric = one[eval_id][0]
        protocol = parsed(metric.protocol, {})
        alike = {
            other: differing_keys(protocol, parsed(two[other][0].protocol, {}))
            for other in others
            if parsed(two[other][0].protocol, {}).get("evaluator") == protocol.get("evaluator")
        }
        if alike:
            nearest = min(alike, key=lambda other: (len(alike[other]), other))
            yield metric.evaluation, "; ".join(alike[nearest]) or "protocols that were not stored"
            others.remove(nearest)
        else:
            yield metric.evaluation, "only the first cell has it"
    for eval_id in sorted(others, key=lambda eval_id: (two[eval_id][0].evaluation, eval_id)):
        yield two[eval_id][0].evaluation, "only the second cell has it"


def _provenance(
    context: _Context, one: Mapping[str, Sequence[MetricRow]], two: Mapping[str, Sequence[MetricRow]]
) -> list[str]:
    """What differs between the attempts that measured the two; how they were started says nothing."""
    shared = sorted(set(one) & set(two))
    if not shared:
        return []
    first, second = (context.provenance(side[shared[0]]) for side in (one, two))
    for name in ("command", "margin"):
        first.pop(name, None)
        second.pop(name, None)
    return differing_keys(first, second)
