"""KIVI: closed forms of its groups, what waits and what is stored, and its place in running models of every family."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qfarm.layers.cache import RTNLayer
from qfarm.layers.inject import install_cache, stored_bits
from qfarm.layers.install import install_sites
from qfarm.methods.kivi import KIVI, KIVILayer, group_codes, group_grid
from qfarm.models.load import LoadedModel
from qfarm.recipe import parse_recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY, save_tiny
from tests.test_layers import IDS, in_every_way, logits
from tests.test_models import loaded

R, G = 16, 8
every_family = pytest.mark.parametrize("family", TINY)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def layer(key_bits: int = 2, value_bits: int = 2, group: int = G, residual: int = R) -> KIVILayer:
    return KIVILayer(key_bits, value_bits, group=group, residual=residual)


def noise(tokens: int, batch: int = 2, heads: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, tokens, 16, generator=torch.manual_seed(seed))


def lengths(made: KIVILayer) -> tuple[int, int, int, int]:
    """Quantized and waiting keys, quantized and waiting values."""
    found = [made.state[name].shape[2] if name in made.state else 0 for name in ("k_codes", "k_rest", "v_codes")]
    return found[0], found[1], found[2], made.state["v_rest"].shape[2]


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "codes", "values"), [(2, [0, 1, 1, 3], [-1.0, 0.0, 0.0, 2.0]), (4, [0, 5, 7, 15], [-1.0, 0.0, 0.4, 2.0])]
)
def test_a_group_by_hand(bits: int, codes: list[int], values: list[float]) -> None:
    group = torch.tensor([-1.0, 0.0, 0.45, 2.0])
    low, scale = group_grid(group, bits, axis=0)
    found = group_codes(group, low, scale, bits)
    assert found.tolist() == codes
    torch.testing.assert_close(found * scale.float() + low.float(), torch.tensor(values), rtol=0, atol=1e-3)


def test_a_constant_group_is_exact_and_nan_stays() -> None:
    for value in (0.0, -3.5):
        group = torch.full((4,), value)
        low, scale = group_grid(group, 2, axis=0)
        assert (group_codes(group, low, scale, 2) * scale + low).tolist() == [value] * 4
    broken = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    low, scale = group_grid(broken, 2, axis=0)
    assert torch.isnan(group_codes(broken, low, scale, 2) * scale.float() + low.float()).all()


def test_keys_are_grouped_over_tokens_and_values_over_channels() -> None:
    """Against the definition, written out for one head."""
    keys, values = noise(R, 1, 1), noise(2 * R, 1, 1)
    made = layer(2, 4)
    made.update(keys, keys)
    found = made.read()[0][0, 0]  # [R, 16]
    for start in range(0, R, G):
        for channel in range(16):
            group = keys[0, 0, start : start + G, channel]
            low, step = group.min().half().float(), ((group.max() - group.min()) / 3).half().float()
            expected = ((group - low) / step).clamp(0, 3).round() * step + low
            assert torch.equal(found[start : start + G, channel], expected)
    made = layer(2, 4)
    made.update(values, values)
    found = made.read()[1][0, 0]
    for token in range(R):
        for start in (0, G):
            group = values[0, 0, token, start : start + G]
            low, step = group.min().half().float(), ((group.max() - group.min()) / 15).half().float()
            expected = ((group - low) / step).clamp(0, 15).round() * step + low
            assert torch.equal(found[token, start : start + G], expected)
    assert torch.equal(found[R:], values[0, 0, R:])


def test_an_outlier_spoils_its_channel_of_keys_and_its_group_of_a_token_of_values() -> None:
    plain, loud = noise(2 * R, 1, 1), noise(2 * R, 1, 1)
    loud[0, 0, 3, 5] = 100.0
    a, b = layer(), layer()
    a.update(plain, plain)
    b.update(loud, loud)
    keys, values = ((x != y)[0, 0] for x, y in zip(a.read(), b.read(), strict=True))
    assert keys[:G, 5].any() and not keys[G:].any() and not keys[:, [c for c in range(16) if c != 5]].any()
    assert values[3, :G].any() and not values[3, G:].any() and not values[torch.arange(2 * R) != 3].any()
    per_token, spoilt = RTNLayer(4), RTNLayer(4)  # on a grid per token it spoils the other channels of its token
    keys = (per_token.update(plain, plain)[0] != spoilt.update(loud, loud)[0])[0, 0]
    assert keys[3].sum() > G and not keys[torch.arange(2 * R) != 3].any()


# -- what waits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, R - 1, R, R + 1, 2 * R, 2 * R + 5])
def test_lengths_after_prefill_and_decoding(tokens: int) -> None:
    made = layer()
    made.update(noise(tokens), noise(tokens))
    for total in range(tokens, tokens + R + 2):
        quantized = total - total % R, max(0, total - R)
        assert lengths(made) == (quantized[0], total - quantized[0], quantized[1], total - quantized[1])
        assert made.get_seq_length() == total
        made.update(noise(1, seed=total), noise(1, seed=total))


def test_one_prefill_stores_what_single_steps_store_and_nothing_is_quantized_twice() -> None:
    k, v = noise(2 * R + 5), noise(2 * R + 5, seed=1)
    at_once, by_steps, by_chunks = layer(), layer(), layer()
    at_once.update(k, v)
    for token in range(k.shape[2]):
        before = {name: tensor.clone() for name, tensor in by_steps.state.items() if "rest" not in name}
        by_steps.update(k[:, :, token : token + 1], v[:, :, token : token + 1])
        assert all(torch.equal(by_steps.state[n][:, :, : old.shape[2]], old) for n, old in before.items())
    for start, stop in ((0, 7), (7, 30), (30, 37)):
        by_chunks.update(k[:, :, start:stop], v[:, :, start:stop])
    for other in (by_steps, by_chunks):
        assert other.state.keys() == at_once.state.keys()
        assert all(torch.equal(other.state[name], tensor) for name, tensor in at_once.state.items())


def test_a_new_token_is_read_before_it_is_quantized() -> None:
    made = layer()
    k = noise(R)
    made.update(k[:, :, :-1], k[:, :, :-1])
    keys, _ = made.update(k[:, :, -1:], k[:, :, -1:])
    assert torch.equal(keys, k) and lengths(made)[:2] == (R, 0)
    assert not torch.equal(made.read()[0], k)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [5, 3 * R + 5])
def test_stored_bytes_are_those_of_codes_metadata_and_residual(bits: int, tokens: int) -> None:
    made = layer(bits, bits)
    made.update(noise(tokens).half(), noise(tokens).half())
    rows = 2 * 3 * 16  # batch, heads, channels
    quantized = tokens - tokens % R, max(0, tokens - R)
    payload = sum(quantized) * rows * (bits / 8 + 4 / G)
    assert made.stored_bytes() == payload + 2 * rows * (2 * tokens - sum(quantized))


@pytest.mark.parametrize(("bits", "expected"), [(2, 3.40625), (4, 5.34375)])
def test_bits_of_a_cell_at_the_published_options(tmp_path: Path, bits: int, expected: float) -> None:
    """At 2,048 tokens, of which 128 values wait and no key."""
    model = loaded(save_tiny(tmp_path, "llama", head_dim=64, num_hidden_layers=1))
    model.model.bfloat16()
    found = stored_bits(model, [functools.partial(KIVILayer, bits, bits, group=32, residual=128)])
    assert found == ((bits + 1) + (15 / 16 * (bits + 1) + 1)) / 2 == expected


def test_beams_and_batches_are_rearranged() -> None:
    k = noise(2 * R + 5)
    made, swapped = layer(), layer()
    made.update(k, k)
    swapped.update(k[[1, 0, 1]], k[[1, 0, 1]])
    made.reorder_cache(torch.tensor([1, 0]))
    made.batch_select_indices(torch.tensor([0, 1, 0]))
    more = noise(R, batch=3, seed=2)
    for one, other in zip(made.update(more, more), swapped.update(more, more), strict=True):
        assert torch.equal(one, other)


# -- in running models ------------------------------------------------------------------------------------------------


@every_family
def test_sixteen_bits_are_the_plain_cache_to_the_bit(model: LoadedModel) -> None:
    expected = in_every_way(model, new_tokens=20)  # of which the residual window is left behind
    install_cache(model, [lambda: layer(16, 16)] * 2)
    for found, plain in zip(in_every_way(model, new_tokens=20), expected, strict=True):
        if model.model.config.model_type == "mistral":  # whose plain cache drops what its window does not reach
            torch.testing.assert_close(found, plain, rtol=0, atol=2e-5)
        else:
            assert torch.equal(found, plain)


@every_family
def test_prefill_decides_what_one_forward_pass_shows(model: LoadedModel) -> None:
    plain = logits(model)
    recipe = parse_recipe({"kivi": {"group": G, "residual": R}})
    made = install_sites(model, recipe, parse_scheme("kv2"), {})
    assert made.causal is False
    with model.reading_cache("full"):
        assert torch.equal(logits(model), plain)
    with model.reading_cache("quantized"):
        assert (logits(model) - plain).abs().max() > 0.05
    with torch.no_grad(), model.reading_cache("windowed", chunk=1):
        stepwise = model.head(model.body(IDS))
    # The first R tokens see nothing that is quantized: keys of token R are read before the window is emptied.
    torch.testing.assert_close(stepwise[:, :R], plain[:, :R], rtol=0, atol=2e-5)
    assert (stepwise[:, R:] - plain[:, R:]).abs().max() > 0.05
    model.restore()
    install_sites(model, recipe, parse_scheme("kv4"), {})
    with model.reading_cache("full"):
        assert torch.equal(logits(model), plain)


@every_family
def test_generation_is_what_reading_everything_again_gives(model: LoadedModel) -> None:
    """`generate` against one token at a time through the same cache, with the prompt read in full."""
    install_cache(model, [layer] * 2)
    with torch.no_grad(), model.reading_cache("full"):
        found = model.model.generate(IDS, max_new_tokens=20, do_sample=False, pad_token_id=257, eos_token_id=None)
        out = model.model(IDS, use_cache=True)
        tokens, cache = [out.logits[:, -1:].argmax(-1)], out.past_key_values
        while len(tokens) < 20:
            out = model.model(tokens[-1], past_key_values=cache, use_cache=True)
            tokens.append(out.logits[:, -1:].argmax(-1))
    assert torch.equal(found[:, IDS.shape[1] :], torch.cat(tokens, dim=1))


def test_left_padding_takes_no_part_in_ranges() -> None:
    """Padding of whole groups is invisible; of other lengths it moves groups, but never widens their ranges."""
    k = noise(2 * R)
    alone = layer()
    alone.update(k, k)
    for pads, group in ((R, G), (3, 1)):
        one, other = layer(group=group), layer(group=group)
        padded_keys = torch.cat([torch.full_like(k[:, :, :pads], 1e3), k], dim=2)
        one.starts = torch.full((2,), pads)
        one.update(padded_keys, padded_keys)
        other.update(k, k)
        count = 2 * R - 2 * R % R - (pads % R > 0) * R  # keys that are quantized in both
        assert torch.equal(one.read()[0][:, :, pads : pads + count], other.read()[0][:, :, :count])
    made = layer()
    made.starts = torch.tensor([5, 0])
    made.update(torch.cat([torch.full_like(k[:, :, :5], 1e3), k], dim=2), torch.cat([k[:, :, :5], k], dim=2))
    seen = made.read()[0]
    assert (seen[0, :, 5:G] - k[0, :, : G - 5]).abs().max() < 3 and (seen[1, :, 5:G] - k[1, :, : G - 5]).abs().max() > 3


def test_key_value_heads_are_quantized_before_they_are_repeated() -> None:
    k = noise(2 * R, heads=2)
    grouped, repeated = layer(), layer()
    grouped.update(k, k)
    wide = k.repeat_interleave(2, dim=1)
    repeated.update(wide, wide)
    for one, other in zip(grouped.read(), repeated.read(), strict=True):
        assert torch.equal(one.repeat_interleave(2, dim=1), other)


# -- options ----------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    llama = {"hidden_size": 64, "num_attention_heads": 4}
    assert KIVI(group=24).refusal(-1, False) == "group 24 does not divide the residual window of 128 tokens"
    assert KIVI().model_refusal(llama) == "group 32 does not divide heads of 16 numbers"
    assert KIVI(group=16).model_refusal(llama) is KIVI().refusal(-1, False) is None
    off = KIVI(key_bits=16, value_bits=16).refusal(-1, False)
    assert off == "key_bits and value_bits leave the whole cache at 16 bits"


def test_keys_and_values_may_have_widths_of_their_own() -> None:
    make = KIVI(key_bits=4, value_bits=16, group=G, residual=R).cache_layer(0, 2, {})
    made = make()
    k = noise(2 * R)
    made.update(k, k)
    keys, values = made.read()
    assert torch.equal(values, k) and 0 < (keys - k).abs().max() < 0.3
    assert KIVI(key_bits=16).causal and not KIVI(value_bits=16).causal
