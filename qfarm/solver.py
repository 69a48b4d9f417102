"""Error-compensating column solver: the core of GPTQ, shared by every method that builds on it.

    W [rows, n]   H [n, n] second moment of the inputs   U upper, H^-1 = U^T U   e = (w - q) / U[j, j]

Columns are quantized one after another; the error of column j is pushed onto the later ones, `W[:, k] -= e U[j, k]`,
which greedily minimises tr((W - Q) H (W - Q)^T) (Frantar et al., arXiv 2210.17323).

The published code applies updates lazily in blocks of 128 and fits a group's grid on weights that have not received
their own block's updates. Here the column range is halved recursively instead: solve the left half, push its errors
onto the right half in one matrix product, solve the right half. The result does not depend on the leaf size, almost
all work is in large products, and halves end on group boundaries, so that every grid is fitted on current weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.quantizer import Grid

if TYPE_CHECKING:
    from qfarm.quantized import QuantizedWeight

LEAF = 32  # columns solved one by one; never changes the result
TRIANGLE = 128  # triangles up to this size are inverted by substitution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """The factor of a damped Hessian in a given column order."""

    upper: Tensor  # U [n, n], float32
    order: Tensor  # [n], int64: position in the loop -> original column
    dead: Tensor  # [n], bool, original order: inputs that were always zero
    damping: float  # fraction of the mean diagonal that was added in the end


def factorise(hessian: Tensor, order: Tensor, damping: float, increment: float) -> Factor:
    """Factor H [n, n] after damping, in float64.

    With J the reversal of the index and `J H J = L L^T`, `U = J L^-1 J` satisfies `H^-1 = U^T U`: one Cholesky and
    one triangular inverse. A failed factorisation raises the damping by `increment` while it stays below 1, then
    raises the diagonal's floor tenfold up to six times. Dead inputs (zero diagonal) get the mean diagonal of the
    others, where the reference code writes 1; that keeps the result independent of the scale of H.

    Raises NonFinite when H holds NaN or Inf, or when nothing makes it factorable.
    """
    if not _finite(hessian):
        raise NonFinite("the calibration inputs hold NaN or Inf")
    diagonal = hessian.diagonal().double()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    # Gathered as J H J in float32, which moves half the bytes; float64 starts here.
    backwards = order.flip(0)
    h = hessian.index_select(0, backwards).index_select(1, backwards).double()
    base = torch.where(dead, mean, diagonal)[backwards]
    tried = damping
    while tried < 1 or tried == damping:
        upper = _upper(h, base + tried * mean)
        if upper is not None:
            return Factor(upper=upper, order=order, dead=dead, damping=tried)
        tried += increment
    top = float(base.abs().max())
    for power in range(6):
        floor = 1e-6 * top * 10**power
        upper = _upper(h, base.clamp(min=floor))
        if upper is not None:
            return Factor(upper=upper, order=order, dead=dead, damping=floor / mean)
    raise NonFinite(f"the Hessian could not be factored even with damping {tried:.2f}")


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())  # NaN is the least and the largest of all


def _upper(h: Tensor, diagonal: Tensor) -> Tensor | None:
    """U in float32 from J H J, float64, and the diagonal that it is given (in place)."""
    h.diagonal().copy_(diagonal)
    lower, info = torch.linalg.cholesky_ex(h)
    if int(info) != 0:
        return None
    upper = _invert_lower(lower).float().flip(0, 1)
    return upper if _finite(upper) and bool((upper.diagonal() > 0).all()) else None


def _invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, overwriting it: [[A, 0], [C, B]] -> [[A', 0], [-B' C A', B']].

    Two thirds of the arithmetic of solving against the identity, nearly all of it in large products.
    """
    n = len(lower)
    if n <= TRIANGLE:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
    half = n // 2
    first, last = _invert_lower(lower[:half, :half]), _invert_lower(lower[half:, half:])
    lower[half:, :half] = (last @ lower[half:, :half] @ first).neg_()
    return lower


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnGrid(Grid):
    """A grid that is not uniform, but on which columns can be rounded one after another."""

    def nearest(self, weight: Tensor) -> QuantizedWeight:
        """Round to nearest: weight [rows, n]."""
        raise NotImplementedError

    def compensate(self, weight: Tensor, factor: Factor, *, static: bool = False) -> QuantizedWeight:
        """The column loop on this grid; static: groups are fitted on the untouched weights.

        Raises NonFinite when the result is not finite.
        """
        raise NotImplementedError


def group_aware_order(diagonal: Tensor, group_size: int) -> Tensor:
    """Position in the loop -> original column, int64 [n], with groups kept whole (arXiv 2505.14638).

    Groups by their largest diag(H), columns by diag(H) inside each, both descending; ties keep the natural order.
    """
    groups = diagonal.reshape(-1, group_size)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    between = torch.argsort(groups.amax(dim=1), descending=True, stable=True)
    start = torch.arange(0, len(diagonal), group_size, device=diagonal.device)
    return (inside + start[:, None])[between].reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
    """Result of the column loop, in the loop's order; positions are rows, so that a column is contiguous."""

    codes: Tensor  # float32 [n, rows]
    values: Tensor  # float32 [n, rows], dequantized
    updated: Tensor  # float32 [n, rows]: the weight as it stood when its column was rounded
    scale: Tensor  # float32 [groups, rows]
    zero: Tensor  # float32 [groups, rows]
    loss: float  # sum of e^2 = tr((W - Q) H (W - Q)^T)


# Gives scale and zero, each [rows], for the group that starts at a position, from its current weights [g, rows].
FitGroup = Callable[[int, Tensor], tuple[Tensor, Tensor]]
# Gives codes and values, each [rows], of the column at a position from its current weights, scale and zero.
RoundColumn = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def solve(
    weight: Tensor,
    upper: Tensor,
    grid: Grid,
    *,
    size: int,
    fit: FitGroup,
    leaf: int = LEAF,
    rounding: RoundColumn | None = None,
) -> Solution:
    """Quantize weight [rows, n], already in the factor's order.

    `size` is the number of consecutive positions for which `fit` is called once, at their first position. `rounding`
    replaces the grid's; scale and zero are then whatever `fit` gives, with rows as their first axis.
    """
    current = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    loop = _Loop(current, upper, grid, size, fit, leaf, rounding)
    loop.range(0, weight.shape[1])
    if rounding is None:  # steps from the grid's zero -> codes
        for codes, zero in zip(torch.split(loop.codes, size), loop.zero, strict=True):
            codes.add_(zero)
    return Solution(
        codes=loop.codes,
        values=loop.values,
        updated=loop.weight,
        scale=torch.stack(loop.scale),
        zero=torch.stack(loop.zero),
        loss=float(torch.linalg.vector_norm(loop.error, dtype=torch.float64)) ** 2,
    )


class _Loop:
    def __init__(
        self,
        weight: Tensor,
        upper: Tensor,
        grid: Grid,
        size: int,
        fit: FitGroup,
        leaf: int,
        rounding: RoundColumn | None,
    ) -> None:
        self.weight, self.upper, self.grid, self.size, self.fit, self.leaf = weight, upper, grid, size, fit, leaf
        self.rounding = rounding
        self.codes, self.values, self.error = (torch.empty_like(weight) for _ in range(3))
        self.scale: list[Tensor] = []
        self.zero: list[Tensor] = []
        self.limits: tuple[Tensor, Tensor] = (weight[0], weight[0])  # lowest and highest step of the current group
        self.pivots: list[float] = upper.diagonal().tolist()
        # Indexing a tensor costs as much as an operation on one of its rows.
        self.rows = [tensor.unbind() for tensor in (weight, self.codes, self.values, self.error)]

    def range(self, start: int, stop: int) -> None:
        if stop - start <= self.leaf:
            self._columns(start, stop)
            return
        # A group must be complete in one half, or lie in a range that its own fit precedes.
        unit = self.size if stop - start > self.size else 1
        middle = start + max(unit, (stop - start) // 2 // unit * unit)
        self.range(start, middle)
        self.weight[middle:stop].addmm_(self.upper[start:middle, middle:stop].T, self.error[start:middle], alpha=-1)
        self.range(middle, stop)

    def _columns(self, start: int, stop: int) -> None:
        # Inside a leaf a group that reaches beyond it was fitted at its first position, with all updates in place.
        within = self.upper[start:stop, start:stop]
        for j in range(start, stop):
            if j % self.size == 0:
                self._fit(j)
            self._round(j)
            if j + 1 < stop:
                i = j - start
                self.weight[j + 1 : stop].addr_(within[i, i + 1 :], self.rows[3][j], alpha=-1)

    def _fit(self, j: int) -> None:
        scale, zero = self.fit(j, self.weight[j : j + self.size])
        self.scale.append(scale)
        self.zero.append(zero)
        if self.rounding is None:
            self.limits = (self.grid.bottom - zero, self.grid.top - zero)

    def _round(self, j: int) -> None:
        weight, codes, values, error = (rows[j] for rows in self.rows)
        if self.rounding is not None:
            found = self.rounding(j, weight, self.scale[-1], self.zero[-1])
            for target, value in zip((codes, values), found, strict=True):
                target.copy_(value)
        else:  # Grid.encode with the zero moved into the limits: fewer operations, the same bits
            torch.div(weight, self.scale[-1], out=codes).round_().clamp_(*self.limits)
            torch.mul(codes, self.scale[-1], out=values)
        torch.sub(weight, values, out=error).div_(self.pivots[j])
