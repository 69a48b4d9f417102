"""QuaRot: hidden states, values, queries, keys and the input of down times Hadamard matrices, which spread outliers.

    hidden states   h Q, Q = diag(s) H_d with random signs s, or a random orthogonal matrix; fused into the weights
    values          v H_h per head, fused into v and o; and A = H_n across the n query heads at the input of o, online
    input of down   x H_f, online
    queries, keys   times H_h after the rotary embedding; q k^T stays what it is (arXiv 2404.00456, section 4)

Nothing changes by that in exact arithmetic, and nothing is learned. Weights are then rounded by the recipe's solver,
which sees rotated inputs (`quarot+gptq`; alone: to nearest); linear inputs per token, keys and values per token and
head, by the rules below unless another method of the chain has the site (`quarot+kivi`).

    linear inputs   symmetric, s = clip max|x| / (2^(b-1) - 1), codes -2^(b-1) .. 2^(b-1) - 1; clip 0.9
                    or asymmetric through zero; clip 1
    keys, values    asymmetric between clip min and clip max of the head; clip 0.95

Stored: nothing for the rotations but a head of its own where it was tied to the embeddings, which counts. Cache: b
bits, a float16 scale and a 16-bit zero per token and head: 4.5 bits at 4 bits and heads of 64. The matrices are
generated, whatever the size; where none is known, the attempt's notes say what stands in for it, and heads are only
mixed where there are Hadamard matrices of their number.

Published W4A4KV4, WikiText-2, Llama-2 7B / 13B / 70B, Llama-3 8B (reruns in FlatQuant's README): GPTQ 6.10 / 5.40 /
3.79 / 8.16, RTN 8.56 / 6.10 / 4.14 / 10.60; full precision 5.47 / 4.88 / 3.32 / 6.14. They had weights per row,
symmetric, with a searched range (`rtn: {search: true}`, `gptq: {search: true, act_order: false}`), 128 windows of
WikiText-2.

Differences from spcl/QuaRot: token embeddings of models with RMS norms are not centred, which would change the model;
the bias of v is rotated (Qwen2); the width of heads is the configuration's (Qwen3); other Hadamard matrices where a
size is no power of two; online products in float32; one cache grid per head, not per 128 numbers; int8_down_proj is
not offered; GPTQ's damping, block and order are that method's options.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from qfarm.fuse import Bases, Fusion
from qfarm.hadamard import Hadamard, random_hadamard, random_orthogonal
from qfarm.layers.clipped import ClippedAsymmetric, ClippedLayer, ClippedSymmetric
from qfarm.layers.inject import MakeLayer
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.models.load import LoadedModel
from qfarm.recipe import STRICT
from qfarm.rotation import Rotation, online_notes, turn_keys_by_hadamard

SYMMETRIC_CLIP = 0.9  # tuned by the authors for symmetric 4-bit grids; it hurts asymmetric ones


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuaRot(Rotation):
    source = "Ashkboos et al., NeurIPS 2024, arXiv 2404.00456; github.com/spcl/QuaRot"
    heads_apart = False

    mode: Literal["hadamard", "random"] = Field("hadamard", description="of hidden states: signed Hadamard, or Haar")
    symmetric: bool = Field(True, description="grid of linear inputs")
    clip: float | None = Field(None, gt=0, le=1, description="of linear inputs; default 0.9, 1 if not symmetric")
    cache_clip: float = Field(0.95, gt=0, le=1, description="of keys and values")

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        linears, width = loaded.linears(0), loaded.head_dim
        hidden, draw = linears["q"].in_features, torch.Generator().manual_seed(seed)
        heads = Hadamard(linears["o"].in_features // width)
        rotation = random_hadamard(hidden, draw) if self.mode == "hadamard" else random_orthogonal(hidden, draw)
        values = Hadamard(width).dense().expand(linears["v"].out_features // width, -1, -1)
        bases = Bases(
            stream=rotation,
            values=[values] * len(loaded.blocks),
            down=Hadamard(linears["down"].in_features),
            across=heads if heads.exact else None,
        )
        notes = [f"hidden states: {'random, ' if self.mode == 'random' else ''}{self._how(hidden)}"]
        notes += online_notes(loaded, bases)
        if not heads.exact:
            notes.append(f"{heads.size} heads have no Hadamard matrix: they are not mixed")
        Fusion(loaded).install(bases)
        return [*notes, turn_keys_by_hadamard(loaded)]

    def _how(self, size: int) -> str:
        return f"orthogonal {size}" if self.mode == "random" else Hadamard(size).how

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        if self.symmetric:
            return ClippedSymmetric(bits=bits, clip=SYMMETRIC_CLIP if self.clip is None else self.clip)
        return ClippedAsymmetric(bits=bits, clip=self.clip or 1.0)

    def cache_layer(self, block: int, bits: int, observed: Observed) -> MakeLayer:
        return functools.partial(ClippedLayer, bits, self.cache_clip)


METHOD = QuaRot
