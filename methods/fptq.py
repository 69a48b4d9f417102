"""FPTQ: linear inputs at 8 bits, static where their range allows it, made narrower by a logarithm where that helps.

    m_j = max |x_j| over calibration tokens, M = max_j m_j of each linear input

    M <= v0         static: one symmetric scale M / 127 for the whole tensor
    v0 < M < v1     logarithmic equalisation, then static:
                    s_j = m_j / log2(2 + m_j)    x' = x / s,  W' = W diag(s)    M' = max_j log2(2 + m_j)
    M >= v1         one symmetric scale per token, anew at each call

(Li et al., arXiv 2308.15987; with 8 bits, 127 = 2^(b-1) - 1.) s does not depend on the weights. It is folded into the
norm that makes x, so that layers that share an input share the policy and s; quiet channels grow to a maximum of about
1. Inputs of o and down have no norm to fold into: inside the band they are rounded per token. Weights are rounded by
the recipe's solver, without one to nearest: `w4a8` with a group size of 128 and `symmetric: true` is meant. A quantized
KV cache is the scheme's `kv8`. Stored: nothing, s is folded into tensors that exist anyway, M is one number per layer.

The attempt's notes name each layer's M and policy, and the share of numbers that static ranges clipped.

Differences from the paper: there is no official code, and the paper's text could not be read. The formula is that of
sparseml's logarithmic equalisation; policy and thresholds are as reviews and surveys quote them. Not confirmed, and
chosen here: what happens at M = v0 and M = v1, what a layer without a norm does inside the band, the group size and
symmetry of weights, the width of the KV cache, number and length of calibration samples (random token ids are reported
to do as well). A channel that never fires, or whose maximum is not finite, keeps s = 1. Post-norm models (OPT-350m) are
refused: their norm feeds the residual too. Products are simulated in floating point, which expanding 4-bit weights to
int8 equals. GPTQ can follow (`fptq+gptq`); the paper found that it usually harms. v0 and v1 were found on LLaMA; they
depend on the model.

Published (LLaMA-7B is inferred, the order of tasks too): MMLU 35.20 at 16 bits, 32.02 W4A8, 30.03 with GPTQ.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from qfarm.errors import NonFinite, QfarmError
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.rtn import Quantizer, Symmetric
from qfarm.layers.sites import Observed, Place
from qfarm.layers.static import StaticSymmetric, share_clipped
from qfarm.models.architecture import absorbs_scale
from qfarm.models.load import LoadedModel
from qfarm.recipe import STRICT, ActivationMethod, Transform


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FPTQ(Transform, ActivationMethod):
    source = "Li et al., 2023, arXiv 2308.15987; formula as in sparseml's LogarithmicEqualizationModifier"

    v0: float = Field(15.0, gt=0, allow_inf_nan=False, description="up to this largest |x| an input is static as it is")
    v1: float = Field(150.0, gt=0, allow_inf_nan=False, description="from this largest |x| on it is rounded per token")

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.MAX_ABS})

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        return None if self.v0 <= self.v1 else f"v0 must not be above v1, got {self.v0:g} and {self.v1:g}"

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        if not absorbs_scale(config, ("q", "k", "v")):
            return "the norms of this model feed the residual too (post-norm), so that they cannot absorb a factor"
        return None

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        if loaded.divided:
            raise QfarmError("inputs are divided by another transform already")
        notes = []
        for group in loaded.architecture.shared_inputs:
            figures = []
            for block in range(len(loaded.blocks)):
                largest = _maxima(observed[Place("linear_in", block, group[0])])
                norm = loaded.norm(block, group)
                if norm is not None and self.v0 < float(largest.max()) < self.v1:
                    self._fold(loaded, block, group, norm, factors(largest))
                policy = self.policy(float(largest.max()), (block, group) in loaded.divided)
                loaded.decided[block, group] = policy
                loaded.on_restore(functools.partial(loaded.decided.pop, (block, group), None))
                figures.append(f"{float(largest.max()):.3g} {policy}")
            notes.append(f"largest |x| at {', '.join(group)} by layer: {', '.join(figures)}")
        return notes

    def policy(self, largest: float, equalised: bool) -> str:
        """What is done to an input whose largest |x| before any equalisation is this."""
        if equalised:
            return "equalised"
        return "static" if largest <= self.v0 else "per token"

    def _fold(self, loaded: LoadedModel, block: int, group: tuple[str, ...], norm: nn.Module, scale: Tensor) -> None:
        linears = loaded.linears(block)
        for role in group:
            _replace(loaded, block, linears[role], "weight", linears[role].weight.float() * scale)
        for name, parameter in list(norm.named_parameters(recurse=False)):
            _replace(loaded, block, norm, name, parameter.float() / scale)
        loaded.divided[block, group] = scale
        loaded.on_restore(lambda: loaded.divided.pop((block, group)))

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        found = observed[place]
        largest = float(_maxima(found).max())
        # Decided once: folding in 16 bits moves maxima, of other layers too, and one may pass a threshold.
        if (found.decided or self.policy(largest, found.divided is not None)) == "per token":
            return Symmetric(bits=bits)
        return StaticSymmetric(bits=bits, largest=largest)

    def report(self, quantizers: Mapping[Place, Quantizer]) -> list[str]:
        by_role: dict[str, list[Quantizer]] = collections.defaultdict(list)
        for place, quantize in quantizers.items():
            by_role[place.role].append(quantize)
        shares = {role: share for role, found in by_role.items() if (share := share_clipped(found)) is not None}
        words = [f"{role} {100 * share:.3g} %" for role, share in shares.items()]
        return [f"fptq: numbers beyond static ranges: {', '.join(words)}"] if words else []


METHOD = FPTQ


def factors(largest: Tensor) -> Tensor:
    """s [channels] from the largest |x| of each channel, float32."""
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, largest / torch.log2(2 + largest), torch.ones_like(largest))


def _maxima(found: InputStatistics) -> Tensor:
    assert found.max_abs is not None
    return found.max_abs


def _replace(loaded: LoadedModel, block: int, module: nn.Module, name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values.to(loaded.dtype)).all()):
        raise NonFinite(f"layer {block}: a folded {name} does not fit {loaded.dtype}")
    loaded.replace_parameter(module, name, values)
