"""What every kernel must compute, as cases that run on any device: a GPU, or a CPU through Triton's interpreter.

`python -m tests.kernel_cases` is the second: a process of its own, as TRITON_INTERPRET has to be set before triton is
imported and would reach every other test otherwise. It reads names of cases and answers each with one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qfarm.kernels import bench, ops, pack, reference, roofline
from qfarm.layers import kernel_products
from qfarm.layers.rtn import Symmetric
from qfarm.methods.lut_gemm import BinaryCodedWeight
from qfarm.quantized import UniformWeight


@dataclasses.dataclass(frozen=True)
class Case:
    run: Callable[[str], None]  # given a device
    gpu: bool  # whether it means anything there


CASES: dict[str, Case] = {}


def over(gpu: bool = True, **axes: list[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check once for each combination of its arguments."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            name = "-".join([check.__name__, *(str(value).replace(" ", "") for value in values)])
            assert name not in CASES
            CASES[name] = Case(lambda device, chosen=chosen: check(device=device, **chosen), gpu)
        return check

    return register


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed)).to(dtype).to(device)


def draw_weight(
    rows: int, columns: int, bits: int, group: int, kind: str, device: str, seed: int = 0, ordered: bool = False
) -> pack.T16Weight:
    """Random codes, scales around 0.01 and zeros of a kind: symmetric, integer, or real."""
    generator = torch.manual_seed(seed)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.005).half()
    zero = None
    if kind == "integer":
        zero = torch.randint(-2, 2**bits, (rows, groups), generator=generator)
    elif kind == "real":
        zero = torch.rand(rows, groups, generator=generator) * (2**bits - 1)
    g_idx = (torch.randperm(columns, generator=generator) // (columns // groups)) if ordered else None
    return pack.pack_weight(codes, scale, zero, bits, group, g_idx).to(device)


def close(found: Tensor, expected: Tensor, share: float) -> None:
    """The largest error is at most `share` of the largest value; four times that on a GPU, which adds otherwise."""
    assert found.shape == expected.shape
    share *= 4 if found.is_cuda else 1
    error = float((found.double() - expected).abs().max())
    limit = share * float(expected.abs().max())
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"


def surrounded(values: Tensor) -> Tensor:
    """The same rows inside a larger tensor of NaN, or of the largest integer: what is read beside them shows."""
    fill = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max
    frame = torch.full((values.shape[0] + 2, values.shape[1] + 32), fill, dtype=values.dtype, device=values.device)
    frame[1:-1, 16:-16] = values
    return frame[1:-1, 16:-16]


# -- weights ----------------------------------------------------------------------------------------------------------

GEMV = 2e-6  # of the largest output: float32 sums
TENSOR_CORES = 5e-6


@over(bits=[2, 3, 4, 8], kind=["symmetric", "integer", "real"])
def gemv_equals_the_reference(bits: int, kind: str, device: str) -> None:
    """Rows that fill no block, a split K."""
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(70, 1024, bits, 64, kind, device), draw(1, 1024, device=device)
    close(tri_weight.gemv(x, weight, block=64, split=2), reference.linear(x, weight), GEMV)


@over(bits=[2, 3, 4, 8], group=[16, 512, -1])
def gemv_of_every_group(bits: int, group: int, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(16, 1024, bits, group, "integer", device, seed=1), draw(2, 1024, device=device)
    close(tri_weight.gemv(x, weight, block=16, split=1), reference.linear(x, weight), GEMV)


@over(bits=[2, 3, 4, 8], columns=[48, 1000])
def gemv_of_ragged_rows(bits: int, columns: int, device: str) -> None:
    """K that ends inside a tile, in whole rows and in groups that leave the last tile's without a scale."""
    from qfarm.kernels import tri_weight

    for group, k in ((-1, columns), (16, columns // 16 * 16)):
        weight = draw_weight(17, k, bits, group, "integer", device)
        x = surrounded(draw(1, k, device=device))
        close(tri_weight.gemv(x, weight, block=16, split=1), reference.linear(x, weight), GEMV)


@over(name=[name for name, form in roofline.FORMATS.items() if form.kind != "dense"], m=[1, 3])
def what_is_timed_is_within_its_own_tolerance(name: str, m: int, device: str) -> None:
    """Random words and scales of the benchmark, K that ends inside a tile of 8 and 3 bits."""
    x = draw(m, 640, device=device)
    weight = bench.random_weight(name, 24, 640, torch.Generator(device).manual_seed(0))
    assert not isinstance(weight, Tensor)
    found = bench.by_kernel(x, weight)
    assert found.dtype == torch.float32 and found.shape == (m, 24)
    assert bench.deviation(found, bench.expected(x, weight)) is None


@over(split=[1, 2, 4, 16])
def gemv_split_more_often_than_there_are_steps(split: int, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(200, 512, 4, 128, "integer", device), draw(1, 512, device=device)
    close(tri_weight.gemv(x, weight, split=split), reference.linear(x, weight), GEMV)


@over(bits=[2, 3, 4, 8], group=[32])
def a_single_input_gives_its_column(bits: int, group: int, device: str) -> None:
    """An input in every plane, and on both sides of a group's edge: any mistake of order gives another column."""
    from qfarm.kernels import tri_weight

    columns = 512
    weight = draw_weight(16, columns, bits, group, "integer", device, seed=2)
    places = sorted({*range(3, columns, 48), group - 1, group})
    x = torch.zeros(len(places), columns, dtype=torch.float16, device=device)
    for m, k in enumerate(places):
        x[m, k] = 1.5
    expected = weight.dequantize(torch.float64)[:, places].T * 1.5
    # Exact: one product, scaled by float16 numbers.
    assert torch.equal(tri_weight.gemv(x, weight, block=16, split=1).double(), expected)


@over(bits=[2, 3, 4, 8], value=[6e4, 6e-8])
def inputs_of_any_size(bits: int, value: float, device: str) -> None:
    """The largest and the smallest numbers of float16, in the subnormal trick."""
    from qfarm.kernels import tri_weight

    weight = draw_weight(16, 512, bits, 128, "integer", device)
    x = draw(1, 512, device=device).sign() * value
    close(tri_weight.gemv(x, weight, block=16, split=1), reference.linear(x, weight), GEMV)


@over(dtype=["float16", "bfloat16", "float32"])
def gemv_of_every_dtype(dtype: str, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = (
        draw_weight(33, 256, 4, 128, "integer", device),
        draw(1, 256, dtype=getattr(torch, dtype), device=device),
    )
    close(tri_weight.gemv(x, weight, block=32, split=1), reference.linear(x, weight), GEMV)


@over(bits=[4])
def columns_in_another_order(bits: int, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(20, 512, bits, 64, "real", device, ordered=True), draw(2, 512, device=device)
    close(tri_weight.gemv(x, weight, block=32, split=1), reference.linear(x, weight), GEMV)
    close(tri_weight.gemm_small(x, weight, block=32, split=1, asm=False), reference.linear(x, weight), TENSOR_CORES)


@over(rows=[1, 5, 17], kind=["symmetric", "integer", "real"], asm=[True, False])
def small_gemm_equals_the_reference(rows: int, kind: str, asm: bool, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(70, 512, 4, 128, kind, device), draw(rows, 512, device=device)
    found = tri_weight.gemm_small(x, weight, block=64, split=2, asm=asm)
    close(found, reference.linear(x, weight), TENSOR_CORES)


@over(group=[16, 32, 64, 256, -1], kind=["integer", "real"])
def small_gemm_of_every_group(group: int, kind: str, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(16, 512, 4, group, kind, device, seed=1), draw(3, 512, device=device)
    found = tri_weight.gemm_small(x, weight, block=16, split=4, asm=True)
    close(found, reference.linear(x, weight), TENSOR_CORES)


@over(columns=[48, 1000])
def small_gemm_of_ragged_rows(columns: int, device: str) -> None:
    from qfarm.kernels import tri_weight

    for group, k in ((-1, columns), (16, columns // 16 * 16)):
        weight = draw_weight(17, k, 4, group, "integer", device)
        x = surrounded(draw(16, k, device=device))
        found = tri_weight.gemm_small(x, weight, block=32, split=1, asm=True)
        close(found, reference.linear(x, weight), TENSOR_CORES)


@over(kind=["symmetric", "integer"])
def small_gemm_in_bfloat16(kind: str, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(32, 256, 4, 64, kind, device), draw(16, 256, dtype=torch.bfloat16, device=device)
    for asm in (True, False):
        found = tri_weight.gemm_small(x, weight, block=32, split=1, asm=asm)
        close(found, reference.linear(x, weight), TENSOR_CORES)


@over(words=["random"])
def ptx_and_plain_code_give_equal_bits(words: str, device: str) -> None:
    from qfarm.kernels import tri_weight

    weight, x = draw_weight(64, 512, 4, 32, "integer", device), draw(16, 512, device=device)
    one, other = (tri_weight.gemm_small(x, weight, block=64, split=1, asm=asm) for asm in (True, False))
    assert torch.equal(one, other)


@over(bits=[2, 3, 4, 8], kind=["symmetric", "integer", "real"])
def dequantized_weights_equal_the_unpackers(bits: int, kind: str, device: str) -> None:
    """Groups of which the last tile is not full."""
    from qfarm.kernels import tri_weight

    weight = draw_weight(19, 544, bits, 32, kind, device)
    found, expected = tri_weight.dequantize(weight, torch.float32, block=32), weight.dequantize()
    if kind == "real":  # a fused product and difference may round once less
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


@over(dtype=["float16", "bfloat16"])
def dequantized_weights_of_every_dtype(dtype: str, device: str) -> None:
    """Rows of one group that end inside a tile."""
    from qfarm.kernels import tri_weight

    weight = draw_weight(19, 100, 4, -1, "integer", device)
    found = tri_weight.dequantize(weight, getattr(torch, dtype), block=16)
    assert torch.equal(found, weight.dequantize().to(found.dtype))


# -- INT8 -------------------------------------------------------------------------------------------------------------


@over(dtype=["float32", "float16"], rows=[1, 37], columns=[16, 200])
def int8_products_are_exact(dtype: str, rows: int, columns: int, device: str) -> None:
    from qfarm.kernels import tri_int8

    generator = torch.manual_seed(1)
    weight = pack.pack_int8(
        torch.randint(-127, 128, (50, columns), dtype=torch.int8, generator=generator), torch.rand(50) * 0.01
    ).to(device)
    codes = torch.randint(-127, 128, (rows, weight.values.shape[1]), dtype=torch.int8, generator=generator).to(device)
    scale = torch.rand(rows, generator=generator).to(device)
    found = tri_int8.gemm(codes, scale, weight, getattr(torch, dtype), blocks=(32, 32, 64), warps=4)
    close(found, reference.int8_linear(codes, scale, weight), 1e-6 if dtype == "float32" else 1e-3)


@over(columns=[4096])
def int8_corners_do_not_overflow(columns: int, device: str) -> None:
    """+-127 everywhere: exact in int32, rounded once to float32."""
    from qfarm.kernels import tri_int8

    weight = pack.pack_int8(torch.full((16, columns), -127, dtype=torch.int8), torch.ones(16)).to(device)
    codes = torch.full((16, columns), 127, dtype=torch.int8, device=device)
    found = tri_int8.gemm(codes, torch.ones(16, device=device), weight, torch.float32, blocks=(16, 16, 64))
    assert torch.equal(found, torch.full_like(found, float(-127 * 127 * columns)))


@over(columns=[1, 63, 1000], dtype=["float16", "bfloat16", "float32"])
def rows_quantize_as_the_reference(columns: int, dtype: str, device: str) -> None:
    from qfarm.kernels import tri_int8

    x = surrounded(draw(7, columns, dtype=getattr(torch, dtype), device=device))
    x[3] = 0
    codes, scale = tri_int8.quantize_rows(x)
    expected, steps = reference.quantize_rows(x)
    assert torch.equal(scale, steps)
    assert torch.equal(codes[:, :columns], expected)
    assert not codes[:, columns:].any()


# -- BCQ --------------------------------------------------------------------------------------------------------------


def draw_planes(rows: int, columns: int, bits: int, group: int, offset: bool, device: str) -> pack.BCQWeight:
    generator = torch.manual_seed(4)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    alpha = torch.rand(rows, groups, bits, generator=generator) * 0.01
    low = torch.randn(rows, groups, generator=generator) * 0.01 if offset else None
    return pack.pack_bcq(codes, alpha, low, group).to(device)


@over(run=[1, 4, 8])
def tables_of_sums(run: int, device: str) -> None:
    from qfarm.kernels import tri_bcq

    x = draw(520, device=device)
    table = tri_bcq.build_table(x, run)
    close(table, reference.sign_table(x, run), GEMV)
    assert torch.equal(table, -table.flip(1))  # entry ~c is minus entry c


@over(bits=[1, 3, 4], run=[4, 8], offset=[True, False])
def sign_planes_equal_the_reference(bits: int, run: int, offset: bool, device: str) -> None:
    from qfarm.kernels import tri_bcq

    weight, x = draw_planes(70, 512, bits, 128, offset, device), draw(512, device=device)
    found = tri_bcq.gemv(x, weight, run=run, block=64, split=2)
    close(found, reference.linear(x[None], weight)[0], GEMV)


@over(group=[32, 96, 256, -1])
def sign_planes_of_every_group(group: int, device: str) -> None:
    from qfarm.kernels import tri_bcq

    columns = 768 if group != -1 else 1000
    weight, x = draw_planes(20, columns, 2, group, True, device), draw(columns, device=device)
    found = tri_bcq.gemv(x, weight, block=32, split=1)
    close(found, reference.linear(x[None], weight)[0], GEMV)


# -- keys and values --------------------------------------------------------------------------------------------------

ATTENTION = 2e-3  # absolute, per unit of the data: code * scale + minimum is float16


@over(bits=[2, 4], rows=[1, 4, 7], asm=[True, False])
def scores_of_quantized_keys(bits: int, rows: int, asm: bool, device: str) -> None:
    """Tokens that fill no block of words."""
    from qfarm.kernels import tri_kv

    keys = reference.quantize_kv(draw(2, 288, 64), bits, 32, by_channel=True).to(device)
    queries = draw(2, rows, 64, seed=1, device=device)
    found = tri_kv.scores(queries, keys, 64**-0.5, words=16, asm=asm)
    expected = reference.kv_scores(queries, keys, 64**-0.5)
    assert float((found.double() - expected).abs().max()) <= ATTENTION


@over(bits=[2, 4], rows=[1, 7], asm=[True, False])
def outputs_of_quantized_values(bits: int, rows: int, asm: bool, device: str) -> None:
    from qfarm.kernels import tri_kv

    values = reference.quantize_kv(draw(2, 288, 64), bits, 32, by_channel=False).to(device)
    weights = draw(2, rows, 288, seed=1, dtype=torch.float32).softmax(2).half().to(device)
    found = tri_kv.outputs(weights, values, words=16, split=2, asm=asm)
    assert float((found.double() - reference.kv_values(weights, values)).abs().max()) <= ATTENTION


@over(bits=[2, 4], by_channel=[True, False])
def a_single_token_or_channel_is_found(bits: int, by_channel: bool, device: str) -> None:
    """One value unlike all others, in every field of a word: exact, as it is the only product."""
    from qfarm.kernels import tri_kv

    for token in range(32):
        codes = torch.zeros(1, 32, 16, dtype=torch.uint8)
        codes[0, token, token % 16] = 2**bits - 1
        shape = (1, 1, 16) if by_channel else (1, 32, 1)
        group = 32 if by_channel else 16
        packed = pack.pack_kv(codes, torch.ones(shape), torch.zeros(shape), bits, group, by_channel).to(device)
        dense = packed.dequantize()
        if by_channel:
            unit = torch.eye(16, device=device).half()[None]
            assert torch.equal(tri_kv.scores(unit, packed, 1.0, words=16, asm=True), dense.mT)
        else:
            unit = torch.eye(32, device=device).half()[None, token : token + 1]
            assert torch.equal(tri_kv.outputs(unit, packed, words=16, split=1, asm=True)[0, 0], dense[0, token])


@over(bits=[2, 4], group=[32, 64], by_channel=[True, False])
def keys_and_values_quantize_as_the_reference(bits: int, group: int, by_channel: bool, device: str) -> None:
    from qfarm.kernels import tri_kv

    x = draw(2, 128, 64, device=device)
    x[0, :64, :] = 0.5  # constant groups
    found, expected = tri_kv.quantize(x, bits, group, by_channel), reference.quantize_kv(x, bits, group, by_channel)
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


# -- rotations and fake quantization ----------------------------------------------------------------------------------


@over(size=[2, 64, 1024, 32768])
def rotations_equal_butterflies(size: int, device: str) -> None:
    from qfarm.kernels import tri_misc

    x = draw(1 if size > 4096 else 3, size, dtype=torch.float32, device=device)
    found = tri_misc.rotate(x)
    close(found, reference.hadamard(x), 1e-6)
    close(tri_misc.rotate(found), x.double(), 1e-6)  # its own inverse


@over(dtype=["float16", "bfloat16"])
def an_impulse_turns_into_signs(dtype: str, device: str) -> None:
    from qfarm.kernels import tri_misc

    x = torch.zeros(3, 256, dtype=getattr(torch, dtype), device=device)
    x[0, 0], x[1, 1], x[2, 255] = 16, 16, 16
    found = tri_misc.rotate(x)
    assert torch.equal(found.float(), reference.hadamard(x).float()) and bool((found.abs() == 1).all())


@over(dtype=["float32", "bfloat16"], bits=[4, 8])
def crossquant_equals_the_reference(dtype: str, bits: int, device: str) -> None:
    from qfarm.kernels import tri_misc

    x = draw(37, 300, dtype=getattr(torch, dtype), device=device)
    x[5], x[:, 7] = 0, 0
    rows, columns = tri_misc.largest(x)
    assert torch.equal(rows, x.float().abs().amax(1)) and torch.equal(columns, x.float().abs().amax(0))
    assert torch.equal(tri_misc.crossquant(x, 0.15, bits), reference.crossquant(x, 0.15, bits).to(x.dtype))


@over(symmetric=[True, False], bits=[2, 4, 8], group=[-1, 48])
def groups_round_as_the_reference(symmetric: bool, bits: int, group: int, device: str) -> None:
    from qfarm.kernels import tri_misc

    for dtype in (torch.float32, torch.bfloat16):
        x = draw(5, 192, dtype=dtype, device=device)
        x[2] = 0
        found = tri_misc.fake_quantize(x, bits, group, symmetric)
        assert torch.equal(
            found, reference.fake_quantize(x, bits, x.shape[1] if group == -1 else group, symmetric).to(dtype)
        )


# -- the interpreter's own guards -------------------------------------------------------------------------------------


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was raised")


@over(gpu=False)
def reads_outside_every_tensor_are_caught(device: str) -> None:
    from tests import planted_kernels

    x = torch.rand(50)
    assert torch.equal(planted_kernels.copied(x), x)
    assert "1 of 51 addresses lie outside every argument" in _message(lambda: planted_kernels.copy_reading_too_far(x))


@over(gpu=False)
def arithmetic_on_the_bits_of_bfloat16_is_refused(device: str) -> None:
    from tests import planted_kernels

    assert torch.equal(planted_kernels.doubled(torch.ones(16)), torch.full((16,), 2.0))
    assert "cast to float32 first" in _message(lambda: planted_kernels.doubled(torch.ones(16).bfloat16()))


@over(gpu=False, bits=[2, 4])
def ptx_unpacks_every_half_word(bits: int, device: str) -> None:
    """All 65,536 values of a half word, in both halves of both words, for the texts of weights and of keys."""
    import numpy as np

    from qfarm.kernels import tri_weight
    from tests.interpreter import evaluate_ptx

    half = np.arange(65536, dtype=np.uint32)
    words = [half | (half[::-1] << 16), half[::-1] | (half << 16)]
    fields, mask = 32 // bits, 2**bits - 1
    planes = evaluate_ptx(tri_weight.unpack_text(bits), words, fields)
    for i, plane in enumerate(planes):
        values = plane.view(np.float16).reshape(-1, 2)
        place = i % (fields // 2) % (10 // bits)
        for element, word in enumerate(words):
            code = (word >> (bits * i)) & mask
            assert (values[:, element] == 1024 + code * 2.0 ** (bits * place)).all()


# -- layers of packed runs --------------------------------------------------------------------------------------------

ROUNDED = {torch.float32: GEMV, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # outputs have the dtype of the inputs


def draw_uniform(rows: int, columns: int, bits: int, group: int, zero: str, device: str, grouped: bool = False) -> Any:
    """A weight as a solver leaves it: codes of every value, scales in bfloat16 or float16."""
    generator, groups = torch.manual_seed(bits), columns // group
    zeros = None
    if zero == "integer":
        zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator).to(torch.uint8).to(device)
    elif zero == "real":
        zeros = ((2**bits - 1) * torch.rand(rows, groups, generator=generator)).half().to(device)
    scale = 0.01 + 0.02 * torch.rand(rows, groups, generator=generator)
    return UniformWeight(
        codes=torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8).to(device),
        scale=scale.to(torch.bfloat16 if bits == 3 else torch.float16).to(device),
        zero=zeros,
        bits=bits,
        group_size=group,
        g_idx=torch.arange(columns).remainder(groups).to(torch.int32).to(device) if grouped else None,
    )


@contextlib.contextmanager
def kernels_wherever_tensors_lie() -> Iterator[None]:
    """Inside, `qfarm.kernels.ops` takes the kernels on the interpreter's CPU as on a GPU."""
    before = ops.choose
    ops.choose = lambda x, backend, on_cpu: "triton"
    try:
        yield
    finally:
        ops.choose = before


@over(bits=[2, 3, 4, 5, 8], zero=["none", "integer", "real"], rows=["1 float32", "3 float16", "3 bfloat16"])
def a_packed_layer_multiplies_by_the_values_of_its_codes(bits: int, zero: str, rows: str, device: str) -> None:
    tokens, dtype = int(rows.split()[0]), getattr(torch, rows.split()[1])
    for group, grouped in ((64, False), (192, False), (64, True)):
        weight = draw_uniform(40, 192, bits, group, zero, device, grouped)
        product = kernel_products.TileProduct.build(weight)
        assert product is not None
        x = draw(1, tokens, 192, dtype=dtype, device=device)
        with kernels_wherever_tensors_lie():
            found = product(x)
        assert found.dtype == dtype
        close(found, x.double() @ weight.dequantize().double().T, ROUNDED[dtype])


@over(offset=[True, False], group=[64, 40], rows=["1 float32", "3 bfloat16", "5 float16"])
def a_packed_layer_multiplies_by_sign_planes(offset: bool, group: int, rows: str, device: str) -> None:
    tokens, dtype = int(rows.split()[0]), getattr(torch, rows.split()[1])
    columns, generator = 64 * 3 if group == 64 else group, torch.manual_seed(group)  # 40: whole rows, an open word
    alpha, low = torch.rand(20, columns // group, 3, generator=generator), None
    if offset:
        low = torch.rand(20, columns // group, generator=generator).half().to(device)
    weight = BinaryCodedWeight(
        codes=torch.randint(0, 8, (20, columns), generator=generator).to(torch.uint8).to(device),
        alpha=alpha.half().to(device),
        offset=low,
        group_size=group,
    )
    product = kernel_products.PlaneProduct.build(weight)
    assert product is not None
    x = draw(1, tokens, columns, dtype=dtype, device=device)
    with kernels_wherever_tensors_lie():
        found = product(x)
    # Beyond four tokens the weight is rounded to the dtype of the inputs as well.
    close(found, x.double() @ weight.dequantize().double().T, ROUNDED[dtype] * (1 if tokens < 5 else 4))


@over(bits=[4, 8], zero=["none", "integer", "real"], dtype=[torch.float32, torch.bfloat16])
def a_packed_layer_multiplies_codes_of_its_inputs(bits: int, zero: str, dtype: torch.dtype, device: str) -> None:
    weight = draw_uniform(40, 200, bits, 200, zero, device)
    quantize = Symmetric(bits=8)
    x = draw(2, 3, 200, dtype=dtype, device=device)
    codes, scale = quantize.codes(x)
    found = kernel_products.Int8Product.build(weight, quantize.codes)(x)
    assert found.dtype == dtype
    close(found, (codes.double() * scale.double()) @ weight.dequantize().double().T, ROUNDED[dtype])


@over(bits=[2, 4], tokens=[40, 190], dtype=[torch.float16, torch.bfloat16])
@torch.no_grad()
def attention_reads_a_packed_cache(bits: int, tokens: int, dtype: torch.dtype, device: str) -> None:
    """One new token behind a cache that lies in words for the most part, against attention over it dequantized."""
    from qfarm.layers import packed_attention  # transformers imports triton, which the interpreter has to do first
    from qfarm.methods.kivi import KIVILayer

    layers = [KIVILayer(bits, bits, group=32, residual=64) for _ in range(2)]
    new = draw(4, 2, 1, 32, seed=2, dtype=dtype, device=device)
    found = []
    for layer, in_words in zip(layers, (True, False), strict=True):
        layer.in_words = in_words
        layer.update(*(draw(2, 2, tokens, 32, seed=seed, dtype=dtype, device=device) for seed in (0, 1)))
        layer.words_wanted = in_words
        found.append(layer.update(new[:2], new[2:]))
    words = [None if part is None else part.shape[1] for part in layers[0].words]
    assert words == ([None, None] if tokens == 40 else [128, 120 if bits == 4 else 112])
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    module.qfarm_reading = packed_attention.Reading("sdpa", layers[0])
    queries = draw(2, 6, 1, 32, seed=3, dtype=dtype, device=device)
    seen = torch.ones(2, 1, 1, tokens + 1, dtype=torch.bool, device=device)
    seen[1, ..., :5] = False
    with kernels_wherever_tensors_lie():
        output, _ = packed_attention.attention(module, queries, *found[0], seen, scaling=32**-0.5)
    keys, values = (part.double().repeat_interleave(3, 1) for part in found[1])
    scores = (queries.double() @ keys.mT * 32**-0.5).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    assert output.dtype == dtype and output.shape == (2, 1, 6, 32)
    assert float((output.double() - expected).abs().max()) <= {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]


# -- the process ------------------------------------------------------------------------------------------------------


def answer(name: str, device: str) -> str:
    """Run a case: an empty string, or its traceback."""
    try:
        CASES[name].run(device)
    except Exception:
        return traceback.format_exc()
    return ""


def serve() -> None:
    """Answer names from standard input, one JSON line each."""
    assert os.environ.get("TRITON_INTERPRET") == "1" and "triton" not in sys.modules
    from tests import interpreter

    interpreter.install()
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN: an output that was not written shows
    for line in sys.stdin:
        print(json.dumps(answer(line.strip(), "cpu")), flush=True)


if __name__ == "__main__":
    serve()
