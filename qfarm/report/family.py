"""Family: the rows of one table judged together. Marks, margins, the set of the best, the Pareto front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qfarm.errors import InvalidInput
from qfarm.margin import Margin
from qfarm.record import CellRow
from qfarm.report.floors import NumericFloor
from qfarm.report.rows import Front, Noise, Row, Table
from qfarm.report.seeds import Pool, pool_of, replicates, seed_groups, seed_noise, with_noise
from qfarm.scheme import UNTOUCHED, parse_scheme
from qfarm.stats import (
    MARK_CLUSTERS,
    TEST_CLUSTERS,
    AccuracyDifference,
    SeedVariance,
    benjamini_hochberg,
    dominated,
    holm,
    less_accurate_p,
    no_more_bits,
    tied_with_best,
    worse_p,
)


def judged(table: Table, margin: Margin | None, floor: NumericFloor) -> Table:
    """The table with its rows judged: each against the baseline, and all against each other."""
    numeric = floor.amount
    rows = [dataclasses.replace(row, noise_floor=numeric or 0.0) for row in table.rows]
    groups = seed_groups(rows)
    noise = seed_noise(groups)
    alone = {group[0].cell.cell_id for group in groups if len(group) == 1}
    rows = [with_noise(row, row.cell.cell_id in alone, noise) for row in rows]
    rows = _adjusted(rows, margin)
    rows = _ranked(rows, noise, numeric or 0.0)
    compared = [row for row in rows if row.difference is not None]
    return dataclasses.replace(
        table,
        rows=tuple(rows),
        margin=margin,
        replicates=replicates(seed_groups(rows)),
        noise=Noise(seeds=noise, numeric=numeric, numeric_source=floor.source, numeric_flips=floor.flips),
        tested=tuple(row.difference.p for row in compared if row.difference and row.difference.p is not None),
        family=sum(row.adjusted_p is not None for row in rows),
        left_out=sum(row.best is None for row in compared),
    )


def _adjusted(rows: Sequence[Row], margin: Margin | None) -> list[Row]:
    """Rows with their p values adjusted; the family is the table."""

    def test(row: Row) -> float | None:
        found = row.difference
        return found.p if found and found.clusters >= MARK_CLUSTERS else None

    def equivalence(row: Row) -> float | None:
        return row.difference.equivalence_p(margin.amount) if margin and row.difference and test(row) else None

    def harmless(row: Row) -> float | None:
        return row.difference.non_inferior_p(margin.amount) if margin and row.difference and test(row) else None

    adjusted = _over_family(rows, test, holm)
    screened = _over_family(rows, test, benjamini_hochberg)
    within = _over_family(rows, equivalence, holm)
    safe = _over_family(rows, harmless, holm)
    return [
        dataclasses.replace(
            row, adjusted_p=adjusted[i], screened_p=screened[i], margin_p=within[i], non_inferior_p=safe[i]
        )
        for i, row in enumerate(rows)
    ]


def _over_family(
    rows: Sequence[Row],
    p_value: Callable[[Row], float | None],
    adjust: Callable[[list[float]], NDArray[np.float64]],
) -> list[float | None]:
    raw = [p_value(row) for row in rows]
    adjusted = iter(adjust([p for p in raw if p is not None]))
    return [None if p is None else float(next(adjusted)) for p in raw]


# -- all cells against each other -------------------------------------------------------------------------------------


def _ranked(rows: Sequence[Row], noise: Mapping[Pool, SeedVariance], numeric: float) -> list[Row]:
    """Rows with their place. What is ranked is a cell over its seeds; rows of other documents have no place."""
    units = [group for group in seed_groups(rows) if all(map(_can_be_ranked, group))]
    if len(units) < 2:
        return list(rows)
    value = np.array([np.mean([_harm(row) for row in group]) for group in units])
    p = _pairwise(units, value, noise, numeric)
    bits = _bits([group[0].cell for group in units])
    cheap = no_more_bits(bits)
    best, beaten = tied_with_best(p), dominated(p, bits)
    place: dict[str, tuple[bool, Front]] = {}
    for i, group in enumerate(units):
        leads = value[i] <= value[cheap[i]].min()
        front: Front = "dominated" if beaten[i] else "front" if leads else "undecided"
        place |= {row.cell.cell_id: (bool(best[i]), front) for row in group}
    return [
        dataclasses.replace(row, best=place[row.cell.cell_id][0], front=place[row.cell.cell_id][1])
        if row.cell.cell_id in place
        else row
        for row in rows
    ]


def _bits(cells: Sequence[CellRow]) -> NDArray[np.float64]:
    """[cell, respect]: stored bits per weight, widths of linear inputs, cache, queries, probabilities, bits of cache.

    The last as stored, where all quantized caches hold codes, and not when some are only simulated.
    """
    bits = np.array([(cell.linear_bits, *_widths(cell.scheme)) for cell in cells])
    stored = [UNTOUCHED if width == UNTOUCHED else cell.kv_bits for cell, width in zip(cells, bits[:, 2], strict=True)]
    return bits if None in stored else np.column_stack([bits, np.array(stored, np.float64)])


def _widths(text: str) -> tuple[float, ...]:
    try:
        scheme = parse_scheme(text)
    except InvalidInput:  # of a newer version
        return (math.nan,) * 4
    return (scheme.linear_in, scheme.kv_cache, scheme.q, scheme.probs)


def _can_be_ranked(row: Row) -> bool:
    found = row.difference
    return found is not None and row.complete and found.influence is not None and found.clusters >= TEST_CLUSTERS


def _pairwise(
    units: Sequence[tuple[Row, ...]], value: NDArray[np.float64], noise: Mapping[Pool, SeedVariance], numeric: float
) -> NDArray[np.float64]:
    """p [i, j]: unit i is worse than unit j; 1 where they differ by less than noise explains."""
    influence = np.stack([np.mean([_influence(row) for row in group], axis=0) for group in units], axis=1)
    df = [min(row.difference.df for row in group if row.difference) for group in units]
    known = [noise.get(pool_of(group[0])) if group[0].cell.seed is not None else None for group in units]
    sizes = [len(group) for group in units]
    extra = np.array([found.variance / size if found else 0.0 for found, size in zip(known, sizes, strict=True)])
    p = worse_p(value, influence, df, extra, [np.inf if found is None else found.df for found in known])
    p = np.maximum(p, _of_items(units))
    floor = np.maximum(numeric, 2 * np.sqrt(np.add.outer(extra, extra)))
    p[np.abs(np.subtract.outer(value, value)) < floor] = 1.0
    return p


def _of_items(units: Sequence[tuple[Row, ...]]) -> NDArray[np.float64]:
    """p [i, j] of right and wrong answers, which no pair's p may be below; 0 where they ask for nothing.

    A pair needs as many changed items as a difference to the baseline does, and the mid-p of independent items is that
    pair's own: the normal distribution of `worse_p` is too sure of few changes.
    """
    found = [[one for row in group if isinstance(one := row.difference, AccuracyDifference)] for group in units]
    if not all(found):
        return np.zeros((len(units), len(units)))
    p, testable = less_accurate_p([np.mean([one.changes for one in group], axis=0) for group in found])
    single = np.array([len(group) == 1 and math.isinf(group[0].df) for group in found])
    return np.where(np.logical_and.outer(single, single), p, np.where(testable, 0.0, 1.0))


def _harm(row: Row) -> float:
    assert row.difference is not None
    return row.difference.harm


def _influence(row: Row) -> NDArray[np.float64]:
    assert row.difference is not None and row.difference.influence is not None
    return row.difference.influence
