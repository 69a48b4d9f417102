"""QERA: a low-rank term beside the quantized weight that repairs as much of the layer's output error as its rank can.

    W [m, n]   E = W - Q [m, n]   R [n, n] = mean of x x^T   C = left @ right [m, n], rank k   y = x (Q + C)^T

The term minimises the expected output error, E|x (E - C)^T|^2 = tr((E - C) R (E - C)^T), in closed form (Zhang et
al., arXiv 2410.06040). With V the k leading eigenvectors of E R E^T [m, m]:

    C = V V^T E      left = V [m, k]      right = V^T E [k, n]      what remains = sum of the discarded eigenvalues

The paper writes this as S^-1 SVD_k(S E^T) with S = R^(1/2); the form above is the same matrix without root or inverse,
so dead and duplicated inputs (singular R) need no perturbation. Rows longer than wide, m > n: with E = Q_E T (QR), V =
Q_E Z, Z the eigenvectors of T R T^T [n, n].

Modes, which differ in R only:

    exact      the full second moment                            QERA-exact
    approx     its diagonal: channels taken as uncorrelated      QERA-approx; can be no better than identity
    lqer       diag(s^2), s = mean|x| / sqrt(min * max)          LQER (arXiv 2402.02446)
    identity   I: truncated SVD of the weight error, no text     ZeroQuant-V2's LoRC (arXiv 2303.08302)

Works on top of any weight solver (`gptq+qera`), and on rounding to nearest when it stands alone. R is what the solver
saw too: in sequential mode the inputs that the quantized prefix makes.

Stored: the base, left and right in `term_dtype`: 16 k (m + n) / (m n) bits per weight beyond the base.

Differences from ChengZhang-98/QERA: the base quantizer is the recipe's, not MXINT, whose blocks of 32 share an 8-bit
exponent: that is a format of its own, for which qfarm has no grid and no packed form; R is accumulated in float32 (the
form above does not amplify its small eigenvalues), everything after it runs in float64; lqer takes the mean of |x|
over all tokens, not the largest of the samples' means; the singular values stay on the right factor. LoftQ's
alternation of quantizer and SVD is not offered: the solver has finished when a wrapper is called.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import LowRank, QuantizedWeight
from qfarm.recipe import STRICT, Wrapper

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LQER_FLOOR = 1e-4  # of mean |x|, from the LQER code
OVERSAMPLING, POWER_ITERATIONS = 16, 2  # of the sketch; Halko et al., arXiv 0909.4061, section 4


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QERA(Wrapper):
    source = "Zhang et al., ICLR 2025, arXiv 2410.06040; code ChengZhang-98/QERA"

    mode: Literal["exact", "approx", "lqer", "identity"] = Field(
        "exact",
        description="input statistics: full second moment, its diagonal, LQER's scaling, or none (ZeroQuant-V2)",
    )
    rank: int | None = Field(None, ge=1, description="rank of the term; default: 32 from 4 bits up, 64 below")
    extra_bits: float | None = Field(
        None, gt=0, le=16, description="instead of a rank: bits per weight spent on the term, in every layer alike"
    )
    term_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="storage of both factors")
    token_norm: bool = Field(False, description="scale tokens down to 4x the median norm before they enter R")
    sketch: bool = Field(False, description="randomised eigenvectors: faster for large layers, nearly optimal")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.rank is not None and self.extra_bits is not None:
            return "rank and extra_bits both set the size of the term; choose one"
        if self.token_norm and self.mode not in ("exact", "approx"):
            return f"token_norm needs mode exact or approx; {self.mode} reads no second moment"
        return None

    def statistics(self) -> frozenset[Statistic]:
        moment = Statistic.NORMALISED_HESSIAN if self.token_norm else Statistic.HESSIAN
        needs = {"exact": {moment}, "approx": {moment}, "lqer": {Statistic.MEAN_ABS}, "identity": set[Statistic]()}
        return frozenset(needs[self.mode])

    def wrap(self, weight: Tensor, quantized: QuantizedWeight, inputs: InputStatistics | None) -> QuantizedWeight:
        wanted = self.affordable(weight.shape[0], weight.shape[1], quantized.bits)
        rank = min(wanted, *weight.shape)
        if rank == 0:
            _note(quantized.notes, f"qera: {self.extra_bits} bits per weight buy no rank here")
            return quantized
        error = (weight.float() - quantized.dequantize()).double()
        moment = self._moment(inputs, error)
        left, right = reconstruct(error, moment, rank, sketch=self.sketch)
        dtype = DTYPES[self.term_dtype]
        term = LowRank(base=quantized, left=left.to(dtype), right=right.to(dtype), solver=f"{quantized.solver}+qera")
        rest = error - term.left.double() @ term.right.double()
        before, after = weighted_norm(error, moment), weighted_norm(rest, moment)
        if not bool(torch.isfinite(rest).all()):
            raise NonFinite(f"the low-rank term does not fit {self.term_dtype}; use another term_dtype")
        term.notes = quantized.notes | {"rank": rank, "repaired": 1 - after / before if before else 0.0}
        if inputs is not None and inputs.sample is not None:  # the solver's own figure is that of its weight alone
            term.notes["ordinary_error_with_term"] = inputs.ordinary_error(weight, term.dequantize())
        if rank < wanted:
            _note(term.notes, f"qera: rank {wanted} cut to {rank}, the smaller side of the layer")
        return term

    def affordable(self, rows: int, columns: int, bits: int) -> int:
        """The rank that the options ask for in a layer of that shape."""
        if self.extra_bits is not None:
            element = 8 * DTYPES[self.term_dtype].itemsize
            return int(self.extra_bits * rows * columns / (element * (rows + columns)))
        return self.rank or (32 if bits >= 4 else 64)

    def _moment(self, inputs: InputStatistics | None, error: Tensor) -> Tensor:
        """R in float64: [n, n], or its diagonal [n]. Raises NonFinite."""
        if self.mode == "identity":
            return error.new_ones(error.shape[1])
        assert inputs is not None
        if self.mode == "lqer":
            assert inputs.mean_abs is not None
            found = lqer_scale(inputs.mean_abs.double()).square()
        else:
            hessian = inputs.normalised_hessian if self.token_norm else inputs.hessian
            assert hessian is not None
            found = (hessian if self.mode == "exact" else hessian.diagonal()).double()
        if not bool(torch.isfinite(found).all()):
            raise NonFinite("the calibration inputs hold NaN or Inf")
        return found


METHOD = QERA


def _note(notes: dict[str, Any], reason: str) -> None:
    notes["reason"] = f"{notes['reason']}; {reason}" if "reason" in notes else reason


def lqer_scale(mean_abs: Tensor) -> Tensor:
    """LQER's factor per input: mean |x| over the geometric mean of its extremes."""
    floored = mean_abs.clamp(min=LQER_FLOOR)
    return floored / (floored.min() * floored.max()).sqrt()


def weighted(rows: Tensor, moment: Tensor) -> Tensor:
    """rows [.., n] times R, which is [n, n] or the diagonal [n]."""
    return rows * moment if moment.dim() == 1 else rows @ moment


def weighted_norm(error: Tensor, moment: Tensor) -> float:
    """tr(E R E^T): the expected squared output error."""
    return float((weighted(error, moment) * error).sum())


def reconstruct(error: Tensor, moment: Tensor, rank: int, sketch: bool = False) -> tuple[Tensor, Tensor]:
    """left [m, k] with orthonormal columns and right [k, n], whose product is closest to E [m, n] in the norm of R."""
    rows, columns = error.shape
    if sketch and rank + OVERSAMPLING < min(rows, columns):
        left = sketched_directions(error, moment, rank)
    elif rows <= columns:
        left = leading_eigenvectors(weighted(error, moment) @ error.T, rank)
    else:
        basis, triangle = torch.linalg.qr(error)  # [m, n], [n, n]
        left = basis @ leading_eigenvectors(weighted(triangle, moment) @ triangle.T, rank)
    return left, left.T @ error


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors [m, k] of the k largest eigenvalues, largest first."""
    symmetric = (gram + gram.T) / 2
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(1)


def sketched_directions(error: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Nearly the leading eigenvectors of E R E^T, by a randomised range finder that never forms that matrix."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same start on every device
    start = torch.randn(error.shape[0], rank + OVERSAMPLING, generator=generator, dtype=error.dtype)
    basis = start.to(error.device)
    for _ in range(1 + POWER_ITERATIONS):
        basis = torch.linalg.qr(error @ weighted(basis.T @ error, moment).T).Q
    projected = basis.T @ error  # [k + 16, n]
    return basis @ leading_eigenvectors(weighted(projected, moment) @ projected.T, rank)
