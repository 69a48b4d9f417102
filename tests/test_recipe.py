"""Recipes: chains of methods, in the order of their stages, from this repository and from other packages."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
import sys
import types
from collections.abc import Callable

import pytest
from pydantic.dataclasses import dataclass

from qfarm import recipe as recipes
from qfarm.errors import InvalidInput
from qfarm.recipe import (
    STRICT,
    ActivationMethod,
    CacheMethod,
    Method,
    Recipe,
    Stage,
    Transform,
    WeightSolver,
    Wrapper,
    build_method,
    lookup,
    method_names,
    parse_recipe,
)
from tests.job_example import changed, labels, matrix


def method(name: str, base: type[Method], **members: object) -> types.ModuleType:
    """A module of another package with one method, whose only option is `strength`."""

    def fill(namespace: dict[str, object]) -> None:
        namespace.update(members, __module__=f"third_party.{name}", __annotations__={"strength": float}, strength=0.5)

    module = types.ModuleType(f"third_party.{name}")
    module.METHOD = dataclass(frozen=True, kw_only=True, config=STRICT)(types.new_class(name, (base,), {}, fill))  # type: ignore[attr-defined]
    return module


def offer(monkeypatch: pytest.MonkeyPatch, entry_points: Callable[[str], list[importlib.metadata.EntryPoint]]) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    # Nothing is kept of what is installed in truth, and nothing of this afterwards.
    monkeypatch.setattr(recipes, "_modules", functools.cache(inspect.unwrap(recipes._modules)))


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package that is installed: a transform, a cache, a term on top of a solver."""
    modules = [
        method("turn", Method, stage=Stage.TRANSFORM),
        method("tuck", Method, stage=Stage.CACHE, claims=frozenset({"kv_cache"})),
        method("tuck2", Method, stage=Stage.CACHE, claims=frozenset({"kv_cache"})),
        method("patch", Wrapper),
        method("hidden", Method, stage=Stage.TRANSFORM),
    ]
    points = []
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        name = module.__name__.partition(".")[2]
        points.append(importlib.metadata.EntryPoint(name.replace("hidden", "shown"), module.__name__, "qfarm.methods"))

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return points if group == "qfarm.methods" else []

    offer(monkeypatch, entry_points)


def test_methods_of_other_packages_are_known_by_name() -> None:
    assert {"gptq", "rtn", "turn", "tuck", "patch"} <= set(method_names())
    recipe = parse_recipe({"turn": {"strength": 0.75}})
    assert recipe.name == "turn" and recipe.methods[0].options() == {"strength": 0.75}
    assert parse_recipe("turn").methods[0].options() == {"strength": 0.5}


def test_a_method_must_be_called_as_its_module() -> None:
    message = 'method "shown" comes from third_party.hidden, whose last part is another name'
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        lookup("shown")


def test_a_name_has_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package may add methods, and may not replace one in silence."""
    points = [
        importlib.metadata.EntryPoint(name, module, "qfarm.methods")
        for name, module in (
            ("gptq", "acme.gptq"),
            ("new", "acme.new"),
            ("new", "zeta.new"),
            ("rtn", "qfarm.methods.rtn"),
        )
    ]
    offer(monkeypatch, lambda group: points)
    for name, both in (("gptq", "qfarm.methods.gptq and acme.gptq"), ("new", "acme.new and zeta.new")):
        with pytest.raises(InvalidInput, match=f'^method "{name}" is offered by {both}; a name has one method'):
            lookup(name)
    assert lookup("rtn").__module__ == "qfarm.methods.rtn" and {"new", "hqq"} <= set(method_names())


def test_what_is_installed_is_read_once_for_all_cells_and_again_for_a_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    offer(monkeypatch, lambda group: asked.append(group) or [])
    assert {lookup("rtn"), lookup("rtn"), type(parse_recipe("rtn").methods[0])} == {lookup("rtn")} and len(asked) == 1
    with pytest.raises(InvalidInput, match='unknown method "fresh"'):
        lookup("fresh")
    assert len(asked) == 2
    method_names()
    assert len(asked) == 3


def test_a_chain_runs_by_stage_however_it_is_written() -> None:
    recipe = parse_recipe("tuck+patch+gptq+turn")
    assert recipe.name == "turn+gptq+patch+tuck"
    assert [method.stage for method in recipe.methods] == sorted(method.stage for method in recipe.methods)
    assert recipe.solver is not None and recipe.solver.name == "gptq"
    assert [wrapper.name for wrapper in recipe.wrappers] == ["patch"]
    assert recipe.claims == {"weight", "kv_cache"}
    assert parse_recipe(" turn + gptq + patch + tuck ") == recipe


def test_options_of_a_chain_go_to_their_methods() -> None:
    recipe = parse_recipe({"turn+gptq": {"gptq": {"damping": 0.5}, "turn": None}})
    assert [method.options().get("damping") for method in recipe.methods] == [None, 0.5]
    assert recipe.methods[0].options() == {"strength": 0.5}


def test_a_recipe_travels_as_plain_data() -> None:
    recipe = parse_recipe({"gptq+tuck+turn": {"tuck": {"strength": 0.25}}})
    assert Recipe.from_specs(recipe.specs()) == recipe
    assert [spec["name"] for spec in recipe.specs()] == ["turn", "gptq", "tuck"]


def test_what_is_said_about_a_chain() -> None:
    with pytest.raises(
        InvalidInput, match="^turn\\+gptq: options of a chain stand under its methods' names, got \"dam"
    ):
        parse_recipe({"turn+gptq": {"damping": 0.5}})
    with pytest.raises(InvalidInput, match="^turn\\+gptq: turn: options are a mapping, got 3$"):
        parse_recipe({"turn+gptq": {"turn": 3}})
    with pytest.raises(
        InvalidInput, match='^turn: unknown option "strenth", did you mean "strength"\\? known: strength$'
    ):
        build_method("turn", {"strenth": 1.0})


def test_chains_written_in_another_order_are_the_same_cells() -> None:
    found = matrix(changed(methods="[gptq+turn, turn+gptq]"))
    assert labels(found) == ["turn+gptq w4 g64"]
    found = matrix(changed(methods="[gptq+turn, rtn]", exclude="[{method: gptq + turn}]"))
    assert labels(found) == ["rtn w4 g64"] and found.notes == ()


def test_a_cache_needs_a_scheme_with_a_cache() -> None:
    found = matrix(changed(methods="[gptq+tuck, turn]", bits="[w4kv4, w4]"))
    assert labels(found) == ["gptq+tuck w4kv4 g64", "turn w4kv4 g64", "turn w4 g64"]
    assert [(invalid.label, invalid.rule) for invalid in found.invalid] == [
        ("gptq+tuck w4 g64", "gptq+tuck quantizes kv_cache, which w4 leaves at 16 bits"),
    ]
    # What nobody claims is rounded to nearest, and the identity says by which version of the rules.
    rounded = {cell.label: dict(cell.rounded) for cell in found.cells}
    assert rounded["gptq+tuck w4kv4 g64"] == {} and rounded["turn w4kv4 g64"] == {"kv_cache": 1, "weight": 1}


def test_a_site_has_one_quantizer() -> None:
    with pytest.raises(InvalidInput, match="^tuck\\+tuck2: tuck and tuck2 both quantize kv_cache; a site has one"):
        parse_recipe("tuck+tuck2")


def test_a_method_that_does_several_things_claims_them_all_and_stands_where_its_first_stage_does() -> None:
    class Both(ActivationMethod, WeightSolver):
        pass

    class Quiet(Both):
        claims = frozenset({"weight"})

    class All(CacheMethod, Transform, ActivationMethod):
        pass

    assert Both.claims == {"weight", "linear_in"} and Both.stage is Stage.WEIGHTS
    assert Quiet.claims == {"weight"} and Quiet.stage is Stage.WEIGHTS
    assert All.claims == {"linear_in", "kv_cache"} and All.stage is Stage.TRANSFORM


def test_a_group_size_means_nothing_without_weights() -> None:
    found = matrix(changed(methods="[tuck]", bits="[kv4]", group_sizes="[-1, 64, 128]", symmetric="true"))
    assert labels(found) == ["tuck kv4"]
