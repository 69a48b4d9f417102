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

Stored: codes, scales, zeros, and g_idx for act_order with dynamic groups.

Differences from IST-DASLab/gptq: grids are fitted on weights that carry all earlier updates (the reference misses
those of the same block when the group is smaller than 128); scales are rounded to their storage dtype before use;
dead inputs do not enter the mean diagonal; H is a plain mean over tokens (its scale has no influence).
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
from qfarm.quantized import UniformWeight
from qfarm.quantizer import Convention, Grid
from qfarm.recipe import STRICT, WeightSolver
from qfarm.solver import Factor, Solution, factorise, group_aware_order, solve


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GPTQ(WeightSolver):
    source = "Frantar et al., ICLR 2023, arXiv 2210.17323; group-aware order: arXiv 2505.14638"

    act_order: bool | None = Field(None, description="columns by descending diag(H); default: when there are no groups")
    group_aware: bool | None = Field(
        None, description="order inside and between groups; default: grouped, no act_order"
    )
    static_groups: bool = Field(False, description="fit every group's grid on the untouched weights")
    sequential: bool = Field(False, description="true-sequential: layers of a block see their quantized predecessors")
    damping: float = Field(0.01, gt=0, lt=1, description="added to diag(H), as a fraction of its mean (percdamp)")
    damping_increment: float = Field(0.01, gt=0, lt=1, description="raise of damping after a failed factorisation")
    search: bool = Field(False, description="search a clipped range per group, error norm 2.4 (mse)")
    convention: Convention = Field("restricted", description="symmetric grid: restricted, full_range_offset, deepspeed")
    token_norm: bool = Field(False, description="scale tokens down to 4x the median norm before they enter H")
    on_worse: Literal["report", "retry", "rtn"] = Field(
        "report", description="when RTN has the smaller error on ordinary tokens: say so, try other orders, or use RTN"
    )

    def resolve(self, group_size: int) -> Self:
        grouped = group_size != -1
        act_order = (not grouped and not self.group_aware) if self.act_order is None else self.act_order
        aware = (grouped and not act_order) if self.group_aware is None else self.group_aware
        return dataclasses.replace(self, act_order=act_order, group_aware=aware)

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.act_order and self.group_aware:
            return "act_order and group_aware are two orders; choose one"
        if self.group_aware and group_size == -1:
            return "group_aware needs groups; without them use act_order"
        if self.static_groups and group_size == -1:
            return "static_groups needs groups"
        return None

    def statistics(self) -> frozenset[Statistic]:
        wanted = {Statistic.SAMPLE, Statistic.NORMALISED_HESSIAN if self.token_norm else Statistic.HESSIAN}
        if self.on_worse == "retry":
            wanted.add(Statistic.NORMALISED_HESSIAN)
        return frozenset(wanted)

    @property
    def true_sequential(self) -> bool:
        return self.sequential

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> UniformWeight:
        assert inputs is not None
        me = self.resolve(grid.group_size)
        grid = dataclasses.replace(grid, search=self.search, convention=self.convention)
        rtn = grid.quantize(weight)
        rtn_error = inputs.ordinary_error(weight, rtn.dequantize())
        best = me._attempt(weight, inputs, grid)
        if best is None:
            rtn.notes = {"reason": "the Hessian could not be factored, or the result was not finite"}
            return rtn
        error = inputs.ordinary_error(weight, best.dequantize())
        if error > rtn_error and self.on_worse == "retry":
            best, error = me._retry(weight, inputs, grid, best, error, rtn_error)
        if error > rtn_error and self.on_worse != "report":
            rtn.notes = {"reason": f"gptq was worse on ordinary tokens: {error:.4g} against {rtn_error:.4g}"}
            return rtn
        best.notes |= {"ordinary_error": error, "ordinary_error_rtn": rtn_error}
        return best

    def _retry(
        self, weight: Tensor, inputs: InputStatistics, grid: Grid, best: UniformWeight, error: float, bound: float
    ) -> tuple[UniformWeight, float]:
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
                best.solver = "gptq retry" + (" token_norm" if other.token_norm else "")
        return best, error

    def _attempt(self, weight: Tensor, inputs: InputStatistics, grid: Grid) -> UniformWeight | None:
        """One GPTQ solution; None when the Hessian cannot be factored or the result is not finite."""
        hessian = inputs.normalised_hessian if self.token_norm else inputs.hessian
        assert hessian is not None
        order = column_order(hessian.diagonal(), grid.group_size, self)
        try:
            factor = factorise(hessian, order, self.damping, self.damping_increment)
            return gptq(weight, factor, grid, self)
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
    original = weight.float()
    live = torch.where(factor.dead, 0.0, original)
    # Fixed grids are fitted before dead columns are zeroed, as the reference does.
    fixed = [t.T for t in grid.fit(original.reshape(len(weight), n // size, size))]  # 2 x [groups, rows]
    static = options.static_groups or grid.group_size == -1
    order = factor.order

    if static and options.act_order and size < n:
        solution = solve(
            live[:, order], factor.upper, grid, size=1, fit=lambda j, _: _pick(fixed, int(order[j]) // size), **loop
        )
        scale, zero = fixed
    else:

        def fit(j: int, current: Tensor) -> tuple[Tensor, Tensor]:
            return _pick(fixed, int(order[j]) // size) if static else grid.fit(current.T)

        solution = solve(live[:, order], factor.upper, grid, size=size, fit=fit, **loop)
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
    codes = solution.codes[inverse].T.contiguous()
    result = UniformWeight.build(grid, codes, scale.T.contiguous(), zero.T.contiguous(), "gptq", g_idx)
    result.notes = {"damping": factor.damping, "loss": solution.loss} | _drift(solution, live[:, order], grid)
    if not bool(torch.isfinite(solution.values).all()):
        raise NonFinite("GPTQ produced NaN or Inf")
    return result


def _pick(grids: list[Tensor], group: int) -> tuple[Tensor, Tensor]:
    return grids[0][group], grids[1][group]


def _drift(solution: Solution, weight: Tensor, grid: Grid) -> dict[str, float]:
    """How far compensation moved weights: the largest move in grid steps, and the share of weights that clipped."""
    size = len(solution.codes) // len(solution.scale)
    scale = solution.scale.repeat_interleave(size, dim=0)
    moved = (solution.updated - weight.T).abs() / scale
    clipped = (solution.updated - solution.values).abs() > scale * 0.501
    return {"drift_steps": float(moved.max()), "clipped": float(clipped.float().mean())}
