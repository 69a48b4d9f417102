"""ResQ: principal directions of activations at 8 bits, the others at 4, with a random rotation inside each subspace.

    S = sum of x x^T + 0.01 mean(diag S) I = P diag(lambda) P^T, eigenvalues ascending    U = P blockdiag(R_lo, R_hi)

x are activations behind emptied norms, R random orthogonal matrices drawn once; the last rho = 1/8 of the coordinates
of x U have 8 bits. U is orthogonal, so it fuses as in QuaRot (arXiv 2412.14363, section 4):

    basis   of                                     from                                    where
    U_A     hidden states, all layers alike        inputs of q, k, v and of gate, up       fused
    U_B     values, per layer and key/value head   outputs of v                            fused into v and o
    U_C     queries and keys, per layer            keys after the rotary embedding         where keys are cached
    U_D     the input of down                      nothing: a Hadamard matrix              online; 4 bits throughout

    inputs of q, k, v, gate, up   per token, asymmetric through zero, each part with its own range
    input of o, values            the same per head, the range not forced through zero
    keys                          at 8 bits, times U_C (at 8 bits, one scale), then as values but through zero
    queries                       at 8 bits, times U_C; they are not rounded again
    weights                       columns of the last 1/8 coordinates at 8 bits, the others at 4, a scale per row and
                                  part, symmetric, range searched; GPTQ in `resq+gptq`, else to nearest

Since scores are (q U_C)(k U_C)^T, the cache hands back k U_C U_C^T and attention is the model's own. Where another
method of the chain quantizes inputs or cache, it has the site, in these bases.

Stored: 4.5 bits per number in mixed places and 4 at down, plus scales: weights 32 bits per row (16 at down), cache two
scales and zeros per head; U_C: one byte per element and layer. Compare it with 4.5 bits, not with 4.

Published W4A4KV4, WikiText-2, Llama-3 8B / 70B, Llama-3.2 1B / 3B: 7.1 / 4.1 / 12.0 / 9.0; SpinQuant 7.4 / 6.2 / 13.1
/ 9.2; full precision 6.1 / 2.9 / 9.7 / 7.5. 512 windows of WikiText for the bases, 128 for GPTQ.

Differences from utkarsh-dmx/project-resq: embeddings are not centred where norms are RMS norms; the width of heads is
the configuration's; columns of o stay where they are, with the finer ones marked, instead of being moved to the end, so
that GPTQ comes to them in another order; any will do (`gptq: {act_order: false}` is theirs but for that), since scales
are fixed before the loop; moments are accumulated in float32, eigenvectors found in float64 (their signs are the
library's, so last digits differ between machines); the bases come from the job's calibration text; codes of weights are
+-7 and +-127; bases per layer, trained rotations and int8_down_proj are not offered.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.fuse import Bases, Fusion
from qfarm.hadamard import Hadamard, random_orthogonal
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.clipped import ClippedAsymmetric, ClippedLayer, TwoWidths, high_count
from qfarm.layers.inject import MakeLayer
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.layers.turn import Turn
from qfarm.mixed import MixedGrid, MixedWeight
from qfarm.models.architecture import head_width
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, GridProvider, Recipe, WeightSolver
from qfarm.rotation import FOLDED, SITES, Rotation, online_notes, turn_keys
from qfarm.scheme import Scheme

UNIFORM = {"search": False, "convention": "restricted", "stale_block": None}  # a solver's options for its own grids
HIGH_BITS = 8  # of the strong directions; the scheme names the width of the others
TURN_BITS = 8  # of U_C, and of queries and keys before it


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResQ(Rotation, GridProvider):
    source = "Saxena et al., ICML 2025, arXiv 2412.14363; github.com/utkarsh-dmx/project-resq"
    claims = SITES | {"weight"}
    site_widths = dict.fromkeys(SITES, range(2, 8))
    widths = range(2, 8)
    learns_from = frozenset({"linear_in", "k", "v"})
    prepared = FOLDED

    fraction: float = Field(0.125, ge=0, le=0.5, description="of coordinates that have 8 bits (rho)")
    damping: float = Field(0.01, gt=0, lt=1, description="added to diag(S), as a fraction of its mean")
    pre_rotation_8bit: bool = Field(True, description="queries, keys and U_C at 8 bits before they are multiplied")
    search: bool = Field(True, description="search a clipped range of weights per row and part, error norm 2.4")

    @property
    def needs_text(self) -> bool:
        return True

    def transform_statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.HESSIAN})

    def packed_refusal(self) -> str | None:
        return "its weights have two widths in one row, which no packed operator reads"

    def statistics(self) -> frozenset[Statistic]:
        return frozenset()  # of its weights

    def symmetric_weights(self, asked: bool) -> bool:
        return True

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        return None if group_size == -1 else "each part of a row has one scale; use group size -1"

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        width = head_width(config, "the model")
        if self.fraction and not (self.fraction * width >= 1 and (self.fraction * width).is_integer()):
            return f"fraction {self.fraction} of heads of {width} is no whole number of coordinates"
        return super().model_refusal(config)

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        for solver in (method for method in recipe.methods if isinstance(method, WeightSolver) and method != self):
            for option, usual in UNIFORM.items():
                if solver.options().get(option, usual) != usual:
                    return f"{solver.name}'s option {option} is of uniform grids; leave it out beside {self.name}"
        return super().recipe_refusal(recipe)

    # -- rotation -----------------------------------------------------------------------------------------------------

    def learn(
        self, loaded: LoadedModel, observed: Observed, seed: int, windows: Tensor | None, scheme: Scheme
    ) -> list[str]:
        notes = self.transform(loaded, observed, seed)
        if scheme.sites & {"kv_cache", "q"}:
            width = loaded.head_dim
            numbers = len(loaded.blocks) * width * width
            extra = numbers + 2 * len(loaded.blocks) if self.pre_rotation_8bit else 4 * numbers
            loaded.store_beside(extra)
            notes.append(f"U_C of all layers: {extra} bytes, counted in the model's")
        return notes

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        draw, width, blocks = torch.Generator().manual_seed(seed), loaded.head_dim, range(len(loaded.blocks))
        total = sum(_moment(observed[Place("linear_in", block, role)]) for block in blocks for role in ("q", "up"))
        assert isinstance(total, Tensor)
        inside, per_head = (self.rotations(size, draw).to(total.device) for size in (len(total), width))
        variances, principal = eigenbasis(total, self.damping)
        values, keys = [], []
        for block in blocks:
            found = [heads_of(_moment(observed[Place(site, block)]), width) for site in ("v", "k")]
            values.append(torch.stack([eigenbasis(head, self.damping)[1] @ per_head for head in found[0]]))
            keys.append(eigenbasis(found[1].sum(0), self.damping)[1] @ per_head)
        bases = Bases(stream=principal @ inside, values=values, down=Hadamard(loaded.linears(0)["down"].in_features))
        high = high_count(self.fraction, len(total))
        share = float(variances[len(total) - high :].sum() / variances.sum())
        notes = [f"hidden states: {high} of {len(total)} directions hold {share:.1%} of the second moment"]
        notes += online_notes(loaded, bases)
        Fusion(loaded).install(bases)
        turn_keys(loaded, [self.turn(matrix) for matrix in keys])
        return notes

    def rotations(self, size: int, draw: torch.Generator) -> Tensor:
        """blockdiag(R_lo, R_hi) [n, n], float64."""
        high = high_count(self.fraction, size)
        found = torch.zeros(size, size, dtype=torch.float64)
        for part in (slice(0, size - high), slice(size - high, size)):
            found[part, part] = random_orthogonal(part.stop - part.start, draw)
        return found

    def turn(self, matrix: Tensor) -> Turn:
        """Keys and queries times U_C [h, h]."""
        if not self.pre_rotation_8bit:
            exact = matrix.float()
            return Turn(forward=lambda x: times(x, exact), back=lambda x: times(x, exact.T))
        flat = Grid(bits=TURN_BITS, symmetric=True, scale_dtype=torch.float32)
        rounded = flat.quantize(matrix.float().reshape(1, -1)).dequantize().reshape(matrix.shape)
        eight = ClippedAsymmetric(bits=TURN_BITS)
        return Turn(forward=lambda x: times(eight(x), rounded), back=lambda x: times(x, rounded.T), queries=eight)

    # -- quantizers ---------------------------------------------------------------------------------------------------

    def provide(self, grid: Grid, role: str = "", head_dim: int = 0) -> MixedGrid:
        if isinstance(grid, MixedGrid):
            return grid
        return MixedGrid(
            bits=grid.bits,
            symmetric=True,
            scale_dtype=grid.scale_dtype,
            search=self.search,
            high_bits=HIGH_BITS,
            fraction=0.0 if role == "down" else self.fraction,
            unit=head_dim if role == "o" else 0,
        )

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> MixedWeight:
        return self.provide(grid).nearest(weight)

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        if place.role == "down":
            return ClippedAsymmetric(bits=bits)
        through = place.role != "o"
        low, high = (ClippedAsymmetric(bits=b, through_zero=through) for b in (bits, HIGH_BITS))
        return TwoWidths(low=low, high=high, fraction=self.fraction)

    def cache_layer(self, block: int, bits: int, observed: Observed) -> MakeLayer:
        return functools.partial(ClippedLayer, bits, 1.0, True, HIGH_BITS, self.fraction)


METHOD = ResQ


def _moment(inputs: InputStatistics) -> Tensor:
    """The second moment, float64."""
    assert inputs.hessian is not None
    return inputs.hessian.double()


def heads_of(moment: Tensor, width: int) -> Tensor:
    """Second moments [heads, width, width] of single heads, from that of all heads side by side."""
    heads = len(moment) // width
    blocks = moment.reshape(heads, width, heads, width)
    return torch.stack([blocks[head, :, head] for head in range(heads)])


def eigenbasis(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues ascending and eigenvectors [n, n] in columns of a damped second moment, float64."""
    damped = moment + damping * moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny) * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )
    found = torch.linalg.eigh(damped)
    return found.eigenvalues, found.eigenvectors


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., h] times a matrix in float32, in the dtype of x."""
    return (x.float() @ matrix.to(x.device)).to(x.dtype)
