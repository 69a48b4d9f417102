"""AWQ: enlarge weights of inputs with large activations before rounding, then clip each group where that helps.

    a = mean |x| per input   s = a^r / sqrt(max a^r min a^r), r = 0, 1/20, .. 19/20   W' = Q(W diag(s)) diag(s)^-1
    choose the s of least tr((W' - W) H (W' - W)^T), H = mean x x^T; then per row and group of the scaled weight the
    bound c = amax (1 - i/20), i = 0 .. 9, of least d^T H_g d, d = Q(clamp(w, -c, c)) - w   (arXiv 2306.00978)

The factor s belongs into the operator that makes the input (norm, v, up), whose output is divided by it. Layers that
share an input are solved as one matrix and share one s; where no operator can absorb it (o under grouped-query
attention) s = 1 and only clipping is left. Queries and keys are not clipped: their product makes the error of either
one meaningless.

Stored: codes, scales and zeros; s is folded and costs nothing.

The fold is simulated in the weight, W_hat = Q(W s) / s, and the model itself is left alone. In exact arithmetic that
is the same function. Not simulated are two roundings of a deployed model: of the divided norm weight to 16 bits, a
relative error of up to 2^-9 (bfloat16) or 2^-12 (float16) per channel, and, where the producer is itself a quantized
layer (v, up), of its row scales divided by s, of the same size; codes of the producer do not change, since a factor
per row moves neither its grid nor its best bound.

Inputs must come from the unquantized model, as in the reference: `statistics: independent`. With
`statistics: sequential` they come from the quantized prefix, which is another method than the published one.

Differences from mit-han-lab/llm-awq: the loss of q/k/v and of gate/up is the sum of the layers' own output errors
rather than that of the whole attention or MLP (an approximation: all rows count alike, softmax and gating are not
seen); o and down are exact. H and the clip search use all tokens instead of 512. Ranges always contain zero.
Symmetric grids leave out the code -2^(b-1), which the reference never reaches. Inputs that never fire get the
smallest s of the others; activations are floored at 1e-8 of the largest, instead of a^r at 1e-4, so that the scale of x
has no influence. With duo_scaling (AutoAWQ) s = 1 is one more candidate, so that no layer loses to unscaled rounding.
Scales are rounded to their storage dtype before weights. Layers that share an input but not their grid (other widths)
are solved apart and keep s = 1: one norm cannot absorb two factors.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import ColumnScaled, QuantizedWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, WeightSolver

FAINTEST = 1e-8  # floor of an input's activity over the largest; s stays within 1e-4 .. 1e4
UNCLIPPED = ("q", "k")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AWQ(WeightSolver):
    source = "Lin et al., MLSys 2024, arXiv 2306.00978; github.com/mit-han-lab/llm-awq; duo scaling: AutoAWQ"

    ratios: int = Field(20, ge=1, le=100, description="exponents r = i / ratios tried, i from 0; 1 = no scaling")
    duo_scaling: bool = Field(False, description="divide a^r by the relative size of the weights, to the power 1 - r")
    clip: bool = Field(True, description="search a clipped range per row and group")
    clip_steps: int = Field(20, ge=1, le=100, description="bounds tried are amax (1 - i / clip_steps)")
    max_shrink: float = Field(0.5, gt=0, lt=1, description="i stays below max_shrink x clip_steps")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.clip and int(self.max_shrink * self.clip_steps) < 2:
            return "max_shrink x clip_steps leaves no bound to try; raise one of them or set clip: false"
        if self.duo_scaling and self.ratios == 1:
            return "duo_scaling needs ratios of 2 or more; 1 means no scaling"
        return None

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.HESSIAN, Statistic.MEAN_ABS})

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        assert inputs is not None and inputs.hessian is not None and inputs.mean_abs is not None
        if not bool(torch.isfinite(inputs.hessian).all() & torch.isfinite(inputs.mean_abs).all()):
            raise NonFinite("the calibration inputs hold NaN or Inf")
        weight = weight.float()
        tried = self.candidates(weight, inputs, grid)
        losses = [gram_loss(weight, rounded(weight, scale, grid), inputs.hessian) for _, scale in tried]
        chosen = min(range(len(losses)), key=losses.__getitem__)  # the first of equals
        ratio, scale = tried[chosen]
        notes: dict[str, Any] = {"ratio": ratio, "loss": losses[chosen], "loss_unscaled": losses[0]}
        scaled = weight * scale
        if self.clip:
            bound = search_clip(scaled, inputs.hessian / scale / scale[:, None], inputs.roles, grid, self)
            notes["clipped_groups"] = float((bound < group_amax(scaled, grid)).float().mean())
            scaled = clamp_groups(scaled, bound)
        base = grid.quantize(scaled)
        clips = self.clip and bool(clippable(inputs.roles, weight).any())
        base.solver = "awq" if clips or inputs.foldable else "rtn"
        if not inputs.foldable:
            notes["reason"] = "no operator before this layer can absorb a scale: s = 1"
        if chosen == 0:
            base.notes = notes
            return base
        return ColumnScaled(base=base, factor=1 / scale, folded=True, solver="awq", notes=notes)

    def candidates(self, weight: Tensor, inputs: InputStatistics, grid: Grid) -> list[tuple[float | None, Tensor]]:
        """(r, s [columns]) to try. The first is s = 1 and wins ties; with duo_scaling it belongs to no r."""
        assert inputs.mean_abs is not None
        activity = floored(inputs.mean_abs)
        exponents = [i / self.ratios for i in range(self.ratios)]
        if not inputs.foldable:
            return [(0.0, torch.ones_like(activity))]
        if not self.duo_scaling:
            return [(r, centred(activity**r)) for r in exponents]
        size = relative_size(weight, grid)
        return [
            (None, torch.ones_like(activity)),
            *((r, centred(activity**r / (size ** (1 - r) + 1e-4))) for r in exponents),
        ]


METHOD = AWQ


def floored(mean_abs: Tensor) -> Tensor:
    """Activity of each input over the largest one, [columns]; inputs that never fire count as the faintest that do."""
    fires = mean_abs > 0
    if not bool(fires.any()):
        return torch.ones_like(mean_abs)
    return (torch.where(fires, mean_abs, mean_abs[fires].min()) / mean_abs.max()).clamp(min=FAINTEST)


def centred(scale: Tensor) -> Tensor:
    """Largest x smallest = 1."""
    scale = torch.maximum(scale, FAINTEST * scale.max())
    return scale / (scale.max() * scale.min()).sqrt()


def relative_size(weight: Tensor, grid: Grid) -> Tensor:
    """Mean over rows of |w| over the largest |w| of its group, [columns]."""
    rows, columns = weight.shape
    groups = weight.abs().reshape(rows, grid.groups(columns), -1)
    share = groups / groups.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return share.reshape(rows, columns).mean(dim=0)


def rounded(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Q(W diag(s)) diag(s)^-1, computed as it is when it ships."""
    return grid.quantize(weight * scale).dequantize() * (1 / scale)


def gram_loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """tr((W' - W) H (W' - W)^T): the mean over tokens of the squared error of all outputs."""
    delta = values - weight
    return float(((delta @ hessian) * delta).sum(dtype=torch.float64))


def group_amax(weight: Tensor, grid: Grid) -> Tensor:
    """Largest |w| of each group, [rows, groups]."""
    rows, columns = weight.shape
    return weight.abs().reshape(rows, grid.groups(columns), -1).amax(dim=-1)


def clamp_groups(weight: Tensor, bound: Tensor) -> Tensor:
    """weight [rows, columns] within +-bound [rows, groups]."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, bound.shape[1], -1)
    return torch.clamp(groups, -bound[..., None], bound[..., None]).reshape(rows, columns)


def search_clip(
    weight: Tensor, hessian: Tensor, roles: tuple[tuple[str, int], ...], grid: Grid, options: AWQ
) -> Tensor:
    """The bound of each group, [rows, groups]; both arguments in the space of scaled weights and inputs.

    A group's error is d^T H_g d: that of its own share of the output. Rows of UNCLIPPED roles keep their range.
    """
    rows, columns = weight.shape
    size = columns // grid.groups(columns)
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, columns, size)])  # [groups, g, g]
    amax = group_amax(weight, grid)
    best, bound = torch.full_like(amax, torch.inf), amax
    for i in range(int(options.max_shrink * options.clip_steps)):
        tried = amax * (1 - i / options.clip_steps)
        delta = grid.quantize(clamp_groups(weight, tried)).dequantize() - weight
        parts = delta.reshape(rows, -1, size).transpose(0, 1)  # [groups, rows, g]
        error = (torch.bmm(parts, blocks) * parts).sum(dim=-1).T
        bound = torch.where(error < best, tried, bound)
        best = torch.minimum(error, best)
    return torch.where(clippable(roles, weight)[:, None], bound, amax)


def clippable(roles: tuple[tuple[str, int], ...], weight: Tensor) -> Tensor:
    """Which rows may be clipped, bool [rows]; all of them when the roles are not known."""
    allowed = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    start = 0
    for role, rows in roles:
        allowed[start : start + rows] = role not in UNCLIPPED
        start += rows
    return allowed
