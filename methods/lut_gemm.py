"""BCQ, the format of LUT-GEMM: a group of weights is a sum of k scaled sign vectors, fitted without data.

    w_hat = sum_i a_i b_i (+ z)    b_i in {-1, +1}, k = the scheme's width; one a [k] (and z) per row and group

    rounds 0      greedy: r = w; for each plane b_i = sign(r), a_i = mean |r|, r -= a_i b_i; sign(0) = +1
    each round    a (and z) by least squares for the signs at hand; then |a|, sorted; then for each weight the nearest
                  of the 2^k levels, the upper one in a tie. No half step increases the error. 1: refined greedy.

LUT-GEMM (Park et al., arXiv 2206.09557) is a kernel for this format, not a quantizer: it adds up precomputed sums of
8 inputs instead of multiplying. `lut_gemv` below is its arithmetic. Any uniform grid fits the format with an offset,
`a_i = s 2^i / 2, z = s ((2^k - 1) / 2 - zero)`: see `from_uniform`, and `start: uniform`.

A fitted level set clips: without an offset 2.6 % of Gaussian weights lie beyond the last level after 30 rounds, 8.7 %
after none. The published perplexities are worse than RTN's although the weight error is lower, so three remedies are
options (they are in no source): `offset`, `importance` (a weight counts diag(H)^importance), and `feedback` (the
levels serve as the grid inside GPTQ's column loop, refitted on current weights at each group).

Stored, as the kernel reads it, output index fastest: signs int32 [ceil(n / 32), k, m], bit t of word i is input
32 i + t, 1 means +1; a [n / g, k, m] and z [n / g, m] in the scale dtype.
Bits per weight: k + 16 k / g, + 16 / g with an offset.

Differences from github.com/naver-aics/lut-gemm and its port in dnotitia/qllm-infer:

- Arithmetic is float32; the port starts from weights in the model's dtype.
- Least squares is solved directly in float64, not by conjugate gradients with an absolute 1e-6, which spoils groups of
  small weights. A ridge of 1e-8 g holds the change of a, not a itself: equal planes keep their scales, a fitted group
  stays where it is, and the scale of the weights does not matter, so that groups need not be normalised.
- A group stops when none of its signs changed; more rounds would not change it.
- a and z are rounded to their storage dtype before signs are chosen for the last time.
- `importance` is an exponent on diag(H); upstream's element weights with clipping and pruning are not here.
- A group whose normal equations cannot be factored keeps its scales; a layer whose Hessian cannot is coded without
  feedback and says so.
- With `feedback`, groups are visited by their largest diag(H) and columns by diag(H) inside each (arXiv 2505.14638).
- The kernel itself wants n % 32 = 0, even m, groups that are multiples of 32, and k <= 4; the format does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import UniformWeight, pack_bits, packed_words
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, WeightSolver
from qfarm.solver import Factor, factorise, group_aware_order, solve

RIDGE = 1e-8
CHUNK = 1 << 22  # signs held as float32 at a time: 16 MiB
DAMPING_INCREMENT = 0.01
RUN = 8  # inputs that share a look-up table (mu)

Assignment = Literal["nearest", "greedy"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LUTGEMM(WeightSolver):
    source = "Park et al., ICLR 2024, arXiv 2206.09557; code: github.com/naver-aics/lut-gemm"
    widths = range(1, 9)  # the kernel takes 1 to 4

    rounds: int = Field(15, ge=0, description="0: greedy, 1: refined greedy, more: alternating; published runs: 30")
    start: Literal["greedy", "uniform"] = Field("greedy", description="first levels: greedy planes, or RTN's grid")
    assignment: Assignment = Field("nearest", description="nearest level (use_bst), or greedy signs plane by plane")
    offset: bool = Field(False, description="fit an offset per group")
    importance: float = Field(0.0, ge=0, allow_inf_nan=False, description="errors count diag(H)^importance; 0: equally")
    feedback: bool = Field(False, description="push rounding errors onto later columns, as GPTQ does")
    damping: float = Field(0.01, gt=0, description="with feedback: added to diag(H), as a fraction of its mean")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.start == "uniform" and not self.offset:
            return "start: uniform needs offset: true, since its levels are not centred on 0"
        if symmetric and self.offset and not (self.start == "uniform" and self.rounds == 0):
            return "a fitted offset is not symmetric; use symmetric: false, offset: false, or start: uniform, rounds: 0"
        return None

    def statistics(self) -> frozenset[Statistic]:
        if self.feedback:
            return frozenset({Statistic.HESSIAN, Statistic.SAMPLE})
        return frozenset({Statistic.HESSIAN}) if self.importance else frozenset()

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> BinaryCodedWeight:
        hessian = inputs.hessian if inputs is not None else None
        diagonal = hessian.diagonal() if hessian is not None else None
        plain = quantize(weight, diagonal, grid, self)
        if not self.feedback:
            return plain
        assert inputs is not None and hessian is not None
        size = weight.shape[1] // grid.groups(weight.shape[1])
        try:
            order = group_aware_order(hessian.diagonal(), size)
            factor = factorise(hessian, order, self.damping, DAMPING_INCREMENT)
        except NonFinite:
            if not bool(torch.isfinite(hessian).all()):
                raise  # the model itself is broken: no fallback may hide that
            plain.notes["reason"] = "no feedback: the Hessian could not be factored"
            return plain
        result = quantize_with_feedback(weight, hessian.diagonal(), factor, grid, self)
        result.notes["ordinary_error"] = inputs.ordinary_error(weight, result.dequantize())
        result.notes["ordinary_error_without_feedback"] = inputs.ordinary_error(weight, plain.dequantize())
        return result


METHOD = LUTGEMM


@dataclasses.dataclass(kw_only=True)
class BinaryCodedWeight:
    """Sign planes with their scales; bit i of a code is plane i, 1 for +1."""

    codes: Tensor  # uint8 [rows, columns]
    alpha: Tensor  # [rows, groups, bits], storage dtype
    offset: Tensor | None  # [rows, groups], storage dtype
    group_size: int
    solver: str = "lut_gemm"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits(self) -> int:
        return self.alpha.shape[2]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        grouped = self.codes.reshape(rows, self.alpha.shape[1], -1)
        offset = None if self.offset is None else self.offset.float()
        return decode(grouped, self.alpha.float(), offset).reshape(rows, columns)

    def stored_bytes(self) -> int:
        rows, columns = self.shape
        total = 4 * packed_words(columns, 1) * self.bits * rows + self.alpha.numel() * self.alpha.element_size()
        return total + (0 if self.offset is None else self.offset.numel() * self.offset.element_size())

    def packed(self) -> dict[str, Tensor]:
        planes = [pack_bits((self.codes >> i) & 1, 1) for i in range(self.bits)]  # [rows, words] each
        tensors = {"weight_signs": torch.stack(planes).permute(2, 0, 1).contiguous()}
        tensors["weight_alpha"] = self.alpha.permute(1, 2, 0).contiguous()
        if self.offset is not None:
            tensors["weight_offset"] = self.offset.T.contiguous()
        return tensors

    def sign_planes(self) -> tuple[Tensor, Tensor | None]:
        return self.alpha, self.offset

    def row_range(self, start: int, stop: int) -> BinaryCodedWeight:
        offset = None if self.offset is None else self.offset[start:stop]
        codes, alpha = self.codes[start:stop], self.alpha[start:stop]
        return dataclasses.replace(self, codes=codes, alpha=alpha, offset=offset, notes=dict(self.notes))


def from_uniform(weight: UniformWeight) -> BinaryCodedWeight:
    """The same weight in binary coding: exact but for the rounding of the offset to the scale's dtype."""
    if weight.g_idx is not None:
        raise ValueError("groups that are not consecutive columns have no binary-coded form")
    zero = torch.full_like(weight.scale, 2.0 ** (weight.bits - 1)) if weight.zero is None else weight.zero
    alpha, offset = uniform_levels(weight.scale.float(), zero.float(), weight.bits)
    dtype = weight.scale.dtype
    return BinaryCodedWeight(
        codes=weight.codes,
        alpha=_store(alpha, dtype).to(dtype),
        offset=_store(offset, dtype).to(dtype),
        group_size=weight.group_size,
        solver=weight.solver,
        notes=dict(weight.notes),
    )


def uniform_levels(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """alpha [..., bits] and offset [...] of a uniform grid with that scale and zero, both [...]."""
    powers = 2.0 ** torch.arange(bits, device=scale.device)
    return scale[..., None] * powers / 2, scale * ((2**bits - 1) / 2 - zero)


def decode(codes: Tensor, alpha: Tensor, offset: Tensor | None) -> Tensor:
    """codes [..., g], alpha [..., k], offset [...] -> values [..., g]."""
    values = torch.zeros_like(codes, dtype=alpha.dtype) if offset is None else offset[..., None]
    for i in range(alpha.shape[-1]):
        sign = ((codes >> i) & 1).to(alpha.dtype) * 2 - 1
        values = values + sign * alpha[..., i, None]
    return values


@dataclasses.dataclass(frozen=True)
class Levels:
    """The levels of R groups, ready to assign values to them."""

    alpha: Tensor  # [R, k]
    offset: Tensor | None  # [R]
    assignment: Assignment
    midpoints: Tensor | None  # [R, 2^k - 1], ascending
    codes: Tensor | None  # uint8 [R, 2^k], of the levels in ascending order

    @staticmethod
    def build(alpha: Tensor, offset: Tensor | None, assignment: Assignment) -> Levels:
        if assignment == "greedy":
            return Levels(alpha, offset, assignment, None, None)
        every = torch.arange(2 ** alpha.shape[1], dtype=torch.uint8, device=alpha.device).expand(len(alpha), -1)
        values, order = decode(every, alpha, offset).sort(dim=1, stable=True)
        return Levels(alpha, offset, assignment, (values[:, 1:] + values[:, :-1]) / 2, order.to(torch.uint8))

    def assign(self, values: Tensor) -> Tensor:
        """values [R, g] -> codes uint8 [R, g]."""
        if self.midpoints is not None and self.codes is not None:
            # right: a value on a midpoint goes up, so that sign(0) = +1 and a group of zeros gets +1 throughout.
            index = torch.searchsorted(self.midpoints, values.contiguous(), right=True)
            return self.codes.gather(1, index)
        codes = torch.zeros_like(values, dtype=torch.uint8)
        rest = values if self.offset is None else values - self.offset[:, None]
        for i in range(self.alpha.shape[1]):
            positive = rest >= 0
            codes |= positive.to(torch.uint8) << i
            rest = rest - torch.where(positive, self.alpha[:, i, None], -self.alpha[:, i, None])
        return codes


def greedy(values: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [R, g] -> codes uint8 [R, g], alpha [R, bits]; importance [R, g] has a mean of 1 in each group."""
    codes, rest, alpha = torch.zeros_like(values, dtype=torch.uint8), values, []
    for i in range(bits):
        size = rest.abs()
        alpha.append((size if importance is None else size * importance).mean(1))
        positive = rest >= 0
        codes |= positive.to(torch.uint8) << i
        rest = rest - torch.where(positive, alpha[-1][:, None], -alpha[-1][:, None])
    return codes, torch.stack(alpha, dim=1)


def least_squares(
    values: Tensor, codes: Tensor, alpha: Tensor, offset: Tensor | None, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The alpha (and offset) with the smallest error for the signs at hand."""
    bits = alpha.shape[1]
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    design = ((codes[..., None] >> shifts) & 1).to(values.dtype) * 2 - 1  # [R, g, k]
    if offset is not None:
        design = torch.cat([design, torch.ones_like(design[..., :1])], dim=2)
    weighted = design if importance is None else design * importance[..., None]
    residual = values - decode(codes, alpha, offset)
    gram = (weighted.mT @ design).double()  # [R, k, k]
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * values.shape[1])
    right = (weighted.mT @ residual[..., None]).double()
    lower, failed = torch.linalg.cholesky_ex(gram)
    # Importances are summed in float32, so that nearly equal planes may leave gram indefinite despite the ridge.
    step = torch.where(failed[:, None] == 0, torch.cholesky_solve(right, lower)[..., 0], 0).to(values.dtype)
    return alpha + step[:, :bits], None if offset is None else offset + step[:, bits]


def refine(
    values: Tensor,
    codes: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    importance: Tensor | None,
    rounds: int,
    assignment: Assignment = "nearest",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Alternate between scales and signs; a group is left alone once its signs stay."""
    codes, alpha = codes.clone(), alpha.clone()
    offset = None if offset is None else offset.clone()
    active = torch.arange(len(values), device=values.device)
    for _ in range(rounds):
        now, old = values[active], codes[active]
        at = None if offset is None else offset[active]
        a, at = least_squares(now, old, alpha[active], at, None if importance is None else importance[active])
        a = a.abs().sort(dim=1, descending=True).values
        new = Levels.build(a, at, assignment).assign(now)
        alpha[active], codes[active] = a, new
        if offset is not None and at is not None:
            offset[active] = at
        active = active[(new != old).any(1)]
        if not len(active):
            break
    return codes, alpha, offset


def solve_groups(values: Tensor, importance: Tensor | None, grid: Grid, options: LUTGEMM) -> tuple[Levels, Tensor]:
    """values [R, g] -> levels as they are stored, in float32, and codes [R, g]."""
    offset = None
    if options.start == "uniform":
        scale, zero = grid.fit(values)
        codes = grid.encode(values, scale[:, None], zero[:, None]).to(torch.uint8)
        alpha, offset = uniform_levels(scale, zero, grid.bits)
    else:
        if options.offset:
            offset = (values if importance is None else values * importance).mean(1)
        codes, alpha = greedy(values if offset is None else values - offset[:, None], grid.bits, importance)
    _, alpha, offset = refine(values, codes, alpha, offset, importance, options.rounds, options.assignment)
    alpha = _store(alpha, grid.scale_dtype)
    offset = None if offset is None else _store(offset, grid.scale_dtype)
    plain = options.start == "greedy" and options.rounds == 0
    levels = Levels.build(alpha, offset, "greedy" if plain else options.assignment)
    return levels, levels.assign(values)


def _store(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to its storage dtype, as float32."""
    stored = values.to(dtype).float()
    if not bool(torch.isfinite(stored).all()):
        raise NonFinite(f"a scale or offset does not fit {dtype}; use scale_dtype: float32")
    return stored


def quantize(weight: Tensor, diagonal: Tensor | None, grid: Grid, options: LUTGEMM) -> BinaryCodedWeight:
    """Quantize weight [rows, n], group by group; diagonal [n] of H is None when errors count equally."""
    if not bool(torch.isfinite(weight).all()):
        raise NonFinite("the weights hold NaN or Inf")
    rows, columns = weight.shape
    groups = grid.groups(columns)
    grouped = weight.float().reshape(rows * groups, -1)  # [R, g]
    counts = importances(diagonal, groups, options.importance)
    parts = []
    step = max(1, CHUNK // (grouped.shape[1] * grid.bits))
    for first in range(0, len(grouped), step):
        values = grouped[first : first + step]
        index = torch.arange(first, first + len(values), device=weight.device) % groups
        parts.append(solve_groups(values, None if counts is None else counts[index], grid, options))
    alpha = torch.cat([levels.alpha for levels, _ in parts]).reshape(rows, groups, -1)
    offsets = [levels.offset for levels, _ in parts if levels.offset is not None]
    codes = torch.cat([codes for _, codes in parts]).reshape(rows, columns)
    return _result(weight, codes, alpha, torch.cat(offsets).reshape(rows, groups) if offsets else None, grid)


def _result(weight: Tensor, codes: Tensor, alpha: Tensor, offset: Tensor | None, grid: Grid) -> BinaryCodedWeight:
    """With the share of weights beyond the outermost levels, which weight error does not show."""
    centred = weight.float().reshape(*alpha.shape[:2], -1) - (0.0 if offset is None else offset[..., None])
    clipped = float((centred.abs() > alpha.sum(2)[..., None]).float().mean())
    return BinaryCodedWeight(
        codes=codes,
        alpha=alpha.to(grid.scale_dtype),
        offset=None if offset is None else offset.to(grid.scale_dtype),
        group_size=grid.group_size,
        notes={"clipped": clipped},
    )


def importances(diagonal: Tensor | None, groups: int, exponent: float) -> Tensor | None:
    """diag(H)^exponent [groups, g], with a mean of 1 in each group; a group of dead inputs counts equally."""
    if diagonal is None or exponent == 0:
        return None
    if not bool(torch.isfinite(diagonal).all()):
        raise NonFinite("the calibration inputs hold NaN or Inf")
    grouped = diagonal.float().clamp(min=0).reshape(groups, -1)
    top = grouped.amax(1, keepdim=True)
    powers = torch.where(top > 0, grouped / top, 1.0).pow(exponent)
    return powers / powers.mean(1, keepdim=True)


def quantize_with_feedback(
    weight: Tensor, diagonal: Tensor, factor: Factor, grid: Grid, options: LUTGEMM
) -> BinaryCodedWeight:
    """The levels as the grid of GPTQ's column loop, fitted on each group's current weights."""
    columns = weight.shape[1]
    groups = grid.groups(columns)
    size, order = columns // groups, factor.order
    live = torch.where(factor.dead, 0.0, weight.float())[:, order]
    counts = importances(diagonal[order], groups, options.importance)
    levels: list[Levels] = []

    def fit(position: int, current: Tensor) -> tuple[Tensor, Tensor]:
        rows = current.shape[1]
        importance = None if counts is None else counts[position // size].expand(rows, -1)
        levels.append(solve_groups(current.T.contiguous(), importance, grid, options)[0])
        offset = levels[-1].offset
        return levels[-1].alpha, torch.zeros_like(levels[-1].alpha[:, 0]) if offset is None else offset

    def rounding(_: int, column: Tensor, alpha: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        codes = levels[-1].assign(column[:, None])
        values = decode(codes, alpha, offset if options.offset else None)[:, 0]
        return codes[:, 0].float(), values

    solution = solve(live, factor.upper, grid, size=size, fit=fit, rounding=rounding)
    if not bool(torch.isfinite(solution.values).all()):
        raise NonFinite("BCQ with feedback produced NaN or Inf")
    back = torch.argsort(order[::size] // size)  # groups were visited in another order
    codes = solution.codes[torch.argsort(order)].T.contiguous().to(torch.uint8)
    alpha = solution.scale[back].transpose(0, 1).contiguous()  # [rows, groups, k]
    offset = solution.zero[back].T.contiguous() if options.offset else None
    result = _result(weight, codes, alpha, offset, grid)
    result.notes |= {"damping": factor.damping, "loss": solution.loss}
    return result


def lookup_table(inputs: Tensor) -> Tensor:
    """inputs [runs, 8] -> [runs, 256]: entry c is the sum of +-x_t, with the sign of x_t from bit t of c."""
    table = -inputs.sum(1, keepdim=True)
    for t in range(RUN):
        table = torch.cat([table, table + 2 * inputs[:, t, None]], dim=1)
    return table


def lut_gemv(inputs: Tensor, packed: dict[str, Tensor]) -> Tensor:
    """inputs [n] times the packed weight -> [m], float32, as LUT-GEMM computes it: no product per weight.

    Runs of 8 inputs share a table, so groups are multiples of 8 inputs unless there is only one.
    """
    signs, alpha = packed["weight_signs"], packed["weight_alpha"].float()  # [words, k, m], [groups, k, m]
    groups = len(alpha)
    if groups > 1 and len(inputs) // groups % RUN:
        raise ValueError(f"groups of {len(inputs) // groups} inputs do not hold whole runs of {RUN}")
    padding = torch.zeros(-len(inputs) % RUN, device=inputs.device)
    table = lookup_table(torch.cat([inputs.float(), padding]).reshape(-1, RUN))
    shifts = torch.arange(0, 32, RUN, device=signs.device)
    bytes_ = (signs.long()[:, None] >> shifts[:, None, None]) & 255  # [words, 4, k, m]
    bytes_ = bytes_.reshape(-1, *signs.shape[1:])[: len(table)]  # a ragged last word has runs without inputs
    sums = table.gather(1, bytes_.reshape(len(table), -1)).reshape(groups, -1, *signs.shape[1:]).sum(1)
    output = (sums * alpha).sum((0, 1))
    if "weight_offset" in packed:
        total = table[:, -1].reshape(groups, -1).sum(1)  # the last entry is the plain sum of a run
        output = output + total @ packed["weight_offset"].float()
    return output
