"""Seeds: rows that differ in nothing but the seed as replicates of one another, and the noise that they show."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from qfarm.record import CellRow
from qfarm.report.rows import Replicates, Row, parsed, units_used
from qfarm.stats import (
    SeedsMean,
    SeedVariance,
    pooled_seed_variance,
    rows_of_seeds,
    seeds_interval,
    with_seed_noise,
)

Pool = tuple[str, str]  # recipe and scheme


def seed_groups(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """All rows but the baseline, those that differ only in the seed together, in the order of the rows."""
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if not row.is_baseline:
            groups[without_seed(row.cell)].append(row)
    return [tuple(group) for group in groups.values()]


def replicates(groups: Sequence[tuple[Row, ...]]) -> tuple[Replicates, ...]:
    return tuple(_over_seeds(group) for group in groups if len(group) > 1)


def _over_seeds(group: tuple[Row, ...]) -> Replicates:
    """Means of seeds that measured the same; a seed that stopped early or lacks documents measured something else."""
    partial = [str(row.cell.seed) for row in group if not _whole(row, group)]
    if partial:
        remark = f"not averaged over seeds: stopped early or not on all documents with seed {', '.join(partial)}"
        return Replicates(rows=group, values={}, difference=None, remark=remark)
    return Replicates(rows=group, values=_means(group), difference=_crossed(group))


def seed_noise(groups: Sequence[tuple[Row, ...]]) -> dict[Pool, SeedVariance]:
    """Variance of the difference between seeds, pooled over the cells of one recipe and scheme."""
    pools: dict[Pool, list[list[float]]] = collections.defaultdict(list)
    for group in groups:
        if len(group) > 1 and _comparable(group):
            pools[pool_of(group[0])].append([row.difference.delta for row in group if row.difference])
    found = {pool: pooled_seed_variance(values) for pool, values in pools.items()}
    return {pool: variance for pool, variance in sorted(found.items()) if variance is not None}


def pool_of(row: Row) -> Pool:
    return row.cell.recipe, row.cell.scheme


def with_noise(row: Row, alone: bool, noise: Mapping[Pool, SeedVariance]) -> Row:
    """A row with the noise of its calibration sample, where it has one and several seeds tell how large it is.

    `alone`: no other row differs from it in the seed only.
    """
    known = noise.get(pool_of(row))
    if known is None or row.difference is None or row.cell.seed is None or row.is_baseline:
        return row
    floor = max(row.noise_floor, 2 * known.sigma)
    error = row.difference.standard_error
    interval = None
    if alone and error is not None:
        interval = with_seed_noise(row.difference.delta, error, row.difference.df, known)
    return dataclasses.replace(row, noise_floor=floor, with_seeds=interval)


def without_seed(cell: CellRow) -> str:
    """Everything about a cell but its seed and the names under which it was found."""
    spec = dict(parsed(cell.spec, {}))
    for name in ("seed", "model"):
        spec.pop(name, None)
    axes = (cell.recipe, cell.scheme, cell.group_size, cell.symmetric, cell.scale_dtype, cell.dtype, cell.statistics)
    return json.dumps([axes, spec, cell.seed is None], sort_keys=True)


def _comparable(group: Sequence[Row]) -> bool:
    """Every seed was measured on every document of the baseline."""
    return all(row.difference is not None and row.complete for row in group)


def _whole(row: Row, group: Sequence[Row]) -> bool:
    """All that was to be measured; where nothing is paired, as many units as any other seed."""
    if row.stopped is not None:
        return False
    if any(one.difference is not None for one in group):
        return row.difference is not None and row.complete
    return units_used(row.metrics) == max(units_used(one.metrics) for one in group)


def _crossed(group: Sequence[Row]) -> SeedsMean | None:
    if not _comparable(group):
        return None
    found = [row.difference for row in group if row.difference]
    parts = [one.influence for one in found if one.influence is not None]
    if len(parts) < len(found):
        return None
    return seeds_interval(rows_of_seeds([one.delta for one in found], parts))


def _means(group: Sequence[Row]) -> dict[str, float]:
    names = set.intersection(*(set(row.metrics) for row in group))
    return {name: float(np.mean([row.metrics[name].value for row in group])) for name in sorted(names)}
