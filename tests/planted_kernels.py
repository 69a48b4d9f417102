"""Kernels with a mistake on purpose: what the checks of kernels must catch. Imports triton: not for the tests' process.

`python -m tests.planted_kernels` compiles them and prints what the budgets say.
"""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def copy(x, y, size, SPAN: tl.constexpr, MASKED: tl.constexpr):
    i = tl.arange(0, SPAN)
    if MASKED:
        tl.store(y + i, tl.load(x + i, mask=i < size, other=0.0), mask=i < size)
    else:
        tl.store(y + i, tl.load(x + i, mask=i < size + 1, other=0.0), mask=i < size)


def copy_reading_too_far(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    copy[(1,)](x, y, len(x), SPAN=64, MASKED=False)
    return y


def copied(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    copy[(1,)](x, y, len(x), SPAN=64, MASKED=True)
    return y


@triton.jit
def double(x, y, SPAN: tl.constexpr):
    i = tl.arange(0, SPAN)
    v = tl.load(x + i)
    tl.store(y + i, v + v)


def doubled(x: Tensor) -> Tensor:
    """Arithmetic in the dtype of x, which the interpreter would do on the bits of bfloat16."""
    y = torch.empty_like(x)
    double[(1,)](x, y, SPAN=len(x))
    return y


def main() -> None:
    """Breaches of a budget by a launch that spills, by one whose loads are narrow, and by the sound one."""
    from qfarm.kernels import aot, tri_int8

    launch = aot.LAUNCHES["quant_rows_i8 4096"]
    aligned, shifted = torch.empty(2, 4096, dtype=torch.float16), torch.empty(2, 4104, dtype=torch.float16)[:, 1:4097]
    found = {
        "sound": aot.compile_launch(lambda: tri_int8.quantize_rows(aligned), launch.kernel, "sm_80"),
        # A row starts 2 bytes after a multiple of 16: every load takes a single element.
        "narrow": aot.compile_launch(lambda: tri_int8.quantize_rows(shifted), launch.kernel, "sm_80"),
        # 16,384 values in the registers of 32 threads.
        "spill": aot.compile_launch(
            lambda: tri_int8.quantize_rows(torch.empty(2, 16384), warps=1), launch.kernel, "sm_80"
        ),
    }
    print(json.dumps({name: aot.breaches(facts, launch.budget) for name, facts in found.items()}))


if __name__ == "__main__":
    main()
