"""Sums over the vocabulary in one pass, compiled by torch: what `qfarm.divergence` needs of logits on a CPU.

Op by op, a dozen operations read and write float32 copies [tokens, vocabulary]. Compiled, logits are read twice, in
their own dtype, and nothing of their size is written; sums are taken in float64, so that figures are nearer to their
definition, too. It takes a C++ compiler and some seconds in each process, so `wanted` says from which size on it pays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WANTED_FROM = 1 << 30  # elements [predictions, vocabulary] of an evaluation (docs/benchmarks.md#one-evaluation)
TRIAL = (256, 1 << 15)  # of the compilation: large enough for the compiler to plan for several threads


class Sums(NamedTuple):
    """Of logits [tokens, vocabulary]; figures [tokens]."""

    top: Tensor  # the first of the most probable tokens
    norm: Tensor  # log of the normaliser, float64
    apart: Tensor | None = None  # mean of baseline minus model under these logits' probabilities, float64


class Functions(NamedTuple):
    """`one` model's sums, or those of `both`: the model's and its baseline's."""

    one: Callable[[Tensor], Sums]
    both: Callable[[Tensor, Tensor], tuple[Sums, Sums]]


def one(logits: Tensor) -> Sums:
    """Of logits [tokens, vocabulary] in any float dtype."""
    values = logits.float()
    high = values.amax(-1, keepdim=True)
    total = torch.exp(values - high).sum(-1, dtype=torch.float64)
    return Sums(_first(values, high), _norm(high, total))


def both(logits: Tensor, before: Tensor) -> tuple[Sums, Sums]:
    """Of the model's logits and the baseline's."""
    values, other = logits.float(), before.float()
    apart = other - values
    found = []
    for x in (values, other):
        high = x.amax(-1, keepdim=True)
        weight = torch.exp(x - high)
        total = weight.sum(-1, dtype=torch.float64)
        mean = (weight * apart).sum(-1, dtype=torch.float64) / total
        found.append(Sums(_first(x, high), _norm(high, total), mean))
    return found[0], found[1]


def _first(values: Tensor, high: Tensor) -> Tensor:
    """Index of the first of the largest; the vocabulary's size where there is none, since they are NaN."""
    size = values.shape[-1]
    index = torch.arange(size, dtype=torch.int32, device=values.device)
    return torch.where(values == high, index, size).amin(-1)


def _norm(high: Tensor, total: Tensor) -> Tensor:
    return high[:, 0].double() + total.log()


def wanted(predictions: int, vocabulary: int, device: torch.device) -> bool:
    """Whether an evaluation is large enough. Measured on CPUs only."""
    return device.type == "cpu" and predictions * vocabulary >= WANTED_FROM


@functools.cache
def compiled(dtype: torch.dtype) -> Functions | str:
    """Compiled for this process and logits of this dtype, or why that cannot be."""
    if torch._dynamo.config.disable:
        return "TORCHDYNAMO_DISABLE is set"
    trial = torch.zeros(TRIAL, dtype=dtype)
    try:
        compile_here = functools.partial(torch.compile, dynamic=True, options={"compile_threads": 1})
        found = Functions(compile_here(one), compile_here(both))
        found.one(trial)
        found.both(trial, trial.clone())  # the same tensor twice would be a case of its own
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, none that works, no headers of Python
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return found
