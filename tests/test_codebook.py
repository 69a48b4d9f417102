"""Codebooks: optima by brute force, fixed levels by their published digits, quantiles against torch's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qfarm import codebook
from qfarm.codebook import kmeans_levels, nearest_level, normal_levels, percentiles


def objective(values: Tensor, weights: Tensor, levels: Tensor) -> float:
    return float((weights * (values[:, None] - levels).square().amin(dim=1)).double().sum())


def best(values: Tensor, weights: Tensor, count: int) -> float:
    """The least objective of all ways to cut sorted values into `count` segments."""
    order = values.argsort()
    values, weights = values[order].double(), weights[order].double()
    found = []
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        edges = [0, *cuts, len(values)]
        parts = [(values[a:b], weights[a:b]) for a, b in itertools.pairwise(edges)]
        found.append(sum(float((w * (v - (w * v).sum() / w.sum()) ** 2).sum()) for v, w in parts))
    return min(found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [2, 4])
def test_levels_are_optimal_for_few_numbers(seed: int, count: int) -> None:
    draw = torch.manual_seed(seed)
    values, weights = torch.randn(11, generator=draw), torch.rand(11, generator=draw) ** 4
    levels = kmeans_levels(values, weights, count)
    assert levels.tolist() == sorted(levels.tolist()) and len(set(levels.tolist())) == count
    assert objective(values, weights, levels) == pytest.approx(best(values, weights, count), rel=1e-5)


def test_a_weight_that_outweighs_all_others_gets_a_level() -> None:
    values = torch.linspace(-1, 1, 101)
    weights = torch.where(values == values[83], 1e9, 1.0)
    assert (kmeans_levels(values, weights, 4) - values[83]).abs().min() < 1e-6


def test_equal_weights_are_no_weights() -> None:
    values = torch.randn(300, generator=torch.manual_seed(0))
    levels = kmeans_levels(values, torch.full_like(values, 1e-20), 8)
    assert torch.equal(levels, kmeans_levels(values, torch.ones_like(values), 8))
    assert torch.equal(levels, kmeans_levels(values, torch.zeros_like(values), 8))


def test_many_numbers_go_through_bins_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the exact optimum of the same numbers; and Lloyd's iteration does better than the bins alone."""
    draw = torch.manual_seed(0)
    values, weights = torch.randn(2000, generator=draw), torch.rand(2000, generator=draw)
    monkeypatch.setattr(codebook, "COARSE", 2000)
    exact = objective(values, weights, kmeans_levels(values, weights, 8))
    monkeypatch.setattr(codebook, "COARSE", 24)
    monkeypatch.setattr(codebook, "FINE", 1000)
    found = objective(values, weights, kmeans_levels(values, weights, 8))
    monkeypatch.setattr(codebook, "ITERATIONS", 0)
    assert exact <= found < 1.01 * exact < objective(values, weights, kmeans_levels(values, weights, 8))


def test_fewer_distinct_numbers_than_levels() -> None:
    assert kmeans_levels(torch.tensor([2.0, 1.0, 2.0]), torch.ones(3), 4).tolist() == [1, 2, 2, 2]
    assert kmeans_levels(torch.empty(0), torch.empty(0), 2).tolist() == [0, 0]


def test_normal_levels_are_the_published_ones() -> None:
    three = [-1.0, -0.4786, -0.2171, 0.0, 0.1609, 0.3379, 0.5626, 1.0]
    torch.testing.assert_close(normal_levels(3), torch.tensor(three), rtol=0, atol=5e-5)
    torch.testing.assert_close(normal_levels(2), torch.tensor([-1.0, 0.0, 0.3379, 1.0]), rtol=0, atol=5e-5)
    assert len(normal_levels(4)) == 16


def test_ties_go_to_the_lower_level() -> None:
    levels = torch.tensor([-0.9, -0.3, 0.2, 0.8])
    values = torch.tensor([-2.0, -0.61, -0.59, 0.5, 0.51, 9.0])
    expected = (values[:, None] - levels).abs().argmin(dim=1)
    assert nearest_level(values, levels).tolist() == expected.tolist()
    assert nearest_level(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).tolist() == [0]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("n", [1, 2, 16, 192, 1001])
def test_percentiles_are_torch_quantiles(n: int, share: float) -> None:
    values = torch.randn(3, n, generator=torch.manual_seed(n))
    for found, q in zip(percentiles(values, share), (share, 1 - share), strict=True):
        torch.testing.assert_close(found, values.quantile(q, dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)
