"""SpQR: GPTQ on very small groups whose scales and zeros are quantized too, with the costliest weights kept in 16 bit.

    W [m, n] in the loop's order   H^-1 = U^T U   u_j = U[j, j]   e = (w - w_hat) / u_j   (arXiv 2306.03078)

    group      low, high = row min and max, not widened to zero; s = (high - low) / (2^b - 1), z = -low / s, real
               code = clamp(round(w / s + z), 0, 2^b - 1), w_hat = s (code - z)
    bilevel    the s (and the z) of 16 consecutive output rows are coded the same way with 3 bits, before any weight
    threshold  t = outlier_threshold * mean_j(var_rows(W[:, j]) / u_j^2), one number per layer
    fit        a weight whose absence lowers its group's sum of e^2 by more than t does not take part in the fit
    loop       GPTQ's column loop; a weight with e^2 > t is an outlier: it keeps its value, so its e is (nearly) 0

Leave-one-out needs three fits per group, not one per weight: dropping a weight moves the range only if it is the
smallest or the largest, and lowers the sum by its own e^2 otherwise.

Stored, columns in the loop's order: codes; per group the codes of s and z, and per 16 rows and group two 16-bit scales
and two 16-bit real zeros; outliers as CSR (16-bit value, 16-bit column, 32-bit row offsets), whose value replaces
the dense one; the order [n], int32, unless natural.
Bits per weight: b + (b_s + b_z) / g + 64 / (16 g) + 32 r, r the share of outliers. `target_bits` searches each layer's
threshold for the most outliers whose stored bytes, all of them counted, stay within a budget; one threshold for all
layers, chosen on a few of them, would spend the bits where errors are large instead.

Layers that share an input are solved apart, each with its own threshold, but share one factor of H.

Differences from github.com/Vahe1994/SpQR:

- Statistics and outliers are rounded to their storage dtype before weights are coded; the error fed back is that of
  what is stored. The reference keeps them in float32.
- A constant group decodes exactly (s = 1, z = -value); the reference turns an all-zero 3-bit group into 0.143. If the
  group shares second-level statistics with live rows, s = 1 would take their whole range; then it takes the smallest
  live s and a z within the live range, and 0 decodes to at most half of that step.
- A group, or a run of 16 scales, counts as constant when the rounding of its stored zero would exceed half its range.
- `round_zero` widens the range to contain zero, so that zero fits the width of a code.
- When 16 does not divide the rows, the last second-level group is shorter; the reference fails.
- Dead inputs are never outliers and do not enter the mean diagonal for damping; they get the mean diagonal of the
  others instead of 1, so that the scale of H has no influence.
- The spearman chain takes the nearest column that is left; it starts at column 0 as the reference does.
- Defaults are those of the repository's README (3-bit statistics, threshold 0.2, act_order, damping 1), not the code's.
- A layer whose Hessian cannot be factored is rounded to nearest and says so.
- Second-level statistics have 8 bits at most; at 16, where they would change nothing, one level is fewer bytes.
- Not here: symmetric grids, reserved_bins, a user's permutation, and the published kernel's 64-bit words.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import InvalidInput, NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import QuantizedWeight, pack_bits, packed_words
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, WeightSolver
from qfarm.solver import Factor, factorise, solve

SMALLEST = 1e-9  # floor of decoded scales, as in the reference code
DAMPING_INCREMENT = 0.01
THRESHOLD = 0.2  # default of outlier_threshold
BUDGET_SLACK = 0.02  # bits per weight below target_bits that end the search
BUDGET_STEPS = 12  # solutions of a layer at most, once thresholds on both sides of the budget are known
BUDGET_FACTOR = 4.0  # between thresholds on the way there
BUDGET_RANGE = (1e-7, 1e7)  # of relative thresholds


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpQR(WeightSolver):
    source = "Dettmers et al., ICLR 2024, arXiv 2306.03078; code: github.com/Vahe1994/SpQR"
    later = frozenset({"target_bits"})

    scale_bits: int | None = Field(3, ge=1, le=8, description="width of group scales; null: kept in the scale dtype")
    zero_bits: int | None = Field(
        3, ge=1, le=8, description="width of group zeros; null, or round_zero with at least the weights' width: off"
    )
    second_group: int = Field(16, ge=2, description="consecutive output rows that share second-level statistics")
    outlier_threshold: float | None = Field(
        THRESHOLD,
        ge=0,
        allow_inf_nan=False,
        description="lower keeps more outliers; useful: 0.1 to 1; null: no outliers",
    )
    target_bits: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="stored bits per weight that outliers may fill up; null: no budget"
    )
    simplified_outliers: bool = Field(False, description="fit groups with their outliers, without leave-one-out")
    order: Literal["identity", "act_order", "spearman"] = Field(
        "act_order", description="columns as they stand, by descending diag(H), or chained by rank correlation"
    )
    damping: float = Field(1.0, gt=0, description="added to diag(H), as a fraction of its mean (percdamp)")
    round_zero: bool = Field(False, description="integer zeros, on a range widened to contain zero")
    token_norm: bool = Field(False, description="scale tokens down to 4x the median norm before they enter H")
    on_worse: Literal["report", "rtn"] = Field(
        "report", description="when RTN has the smaller error on ordinary tokens: say so, or use RTN"
    )

    def packed_refusal(self) -> str | None:
        return "its weights kept apart and its two-level scales have no packed operator"

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if symmetric:
            return "groups have real-valued zeros; use symmetric: false"
        if group_size == 1:
            return "a group of one weight has no range; use a group size of 2 or more, or -1"
        if self.simplified_outliers and self.outlier_threshold is None:
            return "simplified_outliers needs outliers; set outlier_threshold"
        if self.target_bits is not None and self.outlier_threshold != THRESHOLD:
            return "target_bits searches outlier_threshold; set one of them"
        return None

    def layer_refusal(self, rows: int, columns: int, bits: int, group_size: int, scale_bytes: int) -> str | None:
        if self.target_bits is None:
            return None
        least = 8 * least_bytes(rows, columns, bits, group_size, scale_bytes, self) / (rows * columns)
        return _over_budget(self.target_bits, rows, columns, least) if least > self.target_bits else None

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.SAMPLE, Statistic.NORMALISED_HESSIAN if self.token_norm else Statistic.HESSIAN})

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        assert inputs is not None
        heights = [rows for _, rows in inputs.roles] or [len(weight)]
        parts: list[QuantizedWeight] = []
        factor: Factor | None = None
        for layer in torch.split(weight, heights):
            if not parts or self.order == "spearman":  # an order of its own
                factor = self._factor(layer, inputs)
            parts.append(self._layer(layer, factor, inputs, grid))
        return parts[0] if len(parts) == 1 else Layers(parts=parts)

    def _factor(self, weight: Tensor, inputs: InputStatistics) -> Factor | None:
        """None when a finite Hessian cannot be factored."""
        hessian = inputs.normalised_hessian if self.token_norm else inputs.hessian
        assert hessian is not None
        try:
            return factorise(hessian, column_order(weight, hessian, self.order), self.damping, DAMPING_INCREMENT)
        except NonFinite:
            if not bool(torch.isfinite(hessian).all()):
                raise  # the model itself is broken: no fallback may hide that
            return None

    def _layer(self, weight: Tensor, factor: Factor | None, inputs: InputStatistics, grid: Grid) -> QuantizedWeight:
        rtn = grid.quantize(weight)
        if factor is None:
            rtn.notes = {"reason": "the Hessian could not be factored"}
            return rtn
        solve_layer = spqr if self.target_bits is None else within_budget
        result = solve_layer(weight, factor, grid, self)
        error = inputs.ordinary_error(weight, result.dequantize())
        rtn_error = inputs.ordinary_error(weight, rtn.dequantize())
        if error > rtn_error and self.on_worse == "rtn":
            rtn.notes = {"reason": f"spqr was worse on ordinary tokens: {error:.4g} against {rtn_error:.4g}"}
            return rtn
        result.notes |= {"ordinary_error": error, "ordinary_error_rtn": rtn_error}
        return result


METHOD = SpQR


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealGrid:
    """The asymmetric grid with a real-valued zero, for weights and for their statistics."""

    bits: int
    dtype: torch.dtype  # of stored scales and zeros
    round_zero: bool = False

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values [..., g] -> scale, zero and whether the group is constant, each [...]."""
        low, high = values.amin(-1), values.amax(-1)
        if self.round_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = self._store(((high - low) / self.top).clamp(min=torch.finfo(self.dtype).tiny))
        zero = -low / scale
        limits = torch.finfo(self.dtype)
        flat = (low == high) | (zero.abs() > min(self.top / limits.eps, limits.max))
        scale = torch.where(flat, 1.0, scale)
        zero = torch.where(flat, -low / 2 - high / 2, zero)
        return scale, zero.round().clamp(0, self.top) if self.round_zero else self._store(zero), flat

    def _store(self, values: Tensor) -> Tensor:
        stored = values.to(self.dtype).float()
        if not bool(torch.isfinite(stored).all()):
            raise NonFinite(f"weights or statistics hold NaN or Inf or do not fit {self.dtype}")
        return stored

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.clamp(torch.round(values / scale + zero), 0, self.top)

    def round_trip(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (self.encode(values, scale, zero) - zero) * scale


@dataclasses.dataclass(kw_only=True)
class SecondLevel:
    """Group scales or zeros that are quantized themselves, over runs of `size` output rows."""

    codes: Tensor  # uint8 [rows, groups]
    scale: Tensor  # [ceil(rows / size), groups], storage dtype
    zero: Tensor  # the same, real-valued
    bits: int
    size: int

    def values(self) -> Tensor:
        """[rows, groups], float32."""
        run = torch.arange(len(self.codes), device=self.codes.device) // self.size
        return (self.codes.float() - self.zero.float()[run]) * self.scale.float()[run]

    def row_range(self, start: int, stop: int) -> SecondLevel:
        if start % self.size:
            raise ValueError(f"row {start} is inside a second-level group of {self.size} rows")
        runs = slice(start // self.size, -(-stop // self.size))
        return dataclasses.replace(self, codes=self.codes[start:stop], scale=self.scale[runs], zero=self.zero[runs])


Statistics = Tensor | SecondLevel  # a tensor [rows, groups]: storage dtype, or uint8 for integer zeros


@dataclasses.dataclass(kw_only=True)
class Outliers:
    """Weights that keep their value, in CSR form; columns count in the loop's order."""

    starts: Tensor  # int32 [rows + 1]
    columns: Tensor  # int32 [count]; uint16 on disk where that suffices
    values: Tensor  # [count], storage dtype

    @staticmethod
    def build(mask: Tensor, values: Tensor, dtype: torch.dtype) -> Outliers:
        """From mask and values, both [rows, n]."""
        starts = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
        starts[1:] = mask.sum(1).cumsum(0)
        return Outliers(starts=starts, columns=mask.nonzero()[:, 1].to(torch.int32), values=values[mask].to(dtype))

    def write(self, dense: Tensor) -> None:
        counts = self.starts.diff().long()
        rows = torch.arange(len(counts), device=dense.device).repeat_interleave(counts)
        dense[rows, self.columns.long()] = self.values.float()

    def row_range(self, start: int, stop: int) -> Outliers:
        first, last = int(self.starts[start]), int(self.starts[stop])
        part = slice(first, last)
        return Outliers(
            starts=self.starts[start : stop + 1] - first, columns=self.columns[part], values=self.values[part]
        )


@dataclasses.dataclass(kw_only=True)
class SpQRWeight:
    """Dense codes with one- or two-level statistics, and outliers that replace dense values."""

    codes: Tensor  # uint8 [rows, n], in the loop's order
    scale: Statistics
    zero: Statistics
    outliers: Outliers | None
    order: Tensor | None  # int32 [n], position -> column; None: natural
    bits: int
    group_size: int
    solver: str = "spqr"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        scale, zero = decoded(self.scale, SMALLEST), decoded(self.zero)
        grouped = self.codes.float().reshape(rows, scale.shape[1], -1)
        dense = ((grouped - zero[..., None]) * scale[..., None]).reshape(rows, columns)
        if self.outliers is not None:
            self.outliers.write(dense)
        return dense if self.order is None else dense[:, torch.argsort(self.order)]

    def stored_bytes(self) -> int:
        rows, columns = self.shape
        total = 4 * rows * packed_words(columns, self.bits)
        total += _statistics_bytes(self.scale, self.bits) + _statistics_bytes(self.zero, self.bits)
        if self.outliers is not None:
            each = self.outliers.values.element_size() + _column_dtype(columns).itemsize
            total += 4 * (rows + 1) + each * len(self.outliers.values)
        return total + (0 if self.order is None else 4 * columns)

    def packed(self) -> dict[str, Tensor]:
        tensors = {"weight_packed": pack_bits(self.codes, self.bits)}
        tensors |= _packed_statistics("weight_scale", self.scale, self.bits)
        tensors |= _packed_statistics("weight_zero_point", self.zero, self.bits)
        if self.outliers is not None:
            tensors["outlier_starts"] = self.outliers.starts
            tensors["outlier_columns"] = self.outliers.columns.to(_column_dtype(self.shape[1]))
            tensors["outlier_values"] = self.outliers.values
        if self.order is not None:
            tensors["weight_order"] = self.order
        return tensors

    def row_range(self, start: int, stop: int) -> SpQRWeight:
        """Rows [start, stop); with two levels, `start` is at the start of a second-level group."""
        scale, zero = (
            s.row_range(start, stop) if isinstance(s, SecondLevel) else s[start:stop] for s in (self.scale, self.zero)
        )
        outliers = None if self.outliers is None else self.outliers.row_range(start, stop)
        part = dataclasses.replace(self, codes=self.codes[start:stop], scale=scale, zero=zero, outliers=outliers)
        part.notes = dict(self.notes)
        return part


@dataclasses.dataclass(kw_only=True)
class Layers:
    """Layers that share an input, solved one by one and handed back together."""

    parts: list[QuantizedWeight]
    solver: str = "spqr"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def bits(self) -> int:
        return self.parts[0].bits

    @property
    def group_size(self) -> int:
        return self.parts[0].group_size

    def dequantize(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self.parts])

    def stored_bytes(self) -> int:
        return sum(part.stored_bytes() for part in self.parts)

    def packed(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.packed().items()}

    def row_range(self, start: int, stop: int) -> QuantizedWeight:
        """One of the layers, or rows within one."""
        first = 0
        for part in self.parts:
            rows = part.shape[0]
            if first <= start and stop <= first + rows:
                return part if stop - start == rows else part.row_range(start - first, stop - first)
            first += rows
        raise ValueError(f"rows {start} to {stop} belong to several layers")


def decoded(statistics: Statistics, floor: float = -torch.inf) -> Tensor:
    """Group scales or zeros [rows, groups], float32."""
    return statistics.values().clamp(min=floor) if isinstance(statistics, SecondLevel) else statistics.float()


def _column_dtype(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= 2**16 else torch.int32


def _statistics_bytes(statistics: Statistics, bits: int) -> int:
    if isinstance(statistics, SecondLevel):
        codes = 4 * packed_words(statistics.codes.numel(), statistics.bits)
        return codes + 2 * statistics.scale.numel() * statistics.scale.element_size()
    if statistics.is_floating_point():
        return statistics.numel() * statistics.element_size()
    return 4 * packed_words(statistics.numel(), bits)


def _packed_statistics(name: str, statistics: Statistics, bits: int) -> dict[str, Tensor]:
    """Codes as one bit stream over rows and groups."""
    if isinstance(statistics, SecondLevel):
        codes = pack_bits(statistics.codes.reshape(1, -1), statistics.bits)
        return {f"{name}_packed": codes, f"{name}_scale": statistics.scale, f"{name}_zero": statistics.zero}
    if statistics.is_floating_point():
        return {name: statistics}
    return {name: pack_bits(statistics.reshape(1, -1), bits)}


def column_order(weight: Tensor, hessian: Tensor, order: str) -> Tensor:
    """Position in the loop -> original column, int64 [n]. Ties keep the natural order."""
    if order == "act_order":
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    if order == "identity":
        return torch.arange(len(hessian), device=weight.device)
    ranks = weight.argsort(dim=0, stable=True).argsort(dim=0).float()
    ranks = ranks - ranks.mean(dim=0)
    near = ranks.T @ ranks  # all columns have the same norm
    chain = [0]
    for _ in range(len(near) - 1):
        near[:, chain[-1]] = -torch.inf
        chain.append(int(near[chain[-1]].argmax()))
    return torch.tensor(chain, device=weight.device)


def reductions(group: Tensor, pivots: Tensor, grid: RealGrid) -> Tensor:
    """How much the sum of e^2 of a row falls when one weight is left out of the group; group [m, g], pivots u [g]."""
    error = _squared_error(group, group, pivots, grid)
    result = error.clone()
    for extreme in (group.argmin(1, keepdim=True), group.argmax(1, keepdim=True)):
        # Another member of the group in its place leaves the range of the rest as it is.
        rest = group.scatter(1, extreme, group.gather(1, (extreme + 1) % group.shape[1]))
        without = _squared_error(rest, rest, pivots, grid).scatter(1, extreme, 0.0)
        result.scatter_(1, extreme, (error.sum(1) - without.sum(1))[:, None])
    return result


def _squared_error(fitted: Tensor, values: Tensor, pivots: Tensor, grid: RealGrid) -> Tensor:
    scale, zero, _ = grid.fit(fitted)
    return ((grid.round_trip(values, scale[:, None], zero[:, None]) - values) / pivots).square()


def without_outliers(group: Tensor, pivots: Tensor, grid: RealGrid, threshold: float) -> Tensor:
    """The group [m, g] with likely outliers replaced by the mean of the row's other weights."""
    likely = reductions(group, pivots, grid) > threshold
    others = group.masked_fill(likely, 0).sum(1) / (~likely).sum(1).clamp(min=1)
    return torch.where(likely, others[:, None], group)


def outlier_scale(weight: Tensor, upper: Tensor) -> float:
    """mean_j(var_rows(W[:, j]) / u_j^2); weight [m, n] in the loop's order. One row has no variance: its square."""
    variance = weight.var(dim=0) if len(weight) > 1 else weight[0].square()
    return float((variance / upper.diagonal().square()).double().mean())


def spqr(weight: Tensor, factor: Factor, grid: Grid, options: SpQR) -> SpQRWeight:
    """Quantize weight [m, n] with a factored Hessian."""
    columns = weight.shape[1]
    size = columns // grid.groups(columns)
    current = torch.where(factor.dead, 0.0, weight.float())[:, factor.order]
    layer = _Layer(current, factor, grid, size, options)
    solution = solve(current, factor.upper, grid, size=size, fit=layer.fit, rounding=layer.round)
    if not bool(torch.isfinite(solution.values).all()):
        raise NonFinite("SpQR produced NaN or Inf")
    natural = options.order == "identity"
    outliers = None
    if layer.threshold is not None:
        outliers = Outliers.build(layer.mask.T, solution.values.T, grid.scale_dtype)
    result = SpQRWeight(
        codes=solution.codes.T.contiguous().to(torch.uint8),
        scale=layer.stored(solution.scale.T.contiguous(), layer.scales, options.scale_bits),
        zero=layer.stored(solution.zero.T.contiguous(), layer.zeros, layer.zero_bits),
        outliers=outliers,
        order=None if natural else factor.order.to(torch.int32),
        bits=grid.bits,
        group_size=grid.group_size,
    )
    share = float(layer.mask.float().mean())
    result.notes = {"damping": factor.damping, "loss": solution.loss, "outliers": share}
    result.notes["formula_bits"] = average_bits(grid.bits, size, share, options)
    return result


def least_bytes(rows: int, columns: int, bits: int, group_size: int, scale_bytes: int, options: SpQR) -> int:
    """Stored bytes of a layer that has no outliers: what its shape and the options decide."""
    groups = 1 if group_size == -1 else columns // group_size
    runs = -(-rows // options.second_group)

    def statistics(width: int | None, integers: bool) -> int:
        if width is not None:
            return 4 * packed_words(rows * groups, width) + 2 * runs * groups * scale_bytes
        return 4 * packed_words(rows * groups, bits) if integers else rows * groups * scale_bytes

    zeros = statistics(zero_bits(bits, options), options.round_zero)
    total = 4 * rows * packed_words(columns, bits) + statistics(options.scale_bits, False) + zeros
    starts = 0 if options.outlier_threshold is None else 4 * (rows + 1)
    return total + starts + (0 if options.order == "identity" else 4 * columns)


def _over_budget(budget: float, rows: int, columns: int, least: float) -> str:
    return (
        f"target_bits {budget:g} is less than a layer of {rows} x {columns} takes without outliers, {least:.3f}; "
        "raise it or the group size, or lower the width"
    )


def within_budget(weight: Tensor, factor: Factor, grid: Grid, options: SpQR) -> SpQRWeight:
    """The solution with the most outliers that `target_bits` allows; its notes name the threshold.

    Bisects the logarithm of the threshold: fewer outliers, hence fewer bits, the higher it is. Raises InvalidInput
    when codes and statistics alone are over the budget.
    """
    budget = options.target_bits
    assert budget is not None

    def at(threshold: float) -> tuple[SpQRWeight, float]:
        result = spqr(weight, factor, grid, dataclasses.replace(options, outlier_threshold=threshold))
        result.notes["outlier_threshold"] = threshold
        return result, 8 * result.stored_bytes() / weight.numel()

    low = high = THRESHOLD
    result, bits = at(high)
    while bits > budget and high < BUDGET_RANGE[1]:
        low, high = high, high * BUDGET_FACTOR
        result, bits = at(high)
    if bits > budget:
        raise InvalidInput(f"spqr: {_over_budget(budget, weight.shape[0], weight.shape[1], bits)}")
    while low == high > BUDGET_RANGE[0] and budget - bits > BUDGET_SLACK:  # no threshold over the budget is known yet
        other, other_bits = at(low / BUDGET_FACTOR)
        low = low / BUDGET_FACTOR
        if other_bits <= budget:
            result, bits, high = other, other_bits, low
    for _ in range(BUDGET_STEPS):
        if budget - bits <= BUDGET_SLACK or low == high:
            break
        middle = (low * high) ** 0.5
        other, other_bits = at(middle)
        if other_bits <= budget:
            result, bits, high = other, other_bits, middle
        else:
            low = middle
    return result


Coded = tuple[Tensor, Tensor, Tensor]  # codes [rows], second-level scale and zero [runs]


class _Layer:
    """What the column loop asks for, and what it leaves to be stored."""

    def __init__(self, weight: Tensor, factor: Factor, grid: Grid, size: int, options: SpQR) -> None:
        self.grid = RealGrid(bits=grid.bits, dtype=grid.scale_dtype, round_zero=options.round_zero)
        self.options, self.size = options, size
        self.pivots, self.live = factor.upper.diagonal(), ~factor.dead[factor.order]
        self.zero_bits = zero_bits(grid.bits, options)
        relative = options.outlier_threshold
        self.threshold = None if relative is None else relative * outlier_scale(weight, factor.upper)
        self.mask = torch.zeros_like(weight.T, dtype=torch.bool)  # [n, rows]
        self.scales: list[Coded] = []
        self.zeros: list[Coded] = []

    def fit(self, start: int, current: Tensor) -> tuple[Tensor, Tensor]:
        group = current.T
        if self.threshold is not None and not self.options.simplified_outliers:
            group = without_outliers(group, self.pivots[start : start + self.size], self.grid, self.threshold)
        scale, zero, flat = self.grid.fit(group)
        if self.options.scale_bits is None and self.zero_bits is None:
            return scale, zero
        scale, zero = _fit_in(scale, zero, flat, self.options.second_group)
        if self.options.scale_bits is not None:
            scale = self._second_level(scale, self.options.scale_bits, self.scales).clamp(min=SMALLEST)
        if self.zero_bits is not None:
            zero = self._second_level(zero, self.zero_bits, self.zeros)
        return scale, zero

    def _second_level(self, values: Tensor, bits: int, kept: list[Coded]) -> Tensor:
        runs = _runs(values, self.options.second_group)
        grid = RealGrid(bits=bits, dtype=self.grid.dtype)
        scale, zero, _ = grid.fit(runs)
        codes = grid.encode(runs, scale[:, None], zero[:, None])
        kept.append((codes.reshape(-1)[: len(values)], scale, zero))
        return ((codes - zero[:, None]) * scale[:, None]).reshape(-1)[: len(values)]

    def round(self, position: int, column: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.grid.encode(column, scale, zero)
        values = (codes - zero) * scale
        if self.threshold is None:
            return codes, values
        outlier = ((column - values) / self.pivots[position]).square() > self.threshold
        outlier &= self.live[position]
        self.mask[position] = outlier
        codes = torch.where(outlier, self.grid.encode(torch.zeros_like(column), scale, zero), codes)
        return codes, torch.where(outlier, column.to(self.grid.dtype).float(), values)

    def stored(self, values: Tensor, kept: list[Coded], bits: int | None) -> Statistics:
        """Group scales or zeros [rows, groups] as they go to disk."""
        if bits is not None:
            codes, scale, zero = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
            scale, zero = scale.to(self.grid.dtype), zero.to(self.grid.dtype)
            return SecondLevel(
                codes=codes.to(torch.uint8), scale=scale, zero=zero, bits=bits, size=self.options.second_group
            )
        integer = self.options.round_zero and kept is self.zeros
        return values.to(torch.uint8 if integer else self.grid.dtype)


def _runs(values: Tensor, size: int) -> Tensor:
    """[rows] -> [ceil(rows / size), size]; the last row fills a short last run, which leaves its range as it is."""
    missing = -len(values) % size
    return torch.cat([values, values[-1:].expand(missing)]).reshape(-1, size)


def _fit_in(scale: Tensor, zero: Tensor, flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Give constant groups statistics inside the range of the live rows of their run; all [rows]."""
    s, z, dull = _runs(scale, size), _runs(zero, size), _runs(flat, size)
    step = s.masked_fill(dull, torch.inf).amin(1, keepdim=True)
    low = z.masked_fill(dull, torch.inf).amin(1, keepdim=True)
    high = z.masked_fill(dull, -torch.inf).amax(1, keepdim=True)
    change = dull & torch.isfinite(step)  # a run without live rows stays as it is
    s = torch.where(change, step, s)
    # A constant group has scale 1, so its zero is minus its value.
    z = torch.where(change, torch.minimum(torch.maximum(z / step, low), high), z)
    return s.reshape(-1)[: len(scale)], z.reshape(-1)[: len(zero)]


def zero_bits(bits: int, options: SpQR) -> int | None:
    """Width of the coded zeros; None when they are stored as they are."""
    skip = options.round_zero and options.zero_bits is not None and options.zero_bits >= bits
    return None if skip else options.zero_bits


def average_bits(bits: int, size: int, outliers: float, options: SpQR) -> float:
    """The published formula: 16-bit statistics, values and columns; row offsets and the order are not counted."""
    runs = 32 / options.second_group
    scale = 16 if options.scale_bits is None else options.scale_bits + runs
    coded = zero_bits(bits, options)
    zero = coded + runs if coded is not None else bits if options.round_zero else 16
    return bits + (scale + zero) / size + 32 * outliers
