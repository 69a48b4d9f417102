"""Sites: where numbers of a running model can be quantized, and what quantizes them when no method does.

    linear_in    the input of a decoder linear, one place per layer and role; the head is not one of them
    q            queries after the rotary embedding, [batch, heads, tokens, head_dim]
    probs        softmax probabilities, [batch, heads, queries, keys]
    kv_cache     keys and values. A cache step stores them quantized; an activation step may act on the tensors instead:
                 k_pre_rope (output of the key projection, after its norm where there is one), k, v

A scheme names linear_in, q, probs and kv_cache; k_pre_rope, k and v are three ways into kv_cache. Unclaimed sites are
rounded to nearest by the rules of `qfarm.layers.rtn`, whose versions stand here since they are part of a cell's
identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from qfarm.inputs import InputStatistics

Prefill = Literal["full", "quantized", "windowed"]

# Sites that an activation step may quantize, by the site of the scheme that they belong to.
TENSORS: Mapping[str, tuple[str, ...]] = {
    "linear_in": ("linear_in",),
    "q": ("q",),
    "probs": ("probs",),
    "kv_cache": ("k_pre_rope", "k", "v"),
}

# Version of the round-to-nearest rule of each site: raise it when a fix changes results.
RTN_VERSIONS: Mapping[str, int] = {"linear_in": 1, "kv_cache": 1, "q": 1, "probs": 1}
# The same for how a weight solver's factors reach quantized inputs (AWQ); of no concern to cells without such a solver.
INPUT_FACTORS_VERSION = 1
# Widths that these rules support, in bits: activations are simulated, the cache is packed into bytes.
RTN_WIDTHS: Mapping[str, range] = {
    "linear_in": range(2, 16),
    "kv_cache": range(2, 9),
    "q": range(2, 16),
    "probs": range(2, 16),
}


class Place(NamedTuple):
    """One place where a tensor can be quantized."""

    site: str  # linear_in, q, k_pre_rope, k, v, probs
    layer: int
    role: str = ""  # of the linear layer, at linear_in

    def __str__(self) -> str:
        return f"{self.site} of layer {self.layer}" + (f" {self.role}" if self.role else "")


# What calibration learned, by place; layers that read the same tensor share one entry's object.
Observed = Mapping[Place, "InputStatistics"]
