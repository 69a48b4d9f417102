"""One function per operation; which code runs follows the tensors: a kernel on a GPU, torch elsewhere.

`backend` is auto, triton, torch or cpu. auto: triton for tensors on a GPU; for those on a CPU the cpu operator where
one exists, else torch. torch is the plain arithmetic of the definition in the dtype of x. What is asked for and cannot
be had is refused; nothing is replaced by something else in silence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qfarm.kernels import reference
from qfarm.kernels.pack import BCQWeight, Int8Weight, PackedKV, T16Weight

Backend = Literal["auto", "triton", "torch", "cpu"]
GEMV_ROWS = 4  # up to here a pass over the weight per row
SMALL_ROWS = 64  # up to here tensor cores on packed codes; above, dequantized once and multiplied by the library


def choose(x: Tensor, backend: Backend, on_cpu: bool) -> Literal["triton", "torch", "cpu"]:
    """The backend for these inputs; `on_cpu`: whether the operation has a CPU operator that takes them.

    Raises ValueError where the one that is asked for cannot run.
    """
    if backend == "auto":
        return "triton" if x.is_cuda else "cpu" if on_cpu and x.device.type == "cpu" else "torch"
    if backend == "triton" and not x.is_cuda:
        raise ValueError(f"backend triton: the tensors lie on {x.device.type}; expected a GPU's, or backend auto")
    if backend == "cpu" and not (on_cpu and x.device.type == "cpu"):
        raise ValueError("backend cpu: no operator for these tensors; expected backend auto or torch")
    return backend


def linear(x: Tensor, weight: T16Weight, backend: Backend = "auto") -> Tensor:
    """x [M, K] times a weight in tiles -> [M, N] in the dtype of x.

    On a GPU: one pass per row up to M = 4 (4 bits: tensor cores from M = 2), tensor cores on 4-bit codes up to 64, else
    the weight is dequantized once, in the dtype of x, and the library multiplies. There is no CPU operator. Raises
    ValueError for 1 bit on a GPU, which has a layout and no kernel.
    """
    if choose(x, backend, on_cpu=False) == "torch":
        return x @ weight.dequantize(x.dtype).T
    from qfarm.kernels import tri_weight

    half = x.dtype in (torch.float16, torch.bfloat16)
    if weight.bits == 4 and half and 2 <= len(x) <= SMALL_ROWS:
        return tri_weight.gemm_small(x, weight).to(x.dtype)
    if weight.bits == 1:
        raise ValueError("1 bit: no kernel takes it; expected backend torch")
    if len(x) <= GEMV_ROWS:
        return tri_weight.gemv(x, weight).to(x.dtype)
    inputs = x if weight.order is None else x[:, weight.order.long()]
    return inputs @ tri_weight.dequantize(weight, x.dtype).T


def int8_linear(x: Tensor, weight: Int8Weight, backend: Backend = "auto") -> Tensor:
    """x [M, K] rounded to int8 by row, times an int8 weight -> [M, N] in the dtype of x.

    On a CPU torch's int8 product does the sums, exactly.
    """
    chosen = choose(x, backend, on_cpu=True)
    if chosen == "triton":
        from qfarm.kernels import tri_int8

        codes, scale = tri_int8.quantize_rows(x)
        return tri_int8.gemm(codes, scale, weight, x.dtype)
    codes, scale = reference.quantize_rows(x)
    if chosen == "torch":
        return reference.int8_linear(codes, scale, weight).to(x.dtype)
    padded = torch.nn.functional.pad(codes, (0, weight.values.shape[1] - weight.columns))
    total = torch._int_mm(padded, weight.values.T)  # the weight stays [N, K]: 14 times as fast as float32 that way
    return (total.float() * scale[:, None] * weight.scale).to(x.dtype)


def bcq_linear(x: Tensor, weight: BCQWeight, backend: Backend = "auto") -> Tensor:
    """x [M, K] times sign planes -> [M, N] in the dtype of x; on a GPU one pass per row."""
    if choose(x, backend, on_cpu=False) == "torch":
        return x @ weight.dequantize(x.dtype).T
    from qfarm.kernels import tri_bcq

    return torch.stack([tri_bcq.gemv(row, weight) for row in x]).to(x.dtype)


def kv_scores(queries: Tensor, keys: PackedKV, scaling: float, backend: Backend = "auto") -> Tensor:
    """queries [heads, R, channels] times packed keys -> float32 [heads, R, tokens]; on a GPU queries become float16."""
    if choose(queries, backend, on_cpu=False) == "torch":
        return queries.float() @ keys.dequantize().mT * scaling
    from qfarm.kernels import tri_kv

    return tri_kv.scores(queries.half(), keys, scaling)


def kv_outputs(weights: Tensor, values: PackedKV, backend: Backend = "auto") -> Tensor:
    """weights [heads, R, tokens] of the softmax times packed values -> float32 [heads, R, channels]; as above."""
    if choose(weights, backend, on_cpu=False) == "torch":
        return weights.float() @ values.dequantize()
    from qfarm.kernels import tri_kv

    return tri_kv.outputs(weights.half(), values)


def rotate(x: Tensor, backend: Backend = "auto") -> Tensor:
    """x [..., 2^p] -> x H / sqrt(n) in the dtype of x."""
    if choose(x, backend, on_cpu=False) == "torch":
        return reference.hadamard(x).to(x.dtype)
    from qfarm.kernels import tri_misc

    return tri_misc.rotate(x)


def fake_quantize(x: Tensor, bits: int, group: int, symmetric: bool, backend: Backend = "auto") -> Tensor:
    """x [M, K] -> rounded in groups of a row (-1: the row), in the dtype of x."""
    if choose(x, backend, on_cpu=False) == "torch":
        return reference.fake_quantize(x, bits, x.shape[1] if group == -1 else group, symmetric).to(x.dtype)
    from qfarm.kernels import tri_misc

    return tri_misc.fake_quantize(x, bits, group, symmetric)


def crossquant(x: Tensor, alpha: float, bits: int, backend: Backend = "auto") -> Tensor:
    """x [M, N] -> rounded by the step of each row and column, in the dtype of x."""
    if choose(x, backend, on_cpu=False) == "torch":
        return reference.crossquant(x, alpha, bits).to(x.dtype)
    from qfarm.kernels import tri_misc

    return tri_misc.crossquant(x, alpha, bits)
