"""Placement: a streamed model has one block on the device at a time, a spread one its blocks where they belong."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qfarm.calibrate import quantize_weights
from qfarm.models import load as loading
from qfarm.models import place
from qfarm.models.load import LoadedModel
from qfarm.models.place import HOST, spread
from qfarm.quantizer import Grid
from qfarm.recipe import WeightSolver, build_method
from tests.conftest import TINY, save_tiny
from tests.test_models import loaded

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


@pytest.fixture(scope="module", params=["llama", "opt"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("place"), request.param, num_hidden_layers=BLOCKS)


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


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_streamed_model_has_one_block_on_the_device_and_the_same_numbers(
    checkpoint: Path, accounts: Accounts, method: str, sequential: bool
) -> None:
    model = loaded(checkpoint)
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
    model.place([FIRST, SECOND])
    seen: list[set[torch.device]] = []
    bring = place._bring_to(torch.device("meta"))
    args, kwargs = bring(model.blocks[0], (torch.ones(2),), {"pair": (torch.ones(1), None), "flag": True, "none": None})
    seen = [args[0].device.type, kwargs["pair"][0].device.type, kwargs["pair"][1], kwargs["flag"], kwargs["none"]]
    assert seen == ["meta", "meta", None, True, None]


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


@pytest.mark.parametrize(("blocks", "devices", "runs"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (2, 3, [1, 1])])
def test_blocks_are_spread_in_runs(blocks: int, devices: int, runs: list[int]) -> None:
    homes = spread(blocks, [torch.device("cpu", index) for index in range(devices)])
    assert list(homes) == sorted(homes, key=lambda device: device.index)
    assert [homes.count(device) for device in dict.fromkeys(homes)] == runs
