"""KIVI: a cache with keys in groups per channel, values in groups per token, and the latest tokens as they are.

Outliers of keys sit in fixed channels, those of values do not (Liu et al., arXiv 2402.02750). So a group of keys is
`group` consecutive tokens of one channel, a group of values `group` consecutive channels of one token:

    m = min u,  s = (max u - m) / (2^b - 1),  q = round(clamp((u - m) / s, 0, 2^b - 1)),  u_hat = q s + m

The minimum is the zero point, so that zero is in general not exact and both extremes are. Keys are quantized after the
rotary embedding, heads before they are repeated. Of T tokens

    keys     the first `residual` x floor(T / residual) are quantized, 0 .. residual - 1 wait in full precision
    values   all but the last `residual` are quantized

A new token is read in full precision and only then are those quantized that are due; a chunk of tokens that the
evaluation reads back as stored is quantized first. What is quantized stays as it is.

Stored: codes packed along head_dim, a float16 scale and minimum per group: b + 32 / group bits. At group 32 and after
2,048 tokens, which is where a cell's KV bits are counted: keys b + 1, values (15 / 16) (b + 1) + 1, together 5.34 bits
for b = 4 and 3.41 for b = 2. On average over lengths residual / 2 keys wait; at this length none does. Where
attention's kernels read them, codes lie in words of 32 / b tokens as soon as one is full: as many bytes.

Keys of padding on the left take no part in ranges; groups are counted from the first column, padding or not, so that a
sequence padded by other than a multiple of `residual` has other groups. A group's range looks at up to group - 1 later
tokens: cells are marked as not causal where the cache is read as stored.

Differences from github.com/jy-yuan/KIVI: a constant group has s = 1 and comes out as its minimum, where the code
divides by zero; values are dequantized with their own width; scale and minimum are rounded to float16 before codes are
computed, in any dtype of the model; cropping (assisted decoding) is refused. Sliding windows are left to the mask: the
whole past stays.

Published (README of aiha-lab/qllm-infer, Llama-3.1-8B-Instruct, WikiText-2 / C4, group 32, residual 128): 7.24 / 10.34
at 16 bits, 7.27 / 10.38 at 4, 8.83 / 12.40 at 2. Not rerun.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.kernels.pack import WORD_BITS, PackedKV, pack_tokens
from qfarm.layers.cache import QuantizedLayer, Words, extend
from qfarm.layers.inject import MakeLayer
from qfarm.layers.packing import pack_codes, unpack_codes
from qfarm.layers.sites import Observed
from qfarm.models.architecture import head_width
from qfarm.recipe import STRICT, CacheMethod
from qfarm.scheme import UNTOUCHED

Width = Literal[2, 3, 4, 5, 6, 7, 8, 16]
# Axis of a group's members: keys as [batch, heads, groups, tokens, channels], values [.., tokens, groups, channels].
AXIS = {"k": 3, "v": 4}
NAMES = {"k": "keys", "v": "values"}
PARTS = ("codes", "scale", "low")  # of what is quantized, in `state` by name: k_codes, ..
# What the words of `qfarm.kernels.pack.PackedKV` hold.
WORD_WIDTHS, WORD_GROUPS = (2, 4), (32, 64, 128)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KIVI(CacheMethod):
    source = "Liu et al., ICML 2024, arXiv 2402.02750; github.com/jy-yuan/KIVI"

    key_bits: Width | None = Field(None, description="default: the scheme's; 16 leaves keys alone")
    value_bits: Width | None = Field(None, description="default: the scheme's; 16 leaves values alone")
    group: int = Field(32, ge=1, description="tokens of a channel (keys), channels of a token (values)")
    residual: int = Field(128, ge=1, description="tokens in full precision: a multiple of group")

    @property
    def causal(self) -> bool:
        return self.key_bits == UNTOUCHED or self.group == 1

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.residual % self.group:
            return f"group {self.group} does not divide the residual window of {self.residual} tokens"
        if self.key_bits == self.value_bits == UNTOUCHED:
            return "key_bits and value_bits leave the whole cache at 16 bits"
        return None

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        width = head_width(config, "the model")
        return f"group {self.group} does not divide heads of {width} numbers" if width % self.group else None

    def cache_layer(self, block: int, bits: int, observed: Observed) -> MakeLayer:
        return functools.partial(
            KIVILayer, self.key_bits or bits, self.value_bits or bits, group=self.group, residual=self.residual
        )


METHOD = KIVI


class KIVILayer(QuantizedLayer):
    """Packed codes with a float16 scale and minimum per group, and the tokens that wait (`k_rest`, `v_rest`).

    With `in_words`, `k_word_codes` and its like are the older ones, laid out as in `PackedKV` with the batch in front.
    """

    def __init__(self, key_bits: int, value_bits: int, *, group: int, residual: int) -> None:
        super().__init__()
        self.bits = {"k": key_bits, "v": value_bits}
        self.group, self.residual = group, residual

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.width = keys.shape[-1]
        extend(self.state, {"k_rest": keys, "v_rest": values})

    def settle(self) -> None:
        waiting = {name: self.state[f"{name}_rest"].shape[2] for name in self.bits}
        due = {"k": waiting["k"] - waiting["k"] % self.residual, "v": max(0, waiting["v"] - self.residual)}
        for name, count in due.items():
            if count and self.bits[name] < UNTOUCHED:
                self._quantize(name, count)

    def read(self) -> tuple[Tensor, Tensor]:
        return self._whole("k"), self._whole("v")

    def _quantize(self, name: str, count: int) -> None:
        """Move the `count` oldest of the tokens that wait to those that are quantized."""
        waiting, axis, bits = self.state[f"{name}_rest"], AXIS[name], self.bits[name]
        grouped = self._grouped(name, waiting[:, :, :count].float())
        low, scale = group_grid(grouped, bits, axis, self._padding(count) if name == "k" else None)
        codes = group_codes(grouped, low, scale, bits).flatten(axis - 1, axis)
        new = {"codes": pack_codes(codes, bits), "scale": scale.squeeze(axis), "low": low.squeeze(axis)}
        extend(self.state, {f"{name}_{part}": tensor for part, tensor in new.items()})
        self.state[f"{name}_rest"] = waiting[:, :, count:].clone()  # a view would keep what it was cut from
        if self.in_words:
            self._fill_words(name)

    def _fill_words(self, name: str) -> None:
        """Move the oldest of the packed codes into words, as many tokens as fill some."""
        codes, scale, low = (self.state.pop(f"{name}_{part}") for part in PARTS)
        tokens = codes.shape[2]
        full = tokens - tokens % (WORD_BITS // self.bits[name])
        grids = full // self.group if name == "k" else full  # along the axis of tokens
        if full:
            moved = unpack_codes(codes[:, :, :full], self.bits[name], self.width)
            words = pack_tokens(moved.flatten(0, 1), self.bits[name]).reshape(*moved.shape[:2], -1, self.width)
            # Kernels take pointers: no views.
            new = {"codes": words, "scale": scale[:, :, :grids].contiguous(), "low": low[:, :, :grids].contiguous()}
            extend(self.state, {f"{name}_word_{part}": tensor for part, tensor in new.items()})
        if full < tokens:  # of values only: keys are quantized by whole groups
            rest = {"codes": codes[:, :, full:], "scale": scale[:, :, grids:], "low": low[:, :, grids:]}
            self.state |= {f"{name}_{part}": tensor.clone() for part, tensor in rest.items()}

    def words_refusal(self) -> str | None:
        for name, bits in self.bits.items():
            if bits not in WORD_WIDTHS:
                return f"{bits}-bit {NAMES[name]}: attention's kernels read 2 and 4 bits"
        if self.group not in WORD_GROUPS:
            return f"groups of {self.group}: attention's kernels read those of {', '.join(map(str, WORD_GROUPS))}"
        return None

    @property
    def words_from(self) -> int:
        # A window of keys is quantized and a few wait; of values there is a word and a few codes beside it.
        return self.residual + WORD_BITS // min(self.bits.values()) + 3

    def split(self) -> tuple[Words, tuple[Tensor, Tensor]]:
        return (self._words("k"), self._words("v")), (self._after_words("k"), self._after_words("v"))

    def _words(self, name: str) -> PackedKV | None:
        if f"{name}_word_codes" not in self.state:
            return None
        words, scale, low = (self.state[f"{name}_word_{part}"].flatten(0, 1) for part in PARTS)
        return PackedKV(
            bits=self.bits[name], group=self.group, words=words, scale=scale, minimum=low, by_channel=name == "k"
        )

    def _padding(self, count: int) -> Tensor | None:
        """Which of the next keys to be quantized are padding, [batch, 1, groups, group, 1]."""
        if self.starts is None:
            return None
        done = self.length - self.state["k_rest"].shape[2]
        hidden = torch.arange(done, done + count, device=self.starts.device) < self.starts[:, None]
        return hidden.reshape(len(hidden), 1, -1, self.group, 1)

    def _grouped(self, name: str, x: Tensor) -> Tensor:
        """x [batch, heads, tokens, head_dim] with its groups along AXIS."""
        at = AXIS[name] - 1
        return x.reshape(*x.shape[:at], -1, self.group, *x.shape[at + 1 :])

    def _whole(self, name: str) -> Tensor:
        """Keys or values of all tokens [batch, heads, tokens, head_dim], in the dtype in which they were given."""
        words, after = self._words(name), self._after_words(name)
        if words is None:
            return after
        dense = words.dequantize().reshape(*after.shape[:2], -1, self.width)
        return torch.cat([dense.to(after.dtype), after], dim=2)

    def _after_words(self, name: str) -> Tensor:
        """The same of those tokens that lie in no word."""
        waiting, axis = self.state[f"{name}_rest"], AXIS[name]
        if f"{name}_codes" not in self.state:
            return waiting
        codes = unpack_codes(self.state[f"{name}_codes"], self.bits[name], self.width)
        low, scale = (self.state[f"{name}_{part}"].float().unsqueeze(axis) for part in ("low", "scale"))
        dense = self._grouped(name, codes.float()).mul_(scale).add_(low)
        return torch.cat([dense.flatten(axis - 1, axis).to(waiting.dtype), waiting], dim=2)


def group_grid(values: Tensor, bits: int, axis: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and scale, float16, of groups along `axis`, which is kept; hidden numbers take no part.

    A group that is all hidden has minimum 0. NaN and numbers beyond float16 come out as NaN or Inf in the minimum.
    """
    seen_low = values if hidden is None else values.masked_fill(hidden, torch.inf)
    seen_high = values if hidden is None else values.masked_fill(hidden, -torch.inf)
    low, high = seen_low.amin(axis, keepdim=True), seen_high.amax(axis, keepdim=True)
    if hidden is not None:
        nothing = hidden.all(axis, keepdim=True)
        low, high = low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
    scale = ((high - low) / (2.0**bits - 1)).half()
    return low.half(), torch.where(scale == 0, 1.0, scale)


def group_codes(values: Tensor, low: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes, uint8; low and scale broadcast. NaN has no code: it stays in the group's minimum."""
    codes = ((values - low.float()) / scale.float()).clamp_(0, 2.0**bits - 1)
    return codes.round_().nan_to_num_().to(torch.uint8)
