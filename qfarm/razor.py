"""Significant data razoring: pure mathematics on tensors (QRazor, arXiv 2501.13331).

    q [..., n] base integers of B bits   u = |q|   g consecutive elements   k = r - 1 kept magnitude bits

    n = bit length of the largest u of the group      f = max(0, n - k)              f is the group's flag
    c = min(round(u / 2^f), 2^k - 1)                  q_hat = sign(q) c 2^f          stored: sign and c, r bits; f

A block integer with a power-of-two step per group, in sign-magnitude: zero stays exact, groups whose largest u is
below 2^k lose nothing, the top value is floored where rounding would overflow. Base integers are `round(x / scale)`,
`scale = max|x| / (2^(B-1) - 1)`. Groups never cross rows; a ragged last group counts as padded with zeros.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from qfarm.errors import InvalidInput, NonFinite
from qfarm.quantized import pack_bits, packed_words
from qfarm.solver import ColumnGrid, Factor, solve

Ties = Literal["even", "up"]  # of u / 2^f: to the even neighbour, or up as hardware does on the first dropped bit
Axis = Literal["in", "out"]  # along which a group lies in a weight [out, in]
TINY = torch.finfo(torch.float32).tiny  # below the smallest normal number a scale would lose its precision


def flag_values(base_bits: int, bits: int) -> int:
    """How many values a flag can have."""
    return max(0, base_bits - bits) + 1


def flag_bits(base_bits: int, bits: int) -> int:
    """Bits that hold a flag."""
    return (flag_values(base_bits, bits) - 1).bit_length()


def payload_bits(base_bits: int, bits: int, group_size: int) -> Fraction:
    """Codes and flags per element, in bits; scales of the base integers come on top."""
    return bits + Fraction(flag_bits(base_bits, bits), group_size)


def grouped(values: Tensor, size: int) -> Tensor:
    """[..., n] -> [..., groups, size], the last group padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % size))
    return padded.reshape(*values.shape[:-1], -1, size)


def spread(groups: Tensor, size: int, count: int) -> Tensor:
    """One value per group [..., groups] -> one per element [..., count]."""
    return groups.repeat_interleave(size, dim=-1)[..., :count]


def find_flags(base: Tensor, bits: int, size: int) -> Tensor:
    """Flags, int32 [..., groups], of base integers [..., n] in float32, of up to 2^24."""
    _, length = torch.frexp(grouped(base.abs(), size).amax(dim=-1))  # of an integer: its bit length, 0 for 0
    return (length - (bits - 1)).clamp(min=0).to(torch.int32)


def steps(flags: Tensor) -> Tensor:
    """2^f, float32 and exact."""
    return torch.bitwise_left_shift(torch.ones_like(flags), flags).float()


def kept(base: Tensor, step: Tensor, bits: int, ties: Ties = "even") -> Tensor:
    """Signed codes of base integers; step = 2^f broadcasts against them. float32 as they are."""
    quotient = base.abs() / step
    rounded = torch.round(quotient) if ties == "even" else torch.floor(quotient + 0.5)
    return torch.sign(base) * rounded.clamp(max=2.0 ** (bits - 1) - 1)


def razor(base: Tensor, bits: int, size: int, ties: Ties = "even") -> tuple[Tensor, Tensor]:
    """Signed codes [..., n] float32 and flags [..., groups] int32 of base integers [..., n] float32."""
    flags = find_flags(base, bits, size)
    return kept(base, spread(steps(flags), size, base.shape[-1]), bits, ties), flags


def base_scale(largest: Tensor, base_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale of base integers from the largest |x|, float32 with the precision of its storage; 1 for zeros."""
    scale = torch.where(largest == 0, 1.0, largest.float() / (2.0 ** (base_bits - 1) - 1))
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()


def base_integers(values: Tensor, scale: Tensor, base_bits: int) -> Tensor:
    """round(x / scale), half to even, limited to +-(2^(B-1) - 1) where the stored scale is a little too small."""
    top = 2.0 ** (base_bits - 1) - 1
    return torch.round(values / scale).clamp(-top, top)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RazorQuantizer:
    """Both stages on activations [..., n], groups along the last axis; float32, cast back to the dtype of x.

    NaN and Inf come out as NaN. `per_tensor` gives each sequence (the first axis) one scale and so looks across
    tokens.
    """

    bits: int
    base_bits: int = 16
    group_size: int = 32
    per_tensor: bool = False
    ties: Ties = "even"

    @property
    def effective_bits(self) -> float:
        """Codes and flags."""
        return float(payload_bits(self.base_bits, self.bits, self.group_size))

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        axes = tuple(range(1, x.dim())) if self.per_tensor and x.dim() > 2 else (-1,)
        axes = (0, 1) if self.per_tensor and x.dim() == 2 else axes
        scale = base_scale(values.abs().amax(dim=axes, keepdim=True), self.base_bits)
        codes, flags = razor(base_integers(values, scale, self.base_bits), self.bits, self.group_size, self.ties)
        return (codes * spread(steps(flags), self.group_size, x.shape[-1]) * scale).to(x.dtype)


@dataclasses.dataclass(kw_only=True)
class RazorWeight:
    """A razored weight. `packed()`: sign-magnitude codes, flags, scales, each in words or its storage dtype."""

    codes: Tensor  # int8 [rows, columns], signed
    flags: Tensor  # uint8 [rows, groups], or [groups, columns] for axis out
    scale: Tensor  # [rows, base groups], storage dtype
    bits: int
    base_bits: int
    group_size: int
    axis: Axis = "in"
    solver: str = "qrazor"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def payload_bits(self) -> float:
        """Codes and flags."""
        return float(payload_bits(self.base_bits, self.bits, self.group_size))

    def integers(self) -> Tensor:
        """q_hat, float32 [rows, columns]."""
        rows, columns = self.shape
        step = steps(self.flags.int())
        if self.axis == "out":
            return self.codes.float() * spread(step.T, self.group_size, rows).T
        return self.codes.float() * spread(step, self.group_size, columns)

    def dequantize(self) -> Tensor:
        columns = self.shape[1]
        return self.integers() * spread(self.scale.float(), columns // self.scale.shape[1], columns)

    def packed(self) -> dict[str, Tensor]:
        # Sign above magnitude, r bits; flags along the longer axis, so that words are filled.
        codes = self.codes.abs().to(torch.uint8) | ((self.codes < 0).to(torch.uint8) << (self.bits - 1))
        tensors = {"weight_packed": pack_bits(codes, self.bits), "weight_scale": self.scale}
        width = flag_bits(self.base_bits, self.bits)
        if width:
            tensors["weight_flags"] = pack_bits(self._flag_lines(), width)
        return tensors

    def stored_bytes(self) -> int:
        rows, columns = self.shape
        lines, count = self._flag_lines().shape
        words = rows * packed_words(columns, self.bits)
        words += lines * packed_words(count, flag_bits(self.base_bits, self.bits))
        return 4 * words + self.scale.numel() * self.scale.element_size()

    def _flag_lines(self) -> Tensor:
        return self.flags.T.contiguous() if self.axis == "in" else self.flags

    def row_range(self, start: int, stop: int) -> RazorWeight:
        size = self.group_size
        if self.axis == "out" and (start % size or (stop % size and stop != len(self.codes))):
            raise InvalidInput(f"rows {start} to {stop} are not whole groups of {size} output rows")
        own = slice(start // size, -(-stop // size)) if self.axis == "out" else slice(start, stop)
        return dataclasses.replace(
            self,
            codes=self.codes[start:stop],
            flags=self.flags[own],
            scale=self.scale[start:stop],
            notes=dict(self.notes),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RazorGrid(ColumnGrid):
    """How weights are razored. `bits` is r, `group_size` the razor group g; always symmetric.

    Base scales are fitted on the untouched weights, one per row or per `base_group` columns.
    """

    base_bits: int = 8
    base_group: int = -1
    axis: Axis = "in"
    ties: Ties = "even"
    refit: bool = False

    def nearest(self, weight: Tensor) -> RazorWeight:
        weight = weight.float()
        scale = self._base_scale(weight)
        base = base_integers(weight, self._by_column(scale, weight), self.base_bits)
        codes, flags = self._razor(base)
        made = self._weight(codes, flags, scale)
        made.notes = {"zeros": float((codes == 0).float().mean())}
        if self.refit:
            made.scale = self._refitted(weight, made)
        return made

    def _razor(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and flags of base integers [rows, columns], grouped along the grid's axis."""
        if self.axis == "in":
            return razor(base, self.bits, self.group_size, self.ties)
        codes, flags = razor(base.T, self.bits, self.group_size, self.ties)
        return codes.T, flags.T

    def _weight(self, codes: Tensor, flags: Tensor, scale: Tensor) -> RazorWeight:
        return RazorWeight(
            codes=codes.to(torch.int8).contiguous(),
            flags=flags.to(torch.uint8).contiguous(),
            scale=scale.to(self.scale_dtype),
            bits=self.bits,
            base_bits=self.base_bits,
            group_size=self.group_size,
            axis=self.axis,
        )

    def _base_scale(self, weight: Tensor) -> Tensor:
        """[rows, base groups], float32. Raises NonFinite."""
        columns = weight.shape[1]
        size = columns if self.base_group == -1 else self.base_group
        if columns % size:
            raise InvalidInput(f"base_group {size} does not divide {columns} columns")
        largest = weight.abs().reshape(len(weight), -1, size).amax(dim=-1)
        if not bool(torch.isfinite(largest).all()):
            raise NonFinite("the weights hold NaN or Inf")
        self.store(largest / (2.0 ** (self.base_bits - 1) - 1))  # raises when a scale does not fit its dtype
        return base_scale(largest, self.base_bits, self.scale_dtype)

    def _by_column(self, scale: Tensor, weight: Tensor) -> Tensor:
        columns = weight.shape[1]
        return spread(scale, columns // scale.shape[1], columns)

    def _refitted(self, weight: Tensor, made: RazorWeight) -> Tensor:
        """Least-squares scales for the codes, kept where they lower the squared error as stored."""
        x, z = (t.reshape(*made.scale.shape, -1) for t in (weight, made.integers()))  # [rows, base groups, columns]
        fitted = ((x * z).sum(-1) / z.square().sum(-1).clamp(min=1e-12)).to(self.scale_dtype)
        before, after = ((x - z * s.float()[..., None]).square().sum(-1) for s in (made.scale, fitted))
        return torch.where(after < before, fitted, made.scale)

    # -- inside the column loop of an error-compensating solver -------------------------------------------------------

    def compensate(self, weight: Tensor, factor: Factor, *, static: bool = False) -> RazorWeight:
        """Both stages, column by column; a group's flags are found when the loop reaches its first column.

        Flags come from the untouched weights where `static`, or where the loop's order tears groups apart. The base
        stage is kept for every column, so that without error feedback this is `nearest`.
        """
        weight = weight.float()
        scale, order = self._base_scale(weight), factor.order
        by_column = self._by_column(scale, weight)
        whole = self.axis == "in" and not static and _keeps_groups(order, self.group_size)
        fixed = None if whole or self.axis == "out" else self._fixed_steps(weight, by_column)

        def fit(j: int, current: Tensor) -> tuple[Tensor, Tensor]:
            """Base scale and step [rows] of the columns that begin at a position, from current weights [g, rows]."""
            own = by_column[:, order[j]]
            if fixed is not None:
                return own, fixed[:, order[j]]
            return own, self._current_steps(base_integers(current, own, self.base_bits))

        def rounding(j: int, column: Tensor, own: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            codes = kept(base_integers(column, own, self.base_bits), step, self.bits, self.ties)
            return codes, codes * step * own

        live = weight.masked_fill(factor.dead, 0.0)[:, order]
        size = self.group_size if whole else 1
        solution = solve(live, factor.upper, self, size=size, fit=fit, rounding=rounding)
        if not bool(torch.isfinite(solution.values).all()):
            raise NonFinite("the column loop produced NaN or Inf")
        found = torch.empty_like(solution.zero)  # steps in the original order, [groups or columns, rows]
        found[order[::size] // size] = solution.zero
        codes = torch.empty_like(solution.codes)
        codes[order] = solution.codes
        made = self._weight(codes.T, self._flags_of(found, whole), scale)
        grid_steps = by_column[:, order].T * solution.zero.repeat_interleave(size, dim=0)
        clipped = (solution.updated - solution.values).abs() > 1.001 * grid_steps  # both stages err by half a step
        figures = {"clipped": clipped, "zeros": codes == 0}
        made.notes = {"damping": factor.damping, "loss": solution.loss}
        made.notes |= {name: float(found.float().mean()) for name, found in figures.items()}
        return made

    def _fixed_steps(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Steps of untouched weights; all [rows, columns]."""
        flags = find_flags(base_integers(weight, scale, self.base_bits), self.bits, self.group_size)
        return spread(steps(flags), self.group_size, weight.shape[1])

    def _current_steps(self, base: Tensor) -> Tensor:
        """Steps [rows] of base integers of a group of columns [g, rows], or of one column [1, rows] for axis out."""
        if self.axis == "in":
            return steps(find_flags(base.T, self.bits, len(base)))[:, 0]
        return spread(steps(find_flags(base, self.bits, self.group_size)), self.group_size, base.shape[1])[0]

    def _flags_of(self, step: Tensor, whole: bool) -> Tensor:
        """Flags as a weight holds them, from steps 2^f in the original order [groups or columns, rows]."""
        flags = torch.frexp(step)[1] - 1
        if self.axis == "out":
            return flags[:, :: self.group_size].T
        return flags.T if whole else flags[:: self.group_size].T


def _keeps_groups(order: Tensor, size: int) -> bool:
    """Whether each run of `size` positions in the loop is one group of columns."""
    if len(order) % size:
        return False
    groups = (order // size).reshape(-1, size)
    return bool((groups == groups[:, :1]).all())
