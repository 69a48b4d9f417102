"""Divergence: how far a model's predictions are from its baseline's, from the logits of both.

Per token: cross entropy, whether the most probable token is right, KL divergence both ways, whether both models agree
on the most probable token, and flips: right before and wrong now (lost), wrong before and right now (gained).

KL is never negative; computed in float32 it may come out a little below zero. Such values stay, because clipping them
would bias a mean near zero upwards; what no rounding explains is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qfarm.sums import Functions, Sums

KL_ROUNDING = -1e-7  # nats; values down to here are float32 rounding and nothing to speak of
KL_BUG = -1e-4  # nats; no rounding leads below
# Elements [tokens, vocabulary] that are worked on at once: on a CPU the float32 copies should stay in a core's cache
# (2 tokens instead of 10 of a vocabulary of 49,152 save an eighth with a baseline, a fifth without), a GPU wants few
# large kernels.
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 27}
BINS = 256
# Histogram of token KL: bin 0 is below 1e-7 nats, bin 255 at least 100, the others are 8.5 % wide each.
EDGES: NDArray[np.float64] = np.geomspace(1e-7, 100.0, BINS - 1)


def score(
    logits: Tensor, targets: Tensor, before: Tensor | None, functions: Functions | None = None
) -> dict[str, Tensor]:
    """Figures [tokens] of the cell's logits and the baseline's, each [tokens, vocabulary] in any float dtype.

    Without the baseline's only loss and correct are given. Logits are upcast to float32 block by block, or by compiled
    `functions` on the way.
    """
    if functions is not None:
        if before is None:
            return _figures(functions.one(logits), logits, targets)
        found = functions.both(logits, before)
        return _figures(found[0], logits, targets) | _compared(*found, before, targets)
    size = max(1, BLOCK[logits.device.type] // logits.shape[1])
    blocks = [
        _score_block(
            logits[start : start + size].float(),
            targets[start : start + size],
            None if before is None else before[start : start + size].float(),
        )
        for start in range(0, len(targets), size)
    ]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _score_block(logits: Tensor, targets: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    """logits, before [tokens, vocabulary] float32 -> figures [tokens]."""
    own, total, share = _normalized(logits)
    if before is None:
        return _figures(own, logits, targets)
    other, total_before, share_before = _normalized(before)
    difference = before - logits
    own = own._replace(apart=share.mul_(difference).sum(-1) / total)
    other = other._replace(apart=share_before.mul_(difference).sum(-1) / total_before)
    return _figures(own, logits, targets) | _compared(own, other, before, targets)


def _figures(own: Sums, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"loss": own.norm - _pick(logits, targets), "correct": (own.top == targets).float()}


def _compared(own: Sums, other: Sums, before: Tensor, targets: Tensor) -> dict[str, Tensor]:
    assert own.apart is not None and other.apart is not None
    right, right_before = own.top == targets, other.top == targets
    # KL(b || q) = sum_v p_b (log p_b - log p_q); the normalisers' difference is constant over v.
    shift = own.norm - other.norm
    return {
        "baseline_loss": other.norm - _pick(before, targets),
        "agree": (own.top == other.top).float(),
        "lost": (right_before & ~right).float(),
        "gained": (right & ~right_before).float(),
        "kl": other.apart + shift,
        "kl_reverse": -own.apart - shift,
    }


def _normalized(logits: Tensor) -> tuple[Sums, Tensor, Tensor]:
    """Sums of one model's logits, the sum of its probabilities [tokens] in float64, and those as they are given.

    The normaliser is read off the largest probability, which saves another exponential per element. softmax adds up
    in plain float32, so that its values miss one together by some 1e-6; their exact sum sets that right. In float64,
    because the difference of two normalisers near 15 would carry float32's rounding of 1e-6 into KL.
    """
    top = _argmax(logits)
    share = torch.softmax(logits, dim=-1)
    total = share.sum(-1).double()
    return Sums(top, _pick(logits, top).double() + (total / _pick(share, top)).log()), total, share


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None])[:, 0]


def _argmax(logits: Tensor) -> Tensor:
    """The first of the largest. On a CPU NumPy's is 13 to 28 times as fast as torch's (2 threads, 49,152 tokens)."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def refuse_negative(kl: NDArray[Any], what: str) -> int:
    """How many values [tokens] lie between KL_BUG and KL_ROUNDING. Raises ArithmeticError for one below KL_BUG."""
    low = float(kl.min(initial=0.0))
    if low < KL_BUG:
        raise ArithmeticError(f"{what} is {low:.3g} nats for a token; rounding does not lead below {KL_BUG:g}: a bug")
    return int(np.count_nonzero(kl < KL_ROUNDING))


def histogram(kl: NDArray[Any]) -> bytes:
    """Counts of token KL [tokens] in BINS bins between EDGES: little-endian uint32."""
    counts = np.bincount(np.searchsorted(EDGES, kl, side="right"), minlength=BINS)
    return counts.astype("<u4").tobytes()


def histogram_counts(data: bytes) -> NDArray[np.int64]:
    """The counts [BINS] of a stored histogram."""
    return np.frombuffer(data, "<u4").astype(np.int64)


def histogram_quantile(counts: NDArray[np.int64], q: float) -> float:
    """Upper edge, in nats, of the bin that holds the quantile of counts [BINS]; at most 8.5 % above it.

    0 when it lies below the first edge, infinite beyond the last one.
    """
    at = int(np.searchsorted(np.cumsum(counts), q * counts.sum()))
    if at == 0:
        return 0.0
    return float(EDGES[at]) if at < BINS - 1 else float("inf")
