"""SVDQuant: smooth inputs, let a 16-bit low-rank branch take what is largest of the weight, quantize the rest.

    x_s = x / lam   W_s = W diag(lam)   W_s ~ U V, rank r   R = Q(W_s - U V)       y = Q(x_s) R^T + (x_s V^T) U^T + b

The branch sees inputs as they are before the quantizer (arXiv 2411.05007, sections 4.2 and 4.3). Layers that read one
input share lam and V: their weights are stacked.

    lam     of ones, a^alpha and a^alpha / w^(1 - alpha), alpha = 1/n .. (n - 1)/n, a and w the largest |x| and |W| of a
            channel: whichever gives the smallest error of the layers' outputs with everything quantized, weights in
            the groups of the inputs too
    U V     truncated SVD of W_s, then of W_s - R of the step before, up to `iterations` times; the best is kept, and
            the search ends with the first that is worse
    Q       symmetric groups along the inputs, s = max|.| / (2^(b-1) - 1), scales of 16 bits, weights and activations

Stored: codes and scales, U and V in `term_dtype`, lam in bfloat16; V and lam once for layers that share them. At 4096 x
4096, r = 32, groups of 64 and 4 bits: 4.504 bits per weight. Published for diffusion models only; there are no figures
for language models to compare with, and its down projections have no special case for non-negative inputs here.

Differences from mit-han-lab/deepcompressor: candidates are compared by the outputs of the layers themselves, on up to
512 ordinary tokens of calibration text (there: by attention's and the MLP's), with a sketched SVD in place of the exact
one; GPTQ on the residual and formats other than integers are not offered; lam divides x online, in the model's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.linear import transform_input
from qfarm.layers.rtn import TINY, Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.models.architecture import linear_shapes
from qfarm.models.load import LoadedModel
from qfarm.quantized import LowRank
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, ActivationMethod, Recipe, Transform, WeightSolver
from qfarm.scheme import UNTOUCHED, Scheme

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SMALLEST = 1e-5  # of w, as a fraction of its largest
WORSE = 1 + 1e-6  # an error this much larger ends the refinement
OVERSAMPLING, POWER_ITERATIONS = 16, 2  # of the sketch; Halko et al., arXiv 0909.4061, section 4


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SVDQuant(Transform, WeightSolver, ActivationMethod):
    source = "Li et al., ICLR 2025, arXiv 2411.05007; github.com/mit-han-lab/deepcompressor"
    optional = frozenset({"linear_in"})
    site_widths = dict.fromkeys(("linear_in",), range(2, 9))
    joint = True

    rank: int = Field(32, ge=0, description="of the branch; 0: none")
    smooth: bool = Field(True, description="search factors that divide inputs")
    candidates: int = Field(20, ge=2, description="n of the search: 2 n - 1 vectors of factors are tried")
    iterations: int = Field(100, ge=1, description="of the branch's refinement at most; 1: the plain SVD")
    activation_group: int | None = Field(None, description="of linear inputs; default: the job's group size")
    term_dtype: Literal["bfloat16", "float16"] = Field("bfloat16", description="storage of both factors")

    @property
    def stackable(self) -> bool:
        return False  # rows share V

    def resolve(self, group_size: int) -> Self:
        own = self.activation_group
        return dataclasses.replace(self, activation_group=group_size if own is None else own)

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.activation_group not in (None, -1) and int(self.activation_group or 0) < 2:
            return f"activation_group is -1 or at least 2, not {self.activation_group}"
        return None

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        if recipe.wrappers:
            return f"it keeps a low-rank branch itself; raise its rank instead of adding {recipe.wrappers[0].name}"
        return None

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        group = self.activation_group or -1
        for role, (_, columns) in linear_shapes(config, "the model").items():
            if group != -1 and columns % group:
                return f"activation_group {group} does not divide the {columns} inputs of {role}"
        return None

    def symmetric_weights(self, asked: bool) -> bool:
        return True

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.SAMPLE})

    def site_statistics(self) -> frozenset[Statistic]:
        return frozenset()

    def transform_statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.SAMPLE, Statistic.MAX_ABS} if self.smooth else set())

    # -- smoothing ----------------------------------------------------------------------------------------------------

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        return self.learn(loaded, observed, seed, None, Scheme(weight=4, linear_in=4))

    def learn(
        self, loaded: LoadedModel, observed: Observed, seed: int, windows: Tensor | None, scheme: Scheme
    ) -> list[str]:
        if not self.smooth:
            return ["inputs are not smoothed"]
        before = dict(loaded.divided)
        loaded.on_restore(lambda: setattr(loaded, "divided", before))
        notes = []
        for group in loaded.architecture.shared_inputs:
            found = [self._smooth(loaded, block, group, observed, scheme) for block in range(len(loaded.blocks))]
            spread = [float(lam.max() / lam.min()) for lam in found]
            notes.append(f"inputs of {', '.join(group)} divided by factors up to {max(spread):.3g} apart in a layer")
        return notes

    def _smooth(
        self, loaded: LoadedModel, block: int, group: tuple[str, ...], observed: Observed, scheme: Scheme
    ) -> Tensor:
        """Divide the input of one group of layers; returns the factors."""
        linears, inputs = loaded.linears(block), observed[Place("linear_in", block, group[0])]
        assert inputs.sample is not None and inputs.max_abs is not None
        weight = torch.cat([linears[role].weight.detach().float() for role in group])
        bits = scheme.weight_bits(group[0])
        size = self.activation_group or -1
        grid = Grid(bits=bits, group_size=size, symmetric=True) if bits != UNTOUCHED else None
        quantize = _inputs_quantizer(scheme.linear_in, size)
        lam = self.search(weight, inputs.sample, inputs.max_abs, grid, quantize)
        for role in group:
            loaded.replace_parameter(linears[role], "weight", linears[role].weight.float() * lam)
            transform_input(loaded, block, role, Divided(lam))
        loaded.divided[block, group] = lam
        return lam

    def search(self, weight: Tensor, sample: Tensor, largest: Tensor, grid: Grid | None, quantize: Quantizer) -> Tensor:
        """The best lam [in] for weight [out, in], on sample [tokens, in]; largest |x| [in]."""
        wanted, best = sample @ weight.T, torch.ones_like(largest)
        lowest = torch.inf
        for lam in smoothings(largest, weight.abs().amax(0), self.candidates):
            scaled = weight * lam
            term = sketched(scaled, self.rank)
            rest = scaled if term is None else scaled - term[0] @ term[1]
            rounded = rest if grid is None else grid.quantize(rest).dequantize()
            error = output_error(wanted, sample / lam, rounded, term, quantize)
            if error < lowest:
                best, lowest = lam, error
        return best

    # -- weights and inputs -------------------------------------------------------------------------------------------

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> SharedTerm:
        assert inputs is not None and inputs.sample is not None
        quantize = _inputs_quantizer(inputs.bits, self.resolve(grid.group_size).activation_group or -1)
        grid = dataclasses.replace(grid, symmetric=True)
        wanted, best, lowest, errors = inputs.sample @ weight.T, None, float("inf"), list[float]()
        target = weight
        while len(errors) < self.iterations:
            term = truncated(target, self.rank, DTYPES[self.term_dtype])
            base = grid.quantize(weight - term[0].float() @ term[1].float())
            values = base.dequantize()
            error = output_error(wanted, inputs.sample, values, (term[0].float(), term[1].float()), quantize)
            errors.append(error)
            if error < lowest:
                best, lowest = (base, term), error
            elif error > lowest * WORSE or not error < torch.inf:
                break
            if not self.rank:
                break
            target = weight - values
        if best is None:
            raise NonFinite("the error of the low-rank branch is not finite")
        lam = None if inputs.divided is None else inputs.divided.bfloat16()
        return SharedTerm(
            base=best[0],
            left=best[1][0],
            right=best[1][1],
            branch=True,
            smoothing=lam,
            solver="svdquant",
            notes={"rank": self.rank, "steps": len(errors), "branch_error": lowest},
        )

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        return Grouped(bits=bits, group_size=self.activation_group or -1)


METHOD = SVDQuant


@dataclasses.dataclass(kw_only=True)
class SharedTerm(LowRank):
    """A branch whose right factor and smoothing are those of all layers that read the same input.

    They are stored with the first of these; the others refer to it.
    """

    smoothing: Tensor | None = None  # lam [columns], bfloat16
    first: bool = True

    def stored_bytes(self) -> int:
        shared = [] if self.first else [self.right]
        lam = [self.smoothing] if self.first and self.smoothing is not None else []
        return super().stored_bytes() + sum(sign * _bytes(t) for sign, ts in ((-1, shared), (1, lam)) for t in ts)

    def packed(self) -> dict[str, Tensor]:
        tensors = super().packed()
        if not self.first:
            del tensors["weight_right"]
        elif self.smoothing is not None:
            tensors["weight_input_scale"] = self.smoothing
        return tensors

    def row_range(self, start: int, stop: int) -> SharedTerm:
        base = self.base.row_range(start, stop)
        notes = self.notes | ({} if start == 0 else {"right_factor": "stored with the first of these layers"})
        return dataclasses.replace(self, base=base, left=self.left[start:stop], first=start == 0, notes=notes)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclasses.dataclass(frozen=True, eq=False)
class Divided:
    """x / lam."""

    lam: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() / self.lam.to(x.device)).to(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """Symmetric groups of consecutive inputs, codes +-(2^(b-1) - 1), scales of 16 bits; -1: the whole token."""

    bits: int
    group_size: int

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-1] if self.group_size == -1 else self.group_size
        values, top = x.float().reshape(-1, size), 2.0 ** (self.bits - 1) - 1
        scale = (values.abs().amax(dim=-1, keepdim=True) / top).bfloat16().float()
        scale = torch.where(scale > TINY, scale, 1.0)
        return (values / scale).round_().clamp_(-top, top).mul_(scale).reshape(x.shape).to(x.dtype)


def _inputs_quantizer(bits: int, group_size: int) -> Quantizer:
    return (lambda x: x) if bits == UNTOUCHED else Grouped(bits=bits, group_size=group_size)


def smoothings(largest: Tensor, weights: Tensor, count: int) -> Iterator[Tensor]:
    """Candidates for lam [in], rounded as they are stored; ones come first, and in place of what is not usable."""
    ones, floored = torch.ones_like(largest), weights.clamp(min=SMALLEST * float(weights.max()))
    yield ones
    for index in range(1, count):
        alpha = index / count
        for beta in (0.0, 1 - alpha):
            lam = (largest.pow(alpha) / floored.pow(beta)).bfloat16().float()
            lam = torch.where(lam == 0, ones, lam)
            yield lam if bool(torch.isfinite(lam).all()) else ones


def output_error(
    wanted: Tensor, x: Tensor, rounded: Tensor, term: tuple[Tensor, Tensor] | None, quantize: Quantizer
) -> float:
    """Squared error of Q(x) R^T + (x V^T) U^T against the output that is wanted, [tokens, out]."""
    made = quantize(x) @ rounded.T
    if term is not None:
        made += (x @ term[1].T) @ term[0].T
    return float((made - wanted).square().sum(dtype=torch.float64))


def truncated(weight: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U [out, r] with the singular values and V [r, in] of the truncated SVD, found in float64."""
    rank = min(rank, *weight.shape)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]).to(dtype), right[:rank].to(dtype)


def sketched(weight: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Nearly the same in float32 by a randomised range finder, for comparing candidates; None at rank 0."""
    rank = min(rank, *weight.shape)
    if not rank:
        return None
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same start on every device
    width = min(rank + OVERSAMPLING, *weight.shape)
    basis = torch.randn(weight.shape[1], width, generator=generator).to(weight.device)
    for _ in range(1 + POWER_ITERATIONS):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis).Q).Q  # [in, width]
    left, values, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank] @ basis.T
