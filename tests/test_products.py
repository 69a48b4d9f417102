"""Products of packed weights: each operator against the weight that its codes stand for, and what each one takes."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfarm.errors import InvalidInput
from qfarm.kernel_bytes import kernel_bytes
from qfarm.layers.linear import Multiplied, ReadBySeveral
from qfarm.layers.products import (
    SUMS,
    Int8Product,
    Sharing,
    UnpackedProduct,
    product_of,
    refuse_device,
)
from qfarm.layers.rtn import Symmetric
from qfarm.quantized import ColumnScaled, LowRank, QuantizedWeight, UniformWeight


def uniform(
    rows: int, columns: int, bits: int, group: int, zero: str = "integer", g_idx: bool = False, seed: int = 0
) -> UniformWeight:
    """Codes of every value, scales and zeros that differ by row and group."""
    draw = torch.Generator().manual_seed(seed)
    groups = columns // group
    zeros: Tensor | None = None
    if zero == "integer":
        zeros = torch.randint(0, 2**bits, (rows, groups), generator=draw).to(torch.uint8)
    elif zero == "real":
        zeros = (2**bits * torch.rand(rows, groups, generator=draw)).half()
    order = torch.arange(columns).remainder(groups).to(torch.int32) if g_idx else None
    return UniformWeight(
        codes=torch.randint(0, 2**bits, (rows, columns), generator=draw).to(torch.uint8),
        scale=(0.01 + 0.02 * torch.rand(rows, groups, generator=draw)).half(),
        zero=zeros,
        bits=bits,
        group_size=group,
        g_idx=order,
    )


def inputs(columns: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 5) -> Tensor:
    return torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def path(
    weight: QuantizedWeight, quantize: Any = None, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> str:
    return product_of(weight, quantize, dtype, Sharing(), torch.device(device)).path.partition(" ")[0]


# -- which weight takes which -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "quantize", "dtype", "wanted"),
    [
        (uniform(32, 64, 4, 32), None, torch.bfloat16, "int4"),
        (uniform(32, 64, 4, 32, "real"), None, torch.float16, "int4"),
        (uniform(32, 64, 4, 64), Symmetric(bits=16), torch.bfloat16, "int4"),
        (uniform(32, 64, 4, 16), None, torch.bfloat16, "unpack"),  # a group that the operator does not take
        (uniform(24, 64, 4, 32), None, torch.bfloat16, "unpack"),  # rows not in sixteens
        (uniform(32, 64, 4, 32), None, torch.float32, "unpack"),  # the operator is slow there
        (uniform(32, 64, 4, 32, g_idx=True), None, torch.bfloat16, "unpack"),
        (uniform(32, 64, 3, 32), None, torch.bfloat16, "unpack"),
        (uniform(24, 48, 8, 48, "none"), None, torch.bfloat16, "w8"),
        (uniform(24, 40, 8, 40, "none"), None, torch.bfloat16, "unpack"),  # it would read beyond rows of 40
        (uniform(24, 48, 8, 48), None, torch.bfloat16, "unpack"),
        (uniform(24, 48, 8, 48, "none"), None, torch.float16, "unpack"),
        (uniform(24, 40, 8, 40), Symmetric(bits=8), torch.float32, "int8"),
        (uniform(24, 40, 4, 40), Symmetric(bits=4), torch.bfloat16, "int8"),
        (uniform(24, 40, 8, 20), Symmetric(bits=8), torch.bfloat16, "unpack"),  # groups inside a sum
        (uniform(24, 40, 8, 40), Symmetric(bits=9), torch.bfloat16, "unpack"),
    ],
)
def test_the_path_that_a_weight_takes(weight: UniformWeight, quantize: Any, dtype: torch.dtype, wanted: str) -> None:
    assert path(weight, quantize, dtype) == wanted


@pytest.mark.parametrize(
    ("weight", "quantize", "wanted"),
    [
        (uniform(24, 64, 4, 16), None, "tiles"),
        (uniform(24, 64, 3, 32, "real"), Symmetric(bits=8), "tiles"),
        (uniform(24, 64, 5, 64, "none"), None, "tiles"),
        (uniform(24, 64, 4, 32, g_idx=True), None, "tiles"),
        (uniform(24, 48, 8, 48), Symmetric(bits=8), "int8"),
        (uniform(24, 64, 1, 32), None, "unpack"),  # a layout, but no kernel
        (uniform(24, 64, 4, 8), None, "unpack"),  # a group that is part of a plane of 16
        (uniform(24, 96, 4, 48), None, "unpack"),  # a group that lies across two tiles
    ],
)
def test_the_path_that_a_weight_takes_on_a_gpu(weight: UniformWeight, quantize: Any, wanted: str) -> None:
    assert path(weight, quantize, device="cuda") == wanted


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("zero", ["none", "integer", "real"])
def test_tiles_hold_the_values_that_codes_stand_for_and_the_bytes_that_are_told(bits: int, zero: str) -> None:
    for weight in (uniform(20, 128, bits, 64, zero), uniform(20, 96, bits, 32, zero, g_idx=True)):
        product = product_of(weight, None, torch.float32, Sharing(), torch.device("cuda"))
        tiles, told = product.inner.weight, kernel_bytes(weight)
        assert torch.equal(tiles.dequantize(torch.float32), weight.dequantize())
        order = 0 if tiles.order is None else tiles.order.nbytes - weight.g_idx.nbytes
        assert product.nbytes() == told.total + order


def test_sums_of_codes_stay_below_what_int32_holds() -> None:
    assert SUMS * 127 * 128 < 2**31 <= (SUMS + 1) * 127 * 128


def test_weights_without_uniform_codes_and_other_devices_are_refused_by_name() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Levels:
        solver: str = "mine"

    with pytest.raises(InvalidInput, match="mine makes a Levels, whose codes no operator multiplies"):
        product_of(Levels(), None, torch.bfloat16, Sharing())
    with pytest.raises(InvalidInput, match="packed on mps: there are products for cpu and cuda; run: fake"):
        refuse_device(torch.device("mps"))
    with pytest.raises(InvalidInput, match="packed was planned for a GPU, but this worker is on cpu"):
        refuse_device(torch.device("cpu"), "gpu")
    refuse_device(torch.device("cpu"), "cpu")


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match="packed on a GPU needs triton, which is not installed; run: fake"):
        refuse_device(torch.device("cuda"), "gpu")


# -- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["none", "integer", "real"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_products_are_exact_but_for_one_rounding(bits: int, zero: str) -> None:
    weight, x = uniform(24, 40, bits, 40, zero), inputs(40, torch.float32)
    product = product_of(weight, Symmetric(bits=8), torch.float32, Sharing())
    assert isinstance(product, Int8Product)
    assert (product.codes.min(), product.codes.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    wanted = linear(Symmetric(bits=8)(x), weight.dequantize())
    assert (product(x) - wanted).abs().max() < 2e-6 * wanted.abs().max()
    # By hand: codes of one token, integers only.
    codes, scale = Symmetric(bits=8).codes(x[0, :1])
    z = 2 ** (bits - 1) if weight.zero is None else weight.zero[:, 0].double()
    sums = (weight.codes.double() - torch.as_tensor(z).reshape(-1, 1)) @ codes[0].double()
    by_hand = sums * weight.scale[:, 0].double() * scale[0].double()
    assert (product(x[0, :1])[0] - by_hand).abs().max() < 2e-6 * by_hand.abs().max()


def test_codes_of_inputs_are_those_of_the_simulation() -> None:
    x = torch.cat([inputs(64), torch.zeros(2, 1, 64, dtype=torch.bfloat16)], dim=1)
    codes, scale = Symmetric(bits=8).codes(x)
    assert codes.dtype == torch.int8 and codes.abs().amax() == 127 and not codes[:, -1].any()
    assert torch.equal((codes * scale).to(x.dtype), Symmetric(bits=8)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", ["none", "integer", "real"])
@pytest.mark.parametrize("group", [32, 128])
def test_int4_products_have_the_scales_of_the_models_dtype(group: int, zero: str, dtype: torch.dtype) -> None:
    weight, x = uniform(48, 128, 4, group, zero), inputs(128, dtype)
    y = product_of(weight, None, dtype, Sharing())(x)
    assert y.dtype == dtype and y.shape == (2, 5, 48)
    scale = weight.scale.to(dtype)
    z = torch.full_like(scale, 8.0) if weight.zero is None else weight.zero.float()
    offset = (scale.float() * (8 - z.float())).to(dtype)
    grouped = weight.codes.reshape(48, -1, group).double()
    held = ((grouped - 8) * scale.double()[..., None] + offset.double()[..., None]).reshape(48, 128)
    wanted, unit = linear(x, held), torch.finfo(dtype).eps
    assert (y - wanted).abs().max() < unit * wanted.abs().max()
    # And that is the weight, to the dtype's rounding of scales and of zeros up to 16 scales away.
    assert (held - weight.dequantize()).abs().max() < 16 * unit * weight.scale.max()


def test_eight_bit_weights_alone() -> None:
    weight, x = uniform(17, 48, 8, 48, "none"), inputs(48)
    wanted = linear(x, (weight.codes.double() - 128) * weight.scale.bfloat16().double())
    y = product_of(weight, None, torch.bfloat16, Sharing())(x)
    assert (y - wanted).abs().max() < torch.finfo(torch.bfloat16).eps * wanted.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("g_idx", [False, True])
def test_unpacked_products_are_the_simulation_to_the_bit(bits: int, g_idx: bool) -> None:
    weight, x = uniform(10, 36, bits, 12, g_idx=g_idx), inputs(36)
    scaled = ColumnScaled(base=weight, factor=torch.linspace(0.5, 2, 36).half(), folded=False, solver="x")
    draw = torch.Generator().manual_seed(3)
    left, right = torch.randn(10, 2, generator=draw).half(), torch.randn(2, 36, generator=draw).half()
    for tree in (weight, scaled, LowRank(base=weight, left=left, right=right, solver="x")):
        product = product_of(tree, Symmetric(bits=9), torch.bfloat16, Sharing())
        assert isinstance(product, UnpackedProduct) and "inputs rounded in floating point" in product.path
        wanted = nn.functional.linear(Symmetric(bits=9)(x), tree.dequantize().bfloat16())
        assert torch.equal(product(x), wanted)
    # Codes of 36 columns take whole bytes for every eight of them, except where each has a byte anyway.
    codes = 10 * (36 if bits == 8 else 5 * bits)
    assert product_of(weight, None, torch.bfloat16, Sharing()).nbytes() == codes + 10 * 3 * 3 + 36 * 4 * g_idx


def test_factors_and_terms_around_an_operator() -> None:
    weight, x = uniform(32, 64, 4, 32, "none"), inputs(64)
    factor = torch.linspace(0.5, 2, 64).half()
    draw = torch.Generator().manual_seed(3)
    left, right = 0.1 * torch.randn(32, 2, generator=draw).half(), torch.randn(2, 64, generator=draw).half()
    scaled = ColumnScaled(base=weight, factor=factor, folded=True, of_input=True, solver="awq")
    both = LowRank(base=scaled, left=left, right=right, solver="qera")
    product = product_of(both, Multiplied(quantize=Symmetric(bits=8), factor=factor.float()), torch.bfloat16, Sharing())
    assert product.path.startswith("int4") and "column factors and low-rank terms apart; inputs rounded" in product.path
    rounded = Multiplied(quantize=Symmetric(bits=8), factor=factor.float())(x)
    wanted = linear(rounded, both.dequantize())
    assert (product(x) - wanted).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    # A branch belongs to the layer: it sees the input as it is.
    branch = dataclasses.replace(both, branch=True)
    y = product_of(branch, None, torch.bfloat16, Sharing())(x)
    without = linear(x, scaled.dequantize())
    assert (y - without).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * without.abs().max()


def test_layers_that_read_one_input_have_its_codes_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = Symmetric.codes
    monkeypatch.setattr(Symmetric, "codes", lambda self, x: made.append(1) or real(self, x))
    shared, sharing = ReadBySeveral(Symmetric(bits=8), 3), Sharing()
    products = [product_of(uniform(8, 16, 8, 16, seed=seed), shared, torch.float32, sharing) for seed in range(3)]
    x = inputs(16, torch.float32)
    apart = [product_of(uniform(8, 16, 8, 16, seed=s), Symmetric(bits=8), torch.float32, sharing)(x) for s in range(3)]
    made.clear()
    together = [product(x) for product in products]
    assert len(made) == 1 and all(map(torch.equal, together, apart))


def test_inputs_that_are_not_finite_show() -> None:
    product = product_of(uniform(8, 16, 8, 16), Symmetric(bits=8), torch.float32, Sharing())
    for bad in (float("nan"), float("inf")):
        x = inputs(16, torch.float32)
        x[0, 1, 3] = bad
        y = product(x)
        assert y[0, 1].isnan().all() and y[0, 0].isfinite().all() and y[1].isfinite().all()
