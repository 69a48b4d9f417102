"""PTQ1.61: a fifth of the input columns at 4 bits, the rest binary, with learned factors per row and column.

    W [m, n]   S salient columns   mu, alpha [m]   r1 [m], r2 [n]   s = +1 where w >= mu, else -1

    j in S      4-bit asymmetric min/max code per row; the range is that of the whole row
    j not in S  w_hat = r1 r2 (alpha s + mu);  mu = mean of w, alpha = mean of |w|, over non-zero, non-salient entries

S are the floor(0.2 n) + 1 columns with the largest max |x| over calibration tokens. alpha, r1 and r2 are learned per
block, all layers together (Zhao et al., ACL 2025, arXiv 2502.13179; code of github.com/zjq0455/PTQ1.61):

    y = block with quantized weights on g    y1 = original block on h    y2 = original block on g
    loss = MSE(y1, y) + MSE(y2, y) - log |cos(y1, y)| - log |cos(y2, y)|    cos: mean over tokens, along hidden

h are the original model's activations, g those of the quantized prefix (the cell's `statistics`; independent: h = g).
Signs, mu and 4-bit codes are constants, so gradients are exact.

**Width.** The method has one operating point, and the scheme names its ceiling: `w2`. Codes take 4 x 0.2 + 0.8 = 1.6
bits per weight, 1.625 with everything stored at 4096 x 4096; the paper compares with 2-bit methods. The exact figure
is that of `stored_bytes`, like everywhere. Options that would need more than 2 bits of code are refused.

Stored: mask [n] 1 bit; codes of salient columns 4 bits, their scale and 4-bit zero per row; signs of the other
columns 1 bit; r1 alpha [m], r1 mu [m] and r2 [n - salient] in the scale dtype. Each packed row ends on 32 bits.

Cost: an epoch is a forward and a backward pass of every calibration window through the block. A block of SmolLM2-135M
took 0.5 s per window of 1024 on two busy CPU cores: 20 epochs of 32 windows on 30 blocks are some 2.5 hours there,
and `epochs` or fewer samples shorten that in proportion. Statistics other than max |x| are collected for the layers'
error figures alone. On one machine results repeat to the bit, with one thread or two.

Differences from the paper and its code:

- Ties at the threshold go to the lower index, so the number of salient columns is exact; the code keeps all of them.
- Dead inputs are never salient. share 0 has no salient column; the code's threshold would keep one.
- Input statistics are those of g (the block's real inputs), where the code collects them once on the original model.
  The paper's pseudo-code takes the mean of |x|, its code the maximum: `salient_by`, default as the code.
- |cos| is held above 1e-6; a loss that is not finite raises (the code drops into a debugger).
- r1 and r2 share a free factor: r2 is brought to mean |r2| = 1 before storing.
- Variables are float32 and blocks run in the model's dtype, without autocast and loss scaling.
- Learning rates default to the LLaMA values (5e-4, 1e-3); OPT and LLaMA-2 used 9e-5 and 9e-3.
- Only per-row quantization exists: groups and symmetric grids are refused.
- Quantization preprocessing (LoRA fine-tuning of the 16-bit model before a second pass) is left out: it changes the
  reference model, and its details are not confirmed. Published figures include it, and calibrate on WikiText-2.

Not confirmed: whether the code averages the cosine before the logarithm (as here) or after.
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
from qfarm.recipe import STRICT, BlockSolver
from qfarm.walk import BlockProblem

CEILING = 2  # the scheme's width, bits of code per weight at most
SMALLEST_COSINE = 1e-6
TARGET_BATCH = 8  # windows per pass when the second targets are computed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PTQ161(BlockSolver):
    source = "Zhao et al., ACL 2025, arXiv 2502.13179; code: github.com/zjq0455/PTQ1.61"
    widths = range(CEILING, CEILING + 1)

    salient_share: float = Field(0.2, ge=0, le=1, description="share of input columns kept at salient_bits, per layer")
    salient_bits: int = Field(4, ge=2, le=8, description="width of the salient columns")
    salient_by: Literal["max", "mean"] = Field("max", description="columns by the largest or by the mean |x|")
    salient_range: Literal["row", "salient"] = Field(
        "row", description="min/max of the salient code over the whole row, or over its salient weights"
    )
    epochs: int = Field(20, ge=0, description="passes over the calibration windows per block; 0: closed forms only")
    batch: int = Field(1, ge=1, description="calibration windows per step")
    learning_rate: float = Field(5e-4, gt=0, description="of alpha; OPT and LLaMA-2 used 9e-5")
    factor_learning_rate: float = Field(1e-3, gt=0, description="of r1 and r2; OPT and LLaMA-2 used 9e-3")

    def packed_refusal(self) -> str | None:
        return "its binary weights with kept columns have no packed operator"

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if group_size != -1:
            return f"it quantizes whole rows: the group size must be -1, not {group_size}"
        if symmetric:
            return "its salient columns are asymmetric; use symmetric: false"
        bits = 1 + (self.salient_bits - 1) * self.salient_share
        if bits > CEILING:
            return f"salient_share and salient_bits make {bits:.3g} bits per weight; w{CEILING} allows {CEILING}"
        return None

    def statistics(self) -> frozenset[Statistic]:
        strength = Statistic.MAX_ABS if self.salient_by == "max" else Statistic.MEAN_ABS
        # The others are for the layers' errors only; they cost about as much as a tenth of an epoch.
        return frozenset({strength, Statistic.HESSIAN, Statistic.SAMPLE})

    def quantize_block(self, problem: BlockProblem) -> dict[str, QuantizedWeight]:
        layers = {}
        for role, linear in problem.linears.items():
            mask = salient_columns(self._strength(problem.statistics[role]), self.salient_share)
            layers[role] = BinaryVariables(linear.weight, mask, problem.grids[role], self)
        with torch.enable_grad():
            figures = train(problem, layers, self) if self.epochs and layers else {}
        done: dict[str, QuantizedWeight] = {}
        for role, layer in layers.items():
            result = layer.frozen()
            result.notes |= figures | problem.error_notes(role, result.dequantize())
            done[role] = result
        return done

    def _strength(self, inputs: InputStatistics) -> Tensor:
        strength = inputs.max_abs if self.salient_by == "max" else inputs.mean_abs
        assert strength is not None
        if not bool(torch.isfinite(strength).all()):
            raise NonFinite("the calibration inputs hold NaN or Inf")
        return strength


METHOD = PTQ161


def salient_columns(strength: Tensor, share: float) -> Tensor:
    """The floor(share n) + 1 strongest inputs as a mask, bool [n]; none for share 0, and never a dead one."""
    count = 0 if share == 0 else int(share * len(strength)) + 1
    mask = torch.zeros_like(strength, dtype=torch.bool)
    mask[torch.argsort(strength, descending=True, stable=True)[:count]] = True
    return mask & (strength > 0)


@dataclasses.dataclass(kw_only=True)
class PartlyBinary:
    """Salient columns on a uniform grid, the others as one sign per weight."""

    salient: Tensor  # bool [columns]
    codes: Tensor  # uint8 [rows, salient columns]
    scale: Tensor  # [rows], storage dtype
    zero: Tensor  # uint8 [rows]
    positive: Tensor  # bool [rows, other columns]
    amplitude: Tensor  # [rows], storage dtype: r1 alpha
    offset: Tensor  # [rows], storage dtype: r1 mu
    factor: Tensor  # [other columns], storage dtype: r2
    salient_bits: int
    bits: int = CEILING
    group_size: int = -1
    solver: str = "ptq161"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], len(self.salient)

    @property
    def payload_bits(self) -> float:
        """Codes and signs."""
        share = float(self.salient.float().mean())
        return share * self.salient_bits + (1 - share)

    def dequantize(self) -> Tensor:
        values = torch.empty(self.shape, device=self.codes.device)
        values[:, self.salient] = (self.codes.float() - self.zero[:, None]) * self.scale.float()[:, None]
        amplitude, offset = self.amplitude.float()[:, None], self.offset.float()[:, None]
        values[:, ~self.salient] = (torch.where(self.positive, amplitude, -amplitude) + offset) * self.factor.float()
        return values

    def stored_bytes(self) -> int:
        rows, columns = self.shape
        salient, width = self.codes.shape[1], self.scale.element_size()
        total = 4 * packed_words(columns, 1)
        if salient:
            total += 4 * rows * packed_words(salient, self.salient_bits) + rows * width
            total += 4 * packed_words(rows, self.salient_bits)
        if salient < columns:
            total += 4 * rows * packed_words(columns - salient, 1) + (2 * rows + columns - salient) * width
        return total

    def packed(self) -> dict[str, Tensor]:
        """One part is left out where no column belongs to it."""
        tensors = {"weight_salient": pack_bits(self.salient[None].to(torch.uint8), 1)[0]}
        if self.codes.shape[1]:
            tensors |= {
                "weight_packed": pack_bits(self.codes, self.salient_bits),
                "weight_scale": self.scale,
                "weight_zero_point": pack_bits(self.zero[None], self.salient_bits)[0],
            }
        if self.positive.shape[1]:
            tensors |= {
                "weight_signs": pack_bits(self.positive.to(torch.uint8), 1),
                "weight_amplitude": self.amplitude,
                "weight_offset": self.offset,
                "weight_column_scale": self.factor,
            }
        return tensors

    def row_range(self, start: int, stop: int) -> PartlyBinary:
        by_row = ("codes", "scale", "zero", "positive", "amplitude", "offset")
        parts = {name: getattr(self, name)[start:stop] for name in by_row}
        return dataclasses.replace(self, **parts, notes=dict(self.notes))


class BinaryVariables:
    """One linear layer being quantized: constants, and what is learned."""

    def __init__(self, weight: Tensor, salient: Tensor, grid: Grid, options: PTQ161) -> None:
        self.salient, self.storage = salient, grid.scale_dtype
        self.weight_grid = Grid(bits=options.salient_bits, scale_dtype=grid.scale_dtype)
        weight = weight.detach().float()
        ranged = weight if options.salient_range == "row" or not bool(salient.any()) else weight[:, salient]
        self.scale, self.zero = self.weight_grid.fit(ranged)  # [m]
        self.codes = self.weight_grid.encode(weight, self.scale[:, None], self.zero[:, None])  # [m, n]
        self.uniform = (self.codes - self.zero[:, None]) * self.scale[:, None]
        counted = (weight != 0) & ~salient
        count = counted.sum(1, keepdim=True).clamp(min=1)
        self.mean = (weight * counted).sum(1, keepdim=True) / count  # [m, 1]
        self.positive = weight >= self.mean  # [m, n]
        amplitude = (weight.abs() * counted).sum(1, keepdim=True) / count
        self.amplitude = amplitude.requires_grad_()  # alpha [m, 1]
        self.row = torch.ones_like(self.mean, requires_grad=True)  # r1 [m, 1]
        self.column = torch.ones_like(weight[:1], requires_grad=True)  # r2 [1, n]

    def values(self) -> Tensor:
        """The quantized weight [m, n], float32, differentiable in alpha, r1 and r2."""
        binary = torch.where(self.positive, self.amplitude, -self.amplitude) + self.mean
        return torch.where(self.salient, self.uniform, self.row * binary * self.column)

    @torch.no_grad()
    def frozen(self) -> PartlyBinary:
        """The layer as it will be stored."""
        others = ~self.salient
        columns, salient = len(self.salient), int(self.salient.sum())
        column = self.column[0, others]
        gauge = column.abs().mean() if salient < columns else torch.ones_like(self.mean[0, 0])
        result = PartlyBinary(
            salient=self.salient,
            codes=self.codes[:, self.salient].to(torch.uint8),
            scale=self.scale.to(self.storage),
            zero=self.zero.to(torch.uint8),
            positive=self.positive[:, others],
            amplitude=self._store(gauge * self.row * self.amplitude)[:, 0],
            offset=self._store(gauge * self.row * self.mean)[:, 0],
            factor=self._store(column / gauge),
            salient_bits=self.weight_grid.bits,
        )
        code_bits = 1 + (self.weight_grid.bits - 1) * salient / columns
        result.notes = {"salient_columns": salient, "code_bits": code_bits}
        return result

    def _store(self, values: Tensor) -> Tensor:
        stored = values.to(self.storage)
        if not bool(torch.isfinite(stored).all()):
            raise NonFinite(f"a learned factor does not fit {self.storage}")
        return stored


def train(problem: BlockProblem, layers: dict[str, BinaryVariables], options: PTQ161) -> dict[str, float]:
    """Learn alpha, r1 and r2 in place, windows in their order; mean loss of the first and the last epoch."""
    factors = [factor for layer in layers.values() for factor in (layer.row, layer.column)]
    groups = [
        {"params": [layer.amplitude for layer in layers.values()], "lr": options.learning_rate},
        {"params": factors, "lr": options.factor_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    second = _original_outputs(problem)
    losses: list[float] = []
    for _ in range(options.epochs):
        total = 0.0
        for start in range(0, len(problem.inputs), options.batch):
            here = slice(start, start + options.batch)
            loss = block_loss(problem, layers, here, second[here])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            value = loss.item()
            if not abs(value) < float("inf"):
                raise NonFinite("the block's loss is NaN or Inf")
            total += value * len(problem.inputs[here])
        losses.append(total / len(problem.inputs))
    return {"loss_first": losses[0], "loss_last": losses[-1]}


@torch.no_grad()
def _original_outputs(problem: BlockProblem) -> Tensor:
    """y2: the original block on the inputs that it will be fed, [samples, length, hidden]."""
    return torch.cat([problem.forward(part, {}) for part in torch.split(problem.inputs, TARGET_BATCH)])


def block_loss(problem: BlockProblem, layers: dict[str, BinaryVariables], here: slice, second: Tensor) -> Tensor:
    """The loss of some windows, float32; `second` is y2 of the same windows."""
    weights = {role: layer.values().to(problem.linears[role].weight.dtype) for role, layer in layers.items()}
    output = problem.forward(problem.inputs[here], weights).float()
    return distance(problem.targets[here].float(), output) + distance(second.float(), output)


def distance(target: Tensor, output: Tensor) -> Tensor:
    """MSE - log |mean cosine|."""
    cosine = torch.nn.functional.cosine_similarity(target, output, dim=-1).mean()
    return (target - output).square().mean() - cosine.abs().clamp(min=SMALLEST_COSINE).log()
