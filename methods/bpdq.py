"""BPDQ: GPTQ on groups whose 2^k levels are not equally spaced: a weighted sum of bit planes plus an offset.

    w_hat = c_0 + sum_i c_i b_i,  b_i in {0, 1}            k planes, k = the scheme's width; one c per row and group
    W [m, n]   H^-1 = U^T U   U_l = U[group, group]   E U_l = W_t - Q   sum E^2 = loss when later columns compensate

Per group, on its current weights W_t (arXiv 2602.04163; code of github.com/KingdalfGoodman/BPDQ):

    start    planes = the k most significant bits of an 8-bit min/max code of W_t; fit c
    repeat   codes: GPTQ's column loop with an exact search for the nearest of the 2^k levels
             c: ridge least squares of W_t on [1, planes] in the metric (U_l^T U_l)^-1, the one that E measures
             E = (W_t - Q) U_l^-1; keep the iterate with the smallest sum E^2
    then     W[later groups] -= E U[group, later]

Columns are visited in the group-aware order (groups by their largest diag(H), columns by diag(H) inside each,
arXiv 2505.14638), which is undone afterwards and costs nothing at inference. It also keeps a massive activation's
channel from being quantized late; rotated models do without (`group_aware: false`).

Stored: c [groups, k + 1, m] in the scale dtype, offset first; planes int32 [ceil(n / 32), k, m], bit t of a word is
input 32 i + t, as LUT-GEMM lays out its signs but with {0, 1}. Bits per weight: k + 16 (k + 1) / g. No zero points,
no g_idx. `signed_planes` converts to +-1 planes.

Differences from the reference code:

- H is scaled to a mean diagonal of 1 first. The ridge is absolute, so upstream its strength differs by layer.
- c is rounded to its storage dtype before Q and E are computed; upstream rounds it afterwards, uncompensated.
- The best iterate is kept per row, not for all rows at once: never worse, and rows stay independent. A row whose codes
  repeat is left out of further rounds, which would repeat too.
- E is computed from W_t - Q directly; upstream corrects the loop's E by the change of Q, which is the same in exact
  arithmetic. Only the best iterate's error is pushed onto later columns, which is the same result for less work.
- Dead inputs (zero weight) do not take part in the fit of c, and do not enter the mean diagonal for damping.
- `iterations` is 10, as in the published runs (the code says 5). Any group size that divides is allowed, -1 included;
  upstream takes 32, 64, 128, 256. Symmetric cells are refused; upstream's `sym` only changes the starting planes.
- Where H cannot be factored the layer falls back to RTN and says so; upstream fails.

Not confirmed: the paper's perplexity tables were not available, so no published figure was compared.
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
from qfarm.quantized import QuantizedWeight, pack_bits, packed_words
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, WeightSolver
from qfarm.solver import LEAF, Factor, factorise, group_aware_order


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BPDQ(WeightSolver):
    source = "Chen et al., arXiv 2602.04163; code: github.com/KingdalfGoodman/BPDQ"
    widths = range(2, 5)

    iterations: int = Field(10, ge=1, description="rounds of codes, then coefficients, per group")
    ridge: float = Field(1e-4, ge=0, description="ridge of the coefficient fit, for a mean diag(H) of 1")
    initial_bits: int = Field(8, ge=4, le=8, description="width of the uniform code that the first planes are cut from")
    group_aware: bool = Field(True, description="order groups and columns by diag(H); false: natural order")
    damping: float = Field(0.05, gt=0, lt=1, description="added to diag(H), as a fraction of its mean (percdamp)")
    damping_increment: float = Field(0.01, gt=0, lt=1, description="raise of damping after a failed factorisation")
    on_worse: Literal["report", "rtn"] = Field(
        "report", description="when RTN has the smaller error on ordinary tokens: say so, or use RTN"
    )

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        return "the levels of a group are free, not symmetric; use symmetric: false" if symmetric else None

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.HESSIAN, Statistic.SAMPLE})

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        assert inputs is not None and inputs.hessian is not None
        rtn = grid.quantize(weight)
        rtn_error = inputs.ordinary_error(weight, rtn.dequantize())
        hessian = normalised(inputs.hessian)
        size = weight.shape[1] if grid.group_size == -1 else grid.group_size
        order = column_order(hessian.diagonal(), size if self.group_aware else None)
        try:
            factor = factorise(hessian, order, self.damping, self.damping_increment)
        except NonFinite:
            if not bool(torch.isfinite(hessian).all()):
                raise  # the model itself is broken: no fallback may hide that
            rtn.notes = {"reason": "the Hessian could not be factored"}
            return rtn
        result = bpdq(weight, factor, grid, self)
        error = inputs.ordinary_error(weight, result.dequantize())
        if error > rtn_error and self.on_worse == "rtn":
            rtn.notes = {"reason": f"bpdq was worse on ordinary tokens: {error:.4g} against {rtn_error:.4g}"}
            return rtn
        result.notes |= {"ordinary_error": error, "ordinary_error_rtn": rtn_error}
        return result


METHOD = BPDQ


@dataclasses.dataclass(kw_only=True)
class BitPlaneWeight:
    """Codes whose bits select coefficients: weight = c_0 + sum of c_{1 + i} over the set bits i of the code."""

    codes: Tensor  # uint8 [rows, columns]; bit i belongs to plane i
    coefficients: Tensor  # [groups, bits + 1, rows], storage dtype; the offset first
    bits: int
    group_size: int
    solver: str = "bpdq"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        levels = levels_of(self.coefficients.float().permute(2, 0, 1))  # [rows, groups, 2^bits]
        grouped = self.codes.long().reshape(rows, levels.shape[1], -1)
        return levels.gather(2, grouped).reshape(rows, columns)

    def stored_bytes(self) -> int:
        rows, columns = self.shape
        coefficients = self.coefficients.numel() * self.coefficients.element_size()
        return 4 * packed_words(columns, 1) * self.bits * rows + coefficients

    def packed(self) -> dict[str, Tensor]:
        words = [pack_bits((self.codes >> plane) & 1, 1) for plane in range(self.bits)]  # k x [rows, words]
        planes = torch.stack(words).permute(2, 0, 1).contiguous()  # [words, k, rows]
        return {"weight_planes": planes, "weight_coefficients": self.coefficients.contiguous()}

    def sign_planes(self) -> tuple[Tensor, Tensor | None]:
        return signed_planes(self.coefficients.float().permute(2, 0, 1))

    def row_range(self, start: int, stop: int) -> BitPlaneWeight:
        coefficients = self.coefficients[:, :, start:stop]
        return dataclasses.replace(
            self, codes=self.codes[start:stop], coefficients=coefficients, notes=dict(self.notes)
        )


def levels_of(coefficients: Tensor) -> Tensor:
    """The value of every code: [..., k + 1] -> [..., 2^k]."""
    levels = coefficients[..., :1]
    for plane in range(1, coefficients.shape[-1]):
        levels = torch.cat([levels, levels + coefficients[..., plane : plane + 1]], dim=-1)
    return levels


def signed_planes(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same weight on +-1 planes, as BCQ kernels want it: [..., k + 1] -> factors [..., k] and offset [...]."""
    return coefficients[..., 1:] / 2, coefficients[..., 0] + coefficients[..., 1:].sum(-1) / 2


def normalised(hessian: Tensor) -> Tensor:
    """H scaled to a mean diagonal of 1 over live inputs, so that the ridge means the same in every layer."""
    diagonal = hessian.diagonal()
    live = diagonal[diagonal != 0]
    return hessian / live.mean() if len(live) else hessian


def column_order(diagonal: Tensor, group_size: int | None) -> Tensor:
    """Position in the loop -> original column [n]; group-aware, or natural without a group size."""
    if group_size is None:
        return torch.arange(len(diagonal), device=diagonal.device)
    return group_aware_order(diagonal, group_size)


def bpdq(weight: Tensor, factor: Factor, grid: Grid, options: BPDQ) -> BitPlaneWeight:
    """Quantize weight [m, n] with a factored Hessian."""
    m, n = weight.shape
    size = n // grid.groups(n)
    order = factor.order
    current = torch.where(factor.dead, 0.0, weight.float())[:, order]
    live = (~factor.dead).float()[order]
    codes = torch.empty(m, n, dtype=torch.uint8, device=weight.device)
    coefficients = torch.empty(n // size, grid.bits + 1, m, dtype=grid.scale_dtype, device=weight.device)
    loss = 0.0
    for start in range(0, n, size):
        here, later = slice(start, start + size), slice(start + size, n)
        part = solve_group(current[:, here], factor.upper[here, here], live[here], grid, options)
        codes[:, order[here]] = part.codes
        coefficients[int(order[start]) // size] = part.coefficients.T.to(grid.scale_dtype)
        loss += float(part.errors.double().square().sum())
        current[:, later] -= part.errors @ factor.upper[here, later]
    notes = {"damping": factor.damping, "loss": loss}
    return BitPlaneWeight(
        codes=codes, coefficients=coefficients, bits=grid.bits, group_size=grid.group_size, notes=notes
    )


@dataclasses.dataclass
class GroupSolution:
    """One group's best iterate, per row."""

    codes: Tensor  # uint8 [m, g]
    coefficients: Tensor  # float32 [m, k + 1], already of storage precision
    errors: Tensor  # float32 [m, g]: E
    score: Tensor  # [m]: sum of E^2

    def improve(self, rows: Tensor, found: GroupSolution) -> None:
        """Take over `found`, which is of these rows, where its score is smaller."""
        wins = found.score < self.score[rows]
        for field in dataclasses.fields(self):
            getattr(self, field.name)[rows[wins]] = getattr(found, field.name)[wins]


def solve_group(current: Tensor, upper: Tensor, live: Tensor, grid: Grid, options: BPDQ) -> GroupSolution:
    """Codes and coefficients of weights [m, g]; `upper` [g, g] is their diagonal block of U, `live` [g] is 0 or 1."""
    identity = torch.eye(len(upper), device=upper.device)
    whiten = torch.linalg.solve_triangular(upper, identity, upper=True) * live[:, None]
    codes = initial_codes(current, grid.bits, options.initial_bits)
    coefficients = _stored(fit_coefficients(codes, grid.bits, current, whiten, options.ridge), grid)
    rows = torch.arange(len(current), device=current.device)  # those whose codes still change
    best: GroupSolution | None = None
    for _ in range(options.iterations):
        previous, (codes, _) = codes, assign(current[rows], upper, levels_of(coefficients))
        if best is not None:  # a row at its fixed point would only repeat itself
            moving = (codes != previous).any(1)
            rows, codes = rows[moving], codes[moving]
            if not len(rows):
                break
        coefficients = _stored(fit_coefficients(codes, grid.bits, current[rows], whiten, options.ridge), grid)
        errors = (current[rows] - levels_of(coefficients).gather(1, codes.long())) @ whiten
        found = GroupSolution(codes, coefficients, errors, errors.square().sum(1))
        if best is None:
            best = found
        else:
            best.improve(rows, found)
    assert best is not None
    if not bool(torch.isfinite(best.score).all()):
        raise NonFinite("BPDQ produced NaN or Inf")
    return best


def initial_codes(current: Tensor, bits: int, initial_bits: int) -> Tensor:
    """The most significant bits of a uniform min/max code, uint8 [m, g]."""
    grid = Grid(bits=initial_bits, scale_dtype=torch.float32)
    scale, zero = grid.fit(current)
    return grid.encode(current, scale[:, None], zero[:, None]).to(torch.uint8) >> (initial_bits - bits)


def assign(current: Tensor, upper: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ's loop inside a group with fixed levels [m, 2^k]: codes uint8 [m, g] and the loop's E [m, g].

    Of levels that are equally near the lowest code wins.
    """
    work = current.T.clone()  # [g, m]
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    pivots: list[float] = upper.diagonal().tolist()
    for start in range(0, len(work), LEAF):
        stop = min(start + LEAF, len(work))
        for t in range(start, stop):
            # Levels stand along the last axis: there argmin was 8 times as fast (576 rows, 2 bits, CPU).
            nearest = (work[t, :, None] - levels).abs_().argmin(1, keepdim=True)  # [m, 1]
            codes[t] = nearest[:, 0]
            errors[t] = (work[t] - levels.gather(1, nearest)[:, 0]) / pivots[t]
            work[t + 1 : stop].addr_(upper[t, t + 1 : stop], errors[t], alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return codes.T.contiguous(), errors.T.contiguous()


def fit_coefficients(codes: Tensor, bits: int, target: Tensor, whiten: Tensor, ridge: float) -> Tensor:
    """Least squares of target [m, g] on [1, planes of codes] after `@ whiten`; float32 [m, k + 1].

    Rows whose normal equations are singular (possible without a ridge) get the solution of smallest norm.
    """
    planes = [torch.ones_like(target)] + [((codes >> plane) & 1).to(target.dtype) for plane in range(bits)]
    design = torch.stack(planes, dim=1) @ whiten  # [m, k + 1, g]
    gram = (design @ design.mT).double()
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    moments = (design @ (target @ whiten)[:, :, None]).double()  # [m, k + 1, 1]
    lower, info = torch.linalg.cholesky_ex(gram)
    solution = torch.cholesky_solve(moments, lower)
    # A pivot lost in float32's rounding is as good as none.
    pivots = lower.diagonal(dim1=1, dim2=2)
    singular = (info != 0) | (pivots.amin(1) <= 1e-3 * pivots.amax(1) * (ridge == 0))
    if bool(singular.any()):
        smallest = torch.linalg.pinv(gram[singular], rtol=1e-6, hermitian=True) @ moments[singular]
        solution[singular] = smallest
    return solution[:, :, 0].to(target.dtype)


def _stored(coefficients: Tensor, grid: Grid) -> Tensor:
    """Coefficients as they will be stored. Raises NonFinite when they do not fit the storage dtype."""
    rounded = coefficients.to(grid.scale_dtype).float()
    if not bool(torch.isfinite(rounded).all()):
        raise NonFinite(f"a BPDQ coefficient does not fit {grid.scale_dtype}")
    return rounded
