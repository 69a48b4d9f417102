"""Rotary embeddings undone and done again, for caches that quantize keys as they are before them.

    k' = k cos + rot(k) sin,  rot(k) = (-k_2, k_1) of the two halves k_1, k_2
    k  = (k' cos - rot(k') sin) / (cos^2 + sin^2)

The division is for variants that scale cos and sin (YaRN). All supported families rotate halves; families that rotate
interleaved pairs would need another rot.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cos, sin [batch or 1, tokens, head_dim]


def rotate(keys: Tensor, rotation: Rotation) -> Tensor:
    """keys [batch, heads, tokens, head_dim], float32."""
    cos, sin = (part.float().unsqueeze(1) for part in rotation)
    return keys * cos + _half_turn(keys) * sin


def unrotate(keys: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of `rotate`."""
    cos, sin = (part.float().unsqueeze(1) for part in rotation)
    return (keys * cos - _half_turn(keys) * sin) / (cos.square() + sin.square())


def _half_turn(keys: Tensor) -> Tensor:
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
