"""Attention with quantizers at queries, keys, values and probabilities.

One function serves all families. It is written to be registered with transformers, where every attention module calls
it with queries [B, H, T, D] and keys and values [B, H_kv, S, D], H a multiple of H_kv; settings are an attribute of the
module that calls, so the function holds no state and models in one process do not disturb each other. The name stays
registered after the last model is restored, and does nothing there.

The same name is registered for masks: without it a model would be handed no mask and attend to the future, silently.
Keys and values that come from a cache are whole histories, quantized when they were written; their quantizers here are
for observers and for functions that may be applied again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from qfarm.layers.rtn import Quantizer
from qfarm.models.load import LoadedModel

NAME = "qfarm"  # in transformers' registries of attention functions and of masks
SETTINGS = "qfarm_sites"  # attribute of an attention module


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSites:
    """What happens to the tensors of one attention module; None leaves a tensor as it is."""

    q: Quantizer | None = None  # [B, H, T, D], after the rotary embedding (a rotation of queries may be part of it)
    k: Quantizer | None = None  # [B, H_kv, S, D]
    v: Quantizer | None = None  # [B, H_kv, S, D]
    probs: Quantizer | None = None  # [B, H, T, S]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, D] and probabilities [B, H, T, S]; softmax in float32, keys and values are not repeated."""
    if attention_mask is None:
        raise RuntimeError("attention was called without a mask and would see the future")
    sites: AttentionSites = getattr(module, SETTINGS)
    query, key, value = _apply(sites.q, query), _apply(sites.k, key), _apply(sites.v, value)
    batch, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    # Query heads that share a key head become more queries of that head: [B, H_kv, H / H_kv x T, D].
    together = query.reshape(batch, kv_heads, -1, width)
    scores = (together @ key.transpose(2, 3) * scaling).reshape(batch, heads, tokens, -1) + attention_mask
    probs = _apply(sites.probs, torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype))
    out = (probs.reshape(batch, kv_heads, -1, probs.shape[-1]) @ value).reshape(batch, heads, tokens, width)
    return out.transpose(1, 2).contiguous(), probs


def _apply(quantize: Quantizer | None, x: Tensor) -> Tensor:
    return x if quantize is None else quantize(x)


def add_to_sites(loaded: LoadedModel, block: int, **added: Quantizer) -> None:
    """Have functions applied to the tensors of one block's attention, after what is done to them already.

    The model uses `attention` until it is restored.
    """
    _use_attention(loaded)
    module = loaded.attention(block)
    before: AttentionSites = getattr(module, SETTINGS)
    after = {name: _then(getattr(before, name), function) for name, function in added.items()}
    loaded.on_restore(functools.partial(setattr, module, SETTINGS, before))
    setattr(module, SETTINGS, dataclasses.replace(before, **after))


def _then(first: Quantizer | None, second: Quantizer) -> Quantizer:
    return second if first is None else lambda x: second(first(x))


def _use_attention(loaded: LoadedModel) -> None:
    before = loaded.model.config._attn_implementation
    if before == NAME:
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    for block in range(len(loaded.blocks)):
        module = loaded.attention(block)
        setattr(module, SETTINGS, AttentionSites())
        loaded.on_restore(functools.partial(delattr, module, SETTINGS))
    loaded.on_restore(functools.partial(loaded.model.set_attn_implementation, before))
    loaded.model.set_attn_implementation(NAME)
