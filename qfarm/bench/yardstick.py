"""Yardstick: GPTQ as published, which every weight method's time is divided by.

    W [rows, n]   H [n, n] second moment of the inputs   U upper, H^-1 = U^T U   e = (w - q) / U[j, j]

Frantar et al., arXiv 2210.17323, algorithm 1 with its appendix on lazy batches: blocks of 128 columns, all rows of a
column at once, one linear layer at a time with a Hessian of its own, the factor as Cholesky of the inverse, float32,
columns in natural order. Layers that share an input are not merged and nothing is learned of the result, since the
published code does neither. The grid, the batches and the walk over blocks are qfarm's, so that times differ only by
what a method does; a group's grid is fitted on weights that carry the updates of their own block, as ours are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.bench.stopwatch import Stopwatch
from qfarm.errors import InvalidInput, NonFinite
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid
from qfarm.walk import BATCH_TOKENS, Walk

BLOCK = 128  # columns per lazy update
DAMPING = 0.01  # of the mean diagonal


@dataclasses.dataclass
class RunningHessian:
    """H = 2 / N sum x x^T over N tokens, as a running mean in float32."""

    total: Tensor  # [n, n]
    tokens: int = 0

    def add(self, inputs: Tensor) -> None:
        """inputs [..., n]."""
        x = inputs.reshape(-1, inputs.shape[-1]).T.float()  # [n, tokens]
        self.total *= self.tokens / (self.tokens + x.shape[1])
        self.tokens += x.shape[1]
        x = x * (2 / self.tokens) ** 0.5
        self.total += x @ x.T


def inverse_factor(hessian: Tensor) -> Tensor:
    """U [n, n] with H^-1 = U^T U, by three cubic steps: factor, inverse, factor of the inverse.

    `hessian` is damped in place. Raises NonFinite when it cannot be factored.
    """
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise NonFinite(f"the yardstick's Hessian could not be factored: {error}") from None
    return upper


def solve(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes and dequantized weight, float32 [rows, n]; weight [rows, n]; `hessian` [n, n] is changed."""
    w = weight.float().clone()
    rows, n = w.shape
    size = n if grid.group_size == -1 else grid.group_size
    if size not in (n, BLOCK) and BLOCK % size:
        raise InvalidInput(f"the yardstick's blocks of {BLOCK} columns hold no whole groups of {size}")
    scale, zero = grid.fit(w) if size == n else (w[:, 0], w[:, 0])
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0
    upper = inverse_factor(hessian)
    codes, values = torch.zeros_like(w), torch.zeros_like(w)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        block, errors = w[:, start:stop].clone(), torch.zeros_like(w[:, start:stop])
        within = upper[start:stop, start:stop]
        for i in range(stop - start):
            column = block[:, i]
            if size < n and (start + i) % size == 0:
                scale, zero = grid.fit(block[:, i : i + size])
            code = grid.encode(column, scale, zero)
            value = (code - zero) * scale
            codes[:, start + i], values[:, start + i] = code, value
            error = (column - value) / within[i, i]
            block[:, i:] -= error[:, None] @ within[i, i:][None]
            errors[:, i] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes, values


def quantize_model(loaded: LoadedModel, windows: Tensor, grid: Grid, watch: Stopwatch) -> None:
    """Quantize every decoder linear in place; windows [samples, length] are token ids.

    Each block is run twice, as in `statistics: sequential`: once to learn, once to feed the next block. Raises
    InvalidInput for a group size that blocks of columns cannot hold, NonFinite for a singular Hessian.
    """
    with watch("forwards"):
        walk = Walk(loaded, windows, BATCH_TOKENS)
    for index in range(len(loaded.blocks)):
        linears = loaded.linears(index)
        with watch("forwards"):
            hessians = _collect(walk, index, linears, watch)
        for role, linear in linears.items():
            with watch("solving"):
                _, values = solve(linear.weight.detach(), hessians.pop(role).total, grid)
            loaded.replace_weight(linear, values)
        if index + 1 < len(loaded.blocks):
            with watch("forwards"):
                walk.advance(index)


def _collect(walk: Walk, index: int, linears: dict[str, nn.Linear], watch: Stopwatch) -> dict[str, RunningHessian]:
    def zeros(linear: nn.Linear) -> Tensor:
        return torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    hessians = {role: RunningHessian(zeros(linear)) for role, linear in linears.items()}
    with contextlib.ExitStack() as stack:
        for role, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(_feeder(hessians[role], watch)).remove)
        walk.outputs(index)
    return hessians


def _feeder(hessian: RunningHessian, watch: Stopwatch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        with watch("statistics"):
            hessian.add(args[0])

    return hook
