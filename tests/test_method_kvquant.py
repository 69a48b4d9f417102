"""KVQuant: its vectors by hand, what is exact, what is stored, first tokens, and running models of every family."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.codebook import nearest_level
from qfarm.errors import InvalidInput, NonFinite
from qfarm.inputs import InputStatistics
from qfarm.layers.inject import install_cache
from qfarm.layers.install import install_sites
from qfarm.layers.observe import observe
from qfarm.layers.rope import unrotate
from qfarm.layers.sites import Place
from qfarm.methods.kvquant import KVQuant, KVQuantLayer, Levels, split_keys, split_values
from qfarm.models.load import LoadedModel
from qfarm.models.past import returned_cache
from qfarm.recipe import Recipe, parse_recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY
from tests.contract import WINDOWS
from tests.test_layers import IDS, in_every_way, logits, padded

BOOK = torch.tensor([-0.9, -0.3, 0.2, 0.8])
LEVELS = Levels.of(BOOK, None)
VECTOR = torch.tensor([0.1, -0.2, 0.3, 0.9, -0.7, 5, -0.1, 0.2, 0, -0.3, 0.4, -4, 0.5, -0.6, 0.15, -0.05])
every_family = pytest.mark.parametrize("family", TINY)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def layer(channels: int = 32, *, first: int = 0, outliers: float = 0.1, bound: float = 1.5) -> KVQuantLayer:
    bounds = torch.full((channels,), bound).half()
    return KVQuantLayer(
        2, low=-bounds, high=bounds, key_levels=LEVELS, value_levels=LEVELS, outliers=outliers, first_tokens=first
    )


def noise(tokens: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, tokens, 16, generator=torch.manual_seed(seed))


def dequantized(rows: Tensor, parts: Any) -> Tensor:
    """What is read back of rows."""
    coded = LEVELS.look_up(LEVELS.round(parts.normalised(rows))) * parts.range + parts.offset
    return torch.where(parts.outlier, rows, coded)


def fisher(values: Tensor, sensitivity: Tensor | None = None) -> dict[Place, InputStatistics]:
    """Statistics of one block whose keys and values are both `values` [windows, length, C]."""
    found = InputStatistics(
        tokens=values[..., 0].numel(),
        values=values,
        sensitivity=(torch.ones_like(values) if sensitivity is None else sensitivity).bfloat16(),
    )
    return {Place("k_pre_rope", 0): found, Place("v", 0): found}


# -- single vectors ---------------------------------------------------------------------------------------------------


def test_a_token_of_values_by_hand() -> None:
    parts = split_values(VECTOR, outliers=0.1)
    assert parts.outlier.nonzero()[:, 0].tolist() == [5, 11]
    assert float(parts.offset) == pytest.approx(0.1, abs=1e-3) and float(parts.range) == pytest.approx(0.8, abs=1e-3)
    expected = [0.26, -0.14, 0.26, 0.74, -0.62, 5, -0.14, 0.26, -0.14, -0.14, 0.26, -4, 0.74, -0.62, 0.26, -0.14]
    torch.testing.assert_close(dequantized(VECTOR, parts), torch.tensor(expected), rtol=0, atol=2e-3)


def test_keys_on_static_ranges_by_hand() -> None:
    bounds = torch.full((8,), -0.7), torch.full((8,), 0.9)
    parts = split_keys(VECTOR[:8], *bounds)
    assert parts.outlier.nonzero()[:, 0].tolist() == [5]  # -0.7 and 0.9 themselves are inside
    expected = [0.26, -0.14, 0.26, 0.74, -0.62, 5, -0.14, 0.26]
    torch.testing.assert_close(dequantized(VECTOR[:8], parts), torch.tensor(expected), rtol=0, atol=2e-3)
    clipped = split_keys(VECTOR[:8], *bounds, keep=False)
    assert float(dequantized(VECTOR[:8], clipped)[5]) == pytest.approx(0.74, abs=1e-3)


def test_rows_without_a_range_are_exact() -> None:
    constant = torch.full((4, 16), 0.3)
    assert torch.equal(dequantized(constant, split_values(constant, outliers=0.01)), constant)
    flat = torch.full((16,), 0.5)
    assert dequantized(flat, split_keys(flat, flat, flat)).tolist() == [0.5] * 16


@pytest.mark.parametrize(("channels", "each_side"), [(4096, 21), (1024, 6), (192, 1)])
def test_how_many_values_of_a_token_are_outliers(channels: int, each_side: int) -> None:
    rows = torch.randn(20, channels, generator=torch.manual_seed(0))
    assert each_side == channels - math.ceil((channels - 1) * 0.995)
    outlier = split_values(rows, outliers=0.01).outlier
    for side in (rows > 0, rows < 0):
        assert (outlier & side).sum(-1).tolist() == [each_side] * 20


def test_how_many_keys_are_outliers() -> None:
    """Ranges of one sample, used on another."""
    draw = torch.manual_seed(0)
    made = KVQuant().cache_layer(0, 2, fisher(torch.randn(8, 1000, 24, generator=draw)))().tables()["k"]
    other = torch.randn(8000, 24, generator=draw)
    parts = split_keys(other, torch.tensor(made["low"]), torch.tensor(made["high"]))
    assert 0.008 < float(parts.outlier.float().mean()) < 0.012


# -- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_ascending_distinct_and_inside(bits: int) -> None:
    values = torch.randn(4, 300, 16, generator=torch.manual_seed(0))
    tables = KVQuant().cache_layer(0, bits, fisher(values))().tables()
    for role in ("k", "v"):
        levels = tables[role]["levels"]
        assert levels == sorted(set(levels)) and len(levels) == 2**bits and -1 <= levels[0] and levels[-1] <= 1


def test_levels_follow_the_sensitivity_and_leave_first_tokens_out() -> None:
    draw = torch.manual_seed(0)
    values = torch.randn(2, 200, 16, generator=draw).clamp(-3, 3)
    values[0, 0], values[1, 0] = -4.0, 4.0  # every channel has this range
    weights = torch.where((values > 0.4) & (values < 0.5), 1e6, 1.0)
    weighted = KVQuant(outliers=0.0).cache_layer(0, 2, fisher(values, weights))().tables()["k"]["levels"]
    plain = KVQuant(outliers=0.0).cache_layer(0, 2, fisher(values))().tables()["k"]["levels"]
    assert min(abs(4 * level - 0.45) for level in weighted) < 0.05 < min(abs(4 * level - 0.45) for level in plain)
    moved = values.clone()
    moved[:, 0] = torch.randn(2, 16, generator=draw)
    of_values = [
        [
            KVQuant(first_tokens=first).cache_layer(0, 2, fisher(each))().tables()["v"]["levels"]
            for each in (values, moved)
        ]
        for first in (1, 0)
    ]
    assert of_values[0][0] == of_values[0][1] and of_values[1][0] != of_values[1][1]


def test_options_reach_the_levels() -> None:
    values = torch.randn(2, 200, 16, generator=torch.manual_seed(0)) * torch.linspace(0.1, 3, 16)
    observed = fisher(values)

    def levels(**options: Any) -> list[float]:
        found: list[float] = KVQuant(**options).cache_layer(0, 2, observed)().tables()["k"]["levels"]
        return found

    torch.testing.assert_close(torch.tensor(levels(datatype="uniform")), torch.linspace(-1, 1, 4), atol=1e-3, rtol=0)
    assert levels(datatype="nf")[1:3] == pytest.approx([0, 0.3379], abs=1e-3)
    assert levels(fisher="range2") != levels()


def test_q_norm_reads_back_the_mean_and_deviation_of_what_was_rounded() -> None:
    z = torch.randn(5000, generator=torch.manual_seed(0)).mul(0.3).add(0.1).clamp(-1, 1)
    made = Levels.of(BOOK, z)
    read = made.look_up(made.round(z)).double()
    assert float(read.mean()) == pytest.approx(float(z.double().mean()), abs=5e-4)
    assert float(read.std()) == pytest.approx(float(z.double().std()), abs=5e-4)
    assert torch.equal(made.levels, LEVELS.levels) and "read_as" in made.table()
    plain = BOOK.half().float()[nearest_level(z, BOOK)]
    assert abs(float(plain.std() - z.std())) > 5e-3
    assert torch.equal(Levels.of(BOOK, z[:0]).read, LEVELS.levels), "of a block whose numbers are all outliers"
    stretched, usual = (
        KVQuant(norm=norm).cache_layer(0, 2, fisher(torch.randn(2, 200, 16, generator=torch.manual_seed(0))))().tables()
        for norm in (True, False)
    )
    for role in "kv":
        assert stretched[role]["levels"] == usual[role]["levels"] != stretched[role]["read_as"]
        assert "read_as" not in usual[role]


def test_calibration_that_is_not_finite_is_refused() -> None:
    values = torch.zeros(1, 4, 8)
    values[0, 2, 3] = torch.nan
    with pytest.raises(NonFinite, match="^kvquant: keys of block 0 hold NaN, Inf or too much for float16$"):
        KVQuant().cache_layer(0, 4, fisher(values))
    with pytest.raises(InvalidInput, match="^kvquant: first_tokens 4 leaves nothing of a calibration window$"):
        KVQuant(first_tokens=4).cache_layer(0, 4, fisher(torch.zeros(1, 4, 8)))


# -- the cache layer --------------------------------------------------------------------------------------------------


def test_outliers_and_first_tokens_are_exact_and_the_rest_is_on_levels() -> None:
    made, k, v = layer(first=2), noise(9), noise(9, seed=1)
    keys, values = made.update(k, v)
    assert torch.equal(keys[:, :, :2], k[:, :, :2]) and torch.equal(values[:, :, :2], v[:, :, :2])
    beyond = k.abs() > 1.5
    assert beyond[:, :, 2:].any() and torch.equal(keys[beyond], k[beyond])
    on_level = (keys[:, :, 2:, :, None] / 1.5 - LEVELS.levels.float()).abs().amin(-1) < 1e-3
    assert (on_level | beyond[:, :, 2:]).all()
    rows = v.transpose(1, 2).flatten(2)
    parts = split_values(rows, 0.1)
    expected = dequantized(rows, parts).unflatten(2, (2, 16)).transpose(1, 2)
    assert torch.equal(values[:, :, 2:], expected[:, :, 2:])


def test_stepwise_and_at_once_store_the_same() -> None:
    k, v = noise(9), noise(9, seed=1)
    at_once, stepwise = layer(first=2), layer(first=2)
    at_once.update(k, v)
    for start, stop in ((0, 1), (1, 2), (2, 6), (6, 9)):
        stepwise.update(k[:, :, start:stop], v[:, :, start:stop])
    for one, other in zip(at_once.read(), stepwise.read(), strict=True):
        assert torch.equal(one, other)
    assert at_once.stored_bytes() == stepwise.stored_bytes()


def test_what_transformers_does_to_the_layer() -> None:
    k = noise(6)
    made, other = layer(first=1), layer(first=1)
    made.update(k, k)
    other.update(k[[1, 1, 0]], k[[1, 1, 0]])
    made.reorder_cache(torch.tensor([1, 0]))
    made.batch_select_indices(torch.tensor([0, 0, 1]))
    made.offload()
    made.prefetch()
    more = noise(1, batch=3, seed=5)
    for one, two in zip(made.update(more, more), other.update(more, more), strict=True):
        assert torch.equal(one, two)
    size = made.stored_bytes()
    made.batch_repeat_interleave(2)
    assert made.read()[0].shape[0] == 6 and made.stored_bytes() > size
    made.reset()
    assert made.get_seq_length() == 0 and made.stored_bytes() == layer(first=1).stored_bytes()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_bits_per_number_are_those_of_the_paper(bits: int) -> None:
    """At 4,096 channels, counted on stored tensors: 4.33, 3.33 and 2.33."""
    levels = Levels.of(torch.linspace(-1, 1, 2**bits), None)
    bound = torch.full((4096,), 2.5758).half()  # beyond which 1 % of normal numbers are
    make = functools.partial(
        KVQuantLayer,
        bits,
        low=-bound,
        high=bound,
        key_levels=levels,
        value_levels=levels,
        outliers=0.01,
        first_tokens=1,
    )
    made = make()
    tokens = torch.randn(1, 32, 64, 128, generator=torch.manual_seed(0)).half()
    made.update(tokens, tokens)
    fixed = make().stored_bytes()
    per_number = 8 * (made.stored_bytes() - fixed) / (2 * tokens.numel())
    first = (16 - 0.33) / 64  # of one token of 64, which has no outliers
    assert per_number - first == pytest.approx(bits + 0.33, abs=0.012)
    assert fixed == 2 * 2 * 4096 + 2 * 2 * 2**bits


def test_nan_is_not_hidden_by_a_code() -> None:
    k = noise(3)
    k[0, 1, 2, 3] = torch.nan
    for outliers in (0.0, 0.1):
        keys, values = layer(outliers=outliers).update(k, k)
        assert torch.isnan(keys[0, 1, 2, 3]) and torch.isnan(values[0, 1, 2, 3])


# -- in running models ------------------------------------------------------------------------------------------------


def installed(model: LoadedModel, bits: int, **options: Any) -> Any:
    recipe = parse_recipe({"kvquant": options})
    observed = observe(model, WINDOWS, recipe.methods[0].statistics(), sites=("k_pre_rope", "v"))
    return install_sites(model, recipe, parse_scheme(f"kv{bits}"), observed, WINDOWS)


@every_family
def test_a_layer_that_keeps_everything_changes_nothing(model: LoadedModel) -> None:
    """All tokens are first tokens."""
    expected = in_every_way(model)
    channels = model.linears(0)["k"].out_features
    install_cache(model, [functools.partial(layer, channels, first=64)] * 2)
    for found, plain in zip(in_every_way(model), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=0, atol=3e-5)


@every_family
def test_the_cache_is_the_simulation_at_the_projections(model: LoadedModel) -> None:
    """Against hooks that round what the key norm or projection and the value projection make."""
    made = installed(model, 2, first_tokens=2, outliers=0.05)
    with torch.no_grad():
        out = model.model(IDS, use_cache=True)
    cache = returned_cache(out)
    assert made.causal is True and 2 < made.kv_bits < 10 and cache is not None
    tables, simulated = made.tables, {}
    model.restore()
    for block in range(2):
        for role, module in (("k", model.key_maker(block)), ("v", model.linears(block)["v"])):

            def hook(module: Any, args: Any, output: Tensor, block: int = block, role: str = role) -> Tensor:
                rounded = simulated[block, role] = simulate(tables[block, role], role, output)
                return rounded

            model.on_restore(module.register_forward_hook(hook).remove)
    difference = (logits(model) - out.logits).abs()
    # A number at the edge of two levels may fall on either side after the rotation and back, and move what follows.
    assert float(difference.median()) < 1e-5
    for role, stored in zip("kv", cache.layers[0].read(), strict=True):
        expected = simulated[0, role].reshape(*IDS.shape, -1, model.head_dim).transpose(1, 2)
        apart = (stored - expected).abs() > 1e-5
        assert float(apart.float().mean()) < 1e-3


def simulate(table: dict[str, Any], role: str, output: Tensor) -> Tensor:
    rows = output.flatten(2)
    book = torch.tensor(table["levels"])
    if role == "k":
        parts = split_keys(rows, torch.tensor(table["low"]), torch.tensor(table["high"]))
    else:
        parts = split_values(rows, 0.05)
    coded = book[nearest_level(parts.normalised(rows), book).long()] * parts.range + parts.offset
    rounded = torch.where(parts.outlier, rows, coded)
    rounded[:, :2] = rows[:, :2]
    return rounded.reshape(output.shape)


@every_family
def test_left_padding_is_invisible(model: LoadedModel) -> None:
    """Outliers, ranges and first tokens are those of each sequence alone, whatever stands before and beside it."""
    installed(model, 3, first_tokens=2)
    ids, mask = padded(4)
    difference = (logits(model, ids, attention_mask=mask)[:, 4:] - logits(model)).abs()
    assert float(difference.median()) < 1e-5
    generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 257}
    plain = model.model.generate(IDS, **generate)
    assert torch.equal(model.model.generate(ids, attention_mask=mask, **generate)[:, 4:], plain)
    uneven = torch.stack([IDS[0], torch.cat([ids[1, :4], IDS[1, :-4]])])  # the second behind four tokens of padding
    mask = torch.ones_like(uneven)
    mask[1, :4] = 0
    together = logits(model, uneven, attention_mask=mask)
    for found, alone in ((together[:1], IDS[:1]), (together[1:, 4:], IDS[1:, :-4])):
        assert float((found - logits(model, alone)).abs().median()) < 1e-5


@every_family
def test_prefill_decides_what_one_forward_pass_shows(model: LoadedModel) -> None:
    plain = logits(model)
    installed(model, 2, first_tokens=0)
    with model.reading_cache("full"):
        assert torch.equal(logits(model), plain)
    assert (logits(model) - plain).abs().max() > 0.05


def test_keys_are_quantized_before_the_rotary_embedding() -> None:
    angle = torch.randn(1, 5, 8, generator=torch.manual_seed(0)).repeat(1, 1, 2)
    angle[:, 0] = 0  # of position 0, where both are the same
    rotation, k = (angle.cos(), angle.sin()), noise(5)
    before, after = layer(), layer()
    before.rotation = rotation
    undone = unrotate(k, rotation)
    keys, _ = before.update(k, k)
    straight, _ = after.update(undone, k)
    torch.testing.assert_close(unrotate(keys, rotation), straight, rtol=0, atol=1e-5)
    behind, _ = layer().update(k, k)
    assert torch.equal(behind[:, :, 0], keys[:, :, 0]) and (behind - keys)[:, :, 1:].abs().max() > 0.1


def test_levels_and_ranges_stand_in_the_records(models: dict[str, LoadedModel]) -> None:
    model = models["llama"]
    made = installed(model, 3)
    model.restore()
    assert made.tables.keys() == {(block, role) for block in range(2) for role in ("k", "v")}
    table = made.tables[1, "k"]
    assert len(table["levels"]) == 8 and len(table["low"]) == len(table["high"]) == 32


def test_bits_are_counted_on_the_calibration_text(models: dict[str, LoadedModel]) -> None:
    """Of real keys, not of noise, which would be nearly all outliers here."""
    model = models["llama"]
    made = installed(model, 3, first_tokens=0)
    model.restore()
    tokens, channels = WINDOWS.numel(), 32
    fixed = 8 * (4 * channels + 4 * 8) / (2 * tokens * channels)
    counts = (16 + 16 + 32) / 2 / channels
    outliers = made.kv_bits - 3 - fixed - counts
    # Values: one of 32 on either side; keys: about 1 %. 48 bits each in this float32 model.
    assert outliers == pytest.approx(48 * (2 / 32 + 0.01) / 2, rel=0.25)


def test_it_needs_no_more_than_its_statistics() -> None:
    method = KVQuant()
    assert method.needs_text and method.causal and Recipe((method,)).claims == {"kv_cache"}
    assert dataclasses.asdict(method) == method.options()  # type: ignore[call-overload]
