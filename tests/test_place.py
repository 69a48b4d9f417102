"""Placement: a streamed model has one block on the device at a time, a spread one its blocks where they belong."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qfarm import worker
from qfarm.calibrate import quantize_weights
from qfarm.memory import Arrangement
from qfarm.models import load as loading
from qfarm.models import place
from qfarm.models.load import LoadedModel
from qfarm.models.place import HOST, Placement, spread
from qfarm.quantizer import Grid
from qfarm.recipe import WeightSolver, build_method, parse_recipe
from qfarm.runs import one_device_rule
from qfarm.scheme import parse_scheme
from tests.conftest import save_tiny
from tests.test_models import loaded
from tests.test_worker import JOB, Farm, make_job

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)  # stand-ins for GPUs: not equal to the host
BLOCKS = 4


class Accounts:
    """Bytes on devices: what `put` brought there and is still alive."""

    def __init__(self) -> None:
        self.now: dict[torch.device, int] = {}
        self.peak: dict[torch.device, int] = {}

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        copy = tensor.clone()
        if device != HOST:
            size, storage = copy.nbytes, copy.untyped_storage()
            self._count(device, size)
            weakref.finalize(storage, self._count, device, -size)
        return copy

    def _count(self, device: torch.device, size: int) -> None:
        self.now[device] = self.now.get(device, 0) + size
        self.peak[device] = max(self.peak.get(device, 0), self.now[device])


@pytest.fixture
def accounts(monkeypatch: pytest.MonkeyPatch) -> Accounts:
    found = Accounts()
    for module in (place, loading):
        monkeypatch.setattr(module, "put", found.put)
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_tiny(tmp_path_factory.mktemp(family), family, num_hidden_layers=BLOCKS)
        for family in ("llama", "opt")
    }


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


def block_bytes(model: LoadedModel) -> int:
    return sum(parameter.nbytes for parameter in model.blocks[0].parameters())


def quantized(model: LoadedModel, method: str = "gptq", **how: object) -> list[Tensor]:
    """Final hidden states: of the original, of the model quantized, and of the model restored."""
    solver = build_method(method, {})
    assert isinstance(solver, WeightSolver)
    ids = torch.arange(96).reshape(2, 48)
    states = [model.body(ids)]
    settings = {"sequential": True, "batch_tokens": 48, "report": lambda done, blocks: None, **how}
    quantize_weights(model, solver, lambda role: Grid(bits=3, group_size=16), ids, **settings)  # type: ignore[arg-type]
    states.append(model.body(ids))
    model.restore()
    return [*states, model.body(ids)]


@pytest.mark.parametrize(
    ("family", "method", "sequential"),
    [("llama", "rtn", True), ("llama", "gptq", True), ("llama", "gptq", False), ("opt", "gptq", True)],
)
def test_a_streamed_model_has_one_block_on_the_device_and_the_same_numbers(
    checkpoints: dict[str, Path], accounts: Accounts, family: str, method: str, sequential: bool
) -> None:
    model = loaded(checkpoints[family])
    plain = quantized(model, method, sequential=sequential)
    assert not torch.equal(plain[0], plain[1])
    model.place([FIRST], streamed=True)
    resident = accounts.now[FIRST]
    tables = {id(p): p.nbytes for part in (*model.embeddings, model.head, model.final_norm) for p in part.parameters()}
    assert resident == sum(tables.values()) + sum(b.nbytes for n, b in model.model.named_buffers())
    streamed = quantized(model, method, sequential=sequential)
    assert all(torch.equal(*pair) for pair in zip(plain, streamed, strict=True))
    assert accounts.peak[FIRST] == resident + block_bytes(model)
    assert accounts.now[FIRST] == resident, "nothing of a block stays on the device"


def test_originals_of_a_streamed_model_are_the_pages_of_the_file(checkpoint: Path, accounts: Accounts) -> None:
    model = loaded(checkpoint)
    before = {id(p): p.data_ptr() for p in model.blocks[1].parameters()}
    model.place([FIRST], streamed=True)
    quantized(model)
    assert {id(p): p.data_ptr() for p in model.blocks[1].parameters()} == before


def test_a_spread_model_has_each_block_on_its_device_and_the_same_numbers(checkpoint: Path, accounts: Accounts) -> None:
    model = loaded(checkpoint)
    plain = quantized(model)
    model.place([FIRST, SECOND])
    assert [model.block_device(index) for index in range(BLOCKS)] == [FIRST, FIRST, SECOND, SECOND]
    assert accounts.now[SECOND] == 2 * block_bytes(model)
    states = quantized(model)
    assert all(torch.equal(*pair) for pair in zip(plain, states, strict=True))


def test_what_a_block_is_called_with_is_moved_to_it(checkpoint: Path) -> None:
    """On meta tensors, which know their device and hold no numbers."""
    model = loaded(checkpoint)
    places: list[torch.device] = []
    given: dict[str, object] = {}

    class Recorder(torch.nn.Module):
        def forward(self, hidden: Tensor, **keywords: object) -> Tensor:
            places.append(hidden.device)
            given.update(keywords)
            return hidden

    recorder = Recorder()
    devices = [torch.device("meta")]
    Placement([recorder], torch.nn.Identity(), model.on_host, devices=devices, streamed=False)
    recorder(torch.ones(2), pair=(torch.ones(1), None), flag=True)
    assert places == devices and given["flag"] is True
    first, second = given["pair"]  # type: ignore[misc]
    assert first.device == devices[0] and second is None


def test_a_model_that_was_placed_can_be_placed_again(checkpoint: Path, accounts: Accounts) -> None:
    model = loaded(checkpoint)
    ids = torch.arange(40)[None]
    before = model.body(ids)
    model.place([FIRST], streamed=True)
    model.place([FIRST, SECOND])
    model.place([FIRST])
    assert model.placement is None and torch.equal(model.body(ids), before)
    assert accounts.now[SECOND] == 0


def test_originals_that_leave_a_device_come_back(checkpoint: Path, accounts: Accounts) -> None:
    model = loaded(checkpoint)
    plain = quantized(model)
    model.place([FIRST])
    model.offload = True
    full = accounts.now[FIRST]
    linear = model.linears(1)["up"]
    original, size = linear.weight, linear.weight.nbytes
    model.replace_weight(linear, torch.zeros_like(linear.weight))
    assert accounts.now[FIRST] == full - size
    model.restore()
    assert linear.weight is original and accounts.now[FIRST] == full
    assert all(torch.equal(*pair) for pair in zip(plain, quantized(model), strict=True))


@pytest.mark.parametrize(
    ("blocks", "devices", "runs"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (2, 3, [1, 1])]
)
def test_blocks_are_spread_in_runs(blocks: int, devices: int, runs: list[int]) -> None:
    homes = spread(blocks, [torch.device("cpu", index) for index in range(devices)])
    assert list(homes) == sorted(homes, key=lambda device: device.index)
    assert [homes.count(device) for device in dict.fromkeys(homes)] == runs


@pytest.mark.parametrize(
    ("arrangement", "note"),
    [
        (Arrangement(gpus=1, streamed=True), "blocks streamed from the host's memory"),
        (Arrangement(gpus=2, streamed=False), "blocks spread over 2 GPUs"),
    ],
)
def test_a_cell_has_the_same_rows_wherever_its_model_lies(
    tiny: Path,
    tmp_path: Path,
    accounts: Accounts,
    monkeypatch: pytest.MonkeyPatch,
    arrangement: Arrangement,
    note: str,
) -> None:
    job = make_job(tiny, JOB.replace("windows: 30", "windows: 3").replace("[w3, w4/8]", "[w3]"))
    plain, placed = Farm(tmp_path / "plain", job), Farm(tmp_path / "placed", job)
    monkeypatch.setattr(placed.session, "rooms", lambda: {FIRST: 1, SECOND: 1})
    monkeypatch.setattr(worker, "arrange", lambda *_, **__: arrangement)
    for index in (0, 2):
        assert plain.run(index).failure is placed.run(index).failure is None
    rows = [
        sorted((row["cell_id"], row["metric"], row["value"]) for row in farm.table("metrics"))
        for farm in (plain, placed)
    ]
    assert rows[0] == rows[1] and len(rows[0]) > 4
    notes = [json.loads(row["notes"]) for row in placed.table("attempts")]
    assert all(any(note in one for one in own) for own in notes)
    assert accounts.peak[SECOND if arrangement.gpus == 2 else FIRST] > 0


def test_what_needs_the_whole_model_in_one_place_is_left_there() -> None:
    def rule(recipe: str, scheme: str) -> str | None:
        return one_device_rule(parse_recipe(recipe), parse_scheme(scheme))

    assert rule("gptq", "w4") is None and rule("gptq+qera", "w4/8") is None
    assert "only methods of weights" in str(rule("smoothquant+gptq", "w4"))
    assert "only schemes" in str(rule("gptq", "w8a8")) and "only schemes" in str(rule("rtn", "kv4"))
