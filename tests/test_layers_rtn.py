"""Quantizers of activations and the packing of cached codes: closed forms and invariants."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from qfarm.layers.packing import pack_codes, unpack_codes
from qfarm.layers.rtn import Asymmetric, Quantizer, Symmetric, Unsigned, rtn_quantizer
from qfarm.quantized import pack_bits

ALL = [Symmetric, Asymmetric, Unsigned]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def values_for(quantizer: Quantizer) -> Tensor:
    x = noise(3, 5, 32)
    return x.softmax(-1) if isinstance(quantizer, Unsigned) else x


def test_symmetric_closed_form() -> None:
    """Codes -7, 2, 5, 6 with scale 1/7."""
    out = Symmetric(bits=4)(torch.tensor([-1.0, 0.3, 0.7, 0.9]))
    torch.testing.assert_close(out, torch.tensor([-7.0, 2.0, 5.0, 6.0]) / 7, rtol=1e-6, atol=0)


def test_asymmetric_closed_form() -> None:
    """Scale 0.2, zero 5, codes 0, 5, 7, 15."""
    out = Asymmetric(bits=4)(torch.tensor([-1.0, 0.0, 0.45, 2.0]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 0.0, 0.4, 2.0]), rtol=1e-6, atol=0)


def test_unsigned_closed_form() -> None:
    """Scale 0.6/15 = 0.04; 0.25 / 0.04 = 6.25 -> 6, 0.15 / 0.04 = 3.75 -> 4."""
    out = Unsigned(bits=4)(torch.tensor([0.6, 0.25, 0.15, 0.0]))
    torch.testing.assert_close(out, torch.tensor([0.6, 0.24, 0.16, 0.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_invariants(kind: type[Symmetric], bits: int) -> None:
    quantize = kind(bits=bits)
    x = values_for(quantize)
    out = quantize(x)
    steps = {Symmetric: 2.0 ** (bits - 1) - 1}.get(kind, 2.0**bits - 1)
    reach = x.abs().amax(-1) if kind is Symmetric else x.amax(-1) - x.amin(-1).clamp(max=0)
    assert bool(((out - x).abs() <= (reach / steps / 2)[..., None] * 1.001 + 1e-7).all())
    assert torch.equal(quantize(torch.zeros(2, 4)), torch.zeros(2, 4))
    torch.testing.assert_close(quantize(out), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantize(4 * x), 4 * out, rtol=0, atol=0)  # a power of two moves no rounding
    assert all(len(row.unique()) <= 2**bits for row in out.flatten(0, 1))
    # A row is quantized alone: nothing looks across tokens.
    assert torch.equal(out[1, 2], quantize(x[1, 2]))


def test_symmetric_keeps_signs_and_does_not_clip_rows_of_one_sign() -> None:
    x = noise(4, 64)
    assert torch.equal(Symmetric(bits=4)(-x), -Symmetric(bits=4)(x))
    positive = x.abs()
    error = (Symmetric(bits=8)(positive) - positive).abs().amax(-1)
    assert bool((error <= positive.amax(-1) / 127 / 2 * 1.001).all())


@pytest.mark.parametrize("kind", ALL)
def test_dtype_and_what_is_not_a_number(kind: type[Symmetric]) -> None:
    x = values_for(kind(bits=8)).to(torch.bfloat16)
    out = kind(bits=8)(x)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, kind(bits=8)(x.float()).to(torch.bfloat16))
    for bad in (float("nan"), float("inf")):
        row = torch.tensor([[1.0, bad], [1.0, 0.5]])
        assert bool(kind(bits=8)(row)[0].isnan().any()) and bool(kind(bits=8)(row)[1].isfinite().all())
    tiny = torch.tensor([1e-44, 0.0])
    assert bool(kind(bits=8)(tiny).isfinite().all())


def test_probabilities_stay_on_their_side() -> None:
    p = noise(2, 3, 4, 16).softmax(-1)
    p[..., 12:] = 0  # masked
    out = rtn_quantizer("probs", 4)(p)
    assert bool((out >= 0).all()) and bool((out[..., 12:] == 0).all())
    assert rtn_quantizer("q", 4) == rtn_quantizer("linear_in", 4) == Symmetric(bits=4)


@hypothesis.given(bits=st.integers(1, 8), count=st.integers(1, 40), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=60, deadline=None)
def test_packing_is_exact_and_as_small_as_it_says(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, count), generator=torch.manual_seed(seed), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, -(-count // 8) * bits) and packed.dtype is torch.uint8
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_has_the_bit_order_of_packed_weights(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 32), generator=torch.manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, bits), pack_bits(codes, bits).view(torch.uint8))
