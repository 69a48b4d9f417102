"""KV caches that hold quantized keys and values.

A layer of the cache is written with new keys and values and hands back dense tensors for attention. What a call with
several tokens hands back is a choice of the evaluation:

    quantized   what is stored: every query sees quantized keys and values, its own included. One forward pass measures
                the error; used for perplexity and likelihood.
    full        the new keys and values as they are, behind the stored past: what generation does with its prompt. One
                forward pass alone shows no error at all.
    windowed    the same, where the evaluation feeds the text in chunks.

A call with one token hands back what is stored, in all three. A layer with a residual window (KIVI) has it
in full precision even then: `settle` quantizes what is due after it was read.

Where attention's kernels read codes (`qfarm.layers.packed_attention`) and ask for them, such a call hands back only
those tokens that lie in no word, and `words` are the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from qfarm.errors import InvalidInput, ModelError
from qfarm.kernels.pack import PackedKV
from qfarm.layers.packing import pack_codes, unpack_codes
from qfarm.layers.rope import Rotation, rotate, unrotate
from qfarm.layers.rtn import Quantizer, asymmetric_codes, asymmetric_grid
from qfarm.layers.sites import Prefill
from qfarm.layers.turn import Turn

Words = tuple[PackedKV | None, PackedKV | None]  # keys and values, a head for each sequence and head; None: none yet


class QuantizedLayer(DynamicLayer):  # type: ignore[misc]
    """Base of quantized cache layers. A subclass says how tokens are appended to `state` and read from it.

    Tensors of `state` have the batch as their first axis; they are what is stored and counted. Where tokens can be
    given back (`is_croppable`), the third axis is that of tokens.
    """

    is_croppable = False
    is_initialized: bool
    pre_rope: ClassVar[bool] = False  # `append` gets keys before the rotary embedding, and `read` gives those

    def __init__(self) -> None:
        super().__init__()
        self.prefill: Prefill = "quantized"
        self.state: dict[str, Tensor] = {}
        self.length = 0
        self.starts: Tensor | None = None  # int64 [batch]: index of the first real token under left padding; None: 0
        self.turn: Turn | None = None  # keys are stored turned, and turned back when they are read
        self.rotary = False  # keys come behind a rotary embedding; a layer outside a model is handed plain ones
        self.rotation: Rotation | None = None  # of the tokens of the next update, for layers before the embedding
        self.in_words = False  # what is stored is kept in words that attention's kernels read
        self.words_wanted = False  # who reads the next update takes them; else it is handed dense tensors
        self.words: Words = (None, None)  # of that update, for the attention that follows it
        self._rotations: dict[str, Tensor] = {}  # of all tokens; positions give them, so they count as no storage

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens: keys, values [batch, kv heads, tokens, head_dim]."""
        raise NotImplementedError

    def read(self) -> tuple[Tensor, Tensor]:
        """Everything stored, dense, in order."""
        raise NotImplementedError

    def settle(self) -> None:
        """Quantize what no longer belongs to the residual window; layers that quantize in `append` have none."""

    def words_refusal(self) -> str | None:
        """Why attention's kernels cannot read what this layer stores, or None."""
        return f"{type(self).__name__} stores codes in no layout that attention's kernels read"

    @property
    def words_from(self) -> int:
        """Tokens after which words hold some of keys and of values, and some tokens lie in none."""
        raise NotImplementedError

    def split(self) -> tuple[Words, tuple[Tensor, Tensor]]:
        """Keys and values in words, and those of the tokens after them, dense; for layers without a refusal."""
        raise NotImplementedError

    def tables(self) -> dict[str, dict[str, Any]]:
        """What calibration fixed for this layer, by the role of the linear layer that it is of; for the records."""
        return {}

    def stored_bytes(self) -> int:
        """Bytes of what is stored, metadata included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        tokens = key_states.shape[-2]
        keeps = self.prefill != "quantized" and tokens > 1
        past = self._dense() if keeps and self.length else None
        self.append(self._before_embedding(key_states), value_states)
        self.length += tokens
        wanted, self.words_wanted = self.words_wanted and self.in_words, False
        if tokens == 1:
            if wanted:
                self.words, found = self.split()
            else:
                found = self._dense()
            self.settle()
            return found
        self.settle()
        if not keeps:
            return self._dense()
        if past is None:
            return key_states, value_states
        return torch.cat([past[0], key_states], dim=-2), torch.cat([past[1], value_states], dim=-2)

    def _before_embedding(self, keys: Tensor) -> Tensor:
        if self.turn is not None:
            return self.turn.forward(keys)
        if not self.pre_rope:
            return keys
        rotation, self.rotation = self.rotation, None
        if rotation is None:
            if self.rotary:
                raise ModelError(f"{type(self).__name__} was not handed the rotary embedding of the keys it is given")
            return keys
        self._keep_rotation(rotation)
        return unrotate(keys.float(), rotation)

    def _keep_rotation(self, rotation: Rotation) -> None:
        new = dict(zip(("cos", "sin"), rotation, strict=True))
        # One row serves a whole batch until a caller gives positions by sequence.
        rows = max(map(len, (*new.values(), *self._rotations.values())))
        for name, table in new.items():
            parts = [self._rotations[name], table] if name in self._rotations else [table]
            self._rotations[name] = torch.cat([part.expand(rows, -1, -1) for part in parts], dim=1)

    def _dense(self) -> tuple[Tensor, Tensor]:
        keys, values = self.read()
        if self.turn is not None:
            keys = self.turn.back(keys)
        if self._rotations:
            keys = rotate(keys.float(), (self._rotations["cos"], self._rotations["sin"]))
        return keys.to(self.dtype), values.to(self.dtype)

    # -- what transformers asks of a layer ----------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.state, self._rotations, self.length, self.starts, self.rotation = {}, {}, 0, None, None
        self.words = (None, None)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative, as transformers gives it."""
        if tokens_to_remove == 0:
            return
        if not self.is_croppable:
            raise InvalidInput(f"{type(self).__name__} cannot give back tokens: assisted decoding is not supported")
        if tokens_to_remove > 0:
            raise InvalidInput(f"a cache gives back -n tokens, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)
        self.state = {name: tensor[:, :, : self.length] for name, tensor in self.state.items()}
        self._rotations = {name: tensor[:, : self.length] for name, tensor in self._rotations.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._for_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._for_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._for_batch(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self.state = {name: tensor.to("cpu", non_blocking=True) for name, tensor in self.state.items()}

    def prefetch(self) -> None:
        self.state = {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.state.items()}

    def _for_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: change(tensor) for name, tensor in self.state.items()}
        # Rotations of one sequence serve a whole batch.
        self._rotations = {n: change(tensor) if len(tensor) > 1 else tensor for n, tensor in self._rotations.items()}
        self.starts = None if self.starts is None else change(self.starts)


def extend(state: dict[str, Tensor], new: dict[str, Tensor], dim: int = 2) -> None:
    """Append tensors of new tokens to those of the same name, along the axis of tokens."""
    for name, tensor in new.items():
        state[name] = torch.cat([state[name], tensor], dim=dim) if name in state else tensor


class RTNLayer(QuantizedLayer):
    """One asymmetric grid per token and head: packed codes, a float16 scale and an integer zero point in a byte."""

    is_croppable = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.width = keys.shape[-1]
        for name, tensor in (("k", keys.float()), ("v", values.float())):
            scale, zero = asymmetric_grid(tensor, self.bits, torch.float16)
            codes = asymmetric_codes(tensor, scale, zero, self.bits).to(torch.uint8)
            new = {"codes": pack_codes(codes, self.bits), "scale": scale.half(), "zero": zero.to(torch.uint8)}
            extend(self.state, {f"{name}_{part}": value for part, value in new.items()})

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = (self._dequantize(name) for name in ("k", "v"))
        return keys, values

    def _dequantize(self, name: str) -> Tensor:
        codes = unpack_codes(self.state[f"{name}_codes"], self.bits, self.width)
        return (codes.float() - self.state[f"{name}_zero"].float()) * self.state[f"{name}_scale"].float()


class SimulatedLayer(QuantizedLayer):
    """Keys and values rounded when they are written, and kept in floating point: for accuracy only."""

    def __init__(self, quantize_keys: Quantizer | None, quantize_values: Quantizer | None) -> None:
        super().__init__()
        self.quantize_keys, self.quantize_values = quantize_keys, quantize_values

    def append(self, keys: Tensor, values: Tensor) -> None:
        keys = keys if self.quantize_keys is None else self.quantize_keys(keys)
        extend(self.state, {"k": keys, "v": values if self.quantize_values is None else self.quantize_values(values)})

    def read(self) -> tuple[Tensor, Tensor]:
        return self.state["k"], self.state["v"]
