"""Attention of one new token over keys and values as they are packed, by the kernels of `qfarm.kernels`.

While a packed run on a GPU lasts, its model calls `attention`. Of a call with one token per sequence the cache hands
over words (`PackedKV`) and those tokens that lie in none (`qfarm.layers.cache`): scores of the two are put side by side
for one softmax, and outputs are added, in float32. Queries that share a key head are rows of one product. Any other
call goes to the attention that the model had before: prompts have no packed past, and several tokens behind one read
it dequantized.

Kernels compute in float16 with sums in float32, so models in float32 keep what they have. None of it has run on a GPU;
tests run it in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qfarm.errors import ModelError
from qfarm.kernels import ops
from qfarm.kernels.pack import PackedKV
from qfarm.layers.attention import NAME as WITH_SITES
from qfarm.layers.attention import SETTINGS, AttentionSites
from qfarm.layers.cache import QuantizedLayer, Words
from qfarm.models.load import LoadedModel
from qfarm.models.past import given_cache

NAME = "qfarm_packed"  # in transformers' registries of attention functions and of masks
READING = "qfarm_reading"  # attribute of an attention module
INSIDE = ("sdpa", WITH_SITES)  # what it may stand around: both take masks that add or choose
# Queries that share a key head, and numbers of a head: up to what `qfarm.kernels.aot` compiles.
MOST_ROWS, WIDTHS = 8, (16, 32, 64, 128)
HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Reading:
    """What one attention module needs of its model's packed run."""

    inner: str  # attention of all other calls
    layer: QuantizedLayer | None = None  # of the cache, from the module's call to that of `attention`
    differences: list[float] | None = None  # gets one of each call, while `compared` lasts


def refusal(loaded: LoadedModel) -> str | None:
    """Why kernels cannot read the model's quantized KV cache, or None."""
    if loaded.device.type != "cuda":
        return "the kernels are for GPUs"
    return unfit(loaded)


def unfit(loaded: LoadedModel) -> str | None:
    """The same of the model and its cache, wherever they lie."""
    if loaded.dtype not in HALVES:
        return "kernels compute in float16, the model in float32"
    config = loaded.model.config
    if config._attn_implementation not in INSIDE:
        return f"the model's attention is {config._attn_implementation}, they stand in for {' or '.join(INSIDE)}"
    if loaded.head_dim not in WIDTHS:
        return f"heads of {loaded.head_dim} numbers: kernels take {', '.join(map(str, WIDTHS))}"
    if loaded.turns:
        return "keys are stored turned"
    for block, make in enumerate(loaded.cache_layers):
        linears = loaded.linears(block)
        rows = linears["q"].out_features // linears["k"].out_features
        if rows > MOST_ROWS:
            return f"{rows} heads of queries share one of keys: kernels take up to {MOST_ROWS}"
        sites: AttentionSites | None = getattr(loaded.attention(block), SETTINGS, None)
        if sites is not None and sites != AttentionSites():
            return "queries, keys, values or probabilities are rounded where attention reads them"
        reason = make().words_refusal()
        if reason:
            return reason
    return None


class PackedAttention:
    """Puts `attention` into a model and takes it out; caches that begin meanwhile are kept in words."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded, self._inner = loaded, loaded.model.config._attn_implementation
        self._modules = [loaded.attention(block) for block in range(len(loaded.blocks))]
        self._handles: list[Any] = []

    def put(self, packed: bool) -> None:
        if packed == bool(self._handles):
            return
        self._loaded.cache_in_words = packed
        if not packed:
            for handle in self._handles:
                handle.remove()
            for module in self._modules:
                delattr(module, READING)
            self._handles = []
            self._loaded.model.set_attn_implementation(self._inner)
            return
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[self._inner])
        for block, module in enumerate(self._modules):
            setattr(module, READING, Reading(self._inner))
            self._handles.append(module.register_forward_pre_hook(_Find(block), with_kwargs=True))
        self._loaded.model.set_attn_implementation(NAME)

    @contextlib.contextmanager
    def compared(self) -> Iterator[list[float]]:
        """Inside, each output is compared with that over the same keys and values dequantized, all in float32.

        Gets rms of the difference over rms of the latter.
        """
        found: list[float] = []
        readings: list[Reading] = [getattr(module, READING) for module in self._modules]
        for reading in readings:
            reading.differences = found
        try:
            yield found
        finally:
            for reading in readings:
                reading.differences = None


@dataclasses.dataclass(frozen=True)
class _Find:
    """Hands a call's layer of the cache to the attention function, which transformers does not tell of it."""

    block: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = given_cache(kwargs)
        layer = None if cache is None else cache.layers[self.block]
        found = layer if isinstance(layer, QuantizedLayer) and layer.in_words else None
        getattr(module, READING).layer = found
        if found is not None:
            found.words_wanted = True


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, T, H, D]; `key` and `value` are those of tokens in no word where the layer has words.

    Raises ModelError for what only another attention knows (softcap, sinks, a bias of positions).
    """
    reading: Reading = getattr(module, READING)
    layer, reading.layer = reading.layer, None
    inner = functools.partial(ALL_ATTENTION_FUNCTIONS[reading.inner], module, scaling=scaling, **others)
    if layer is None or query.shape[2] > 1 or layer.words == (None, None):
        given: tuple[Tensor, Tensor | None] = inner(query, key, value, attention_mask)
        return given
    known = next((name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None), None)
    if known:
        raise ModelError(f"{type(module).__name__} asks for {known}, which attention over packed keys does not know")
    words, layer.words = layer.words, (None, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _over_words(query, key, value, words, attention_mask, scale)
    if reading.differences is not None:
        keys, values = _dense(words[0], key), _dense(words[1], value)
        expected = _over_words(query, keys, values, (None, None), attention_mask, scale)
        reading.differences.append(float((out - expected).norm() / expected.norm()))
    return out.to(query.dtype), None


def _over_words(queries: Tensor, key: Tensor, value: Tensor, words: Words, mask: Tensor | None, scale: float) -> Tensor:
    """queries [B, H, 1, D], key and value [B, H_kv, tokens in no word, D] -> float32 [B, 1, H, D].

    Values are weighted with exp(score - the largest), and the sum is divided by in the end: shares of many tokens may
    be too small for the float16 of the kernels.
    """
    keys, values = words
    batch, heads, _, width = queries.shape
    rows = queries.reshape(batch * key.shape[1], -1, width)
    scores = rows.float() @ key.flatten(0, 1).mT.float() * scale
    if keys is not None:
        scores = torch.cat([ops.kv_scores(rows.contiguous(), keys, scale), scores], dim=-1)
    if mask is not None:
        scores = _masked(scores.reshape(batch, heads, 1, -1), mask).reshape(scores.shape)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    packed = 0 if values is None else values.shape[1]
    out = weights[:, :, packed:] @ value.flatten(0, 1).float()
    if values is not None:
        out = out + ops.kv_outputs(weights[:, :, :packed].contiguous(), values)
    return (out / weights.sum(-1, keepdim=True)).reshape(batch, 1, heads, width)


def _dense(packed: PackedKV | None, rest: Tensor) -> Tensor:
    """Keys or values of all tokens, float32 [B, H_kv, S, D]."""
    if packed is None:
        return rest.float()
    first = packed.dequantize().reshape(*rest.shape[:2], -1, rest.shape[-1])
    return torch.cat([first, rest.float()], dim=2)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Masks choose (True: seen) or add. Raises RuntimeError for one of another number of keys."""
    if mask.shape[-1] != scores.shape[-1]:
        raise RuntimeError(f"a mask of {mask.shape[-1]} keys for {scores.shape[-1]}")
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
