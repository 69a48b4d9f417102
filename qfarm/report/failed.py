"""Failed: the cells of a store that still lack what they were to measure."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Set

from qfarm.record import CellRow
from qfarm.report.figures import plain
from qfarm.report.pairs import Key
from qfarm.report.rows import Attempt, FailedCell, label, parsed


def failed_cells(cells: Mapping[str, CellRow], attempts: Iterable[Attempt], finished: Set[Key]) -> list[FailedCell]:
    """`finished` holds (cell_id, eval_id): what another attempt has measured is not missing."""
    measured = {cell_id for cell_id, _ in finished}
    tries: dict[str, list[Attempt]] = collections.defaultdict(list)
    for attempt in attempts:
        tries[attempt.cell_id].append(attempt)
    failed = []
    for cell_id, group in tries.items():
        last = max(group, key=lambda attempt: (attempt.started, attempt.number))
        wanted = parsed(last.evaluations, [])
        missing = (
            any((cell_id, str(eval_id)) not in finished for eval_id in wanted) if wanted else cell_id not in measured
        )
        if last.outcome == "ok" or not missing:
            continue
        cell = cells.get(cell_id)
        failed.append(
            FailedCell(
                cell_id=cell_id,
                model=cell.model if cell else last.model,
                label=label(cell) if cell else last.label,
                kind=last.outcome,
                stage=last.stage,
                error=plain(last.error or ""),
                attempts=len(group),
            )
        )
    return sorted(failed, key=lambda cell: (cell.kind, cell.model, cell.label, cell.cell_id))
