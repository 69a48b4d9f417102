"""AWQ: enlarge weights of inputs with large activations before rounding, then clip each group where that helps.

    a = mean |x| per input   s = a^r / sqrt(max a^r min a^r), r = 0, 1/20, .. 19/20   W' = Q(W diag(s)) diag(s)^-1
    choose the s of least error |M'(x) - M(x)|^2 of the module M that reads the input; then per row and group of the
    scaled weight the bound c = amax (1 - i/20), i = 0 .. 9, of least d^T H_g d, d = Q(clamp(w, -c, c)) - w, where
    H = mean x x^T of the scaled inputs   (arXiv 2306.00978)

M is the whole attention for q/k/v and the whole MLP for gate/up, each run on calibration windows with the other layers
untouched; a layer that reads its input alone (o, down, OPT's fc1) is its own M, whose error is exactly
tr((W' - W) H (W' - W)^T) over all tokens. `objective: gram` takes that form for stacked layers too: all rows count
alike, softmax and gating are not seen, no module is run.

The factor s belongs into the operator that makes the input (norm, v, up), whose output is divided by it. Layers that
share an input are solved as one matrix and share one s; where no operator can absorb it (o under grouped-query
attention) s = 1 and only clipping is left, or, with `unfoldable: store`, s is kept as a vector and counted. Queries
and keys are not clipped: their product makes the error of either one meaningless.

Stored: codes, scales and zeros; s is folded and costs nothing (stored: one number of the scale dtype per input).

The fold is simulated in the weight, W_hat = Q(W s) / s, and the model itself is left alone. In exact arithmetic that
is the same function. Not simulated are two roundings of a deployed model: of the divided norm weight to 16 bits, a
relative error of up to 2^-9 (bfloat16) or 2^-12 (float16) per channel, and, where the producer is itself a quantized
layer (v, up), of its row scales divided by s, of the same size; codes of the producer do not change, since a factor
per row moves neither its grid nor its best bound.

Where linear inputs are quantized as well (`w4a8`, `awq+crossquant`), their quantizers see what the folded model feeds
them, x / s, static ranges included. Values in a quantized KV cache are not divided by the s of o, as a folded v would
have them.

Inputs come from the unquantized model, as in the reference, whatever the job's `statistics`: an AWQ cell is always one
of independent statistics, and a term on top of it (`awq+qera`) reads the same inputs.

Differences from mit-han-lab/llm-awq: M is run on 32 windows (`samples`), which are as many tokens at length 2048 as
the reference's 128 blocks of 512. H and the clip search use all tokens instead of 512. Ranges always contain zero.
Symmetric grids leave out the code -2^(b-1), which the reference never reaches. Inputs that never fire get the smallest
s of the others; activations are floored at 1e-8 of the largest, instead of a^r at 1e-4, so that the scale of x has no
influence. With duo_scaling (AutoAWQ) s = 1 is one more candidate, so that no layer loses to unscaled rounding. Scales
are rounded to their storage dtype before weights. Layers that share an input but not their grid (other widths) are
solved apart and keep s = 1: one norm cannot absorb two factors. An activation that is not positively homogeneous (GELU
before fc2) is not wrapped in a division; `unfoldable: store` is that wrapper. Norms that multiply by 1 + w occur in no
architecture that qfarm loads; as no norm is touched, only a deployed model would have to treat them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.quantized import ColumnScaled, QuantizedWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, BlockSolver
from qfarm.walk import BATCH_TOKENS, BlockProblem

FAINTEST = 1e-8  # floor of an input's activity over the largest; s stays within 1e-4 .. 1e4
UNCLIPPED = ("q", "k")

Loss = Callable[[Tensor], float]  # of the weight that would be used, [rows, columns]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AWQ(BlockSolver):
    version = 2
    divides_inputs = True
    source = "Lin et al., MLSys 2024, arXiv 2306.00978; github.com/mit-han-lab/llm-awq; duo scaling: AutoAWQ"

    objective: Literal["module", "gram"] = Field(
        "module", description="error of the attention or MLP that reads the input, or of the layers' own outputs"
    )
    samples: int = Field(32, ge=1, description="calibration windows at most on which a module's error is measured")
    unfoldable: Literal["skip", "store"] = Field(
        "skip", description="where nothing absorbs the scale: none, or keep it as a vector, which is counted"
    )
    ratios: int = Field(20, ge=1, le=100, description="exponents r = i / ratios tried, i from 0; 1 = no scaling")
    duo_scaling: bool = Field(False, description="divide a^r by the relative size of the weights, to the power 1 - r")
    clip: bool = Field(True, description="search a clipped range per row and group")
    clip_steps: int = Field(20, ge=1, le=100, description="bounds tried are amax (1 - i / clip_steps)")
    max_shrink: float = Field(0.5, gt=0, lt=1, description="i stays below max_shrink x clip_steps")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.clip and int(self.max_shrink * self.clip_steps) < 2:
            return "max_shrink x clip_steps leaves no bound to try; raise one of them or set clip: false"
        if self.duo_scaling and self.ratios == 1:
            return "duo_scaling needs ratios of 2 or more; 1 means no scaling"
        return None

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.HESSIAN, Statistic.MEAN_ABS})

    @property
    def whole_blocks(self) -> bool:
        return self.objective == "module"

    @property
    def original_inputs(self) -> bool:
        return True

    def quantize_block(self, problem: BlockProblem) -> dict[str, QuantizedWeight]:
        done: dict[str, QuantizedWeight] = {}
        for inputs, roles in readers(problem):
            kinds: dict[Grid | None, list[str]] = {}
            for role in roles:
                kinds.setdefault(problem.grids.get(role), []).append(role)
            for grid, members in kinds.items():
                if grid is not None:
                    # One operator cannot absorb the different factors of layers that are solved apart.
                    foldable = inputs.foldable and len(kinds) == 1
                    done |= self._stack(problem, dataclasses.replace(inputs, foldable=foldable), members, grid)
        return done

    def _stack(
        self, problem: BlockProblem, inputs: InputStatistics, roles: list[str], grid: Grid
    ) -> dict[str, QuantizedWeight]:
        """Layers that read the same input, as one matrix."""
        weights = [problem.linears[role].weight.detach().float() for role in roles]
        inputs = dataclasses.replace(inputs, roles=tuple((r, len(w)) for r, w in zip(roles, weights, strict=True)))
        loss = module_loss(problem, roles, self.samples) if self.scales(inputs) and len(roles) > 1 else None
        whole = self.solve(torch.cat(weights), inputs, grid, loss)
        if len(roles) == 1:
            return {roles[0]: whole}
        parts, start = {}, 0
        for role, rows in inputs.roles:
            parts[role] = whole.row_range(start, start + rows)
            parts[role].notes["solved_with"] = roles  # the figures are those of the whole stack
            start += rows
        return parts

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        assert inputs is not None
        return self.solve(weight, inputs, grid)

    def scales(self, inputs: InputStatistics) -> bool:
        """Whether there is a place for s."""
        return inputs.foldable or self.unfoldable == "store"

    def solve(self, weight: Tensor, inputs: InputStatistics, grid: Grid, loss: Loss | None = None) -> QuantizedWeight:
        """`loss` is that of the stack's own outputs by default."""
        hessian = inputs.hessian
        assert hessian is not None and inputs.mean_abs is not None
        if not bool(torch.isfinite(hessian).all() & torch.isfinite(inputs.mean_abs).all()):
            raise NonFinite("the calibration inputs hold NaN or Inf")
        weight = weight.float()
        tried = self.candidates(weight, inputs, grid)
        measure = loss or (lambda values: gram_loss(weight, values, hessian))
        losses = [measure(rounded(weight, scale, grid)) for _, scale in tried]
        chosen = min(range(len(losses)), key=losses.__getitem__)  # the first of equals
        ratio, scale = tried[chosen]
        notes: dict[str, Any] = {"ratio": ratio, "loss": losses[chosen], "loss_unscaled": losses[0]}
        notes["objective"] = "gram" if loss is None else "module"
        scaled = weight * scale
        if self.clip:
            bound = search_clip(scaled, hessian / scale / scale[:, None], inputs.roles, grid, self)
            notes["clipped_groups"] = float((bound < group_amax(scaled, grid)).float().mean())
            scaled = clamp_groups(scaled, bound)
        base = grid.quantize(scaled)
        clips = self.clip and bool(clippable(inputs.roles, weight).any())
        base.solver = "awq" if clips or self.scales(inputs) else "rtn"
        if not self.scales(inputs):
            notes["reason"] = "no operator before this layer can absorb a scale: s = 1"
        if chosen == 0:
            base.notes = notes
            return base
        factor = 1 / scale if inputs.foldable else (1 / scale).to(grid.scale_dtype)
        return ColumnScaled(base=base, factor=factor, folded=inputs.foldable, of_input=True, solver="awq", notes=notes)

    def candidates(self, weight: Tensor, inputs: InputStatistics, grid: Grid) -> list[tuple[float | None, Tensor]]:
        """(r, s [columns]) to try. The first is s = 1 and wins ties; with duo_scaling it belongs to no r."""
        assert inputs.mean_abs is not None
        activity = floored(inputs.mean_abs)
        exponents = [i / self.ratios for i in range(self.ratios)]
        ones = torch.ones_like(activity)
        if not self.scales(inputs):
            return [(0.0, ones)]

        def stored(scale: Tensor) -> Tensor:
            scale = centred(scale)
            return scale if inputs.foldable else 1 / (1 / scale).to(grid.scale_dtype).float()

        if not self.duo_scaling:
            return [(r, stored(activity**r)) for r in exponents]
        size = relative_size(weight, grid)
        return [(None, ones), *((r, stored(activity**r / (size ** (1 - r) + 1e-4))) for r in exponents)]


METHOD = AWQ


def readers(problem: BlockProblem) -> Iterator[tuple[InputStatistics, list[str]]]:
    """Each input of the block with all roles that read it, quantized or not."""
    groups: dict[int, list[str]] = {}
    for role, inputs in problem.statistics.items():
        groups.setdefault(id(inputs), []).append(role)
    for roles in groups.values():
        yield problem.statistics[roles[0]], roles


def module_loss(problem: BlockProblem, roles: list[str], samples: int) -> Loss | None:
    """The squared error of the module that holds these layers, summed over outputs, mean over tokens.

    None where that module is the block itself: the layers' own outputs are measured then.
    """
    names = {id(module): name for name, module in problem.block.named_modules()}
    paths = [names[id(problem.linears[role])] for role in roles]
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1 or parents == {""}:
        return None
    module = problem.block.get_submodule(parents.pop())
    parameters = [f"{path.rpartition('.')[2]}.weight" for path in paths]
    heights = [problem.linears[role].out_features for role in roles]
    calls = recorded_calls(problem, module, samples)

    @torch.no_grad()
    def loss(values: Tensor) -> float:
        parts = torch.split(values.to(problem.linears[roles[0]].weight.dtype), heights)
        weights = dict(zip(parameters, parts, strict=True))
        total, tokens = 0.0, 0
        for args, kwargs, target in calls:
            out = _first(torch.func.functional_call(module, weights, args, kwargs))
            total += float((out.float() - target.float()).square().sum(dtype=torch.float64))
            tokens += target[..., 0].numel()
        return total / tokens

    return loss


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@torch.no_grad()
def recorded_calls(problem: BlockProblem, module: nn.Module, samples: int) -> list[Call]:
    """Arguments, keyword arguments and output of a module of the original block, batch by batch."""
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append((args, kwargs, _first(out)))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        batch = max(1, BATCH_TOKENS // problem.inputs.shape[1])
        for hidden in torch.split(problem.inputs[:samples], batch):
            problem.forward(hidden, {})
    finally:
        handle.remove()
    return calls


def _first(out: Any) -> Tensor:
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def floored(mean_abs: Tensor) -> Tensor:
    """Activity of each input over the largest one, [columns]; inputs that never fire count as the faintest that do."""
    fires = mean_abs > 0
    if not bool(fires.any()):
        return torch.ones_like(mean_abs)
    return (torch.where(fires, mean_abs, mean_abs[fires].min()) / mean_abs.max()).clamp(min=FAINTEST)


def centred(scale: Tensor) -> Tensor:
    """Largest x smallest = 1."""
    scale = torch.maximum(scale, FAINTEST * scale.max())
    return scale / (scale.max() * scale.min()).sqrt()


def relative_size(weight: Tensor, grid: Grid) -> Tensor:
    """Mean over rows of |w| over the largest |w| of its group, [columns]."""
    rows, columns = weight.shape
    groups = weight.abs().reshape(rows, grid.groups(columns), -1)
    share = groups / groups.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return share.reshape(rows, columns).mean(dim=0)


def rounded(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Q(W diag(s)) diag(s)^-1, computed as it is when it ships."""
    return grid.quantize(weight * scale).dequantize() * (1 / scale)


def gram_loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """tr((W' - W) H (W' - W)^T): the mean over tokens of the squared error of all outputs."""
    delta = values - weight
    return float(((delta @ hessian) * delta).sum(dtype=torch.float64))


def group_amax(weight: Tensor, grid: Grid) -> Tensor:
    """Largest |w| of each group, [rows, groups]."""
    rows, columns = weight.shape
    return weight.abs().reshape(rows, grid.groups(columns), -1).amax(dim=-1)


def clamp_groups(weight: Tensor, bound: Tensor) -> Tensor:
    """weight [rows, columns] within +-bound [rows, groups]."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, bound.shape[1], -1)
    return torch.clamp(groups, -bound[..., None], bound[..., None]).reshape(rows, columns)


def search_clip(
    weight: Tensor, hessian: Tensor, roles: tuple[tuple[str, int], ...], grid: Grid, options: AWQ
) -> Tensor:
    """The bound of each group, [rows, groups]; both arguments in the space of scaled weights and inputs.

    A group's error is d^T H_g d: that of its own share of the output. Rows of UNCLIPPED roles keep their range.
    """
    rows, columns = weight.shape
    size = columns // grid.groups(columns)
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, columns, size)])  # [groups, g, g]
    amax = group_amax(weight, grid)
    best, bound = torch.full_like(amax, torch.inf), amax
    for i in range(int(options.max_shrink * options.clip_steps)):
        tried = amax * (1 - i / options.clip_steps)
        delta = grid.quantize(clamp_groups(weight, tried)).dequantize() - weight
        parts = delta.reshape(rows, -1, size).transpose(0, 1)  # [groups, rows, g]
        error = (torch.bmm(parts, blocks) * parts).sum(dim=-1).T
        bound = torch.where(error < best, tried, bound)
        best = torch.minimum(error, best)
    return torch.where(clippable(roles, weight)[:, None], bound, amax)


def clippable(roles: tuple[tuple[str, int], ...], weight: Tensor) -> Tensor:
    """Which rows may be clipped, bool [rows]; all of them when the roles are not known."""
    allowed = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    start = 0
    for role, rows in roles:
        allowed[start : start + rows] = role not in UNCLIPPED
        start += rows
    return allowed
