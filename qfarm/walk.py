"""Walk: a model run block by block, keeping one block's inputs at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.inputs import Collector, InputStatistics, Statistic
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid

BATCH_TOKENS = 4096  # calibration tokens per forward pass; part of what makes a run reproducible


@dataclasses.dataclass(kw_only=True)
class BlockProblem:
    """What a solver needs that optimises the layers of a block together."""

    block: nn.Module  # with its original weights
    linears: dict[str, nn.Linear]  # the layers to quantize, by role
    grids: dict[str, Grid]
    inputs: Tensor  # [samples, length, hidden]: what the block will be fed
    targets: Tensor  # [samples, length, hidden]: what the original block makes of the original inputs
    keywords: dict[str, Any]  # of the block's forward; they fit any number of samples of this length
    seed: int
    # What the solver's `statistics()` ask for, by role; of the inputs of the original layers in this block.
    statistics: dict[str, InputStatistics] = dataclasses.field(default_factory=dict)

    def forward(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The block's output with other weights in some roles; differentiable in both arguments."""
        names = {id(module): name for name, module in self.block.named_modules()}
        swapped = {f"{names[id(self.linears[role])]}.weight": value for role, value in weights.items()}
        out: Any = torch.func.functional_call(self.block, swapped, (hidden,), self.keywords)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def for_any_batch(value: Any, samples: int) -> Any:
    """A block's keyword argument, recorded for a batch of that many samples, cut to one so that it broadcasts.

    Calibration windows have one length and no padding, so masks and positions are the same for every sample.
    """
    if isinstance(value, tuple):
        return tuple(for_any_batch(part, samples) for part in value)
    batched = isinstance(value, Tensor) and value.dim() > 1 and len(value) == samples > 1
    return value[:1] if batched and torch.equal(value, value[:1].expand_as(value)) else value


class _Captured(Exception):
    """Ends a forward pass once the first block's inputs are known."""


class Walk:
    """The inputs of the current block, batch by batch, and how to push them through it."""

    def __init__(self, loaded: LoadedModel, windows: Tensor, batch_tokens: int = BATCH_TOKENS) -> None:
        self.loaded = loaded
        self.tokens = windows.numel()
        batch = max(1, batch_tokens // windows.shape[1])
        self.hidden: list[Tensor] = []
        self.keywords: list[list[dict[str, Any]]] = []  # [batch][block]
        with torch.no_grad():
            for ids in torch.split(windows, batch):
                hidden, keywords = capture(loaded, ids.to(loaded.device))
                self.hidden.append(hidden)
                self.keywords.append(keywords)

    def copy(self) -> Walk:
        """Another walk at the same place; tensors are shared until one of them advances."""
        other = copy.copy(self)
        other.hidden = list(self.hidden)
        return other

    @torch.no_grad()
    def outputs(self, index: int) -> list[Tensor]:
        """The block's outputs, batch by batch, without advancing."""
        return [out for _, out in self._run(index)]

    def _run(self, index: int) -> Iterator[tuple[int, Tensor]]:
        block = self.loaded.blocks[index]
        for i, hidden in enumerate(self.hidden):
            out = block(hidden, **self.keywords[i][index])
            yield i, out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the kept inputs by the block's outputs."""
        for i, out in self._run(index):
            self.hidden[i] = out

    @torch.no_grad()
    def collect(
        self, index: int, layers: dict[tuple[str, ...], nn.Linear], wanted: frozenset[Statistic], *, keep_outputs: bool
    ) -> dict[tuple[str, ...], InputStatistics]:
        """Statistics of the inputs of some layers of a block; keep_outputs also advances, saving a pass."""
        collectors = {key: Collector(wanted, self.tokens) for key in layers}
        with contextlib.ExitStack() as stack:
            for key, linear in layers.items():
                stack.callback(linear.register_forward_pre_hook(_feeder(collectors[key])).remove)
            for i, out in self._run(index):
                if keep_outputs:
                    self.hidden[i] = out
        return {key: collector.result() for key, collector in collectors.items()}


def _feeder(collector: Collector) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        collector.add(args[0])

    return hook


def capture(loaded: LoadedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The first block's input for token ids [batch, length], and each block's keyword arguments."""
    blocks: Sequence[nn.Module] = loaded.blocks
    keywords: list[dict[str, Any]] = []
    hidden: list[Tensor] = []
    # Blocks of one kind get the same keywords; a model that mixes kinds (sliding and full attention) is run through.
    mixed = len(set(getattr(loaded.model.config, "layer_types", None) or ["same"])) > 1

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not hidden:
            hidden.append(args[0] if args else kwargs["hidden_states"])
        keywords.append({name: value for name, value in kwargs.items() if name != "hidden_states"})
        if not mixed:
            raise _Captured

    with contextlib.ExitStack() as stack:
        for block in blocks if mixed else blocks[:1]:
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with contextlib.suppress(_Captured):
            loaded.body(ids)
    return hidden[0], keywords if mixed else keywords * len(blocks)
