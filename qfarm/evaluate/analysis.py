"""Analysis: how far weights, inputs and outputs of every decoder linear are from the full-precision model's.

The cell reads a few windows of a text, one at a time; beside each of its blocks runs the same block in full precision,
transformed (smoothed, rotated) but not quantized. Per linear layer:

    weight        the layer's weight, against the one before quantization; once, not for every window
    input         before and after the layer's own quantizer: a local error, upstream layers are quantized in both
    output        what the layer gives, against the unquantized weight and bias applied to the unquantized input
    accumulated   the input as the quantized model sees it, against the full-precision model's: all errors upstream

Each has SQNR (dB) and MSE, the first three also the moments of both sides (`weight`, `weight_quantized`, ...; see
`qfarm.analysis`). Values are averaged over windows; the smallest and the largest number are those of all windows. They
go to the table `analysis`; metrics are means of SQNR over the layers with any error, and the worst layer's output.

In the full-precision run no quantizer is active, neither at linear inputs nor in attention nor in the KV cache. Only
one block's inputs are held at a time.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from qfarm.analysis import distance, mean_decibels, moments, over_windows
from qfarm.errors import NonFinite
from qfarm.evaluate import Result, TextEvaluator
from qfarm.models.load import LoadedModel
from qfarm.models.past import KEYWORDS
from qfarm.recipe import STRICT
from qfarm.record import LayerStatistic, Metric
from qfarm.text import public_name, reference

if TYPE_CHECKING:
    from qfarm.worker import Session

SUMMARY = ("output", "accumulated", "weight", "input")  # tensors whose mean SQNR is a metric; the first is the headline

# By layer, role, tensor and statistic: the values of all windows.
Found = dict[tuple[int, str, str, str], list[float]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Analysis(TextEvaluator):
    runs = ("fake",)  # it looks at weights, which a packed run does not have
    one_device = True  # it compares a block with its twin

    text: Annotated[str, BeforeValidator(reference)] = Field(description="as of perplexity")
    length: int = Field(2048, ge=2, description="tokens per window")
    windows: int = Field(10, ge=1, description="the first so many windows")

    @property
    def label(self) -> str:
        return f"analysis {public_name(self.text)} {self.length} x{self.windows}"

    def tokens(self) -> int:
        return 2 * self.length * self.windows  # read by two models

    def prepare(self, session: Session) -> None:
        session.keep_twins = True

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        ids = session.windows(self.text, self.length, self.windows).ids
        loaded, found = session.loaded, collections.defaultdict[tuple[int, str, str, str], list[float]](list)
        compare_weights(loaded, session.twins, found)
        with Comparison(loaded, session.twins, found):
            for index, window in enumerate(ids):
                states = loaded.body(window[None].to(loaded.device))
                if not bool(torch.isfinite(states).all()):
                    raise NonFinite(f"{self.label}: a hidden state of window {index} is not finite")
                progress(index + 1, len(ids))
        rows = tuple(
            LayerStatistic(
                layer=layer,
                role=role,
                tensor=tensor,
                statistic=statistic,
                value=over_windows(statistic, values),
            )
            for (layer, role, tensor, statistic), values in found.items()
        )
        return Result(metrics=tuple(_metrics(rows, len(ids))), documents=(), analysis=rows)


EVALUATOR = Analysis


class Comparison:
    """While it is entered, every call of the model is compared with its twins, block by block."""

    def __init__(self, loaded: LoadedModel, twins: list[nn.Module], found: Found) -> None:
        self.loaded, self.twins, self.found = loaded, twins, found
        self.hidden: Tensor  # the full-precision model's input of the current block
        self.inputs: dict[str, Tensor] = {}  # by role: of the current block's layers in full precision
        self._handles: list[Any] = []

    def __enter__(self) -> Comparison:
        for index, block in enumerate(self.loaded.blocks):
            step = functools.partial(self._step, index)
            self._handles.append(block.register_forward_pre_hook(step, with_kwargs=True))
            for role, linear in self.loaded.linears(index).items():
                twin = _linear(self.loaded, self.twins[index], role)
                self._handles.append(twin.register_forward_pre_hook(functools.partial(self._remember, role)))
                # First of all hooks: what is done to keys or values afterwards is no error of the layer.
                measure = functools.partial(self._measure, index, role, twin)
                self._handles.append(linear.register_forward_hook(measure, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.inputs.clear()

    def _step(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the twin right before its block; it has no KV cache."""
        if index == 0:
            self.hidden = args[0] if args else kwargs["hidden_states"]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        for keyword in others.keys() & set(KEYWORDS):
            others |= {keyword: None, "use_cache": False}
        self.inputs.clear()
        out = self.twins[index](self.hidden, *args[1:], **others)
        self.hidden = out[0] if isinstance(out, tuple) else out

    def _remember(self, role: str, twin: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs[role] = args[0]

    def _measure(
        self, index: int, role: str, twin: nn.Linear, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        given = args[0]  # transforms of the input are pre-hooks, and have been applied
        quantize = getattr(linear, "quantize", None)
        add = functools.partial(_add, self.found, index, role)
        add("input", given, given if quantize is None else quantize(given))
        # In the model's dtype and by the same operator, so that a layer that is left alone has no error at all.
        add("output", nn.functional.linear(given, twin.weight, twin.bias), output)
        for statistic, value in distance(self.inputs[role], given).items():
            self.found[index, role, "accumulated", statistic].append(value)


def _linear(loaded: LoadedModel, block: nn.Module, role: str) -> nn.Linear:
    found = block.get_submodule(loaded.architecture.roles[role])
    assert isinstance(found, nn.Linear)
    return found


def compare_weights(loaded: LoadedModel, twins: list[nn.Module], found: Found) -> None:
    """Add what tells the weights of the model from those of its twins."""
    for index, twin in enumerate(twins):
        for role, linear in loaded.linears(index).items():
            branch = getattr(linear, "branch", None)
            weight = linear.weight if branch is None else linear.weight + branch.left @ branch.right
            _add(found, index, role, "weight", _linear(loaded, twin, role).weight, weight)


def _add(found: Found, layer: int, role: str, tensor: str, before: Tensor, after: Tensor) -> None:
    figures = {tensor: distance(before, after) | moments(before), f"{tensor}_quantized": moments(after)}
    for name, values in figures.items():
        for statistic, value in values.items():
            found[layer, role, name, statistic].append(value)


def _metrics(rows: tuple[LayerStatistic, ...], windows: int) -> Iterator[Metric]:
    metric = functools.partial(Metric, unit="dB", better="higher", n=windows)
    for tensor in SUMMARY:
        values = [row.value for row in rows if (row.tensor, row.statistic) == (tensor, "sqnr")]
        yield metric(metric=f"sqnr_{tensor}", value=mean_decibels(values))
        if tensor == SUMMARY[0]:
            yield metric(metric=f"sqnr_{tensor}_worst", value=min(values, default=math.inf))
