"""Calibrate: walk a model block by block, learn what each linear layer's inputs look like, hand layers to a solver.

In sequential mode a block is run again after it was quantized, so that later blocks see what the quantized model
really feeds them (GPTQ, section 3.8); in independent mode statistics come from the original model, one pass suffices,
and cells can share it. A true-sequential solver also re-runs the block between groups of layers; one that is defined on
original inputs (AWQ) gets them in either mode.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics
from qfarm.kernel_bytes import KernelBytes, kernel_bytes
from qfarm.layers.linear import Branch, as_given, quantize_input
from qfarm.models.load import LoadedModel
from qfarm.quantized import QuantizedWeight, apart, input_factor, payload_bits
from qfarm.quantizer import Grid, relative_error
from qfarm.recipe import BlockSolver, WeightSolver, Wrapper, solves_blocks
from qfarm.scheme import UNTOUCHED
from qfarm.shared import Group, SharedStatistics
from qfarm.walk import BATCH_TOKENS, BlockProblem, Walk, for_any_batch


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
    payload_bits: float | None = None  # per weight, of codes alone; None: left alone
    kernel: KernelBytes | str | None = None  # bytes as kernels read them, or why not; None: left alone


GridOf = Callable[[str], Grid | None]  # role -> grid; None leaves layers of that role at 16 bits
Report = Callable[[int, int], None]  # blocks done, blocks
Keep = Callable[[str, QuantizedWeight], None]  # is handed each layer's module name and codes


def quantize_weights(
    loaded: LoadedModel,
    solver: WeightSolver,
    grid_of: GridOf,
    windows: Tensor | None,
    *,
    sequential: bool,
    report: Report,
    wrappers: Sequence[Wrapper] = (),
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    shared: SharedStatistics | None = None,
    input_bits: int = UNTOUCHED,
    keep: Keep | None = None,
) -> list[LayerResult]:
    """Quantize every decoder linear of the model in place; windows [samples, length] are token ids.

    `windows` may be None when neither the solver nor a wrapper needs statistics. `shared` holds those of the same
    windows, collected with the same batches; it serves independent mode only. `input_bits` is what
    the inputs of linear layers will be quantized to, for solvers that train against it. Embeddings and the head are
    untouched, norms and biases too unless a block solver learns them. `keep` is handed every quantized layer.
    """
    terms = tuple(wrappers)
    run = _Run(loaded, solver, terms, grid_of, windows, sequential, seed, batch_tokens, shared, input_bits, keep)
    results: list[LayerResult] = []
    for index in range(len(loaded.blocks)):
        report(index, len(loaded.blocks))
        with loaded.opened(index):
            results += run.block(index)
    report(len(loaded.blocks), len(loaded.blocks))
    return results


class _Run:
    """One model being quantized: what the steps below share."""

    def __init__(
        self,
        loaded: LoadedModel,
        solver: WeightSolver,
        wrappers: tuple[Wrapper, ...],
        grid_of: GridOf,
        windows: Tensor | None,
        sequential: bool,
        seed: int,
        batch_tokens: int,
        shared: SharedStatistics | None,
        input_bits: int,
        keep: Keep | None,
    ) -> None:
        self.loaded, self.solver, self.wrappers, self.grid_of, self.seed = loaded, solver, wrappers, grid_of, seed
        self.wanted = solver.statistics().union(*(wrapper.statistics() for wrapper in wrappers))
        self.input_bits, self.keep = input_bits, keep
        self.sequential = (sequential or solver.true_sequential) and not solver.original_inputs
        self.walk, self.original = None, None
        # A block solver walks the model itself, for its inputs and its targets.
        self.shared = shared if not self.sequential and not solves_blocks(solver) else None
        if self.shared is None and windows is not None and (self.wanted or solves_blocks(solver)):
            self.walk = Walk(loaded, windows, batch_tokens)
            # A block solver aims at what the original block makes of the original inputs.
            if solves_blocks(solver) and self.sequential:
                self.original = self.walk.copy()

    def block(self, index: int) -> list[LayerResult]:
        linears = self.loaded.linears(index)
        if solves_blocks(self.solver):
            results = self._whole_block(index, linears, self.solver)
        else:
            results = self._layer_by_layer(index, linears)
        last = index + 1 == len(self.loaded.blocks)
        if self.walk is not None and self.sequential and not last:
            self.walk.advance(index)
        return results

    def _layer_by_layer(self, index: int, linears: dict[str, nn.Linear]) -> list[LayerResult]:
        groups = self.loaded.architecture.shared_inputs
        # Each phase is one pass over the calibration text that serves one or all groups of layers.
        phases = [[group] for group in groups] if self.solver.true_sequential else [list(groups)]
        results = []
        for phase in phases:
            stats = self._statistics(index, phase, linears, advance=not self.sequential)
            for group in phase:
                results += self._group(index, {role: linears[role] for role in group}, stats.get(group))
        return results

    def _statistics(
        self, index: int, groups: list[Group], linears: dict[str, nn.Linear], *, advance: bool
    ) -> dict[Group, InputStatistics]:
        if not self.wanted or (self.walk is None and self.shared is None):
            return {}
        if self.shared is not None:
            stats = self.shared.block(index, groups, self.wanted)
        else:
            assert self.walk is not None
            first = {group: linears[group[0]] for group in groups}
            stats = self.walk.collect(index, first, self.wanted, keep_outputs=advance)
        for group, found in stats.items():
            found.foldable = self.loaded.absorbs_scale(index, group)
            found.divided = self.loaded.divided.get((index, group))
        return stats

    def _group(self, index: int, linears: dict[str, nn.Linear], inputs: InputStatistics | None) -> list[LayerResult]:
        """Layers that read the same input; those with the same grid are stacked and solved as one matrix."""
        together: dict[object, tuple[Grid | None, list[str]]] = {}
        for role in linears:
            grid = self.grid_of(role)
            key = grid if self.solver.stackable or self.solver.joint else role
            together.setdefault(key, (grid, []))[1].append(role)
        results = []
        for grid, roles in together.values():
            if grid is None:
                results += [_untouched(self.loaded, index, role, linears[role]) for role in roles]
                continue
            stacked = torch.cat([linears[role].weight.detach().float() for role in roles])
            rows = tuple((role, linears[role].out_features) for role in roles)
            # One operator cannot absorb the different factors of layers that are solved apart.
            foldable = inputs is not None and inputs.foldable and len(together) == 1
            told = inputs and dataclasses.replace(inputs, roles=rows, foldable=foldable, bits=self.input_bits)
            try:
                whole = self.solver.quantize_linear(stacked, told, grid)
            except NonFinite as error:
                raise NonFinite(f"layer {index} {'/'.join(roles)}: {error}") from None
            start = 0
            for role in roles:
                stop = start + linears[role].weight.shape[0]
                part = whole.row_range(start, stop) if len(roles) > 1 else whole
                if len(roles) > 1:  # the solver's figures are those of the whole stack
                    part.notes["solved_with"] = roles
                results.append(self._finish(index, role, linears[role], part, inputs))
                start = stop
        return results

    def _whole_block(self, index: int, linears: dict[str, nn.Linear], solver: BlockSolver) -> list[LayerResult]:
        assert self.walk is not None
        grids = {role: grid for role in linears if (grid := self.grid_of(role)) is not None}
        groups = list(self.loaded.architecture.shared_inputs)
        targets = (self.original or self.walk).outputs(index)
        samples = len(self.walk.hidden[0])
        # A block solver advances by its own targets, whatever the mode.
        stats = self._statistics(index, groups, linears, advance=False)
        problem = BlockProblem(
            block=self.loaded.blocks[index],
            linears={role: linears[role] for role in grids},
            grids=grids,
            inputs=torch.cat(self.walk.hidden).to(self.loaded.block_device(index)),
            targets=torch.cat(targets),
            keywords={key: for_any_batch(value, samples) for key, value in self.walk.keywords[0][index].items()},
            seed=self.seed * 100_003 + index,
            statistics={role: found for group, found in stats.items() for role in group},
            index=index,
            blocks=len(self.loaded.blocks),
            input_bits=self.input_bits,
        )
        if self.original is not None:
            self.original.hidden = targets
        elif not self.sequential:
            self.walk.hidden = targets
        done = solver.quantize_block(problem) if grids else {}
        for name, values in problem.learned.items():
            module, _, own = name.rpartition(".")
            self.loaded.replace_parameter(problem.block.get_submodule(module), own, values)
        results = []
        for group in groups:
            for role in group:
                if role not in done:
                    results.append(_untouched(self.loaded, index, role, linears[role]))
                else:
                    results.append(self._finish(index, role, linears[role], done[role], stats.get(group)))
        return results

    def _finish(
        self, index: int, role: str, linear: nn.Linear, quantized: QuantizedWeight, inputs: InputStatistics | None
    ) -> LayerResult:
        for wrapper in self.wrappers:
            quantized = wrapper.wrap(linear.weight.detach().float(), quantized, inputs)
        if self.keep is not None:
            self.keep(self.loaded.module_name(index, role), quantized)
        return _replace(self.loaded, index, role, linear, quantized, inputs)


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
        payload_bits=payload_bits(quantized),
        kernel=kernel_bytes(quantized),
    )
    factor = input_factor(quantized)
    if factor is not None:
        loaded.input_factors[index, role] = factor.float()
        loaded.on_restore(functools.partial(loaded.input_factors.pop, (index, role), None))
    rest, branch = apart(quantized)
    loaded.replace_weight(linear, rest)
    if branch is not None:
        left, right = (part.to(weight.dtype) for part in branch)
        quantize_input(loaded, index, role, as_given, Branch(left=left, right=right))
    return result


def _untouched(loaded: LoadedModel, index: int, role: str, linear: nn.Linear) -> LayerResult:
    return LayerResult(
        layer=index,
        role=role,
        module=loaded.module_name(index, role),
        shape=(linear.out_features, linear.in_features),
        solver=None,
        reason="the scheme leaves this layer at 16 bits",
        bits=None,
        group_size=None,
        stored_bytes=linear.weight.numel() * linear.weight.element_size(),
        weight_error=None,
        output_error=None,
        notes={},
    )
