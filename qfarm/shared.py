"""Shared: statistics of a model's original inputs, collected once and used by every cell that may use them.

In independent mode (`statistics: independent`) what a linear layer is fed does not depend on how earlier layers were
quantized, so one pass over the calibration text serves all cells of the same model, calibration and transform. What is
kept are the statistics, block by block in host memory, never the activations; cells get the same bits as if they had
collected them alone, and exactly the statistics that their methods ask for.

What transforms and site methods observe (`qfarm.layers.observe`) does not depend on weights that are quantized at all,
in either mode: cells that ask for the same of the same model, such as those of a sweep over alpha, walk it once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qfarm import environment
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.sites import Observed
from qfarm.models.load import LoadedModel
from qfarm.walk import Walk

Group = tuple[str, ...]  # roles of layers that read the same input
SQUARE = frozenset({Statistic.HESSIAN, Statistic.NORMALISED_HESSIAN})
SMALLEST_SHARE = 1 / 8  # of a machine's memory, for a worker that takes few of its cores (an unpublished value)

OBSERVED_BYTES = 1 << 30  # of observed statistics that a worker keeps (an unpublished value)


class SharedStatistics:
    """Statistics of one model's inputs over one calibration text.

    Blocks are collected when they are first asked for, in order, each before its weights are replaced: a cell that
    fails half-way leaves what it has collected to the next.
    """

    def __init__(self, loaded: LoadedModel, windows: Tensor, batch_tokens: int, wanted: frozenset[Statistic]) -> None:
        self.wanted = wanted
        self._loaded = loaded
        self._walk: Walk | None = Walk(loaded, windows, batch_tokens)  # dropped after the last block
        self._blocks: list[dict[Group, InputStatistics]] = []

    def block(self, index: int, groups: Sequence[Group], wanted: frozenset[Statistic]) -> dict[Group, InputStatistics]:
        """The wanted statistics of a block's inputs, on the block's device. Solvers must not change them."""
        assert wanted <= self.wanted
        assert index <= len(self._blocks), "blocks are visited in order"
        if index == len(self._blocks):
            self._blocks.append(self._collect(index))
        device = self._loaded.block_device(index)
        return {group: _only(self._blocks[index][group], wanted, device) for group in groups}

    def _collect(self, index: int) -> dict[Group, InputStatistics]:
        assert self._walk is not None
        linears = self._loaded.linears(index)
        first = {group: linears[group[0]] for group in self._loaded.architecture.shared_inputs}
        found = self._walk.collect(index, first, self.wanted, keep_outputs=True)
        if index + 1 == len(self._loaded.blocks):
            self._walk = None
        return {group: _only(stats, self.wanted, torch.device("cpu")) for group, stats in found.items()}


class KeptObservations:
    """What was observed of one model, by what it depends on; where it grows too large, the longest unused goes.

    Nobody may change what is handed out.
    """

    def __init__(self, limit: int = OBSERVED_BYTES) -> None:
        self.limit = limit
        self._kept: dict[str, Observed] = {}  # the latest used stands last

    def get(self, key: str, make: Callable[[], Observed]) -> Observed:
        """What is kept under the key, else what `make` returns; what is larger than the limit alone is not kept."""
        found = self._kept.pop(key, None)
        if found is None:
            found = make()
        if observed_bytes(found) <= self.limit:
            self._kept[key] = found
        while sum(map(observed_bytes, self._kept.values())) > self.limit:
            self._kept.pop(next(iter(self._kept)))
        return found


def observed_bytes(observed: Observed) -> int:
    """Memory of the tensors; layers that read the same input share theirs."""
    names = [field.name for field in dataclasses.fields(InputStatistics)]
    values = (getattr(stats, name) for stats in observed.values() for name in names)
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def needed_bytes(loaded: LoadedModel, wanted: frozenset[Statistic]) -> int:
    """Host memory that a model's statistics take once all blocks are collected; the small ones are left out."""
    squares = len(SQUARE & wanted)
    total = 0
    for index in range(len(loaded.blocks)):
        linears = loaded.linears(index)
        total += sum(linears[group[0]].in_features ** 2 for group in loaded.architecture.shared_inputs)
    return 4 * squares * total


def fits(size: int) -> bool:
    spare = spare_bytes()
    return spare is None or size <= spare


def spare_bytes() -> int | None:
    """Host memory that this process may fill: half of its share of what is free; None where that is not known."""
    free = environment.available_host_bytes()
    if free is None:
        return None
    share = torch.get_num_threads() / (os.cpu_count() or 1)
    return int(free * min(1.0, max(SMALLEST_SHARE, share)) / 2)


def _only(stats: InputStatistics, wanted: frozenset[Statistic], device: torch.device) -> InputStatistics:
    """These statistics alone, so that a layer's row cannot depend on what other cells asked for."""
    asked = [name for kind in wanted for name in kind.fields]
    kept = {name: value.to(device) for name in asked if (value := getattr(stats, name)) is not None}
    everything = [name for kind in Statistic for name in kind.fields]
    return dataclasses.replace(stats, **dict.fromkeys(everything, None) | kept)  # type: ignore[arg-type]
