"""RPTQ: channels of activations with alike ranges form clusters, each with a static grid of its own.

    cluster      K-means on the points (max, min) of the channels over calibration tokens
    max <- 0.99 max + 0.01 max of the next window    and min alike, over the channels of a cluster; `ranges: ema`
    s = (max - min) / 2^b  within 1e-4 .. 1e4
    z = round(-(max + min) / (2 s))  within +-1e4
    x_hat = s (clamp(round(x / s) + z, -2^(b-1), 2^(b-1) - 1) - z)

(Yuan et al., arXiv 2304.01089; github.com/hahnyuan/RPTQ4LLM.) The range is divided by 2^b, so its upper end is clipped
by one step. Where, with the number of clusters:

    R1  32   inputs of q, k, v                R4  32   inputs of gate, up
    R2   4   queries and keys of each head    R5  32   inputs of down
    R3   4   values of each head, and the input of o

Queries and keys of a head have one clustering, on the points (q max, k max, q min, k min), and grids of their own; so
have values and the input of o, on the points of the latter. Under grouped-query attention the query heads of a key head
share a clustering, on their joint ranges. Inputs of q, k, v, gate and up have at least `norm_bits` bits, 8 as in the
reference code: its W4A4 is 8 bits there, and the attempt's notes say so. Probabilities are rounded to multiples of
1 / (2^b - 1). `w4a4kv4q4p8` is its W4A4, `w4kv4` its W4A4KV.

Stored: for each cluster a scale (float32) and a zero point (int16), for each channel the number of its cluster (a byte,
or two beyond 256 clusters); layers that read one input share them, queries and keys share the map, values and the input
of o too. Of a number its code alone: n bits for keys and values. The cache is simulated: they are rounded when they are
written.

Differences from the reference code: channels are not moved. With simulated quantization a cluster's channels need not
lie side by side, and the result is that of permuting, rounding and permuting back; no norm or weight is changed.
Weights are the chain's (`gptq+rptq` for its GPTQ), with the scheme's groups of consecutive columns; there a weight has
a scale per row and cluster of its input. Of its ways to a range there are two: the average above, which starts at the
first window and is its default, and extremes over all calibration tokens (`ranges: minmax`); its searches for the least
error and its dynamic variants are left out. Ranges are of the original model; there each block sees the quantized ones
before it.
Queries and keys are rounded after the rotary embedding, which OPT, its only family, does not have; queries before they
are multiplied by head_dim^-1/2, which is the same grid. K-means is scipy's (k-means++, the best of 10 starts, seed 0;
there scikit-learn's); no cluster is empty, and there are no more than distinct points. Calibration text is the job's;
its mixture of three texts fills 126 of 128 samples and pads the rest with zeros.

Published perplexity (WikiText-2 / PTB / C4, OPT-6.7B, from its README): 10.86 / 13.09 / 11.74 at 16 bits; W4A16 11.18 /
13.62 / 12.07; W4A8 11.21 / 13.74 / 12.11; W4A4 12.00 / 15.17 / 12.85; W4A4KV 11.26 / 13.44 / 12.03; W3A3KV 12.42 /
14.48 / 13.13. Not rerun.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy.cluster.vq import kmeans2
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.layers.static import StaticAsymmetric, share_clipped
from qfarm.recipe import STRICT, ActivationMethod

STARTS, ITERATIONS = 10, 50  # of K-means
SMALLEST, LARGEST = 1e-4, 1e4  # bounds of scales and zero points, from the reference code
DECAY = 0.99  # of the average of ranges, from the reference code
AFTER_NORM = frozenset({"q", "k", "v", "gate", "up"})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RPTQ(ActivationMethod):
    version = 2  # 2: ranges decay over windows of calibration text
    source = "Yuan et al., 2023, arXiv 2304.01089; github.com/hahnyuan/RPTQ4LLM"
    claims = frozenset({"linear_in", "q", "probs", "kv_cache"})
    optional = frozenset({"linear_in", "q", "probs"})
    observes = frozenset({"linear_in", "q", "k", "v"})

    clusters: int = Field(32, ge=1, description="R1, R4 and R5: clusters of the input of a linear layer")
    head_clusters: int = Field(4, ge=1, description="R2 and R3: clusters of queries, keys and values of a head")
    norm_bits: int = Field(8, ge=2, le=15, description="least width at inputs of q, k, v, gate, up")

    ranges: Literal["ema", "minmax"] = Field("ema", description="of a cluster: decaying average of windows' extremes")

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.RANGE} | ({Statistic.WINDOW_RANGES} if self.ranges == "ema" else set()))

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
        if place.site == "k_pre_rope":
            return None
        if place.site == "probs":
            return Multiples(bits=bits)
        ranges = _ranges(observed[place])
        if not bool(torch.isfinite(ranges).all()):
            raise NonFinite(f"rptq: {place}: a range is not finite")
        windows = self._window_ranges(observed[place])
        if place.site == "linear_in" and place.role != "o":
            width = max(bits, self.norm_bits) if place.role in AFTER_NORM else bits
            return cluster_grid(windows, _labels(ranges, self.clusters), width)
        labels = self._head_labels(place, observed)  # [kv heads, head_dim]
        # [2, windows, kv heads, heads of each, head_dim]
        of_heads = windows.reshape(2, windows.shape[1], len(labels), -1, labels.shape[1])
        grid = cluster_grid(of_heads, labels[:, None].expand(of_heads.shape[2:]), bits)
        shape = (-1,) if place.site == "linear_in" else (len(labels) * of_heads.shape[3], 1, labels.shape[1])
        return dataclasses.replace(grid, scale=grid.scale.reshape(shape), zero=grid.zero.reshape(shape))

    def _window_ranges(self, found: InputStatistics) -> Tensor:
        """Largest and smallest value of each channel, [2, windows, channels]; of all text as one window for minmax."""
        if self.ranges == "minmax":
            return _ranges(found)[:, None]
        assert found.highs is not None and found.lows is not None
        return torch.stack([found.highs, found.lows])

    def _head_labels(self, place: Place, observed: Observed) -> Tensor:
        """Clusters inside each key-value head, int64 [kv heads, head_dim]."""
        keys, block = observed[Place("k", place.layer)], place.layer
        assert keys.heads is not None
        of_keys = _ranges(keys).reshape(2, keys.heads, 1, -1)
        width = of_keys.shape[-1]
        in_attention = place.site in ("q", "k")
        other = observed[Place("q", block) if in_attention else Place("linear_in", block, "o")]
        joint = _joint(_ranges(other).reshape(2, keys.heads, -1, width))  # [2, kv heads, head_dim]
        points = torch.cat([joint, _joint(of_keys)]) if in_attention else joint
        return torch.stack([_labels(points[:, head], self.head_clusters) for head in range(keys.heads)])

    def report(self, quantizers: Mapping[Place, Quantizer]) -> list[str]:
        share = share_clipped(quantizers.values())
        notes = (
            []
            if share is None
            else [f"rptq: {100 * share:.3g} % of numbers beyond static ranges at {_sites(quantizers)}"]
        )
        wider = {
            p.role: q.bits for p, q in quantizers.items() if p.role in AFTER_NORM and isinstance(q, StaticAsymmetric)
        }
        given = {q.bits for p, q in quantizers.items() if p.role == "down" and isinstance(q, StaticAsymmetric)}
        if wider and given and min(wider.values()) > max(given):
            notes.append(f"rptq: inputs of {', '.join(wider)} at {max(wider.values())} bits (norm_bits)")
        return notes


METHOD = RPTQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiples:
    """Numbers in 0 .. 1 rounded to multiples of 1 / (2^b - 1)."""

    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        top = 2.0**self.bits - 1
        return (torch.round(x.float() * top) / top).to(x.dtype)


def _sites(quantizers: Mapping[Place, Quantizer]) -> str:
    return ", ".join(sorted({place.site for place in quantizers}))


def _ranges(found: InputStatistics) -> Tensor:
    """Largest and smallest value of each channel, [2, channels]."""
    assert found.high is not None and found.low is not None
    return torch.stack([found.high, found.low])


def _joint(ranges: Tensor) -> Tensor:
    """[2, kv heads, heads of each, head_dim] -> [2, kv heads, head_dim]."""
    return torch.stack([ranges[0].amax(dim=1), ranges[1].amin(dim=1)])


def cluster_grid(ranges: Tensor, labels: Tensor, bits: int) -> StaticAsymmetric:
    """One grid per cluster, spread over its channels.

    ranges [2, windows, ..., channels] holds maxima and minima, labels [..., channels] clusters among the channels of a
    row. Extremes of a cluster are taken in each window, then averaged over windows.
    """
    count = int(labels.max()) + 1
    every = labels.expand_as(ranges[0])
    high = ranges.new_full((*every.shape[:-1], count), -torch.inf).scatter_reduce(-1, every, ranges[0], "amax")
    low = ranges.new_full((*every.shape[:-1], count), torch.inf).scatter_reduce(-1, every, ranges[1], "amin")
    high, low = _decaying(high).gather(-1, labels), _decaying(low).gather(-1, labels)
    scale = ((high - low) / 2.0**bits).clamp(SMALLEST, LARGEST)
    zero = torch.round(-(high + low) / (2 * scale)).clamp(-LARGEST, LARGEST)
    # A pair of numbers for each cluster of a row, in the order of their first channels.
    rows = labels.reshape(-1, labels.shape[-1]).cpu()
    first = torch.cat([i * rows.shape[1] + _firsts(row) for i, row in enumerate(rows)]).to(scale.device)
    kept = (scale.reshape(-1)[first], zero.reshape(-1)[first].to(torch.int16), _map(labels, count))
    return StaticAsymmetric(bits=bits, scale=scale, zero=zero, kept=kept)


def _decaying(windows: Tensor) -> Tensor:
    """[windows, ...] -> [...]: starts at the first, to which each later one adds a hundredth of itself."""
    average = windows[0]
    for window in windows[1:]:
        average = DECAY * average + (1 - DECAY) * window
    return average


def _firsts(labels: Tensor) -> Tensor:
    """The first channel of each cluster, int64 [clusters]."""
    return torch.from_numpy(np.unique(labels.numpy(), return_index=True)[1])


def _map(labels: Tensor, count: int) -> Tensor:
    """The cluster of each channel as it is stored; rows that share a clustering share the map."""
    whole = labels if labels.dim() < 3 else labels[:, 0]  # [kv heads, heads of each, head_dim]
    return whole.to(torch.uint8 if count <= 256 else torch.int16)


def _labels(points: Tensor, count: int) -> Tensor:
    """Clusters of channels, int64 [channels] from 0 without gaps, for points [coordinates, channels]."""
    values = points.T.double().cpu().numpy()
    found = cluster(values.tobytes(), values.shape[1], count)
    return torch.from_numpy(found.copy()).to(points.device)


@functools.lru_cache(maxsize=64)
def cluster(data: bytes, coordinates: int, count: int) -> NDArray[np.int64]:
    """K-means of float64 points; remembered, since layers that share an input ask for the same."""
    points = np.frombuffer(data).reshape(-1, coordinates)
    different = np.unique(points, axis=0)
    if len(different) <= count:
        return np.unique(points, axis=0, return_inverse=True)[1].astype(np.int64).ravel()
    draw, best = np.random.default_rng(0), (np.inf, np.zeros(len(points), dtype=np.int64))
    for _ in range(STARTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster; it is dropped below
            centres, labels = kmeans2(points, count, iter=ITERATIONS, minit="++", rng=draw)
        error = float(((points - centres[labels]) ** 2).sum())
        if error < best[0]:
            best = error, labels
    return np.unique(best[1], return_inverse=True)[1].astype(np.int64).ravel()
