"""Descent on the orthogonal group: steps that keep a matrix orthogonal, and what lets gradients through a quantizer.

    W = A - A^T,  A = M - X^T X M / 2,  M = -G^T X      X [n, n] orthogonal, G its gradient
    (I - a W / 2) Y = (I + a W / 2) X^T                 X <- Y^T,  a = min(rate, 1 / ||W||_1)

The Cayley transform of arXiv 2002.01113 and 2405.16406. W is skew-symmetric, so Y is orthogonal; it is solved for
exactly, where the reference iterates five times and drifts. Matrices may be stacked [..., n, n].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def skew(rotation: Tensor, gradient: Tensor) -> Tensor:
    """W [..., n, n]: zero where the loss does not change along the orthogonal group."""
    moved = -gradient.transpose(-1, -2) @ rotation
    half = moved - 0.5 * rotation.transpose(-1, -2) @ (rotation @ moved)
    return half - half.transpose(-1, -2)


def step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The rotation one step further against the gradient; no step is longer than 1 / ||W||_1."""
    w = skew(rotation, gradient)
    length = (1 / (w.abs().sum(-2).amax(-1) + 1e-8)).clamp(max=rate)[..., None, None]
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    towards = (eye + 0.5 * length * w) @ rotation.transpose(-1, -2)
    solved: Tensor = torch.linalg.solve(eye - 0.5 * length * w, towards)
    return solved.transpose(-1, -2)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix closest to [..., n, n]: the polar factor, float64."""
    left, _, right = torch.linalg.svd(matrix.double())
    found: Tensor = left @ right
    return found


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return quantize(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(quantize: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The quantizer, whose gradient is that of the identity everywhere."""

    def rounded(x: Tensor) -> Tensor:
        found: Tensor = _Straight.apply(x, quantize)  # type: ignore[no-untyped-call]
        return found

    return rounded
