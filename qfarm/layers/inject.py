"""Injection: every way of calling the model uses a quantized KV cache.

A hook before the decoder's forward gives it a fresh quantized cache where it has none: one per independent forward.
An empty default cache gets quantized layers in place, so that a caller who holds it (generation, or an evaluator that
reads a shared prefix once) goes on with what was stored. Any other cache is refused, since the model would run
unquantized. The hook stands at the decoder rather than at the causal-LM module, so that the body alone is covered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from qfarm.errors import InvalidInput, ModelError, QfarmError
from qfarm.layers.attention import add_to_sites
from qfarm.layers.cache import QuantizedLayer
from qfarm.models.load import LoadedModel
from qfarm.models.past import KEYWORDS, cache_keyword, given_cache

MakeLayer = Callable[[], QuantizedLayer]
KNOWN_KINDS = {"full_attention", "sliding_attention"}  # of decoder blocks; the mask enforces a sliding window
PROBE_TOKENS = 2048  # at which stored bits are counted


def install_cache(loaded: LoadedModel, makers: Sequence[MakeLayer]) -> None:
    """Use caches of these layers, one maker per block, until the model is restored.

    Raises ModelError when the model is known not to use such caches, or a probe shows that it does not.
    """
    unknown = sorted(set(getattr(loaded.model.config, "layer_types", None) or ()) - KNOWN_KINDS)
    if unknown:
        raise ModelError(f"a quantized KV cache needs plain attention; the model has {', '.join(unknown)} blocks")
    loaded.cache_layers = tuple(makers)
    loaded.on_restore(functools.partial(setattr, loaded, "cache_layers", ()))
    handle = loaded.decoder.register_forward_pre_hook(functools.partial(_inject, loaded, makers), with_kwargs=True)
    loaded.on_restore(handle.remove)
    loaded.on_restore(loaded.decoder.register_forward_hook(_require_use, with_kwargs=True).remove)
    for block, make in enumerate(makers):
        turn = loaded.turns.get(block)
        if turn is not None and turn.queries is not None:
            add_to_sites(loaded, block, q=turn.queries)
        if make().pre_rope:
            if turn is not None:
                raise QfarmError("keys that are rotated after the rotary embedding cannot be stored as before it")
            hook = functools.partial(_hand_over_rotation, block)
            handle = loaded.attention(block).register_forward_pre_hook(hook, with_kwargs=True)
            loaded.on_restore(handle.remove)
    _probe(loaded, makers)


@torch.no_grad()
def _probe(loaded: LoadedModel, makers: Sequence[MakeLayer]) -> None:
    """One pass over two tokens, which stands for a check of transformers' version: what it asks for is what is needed.

    Its layers store what they are given, so that no quantizer counts these tokens.
    """
    witnesses = [_WitnessBeforeRope() if make().pre_rope else _Witness() for make in makers]
    for witness in witnesses:
        witness.rotary = loaded.architecture.rotary
    body = loaded.model.base_model
    ids = torch.zeros(1, 2, dtype=torch.long, device=loaded.device)
    body(input_ids=ids, use_cache=True, **{cache_keyword(body): Cache(layers=list(witnesses))})
    # The body of some families is a module around the decoder, whose hooks need not have run.
    if not all(witness.length for witness in witnesses):
        raise ModelError(f"{type(body).__name__} did not write to the quantized KV cache that it was given")


class _Witness(QuantizedLayer):
    """Stores what it is given."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.state = {"k": keys, "v": values}

    def read(self) -> tuple[Tensor, Tensor]:
        return self.state["k"], self.state["v"]


class _WitnessBeforeRope(_Witness):
    pre_rope = True


def _inject(
    loaded: LoadedModel, makers: Sequence[MakeLayer], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    given = given_cache(kwargs)
    if _is_quantized(given):
        return args, kwargs
    if given is not None and not (type(given) is DynamicCache and given.get_seq_length() == 0):
        raise InvalidInput(f"a {type(given).__name__} was passed to a model whose KV cache is quantized")
    mask = kwargs.get("attention_mask")
    starts = mask.int().argmax(dim=1) if isinstance(mask, Tensor) and mask.dim() == 2 else None  # argmax takes no bool
    layers = [make() for make in makers]
    for block, layer in enumerate(layers):
        layer.prefill, layer.starts, layer.turn = loaded.prefill, starts, loaded.turns.get(block)
        layer.rotary, layer.in_words = loaded.architecture.rotary, loaded.cache_in_words
    if given is None:
        others = {name: value for name, value in kwargs.items() if name not in KEYWORDS}
        return args, others | {cache_keyword(module): Cache(layers=layers)}
    given.layers[:] = layers
    return args, kwargs


def _require_use(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Nothing is measured on a path that bypasses the cache."""
    cache = given_cache(kwargs)
    if cache is None or not all(layer.get_seq_length() for layer in cache.layers):
        raise ModelError(f"{type(module).__name__} did not write to the quantized KV cache that it was given")


def _is_quantized(cache: Cache | None) -> bool:
    return cache is not None and any(isinstance(layer, QuantizedLayer) for layer in cache.layers)


def _hand_over_rotation(block: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Caches are told keys only; those that undo the rotary embedding need its cos and sin."""
    past = given_cache(kwargs)
    if past is not None and _is_quantized(past):
        past.layers[block].rotation = kwargs.get("position_embeddings")


@torch.no_grad()
def stored_bits(loaded: LoadedModel, makers: Sequence[MakeLayer], tokens: int = PROBE_TOKENS) -> float:
    """Stored bits per cached number of one sequence, metadata included, by writing normal noise to real layers."""
    width = loaded.head_dim
    noise = torch.Generator().manual_seed(0)
    layers = [make() for make in makers]
    count = 0
    for block, layer in enumerate(layers):
        heads = loaded.linears(block)["k"].out_features // width
        tensor = torch.randn(1, heads, tokens, width, generator=noise).to(loaded.device, loaded.dtype)
        layer.update(tensor, tensor)
        count += 2 * tensor.numel()
    return _bits(layers, count)


@torch.no_grad()
def stored_bits_of_text(loaded: LoadedModel, makers: Sequence[MakeLayer], ids: Tensor) -> float:
    """The same for token ids [tokens], where what is stored depends on it; the cache is installed already."""
    layers = [make() for make in makers]
    ids = ids[: min(PROBE_TOKENS, loaded.model.config.max_position_embeddings)]
    cache = {cache_keyword(loaded.model.base_model): Cache(layers=list(layers))}
    loaded.model.base_model(input_ids=ids[None].to(loaded.device), use_cache=True, **cache)
    count = sum(2 * len(ids) * loaded.linears(block)["k"].out_features for block in range(len(layers)))
    return _bits(layers, count)


def _bits(layers: Sequence[QuantizedLayer], count: int) -> float:
    return 8 * sum(layer.stored_bytes() for layer in layers) / count
