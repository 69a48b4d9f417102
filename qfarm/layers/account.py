"""Account: how wide the numbers of quantized activations are, and what is stored for their quantizers.

A quantizer tells more than its width by attributes of its own, all of them optional:

    bits             width of a code, where it is not the scheme's (RPTQ's inputs of q, k, v)
    effective_bits   bits per number where codes do not say all: flags of groups, numbers left in floating point
    stored()         tensors that calibration fixed and that have to be kept, as they are used; without it the grid is
                     found anew at each call

Scales of a call live as long as the call does and are not counted, nor are columns that LLM.int8() takes out of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Place
from qfarm.models.load import LoadedModel
from qfarm.scheme import UNTOUCHED


@runtime_checkable
class Calibrated(Protocol):
    """A quantizer with tensors of its own."""

    def stored(self) -> tuple[Tensor, ...]: ...


def kept_tensors(quantize: object) -> tuple[Tensor, ...] | None:
    """What calibration fixed for a quantizer; None where its grid is found anew at each call."""
    return quantize.stored() if isinstance(quantize, Calibrated) else None


def effective_bits(quantize: Quantizer | None, bits: int) -> float:
    """Bits per number, the scheme's where the quantizer says nothing; None leaves numbers at 16 bits."""
    if quantize is None:
        return UNTOUCHED
    return float(getattr(quantize, "effective_bits", getattr(quantize, "bits", bits)))


def input_bits(loaded: LoadedModel, placed: Mapping[Place, Quantizer], bits: int) -> float:
    """Mean over the numbers that enter linear layers, each tensor once however many layers read it."""
    total = count = 0.0
    for block in range(len(loaded.blocks)):
        linears = loaded.linears(block)
        for roles in loaded.architecture.shared_inputs:
            width = linears[roles[0]].in_features
            mean = sum(effective_bits(placed.get(Place("linear_in", block, role)), bits) for role in roles) / len(roles)
            total, count = total + width * mean, count + width
    return total / count


def cached_bits(loaded: LoadedModel, placed: Mapping[Place, Quantizer], bits: int) -> float | None:
    """Mean over keys and values where all their grids are fixed, so that a number takes its code and nothing else.

    None where a grid is found anew at each call: what a cache would have to store of it is not simulated.
    """
    total = 0.0
    for block in range(len(loaded.blocks)):
        for sites in (("k", "k_pre_rope"), ("v",)):
            found = next((placed[place] for site in sites if (place := Place(site, block)) in placed), None)
            if found is not None and kept_tensors(found) is None:
                return None
            total += effective_bits(found, bits)
    return total / (2 * len(loaded.blocks))


def stored_bytes(placed: Mapping[Place, Quantizer]) -> int:
    """Bytes of what calibrated quantizers keep; tensors that are equal within a block are one, as of a shared input."""
    kept: dict[tuple[int, str, bytes], int] = {}
    for place, quantize in placed.items():
        for tensor in kept_tensors(quantize) or ():
            own = tensor.detach().cpu().contiguous()
            key = (place.layer, str(own.dtype), own.numpy().tobytes())
            kept[key] = own.numel() * own.element_size()
    return sum(kept.values())
