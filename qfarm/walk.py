"""Walk: a model run block by block, keeping one block's inputs at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
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
    index: int = 0  # of the block
    blocks: int = 1  # of the model
    input_bits: int = 16  # width to which the scheme quantizes the inputs of linear layers; 16: it does not
    # Other parameters of the block that the solver learned, by their names in it; the walker puts them in place.
    learned: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def forward(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The block's output with other weights in some roles; differentiable in both arguments."""
        names = {id(module): name for name, module in self.block.named_modules()}
        return self.call(hidden, {f"{names[id(self.linears[role])]}.weight": w for role, w in weights.items()})

    def call(self, hidden: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The block's output with other parameters, by their names in the block; differentiable alike."""
        out: Any = torch.func.functional_call(self.block, parameters, (hidden,), self.keywords)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def error_notes(self, role: str, values: Tensor) -> dict[str, float]:
        """Figures for a layer's notes: its error on ordinary tokens, and that of rounding to nearest on its grid."""
        weight, inputs = self.linears[role].weight.detach(), self.statistics[role]
        nearest = self.grids[role].quantize(weight).dequantize()
        return {
            "ordinary_error": inputs.ordinary_error(weight, values),
            "ordinary_error_rtn": inputs.ordinary_error(weight, nearest),
        }


def for_any_batch(value: Any, samples: int) -> Any:
    """A block's keyword argument, recorded for a batch of that many samples, cut to one so that it broadcasts.

    Calibration windows have one length and no padding, so masks and positions are the same for every sample.
    """
    if isinstance(value, tuple):
        return tuple(for_any_batch(part, samples) for part in value)
    batched = isinstance(value, Tensor) and value.dim() > 1 and len(value) == samples > 1
    return value[:1] if batched and torch.equal(value, value[:1].expand_as(value)) else value


class _Captured(Exception):
    """Ends a forward pass once the inputs that it is run for are known."""


class Walk:
    """The inputs of the current block, batch by batch, and how to push them through it."""

    def __init__(self, loaded: LoadedModel, windows: Tensor, batch_tokens: int = BATCH_TOKENS) -> None:
        self.loaded = loaded
        self.tokens, self.length = windows.numel(), windows.shape[1]
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
        return [self._output(index, i) for i in range(len(self.hidden))]

    def _output(self, index: int, batch: int) -> Tensor:
        out = self.loaded.blocks[index](self.hidden[batch], **self.keywords[batch][index])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the kept inputs by the block's outputs."""
        for i in range(len(self.hidden)):
            self.hidden[i] = self._output(index, i)

    @torch.no_grad()
    def collect(
        self, index: int, layers: dict[tuple[str, ...], nn.Linear], wanted: frozenset[Statistic], *, keep_outputs: bool
    ) -> dict[tuple[str, ...], InputStatistics]:
        """Statistics of the inputs of some layers of a block; keep_outputs also advances, saving a pass."""
        collectors = {key: Collector(wanted, self.tokens, self.length) for key in layers}
        # Without outputs a pass may end at its last input, which spares the block's last linear layer.
        feed = _Feed(collectors, stop=not keep_outputs)
        with contextlib.ExitStack() as stack:
            for key, linear in layers.items():
                stack.callback(linear.register_forward_pre_hook(feed.hook(key)).remove)
            for i in range(len(self.hidden)):
                with contextlib.suppress(_Captured):
                    out = self._output(index, i)
                    if keep_outputs:
                        self.hidden[i] = out
        return {key: collector.result() for key, collector in collectors.items()}


class _Feed:
    """Hands layers' inputs to collectors; with `stop`, ends the forward pass once each has got one."""

    def __init__(self, collectors: dict[tuple[str, ...], Collector], stop: bool) -> None:
        self.collectors, self.stop = collectors, stop
        self.missing = set(collectors)

    def hook(self, key: tuple[str, ...]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def feed(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.collectors[key].add(args[0])
            self.missing.discard(key)
            if self.stop and not self.missing:
                self.missing = set(self.collectors)
                raise _Captured

        return feed


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
