"""ZeroQuant: groups of weights and single tokens rounded to nearest, then optionally a block trained to what it was.

    weights      groups of consecutive numbers of the matrix, b bits (`w4/8a8`: FFN at 4, attention at 8)
                 s = 2 max|w| / 2^b          w_hat = s clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)
    inputs       the same per token, anew at each call
    asymmetric   s = (max - min) / 2^b       z = round(min / s)
                 w_hat = s (clamp(round(w / s - z), 0, 2^b - 1) + z)

(Yao et al., arXiv 2206.01861; quantizers as in deepspeed.compression.) -max|w| is exact and max|w| loses one step. With
scale_dtype: float32 the symmetric weights and the inputs equal DeepSpeed's number for number. Groups are the cell's
group size inside a row (-1: a row), or `number_of_groups` G of the whole matrix in row-major order, which may cross
rows; each layer's notes say which. G = 4096, qllm-infer's default, is one group per row for 4096 x 4096.

Layer-by-layer distillation (`lkd: true`; section 4.3): the quantized block learns what the original block h_L -> t
makes of the original model's activations,

    loss = mean((y - t)^2)    AdamW on all parameters of the block, the scales following the weights;

gradients pass both roundings unchanged, clipped values included. `lkd_blocks` names blocks, by default the last one
as in qllm-infer (the paper trains all, in order). Batches are consecutive calibration windows, round and round, so
nothing is random. What AdamW is fed can be divided by mean(t^2) (`lkd_normalise`), since one rate does not suit blocks
whose losses differ by orders of magnitude. The loss curve stands in the notes of the block's first layer. A block that
was trained is kept in the cache under a hash of all that decides its result (parameters, inputs, widths, options),
so that a cell that was interrupted trains only what is missing; the cache drops what was used longest ago.

Stored: codes and one scale per group, b + 16 G / numel bits (asymmetric: 16 more for z). Norms and biases that were
learned are stored as before. Layers that the scheme leaves at 16 bits are not trained.

Differences from DeepSpeed and qllm-infer: a group or a token of zeros gets scale 1 and stays zero (0 / 0 there).
Arithmetic is float32 (bfloat16 there, which rounds w / s first). Scales are rounded to the scale dtype before the
weights. An asymmetric scale is at least 1/1024 (float16) of the largest |w|, so that z is exact in the scale dtype;
groups that narrow cannot be told apart there either. Trained parameters are float32 copies, cast in the forward pass:
in bfloat16 a step of 5e-6 would be lost. The real causal mask is used (qllm-infer's loop calls the block without one).
Norms are not decayed (there a name pattern misses them). `symmetric` is an option here; the job's key is not read.
number_of_groups is not 4096 by default, which small models cannot be divided into. Left out: static input ranges with
momentum, ternary and binary weights, annealed widths, random tokens for distillation. Not confirmed: the paper's own
distillation settings; the defaults are those of qllm-infer and of DeepSpeed's examples. Its figures for LLaMA-3.1-8B
were not rerun: WikiText-2 / C4 7.34 / 10.48 (W8A8), 8.97 / 12.63 (W4/8A16; 8.89 / 12.56 with distillation of the last
block), 9.17 / 12.87 (W4/8A8), 278 / 289 (W4A4, not a usable point); 7.22 / 10.39 at 16 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.distil import Distillation, distil
from qfarm.errors import NonFinite, QfarmError
from qfarm.inputs import InputStatistics
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.models.architecture import linear_shapes
from qfarm.quantized import QuantizedWeight, UniformWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, ActivationMethod, BlockSolver, build_method
from qfarm.walk import BlockProblem


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ZeroQuant(BlockSolver, ActivationMethod):
    source = "Yao et al., NeurIPS 2022, arXiv 2206.01861; deepspeed.compression of github.com/deepspeedai/DeepSpeed"
    widths = range(3, 9)
    site_widths = {"linear_in": range(4, 9)}  # DeepSpeed has 4 and 8
    optional = frozenset({"linear_in"})

    symmetric: bool = Field(True, description="symmetric weights; the job's own key is not read")
    number_of_groups: int | None = Field(
        None, ge=1, description="groups of the whole matrix, rows may share one; default: the cell's group size"
    )
    lkd: bool = Field(False, description="train blocks against what the original blocks compute")
    lkd_blocks: Literal["last", "all"] | list[int] = Field("last", description="blocks to train: last, all, or numbers")
    lkd_steps: int = Field(600, ge=1, description="optimizer steps per block")
    lkd_learning_rate: float = Field(5e-6, gt=0, description="of AdamW, constant")
    lkd_weight_decay: float = Field(1e-5, ge=0, description="of AdamW on matrices; none on biases and norms")
    lkd_batch: int = Field(4, ge=1, description="calibration windows per step")
    lkd_normalise: bool = Field(False, description="divide the loss by the mean square of the block's output")

    @property
    def whole_blocks(self) -> bool:
        return self.lkd

    @property
    def needs_text(self) -> bool:
        return self.lkd

    @property
    def original_inputs(self) -> bool:
        return self.lkd

    @property
    def stackable(self) -> bool:
        return self.number_of_groups is None

    def symmetric_weights(self, asked: bool) -> bool:
        return self.symmetric

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.number_of_groups is not None and group_size != -1:
            return f"number_of_groups and a group size of {group_size} exclude each other; use group size -1"
        usual = build_method("zeroquant", {}).options()
        changed = [name for name, value in self.options().items() if name.startswith("lkd_") and value != usual[name]]
        return f"{changed[0]} needs lkd: true" if changed and not self.lkd else None

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        blocks = config["num_hidden_layers"]
        beyond = [b for b in self.lkd_blocks if not 0 <= b < blocks] if isinstance(self.lkd_blocks, list) else []
        if beyond or self.lkd_blocks == []:
            return f"lkd_blocks: the model has blocks 0..{blocks - 1}, got {beyond or 'none'}"
        if self.number_of_groups is None:
            return None
        for role, (rows, columns) in linear_shapes(config, "model").items():
            if rows * columns % self.number_of_groups:
                return (
                    f"number_of_groups: {self.number_of_groups} does not divide the {rows * columns} weights of {role}"
                )
        return None

    def packed_refusal(self) -> str | None:
        return None if self.number_of_groups is None else "number_of_groups: its groups run on from row to row"

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        grid = dataclasses.replace(grid, symmetric=self.symmetric, convention="deepspeed")
        if self.number_of_groups is None:
            made: UniformWeight | FlatGroups = round_groups(weight, grid)
            made.notes = {"group_size": grid.group_size, "symmetric": self.symmetric}
            return made
        flat = round_groups(weight.reshape(self.number_of_groups, -1), dataclasses.replace(grid, group_size=-1))
        notes = {"number_of_groups": self.number_of_groups, "symmetric": self.symmetric}
        return FlatGroups(shape=(weight.shape[0], weight.shape[1]), base=flat, notes=notes)

    def quantize_block(self, problem: BlockProblem) -> dict[str, QuantizedWeight]:
        weights = {role: linear.weight.detach().float() for role, linear in problem.linears.items()}
        curve: list[float] = []
        if self.trains(problem.index, problem.blocks):
            weights, curve = distil(problem, self._distillation(problem))
        done = {role: self.quantize_linear(weight, None, problem.grids[role]) for role, weight in weights.items()}
        if curve:
            for result in done.values():
                result.notes |= {"lkd_loss_first": curve[0], "lkd_loss_last": curve[-1]}
            next(iter(done.values())).notes["lkd_loss"] = curve
        return done

    def trains(self, index: int, blocks: int) -> bool:
        if isinstance(self.lkd_blocks, list):
            return index in self.lkd_blocks
        return self.lkd_blocks == "all" or index + 1 == blocks

    def _distillation(self, problem: BlockProblem) -> Distillation:
        def fake(role: str, weight: Tensor) -> Tensor:
            return self.quantize_linear(weight, None, problem.grids[role]).dequantize()

        return Distillation(
            weight=fake,
            inputs=None if problem.input_bits >= 16 else TokenWise(bits=problem.input_bits),
            steps=self.lkd_steps,
            learning_rate=self.lkd_learning_rate,
            weight_decay=self.lkd_weight_decay,
            batch=self.lkd_batch,
            normalise=self.lkd_normalise,
            key={"zeroquant": self.version, **self.options()},
        )

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        return TokenWise(bits=bits)


METHOD = ZeroQuant


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenWise:
    """Inputs [..., features] with one scale per token, by DeepSpeed's symmetric rule."""

    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        half = 2.0 ** (self.bits - 1)
        scale = x.abs().amax(dim=-1, keepdim=True).float() / half
        scale = torch.where(scale == 0, 1.0, scale)
        return (x / scale).round_().clamp_(-half, half - 1).mul_(scale).to(x.dtype)


def round_groups(weight: Tensor, grid: Grid) -> UniformWeight:
    """DeepSpeed's rules on the groups of a matrix [rows, columns]."""
    if grid.symmetric:
        made = grid.quantize(weight)
        made.solver = "zeroquant"
        return made
    rows, columns = weight.shape
    values = weight.float().reshape(rows, grid.groups(columns), -1)  # [rows, groups, g]
    low, high = values.amin(-1), values.amax(-1)
    if not bool(torch.isfinite(low + high).all()):
        raise NonFinite("the weights hold NaN or Inf")
    largest = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum((high - low) / 2**grid.bits, largest * torch.finfo(grid.scale_dtype).eps)
    scale = grid.store(torch.where(largest == 0, 1.0, scale))
    shift = torch.round(low / scale)  # z; a whole number that the scale dtype holds
    codes = (torch.round((values - (shift * scale)[..., None]) / scale[..., None])).clamp(0, grid.top)
    return UniformWeight(
        codes=codes.reshape(rows, columns).to(torch.uint8),
        scale=scale.to(grid.scale_dtype),
        zero=(-shift).to(grid.scale_dtype),
        bits=grid.bits,
        group_size=grid.group_size,
        solver="zeroquant",
    )


@dataclasses.dataclass(kw_only=True)
class FlatGroups:
    """A matrix whose groups run on from row to row: one row of `base` per group."""

    shape: tuple[int, int]
    base: UniformWeight  # [groups, numbers per group]
    solver: str = "zeroquant"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> int:
        return self.base.bits

    @property
    def group_size(self) -> int:
        """Numbers per group, not confined to a row."""
        return self.base.shape[1]

    def dequantize(self) -> Tensor:
        return self.base.dequantize().reshape(self.shape)

    def stored_bytes(self) -> int:
        return self.base.stored_bytes()

    def packed(self) -> dict[str, Tensor]:
        return self.base.packed()

    def row_range(self, start: int, stop: int) -> FlatGroups:
        """Rows whose groups are theirs alone. Raises QfarmError where a group is cut."""
        size, columns = self.group_size, self.shape[1]
        first, last = start * columns, stop * columns
        if first % size or last % size:
            raise QfarmError(f"zeroquant: rows {start}..{stop} cut a group of {size} weights")
        part = self.base.row_range(first // size, last // size)
        return dataclasses.replace(self, shape=(stop - start, columns), base=part, notes=dict(self.notes))
