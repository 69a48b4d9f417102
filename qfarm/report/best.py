"""Best: the cell that the report's rule picks for a model under a budget of stored bits.

The cells within the budget are judged against each other as the report's tables are. The one with the smallest loss
wins; those that are not shown worse are named beside it, for no test says that the winner is better than they are. Of
cells that differ in the seed only, the mean is ranked and the first seed taken: the best seed would be chosen by luck.
"""

from __future__ import annotations

import dataclasses
import fnmatch

import numpy as np

from qfarm.errors import InvalidInput
from qfarm.report.family import judged
from qfarm.report.figures import number, plain
from qfarm.report.floors import NumericFloor
from qfarm.report.rows import Results, Row, Table, label
from qfarm.report.seeds import seed_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pick:
    cell_id: str
    label: str
    linear_bits: float
    evaluation: str
    tied: tuple[str, ...]  # labels of cells within the budget that are not shown worse
    ranked: bool  # False: too few documents for any test, so that only the measured values decided


def best(results: Results, model: str, max_bits: float, evaluation: str | None = None) -> Pick:
    """The pick for the one table of `model` (* and ? match), or the one of `evaluation` where there are several.

    Raises InvalidInput when the table is not clear or holds nothing within the budget.
    """
    table = _table(results, model, evaluation)
    within = [
        row
        for row in table.rows
        if row.is_baseline or (row.cell.linear_bits <= max_bits and row.difference is not None and row.complete)
    ]
    floor = NumericFloor(amount=table.noise.numeric, source=table.noise.numeric_source, flips=table.noise.numeric_flips)
    found = judged(dataclasses.replace(table, rows=tuple(within)), table.margin, floor)
    groups = seed_groups(found.rows)
    if not groups:
        smallest = min((row.cell.linear_bits for row in table.rows if not row.is_baseline), default=None)
        least = f"; the smallest has {number(smallest, 'bits')}" if smallest else ""
        raise InvalidInput(f"{plain(table.model)}: no cell was measured whole within {max_bits:g} stored bits{least}")
    winner = min(groups, key=lambda group: (_loss(group), group[0].cell.linear_bits, group[0].cell.cell_id))
    first = winner[0]
    tied = [group[0] for group in groups if group is not winner and group[0].best]
    return Pick(
        cell_id=first.cell.cell_id,
        label=label(first.cell),
        linear_bits=first.cell.linear_bits,
        evaluation=table.evaluation,
        tied=tuple(f"{label(row.cell)} ({number(row.cell.linear_bits, 'bits')} bits)" for row in tied),
        ranked=len(groups) == 1 or first.best is not None,
    )


def _table(results: Results, model: str, evaluation: str | None) -> Table:
    of_model = [table for table in results.tables if fnmatch.fnmatchcase(table.model, model)]
    if not of_model:
        known = ", ".join(sorted({plain(table.model) for table in results.tables}))
        raise InvalidInput(f'--model "{plain(model)}": no such model in this store; it has: {known or "none"}')
    found = [one for one in of_model if evaluation in (None, one.evaluation) or one.eval_id.startswith(str(evaluation))]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f'"{plain(one.evaluation)}" ({one.eval_id}) of {plain(one.model)}' for one in of_model)
    problem = "several tables could decide" if found else f'no evaluation "{plain(evaluation)}"'
    raise InvalidInput(f"--best: {problem}: name one by --model and --by; there are: {listed}")


def _loss(group: tuple[Row, ...]) -> float:
    return float(np.mean([row.difference.harm for row in group if row.difference is not None]))
