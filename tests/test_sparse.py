"""Sparse rows against a dense matrix that is treated alike."""

from __future__ import annotations

import torch

from qfarm.layers.sparse import SparseRows


def test_what_is_kept_comes_back_where_it_was_however_it_is_rearranged() -> None:
    draw = torch.manual_seed(0)
    kept, dense, count = SparseRows(), torch.zeros(3, 0, 9), 0
    for tokens in (4, 1, 3):
        rows, mask = torch.randn(3, tokens, 9, generator=draw), torch.rand(3, tokens, 9, generator=draw) < 0.2
        kept.append(rows, mask)
        dense, count = torch.cat([dense, rows * mask], dim=1), count + int(mask.sum())
    assert kept.nbytes() == count * (4 + 2) + 3 * 8 * 2

    def read(batch: int) -> torch.Tensor:
        found = torch.zeros(batch, dense.shape[1], 9)
        kept.write_into(found)
        return found

    assert torch.equal(read(3), dense)
    kept.select(torch.tensor([2, 0, 2, 1]))
    assert torch.equal(read(4), dense[[2, 0, 2, 1]])
    rows = torch.randn(4, 2, 9, generator=draw)
    kept.append(rows, rows > 1)
    kept.select(torch.tensor([1, 3]))
    dense = torch.cat([dense[[0, 1]], (rows * (rows > 1))[[1, 3]]], dim=1)
    assert torch.equal(read(2), dense)


def test_nothing_kept() -> None:
    kept = SparseRows()
    kept.select(torch.tensor([0, 0]))
    dense = torch.ones(2, 3, 4)
    kept.write_into(dense)
    assert dense.sum() == 24 and kept.nbytes() == 0
