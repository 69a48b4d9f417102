"""Turns: rotations of queries and keys that weights cannot carry, since the rotary embedding comes in between.

(q R)(k R)^T = q k^T, so a turn is only there where something is rounded: keys are turned when they are written to the
cache and turned back when they are read, queries around their quantizer. Attention sees nothing of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

Function = Callable[[Tensor], Tensor]  # of the last axis, a head; the other axes are left alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """x -> x R and back, for tensors [..., head_dim]."""

    forward: Function
    back: Function
    queries: Function | None = None  # what is done to queries as well, where keys are stored quantized

    def around(self, quantize: Function) -> Function:
        """The quantizer in the turned basis."""
        return lambda x: self.back(quantize(self.forward(x)))
