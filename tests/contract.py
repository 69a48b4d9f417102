"""Contract: how a test runs any method on a small model, and sees the quantized weight of every layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from qfarm import calibrate
from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.inputs import Collector
from qfarm.layers.linear import Branch
from qfarm.models.load import LoadedModel
from qfarm.quantized import QuantizedWeight
from qfarm.quantizer import Grid
from qfarm.recipe import Method, Recipe, WeightSolver, Wrapper, build_method, lookup, parse_recipe

# Methods whose defaults are meant for real models: iterations that take long, a rank that exceeds tiny layers, a
# residual window that exceeds short texts; and the options with which a method that can be a transform is one.
FAST: dict[str, dict[str, Any]] = {
    "autoround": {"iterations": 6},
    "crossquant": {"mode": "folded"},
    "fptq": {"v0": 0.5},
    "kivi": {"group": 8, "residual": 16},
    "ptq161": {"epochs": 2},
    "qera": {"rank": 8},
    "spinquant": {"steps": 0},
    "svdquant": {"rank": 4, "candidates": 3, "iterations": 3},
}

CONTEXTS = [(size, symmetric) for size in (16, -1, 32, 64) for symmetric in (False, True)]  # of 64 and 128 columns
WINDOWS = torch.randint(0, 256, (6, 32), generator=torch.manual_seed(0))
PROBE = torch.randint(0, 256, (2, 24), generator=torch.manual_seed(1))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads inside operators. Sums split over more of them could come out differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_threads(make: Callable[[], Tensor], *counts: int) -> list[Tensor]:
    """What `make` gives with each of these numbers of threads."""
    results = []
    for count in counts:
        with threads(count):
            results.append(make())
    return results


def require_ties_at_most(solver: WeightSolver, seed: int, foldable: bool = False) -> None:
    """The same number of threads gives the same bits; another one may move what stood on the edge of two codes."""
    generator = torch.manual_seed(seed)
    weight, x = torch.randn(96, 384, generator=generator), torch.randn(1024, 384, generator=generator)
    x = x @ torch.randn(384, 384, generator=generator)

    def solve() -> Tensor:
        collector = Collector(solver.statistics(), tokens=1024)
        collector.add(x)
        inputs = dataclasses.replace(collector.result(), foldable=foldable)
        return solver.quantize_linear(weight, inputs, Grid(bits=3, group_size=32)).dequantize()

    one, two, again = by_threads(solve, 1, 2, 2)
    assert torch.equal(two, again)
    assert float(((one - two).abs() > 1e-6).float().mean()) < 1e-3


def is_weight_method(name: str) -> bool:
    return issubclass(lookup(name), WeightSolver | Wrapper)


def recipe_of(*names: str) -> Recipe:
    """A chain of those methods at the options that suit small models."""
    options = {name: FAST.get(name, {}) for name in names}
    return parse_recipe({"+".join(names): options if len(names) > 1 else options[names[0]]})


def allowed(recipe: Recipe) -> list[tuple[int, bool]]:
    """Group sizes and symmetry that no method of the recipe refuses."""
    return [context for context in CONTEXTS if not any(method.refusal(*context) for method in recipe.methods)]


def solver_of(recipe: Recipe) -> WeightSolver:
    """The recipe's weight solver, or what the worker takes where there is none."""
    solver = recipe.solver or build_method("rtn", {})
    assert isinstance(solver, WeightSolver)
    return solver


def widths(recipe: Recipe) -> range:
    return solver_of(recipe).widths


@dataclasses.dataclass(frozen=True)
class Made:
    """What a run made of a model."""

    results: list[LayerResult]
    quantized: dict[tuple[int, str], QuantizedWeight]
    weights: dict[tuple[int, str], Tensor]  # of every decoder linear, as the model holds them
    logits: Tensor

    def error(self) -> float:
        """Squared weight error relative to the weights, all layers together."""
        return sum(result.weight_error or 0.0 for result in self.results) / len(self.results)


def run(
    model: LoadedModel,
    recipe: Recipe,
    bits: int | dict[str, int | None],
    context: tuple[int, bool],
    *,
    seed: int = 0,
    sequential: bool = True,
) -> Made:
    """Quantize a model and put it back. `bits` may differ by role; None leaves a role alone."""
    group_size, symmetric = context
    quantized: dict[tuple[int, str], QuantizedWeight] = {}
    replace = calibrate._replace

    def spy(loaded: LoadedModel, index: int, role: str, linear: Any, made: QuantizedWeight, inputs: Any) -> LayerResult:
        assert (index, role) not in quantized
        quantized[index, role] = made
        return replace(loaded, index, role, linear, made, inputs)

    def grid_of(role: str) -> Grid | None:
        width = bits if isinstance(bits, int) else bits[role]
        return None if width is None else Grid(bits=width, group_size=group_size, symmetric=symmetric)

    resolved = Recipe(tuple(method.resolve(group_size) for method in recipe.methods))
    with mock.patch.object(calibrate, "_replace", spy):
        results = quantize_weights(
            model,
            solver_of(resolved),
            grid_of,
            WINDOWS if resolved.needs_text else None,
            sequential=sequential,
            report=lambda done, total: None,
            wrappers=resolved.wrappers,
            seed=seed,
        )
    made = Made(results, quantized, decoder_weights(model), logits(model))
    model.restore()
    return made


def bytes_on_disk(made: Made) -> dict[tuple[int, str], int]:
    """What each layer's packed tensors take in one safetensors file, as its header tells and the file's size proves."""
    names = {f"{index}.{role}": (index, role) for index, role in made.quantized}
    tensors = {
        f"{name}.{part}": tensor.clone(memory_format=torch.contiguous_format)
        for name, key in names.items()
        for part, tensor in made.quantized[key].packed().items()
    }
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_file(tensors, file.name)
        content = Path(file.name).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    parts = {name: part["data_offsets"] for name, part in json.loads(content[8:start]).items()}
    assert set(parts) == set(tensors) and start + sum(stop - begin for begin, stop in parts.values()) == len(content)
    return {
        key: sum(stop - begin for part, (begin, stop) in parts.items() if part.startswith(f"{name}."))
        for name, key in names.items()
    }


def decoder_weights(model: LoadedModel) -> dict[tuple[int, str], Tensor]:
    """What each layer multiplies by, a branch included."""
    return {
        (index, role): whole_weight(linear)
        for index in range(len(model.blocks))
        for role, linear in model.linears(index).items()
    }


def whole_weight(linear: torch.nn.Linear) -> Tensor:
    branch: Branch | None = getattr(linear, "branch", None)
    weight = linear.weight.detach()
    return weight.clone() if branch is None else weight + branch.left @ branch.right


@torch.no_grad()
def logits(model: LoadedModel) -> Tensor:
    return model.head(model.body(PROBE))  # type: ignore[no-any-return]


def break_in(model: LoadedModel) -> None:
    """Give a model what real ones have: dead inputs, rows of zeros, a constant row, one huge weight."""
    with torch.no_grad():
        for index in range(len(model.blocks)):
            linears = model.linears(index)
            norm = next(m for name, m in model.blocks[index].named_modules() if "norm" in name)
            norm.weight[5] = 0.0  # input 5 of q, k, v is always zero
            linears["up"].weight[3] = 0.0
            linears["v"].weight[1] = 0.07
            linears["up"].weight[7, 9] = 4.0


@functools.cache
def described(kind: type[Method]) -> dict[str, str | None]:
    """Each option of a method with its description."""
    fields: dict[str, Any] = kind.__pydantic_fields__  # type: ignore[attr-defined]
    return {name: fields[name].description for name in (f.name for f in dataclasses.fields(kind))}  # type: ignore[arg-type]
