"""KVQuant: keys per channel before the rotary embedding, values per token, on levels that gradients chose.

Y are the keys before the rotary embedding, or the values, of all key-value heads side by side, [tokens, C] (Hooper et
al., arXiv 2401.18079; t = 1 - outliers / 2):

    ranges      keys: quantiles 1 - t and t of a channel over the calibration text, fixed;
                values: of a token over its channels, when it is written
    outliers    beyond them (keys), at them or beyond (values): kept as they are, floor((1 - t) (C - 1)) + 1 on
                either side of a token's values if they are distinct
    codes       z = (y - offset) / range in -1 .. 1, the nearest of 2^b levels, one set per block for keys, one for
                values. offset, range: middle and half width; of values, of the token without its outliers
    levels      k-means of all z of the calibration text but outliers and first tokens, weighted with the squared
                gradient of the loss with respect to y (`fisher: raw`), times range^2 as in the paper's derivation
                (`range2`)

The first tokens of each sequence are kept in full precision, counted from its first real token under left padding, in
decoding as well. With `norm` (Q-Norm) levels are read back stretched so that mean and deviation of the calibration's z
are what they were. `datatype` nf has the levels of normal floats, uniform equally spaced ones.

Stored per token: b bits per number, outliers as 16-bit number and channel, their count in 16 bits, a float16 offset and
range of the values. Per block: float16 ranges of the channels and levels. All of it counts; a cell's KV bits are those
of the first 2,048 tokens of its calibration text: b + 0.32 + 16 / C for keys and 32 / C more for values at 1 %, and
more where a small C makes the outliers more (C = 192: one on either side is 1.04 %). Levels and ranges stand in the
notes of the k and v layers (`qfarm show CELL --format json`, the table `layers`).

Differences from github.com/SqueezeAILab/KVQuant: first tokens are counted by position in each sequence, where the code
masks the first rows of the flattened batch, and with them every token that is decoded; k-means sees about a million
numbers, tokens evenly spaced, and is deterministic (`qfarm.codebook`), where the code starts scikit-learn's at random;
levels of values are learned on the ranges that are used, of what is no outlier, where the code takes the quantiles;
outliers stay exact for nf too; offsets, ranges and levels are rounded to float16 before use; biases count as part of y;
a token whose values are all alike is kept exactly; a cap on outliers per token and keys after the embedding are not
offered, and uniform values have no rounded offset. Keys reach the cache rotated: the rotation is undone in float32 and
done again on reading, so outliers and first tokens of keys are exact to the rounding of the model's dtype. Calibration
is the job's; there 16 windows of 2,048 tokens of WikiText-2.

Published (README of aiha-lab/qllm-infer, Llama-3.1-8B-Instruct, 1 % outliers, one first token, WikiText-2 / C4): 7.24 /
10.34 at 16 bits, 7.29 / 10.41 at 4, 7.42 / 10.58 at 3, 8.27 / 11.69 at 2. Not rerun.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.codebook import kmeans_levels, nearest_level, normal_levels, percentiles
from qfarm.errors import InvalidInput, NonFinite
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.cache import QuantizedLayer, extend
from qfarm.layers.inject import MakeLayer
from qfarm.layers.packing import pack_codes, unpack_codes
from qfarm.layers.sites import Observed, Place
from qfarm.layers.sparse import SparseRows
from qfarm.recipe import STRICT, CacheMethod

LEVEL_NUMBERS = 1_000_000  # at most about so many choose levels: of more, every n-th token of a window


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KVQuant(CacheMethod):
    source = "Hooper et al., NeurIPS 2024, arXiv 2401.18079; github.com/SqueezeAILab/KVQuant"
    observes = frozenset({"k_pre_rope", "v"})
    site_widths = {"kv_cache": range(2, 6)}

    outliers: float = Field(0.01, ge=0, lt=0.5, description="share of numbers kept as they are; 0: none")
    first_tokens: int = Field(1, ge=0, description="of each sequence, kept in full precision")
    datatype: Literal["nuq", "nf", "uniform"] = Field("nuq", description="levels: by k-means, normal float, equal")
    norm: bool = Field(False, description="Q-Norm: read levels back with the mean and deviation of what they stand for")
    fisher: Literal["raw", "range2"] = Field("raw", description="weights of k-means: F, or F range^2")

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.SENSITIVITY})

    def cache_layer(self, block: int, bits: int, observed: Observed) -> MakeLayer:
        keys, values = (observed[Place(site, block)] for site in ("k_pre_rope", "v"))
        for site, found in (("keys", keys), ("values", values)):
            assert found.values is not None
            # Ranges are float16, of which 65,504 is the largest.
            if not bool(torch.isfinite(found.values.half()).all()):
                raise NonFinite(f"kvquant: {site} of block {block} hold NaN, Inf or too much for float16")
            if found.values.shape[1] <= self.first_tokens:
                raise InvalidInput(f"kvquant: first_tokens {self.first_tokens} leaves nothing of a calibration window")
        low, high = channel_ranges(_rows(keys), self.outliers)
        by_token = functools.partial(split_values, outliers=self.outliers)
        return functools.partial(
            KVQuantLayer,
            bits,
            low=low,
            high=high,
            key_levels=self._levels(bits, keys, lambda rows: split_keys(rows, low.float(), high.float())),
            value_levels=self._levels(bits, values, by_token),
            outliers=self.outliers,
            first_tokens=self.first_tokens,
        )

    def _levels(self, bits: int, found: InputStatistics, split: Callable[[Tensor], Split]) -> Levels:
        """Levels of one block's keys or values, from their numbers on the calibration text."""
        assert found.values is not None and found.sensitivity is not None
        step = -(-found.values.numel() // LEVEL_NUMBERS)
        late = slice(self.first_tokens, None, step)
        rows, weights = (every[:, late].flatten(0, 1).float() for every in (found.values, found.sensitivity))
        parts = split(rows)
        inside = ~parts.outlier
        if self.fisher == "range2":
            weights = weights * parts.range.square()
        z = parts.normalised(rows)[inside]
        if self.datatype == "nuq":
            levels = kmeans_levels(z, weights[inside], 2**bits)
        else:
            levels = normal_levels(bits) if self.datatype == "nf" else torch.linspace(-1, 1, 2**bits)
        return Levels.of(levels, z if self.norm else None)


METHOD = KVQuant


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """Where numbers are rounded to, ascending, and what these levels are read back as; float16 [2^b]."""

    levels: Tensor
    read: Tensor

    @staticmethod
    def of(levels: Tensor, z: Tensor | None) -> Levels:
        """With z, read back so that mean and deviation of its rounded numbers are those of z, if there are any."""
        levels = levels.half()
        if z is None or not len(z):
            return Levels(levels, levels)
        rounded = levels.float()[nearest_level(z, levels.float())].double()
        deviation = float(rounded.std(correction=0))
        stretch = float(z.double().std(correction=0)) / deviation if deviation else 1.0
        shift = float(z.double().mean()) - stretch * float(rounded.mean())
        return Levels(levels, (levels.double() * stretch + shift).half())

    def nbytes(self) -> int:
        return 2 * (self.levels.numel() + (0 if self.read is self.levels else self.read.numel()))

    def round(self, z: Tensor) -> Tensor:
        return nearest_level(z, self.levels.to(z.device).float()).to(torch.uint8)

    def look_up(self, codes: Tensor) -> Tensor:
        return self.read.to(codes.device).float()[codes.long()]

    def table(self) -> dict[str, list[float]]:
        read = {} if self.read is self.levels else {"read_as": self.read.tolist()}
        return {"levels": self.levels.tolist()} | read


@dataclasses.dataclass(frozen=True)
class Split:
    """How rows [.., C] are coded: offset and range broadcast against them, float32 as stored in float16."""

    outlier: Tensor  # bool [.., C]
    offset: Tensor
    range: Tensor

    def normalised(self, rows: Tensor) -> Tensor:
        """z, 0 where the range is none."""
        flat = self.range == 0
        return torch.where(flat, 0.0, (rows - self.offset) / torch.where(flat, 1.0, self.range))


def _rows(found: InputStatistics) -> Tensor:
    """All tokens of the calibration text, float32 [tokens, C]."""
    assert found.values is not None
    return found.values.flatten(0, 1).float()


def channel_ranges(rows: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """Quantiles of each channel over rows [tokens, C], float16 [C]; without outliers minimum and maximum."""
    high, low = percentiles(rows.T.contiguous(), 1 - outliers / 2)
    return low[:, 0].half(), high[:, 0].half()


def split_keys(rows: Tensor, low: Tensor, high: Tensor, keep: bool = True) -> Split:
    """Rows [.., C] on ranges [C], float32. Beyond them outliers with `keep`, else clipped; NaN and Inf always."""
    outlier = ~torch.isfinite(rows)
    if keep:
        outlier |= (rows < low) | (rows > high)
    return Split(outlier, (high + low) / 2, (high - low) / 2)


def split_values(rows: Tensor, outliers: float) -> Split:
    """Rows [.., C] on ranges of their own: those of the numbers between the quantiles, nothing where there are none."""
    outlier = ~torch.isfinite(rows)
    if outliers:
        high, low = percentiles(rows, 1 - outliers / 2)
        outlier |= (rows >= high) | (rows <= low)
    top = rows.masked_fill(outlier, -torch.inf).amax(-1, keepdim=True)
    bottom = rows.masked_fill(outlier, torch.inf).amin(-1, keepdim=True)
    nothing = top < bottom
    offset, half = ((top + bottom) / 2).masked_fill(nothing, 0.0), ((top - bottom) / 2).masked_fill(nothing, 0.0)
    return Split(outlier, offset.half().float(), half.half().float())


class KVQuantLayer(QuantizedLayer):
    """Packed codes of all heads of a token, sparse outliers, offset and range of values, the first tokens."""

    pre_rope = True

    def __init__(
        self,
        bits: int,
        *,
        low: Tensor,
        high: Tensor,
        key_levels: Levels,
        value_levels: Levels,
        outliers: float,
        first_tokens: int,
    ) -> None:
        super().__init__()
        self.bits, self.outliers, self.first_tokens = bits, outliers, first_tokens
        self.low, self.high = low, high
        self.levels = {"k": key_levels, "v": value_levels}
        self.kept = {"k": SparseRows(), "v": SparseRows()}

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.heads = keys.shape[1]
        position = self._position(keys)
        first = (position >= 0) & (position < self.first_tokens)  # [batch, tokens]
        k, v = (tensor.transpose(1, 2).flatten(2).float() for tensor in (keys, values))  # [batch, tokens, C]
        low, high = (bound.to(k.device).float() for bound in (self.low, self.high))
        splits = {"k": split_keys(k, low, high, keep=self.outliers > 0), "v": split_values(v, self.outliers)}
        for name, rows in (("k", k), ("v", v)):
            parts = splits[name]
            self.kept[name].append(rows.to(self.dtype), parts.outlier & ~first[:, :, None])
            codes = self.levels[name].round(parts.normalised(rows))
            extend(self.state, {f"{name}_codes": pack_codes(codes, self.bits)}, dim=1)
            self._keep_first(name, rows.to(self.dtype), position)
        extend(self.state, {"v_offset": splits["v"].offset.half(), "v_range": splits["v"].range.half()}, dim=1)

    def read(self) -> tuple[Tensor, Tensor]:
        low, high = (bound.to(self.device).float() for bound in (self.low, self.high))
        keys = self._dense_rows("k", (high + low) / 2, (high - low) / 2)
        values = self._dense_rows("v", self.state["v_offset"].float(), self.state["v_range"].float())
        k, v = (r.reshape(*r.shape[:2], self.heads, -1).transpose(1, 2) for r in (keys, values))
        return k, v

    def _dense_rows(self, name: str, offset: Tensor, spread: Tensor) -> Tensor:
        """[batch, tokens, C], float32."""
        codes = unpack_codes(self.state[f"{name}_codes"], self.bits, len(self.low))
        rows = self.levels[name].look_up(codes).mul_(spread).add_(offset)
        self.kept[name].write_into(rows)
        if self.first_tokens:
            first = self.state[f"{name}_first"]  # [batch, first tokens, C]
            starts = torch.zeros(len(rows), dtype=torch.int64) if self.starts is None else self.starts
            place = starts.to(rows.device)[:, None] + torch.arange(self.first_tokens, device=rows.device)
            sequence, index = (place < rows.shape[1]).nonzero(as_tuple=True)
            rows[sequence, place[sequence, index]] = first[sequence, index].float()
        return rows

    def _position(self, keys: Tensor) -> Tensor:
        """Positions of new tokens in their sequences, int64 [batch, tokens]; of padding on the left below 0."""
        index = torch.arange(self.length, self.length + keys.shape[2], device=keys.device)
        if self.starts is None:
            return index.expand(len(keys), -1)
        return index - self.starts.to(keys.device)[:, None]

    def _keep_first(self, name: str, rows: Tensor, position: Tensor) -> None:
        if not self.first_tokens:
            return
        key = f"{name}_first"
        if key not in self.state:
            self.state[key] = rows.new_zeros(len(rows), self.first_tokens, rows.shape[2])
        sequence, token = ((position >= 0) & (position < self.first_tokens)).nonzero(as_tuple=True)
        self.state[key][sequence, position[sequence, token]] = rows[sequence, token]

    def tables(self) -> dict[str, dict[str, Any]]:
        ranges = {"low": self.low.tolist(), "high": self.high.tolist()}
        return {"k": self.levels["k"].table() | ranges, "v": dict(self.levels["v"].table())}

    def stored_bytes(self) -> int:
        fixed = 4 * len(self.low) + sum(levels.nbytes() for levels in self.levels.values())
        return super().stored_bytes() + sum(kept.nbytes() for kept in self.kept.values()) + fixed

    def reset(self) -> None:
        super().reset()
        self.kept = {"k": SparseRows(), "v": SparseRows()}

    def offload(self) -> None:
        super().offload()
        for kept in self.kept.values():
            kept.to("cpu")

    def prefetch(self) -> None:
        super().prefetch()
        for kept in self.kept.values():
            kept.to(self.device)

    def _for_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state:
            sequences = change(torch.arange(len(self.state["k_codes"]), device=self.device))
            for kept in self.kept.values():
                kept.select(sequences)
        super()._for_batch(change)
