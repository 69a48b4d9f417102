"""Calibrate: walk a model block by block, learn what each linear layer's inputs look like, hand layers to a solver.

One block's inputs are kept at a time. In sequential mode a block is run again after it was quantized, so that later
blocks see what the quantized model really feeds them (GPTQ, section 3.8); in independent mode statistics come from
the original model and one pass suffices. A true-sequential solver also re-runs the block between groups of layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.errors import NonFinite
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid, QuantizedWeight, relative_error
from qfarm.recipe import WeightSolver

BATCH_TOKENS = 4096  # calibration tokens per forward pass; part of what makes a run reproducible
SAMPLE_TOKENS = 512  # ordinary tokens kept per layer
NORM_LIMIT = 4.0  # a token is ordinary up to 4x the median norm (an unpublished value)


class Statistic(enum.StrEnum):
    HESSIAN = "hessian"
    NORMALISED_HESSIAN = "normalised_hessian"  # tokens scaled down to NORM_LIMIT x the median norm of their batch
    SAMPLE = "sample"  # inputs of ordinary tokens


@dataclasses.dataclass
class InputStatistics:
    """What is known of the inputs of one linear layer, [n] features wide."""

    tokens: int = 0
    hessian: Tensor | None = None  # float32 [n, n]: mean of x x^T over tokens
    normalised_hessian: Tensor | None = None
    sample: Tensor | None = None  # float32 [k, n]

    def ordinary_error(self, weight: Tensor, quantized: Tensor) -> float:
        """||(W - Q) X||^2 / ||W X||^2 on the sample of ordinary tokens."""
        assert self.sample is not None
        return _ratio((weight.float() - quantized) @ self.sample.T, weight.float() @ self.sample.T)

    def output_error(self, weight: Tensor, quantized: Tensor) -> float | None:
        """The same on all calibration tokens, from the Hessian; None without one."""
        if self.hessian is None:
            return None
        delta, weight = weight.float() - quantized, weight.float()
        norm = float(((weight @ self.hessian) * weight).sum())
        error = float(((delta @ self.hessian) * delta).sum())
        return error / norm if norm > 0 else error


def _ratio(error: Tensor, reference: Tensor) -> float:
    norm = float(reference.square().sum())
    total = float(error.square().sum())
    return total / norm if norm else total


class Collector:
    """Accumulates statistics of one input over batches. Sums are plain, so shards could be added up."""

    def __init__(self, wanted: frozenset[Statistic], tokens: int) -> None:
        self.wanted = wanted
        self.stats = InputStatistics()
        self._share = SAMPLE_TOKENS / max(tokens, 1)
        self._samples: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """inputs [..., n] in the model's dtype."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.stats.tokens += len(x)
        norms = x.norm(dim=1)
        limit = NORM_LIMIT * norms.median()
        if Statistic.HESSIAN in self.wanted:
            self.stats.hessian = _add_product(self.stats.hessian, x)
        if Statistic.NORMALISED_HESSIAN in self.wanted:
            shrunk = x * (limit / norms.clamp(min=1e-30)).clamp(max=1)[:, None]
            self.stats.normalised_hessian = _add_product(self.stats.normalised_hessian, shrunk)
        if Statistic.SAMPLE in self.wanted:
            ordinary = x[norms <= limit]
            count = max(1, round(self._share * len(x)))
            step = max(1, len(ordinary) // count)
            self._samples.append(ordinary[::step][:count].clone())

    def result(self) -> InputStatistics:
        if not self.stats.tokens:
            raise NonFinite("a linear layer saw no calibration token")
        for name in ("hessian", "normalised_hessian"):
            total = getattr(self.stats, name)
            if total is not None:
                setattr(self.stats, name, total / self.stats.tokens)
        self.stats.sample = torch.cat(self._samples) if self._samples else None
        return self.stats


def _add_product(total: Tensor | None, x: Tensor) -> Tensor:
    return x.T @ x if total is None else total.addmm_(x.T, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What happened to one linear layer."""

    layer: int
    role: str
    module: str
    shape: tuple[int, int]
    solver: str | None  # None: left alone
    reason: str | None
    bits: int | None
    group_size: int | None
    stored_bytes: int
    weight_error: float | None
    output_error: float | None
    notes: dict[str, Any]


GridOf = Callable[[str], Grid | None]  # role -> grid; None leaves layers of that role at 16 bits
Report = Callable[[int, int], None]  # blocks done, blocks


def quantize_weights(
    loaded: LoadedModel,
    solver: WeightSolver,
    grid_of: GridOf,
    windows: Tensor | None,
    *,
    sequential: bool,
    report: Report,
) -> list[LayerResult]:
    """Quantize every decoder linear of the model in place; windows [samples, length] are token ids.

    `windows` may be None for solvers without statistics. Embeddings, norms, biases and the head are untouched.
    """
    results: list[LayerResult] = []
    blocks = loaded.blocks
    walk = _Walk(loaded, windows) if solver.needs_text and windows is not None else None
    for index, block in enumerate(blocks):
        report(index, len(blocks))
        linears = loaded.linears(index)
        results += _quantize_block(loaded, index, block, linears, solver, grid_of, walk, sequential)
        if walk is not None and index + 1 < len(blocks) and (sequential or solver.true_sequential):
            walk.advance(index)
    report(len(blocks), len(blocks))
    return results


def _quantize_block(
    loaded: LoadedModel,
    index: int,
    block: nn.Module,
    linears: dict[str, nn.Linear],
    solver: WeightSolver,
    grid_of: GridOf,
    walk: _Walk | None,
    sequential: bool,
) -> list[LayerResult]:
    groups = loaded.architecture.shared_inputs
    results = []
    # Each phase is one pass over the calibration text that serves one or all groups of layers.
    phases = [[group] for group in groups] if solver.true_sequential else [list(groups)]
    for phase in phases:
        stats: dict[tuple[str, ...], InputStatistics] = {}
        if walk is not None:
            keep = not sequential and not solver.true_sequential
            first = {group: linears[group[0]] for group in phase}
            stats = walk.collect(index, first, solver.statistics(), keep_outputs=keep)
        for group in phase:
            results += _quantize_group(loaded, index, {r: linears[r] for r in group}, solver, grid_of, stats.get(group))
    return results


def _quantize_group(
    loaded: LoadedModel,
    index: int,
    linears: dict[str, nn.Linear],
    solver: WeightSolver,
    grid_of: GridOf,
    inputs: InputStatistics | None,
) -> list[LayerResult]:
    """Layers that read the same input; those with the same grid are stacked and solved as one matrix."""
    by_grid: dict[Grid | None, list[str]] = {}
    for role in linears:
        by_grid.setdefault(grid_of(role), []).append(role)
    results = []
    for grid, roles in by_grid.items():
        if grid is None:
            reason = "the scheme leaves this layer at 16 bits"
            results += [_untouched(loaded, index, role, linears[role], reason) for role in roles]
            continue
        stacked = torch.cat([linears[role].weight.detach().float() for role in roles])
        try:
            whole = solver.quantize_linear(stacked, inputs, grid)
        except NonFinite as error:
            raise NonFinite(f"layer {index} {'/'.join(roles)}: {error}") from None
        start = 0
        for role in roles:
            stop = start + linears[role].weight.shape[0]
            part = whole.row_range(start, stop)
            results.append(_replace(loaded, index, role, linears[role], part, inputs))
            start = stop
    return results


def _replace(
    loaded: LoadedModel,
    index: int,
    role: str,
    linear: nn.Linear,
    quantized: QuantizedWeight,
    inputs: InputStatistics | None,
) -> LayerResult:
    weight = linear.weight.detach()
    values = quantized.dequantize()
    if not bool(torch.isfinite(values).all()):
        raise NonFinite(f"layer {index} {role}: the quantized weight holds NaN or Inf")
    result = LayerResult(
        layer=index,
        role=role,
        module=loaded.module_name(index, role),
        shape=quantized.shape,
        solver=quantized.solver,
        reason=None,
        bits=quantized.bits,
        group_size=quantized.group_size,
        stored_bytes=quantized.stored_bytes(),
        weight_error=relative_error(weight, values),
        output_error=inputs.output_error(weight, values) if inputs else None,
        notes=quantized.notes,
    )
    loaded.replace_weight(linear, values)
    return result


def _untouched(loaded: LoadedModel, index: int, role: str, linear: nn.Linear, reason: str) -> LayerResult:
    return LayerResult(
        layer=index,
        role=role,
        module=loaded.module_name(index, role),
        shape=(linear.out_features, linear.in_features),
        solver=None,
        reason=reason,
        bits=None,
        group_size=None,
        stored_bytes=linear.weight.numel() * linear.weight.element_size(),
        weight_error=None,
        output_error=None,
        notes={},
    )


class _Captured(Exception):
    """Ends a forward pass once the first block's inputs are known."""


class _Walk:
    """The inputs of the current block, batch by batch, and how to push them through it."""

    def __init__(self, loaded: LoadedModel, windows: Tensor) -> None:
        self.loaded = loaded
        self.tokens = windows.numel()
        batch = max(1, BATCH_TOKENS // windows.shape[1])
        self.hidden: list[Tensor] = []
        self.keywords: list[list[dict[str, Any]]] = []  # [batch][block]
        with torch.no_grad():
            for ids in torch.split(windows, batch):
                hidden, keywords = _capture(loaded, ids.to(loaded.device))
                self.hidden.append(hidden)
                self.keywords.append(keywords)

    def _run(self, index: int) -> Iterator[tuple[int, Tensor]]:
        block = self.loaded.blocks[index]
        for i, hidden in enumerate(self.hidden):
            out = block(hidden, **self.keywords[i][index])
            yield i, out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the kept inputs by the block's outputs."""
        for i, out in self._run(index):
            self.hidden[i] = out

    @torch.no_grad()
    def collect(
        self, index: int, layers: dict[tuple[str, ...], nn.Linear], wanted: frozenset[Statistic], *, keep_outputs: bool
    ) -> dict[tuple[str, ...], InputStatistics]:
        """Statistics of the inputs of some layers of a block; keep_outputs also advances, saving a pass."""
        collectors = {key: Collector(wanted, self.tokens) for key in layers}
        with contextlib.ExitStack() as stack:
            for key, linear in layers.items():
                stack.callback(linear.register_forward_pre_hook(_feeder(collectors[key])).remove)
            for i, out in self._run(index):
                if keep_outputs:
                    self.hidden[i] = out
        return {key: collector.result() for key, collector in collectors.items()}


def _feeder(collector: Collector) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        collector.add(args[0])

    return hook


def _capture(loaded: LoadedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The first block's input for token ids [batch, length], and each block's keyword arguments."""
    blocks: Sequence[nn.Module] = loaded.blocks
    keywords: list[dict[str, Any]] = []
    hidden: list[Tensor] = []
    # Blocks of one kind get the same keywords; a model that mixes kinds (sliding and full attention) is run through.
    mixed = len(set(getattr(loaded.model.config, "layer_types", None) or ["same"])) > 1

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not hidden:
            hidden.append(args[0] if args else kwargs["hidden_states"])
        keywords.append({name: value for name, value in kwargs.items() if name != "hidden_states"})
        if not mixed:
            raise _Captured

    with contextlib.ExitStack() as stack:
        for block in blocks if mixed else blocks[:1]:
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with contextlib.suppress(_Captured):
            loaded.body(ids)
    return hidden[0], keywords if mixed else keywords * len(blocks)
