"""The evaluation benchmark: operations by hand, and a cell whose parts are all met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qfarm import cli
from qfarm.bench import evaluation as bench
from qfarm.models.reference import resolve


def test_operations_by_hand(tiny: Path) -> None:
    """Two blocks of width 64: q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64; 256 tokens in the table."""
    facts = resolve(str(tiny))
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert facts.parameters[0] == linear
    found = bench.least_operations(facts, 96, 32)
    vocabulary = facts.config["vocab_size"]
    assert found["products"] == 2 * 96 * linear and found["head"] == 2 * 2 * 93 * vocabulary * 64
    # Three windows: in each block scores and outputs, 2 operations each for 64 numbers of 32 x 32 / 2 pairs.
    assert found["attention"] == 3 * 2 * 2 * 2 * 64 * 32 * 32 / 2


def test_every_part_of_a_cell_is_met(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear = torch.nn.Linear.forward
    words = ["bench", "evaluation", "--model", str(tiny), "--length", "32", "--windows", "3", "--dtype", "float32"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--format", "json"])
    report = json.loads(capsys.readouterr().out)
    assert not ended.value.code
    assert [part["name"] for part in report["parts"]] == list(bench.PARTS)
    assert all(part["seconds"] > 0 for part in report["parts"]) and report["tokens"] == 96
    assert torch.nn.Linear.forward is linear
    with pytest.raises(SystemExit):
        cli.main(words)
    out = capsys.readouterr().out
    words_of_it = " ".join(out.split())  # lines end where the terminal's do
    assert "96 tokens, float32" in words_of_it and "of the measured rate of matrix products" in words_of_it
    for name in bench.PARTS:
        assert f"\n{name} " in out
