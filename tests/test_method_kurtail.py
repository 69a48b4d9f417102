"""KurTail: kurtosis of known distributions, gradients, what a descent gains and where it cannot, exactness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qfarm.hadamard import random_hadamard, random_orthogonal
from qfarm.layers.clipped import ClippedAsymmetric
from qfarm.layers.observe import observe
from qfarm.methods.kurtail import KurTail, kurtosis, together
from tests.conftest import TINY
from tests.job_example import changed, labels, matrix
from tests.test_fuse import PROBE, lively, logits
from tests.test_layers_worker import JOB, METHODS, run_all, values
from tests.test_models import loaded


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(rows: int, n: int) -> Tensor:
    return torch.rand(rows, n, generator=draw()) * 2 - 1


def test_kurtosis_of_known_distributions() -> None:
    million = 1_000_000
    assert float(kurtosis(uniform(1, million))) == pytest.approx(1.8, abs=0.01)
    assert float(kurtosis(torch.randn(million, generator=draw()))) == pytest.approx(3, abs=0.05)
    one = -torch.log(1 - torch.rand(million, generator=draw()))
    laplace = one * torch.where(torch.rand(million, generator=draw(1)) < 0.5, -1, 1)
    assert float(kurtosis(laplace)) == pytest.approx(6, abs=0.3)
    assert float(kurtosis(torch.tensor([1.0, -1.0, 1.0, -1.0]))) == 1  # two points: the smallest there is
    assert float(kurtosis(torch.full((8,), 3.0))) == 0


def test_gradient_of_the_loss() -> None:
    samples = torch.randn(2, 5, 6, generator=draw(), dtype=torch.float64)
    rotation = random_orthogonal(6, draw(1))[None].requires_grad_()
    for squared in (False, True):
        method = KurTail(squared=squared)
        assert torch.autograd.gradcheck(lambda r, m=method: m.loss(samples, r).mean(), rotation)


def mixed() -> Tensor:
    """Uniform sources in an unknown basis, in which one channel is ten times the others."""
    x = uniform(512, 32)
    x[:, 5] *= 10
    return together([x @ random_orthogonal(32, draw(3)).float()])


def rounding_error(x: Tensor, rotation: Tensor) -> float:
    y = x @ rotation.float()
    return float((ClippedAsymmetric(bits=4)(y) - y).square().mean())


def test_a_descent_finds_lighter_tails() -> None:
    samples, start = mixed(), random_hadamard(32, draw(1))[None]
    found, before, after = KurTail(steps=200, rows=256).descend(samples, start, draw(2))
    torch.testing.assert_close(found[0] @ found[0].T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-10)
    assert after < before - 0.1
    assert rounding_error(samples[0], found[0]) < rounding_error(samples[0], start[0])


def test_it_is_never_worse_than_its_start() -> None:
    """Steps far too long: the best iterate is kept, each sample's own."""
    samples = torch.cat([mixed(), together([torch.randn(512, 32, generator=draw(4))])])
    start = torch.stack([random_hadamard(32, draw(seed)) for seed in (1, 2)])
    method = KurTail(steps=5, rate=50.0, rows=8)
    found, _, _ = method.descend(samples, start, draw(2))
    assert bool((method.loss(samples, found.float()) <= method.loss(samples, start.float()) + 1e-4).all())


def test_gaussian_numbers_have_nothing_to_gain() -> None:
    samples = together([torch.randn(4096, 32, generator=draw())])
    start = random_hadamard(32, draw(1))[None]
    found, _, _ = KurTail(steps=60).descend(samples, start, draw(2))
    others = together([torch.randn(4096, 32, generator=draw(9))])[0]
    before, after = (rounding_error(others, rotation[0]) for rotation in (start, found))
    assert abs(after / before - 1) < 0.02


def test_one_rotation_for_all_or_one_each() -> None:
    samples = torch.cat([mixed(), mixed().flip(-1)])
    shared, _, _ = KurTail(steps=3).descend(samples, random_hadamard(32, draw())[None], draw())
    own, _, _ = KurTail(steps=3).descend(samples, random_hadamard(32, draw()).expand(2, -1, -1), draw())
    assert shared.shape == (1, 32, 32) and own.shape == (2, 32, 32) and not torch.equal(own[0], own[1])
    first, _, _ = KurTail(steps=3).descend(samples[:1], random_hadamard(32, draw())[None], draw())
    torch.testing.assert_close(own[:1], first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_the_model_computes_the_same(tiny_models: dict[str, Path], family: str) -> None:
    model, method = lively(loaded(tiny_models[family])), KurTail(steps=3)
    plain = logits(model)
    with model.temporary():
        method.prepare(model)
        observed = observe(model, PROBE, method.transform_statistics(), sites=method.learns_from)
    notes = method.transform(model, observed, 0)
    assert notes[0].startswith("kurtosis of inputs ")
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    model.restore()
    assert torch.equal(logits(model), plain)


def test_it_reads_text_and_runs(tmp_path: Path, tiny: Path) -> None:
    found = matrix(changed(methods="[kurtail, kurtail+quarot]", bits="[w4a4kv4]", group_sizes="[-1]"))
    assert labels(found) == ["kurtail w4a4kv4"] and "it folds the norms" in found.invalid[0].rule
    job = JOB.replace(METHODS, "[kurtail: {{steps: 5}}]").replace("[w8a8, w4a8, w4a16, w4kv4, w8a8kv4]", "[w4a4kv4]")
    kl = values(run_all(tmp_path, tiny, job + "symmetric: true\n"), "kl")
    assert 0 < kl["kurtail", "w4a4kv4"] < 2
