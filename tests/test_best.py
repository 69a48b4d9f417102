"""The cell that `--best` picks, and what is not shown worse."""

from __future__ import annotations

import pytest

from qfarm.errors import InvalidInput
from qfarm.report.best import best
from qfarm.report.tables import load
from tests.report_example import MODEL, Planted


def planted() -> Planted:
    """3.25 bits, clearly worst; 4.25 bits twice, not told apart; 5.25 bits, clearly best."""
    found = Planted()
    found.cell("33", "rtn", 0.30 + found.noise(0.02), scheme="w3", linear_bits=3.25)
    found.cell("41", "rtn", 0.101 + found.noise(0.02), scheme="w4", linear_bits=4.25)
    found.cell("42", "awq", 0.100 + found.noise(0.02), scheme="w4", linear_bits=4.25)
    found.cell("55", "rtn", 0.01 + found.noise(0.02), scheme="w5", linear_bits=5.25)
    return found


def test_the_smallest_loss_within_the_budget_wins_and_ties_are_named() -> None:
    results = load(planted().store)
    pick = best(results, MODEL, 4.25)
    assert pick.cell_id == "42" * 8 and pick.ranked
    assert pick.tied == ("rtn w4 g64 (4.250 bits)",)
    assert best(results, "*135M", 8.0).cell_id == "55" * 8 and best(results, MODEL, 8.0).tied == ()
    assert best(results, MODEL, 3.25).cell_id == "33" * 8


def test_cells_are_judged_within_the_budget_only() -> None:
    """A cell above the budget must not make those within it all 'shown worse'."""
    results = load(planted().store)
    (table,) = results.tables
    assert [row.cell.cell_id[:2] for row in table.rows if row.best] == ["55"]
    assert len(best(results, MODEL, 4.25).tied) == 1


def test_seeds_are_ranked_by_their_mean_and_the_first_is_taken() -> None:
    found = Planted()
    found.replicates("gptq", 0.05, 0.03, start=10, linear_bits=4.25)
    found.cell("99", "rtn", 0.04 + found.noise(0.02), linear_bits=4.25)
    # One seed (0.02) is better than RTN (0.04), the mean of the three (0.05) is not.
    assert best(load(found.store), MODEL, 4.25).cell_id == "99" * 8
    found.replicates("awq", 0.01, 0.005, start=20, linear_bits=4.25)
    pick = best(load(found.store), MODEL, 4.25)
    assert pick.cell_id == "20" * 8 and "awq" in pick.label


def test_what_cannot_be_picked() -> None:
    found = planted()
    results = load(found.store)
    with pytest.raises(InvalidInput, match="no cell was measured whole within 3 stored bits; the smallest has 3.250"):
        best(results, MODEL, 3.0)
    with pytest.raises(InvalidInput, match="no such model in this store; it has: example/Tiny-135M"):
        best(results, "other", 8.0)
    other = next(row for row in found.store.rows["cells"] if row.cell_id == "33" * 8)
    for cell in (found.baseline, other):
        found.store.add(cell, found.base, found.tokens, eval_id="c" * 16, label="perplexity c4 2048")
    results = load(found.store)
    with pytest.raises(
        InvalidInput, match='several tables could decide: name one by --model and --by; .*"perplexity c4'
    ):
        best(results, MODEL, 8.0)
    assert best(results, MODEL, 8.0, "perplexity c4 2048").cell_id == "33" * 8
    assert best(results, MODEL, 8.0, "cccc").cell_id == "33" * 8
    with pytest.raises(InvalidInput, match='no evaluation "ppl"'):
        best(results, MODEL, 8.0, "ppl")
