"""COMQ: coordinate descent on the codes, and on the scales, of the layer's reconstruction error.

    W [rows, n]   H [n, n] = mean of x x^T   c = code - zero   Q = scale c   minimise tr((W - Q) H (W - Q)^T)

A sweep visits every column once and gives each weight its best value while all others stand (Zhang et al., arXiv
2403.07134, here in Gram form; QuantEase, arXiv 2309.01885, is a close relative):

    t = Q_j + (W - Q) H_j / H_jj      c_j = round(t / scale), clamped to the grid

Q starts at W itself: in the first sweep columns that were not visited yet stand at their float values, and the error
grows from zero; from the second on every step can only lower it. Between sweeps, codes fixed, each group's scale moves
to its own optimum, in a row without groups scale = c H w / c H c. No inverse, no damping: singular H is no obstacle,
and an input that is always zero (H_jj = 0) has its weights rounded to nearest.

    start    weights   the float weights, as published
             gptq      codes of GPTQ's column loop on the same grid; sweeps then only ever improve on it
    order    energy    one order for all rows, by descending H_jj: the blocked form of greedy
             natural   columns as they stand
             greedy    each row by its own descending sqrt(H_jj) |w|, as published; about three times the time

The columns of a block are visited on its diagonal block of H; what all other columns do to them comes from one matrix
product per block, `H[block] (W - Q)`, from current values: nothing is carried along that rounding could make drift.
With an order per row, H (W - Q) is computed afresh per sweep and updated block by block.

A massive activation (one token hundreds of times larger than the rest makes H nearly rank one) harms COMQ more than
GPTQ: columns visited after its channel each try to cancel that channel's error alone, by as many steps as the grid
has. In the synthetic case of the tests the error on ordinary tokens, as a multiple of RTN's, is 6.2 in natural order
(GPTQ: 4.4), 4.6 greedy, 2.9 by energy (GPTQ by act_order: 1.0), 0.96 from GPTQ's codes, 0.54 with token_norm. Both
figures stand in every layer's notes; `on_worse: retry` tries these two where COMQ is worse than RTN, and names in
`solver` which one it kept.

Stored: codes, scales, zeros (asymmetric).

Differences from AozhongZhang/COMQ: four sweeps, not one (one is worse than GPTQ); the scale update of the paper, which
the code lacks; a grid that always holds zero, where the code's may start at min(w) > 0; groups, and with them a scale
update that visits one group after another; scales rounded to their storage dtype, which keeps every update monotone,
since the nearest stored scale to the optimum is at least as good as the old one; H from the walker, which in
sequential mode has seen the quantized prefix, where the code uses the original model. `layer_scale` is the paper's
version with one scale per layer. The code's training of normalisation layers on labels is not offered.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import UniformWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, WeightSolver
from qfarm.solver import factorise, solve

BLOCK = 64  # columns visited on one diagonal block of H; speed only
OWN_BLOCK = 32  # the same where each row has an order of its own, and so a block of its own
DAMPING, INCREMENT = 0.01, 0.01  # of the GPTQ start, its defaults


@dataclass(frozen=True, kw_only=True, config=STRICT)
class COMQ(WeightSolver):
    source = "Zhang et al., arXiv 2403.07134; code AozhongZhang/COMQ"
    later = frozenset({"layer_scale"})

    sweeps: int = Field(4, ge=1, le=100, description="visits of every column (iters); ends early once nothing changes")
    start: Literal["weights", "gptq"] = Field("weights", description="where the descent starts")
    order: Literal["energy", "natural", "greedy"] = Field("energy", description="order in which columns are visited")
    scale_update: bool = Field(True, description="move scales to their optimum after each sweep")
    layer_scale: bool = Field(False, description="one scale and zero for the whole layer instead of one per row")
    shrink: float = Field(1.0, gt=0, le=1, description="factor on the first scale (lambda); published: 0.65 at 2 bits")
    token_norm: bool = Field(False, description="scale tokens down to 4x the median norm before they enter H")
    on_worse: Literal["report", "retry", "rtn"] = Field(
        "report",
        description="when RTN has the smaller error on ordinary tokens: say so; start from gptq, then token_norm; RTN",
    )

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.start == "gptq" and self.order == "greedy":
            return "start gptq needs one order for all rows: energy or natural"
        if self.layer_scale and group_size != -1:
            return f"layer_scale is one scale for the whole layer, not for groups of {group_size}; use group size -1"
        return None

    @property
    def stackable(self) -> bool:
        return not self.layer_scale

    def statistics(self) -> frozenset[Statistic]:
        wanted = {Statistic.SAMPLE, Statistic.NORMALISED_HESSIAN if self.token_norm else Statistic.HESSIAN}
        if self.on_worse == "retry":
            wanted.add(Statistic.NORMALISED_HESSIAN)
        return frozenset(wanted)

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> UniformWeight:
        assert inputs is not None
        rtn = grid.quantize(weight)
        rtn_error = inputs.ordinary_error(weight, rtn.dequantize())
        best, error = self._attempt(weight, inputs, grid)
        if self.on_worse == "retry":
            safer = dataclasses.replace(self, start="gptq", order="energy")
            for other in (safer, dataclasses.replace(safer, token_norm=True)):
                if error > rtn_error and other != self:
                    found, other_error = other._attempt(weight, inputs, grid)
                    found.solver = "comq retry" + (" token_norm" if other.token_norm else "")
                    best, error = (found, other_error) if other_error < error else (best, error)
        if error > rtn_error and self.on_worse != "report":
            rtn.notes = {"reason": f"comq was worse on ordinary tokens: {error:.4g} against {rtn_error:.4g}"}
            return rtn
        best.notes |= {"ordinary_error": error, "ordinary_error_rtn": rtn_error}
        return best

    def _attempt(self, weight: Tensor, inputs: InputStatistics, grid: Grid) -> tuple[UniformWeight, float]:
        """One solution and its error on ordinary tokens."""
        hessian = inputs.normalised_hessian if self.token_norm else inputs.hessian
        assert hessian is not None
        made = comq(weight, hessian, grid, self)
        return made, inputs.ordinary_error(weight, made.dequantize())


METHOD = COMQ


def comq(weight: Tensor, hessian: Tensor, grid: Grid, options: COMQ) -> UniformWeight:
    """Quantize weight [rows, n] for the second moment H [n, n]. Raises NonFinite."""
    if not bool(torch.isfinite(hessian).all()):
        raise NonFinite("the calibration inputs hold NaN or Inf")
    descent = Descent(weight, hessian, grid, options.shrink, options.layer_scale)
    energy = hessian.diagonal()
    natural = torch.arange(len(energy), device=energy.device)
    order = natural if options.order == "natural" else torch.argsort(energy, descending=True, stable=True)
    reason = None
    if options.start == "gptq" and not descent.start_from_gptq(order):
        reason = "the Hessian could not be factored; started from the weights"
    done = 0
    for _ in range(options.sweeps):
        before = descent.codes.clone(), descent.scale.clone()
        if options.order == "greedy":
            key = energy.clamp(min=0).sqrt()[:, None] * descent.weight.abs()
            descent.sweep_rows(torch.argsort(key, dim=0, descending=True, stable=True))
        else:
            descent.sweep(order)
        if options.scale_update:
            descent.update_scales()
        done += 1
        if torch.equal(before[0], descent.codes) and torch.equal(before[1], descent.scale):
            break
    result = descent.result()
    result.notes = {"sweeps": done, "loss": descent.loss()} | ({} if reason is None else {"reason": reason})
    return result


class Descent:
    """Codes, scales and values of one matrix on their way down. Columns are the first axis, so each is contiguous."""

    def __init__(
        self, weight: Tensor, hessian: Tensor, grid: Grid, shrink: float = 1.0, layer_scale: bool = False
    ) -> None:
        rows, n = weight.shape
        self.grid, self.size, self.layer_scale = grid, n // grid.groups(n), layer_scale
        self.weight, self.hessian = weight.float().T.contiguous(), hessian.float()  # [n, rows], [n, n]
        if layer_scale:
            scale, zero = (t.expand(rows, 1) for t in grid.fit(weight.float().reshape(1, 1, -1)))
        else:
            scale, zero = grid.fit(weight.float().reshape(rows, -1, self.size))
        self.scale, self.zero = grid.store(scale * shrink).T.contiguous(), zero.T.contiguous()  # [groups, rows]
        self.codes = torch.full_like(self.weight, -1)  # [n, rows]; -1 before the first visit
        self.values = self.weight.clone()  # Q^T [n, rows]
        self._diagonal = self.hessian.diagonal()
        # A zero diagonal means a zero row: the column has no influence, and its own weight is the target.
        self._dead: list[bool] = (self._diagonal <= 0).tolist()

    def loss(self) -> float:
        """tr((W - Q) H (W - Q)^T)."""
        delta = (self.weight - self.values).double()
        return float(((self.hessian.double() @ delta) * delta).sum())

    def start_from_gptq(self, order: Tensor) -> bool:
        """Take over the codes of GPTQ's column loop on the present grid; False if H cannot be factored."""
        try:
            factor = factorise(self.hessian, order, DAMPING, INCREMENT)
        except NonFinite:
            return False
        group: list[int] = (order // self.size).tolist()
        solution = solve(
            self.weight[order].T,
            factor.upper,
            self.grid,
            size=1,
            fit=lambda j, _: (self.scale[group[j]], self.zero[group[j]]),
        )
        self.codes[order], self.values[order] = solution.codes, solution.values
        return True

    def sweep(self, order: Tensor) -> None:
        """Visit all columns in one order, int64 [n]."""
        for block in torch.split(order, BLOCK):
            inside = self.hessian[block][:, block]
            pull = self.hessian[block] @ (self.weight - self.values)  # [block, rows]
            group = block // self.size
            for i, j in enumerate(block.tolist()):
                old = self.values[j].clone()
                target = self.weight[j] if self._dead[j] else old + pull[i] / self._diagonal[j]
                scale, zero = self.scale[group[i]], self.zero[group[i]]
                self.codes[j] = self.grid.encode(target, scale, zero)
                self.values[j] = (self.codes[j] - zero) * scale
                pull.addr_(inside[:, i], self.values[j] - old, alpha=-1)

    def sweep_rows(self, orders: Tensor) -> None:
        """Visit all columns in an order of each row's own, int64 [n, rows]."""
        pull = (self.weight - self.values).T @ self.hessian  # [rows, n]
        for block in torch.split(orders, OWN_BLOCK):
            moved = self._visit_rows(block, pull)
            # Each row subtracts a weighted sum of its own rows of H.
            pull -= torch.nn.functional.embedding_bag(
                block.T, self.hessian, per_sample_weights=moved.T.contiguous(), mode="sum"
            )

    def _visit_rows(self, block: Tensor, pull: Tensor) -> Tensor:
        """Visit the columns of block [b, rows], int64, given pull [rows, n]; by how much values moved [b, rows]."""
        near = pull.T.gather(0, block)  # [b, rows]
        # Gathered row of H by row of H, which stays in the cache.
        inside = self.hessian[block.T[:, :, None], block.T[:, None]].permute(1, 2, 0)  # [b, b, rows]
        weight, old, strength = self.weight.gather(0, block), self.values.gather(0, block), self._diagonal[block]
        group = block // self.size
        scale, zero = self.scale.gather(0, group), self.zero.gather(0, group)
        codes, moved = torch.empty_like(old), torch.empty_like(old)
        for i in range(len(block)):
            alive = strength[i] > 0
            target = torch.where(alive, old[i] + near[i] / torch.where(alive, strength[i], 1.0), weight[i])
            codes[i] = self.grid.encode(target, scale[i], zero[i])
            moved[i] = (codes[i] - zero[i]) * scale[i] - old[i]
            near[i + 1 :] -= inside[i, i + 1 :] * moved[i]
        self.codes.scatter_(0, block, codes)
        self.values.scatter_(0, block, (codes - zero) * scale)
        return moved

    def update_scales(self) -> None:
        """Give each group its best scale, one group after another, codes fixed."""
        for index in range(len(self.scale)):
            part = slice(index * self.size, (index + 1) * self.size)
            steps = self.codes[part] - self.zero[index]  # c [g, rows]
            pull = self.hessian[part] @ (self.weight - self.values)
            gain = (steps * pull).sum(0)  # c H (w - q) [rows]
            curvature = (steps * (self.hessian[part, part] @ steps)).sum(0)  # c H c [rows]
            if self.layer_scale:
                gain, curvature = (t.sum().expand_as(t) for t in (gain, curvature))
            best = self.scale[index] + gain / torch.where(curvature > 0, curvature, 1.0)
            self.scale[index] = self._storable(best, self.scale[index], curvature > 0)
            self.values[part] = steps * self.scale[index]

    def _storable(self, best: Tensor, old: Tensor, known: Tensor) -> Tensor:
        """`best` in the storage dtype; the old scale where nothing is known, or that is not positive or overflows."""
        limits = torch.finfo(self.grid.scale_dtype)
        valid = known & (best >= limits.tiny) & (best <= limits.max)
        return self.grid.store(torch.where(valid, best, old))

    def result(self) -> UniformWeight:
        if not bool(torch.isfinite(self.values).all()):
            raise NonFinite("COMQ produced NaN or Inf")
        codes, scale, zero = (t.T.contiguous() for t in (self.codes, self.scale, self.zero))
        if self.layer_scale:
            scale, zero = scale[:1], zero[:1]
        return UniformWeight.build(self.grid, codes, scale, zero, "comq")
