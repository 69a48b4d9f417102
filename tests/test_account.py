"""What is counted of quantized activations: widths by closed forms, what calibration fixed, once where it is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm.layers.install import Installed, install_sites
from qfarm.layers.observe import observe
from qfarm.models.load import LoadedModel
from qfarm.quantized import LowRank, payload_bits
from qfarm.quantizer import Grid
from qfarm.recipe import ActivationMethod, CacheMethod, Recipe, build_method
from qfarm.scheme import parse_scheme
from tests.test_models import loaded

WINDOWS = torch.randint(0, 256, (4, 24), generator=torch.manual_seed(0))
# Two blocks; inputs of q/k/v, of o and of gate/up have 64 channels, that of down 128. Heads: 4 of 16, 2 of keys.
CHANNELS = 64 + 64 + 64 + 128


@pytest.fixture
def model(tiny: Path) -> LoadedModel:
    return loaded(tiny)


def installed(model: LoadedModel, name: str, scheme: str, **options: Any) -> Installed:
    method = build_method(name, options).resolve(8)
    assert isinstance(method, ActivationMethod | CacheMethod)
    wanted = method.site_statistics()
    observed = observe(model, WINDOWS, wanted, sites=method.observes) if wanted else {}
    return install_sites(model, Recipe((method,)), parse_scheme(scheme), observed)


def test_bits_at_linear_inputs(model: LoadedModel) -> None:
    assert install_sites(model, Recipe(), parse_scheme("w4kv4"), {}).activation_bits is None
    model.restore()
    assert install_sites(model, Recipe(), parse_scheme("a5"), {}).activation_bits == 5
    model.restore()
    # The published table: a flag of 4 bits for each group of 8.
    assert installed(model, "qrazor", "w4a4").activation_bits == 4.5
    model.restore()
    assert installed(model, "qrazor", "w4a8", activation_group=64).activation_bits == 8.0625
    model.restore()
    # At least 8 bits at inputs that a norm makes.
    assert installed(model, "rptq", "a4kv4").activation_bits == (8 * (64 + 64) + 4 * (64 + 128)) / CHANNELS
    model.restore()
    # An eighth of what is not the input of down has 8 bits.
    assert installed(model, "resq", "w4a4").activation_bits == (4.5 * 3 * 64 + 4 * 128) / CHANNELS
    model.restore()
    assert installed(model, "resq", "w4a3", fraction=0.25).activation_bits == (4.25 * 3 * 64 + 3 * 128) / CHANNELS
    model.restore()
    assert installed(model, "crossquant", "a4").activation_bits == 4
    model.restore()
    assert installed(model, "crossquant", "a4", remove_only=True).activation_bits == 16


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 0),
        ({"mode": "static", "granularity": "tensor"}, 4 * 4),
        ({"mode": "static", "granularity": "tensor", "symmetric": False}, 4 * 5),
        ({"mode": "static", "granularity": "channel"}, CHANNELS * 4),
        ({"mode": "static", "granularity": "channel", "symmetric": False}, CHANNELS * 5),
    ],
)
def test_calibrated_ranges_count_once_for_layers_that_share_an_input(
    model: LoadedModel, options: dict[str, Any], size: int
) -> None:
    assert installed(model, "act", "a8", **options).activation_bytes == 2 * size


def test_channel_maxima_count(model: LoadedModel) -> None:
    assert installed(model, "crossquant", "a8").activation_bytes == 0
    model.restore()
    assert installed(model, "crossquant", "a8", mode="static").activation_bytes == 2 * 4 * CHANNELS
    model.restore()
    assert installed(model, "crossquant", "a8", mode="static", remove_only=True).activation_bytes == 2 * 4 * CHANNELS


def test_static_layers_of_fptq_count(model: LoadedModel) -> None:
    assert installed(model, "fptq", "a8", v0=1e9, v1=1e9).activation_bytes == 2 * 4 * 4
    model.restore()
    assert installed(model, "fptq", "a8", v0=1e-9, v1=1e-9).activation_bytes == 0


def test_clusters_count_with_their_map(model: LoadedModel) -> None:
    made = installed(model, "rptq", "a4kv4", clusters=5, head_clusters=3)
    pair = 4 + 2
    r1_r4_r5 = 3 * 5 * pair + 64 + 64 + 128
    # Keys, and values with the input of o: a pair per head and cluster, one map for each clustering.
    r2, r3 = 2 * 3 * pair + 32, (2 + 4) * 3 * pair + 32
    assert made.activation_bytes == 2 * (r1_r4_r5 + r2 + r3)
    model.restore()
    # Queries use the map of the keys.
    made = installed(model, "rptq", "a4kv4q4", clusters=5, head_clusters=3)
    assert made.activation_bytes == 2 * (r1_r4_r5 + r2 + r3 + 4 * 3 * pair)


def test_fixed_grids_of_keys_and_values_cost_their_codes_alone(model: LoadedModel) -> None:
    """RPTQ's n + 0."""
    assert installed(model, "rptq", "w4kv4").kv_bits == 4
    model.restore()
    assert installed(model, "rptq", "kv3").kv_bits == 3


def test_payloads_of_weights() -> None:
    weight, grid = torch.randn(16, 64, generator=torch.manual_seed(0)), Grid(bits=4, group_size=16)
    rtn, razored = build_method("rtn", {}), build_method("qrazor", {"group": 16})
    assert payload_bits(grid.quantize(weight)) == payload_bits(rtn.quantize_linear(weight, None, grid)) == 4  # type: ignore[attr-defined]
    made = razored.quantize_linear(weight, None, grid)  # type: ignore[attr-defined]
    assert payload_bits(made) == 4.1875
    term = LowRank(base=made, solver="qera", left=torch.zeros(16, 1), right=torch.zeros(1, 64))
    assert payload_bits(term) == 4.1875
    paper = build_method("llm_int8", {"mode": "paper"})
    assert payload_bits(paper.quantize_linear(weight, None, Grid(bits=8, group_size=-1))) == 16  # type: ignore[attr-defined]
