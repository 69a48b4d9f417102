"""Sparse: numbers of a growing [batch, tokens, channels] matrix that are kept as they are, row by row.

Rows stand in the order in which they are written, token by token and inside a token sequence by sequence, so that new
tokens are appended. Stored: the numbers, their channels in 16 bits, and in 16 bits how many a row has.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CHANNELS = 32_767  # of an index in 16 bits


class SparseRows:
    """Appended to by token, written into dense tensors, rearranged by sequence."""

    def __init__(self) -> None:
        self.values: Tensor | None = None  # [n]
        self.channels = torch.empty(0, dtype=torch.int16)  # [n]
        self.counts = torch.empty(0, 0, dtype=torch.int16)  # [tokens, batch]

    def append(self, rows: Tensor, mask: Tensor) -> None:
        """Keep those numbers of new tokens where the mask says so; both [batch, tokens, channels]."""
        assert rows.shape[-1] <= MOST_CHANNELS
        chosen = mask.transpose(0, 1)
        values, channels = rows.transpose(0, 1)[chosen], chosen.nonzero()[:, 2].to(torch.int16)
        counts = chosen.sum(-1).to(torch.int16)
        if self.values is None:
            self.values, self.channels, self.counts = values, channels, counts
        else:
            self.values, self.channels = torch.cat([self.values, values]), torch.cat([self.channels, channels])
            self.counts = torch.cat([self.counts, counts])

    def write_into(self, dense: Tensor) -> None:
        """Put the kept numbers where they belong, dense [batch, tokens, channels]."""
        if self.values is not None:
            token, sequence = self._rows()
            dense[sequence, token, self.channels.long()] = self.values.to(dense.dtype)

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences, in this order; one may stand several times."""
        if self.values is None:
            return
        token, sequence = self._rows()
        found = [(sequence == old).nonzero()[:, 0] for old in sequences.tolist()]
        entries = torch.cat(found)
        place = torch.cat([torch.full_like(part, new) for new, part in enumerate(found)])
        order = torch.argsort(token[entries] * len(found) + place, stable=True)
        entries = entries[order]
        self.values, self.channels = self.values[entries], self.channels[entries]
        self.counts = self.counts[:, sequences]

    def to(self, device: torch.device | str) -> None:
        if self.values is not None:
            self.values = self.values.to(device)
        self.channels, self.counts = self.channels.to(device), self.counts.to(device)

    def nbytes(self) -> int:
        stored = [self.channels, self.counts] + ([] if self.values is None else [self.values])
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Token and sequence of each number."""
        counts = self.counts.flatten().long()
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        return row // self.counts.shape[1], row % self.counts.shape[1]
