"""Descent on the orthogonal group: the step's identities, a toy that it solves, gradients through rounding."""

from __future__ import annotations

import pytest
import torch

from qfarm.cayley import nearest_orthogonal, skew, step, straight_through
from qfarm.hadamard import random_orthogonal
from qfarm.layers.rtn import Symmetric


def orthogonal(n: int = 32, seed: int = 0) -> torch.Tensor:
    return random_orthogonal(n, torch.Generator().manual_seed(seed))


def noise(n: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_direction_is_skew_and_vanishes_off_the_group() -> None:
    rotation, gradient = orthogonal(), noise()
    w = skew(rotation, gradient)
    torch.testing.assert_close(w, -w.T, rtol=0, atol=1e-12)
    # G = S R with S symmetric is orthogonal to the group: no direction. (R Y with W X^T: on the left of X^T.)
    normal = rotation @ (gradient + gradient.T)
    assert float(skew(rotation, normal).abs().max()) < 1e-12
    assert torch.equal(step(rotation, torch.zeros(32, 32, dtype=torch.float64), 1.0), rotation)


def test_a_short_step_follows_the_direction() -> None:
    """dY / da = W X^T at a = 0, by a difference."""
    rotation, gradient, length = orthogonal(), noise(), 1e-6
    moved = (step(rotation, gradient, length) - rotation).T / length
    expected = skew(rotation, gradient) @ rotation.T
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)
    assert float((gradient * (moved.T)).sum()) < 0, "downhill"


def test_a_hundred_steps_stay_on_the_group() -> None:
    rotation = orthogonal()
    sign = torch.linalg.det(rotation)
    for seed in range(100):
        rotation = step(rotation, noise(seed=seed), 1.5)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.linalg.det(rotation).sign() == sign.sign()


def test_no_step_is_longer_than_the_norm_allows() -> None:
    rotation, gradient = orthogonal(), noise()
    assert torch.equal(step(rotation, gradient, 1e9), step(rotation, gradient, 1.0))
    torch.testing.assert_close(step(rotation, gradient * 100, 1e9), step(rotation, gradient, 1e9), rtol=0, atol=1e-9)


def test_stacked_matrices_step_apart() -> None:
    rotations = torch.stack([orthogonal(seed=seed) for seed in (0, 1)])
    gradients = torch.stack([noise(seed=2), 5 * noise(seed=3)])
    both = step(rotations, gradients, 0.5)
    for own, rotation, gradient in zip(both, rotations, gradients, strict=True):
        torch.testing.assert_close(own, step(rotation, gradient, 0.5), rtol=0, atol=1e-12)


def test_an_outlier_channel_is_spread() -> None:
    """Fourth moment of x R with one channel of 32 six times the others."""
    x = torch.randn(512, 32, generator=torch.manual_seed(0), dtype=torch.float64)
    x[:, 3] *= 6
    rotation = torch.eye(32, dtype=torch.float64)

    def loss(r: torch.Tensor) -> torch.Tensor:
        y = x @ r
        return (y.pow(4).mean(-1) / y.square().mean(-1).square()).mean()

    before = float(loss(rotation))
    for _ in range(30):
        leaf = rotation.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        rotation = step(leaf.detach(), gradient, 1.5)
    assert before > 6 and float(loss(rotation)) < 3.6


def test_the_nearest_orthogonal_matrix() -> None:
    rotation = orthogonal()
    torch.testing.assert_close(nearest_orthogonal(3 * rotation), rotation)
    found = nearest_orthogonal(rotation + 1e-3 * noise())
    torch.testing.assert_close(found @ found.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 8])
def test_gradients_pass_rounding_unchanged(bits: int) -> None:
    x = torch.randn(3, 8, generator=torch.manual_seed(0)).requires_grad_()
    quantize = Symmetric(bits=bits)
    out = straight_through(quantize)(x)
    assert torch.equal(out, quantize(x.detach()))
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3, 8))
