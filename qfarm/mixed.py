"""Weights in two widths: most input columns on one symmetric grid per row, the columns of a subspace on a finer one.

    low   columns at b bits, high at B > b        one scale per row for each part

High columns are the last `fraction` of a row, or of every head's part of it (`unit`, for the input of o). Both parts
are fitted before any column is rounded, so in GPTQ's loop every order of columns is as good as the stored one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.layers.clipped import high_count
from qfarm.quantized import UniformWeight
from qfarm.quantizer import Grid
from qfarm.solver import ColumnGrid, Factor, solve


def high_columns(columns: int, fraction: float, unit: int) -> Tensor:
    """Which of `columns` are in the finer part, bool: the trailing ones of every `unit`; 0: of the whole row."""
    unit = unit or columns
    one = torch.arange(unit) >= unit - high_count(fraction, unit)
    return one.repeat(columns // unit)


@dataclasses.dataclass(kw_only=True)
class MixedWeight:
    """Two uniform weights side by side."""

    low: UniformWeight  # its columns in order
    high: UniformWeight | None  # None: no column is
    fraction: float
    unit: int
    solver: str = "rtn"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.low.shape[0], self.low.shape[1] + (0 if self.high is None else self.high.shape[1])

    @property
    def bits(self) -> int:
        return self.low.bits

    @property
    def group_size(self) -> int:
        return -1

    @property
    def payload_bits(self) -> float:
        """Bits per weight of the codes of both parts."""
        parts = [self.low] if self.high is None else [self.low, self.high]
        return sum(part.bits * part.shape[1] for part in parts) / self.shape[1]

    def dequantize(self) -> Tensor:
        low = self.low.dequantize()
        if self.high is None:
            return low
        mask = high_columns(self.shape[1], self.fraction, self.unit).to(low.device)
        found = low.new_empty(self.shape)
        found[:, ~mask], found[:, mask] = low, self.high.dequantize()
        return found

    def stored_bytes(self) -> int:
        return self.low.stored_bytes() + (0 if self.high is None else self.high.stored_bytes())

    def packed(self) -> dict[str, Tensor]:
        high = {} if self.high is None else self.high.packed()
        return self.low.packed() | {name.replace("weight_", "weight_high_", 1): value for name, value in high.items()}

    def row_range(self, start: int, stop: int) -> MixedWeight:
        high = None if self.high is None else self.high.row_range(start, stop)
        return dataclasses.replace(self, low=self.low.row_range(start, stop), high=high, notes=dict(self.notes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedGrid(ColumnGrid):
    """Rows in two parts, each symmetric with a scale of its own."""

    high_bits: int = 8
    fraction: float = 0.125
    unit: int = 0

    def parts(self, columns: int) -> list[tuple[Grid, Tensor]]:
        """The grid of each part and the columns that it has, int64; low first, no part without columns."""
        mask = high_columns(columns, self.fraction, self.unit)
        low = Grid(bits=self.bits, symmetric=True, scale_dtype=self.scale_dtype, search=self.search)
        grids = ((low, ~mask), (dataclasses.replace(low, bits=self.high_bits), mask))
        return [(grid, torch.nonzero(own)[:, 0]) for grid, own in grids if own.any()]

    def nearest(self, weight: Tensor) -> MixedWeight:
        made = [grid.quantize(weight[:, columns.to(weight.device)]) for grid, columns in self.parts(weight.shape[1])]
        return self._weight(made)

    def compensate(self, weight: Tensor, factor: Factor, *, static: bool = False) -> MixedWeight:
        """Scales are those of untouched weights, whatever `static` says: the parts have no groups to wait for."""
        weight, order, parts = weight.float(), factor.order, self.parts(weight.shape[1])
        steps = weight.new_empty(weight.shape[1], weight.shape[0])  # of every column, [n, rows]
        limits = weight.new_empty(weight.shape[1])  # largest code of every column, around zero
        fitted = []
        for grid, columns in parts:
            columns = columns.to(weight.device)
            fitted.append(grid.fit(weight[:, columns]))
            steps[columns] = fitted[-1][0]
            limits[columns] = 2.0 ** (grid.bits - 1) - 1

        steps, top = steps[order], limits[order].tolist()

        def rounding(j: int, column: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            codes = torch.round(column / steps[j]).clamp_(-top[j], top[j])
            return codes, codes * steps[j]

        live = weight.masked_fill(factor.dead, 0.0)[:, order]
        solution = solve(
            live, factor.upper, self, size=weight.shape[1], fit=lambda *_: (steps.T, steps.T), rounding=rounding
        )
        if not bool(torch.isfinite(solution.values).all()):
            raise NonFinite("the column loop produced NaN or Inf")
        codes = torch.empty_like(solution.codes)
        codes[order] = solution.codes  # [n, rows], original order
        made = []
        for (grid, columns), (step, zero) in zip(parts, fitted, strict=True):
            own = codes[columns.to(weight.device)].T + zero[:, None]
            made.append(UniformWeight.build(grid, own.contiguous(), step[:, None], zero[:, None], "gptq"))
        found = self._weight(made)
        found.notes = {"damping": factor.damping, "loss": solution.loss}
        return found

    def _weight(self, parts: list[UniformWeight]) -> MixedWeight:
        low, high = (parts[0], parts[1]) if len(parts) > 1 else (parts[0], None)
        return MixedWeight(low=low, high=high, fraction=self.fraction, unit=self.unit, solver="resq")
