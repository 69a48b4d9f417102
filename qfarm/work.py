"""Work: the cells of a plan that are still open, as the driver takes them."""

from __future__ import annotations

from qfarm.board import CellWork
from qfarm.evaluate import build_evaluator
from qfarm.matrix import find_cell
from qfarm.plan import Plan, shares, statistics_key


def open_work(plan: Plan, only: str | None = None) -> list[CellWork]:
    """What the store lacks, in the plan's order; `only` names one cell by id or label. Raises InvalidInput."""
    chosen = find_cell(tuple(p.cell for p in plan.cells), only).cell_id if only else None
    open_cells = [p for p in plan.cells if not p.done and chosen in (None, p.cell.cell_id)]
    baselines = {p.cell.fingerprint for p in open_cells if p.cell.is_baseline}
    share = shares(p.cell for p in open_cells)
    work = []
    for planned in open_cells:
        compares = any(build_evaluator(spec.name, spec.options).needs_baseline for spec in planned.missing)
        work.append(
            CellWork(
                cell=planned.cell,
                evaluations=planned.missing,
                needs_baseline=compares and not planned.cell.is_baseline and planned.cell.fingerprint in baselines,
                estimate_s=planned.estimate.seconds,
                estimate_from=planned.estimate.source,
                share=share.get(planned.cell.cell_id, ()),
                shared=statistics_key(planned.cell) if planned.cell.cell_id in share else "",
                gpus=planned.gpus,
                margin={measure: margin.text for measure, margin in plan.job.margins.items()},
            )
        )
    return work
