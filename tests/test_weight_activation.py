"""Weight-activation quantization as a user compares it: many methods and mixed widths in one matrix, and sweeps."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm import cli
from qfarm.inputs import InputStatistics
from qfarm.layers.sites import Observed, Place
from qfarm.matrix import Cell
from qfarm.shared import KeptObservations, observed_bytes
from qfarm.worker import Session, quantize_cell
from tests.test_calibrate import weights
from tests.test_layers_worker import values
from tests.test_worker import Farm, make_job

JOB = """
models: [{model}]
methods: [rtn, smoothquant+gptq, gptq+qrazor, crossquant+gptq, zeroquant, zeroquant: {{lkd: true, lkd_steps: 2}}]
bits: [w8a8, w4a16, w16a8, w4/8a8kv4]
group_sizes: [16]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 4}}]
resources: {{gpus: 0}}
"""
ALPHAS = [round(0.35 + 0.05 * i, 2) for i in range(12)]
SWEEP = JOB.replace("[w8a8, w4a16, w16a8, w4/8a8kv4]", "[w8a8]").replace("[16]", "[-1]")
ENTRIES = ", ".join(f"smoothquant: {{{{alpha: {alpha}}}}}" for alpha in ALPHAS)
SWEEP = SWEEP.replace(JOB.splitlines()[2], f"methods: [{ENTRIES}]")

# -- one matrix -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Farm:
    """The matrix as `qfarm submit JOB --local` runs it, in this process, which ends with exit code 0."""
    folder = tmp_path_factory.mktemp("matrix")
    path = folder / "job.yaml"
    path.write_text(f"{JOB.format(model=tiny)}store: {folder / 'store'}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QFARM_CACHE", str(folder / "cache"))
        # What the command line sets for its own process must not outlive the test.
        for name in ("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY"):
            patch.setenv(name, os.environ.get(name, ""))
        with pytest.raises(SystemExit) as done:
            cli.main(["submit", str(path), "--local"])
    assert done.value.code == 0
    return Farm(folder / "store", make_job(tiny, JOB))


def test_every_cell_that_can_run_does_and_the_others_say_why(farm: Farm) -> None:
    plan = farm.plan()
    assert all(planned.done for planned in plan.cells)
    assert len(plan.cells) == 1 + 6 * 4 - len(plan.invalid) - 1  # zeroquant is listed once for both its entries
    rules = {invalid.label: invalid.rule for invalid in plan.invalid}
    assert rules == {
        "crossquant+gptq w4 g16": "crossquant+gptq quantizes linear_in, which w4 leaves at 16 bits",
        "smoothquant+gptq a8 g16": "smoothquant+gptq quantizes weight, which a8 leaves at 16 bits",
        "crossquant+gptq a8 g16": "crossquant+gptq quantizes weight, which a8 leaves at 16 bits",
        "gptq+qrazor a8 g16": "gptq+qrazor quantizes weight, which a8 leaves at 16 bits",
        "zeroquant a8 g16": "zeroquant quantizes weight, which a8 leaves at 16 bits",
    }
    kl = values(farm, "kl")
    for recipe in ("rtn", "smoothquant+gptq", "gptq+qrazor", "crossquant+gptq", "zeroquant"):
        assert 0 < 10 * kl[recipe, "w8a8"] < kl[recipe, "w4/8a8kv4"], recipe


def test_effective_bits_are_those_of_what_is_stored(farm: Farm) -> None:
    rows = {(row["recipe"], row["scheme"]): row for row in farm.table("cells")}
    for (recipe, scheme), row in rows.items():
        layers = [layer for layer in farm.table("layers") if layer["cell_id"] == row["cell_id"]]
        own = [layer for layer in layers if layer["solver"]]
        numbers = sum(layer["rows"] * layer["columns"] for layer in own)
        assert row["linear_bytes"] == sum(layer["stored_bytes"] for layer in own), recipe
        assert row["linear_bits"] == (8 * row["linear_bytes"] / numbers if numbers else 32), recipe  # a float32 model
        assert (row["kv_bits"] is not None) == ("kv" in scheme)
        assert row["causal"] is (None if scheme in ("w4", "w16") else "crossquant" not in recipe)
    assert rows["rtn", "a8"]["layers_quantized"] == 0
    assert rows["zeroquant", "w4"]["linear_bits"] == 4 + 16 / 16
    # A scale of 16 bits per row, 3 bits of flag per group of 16.
    ones = sum(layer["rows"] for layer in farm.table("layers") if layer["cell_id"] == rows["rtn", "a8"]["cell_id"])
    numbers = 8 * rows["zeroquant", "w4"]["linear_bytes"] / 5
    assert rows["gptq+qrazor", "w4"]["linear_bits"] == pytest.approx(4 + 3 / 16 + 16 * ones / numbers, abs=1e-9)
    # A token's keys and values of two heads are 64 numbers: four flags, padded to three bytes, and four float16 scales.
    assert rows["gptq+qrazor", "w4/8a8kv4"]["kv_bits"] == 4 + 24 / 64 + 16 / 16
    # The MLP has three times 64 x 128 weights, attention two times 64 x 64 and two times 32 x 64.
    attention, mlp = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 128
    mixed = 1 + (8 * attention + 4 * mlp) / (attention + mlp)
    assert rows["zeroquant", "w4/8a8kv4"]["linear_bits"] == pytest.approx(mixed, abs=1e-12)


# -- a sweep ----------------------------------------------------------------------------------------------------------


def sweep(tmp_path: Path, model: Path) -> list[Cell]:
    found = [planned.cell for planned in Farm(tmp_path / "store", make_job(model, SWEEP)).plan().cells[1:]]
    assert [json.loads(json.dumps(cell.methods[0]))["options"]["alpha"] for cell in found] == ALPHAS
    return found


def quantized(session: Session, cell: Cell) -> dict[str, Tensor]:
    session.begin(cell)
    quantize_cell(session, lambda done, total: None)
    return {name: weight.clone() for name, weight in weights(session.loaded).items()}


def test_a_sweep_over_alpha_walks_the_original_model_once(tmp_path: Path, tiny: Path) -> None:
    session, cells = Session(None), sweep(tmp_path, tiny)
    session.begin(cells[0])
    passes = []
    session.loaded.blocks[-1].register_forward_pre_hook(lambda *_: passes.append(1))
    together = [quantized(session, cell) for cell in cells]
    assert len(passes) == 1  # all of the calibration text is one batch
    assert not all(torch.equal(together[0][name], value) for name, value in together[1].items())
    alone = Session(None)
    for index in (5, 11):
        alone._observed = KeptObservations()
        assert all(torch.equal(together[index][n], value) for n, value in quantized(alone, cells[index]).items())


def test_another_seed_or_smaller_batches_are_observed_anew(tmp_path: Path, tiny: Path) -> None:
    session, cells = Session(None), sweep(tmp_path, tiny)
    session.begin(cells[0])
    calls: list[str] = []
    session._observed.get = lambda key, make: calls.append(key) or make()  # type: ignore[method-assign,func-returns-value]
    for cell, shrink in ((cells[0], 0), (cells[1], 0), (cells[1], 1)):
        session.begin(cell, shrink)
        quantize_cell(session, lambda done, total: None)
    session.begin(dataclasses.replace(cells[0], seed=1))
    quantize_cell(session, lambda done, total: None)
    assert calls[0] == calls[1] and len(set(calls)) == 3


def observed(size: int) -> Observed:
    stats = InputStatistics(max_abs=torch.zeros(size))
    return {Place("linear_in", 0, role): stats for role in "qkv"}


def test_what_is_kept_is_bounded() -> None:
    made: list[Any] = []

    def make(size: int) -> Observed:
        made.append(size)
        return observed(size)

    kept = KeptObservations(limit=4 * 10)
    assert observed_bytes(observed(5)) == 4 * 5  # q, k and v share theirs
    for key, size in (("a", 5), ("b", 5), ("a", 5), ("c", 5), ("a", 5), ("b", 5), ("d", 11), ("d", 11)):
        assert observed_bytes(kept.get(key, lambda size=size: make(size))) == 4 * size  # type: ignore[misc]
    assert made == [5, 5, 5, 5, 11, 11]  # c drove b out, the least used; d is too large to be kept
    assert set(kept._kept) == {"a", "b"}
