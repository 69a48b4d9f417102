"""Quantized inputs of linear layers.

A linear layer is replaced by one that quantizes its input and shares everything else with it: parameters, hooks, name.
Forward pre-hooks run before the quantizer, in the order in which they were registered: an online rotation first, then
collectors of statistics, which so see what the quantizer will see.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from qfarm.errors import QfarmError
from qfarm.inputs import InputStatistics
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.models.load import LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """A low-rank term in floating point, which sees the input as it is before the quantizer."""

    left: Tensor  # [out, rank]
    right: Tensor  # [rank, in]

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left)


@runtime_checkable
class Multiplier(Protocol):
    """A quantizer that takes the product as well, for arithmetic that Q(x) W^T in the model's dtype does not give."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in] as the layer holds it, bias [out] -> [..., out] in the dtype of x."""
        ...


class QuantLinear(nn.Linear):
    """y = Q(x) W^T + b, plus a branch of x where there is one. x [..., in] with any leading shape."""

    quantize: Quantizer
    branch: Branch | None

    @staticmethod
    def around(linear: nn.Linear, quantize: Quantizer, branch: Branch | None = None) -> QuantLinear:
        """A layer with the parameters and hooks of `linear`: what changes in one changes in the other."""
        made = QuantLinear.__new__(QuantLinear)
        made.__dict__.update(linear.__dict__)
        made.__dict__.update(quantize=quantize, branch=branch)
        return made

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.quantize, Multiplier):
            y = self.quantize.multiply(x, self.weight, self.bias)
        else:
            y = nn.functional.linear(self.quantize(x), self.weight, self.bias)
        return y if self.branch is None else y + self.branch(x)


Made = TypeVar("Made")


class ReadBySeveral(Generic[Made]):
    """A quantizer of an input that several layers read: rounds it for the first, and lets go of it with the last.

    What is given decides, not who asks: a tensor other than the latest is rounded anew. No layer may write into it.
    """

    def __init__(self, quantize: Callable[[Tensor], Made], readers: int) -> None:
        self.quantize, self.readers = quantize, readers
        self._latest: tuple[Tensor, Made] | None = None  # an input and what it was rounded to
        self._left = 0  # readers of it that are still to come

    def __call__(self, x: Tensor) -> Made:
        if self._latest is None or self._latest[0] is not x:
            self._latest, self._left = (x, self.quantize(x)), self.readers
        rounded = self._latest[1]
        self._left -= 1
        if not self._left:
            self._latest = None
        return rounded


def as_given(x: Tensor) -> Tensor:
    """The quantizer of an input that is not quantized, where a layer has a branch."""
    return x


def quantize_input(
    loaded: LoadedModel, block: int, role: str, quantize: Quantizer, branch: Branch | None = None
) -> None:
    """Quantize the input of one linear layer until the model is restored; a branch that is there already stays."""
    linear = loaded.linears(block)[role]
    name = loaded.module_name(block, role)
    branch = branch or getattr(linear, "branch", None)
    loaded.on_restore(functools.partial(loaded.model.set_submodule, name, linear))
    loaded.model.set_submodule(name, QuantLinear.around(linear, quantize, branch))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Multiplied:
    """Quantizes x times a factor [channels] and divides again, for a weight that is made for x as it is."""

    quantize: Quantizer
    factor: Tensor  # float32

    def __call__(self, x: Tensor) -> Tensor:
        factor = self.factor.to(x.device)
        return (self.quantize(x.float() * factor) / factor).to(x.dtype)


def with_factor(loaded: LoadedModel, block: int, role: str, quantize: Quantizer) -> Quantizer:
    """The quantizer, which sees the input as the weight's solver has it multiplied."""
    factor = loaded.input_factors.get((block, role))
    if factor is None:
        return quantize
    if isinstance(quantize, Multiplier):
        raise QfarmError(f"the input of layer {block} {role} has a factor, which products of codes cannot have")
    return Multiplied(quantize=quantize, factor=factor)


def with_factors(loaded: LoadedModel, observed: Observed) -> Observed:
    """What calibration learned of inputs, as if they had been multiplied already; factors are positive."""

    def multiplied(place: Place, found: InputStatistics) -> InputStatistics:
        factor = loaded.input_factors.get((place.layer, place.role)) if place.site == "linear_in" else None
        names = ("sample", "mean_abs", "max_abs", "low", "high")
        known = {name: value for name in names if (value := getattr(found, name)) is not None}
        return found if factor is None else dataclasses.replace(found, **{n: v * factor for n, v in known.items()})

    return {place: multiplied(place, found) for place, found in observed.items()}


def by_sequence(loaded: LoadedModel, block: int, quantize: Quantizer) -> Quantizer:
    """The quantizer for layers of a block; it always sees [batch, tokens, in], until the model is restored.

    For quantizers that look across tokens: some families (OPT) feed their MLP [batch x tokens, in].
    """
    batch = [1]

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        batch[0] = len(args[0] if args else kwargs["hidden_states"])

    handle = loaded.blocks[block].register_forward_pre_hook(hook, with_kwargs=True)
    loaded.on_restore(handle.remove)

    def restored(x: Tensor) -> Tensor:
        return quantize(x) if x.dim() > 2 else quantize(x.reshape(batch[0], -1, x.shape[-1])).reshape(x.shape)

    return restored


def transform_input(loaded: LoadedModel, block: int, role: str, transform: Quantizer) -> None:
    """Apply a function to the input of one linear layer, before anything that quantizes or observes it."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return transform(args[0])

    handle = loaded.linears(block)[role].register_forward_pre_hook(hook)
    loaded.on_restore(handle.remove)


def transform_output(loaded: LoadedModel, module: nn.Module, transform: Quantizer) -> None:
    """Apply a function to what a module returns: keys before the rotary embedding, values."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return transform(output)

    loaded.on_restore(module.register_forward_hook(hook).remove)


def head_rows(quantize: Quantizer, head_dim: int) -> Quantizer:
    """The quantizer with one row per head for tensors [..., heads x head_dim], as projections return them."""

    def by_head(x: Tensor) -> Tensor:
        return quantize(x.reshape(*x.shape[:-1], -1, head_dim)).reshape(x.shape)

    return by_head
