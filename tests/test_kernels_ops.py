"""Which code runs an operation, and what it computes without a GPU, on shapes that fill no tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfarm.kernels import ops, pack, reference
from qfarm.kernels.pack import BCQWeight, Int8Weight, T16Weight

# Rounding of the output to its dtype, and of the sums in it, in units of the largest output.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


class OnGPU(Tensor):
    """Says that it lies on a GPU, where there is none."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]  # a tensor's is no property of Python's
        return True


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def tiles(bits: int, rows: int, columns: int, group: int, zero: str = "integer") -> T16Weight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    groups = 1 if group == -1 else columns // group
    scale = (torch.rand(rows, groups, generator=generator) + 0.5).half()
    zeros = {
        "symmetric": None,
        "integer": torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator),
        "real": torch.rand(rows, groups, generator=generator) * 2**bits,
    }[zero]
    return pack.pack_weight(codes, scale, zeros, bits, group)


def int8(rows: int, columns: int) -> Int8Weight:
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
    return pack.pack_int8(codes, torch.rand(rows, generator=generator) + 0.5)


def planes(bits: int, rows: int, columns: int, group: int) -> BCQWeight:
    generator = torch.Generator().manual_seed(bits)
    return BCQWeight(
        columns=columns,
        group=group,
        planes=torch.randint(-(2**31), 2**31, (columns // 32, bits, rows), dtype=torch.int32, generator=generator),
        alpha=(torch.rand(columns // group, bits, rows, generator=generator) + 0.1).half(),
        offset=torch.randn(columns // group, rows, generator=generator).half(),
    )


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == exact.shape and exact.dtype == torch.float64
    known = ~exact.isnan()
    assert bool(found.isfinite().all())
    assert float((found.double() - exact)[known].abs().max()) <= BOUNDS[dtype] * float(exact[known].abs().max())


def rounded(values: Tensor) -> Tensor:
    """To integers; NaN where float32 may see a tie that float64 does not, or the other way round."""
    tied = ((values - values.floor()) - 0.5).abs() < 1e-4
    assert float(tied.double().mean()) < 0.02
    return torch.where(tied, torch.nan, values.round())


# -- which code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_gpu", "on_cpu", "backend", "chosen"),
    [
        (False, False, "auto", "torch"),
        (False, True, "auto", "cpu"),
        (True, False, "auto", "triton"),
        (True, True, "auto", "triton"),
        (True, False, "triton", "triton"),
        (False, True, "cpu", "cpu"),
        (False, True, "torch", "torch"),
        (True, True, "torch", "torch"),
    ],
)
def test_the_tensors_choose(on_gpu: bool, on_cpu: bool, backend: ops.Backend, chosen: str) -> None:
    x = torch.zeros(1, 1)
    assert ops.choose(x.as_subclass(OnGPU) if on_gpu else x, backend, on_cpu) == chosen


def test_a_device_that_is_neither_takes_torch() -> None:
    assert ops.choose(torch.zeros(1, device="meta"), "auto", on_cpu=True) == "torch"


def test_triton_is_refused_beside_a_gpu() -> None:
    x = draw(1, 16)
    calls = {
        "linear": lambda: ops.linear(x, tiles(4, 3, 16, 16), "triton"),
        "int8_linear": lambda: ops.int8_linear(x, int8(3, 16), "triton"),
        "bcq_linear": lambda: ops.bcq_linear(draw(1, 32), planes(1, 3, 32, 32), "triton"),
        "rotate": lambda: ops.rotate(x, "triton"),
        "fake_quantize": lambda: ops.fake_quantize(x, 4, -1, True, "triton"),
        "crossquant": lambda: ops.crossquant(x, 0.5, 4, "triton"),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="backend triton: the tensors lie on cpu; expected a GPU's, or backend"):
            call()


def test_cpu_is_refused_where_it_has_no_operator() -> None:
    x = draw(1, 16)
    calls = {
        "linear": lambda: ops.linear(x, tiles(4, 3, 16, 16), "cpu"),
        "bcq_linear": lambda: ops.bcq_linear(draw(1, 32), planes(1, 3, 32, 32), "cpu"),
        "rotate": lambda: ops.rotate(x, "cpu"),
        "fake_quantize": lambda: ops.fake_quantize(x, 4, -1, True, "cpu"),
        "crossquant": lambda: ops.crossquant(x, 0.5, 4, "cpu"),
        "elsewhere": lambda: ops.choose(torch.zeros(1, device="meta"), "cpu", on_cpu=True),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="backend cpu: no operator for these tensors; expected backend auto or"):
            call()


def test_one_bit_has_no_kernel() -> None:
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    with pytest.raises(ValueError, match="1 bit: no kernel takes it; expected backend torch"):
        ops.linear(draw(1, 512).as_subclass(OnGPU), tiles(1, 3, 512, -1))


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize(
    ("bits", "columns", "group"), [(1, 63, -1), (2, 96, 32), (3, 63, -1), (4, 48, 16), (8, 63, -1)]
)
def test_linear(bits: int, columns: int, group: int, zero: str, dtype: torch.dtype) -> None:
    x, weight = draw(3, columns, dtype=dtype), tiles(bits, 5, columns, group, zero)
    close(ops.linear(x, weight), reference.linear(x, weight), dtype)


def test_linear_undoes_the_order_of_columns() -> None:
    """Groups of every other column, as GPTQ's activation order leaves them."""
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = (torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) + 0.5).half()
    g_idx = torch.arange(64, dtype=torch.int32) % 2
    weight = pack.pack_weight(codes, scale, None, 4, 32, g_idx)
    x = draw(3, 64)
    exact = x.double() @ ((codes.double() - 8) * scale.double()[:, g_idx.long()]).T
    close(ops.linear(x, weight), exact, torch.float32)


@pytest.mark.parametrize("rows", [1, 17, 33])
@pytest.mark.parametrize("columns", [1, 63, 1000])
def test_int8_sums_are_exact_on_a_cpu(rows: int, columns: int) -> None:
    """The operator and the definition differ by the rounding of float32 scales alone; the sums are equal."""
    x, weight = draw(rows, columns), int8(5, columns)
    codes, scale = reference.quantize_rows(x)
    ones = pack.pack_int8(weight.codes(), torch.ones(5))
    whole = codes.float()  # the largest of a row is 127, so that its scale is 1 and the output the sum itself
    assert torch.equal(ops.int8_linear(whole, ones, "cpu"), ops.int8_linear(whole, ones, "torch"))
    assert torch.equal(ops.int8_linear(whole, ones).double(), whole.double() @ weight.codes().double().T)
    close(ops.int8_linear(x, weight, "cpu"), reference.int8_linear(codes, scale, weight), torch.float32)
    close(ops.int8_linear(x, weight, "torch"), reference.int8_linear(codes, scale, weight), torch.float32)


def test_int8_sums_do_not_overflow() -> None:
    """Every product at its largest, 4,096 of them: 66 million."""
    x, weight = torch.full((17, 4096), 127.0), pack.pack_int8(torch.full((3, 4096), -127).to(torch.int8), torch.ones(3))
    for backend in ("cpu", "torch"):
        assert torch.equal(ops.int8_linear(x, weight, backend), torch.full((17, 3), -127.0 * 127 * 4096))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("bits", [1, 3])
def test_bcq_linear(bits: int, dtype: torch.dtype) -> None:
    x, weight = draw(3, 96, dtype=dtype), planes(bits, 5, 96, 32)
    close(ops.bcq_linear(x, weight), reference.linear(x, weight), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 64])
def test_rotate(size: int, dtype: torch.dtype) -> None:
    """Against the matrix itself: entry (i, j) is -1 to the number of common one bits."""
    x = draw(2, 3, size, dtype=dtype)
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
    close(ops.rotate(x), x.double() @ signs.double() / size**0.5, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 21])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_fake_quantize(dtype: torch.dtype, group: int, symmetric: bool) -> None:
    x = draw(5, 63, dtype=dtype)
    grouped = x.double().reshape(5, -1, 63 if group == -1 else group)
    if symmetric:
        step, zero, low, high = grouped.abs().amax(-1, keepdim=True) / 7, 0, -7, 7
    else:
        bottom, top = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        step, low, high = (top - bottom) / 15, 0, 15
        zero = (-bottom / step).round()
    exact = ((rounded(grouped / step) + zero).clamp(low, high) - zero) * step
    close(ops.fake_quantize(x, 4, group, symmetric), exact.reshape(5, 63), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.15, 1.0])
def test_crossquant(alpha: float, dtype: torch.dtype) -> None:
    x = draw(5, 63, dtype=dtype)
    values = x.double()
    rows, columns = values.abs().amax(1, keepdim=True), values.abs().amax(0, keepdim=True)
    step = rows**alpha * columns ** (1 - alpha) / 7
    close(ops.crossquant(x, alpha, 4), rounded(values / step).clamp(-7, 7) * step, dtype)
