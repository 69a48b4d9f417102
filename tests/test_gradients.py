"""Gradients observed at keys and values, against finite differences and against autograd on a copy of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qfarm.inputs import Statistic
from qfarm.layers.observe import observe
from qfarm.layers.sites import Place
from qfarm.models.load import LoadedModel
from tests.test_models import loaded

WINDOWS = torch.randint(0, 256, (3, 10), generator=torch.manual_seed(0))
WANTED = frozenset({Statistic.SENSITIVITY})
SITES = ("k_pre_rope", "v")


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_squared_gradients_are_those_of_finite_differences(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    model.model.double()
    found = observe(model, WINDOWS, WANTED, sites=SITES)
    assert found.keys() == {Place(site, block) for site in SITES for block in range(2)}
    assert not any(module._forward_hooks for module in model.model.modules()), "hooks are gone"
    makers = {"k_pre_rope": model.key_maker(0), "v": model.linears(0)["v"]}
    for site, module in makers.items():
        stats = found[Place(site, 0)]
        assert stats.values is not None and stats.sensitivity is not None
        assert stats.values.shape == stats.sensitivity.shape == (*WINDOWS.shape, model.linears(0)["k"].out_features)
        for window, token, channel in [(0, 2, 5), (2, 7, 19)]:
            slope = central_difference(model, module, WINDOWS[window], token, channel)
            assert float(stats.sensitivity[window, token, channel]) == pytest.approx(slope**2, rel=0.03)


def central_difference(model: LoadedModel, module: torch.nn.Module, ids: Tensor, token: int, channel: int) -> float:
    """Slope of the window's loss in one number that the module makes."""
    losses = []
    for step in (1e-2, -1e-2):

        def push(_: object, args: object, output: Tensor, step: float = step) -> Tensor:
            moved = output.clone()
            moved.flatten(2)[0, token, channel] += step
            return moved

        handle = module.register_forward_hook(push)
        with torch.no_grad():
            logits = model.model(ids[None], use_cache=False).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")))
        handle.remove()
    return (losses[0] - losses[1]) / 2e-2


def test_values_are_what_passes_by_and_other_statistics_stand_beside_them(tiny: Path) -> None:
    model = loaded(tiny)
    alone = observe(model, WINDOWS, WANTED, sites=SITES)
    both = observe(model, WINDOWS, WANTED | {Statistic.MAX_ABS}, sites=SITES)
    assert alone.keys() == both.keys()
    for place, stats in both.items():
        assert stats.values is not None and stats.max_abs is not None and stats.sensitivity is not None
        torch.testing.assert_close(stats.values.abs().amax(dim=(0, 1)), stats.max_abs, rtol=1e-4, atol=1e-5)
        assert torch.equal(stats.sensitivity, alone[place].sensitivity)
