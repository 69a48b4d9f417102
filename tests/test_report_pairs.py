"""Pairing cells with their baselines, batch by batch."""

from __future__ import annotations

import pytest

from qfarm.report import pairs
from qfarm.report.tables import load
from tests.report_example import Planted


@pytest.mark.parametrize(("rows", "sizes"), [(250, [1, 2, 4, 5, 5, 5]), (10_000, [1, 2, 4, 8, 7])])
def test_a_batch_holds_so_many_rows_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, sizes: list[int]):
    planted = Planted(windows=50)
    for number in range(22):
        planted.cell(f"{number + 1:02}", "rtn", planted.noise(0.01), scheme=f"w{number}")
    [expected] = load(planted.store).tables
    asked: list[int] = []
    read = planted.store.read

    def reads(table, **limits):
        if table == "documents":
            asked.append(len(limits["cell_ids"]))
        return read(table, **limits)

    monkeypatch.setattr(planted.store, "read", reads)
    monkeypatch.setattr(pairs, "BATCH", 1)
    monkeypatch.setattr(pairs, "BATCH_ROWS", rows)
    [table] = load(planted.store).tables
    assert table == expected and len(table.rows) == 23
    assert asked == [1, *sizes]  # first the baseline's own
