"""What every method must keep, whatever it computes. A method that is added is found by its file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from qfarm.inputs import Collector
from qfarm.models.load import LoadedModel
from qfarm.quantized import apart
from qfarm.quantizer import Grid
from qfarm.recipe import BlockSolver, Recipe, build_method, lookup, method_names
from tests.conftest import save_tiny
from tests.contract import (
    CONTEXTS,
    FAST,
    Made,
    allowed,
    break_in,
    bytes_on_disk,
    decoder_weights,
    described,
    is_weight_method,
    logits,
    recipe_of,
    run,
    solver_of,
    widths,
)
from tests.job_example import changed, matrix
from tests.test_models import loaded

every_method = pytest.mark.parametrize("name", method_names())


@pytest.fixture
def weight_method(name: str) -> Recipe:
    """The recipe of a method that quantizes weights; others have no weights to check."""
    if not is_weight_method(name):
        pytest.skip(f"{name} quantizes no weights")
    return recipe_of(name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """One block; tests put it back as they found it."""
    return loaded(save_tiny(tmp_path_factory.mktemp("small"), "llama", num_hidden_layers=1))


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """One block with dead inputs and degenerate rows."""
    model = loaded(save_tiny(tmp_path_factory.mktemp("rough"), "llama", num_hidden_layers=1))
    break_in(model)
    return model


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """One block of 40 and 88 columns: neither is a whole number of packed words at most widths."""
    sizes = {"hidden_size": 40, "intermediate_size": 88, "num_hidden_layers": 1}
    return loaded(save_tiny(tmp_path_factory.mktemp("odd"), "llama", **sizes))


# -- what it says of itself -------------------------------------------------------------------------------------------


@every_method
def test_it_says_what_it_is(name: str) -> None:
    kind = lookup(name)
    documentation = sys.modules[kind.__module__].__doc__ or ""
    assert kind.source and kind.version >= 1 and len(kind.widths) >= 1 and build_method(name, {}).name == name
    assert "differ" in documentation.lower(), "the docstring lists each difference from the paper or reference code"
    missing = [option for option, words in described(kind).items() if not words]
    assert not missing, f"options without a description: {missing}"


@every_method
def test_options_survive_identity_and_transport(name: str) -> None:
    for group_size in (-1, 16):
        for method in (build_method(name, {}), build_method(name, FAST.get(name, {}))):
            resolved = method.resolve(group_size)
            assert build_method(name, json.loads(json.dumps(resolved.options()))) == resolved
            assert resolved.resolve(group_size) == resolved  # nothing automatic is left
            assert Recipe.from_specs(Recipe((resolved,)).specs()).methods == (resolved,)


@every_method
def test_refusals_come_before_a_model_is_touched(name: str, weight_method: Recipe) -> None:
    """The matrix of a model that exists only as a description: what is refused is listed, and is no cell."""
    # RTN keeps the matrix from being empty, and proves that the job itself is sound.
    methods = json.dumps([{name: FAST.get(name, {})}, *(["rtn"] if name != "rtn" else [])])
    # A method that also quantizes linear inputs says nothing of schemes that leave them alone.
    claims = weight_method.claims - frozenset().union(*(method.optional for method in weight_method.methods))
    inputs = "a8" if "linear_in" in claims else ""
    schemes = [f"w{bits}{inputs}" for bits in range(1, 9)]
    for group_size, symmetric in CONTEXTS:
        refusals = [refused for method in weight_method.methods if (refused := method.refusal(group_size, symmetric))]
        assert all(refused.strip() and "\n" not in refused for refused in refusals)
        keys = {
            "group_sizes": f"[{group_size}]",
            "symmetric": str(symmetric).lower(),
            "bits": f"[{', '.join(schemes)}]",
        }
        found = matrix(changed(methods=methods, **keys))
        runs = [cell.scheme for cell in found.cells if cell.recipe == weight_method.name]
        assert runs == ([] if refusals else [f"w{bits}{inputs}" for bits in widths(weight_method)])
        rules = [invalid.rule for invalid in found.invalid if invalid.label.split()[0] == weight_method.name]
        assert len(rules) + len(runs) == len(schemes) and all(name in rule or "rtn" in rule for rule in rules)
    assert allowed(weight_method), "every context is refused"


# -- what it makes ----------------------------------------------------------------------------------------------------


def check_made(model: LoadedModel, made: Made, alone: frozenset[str] = frozenset()) -> None:
    """Stored bytes are those of packed tensors on disk, layer by layer; the model holds what is stored; nothing is NaN.

    `alone` are the roles that the scheme leaves at 16 bits.
    """
    before, on_disk = decoder_weights(model), bytes_on_disk(made)
    assert sorted((r.layer, r.role) for r in made.results) == sorted(before), "every layer is listed once"
    assert {result.role for result in made.results if result.solver is None} == alone
    assert torch.isfinite(made.logits).all()
    for result in made.results:
        key = result.layer, result.role
        if result.solver is None:
            assert result.reason and key not in made.quantized and torch.equal(made.weights[key], before[key])
            continue
        quantized = made.quantized[key]
        assert on_disk[key] == quantized.stored_bytes() == result.stored_bytes, f"{key}: {on_disk[key]} bytes on disk"
        assert result.shape == quantized.shape == before[key].shape
        # Terms beside a branch are added up in another order than in the layer.
        exact = apart(quantized)[1] is None
        stored = quantized.dequantize().to(before[key].dtype)
        torch.testing.assert_close(stored, made.weights[key], rtol=0, atol=0 if exact else 1e-6)
        assert result.weight_error is not None and math.isfinite(result.weight_error)
        json.dumps(result.notes, allow_nan=False)


def unchanged(model: LoadedModel, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())


@every_method
def test_what_is_not_refused_runs(name: str, weight_method: Recipe, rough: LoadedModel) -> None:
    """On a model with dead inputs and degenerate rows, and without a trace once the model is put back."""
    before = {key: value.clone() for key, value in rough.model.state_dict().items()}
    for context in allowed(weight_method):
        check_made(rough, run(rough, weight_method, widths(weight_method).start, context))
        assert unchanged(rough, before)


@every_method
def test_bytes_of_shapes_that_fill_no_words(name: str, weight_method: Recipe, odd: LoadedModel) -> None:
    for context in ((8, False), (8, True), (-1, False), (-1, True)):
        if any(method.refusal(*context) for method in weight_method.methods):
            continue
        for bits in sorted({widths(weight_method).start, widths(weight_method)[len(widths(weight_method)) // 3]}):
            check_made(odd, run(odd, weight_method, bits, context))


@every_method
def test_same_seed_same_weights(name: str, weight_method: Recipe, tiny: Path) -> None:
    bits, context = widths(weight_method)[len(widths(weight_method)) // 2], allowed(weight_method)[0]
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)  # the process's own random state is nobody's seed
        model = loaded(tiny)
        runs.append(run(model, weight_method, bits, context, seed=7))
        check_made(model, runs[-1])
    assert runs[0].results == runs[1].results
    assert all(torch.equal(runs[0].weights[key], runs[1].weights[key]) for key in runs[0].weights)
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert not torch.equal(runs[0].logits, logits(model))


@every_method
def test_sixteen_bits_leave_the_logits_alone(name: str, weight_method: Recipe, small: LoadedModel) -> None:
    untouched: dict[str, int | None] = dict.fromkeys(small.architecture.roles, None)
    made = run(small, weight_method, untouched, allowed(weight_method)[0])
    check_made(small, made, alone=frozenset(untouched))
    assert torch.equal(made.logits, logits(small))


@every_method
def test_layers_may_stay_at_sixteen_bits(name: str, weight_method: Recipe, small: LoadedModel) -> None:
    bits: dict[str, int | None] = dict.fromkeys(small.architecture.roles, widths(weight_method)[-1])
    made = run(small, weight_method, bits | {"k": None, "down": None}, allowed(weight_method)[0])
    check_made(small, made, alone=frozenset({"k", "down"}))


@every_method
def test_error_grows_as_bits_fall(name: str, weight_method: Recipe, small: LoadedModel) -> None:
    context = allowed(weight_method)[0]
    errors = {bits: run(small, weight_method, bits, context).error() for bits in widths(weight_method)}
    for fewer, more in itertools.pairwise(errors):
        assert errors[fewer] > errors[more] > 0, errors


@every_method
def test_rows_of_a_stacked_matrix(name: str, weight_method: Recipe) -> None:
    """Rows of stacked layers are what the layers would be alone, up to ties, and their bytes are theirs."""
    solver = solver_of(weight_method)
    if isinstance(solver, BlockSolver) or not solver.stackable:
        pytest.skip(f"{solver.name} takes layers one by one")
    group_size, symmetric = allowed(weight_method)[0]
    grid = Grid(bits=solver.widths[-1], group_size=group_size, symmetric=symmetric)
    generator = torch.manual_seed(3)
    weight = torch.randn(48, 64, generator=generator)
    collector = Collector(solver.statistics(), tokens=256)
    collector.add(torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    layers = (("q", 32), ("k", 16))
    inputs = dataclasses.replace(collector.result(), roles=layers) if solver.statistics() else None
    whole = solver.resolve(group_size).quantize_linear(weight, inputs, grid)
    start = 0
    for role, rows in layers:
        part = whole.row_range(start, start + rows)
        assert part.shape == (rows, 64)
        assert torch.equal(part.dequantize(), whole.dequantize()[start : start + rows])
        assert part.stored_bytes() == sum(t.numel() * t.element_size() for t in part.packed().values())
        told = inputs and dataclasses.replace(inputs, roles=((role, rows),))
        alone = solver.resolve(group_size).quantize_linear(weight[start : start + rows], told, grid)
        same = torch.isclose(alone.dequantize(), part.dequantize(), rtol=1e-3, atol=1e-4)
        assert float(same.float().mean()) > 0.99
        start += rows


# -- what can be combined ---------------------------------------------------------------------------------------------


@every_method
def test_low_rank_terms_go_on_top_of_every_other_method(name: str, weight_method: Recipe, small: LoadedModel) -> None:
    if name == "qera":
        pytest.skip("it stands in a chain once")
    bits, chain = widths(weight_method).start, recipe_of(name, "qera")
    base = run(small, weight_method, bits, allowed(chain)[0], sequential=False)
    made = run(small, chain, bits, allowed(chain)[0], sequential=False)
    check_made(small, made)
    for before, after in zip(base.results, made.results, strict=True):
        assert after.solver == f"{before.solver}+qera" and after.notes["repaired"] > 0
        assert after.stored_bytes == before.stored_bytes + 2 * 8 * sum(before.shape)
