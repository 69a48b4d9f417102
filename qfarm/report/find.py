"""Find: the one cell that a person means, by the beginning of its id or by its label."""

from __future__ import annotations

from qfarm.errors import InvalidInput, did_you_mean
from qfarm.record import CellRow
from qfarm.report.figures import plain
from qfarm.report.pairs import Readable
from qfarm.report.rows import label, records

CANDIDATES_SHOWN = 10


def find(store: Readable, text: str) -> str:
    """The id of the cell whose id starts with `text` or whose label is `text`, such as 'gptq w4 g64' or 'baseline'.

    Cells that never finished are found by their id. Raises InvalidInput, one line with candidates, when none or several
    are.
    """
    cells = {cell.cell_id: cell for cell in records(store, "cells", CellRow)}
    tried = store.read("attempts", columns=["cell_id"]).column("cell_id").to_pylist()
    known: list[str] = sorted({*cells, *tried})
    found = [cell_id for cell_id in known if cell_id.startswith(text)]
    found = found or [cell_id for cell_id, cell in sorted(cells.items()) if text in _labels(cell)]
    if len(found) == 1:
        return found[0]
    candidates = found or known
    listed = [plain(f"{one} ({_name(cells.get(one))})") for one in candidates[:CANDIDATES_SHOWN]]
    more = len(candidates) - len(listed)
    listed += [f"and {more} more"] if more > 0 else []
    nearest = did_you_mean(text, [label(cell) for cell in cells.values()])
    problem = f"names {len(found)} cells;" if found else f"names no cell of this store{nearest}"
    raise InvalidInput(plain(f'"{text}" {problem} cells: {", ".join(listed) or "none"}'))


def _labels(cell: CellRow) -> tuple[str, ...]:
    return (label(cell), cell.recipe) if cell.recipe == "baseline" else (label(cell),)


def _name(cell: CellRow | None) -> str:
    return f"{label(cell)} of {cell.model}" if cell else "never finished"
