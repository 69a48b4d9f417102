"""AutoRound (SignRound): learn where each weight rounds, block by block, with the sign of the gradient alone.

    v [rows, columns] = 0    rounding offset, in steps      w / s + v is rounded instead of w / s
    a_low, a_high [rows, groups] = 1    range factors in [0, 1]

    asymmetric   low = min(0, min w) a_low    high = max(0, max w) a_high    s = (high - low) / (2^b - 1)
                 zero = round(-low / s)       code = clamp(round(w / s + v) + zero, 0, 2^b - 1)
    symmetric    s = max(-low, high) / 2^(b-1), negative if high >= -low: the larger side is exactly code -2^(b-1)
                 code = clamp(round(w / s + v), -2^(b-1), 2^(b-1) - 1)

Per decoder block (Cheng et al., arXiv 2309.05516; code of github.com/intel/auto-round), `iterations` times: draw
`batch` sequences, loss = mean squared difference between the block with quantized weights on the inputs it will see
and the original block on the original inputs, then `p -= rate_t sign(gradient)` for every v, a_low, a_high. Rounding
passes gradients straight through. The rate falls linearly to 0 from 1 / iterations, so v moves by about half a step
at most and a code differs from RTN's by at most one. The variables of the smallest batch loss are kept.

Stored: codes, scales, zero points, as RTN stores them; v is folded into the codes. A symmetric scale carries a sign,
which a kernel that assumes positive scales must honour. Two bits want asymmetric grids and 1000 iterations.

Cost: a step is a forward and a backward pass of `batch` windows through the block, so iterations x batch x length
tokens per block, however many samples there are. A block of SmolLM2-135M (3.5 million weights) with windows of 1024
took 4.5 s a step on two busy CPU cores in float32, 0.8 s with batch 1: the default of 200 steps of 8 windows on 30
blocks is some 7 hours there, batch 1 some 80 minutes, and batch 1 with 50 iterations (upstream's light recipe) some 20
minutes. Cheaper still: shorter windows; bfloat16 took two thirds of the time. Statistics are collected for the
layers' error figures alone. On one machine results repeat to the bit, with one thread or two.

Differences from the reference code:

- Scales are kept in the normal range of their storage dtype (upstream: at least 1e-5 in float16, a subnormal).
- What the block is fed is the cell's `statistics` (sequential: the quantized prefix, upstream's default).
- Gradients are those of the sum of squares, not of the mean: the signs are the same, and half precision does not
  underflow. Blocks run in the model's dtype; there is no autocast.
- Zero padding of ragged groups does not occur: group sizes divide. Groups default to the cell's, asymmetric is
  qfarm's default where upstream's is symmetric.
- `keep: validation` chooses by a fixed batch, and `skip_first` leaves each window's first token out of the loss (it
  may be a massive activation that dominates the error); upstream has neither, both are off by default.
- No incoherence transform (random orthogonal factors on both sides of a weight before it is rounded, QuIP): that is no
  part of SignRound but a change of the model, which any solver could follow.
- iterations: 0 is RTN on this grid. Upstream's scale search for that case, gradient accumulation, bias tuning and
  SignRoundV2 (arXiv 2512.04746) are left out.

Not confirmed: published figures use 512 samples of pile-10k and were not rerun.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import Statistic
from qfarm.quantized import QuantizedWeight, UniformWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, BlockSolver
from qfarm.walk import BlockProblem


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AutoRound(BlockSolver):
    source = "Cheng et al., Findings of EMNLP 2024, arXiv 2309.05516; code: github.com/intel/auto-round"

    iterations: int = Field(200, ge=0, description="steps per block; 0: round to nearest on this grid")
    learning_rate: float | None = Field(
        None, gt=0, description="first rate of v; default 1 / iterations, twice that from 1000 iterations at <= 3 bits"
    )
    range_learning_rate: float | None = Field(
        None, gt=0, description="first rate of the range factors; default: that of v"
    )
    batch: int = Field(8, ge=1, description="calibration windows per step")
    tune_range: bool = Field(True, description="learn the range factors (enable_minmax_tuning)")
    keep: Literal["best", "validation", "last"] = Field(
        "best", description="keep the step of the smallest batch loss, of the smallest loss on a fixed batch, the last"
    )
    skip_first: bool = Field(False, description="leave the first token of each window out of the loss")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.range_learning_rate is not None and not self.tune_range:
            return "range_learning_rate needs tune_range: true"
        if self.iterations == 0 and (self.learning_rate is not None or self.range_learning_rate is not None):
            return "iterations: 0 learns nothing; leave the learning rates out"
        return None

    def statistics(self) -> frozenset[Statistic]:
        # For the layers' errors only: they cost about what two steps of 8 windows do.
        return frozenset({Statistic.HESSIAN, Statistic.SAMPLE})

    def quantize_block(self, problem: BlockProblem) -> dict[str, QuantizedWeight]:
        layers = {role: LayerVariables(linear.weight, problem.grids[role]) for role, linear in problem.linears.items()}
        with torch.enable_grad():
            figures = train(problem, layers, self) if self.iterations and layers else {}
        done: dict[str, QuantizedWeight] = {}
        for role, layer in layers.items():
            result = layer.frozen()
            result.notes |= figures | problem.error_notes(role, result.dequantize())
            done[role] = result
        return done


METHOD = AutoRound


class LayerVariables:
    """What is learned for one linear layer."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        rows, columns = weight.shape
        self.grid = grid
        self.weight = weight.detach().float().reshape(rows, grid.groups(columns), -1)  # [rows, groups, g]
        if not bool(torch.isfinite(self.weight).all()):
            raise NonFinite("the weights hold NaN or Inf")
        self.low = self.weight.amin(-1).clamp(max=0)
        self.high = self.weight.amax(-1).clamp(min=0)
        self.offset = torch.zeros_like(self.weight, requires_grad=True)
        self.low_factor = torch.ones_like(self.low, requires_grad=True)
        self.high_factor = torch.ones_like(self.high, requires_grad=True)

    @property
    def factors(self) -> list[Tensor]:
        return [self.low_factor, self.high_factor]

    def fake(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values and unsigned codes [rows, groups, g], scale and zero [rows, groups]; float32, differentiable."""
        low, high = self.low * self.low_factor, self.high * self.high_factor
        half, top = 1 << (self.grid.bits - 1), self.grid.top
        if self.grid.symmetric:
            magnitude = storable(torch.maximum(-low, high) / half, self.grid)
            scale = torch.where(high >= -low, -magnitude, magnitude)
            zero = torch.full_like(scale, float(half))
        else:
            scale = storable((high - low) / top, self.grid)
            zero = rounded(-low / scale).clamp(0, top)
        position = rounded(self.weight / scale[..., None] + self.offset)
        codes = torch.clamp(position + zero[..., None], 0, top)
        return (codes - zero[..., None]) * scale[..., None], codes, scale, zero

    @torch.no_grad()
    def frozen(self) -> UniformWeight:
        """The layer as it will be stored."""
        _, codes, scale, zero = self.fake()
        flat = codes.reshape(len(codes), -1)
        nearest = torch.clamp(torch.round(self.weight / scale[..., None]) + zero[..., None], 0, self.grid.top)
        result = UniformWeight.build(self.grid, flat, scale, zero, "autoround")
        result.notes = {"rounded_otherwise": float((codes != nearest).float().mean())}
        return result


def rounded(x: Tensor) -> Tensor:
    """Half to even; the gradient passes straight through."""
    return x + (torch.round(x) - x).detach()


def storable(scale: Tensor, grid: Grid) -> Tensor:
    """A scale as its storage dtype holds it; the gradient passes straight through, except where it is held at the
    smallest normal number."""
    limits = torch.finfo(grid.scale_dtype)
    if bool((scale > limits.max).any()):
        raise NonFinite(f"a scale of {float(scale.max()):.3g} does not fit {grid.scale_dtype}")
    scale = scale.clamp(min=limits.tiny)
    return scale + (scale.to(grid.scale_dtype).float() - scale).detach()


def train(problem: BlockProblem, layers: dict[str, LayerVariables], options: AutoRound) -> dict[str, float]:
    """Learn the layers' variables in place; figures for the notes."""
    generator = torch.Generator().manual_seed(problem.seed)
    samples = len(problem.inputs)
    fixed = torch.randperm(samples, generator=generator)[: options.batch]
    steps = _steps(layers, options)
    variables = [variable for variable, _ in steps]
    best, best_step, kept = float("inf"), 0, [v.detach().clone() for v in variables]
    first = last = float("nan")
    for step in range(options.iterations):
        batch = torch.randperm(samples, generator=generator)[: options.batch]
        loss, elements = block_loss(problem, layers, batch, options)
        gradients = torch.autograd.grad(loss, variables)
        last = _finite(loss.item() / elements)
        first = last if step == 0 else first
        judged = _validate(problem, layers, fixed, options) if options.keep == "validation" else last
        if judged < best and options.keep != "last":
            best, best_step, kept = judged, step, [v.detach().clone() for v in variables]
        decay = 1 - step / options.iterations
        with torch.no_grad():
            for (variable, rate), gradient in zip(steps, gradients, strict=True):
                variable.sub_(gradient.sign(), alpha=rate * decay)
            for factor in (factor for layer in layers.values() for factor in layer.factors):
                factor.clamp_(0, 1)
    if options.keep == "last":
        return {"loss_first": first, "loss_kept": last, "step_kept": options.iterations}
    with torch.no_grad():
        for variable, value in zip(variables, kept, strict=True):
            variable.copy_(value)
    return {"loss_first": first, "loss_kept": best, "step_kept": best_step}


def _steps(layers: dict[str, LayerVariables], options: AutoRound) -> list[tuple[Tensor, float]]:
    """Every variable with its first learning rate."""
    steps: list[tuple[Tensor, float]] = []
    for layer in layers.values():
        rate = first_rate(options, layer.grid.bits)
        steps.append((layer.offset, rate))
        if options.tune_range:
            steps += [(factor, options.range_learning_rate or rate) for factor in layer.factors]
    return steps


def first_rate(options: AutoRound, bits: int) -> float:
    if options.learning_rate is not None:
        return options.learning_rate
    return (2.0 if options.iterations >= 1000 and bits <= 3 else 1.0) / options.iterations


def block_loss(
    problem: BlockProblem, layers: dict[str, LayerVariables], batch: Tensor, options: AutoRound
) -> tuple[Tensor, int]:
    """Sum of squared differences to the target, float32, and how many elements it sums."""
    weights = {}
    for role, layer in layers.items():
        original = problem.linears[role].weight
        weights[role] = layer.fake()[0].reshape(original.shape).to(original.dtype)
    index = batch.to(problem.inputs.device)
    start = 1 if options.skip_first else 0
    output = problem.forward(problem.inputs[index], weights)[:, start:].float()
    difference = output - problem.targets[index][:, start:].float()
    return difference.square().sum(), difference.numel()


@torch.no_grad()
def _validate(problem: BlockProblem, layers: dict[str, LayerVariables], batch: Tensor, options: AutoRound) -> float:
    loss, elements = block_loss(problem, layers, batch, options)
    return _finite(loss.item() / elements)


def _finite(loss: float) -> float:
    if not loss < float("inf"):
        raise NonFinite("the block's loss is NaN or Inf")
    return loss
