"""Diff of two stores: what is paired, which changes are significant, and what is said of everything else."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from qfarm.report.diff import diff
from qfarm.report.diff_text import diff_json, render_diff
from tests.report_example import HOSTILE, FakeStore, Planted, attempt_row, cell_row

GPTQ, RTN, AWQ = ("11" * 8, "22" * 8, "33" * 8)


def planted(windows: int = 141) -> Planted:
    made = Planted(windows=windows)
    made.cell("11", "gptq", made.noise(0.01) + 0.02)
    made.cell("22", "rtn", made.noise(0.01) + 0.3)
    made.cell("33", "awq", made.noise(0.01) + 0.05)
    return made


def moved(store: FakeStore, cell_id: str, nats: float) -> FakeStore:
    """The same store with another loss per token of one cell."""
    other = FakeStore()
    other.rows = copy.copy(store.rows)
    other.rows["documents"] = [
        dataclasses.replace(row, loss=row.loss + nats * row.tokens * (1 + 0.2 * (row.window % 3 - 1)))
        if row.cell_id == cell_id
        else row
        for row in store.rows["documents"]
    ]
    other.rows["metrics"] = [
        dataclasses.replace(row, value=row.value * (1 + nats)) if row.cell_id == cell_id else row
        for row in store.rows["metrics"]
    ]
    return other


def outcomes(found) -> dict[str, str]:
    return {change.cell.recipe: change.outcome for change in found.changes}


def test_a_store_is_equal_to_itself() -> None:
    store = planted().store
    found = diff(store, store)
    assert set(outcomes(found).values()) == {"identical"} and len(found.changes) == 4
    assert found.only == ((), ()) and found.provenance == () and found.significant == []


def test_a_planted_change_is_found_with_its_size_and_sign() -> None:
    store = planted().store
    found = diff(store, moved(store, AWQ, 0.01))
    assert outcomes(found) == {"awq": "significant", "baseline": "identical", "gptq": "identical", "rtn": "identical"}
    (change,) = found.significant
    assert change.difference.delta == pytest.approx(0.01, rel=0.05) and change.metrics == ("perplexity",)
    (back,) = diff(moved(store, AWQ, 0.01), store).significant
    assert back.difference.delta == pytest.approx(-change.difference.delta)


def test_noise_is_counted_and_not_called_a_change() -> None:
    made = planted()
    other = FakeStore()
    other.rows = copy.copy(made.store.rows)
    shaken = iter(made.noise(0.001))
    other.rows["documents"] = [
        dataclasses.replace(row, loss=row.loss + next(shaken) * row.tokens) if row.cell_id == GPTQ else row
        for row in made.store.rows["documents"]
    ]
    found = diff(made.store, other)
    assert outcomes(found)["gptq"] == "not significant" and found.significant == []


def test_the_family_is_one_evaluation() -> None:
    """Three cells are tested: a p of 0.03 alone would do, Holm over three makes it 0.09."""
    store = planted().store
    other = store
    for cell_id, nats in ((GPTQ, 1e-5), (RTN, 1e-5), (AWQ, 0.01)):
        other = moved(other, cell_id, nats)
    found = {change.cell.recipe: change for change in diff(store, other).changes}
    assert found["awq"].adjusted_p == pytest.approx(min(1.0, 3 * found["awq"].difference.p))
    tested = sorted(found[name].difference.p for name in ("gptq", "rtn", "awq"))
    assert max(found[name].adjusted_p for name in ("gptq", "rtn", "awq")) >= tested[-1]


def test_too_few_documents_are_not_tested() -> None:
    store = planted(windows=30).store
    found = diff(store, moved(store, AWQ, 0.05))
    assert outcomes(found)["awq"] == "not tested" and found.significant == []


def test_another_version_of_a_method_is_paired_by_label() -> None:
    store = planted().store
    other = moved(store, AWQ, 0.01)
    spec = json.loads(next(cell.spec for cell in store.rows["cells"] if cell.cell_id == AWQ))
    spec["methods"][0]["version"] = 2
    new = "44" * 8
    for table in ("cells", "metrics", "documents"):
        other.rows[table] = [
            dataclasses.replace(row, cell_id=new, **({"spec": json.dumps(spec)} if table == "cells" else {}))
            if row.cell_id == AWQ
            else row
            for row in other.rows[table]
        ]
    found = diff(store, other)
    (change,) = found.significant
    assert (change.cell.cell_id, change.specification) == (new, ("methods.0.version 1 against 2",))
    assert found.only == ((), ())


def test_what_one_store_alone_holds_is_listed() -> None:
    store, other = planted().store, planted().store
    cell = cell_row("55" * 8, "hqq", "w4")
    other.rows["cells"].append(cell)
    other.add(cell, [1.0], [1])
    assert diff(store, other).only == ((), ("hqq w4 g64, perplexity wikitext2 2048",))
    assert diff(other, store).only == (("hqq w4 g64, perplexity wikitext2 2048",), ())


def test_provenance_that_differs_is_named_and_the_command_is_not() -> None:
    store, other = planted().store, planted().store
    made = {"commit": "abc", "gpu": "H100", "command": "qfarm submit b.yaml"}
    other.rows["attempts"] = [attempt_row(row.cell_id, provenance=json.dumps(made)) for row in other.rows["attempts"]]
    found = diff(store, other).provenance
    assert "gpu: nothing against H100" in found and "commit: nothing against abc" in found
    assert not [line for line in found if line.startswith("command")]


def test_text_and_json() -> None:
    store = planted().store
    store.rows["cells"] = [
        dataclasses.replace(cell, recipe=HOSTILE) if cell.cell_id == AWQ else cell for cell in store.rows["cells"]
    ]
    found = diff(store, moved(store, AWQ, 0.01))
    for width in (80, 200):
        text = render_diff(found, ("a", "b"), width)
        assert max(map(len, text.splitlines())) <= width and "\x1b" not in text
        assert "4 shared results: 3 identical, 1 significant" in text
    value = json.loads(diff_json(found))
    (change,) = [change for change in value["changes"] if change["outcome"] == "significant"]
    assert change["cell_id"] == AWQ and change["p_holm"] < 0.05 and change["log_ratio"] == pytest.approx(0.01, rel=0.05)
