"""Statistics shared between cells: the same bits as without, and fewer forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm import shared
from qfarm.calibrate import quantize_weights
from qfarm.errors import NonFinite
from qfarm.inputs import Statistic
from qfarm.methods.gptq import GPTQ
from qfarm.methods.rtn import RTN
from qfarm.models.load import LoadedModel
from qfarm.plan import shares
from qfarm.quantizer import Grid
from qfarm.recipe import WeightSolver, Wrapper, build_method, method_names, solves_blocks
from qfarm.shared import SharedStatistics
from qfarm.walk import BATCH_TOKENS
from tests import job_example
from tests.test_calibrate import WINDOWS, weights
from tests.test_models import loaded

EVERYTHING = frozenset(Statistic)
# By default AWQ runs modules of a block, and walks the model itself.
OPTIONS: dict[str, dict[str, Any]] = {"awq": {"objective": "gram"}}


def asking() -> list[str]:
    """Methods that learn from statistics."""
    methods = [build_method(name, OPTIONS.get(name, {})) for name in method_names()]
    return [
        method.name
        for method in methods
        if isinstance(method, Wrapper) or isinstance(method, WeightSolver) and not solves_blocks(method)
        if method.statistics()
    ]


def quantize(model: LoadedModel, name: str, statistics: SharedStatistics | None, **options: Any) -> list[Any]:
    method = build_method(name, OPTIONS.get(name, {}))
    method = method.resolve(16)
    solver, wrappers = (method, ()) if isinstance(method, WeightSolver) else (RTN(), (method,))
    grid = Grid(bits=4, group_size=16)
    return quantize_weights(
        model,
        solver,  # type: ignore[arg-type]
        lambda role: grid,
        WINDOWS,
        wrappers=wrappers,  # type: ignore[arg-type]
        shared=statistics,
        **{"sequential": False, "report": lambda done, total: None} | options,
    )


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[LoadedModel], list[int]]]:
    """Counts how often blocks of a model are run."""

    def watch(model: LoadedModel) -> list[int]:
        runs = [0] * len(model.blocks)
        for index, block in enumerate(model.blocks):

            def hook(*_: Any, index: int = index) -> None:
                runs[index] += 1

            block.register_forward_pre_hook(hook)
        return runs

    yield watch


def test_there_are_methods_to_share_between() -> None:
    assert {"gptq", "awq", "spqr", "comq", "qera"} <= set(asking())


def test_every_method_gives_the_same_bits_with_and_without(tiny: Path) -> None:
    alone, together = loaded(tiny), loaded(tiny)
    kept = SharedStatistics(together, WINDOWS, BATCH_TOKENS, EVERYTHING)
    for name in [*asking(), *reversed(asking())]:  # in reverse too: no method may change what the next one reads
        assert quantize(together, name, kept) == quantize(alone, name, None), name
        assert all(
            torch.equal(a, b) for a, b in zip(weights(together).values(), weights(alone).values(), strict=True)
        ), name
        alone.restore()
        together.restore()


def test_forward_passes_fall_to_those_of_one_cell(tiny: Path, count: Callable[[LoadedModel], list[int]]) -> None:
    model = loaded(tiny)
    runs = count(model)
    quantize(model, "gptq", None)
    model.restore()
    one = list(runs)
    quantize(model, "awq", None)
    model.restore()
    assert runs == [2 * n for n in one] and min(one) > 0

    runs[:] = [0] * len(runs)
    kept = SharedStatistics(model, WINDOWS, BATCH_TOKENS, EVERYTHING)
    for name in ("gptq", "awq", "spqr", "gptq"):
        quantize(model, name, kept)
        model.restore()
    assert runs == one


def test_sequential_mode_and_block_solvers_walk_themselves(
    tiny: Path, count: Callable[[LoadedModel], list[int]]
) -> None:
    model = loaded(tiny)
    kept = SharedStatistics(model, WINDOWS, BATCH_TOKENS, EVERYTHING)
    for name, sequential in (("gptq", True), ("autoround", False)):
        alone = quantize(model, name, None, sequential=sequential)
        model.restore()
        runs = count(model)
        assert quantize(model, name, kept, sequential=sequential) == alone
        model.restore()
        assert min(runs) > 0


class FailsInSecondBlock(GPTQ):
    """Gives up after the first block's four groups of layers."""

    calls = [0]

    def quantize_linear(self, *arguments: Any) -> Any:
        self.calls[0] += 1
        if self.calls[0] > 4:
            raise NonFinite("no factor")
        return super().quantize_linear(*arguments)


def test_a_cell_that_fails_leaves_what_it_collected(tiny: Path, count: Callable[[LoadedModel], list[int]]) -> None:
    model = loaded(tiny)
    expected = quantize(model, "gptq", None)
    model.restore()
    kept = SharedStatistics(model, WINDOWS, BATCH_TOKENS, EVERYTHING)
    runs = count(model)
    grid = Grid(bits=4, group_size=16)
    with pytest.raises(NonFinite, match="layer 1"):
        quantize_weights(
            model, FailsInSecondBlock(), lambda role: grid, WINDOWS, sequential=False, report=print, shared=kept
        )
    model.restore()
    once = list(runs)
    assert quantize(model, "gptq", kept) == expected
    assert runs == once


def test_bytes_needed_are_those_of_the_matrices(tiny: Path) -> None:
    model = loaded(tiny)
    kept = SharedStatistics(model, WINDOWS, BATCH_TOKENS, EVERYTHING)
    quantize(model, "gptq", kept)
    tensors = [
        tensor
        for block in kept._blocks
        for stats in block.values()
        for tensor in (stats.hessian, stats.normalised_hessian)
    ]
    assert sum(t.numel() * t.element_size() for t in tensors if t is not None) == shared.needed_bytes(model, EVERYTHING)
    assert shared.needed_bytes(model, frozenset({Statistic.MAX_ABS})) == 0


def test_a_share_of_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.environment, "available_host_bytes", lambda: 1600)
    monkeypatch.setattr(shared.os, "cpu_count", lambda: 4 * torch.get_num_threads())
    assert shared.spare_bytes() == 200
    monkeypatch.setattr(shared.os, "cpu_count", lambda: 100 * torch.get_num_threads())
    assert shared.spare_bytes() == 100
    assert shared.fits(100) and not shared.fits(101)
    monkeypatch.setattr(shared.environment, "available_host_bytes", lambda: None)
    assert shared.fits(1 << 60)


# -- which cells share what -------------------------------------------------------------------------------------------


def planned(**values: str | None) -> dict[str, tuple[str, ...]]:
    """By cell label: what it shares."""
    cells = job_example.matrix(job_example.changed(**values)).cells
    found = shares(cells)
    return {cell.label: found[cell.cell_id] for cell in cells if cell.cell_id in found}


def test_cells_of_one_calibration_share_the_union_of_what_they_ask_for() -> None:
    found = planned(methods="[rtn, gptq, {awq: {objective: gram}}]", statistics="independent")
    assert len(found) == 2 and not any(label.startswith("rtn") for label in found)
    (union,) = set(found.values())
    asked = build_method("gptq", {}).statistics() | build_method("awq", {}).statistics()  # type: ignore[attr-defined]
    assert union == tuple(sorted(asked))


def test_what_does_not_share() -> None:
    assert planned(methods="[gptq, {awq: {objective: gram}}]", statistics="sequential") == {}
    assert planned(methods="[gptq]", statistics="independent") == {}
    assert planned(methods="[gptq, autoround]", statistics="independent") == {}
    assert planned(methods="[gptq, awq]", statistics="independent") == {}
    assert planned(methods="[gptq]", seeds="[0, 1]", statistics="independent") == {}
    assert len(planned(methods="[gptq, {awq: {objective: gram}}]", seeds="[0, 1]", statistics="independent")) == 4


def test_ranges_are_two_tensors_for_who_asks_for_them(tiny: Path) -> None:
    model = loaded(tiny)
    kept = SharedStatistics(model, WINDOWS, BATCH_TOKENS, frozenset({Statistic.RANGE, Statistic.MAX_ABS}))
    (found,) = kept.block(0, [("down",)], frozenset({Statistic.RANGE})).values()
    assert found.low is not None and found.high is not None and found.max_abs is None
    (other,) = kept.block(0, [("down",)], frozenset({Statistic.MAX_ABS})).values()
    assert other.max_abs is not None and other.low is None and other.high is None
    assert torch.equal(other.max_abs, torch.maximum(-found.low, found.high))
