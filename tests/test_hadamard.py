"""Hadamard matrices: Paley's and Sylvester's identities, fast against dense, fallbacks that say so."""

from __future__ import annotations

import math

import pytest
import torch

from qfarm.hadamard import Hadamard, hadamard, jacobsthal, paley_order, random_hadamard, random_orthogonal, sylvester

# Orders and fields that the sizes of common models come down to.
PALEY = [12, 20, 28, 36, 44, 52, 60, 68, 76, 100, 108, 140, 148, 344, 684, 924]
SIZES = {
    **{768: 12, 1536: 12, 3072: 12, 12288: 12, 2560: 20, 5120: 20, 896: 28, 3584: 28, 14336: 28, 28672: 28},
    **{6656: 52, 17408: 68, 4864: 76, 9728: 76, 25600: 100, 13824: 108, 27648: 108, 8960: 140, 17920: 140},
    **{18944: 148, 11008: 344, 10944: 684, 29568: 924, 576: 36, 152: 76, 176: 44, 64: 1, 128: 1, 4096: 1},
}


@pytest.mark.parametrize("order", PALEY)
def test_generated_matrices_are_hadamard_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("q", [5, 7, 9, 27, 25])
def test_jacobsthal_identities(q: int) -> None:
    """J J^T = q I - 1, rows sum to zero, symmetric exactly for q = 1 mod 4."""
    j = jacobsthal(q)
    eye, ones = torch.eye(q, dtype=torch.float64), torch.ones(q, q, dtype=torch.float64)
    assert torch.equal(j @ j.T, q * eye - ones) and float(j.sum(1).abs().max()) == 0
    assert torch.equal(j.T, j if q % 4 == 1 else -j)


def test_quadratic_residues_of_a_prime() -> None:
    assert jacobsthal(7)[:, 0].tolist() == [0, 1, 1, -1, 1, -1, -1]


def test_orders_without_a_construction_are_errors() -> None:
    for order in (14, 92):
        assert paley_order(order) is None
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
            hadamard(order)
    with pytest.raises(ValueError, match="no field of 6 elements"):
        jacobsthal(6)


@pytest.mark.parametrize(("size", "order"), SIZES.items())
def test_sizes_of_models_have_one(size: int, order: int) -> None:
    assert paley_order(size) == order and Hadamard(size).exact


@pytest.mark.parametrize("size", [1, 2, 64, 128, 152, 176, 576, 896, 1536])
def test_the_fast_transform_is_the_dense_matrix(size: int) -> None:
    transform = Hadamard(size)
    dense = transform.dense()
    torch.testing.assert_close(dense @ dense.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(dense.abs(), torch.full_like(dense, 1 / math.sqrt(size)), rtol=1e-12, atol=0)
    order = paley_order(size)
    assert order is not None
    expected = torch.kron(hadamard(order), sylvester(size // order)) / math.sqrt(size)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-12)
    x = torch.randn(3, 2, size, generator=torch.manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ dense, rtol=0, atol=1e-11)
    torch.testing.assert_close(transform.back(transform(x)), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [12, 172 * 2, 14, 13696])
def test_it_cancels_between_weight_rows_and_activations(size: int) -> None:
    """Also where the matrix is not symmetric, and in the fallbacks."""
    generator = torch.manual_seed(1)
    x, w = (torch.randn(rows, size, generator=generator) for rows in (5, 3))
    transform = Hadamard(size)
    torch.testing.assert_close(transform(x) @ transform(w).T, x @ w.T, rtol=1e-5, atol=1e-3)
    assert transform(x.bfloat16()).dtype == torch.bfloat16


def test_fallbacks_say_what_they_are() -> None:
    blocks, random = Hadamard(13696), Hadamard(14)
    assert not blocks.exact and blocks.how.endswith("block-diagonal, blocks of 128")
    assert not random.exact and random.how.endswith("a random orthogonal matrix of 7 instead")
    assert Hadamard(576).how == "Hadamard of 576 = 36 x 16" and Hadamard(64).how == "Hadamard of 64"
    x = torch.zeros(13696)
    x[200] = 1
    spread = blocks(x)
    assert int((spread != 0).sum()) == 128 and bool((spread[128:256] != 0).all())


def test_one_huge_entry_is_spread() -> None:
    x = torch.zeros(1536)
    x[7] = 1000.0
    peak = x.abs().max() / x.square().mean().sqrt()
    spread = Hadamard(1536)(x)
    assert float(peak) == pytest.approx(math.sqrt(1536), rel=1e-5)
    assert float(spread.abs().max() / spread.square().mean().sqrt()) == pytest.approx(1, rel=1e-4)


def test_random_matrices_are_orthogonal_and_follow_their_seed() -> None:
    for make in (random_orthogonal, random_hadamard):
        first, again, other = (make(24, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        torch.testing.assert_close(first @ first.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.equal(first, again) and not torch.equal(first, other)
