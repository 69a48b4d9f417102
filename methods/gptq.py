"""GPTQ: quantize column by column and let later columns make up for the error of earlier ones.

    H = second moment of the layer's inputs    minimise tr((W - Q) H (W - Q)^T)    (arXiv 2210.17323, section 3)

The column loop is qfarm.solver; this file decides the order of columns, where grids are fitted, and what to do when
the result is worse than rounding to nearest.

Orders, and what each costs at inference:

    natural       columns as they stand                                                         nothing
    act_order     descending diag(H); with dynamic groups, groups follow that order             g_idx [columns]
    group_aware   groups by their largest diag(H), columns by diag(H) inside each (2505.14638)  nothing

By default group_aware is used with groups and act_order without: a massive activation (one token hundreds of times
larger than the rest) makes H nearly rank one, and when its channel comes late in natural order the few columns
behind it absorb errors of many grid steps. Damping does not help, since it is relative to the same diagonal. An order
brings GPTQ back to about the error of RTN on ordinary tokens; `token_norm` lets it gain again.

Stored: codes, scales, zeros, and g_idx for act_order with dynamic groups. Beside a method that provides another grid
(`gptq+qrazor`) the loop rounds on that one, and what is stored is that method's.

Differences from IST-DASLab/gptq: grids are fitted on weights that carry all earlier updates (the reference misses
those of the same block when the group is smaller than 128; `stale_block: 128` does so too, for published figures with
such groups); scales are rounded to their storage dtype before use; dead inputs do not enter the mean diagonal; H is a
plain mean over tokens (its scale has no influence). To reproduce a published run also set the order that it used and
`scale_dtype: float32`, and for symmetric grids `convention: full_range_offset`. A layer whose Hessian cannot be
factored, or whose result is not finite at any damping of DAMPINGS either, is rounded to nearest and says so. Layers
that share an input are judged together by `on_worse`. Asymmetric calibration (GPTAQ) is not here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import QuantizedWeight, UniformWeight
from qfarm.quantizer import Convention, Grid
from qfarm.recipe import STRICT, WeightSolver
from qfarm.solver import ColumnGrid, Factor, Solution, factorise, group_aware_order, solve

DAMPINGS = (0.1, 1.0)  # tried in turn after a result that is not finite


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GPTQ(WeightSolver):
    source = "Frantar et al., ICLR 2023, arXiv 2210.17323; group-aware order: arXiv 2505.14638"
    later = frozenset({"stale_block"})
    takes_grids = True

    act_order: bool | None = Field(None, description="columns by descending diag(H); default: when there are no groups")
    group_aware: bool | None = Field(
        None, description="order inside and between groups; default: grouped, no act_order"
    )
    static_groups: bool = Field(
        False, description="fit every group's grid on the untouched weights, those of dead inputs as zeros"
    )
    stale_block: int | None = Field(
        None, ge=2, description="fit grids on weights as its block of that many columns found them; published code: 128"
    )
    sequential: bool = Field(False, description="true-sequential: layers of a block see their quantized predecessors")
    damping: float = Field(0.01, gt=0, lt=1, description="added to diag(H), as a fraction of its mean (percdamp)")
    damping_increment: float = Field(0.01, gt=0, lt=1, description="raise of damping after a failed factorisation")
    search: bool = Field(False, description="search a clipped range per group, error norm 2.4 (mse)")
    convention: Convention = Field("restricted", description="symmetric grid: restricted, full_range_offset, deepspeed")
    token_norm: bool = Field(False, description="scale tokens down to 4x the median norm before they enter H")
    on_worse: Literal["report", "retry", "rtn"] = Field(
        "report", description="when RTN has the smaller error on ordinary tokens: say so, try other orders, or use RTN"
    )

    @property
    def cell_version(self) -> int:
        return self.version + self.static_groups  # whose grids once included the weights of dead inputs

    def resolve(self, group_size: int) -> Self:
        grouped = group_size != -1
        act_order = (not grouped and not self.group_aware) if self.act_order is None else self.act_order
        aware = (grouped and not act_order) if self.group_aware is None else self.group_aware
        fresh = self.stale_block is not None and grouped and group_size % self.stale_block == 0
        stale = None if fresh else self.stale_block  # a group that starts with its block is fitted on current weights
        return dataclasses.replace(self, act_order=act_order, group_aware=aware, stale_block=stale)

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.act_order and self.group_aware:
            return "act_order and group_aware are two orders; choose one"
        if self.group_aware and group_size == -1:
            return "group_aware needs groups; without them use act_order"
        if self.static_groups and group_size == -1:
            return "static_groups needs groups"
        if self.stale_block is not None:
            return self._stale_refusal(self.stale_block, group_size)
        return None

    def _stale_refusal(self, block: int, group_size: int) -> str | None:
        if group_size == -1:
            return "stale_block needs groups"
        if self.static_groups:
            return "static_groups are fitted before any block; leave stale_block out"
        if block % group_size and group_size % block:
            return f"groups of {group_size} straddle blocks of {block}; stale_block takes multiples of the group size"
        return None

    def statistics(self) -> frozenset[Statistic]:
        wanted = {Statistic.SAMPLE, Statistic.NORMALISED_HESSIAN if self.token_norm else Statistic.HESSIAN}
        if self.on_worse == "retry":
            wanted.add(Statistic.NORMALISED_HESSIAN)
        return frozenset(wanted)

    @property
    def true_sequential(self) -> bool:
        return self.sequential

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        assert inputs is not None
        me = self.resolve(grid.group_size)
        grid = dataclasses.replace(grid, search=self.search, convention=self.convention)
        rtn = grid.nearest(weight) if isinstance(grid, ColumnGrid) else grid.quantize(weight)
        error_of = inputs.ordinary_errors(weight)
        rtn_error = error_of(rtn.dequantize())
        best = me._attempt(weight, inputs, grid)
        if best is None:
            rtn.notes = {"reason": "the Hessian could not be factored, or the result was not finite"}
            return rtn
        error = error_of(best.dequantize())
        if error > rtn_error and self.on_worse == "retry":
            best, error = me._retry(weight, inputs, grid, best, error, rtn_error)
        if error > rtn_error and self.on_worse != "report":
            rtn.notes = {"reason": f"gptq was worse on ordinary tokens: {error:.4g} against {rtn_error:.4g}"}
            return rtn
        best.notes |= {"ordinary_error": error, "ordinary_error_rtn": rtn_error}
        return best

    def _retry(
        self, weight: Tensor, inputs: InputStatistics, grid: Grid, best: QuantizedWeight, error: float, bound: float
    ) -> tuple[QuantizedWeight, float]:
        """Other orders, then the token-normalised Hessian; the first that is not worse than RTN, or the best."""
        grouped = grid.group_size != -1
        ordered = dataclasses.replace(self, act_order=not grouped, group_aware=grouped)
        for other in (ordered, dataclasses.replace(ordered, token_norm=True)):
            if error <= bound:
                break
            result = other._attempt(weight, inputs, grid) if other != self else None
            if result is None:
                continue
            other_error = inputs.ordinary_error(weight, result.dequantize())
            if other_error < error:
                best, error = result, other_error
                retried = "gptq retry" + (" token_norm" if other.token_norm else "")
                best.solver = best.solver.replace("gptq", retried, 1)
        return best, error

    def _attempt(self, weight: Tensor, inputs: InputStatistics, grid: Grid) -> QuantizedWeight | None:
        """One GPTQ solution; None when the Hessian cannot be factored or the result is not finite."""
        hessian = inputs.normalised_hessian if self.token_norm else inputs.hessian
        assert hessian is not None
        order = column_order(hessian.diagonal(), grid.group_size, self)
        for damping in (self.damping, *(d for d in DAMPINGS if d > self.damping)):
            try:
                factor = factorise(hessian, order, damping, self.damping_increment)
                if not isinstance(grid, ColumnGrid):
                    return gptq(weight, factor, grid, self)
                made = grid.compensate(weight, factor, static=self.static_groups)
                made.solver = f"gptq+{made.solver}"
                return made
            except NonFinite:
                if not bool(torch.isfinite(hessian).all() and torch.isfinite(weight).all()):
                    raise  # the model itself is broken: no fallback may hide that
        return None


METHOD = GPTQ


def column_order(diagonal: Tensor, group_size: int, options: GPTQ) -> Tensor:
    """Position in the loop -> original column, int64 [n]. Ties keep the natural order."""
    if options.act_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    if options.group_aware:
        return group_aware_order(diagonal, group_size)
    return torch.arange(len(diagonal), device=diagonal.device)


def gptq(weight: Tensor, factor: Factor, grid: Grid, options: GPTQ, **loop: Any) -> UniformWeight:
    """Quantize weight [rows, n] with a factored Hessian."""
    n = weight.shape[1]
    size = n if grid.group_size == -1 else grid.group_size
    static = options.static_groups or grid.group_size == -1
    # As in the reference, a row's grid is fitted before dead columns are zeroed, those of groups after it.
    seen = weight.float() if size == n else weight.float().masked_fill(factor.dead, 0.0)
    fixed = [t.T for t in grid.fit(seen.reshape(len(weight), n // size, size))] if static else []  # 2 x [groups, rows]
    order = factor.order
    columns = weight.float().T.contiguous().index_select(0, order)  # [n, rows]: gathering rows is cheap
    columns[factor.dead[order]] = 0.0
    live = columns.T  # [rows, n], in the loop's order

    if static and options.act_order and size < n:
        solution = solve(live, factor.upper, grid, size=1, fit=lambda j, _: _pick(fixed, int(order[j]) // size), **loop)
        scale, zero = fixed
    else:

        def fit(j: int, current: Tensor) -> tuple[Tensor, Tensor]:
            return _pick(fixed, int(order[j]) // size) if static else grid.fit(current.T)

        if options.stale_block is None:
            solution = solve(live, factor.upper, grid, size=size, fit=fit, **loop)
        else:
            solution = solve_stale(live, factor.upper, grid, options.stale_block, **loop)
        scale, zero = solution.scale, solution.zero
    inverse = torch.argsort(order)
    g_idx = None
    if size < n and not static:
        if options.act_order:
            g_idx = (inverse // size).to(torch.int32)
        else:  # groups were visited in another order: put them back
            back = torch.argsort(order[::size] // size)
            scale, zero = scale[back], zero[back]
    elif size < n:
        scale, zero = fixed
    codes = solution.codes.to(torch.uint8)[inverse].T.contiguous()
    result = UniformWeight.build(grid, codes, scale.T.contiguous(), zero.T.contiguous(), "gptq", g_idx)
    result.notes = {"damping": factor.damping, "loss": solution.loss} | _drift(solution, columns)
    if not bool(torch.isfinite(solution.values).all()):
        raise NonFinite("GPTQ produced NaN or Inf")
    return result


def solve_stale(weight: Tensor, upper: Tensor, grid: Grid, block: int, **loop: Any) -> Solution:
    """The column loop with grids that miss the updates of their own block; groups divide blocks.

    weight [rows, n]. What the published code does, whose blocks are applied lazily to the weights it fits grids on.
    """
    rows, size = len(weight), grid.group_size
    per_block, groups = block // size, weight.shape[1] // size

    def fit(_: int, current: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = grid.fit(current.T.reshape(rows, -1, size))  # [rows, groups of the block]
        missing = (0, per_block - scale.shape[1])  # of a short last block
        return torch.nn.functional.pad(scale, missing, value=1.0), torch.nn.functional.pad(zero, missing)

    def rounding(j: int, column: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        s, z = scale[:, j % block // size], zero[:, j % block // size]
        codes = grid.encode(column, s, z)
        return codes, (codes - z) * s

    solution = solve(weight, upper, grid, size=block, fit=fit, rounding=rounding, **loop)
    # [blocks, rows, groups of a block] -> [groups, rows]
    scale, zero = (t.transpose(1, 2).reshape(-1, rows)[:groups] for t in (solution.scale, solution.zero))
    return dataclasses.replace(solution, scale=scale, zero=zero)


def _pick(grids: list[Tensor], group: int) -> tuple[Tensor, Tensor]:
    return grids[0][group], grids[1][group]


def _drift(solution: Solution, columns: Tensor) -> dict[str, float]:
    """How far compensation moved weights: the largest move in grid steps, and the share of weights that clipped.

    columns [n, rows] are the weights that the loop began with.
    """
    shape = (len(solution.scale), -1, columns.shape[1])  # [groups, columns of a group, rows]
    scale = solution.scale[:, None]
    moved = (solution.updated - columns).abs_().view(shape).div_(scale)
    clipped = (solution.updated - solution.values).abs_().view(shape) > scale * 0.501
    return {"drift_steps": float(moved.max()), "clipped": float(clipped.float().mean())}
