"""What every transform, activation and cache method must keep, and round-to-nearest as well. Found by its file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.inputs import Statistic
from qfarm.layers.install import Installed, install_sites
from qfarm.layers.observe import observe
from qfarm.layers.sites import RTN_WIDTHS, Observed
from qfarm.models.load import LoadedModel
from qfarm.recipe import ActivationMethod, CacheMethod, Method, Recipe, Transform, lookup, method_names
from qfarm.scheme import Scheme
from tests.conftest import TINY
from tests.contract import FAST, PROBE, WINDOWS, recipe_of

EXACT = 1e-4  # float32 logits of a transformed model against the original
TRANSFORMS = [name for name in method_names() if issubclass(lookup(name), Transform)]
SITE_METHODS = [name for name in method_names() if issubclass(lookup(name), ActivationMethod | CacheMethod)]
SITES = [
    *(("rtn", site) for site in RTN_WIDTHS),
    *((name, site) for name in SITE_METHODS for site in sorted(lookup(name).claims - {"weight"})),
]


@pytest.fixture(params=TINY)
def model(models: dict[str, LoadedModel], request: pytest.FixtureRequest) -> Any:
    yield models[request.param]
    models[request.param].restore()


@torch.no_grad()
def logits(model: LoadedModel, ids: Tensor = PROBE) -> Tensor:
    out: Tensor = model.model(ids).logits
    return out


def refused(method: Method, model: LoadedModel) -> str | None:
    return method.refusal(-1, False) or method.model_refusal(model.model.config.to_dict())


def observed_for(model: LoadedModel, wanted: frozenset[Statistic], sites: frozenset[str]) -> Observed:
    return observe(model, WINDOWS, wanted, sites=sites) if wanted else {}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_changes_no_result_and_leaves_no_trace(name: str, model: LoadedModel) -> None:
    (method,) = (m for m in recipe_of(name).methods if isinstance(m, Transform))
    if refused(method, model):
        pytest.skip("refused for this model")
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    plain = logits(model)
    with model.temporary():
        method.prepare(model)
        observed = observed_for(model, method.transform_statistics(), method.learns_from)
    assert torch.equal(logits(model), plain)
    notes = method.transform(model, observed, 0)
    assert notes and all(note.strip() and "\n" not in note for note in notes), "it says what it did"
    assert any(not torch.equal(before[key], value) for key, value in model.model.state_dict().items())
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=EXACT)
    model.restore()
    assert all(torch.equal(before[key], value) for key, value in model.model.state_dict().items())
    assert torch.equal(logits(model), plain)


def installed(model: LoadedModel, name: str, site: str) -> Installed:
    """A site quantized by a method, at a width that it supports."""
    (method,) = (m for m in recipe_of(name).methods if m.name == name)
    if refused(method, model):
        pytest.skip("refused for this model")
    widths = method.site_widths.get(site, RTN_WIDTHS[site])
    scheme = Scheme(**{site: 4 if 4 in widths else widths.start})
    if not isinstance(method, ActivationMethod | CacheMethod):
        return install_sites(model, Recipe(), scheme, {})
    return install_sites(
        model, Recipe((method,)), scheme, observed_for(model, method.site_statistics(), method.observes)
    )


@pytest.mark.parametrize(("name", "site"), SITES)
def test_a_quantized_site_changes_results_and_leaves_no_trace(name: str, site: str, model: LoadedModel) -> None:
    plain = logits(model)
    made = installed(model, name, site)
    first = logits(model)
    assert torch.isfinite(first).all() and not torch.equal(first, plain)
    assert torch.equal(logits(model), first), "quantizers hold no state"
    assert made.causal is not None and (made.kv_bits is None or 1 < made.kv_bits < 16)
    model.restore()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(("name", "site"), SITES)
def test_what_says_it_is_causal_is(name: str, site: str, model: LoadedModel) -> None:
    """Earlier predictions do not change with the last token, and sequences of a batch not with each other."""
    if not installed(model, name, site).causal:
        pytest.skip("it says that it looks across tokens")
    other = PROBE.clone()
    other[0, -1] = (other[0, -1] + 1) % 256
    before, after = logits(model), logits(model, other)
    assert torch.equal(before[0, :-1], after[0, :-1]) and torch.equal(before[1:], after[1:])


def test_options_of_small_models_are_of_methods_that_exist() -> None:
    assert FAST.keys() <= set(method_names())
