"""Fuse: rotations of a model's hidden states and values, merged into its weights, which leave its function as it is.

Row vectors, y = x W^T + b. g, c: weight and bias of the norm before a layer. Q [d, d]: rotation of the hidden states.
R_j [h, h]: of the values of key/value head j, F: of the input of down, both orthogonal.

    embeddings          E Q
    q, k, gate, up      W diag(g) Q                  b + W c
    v                   the rows of head j: R_j^T W diag(g) Q, R_j^T (b + W c)
    o                   Q^T W, the columns of each query head that reads value head j times R_j      Q^T b
    down                Q^T W F, its input times F online                                            Q^T b
    head                W diag(g) Q                  b + W c
    norms               weights of one

With `across` also the heads of o's input are mixed, online: x (A (x) I), W (A (x) I). A norm without weights commutes
with Q when it divides by the root mean square. LayerNorm (OPT) also subtracts the mean: what writes into the residual
stream is centred instead (rows of the embeddings, columns of W, b), so that its mean is always zero, and the norm
becomes a weightless RMS norm with the same epsilon. Never for RMS norms, whose function that would change.

A head that shares its weight with the embeddings gets one of its own, since only one of them has a norm before it.
Everything is computed from the original parameters in float64 and rounded once; as functions of Q and R they can also
be had in another dtype, for learning rotations. arXiv 2404.00456, section 4; biases of v are rotated too, which the
reference code leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.errors import QfarmError
from qfarm.hadamard import Hadamard
from qfarm.layers.linear import transform_input
from qfarm.models.load import LoadedModel

WRITERS = ("o", "down")  # roles whose outputs are added to the hidden states


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bases:
    """The rotations of one model; None leaves a basis as it is."""

    stream: Tensor | None = None  # Q [d, d]
    values: list[Tensor] | None = None  # by block, R [key/value heads, h, h]
    down: Hadamard | None = None  # F
    across: Hadamard | None = None  # A, over query heads


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + epsilon): what is left of a LayerNorm whose input has no mean."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        values = x if x.dtype == torch.float64 else x.float()
        return (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class AcrossHeads:
    """The input of o, its heads mixed by a Hadamard matrix: x [..., heads x head_dim]."""

    heads: Hadamard
    head_dim: int

    def __call__(self, x: Tensor) -> Tensor:
        apart = x.reshape(*x.shape[:-1], self.heads.size, self.head_dim).transpose(-1, -2)
        return self.heads(apart).transpose(-1, -2).reshape(x.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """One linear layer (or table of embeddings) with its original parameters and those of the norm before it."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None = None  # [in]
    shift: Tensor | None = None  # [in]
    reads: bool = False  # its inputs are in the basis of the hidden states
    writes: bool = False  # its outputs are
    block: int = -1
    role: str = ""


class Fusion:
    """A model whose norms have been emptied, and its parameters as functions of rotations.

    Making one opens the model until it is restored: the head's weight becomes its own, LayerNorms become RMS norms and
    biases are made where one is needed. Its parameters must then come from here. Raises QfarmError for an open one.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        if getattr(loaded.model, "qfarm_fused", False):
            raise QfarmError("the model is rotated already")
        loaded.model.qfarm_fused = True
        loaded.on_restore(lambda: delattr(loaded.model, "qfarm_fused"))
        self.loaded = loaded
        self.layers = list(self._layers())
        norms = [loaded.norm(i, group) for i in range(len(loaded.blocks)) for group in loaded.architecture.norms]
        self.norms: list[nn.Module] = [norm for norm in (*norms, loaded.final_norm) if norm is not None]
        self.centred = isinstance(loaded.final_norm, nn.LayerNorm)
        self._open()

    def _layers(self) -> Iterator[_Layer]:
        loaded = self.loaded
        for table in loaded.embeddings:
            assert isinstance(table.weight, Tensor)
            yield _Layer(module=table, weight=table.weight, bias=None, writes=True)
        for block in range(len(loaded.blocks)):
            for group in loaded.architecture.shared_inputs:
                gain, shift = _affine(loaded.norm(block, group))
                for role in group:
                    linear = loaded.linears(block)[role]
                    yield _Layer(
                        module=linear,
                        weight=linear.weight,
                        bias=linear.bias,
                        gain=gain,
                        shift=shift,
                        reads=role not in WRITERS,
                        writes=role in WRITERS,
                        block=block,
                        role=role,
                    )
        gain, shift = _affine(loaded.final_norm)
        head = loaded.head
        yield _Layer(module=head, weight=head.weight, bias=head.bias, gain=gain, shift=shift, reads=True, role="head")

    def _open(self) -> None:
        loaded, config = self.loaded, self.loaded.model.config
        loaded.on_restore(_setting(config, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False)))
        config.tie_word_embeddings = False
        loaded.replace_parameter(loaded.head, "weight", loaded.head.weight.detach().clone())
        for layer in self.layers:
            if layer.shift is not None and layer.bias is None:
                loaded.on_restore(_setting(layer.module, "bias", None))
                layer.module.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
        names = {id(module): name for name, module in loaded.model.named_modules()}
        for norm in self.norms:
            if isinstance(norm, nn.LayerNorm):
                name = names[id(norm)]
                loaded.on_restore(lambda name=name, norm=norm: loaded.model.set_submodule(name, norm))  # type: ignore[misc]
                loaded.model.set_submodule(name, RMSNorm(norm.eps))

    def parameters(self, bases: Bases, dtype: torch.dtype = torch.float64) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """(module, name, value in `dtype`) of every parameter that changes; differentiable in the rotations."""
        for norm in self.norms:
            if not isinstance(norm, nn.LayerNorm):
                assert isinstance(norm.weight, Tensor)
                yield norm, "weight", torch.ones_like(norm.weight, dtype=dtype)
        for layer in self.layers:
            weight = layer.weight.detach().to(dtype)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            if layer.shift is not None:
                bias = weight @ layer.shift.to(dtype) + (0 if bias is None else bias)
            if layer.gain is not None:
                weight = weight * layer.gain.to(dtype)
            weight, bias = self._rotated(layer, weight, bias, bases, dtype)
            yield layer.module, "weight", weight
            if bias is not None:
                yield layer.module, "bias", bias

    def _rotated(
        self, layer: _Layer, weight: Tensor, bias: Tensor | None, bases: Bases, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        table = isinstance(layer.module, nn.Embedding)
        if layer.writes and self.centred:
            weight = weight - weight.mean(1 if table else 0, keepdim=True)
            bias = None if bias is None else bias - bias.mean()
        if layer.role in ("v", "o") and bases.values is not None:
            turns = bases.values[layer.block].to(weight.device, dtype)
            weight, bias = _values(layer.role, weight, bias, turns)
        if layer.role == "o" and bases.across is not None:
            weight = AcrossHeads(bases.across, self.loaded.head_dim)(weight)
        if layer.role == "down" and bases.down is not None:
            weight = bases.down(weight)
        if bases.stream is None:
            return weight, bias
        stream = bases.stream.to(weight.device, dtype)
        if table or layer.reads:
            return weight @ stream, bias
        return stream.T @ weight, None if bias is None else bias @ stream

    def install(self, bases: Bases) -> None:
        """Give the model its rotated parameters and online transforms, until it is restored."""
        loaded = self.loaded
        for module, name, value in self.parameters(bases):
            loaded.replace_parameter(module, name, value)
        self.install_online(bases)

    def install_online(self, bases: Bases) -> None:
        """The transforms that stay at the inputs of layers."""
        for block in range(len(self.loaded.blocks)):
            if bases.across is not None:
                transform_input(self.loaded, block, "o", AcrossHeads(bases.across, self.loaded.head_dim))
            if bases.down is not None:
                transform_input(self.loaded, block, "down", bases.down)


def _values(role: str, weight: Tensor, bias: Tensor | None, turns: Tensor) -> tuple[Tensor, Tensor | None]:
    """v or o with values in another basis; turns [key/value heads, h, h]."""
    heads, width = turns.shape[:2]
    if role == "v":
        rows = weight.reshape(heads, width, -1)
        rotated = None if bias is None else (bias.reshape(heads, 1, width) @ turns).reshape(-1)
        return (turns.transpose(1, 2) @ rows).reshape(weight.shape), rotated
    columns = weight.reshape(len(weight), heads, -1, width)  # query heads of one value head lie side by side
    return torch.einsum("rkgi,kij->rkgj", columns, turns).reshape(weight.shape), bias


def _affine(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm, None for what it has not."""
    found: list[Any] = [getattr(norm, name, None) for name in ("weight", "bias")]
    gain, shift = (None if value is None else value.detach() for value in found)
    return gain, shift


def _setting(target: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(target, name, value)
