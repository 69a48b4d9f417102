"""Architecture: which module of a decoder plays which role, one description per family.

A family is chosen by `config.model_type`, never by a path. Everything else in qfarm speaks of roles only:
q, k, v, o and, in the MLP, gate, up, down (OPT's fc1 is up, its fc2 down).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qfarm.errors import ModelError

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    blocks: str  # path of the list of decoder blocks, from the causal-LM module
    roles: Mapping[str, str]  # role -> path of the linear layer, from a block
    shared_inputs: tuple[tuple[str, ...], ...]  # roles that read the same tensor, in the order of computation
    mlp_size: str  # the configuration's key for the width of the MLP
    attention: str  # path of the attention module, from a block
    rotary: bool  # queries and keys are turned by their position after they were projected
    norms: Mapping[tuple[str, ...], str]  # group of layers -> path of the norm that makes their input, from a block
    final_norm: str  # path of the norm before the head, from the causal-LM module
    embeddings: tuple[str, ...]  # paths of the tables whose rows add up to the first hidden state, alike
    key_norm: str | None = None  # path of the norm of each key head, from a block


_LLAMA = Architecture(
    blocks="model.layers",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    shared_inputs=(("q", "k", "v"), ("o",), ("gate", "up"), ("down",)),
    mlp_size="intermediate_size",
    attention="self_attn",
    rotary=True,
    norms={("q", "k", "v"): "input_layernorm", ("gate", "up"): "post_attention_layernorm"},
    final_norm="model.norm",
    embeddings=("model.embed_tokens",),
)

_OPT = Architecture(
    blocks="model.decoder.layers",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    shared_inputs=(("q", "k", "v"), ("o",), ("up",), ("down",)),
    mlp_size="ffn_dim",
    attention="self_attn",
    rotary=False,
    norms={("q", "k", "v"): "self_attn_layer_norm", ("up",): "final_layer_norm"},
    final_norm="model.decoder.final_layer_norm",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": dataclasses.replace(_LLAMA, key_norm="self_attn.k_norm"),
    "opt": _OPT,
}


def architecture_of(config: Config, reference: str) -> Architecture:
    """The description for a model's configuration. Raises ModelError for families that qfarm does not know."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ModelError(f'{reference}: unsupported model type "{model_type}"; supported: {", ".join(ARCHITECTURES)}')
    return ARCHITECTURES[model_type]


def _size(config: Config, key: str, reference: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{reference}: the configuration's {key} is {value!r}, not a positive number")
    return value


def head_width(config: Config, reference: str) -> int:
    """Numbers in a head. Raises ModelError if that cannot be known."""
    hidden, heads = (_size(config, key, reference) for key in ("hidden_size", "num_attention_heads"))
    return config.get("head_dim") or hidden // heads


def linear_shapes(config: Config, reference: str) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each role's layer in one decoder block. Raises ModelError if they cannot be known."""
    architecture = architecture_of(config, reference)
    hidden, heads = (_size(config, key, reference) for key in ("hidden_size", "num_attention_heads"))
    mlp, head = _size(config, architecture.mlp_size, reference), head_width(config, reference)
    kv = config.get("num_key_value_heads") or heads
    shapes = {
        "q": (heads * head, hidden),
        "k": (kv * head, hidden),
        "v": (kv * head, hidden),
        "o": (hidden, heads * head),
        "gate": (mlp, hidden),
        "up": (mlp, hidden),
        "down": (hidden, mlp),
    }
    return {role: shapes[role] for role in architecture.roles}


def absorbs_scale(config: Config, roles: tuple[str, ...]) -> bool:
    """Whether the operator before these layers can absorb a positive factor per input column, the model unchanged.

    A norm can when nothing else reads it; `up` before `down` when the MLP is gated or its activation is ReLU; `v`
    before `o` when every value head has one query head.
    """
    if roles == ("o",):
        return config.get("num_key_value_heads") in (None, config["num_attention_heads"])
    if config.get("model_type") != "opt":
        return True
    # Post-norm OPT adds the norm's output to the residual as well.
    return config["activation_function"] == "relu" if roles == ("down",) else bool(config["do_layer_norm_before"])


def rotation_rule(config: Config) -> str | None:
    """Why the hidden states of this model cannot be rotated, or None: its norms must be the only ones to read them."""
    if config.get("model_type") != "opt":
        return None
    if not config.get("do_layer_norm_before", True):
        return "the norms of this model stand in the residual stream (post-norm), where no rotation passes them"
    if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        return "embeddings and hidden states of this model have different widths"
    return "this model has no norm before its head" if config.get("_remove_final_layer_norm") else None


def parameter_counts(config: Config, reference: str) -> tuple[int, int]:
    """(parameters of all decoder linears, parameters of embeddings and head); norms and biases are left out."""
    per_block = sum(rows * columns for rows, columns in linear_shapes(config, reference).values())
    # OPT-350m embeds into a narrower space than its hidden size.
    width = config.get("word_embed_proj_dim") or config["hidden_size"]
    tables = 1 if config.get("tie_word_embeddings", config.get("model_type") == "opt") else 2
    blocks, vocabulary = (_size(config, key, reference) for key in ("num_hidden_layers", "vocab_size"))
    return per_block * blocks, tables * vocabulary * width
