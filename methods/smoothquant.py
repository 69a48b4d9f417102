"""SmoothQuant: divide each input channel of a layer by a factor, multiply the weight's column by it, change nothing.

    a_j = max |x_j| over calibration tokens     w_j = max |W_kj| over rows of all layers that read x
    s_j = a_j^alpha / w_j^(1 - alpha)           x' = x / s,  W' = W diag(s)     (arXiv 2211.10438, equation 4)

Outliers of activations shrink and weights grow; alpha says by how much. The division is folded into the operator that
makes x: a norm (weight, and bias where there is one), and with `down` or `out` the rows of `up` or `v`, with their
biases. Rounding comes after, by whatever solver and quantizers the recipe and the scheme name. Stored: nothing, s is
folded into tensors that exist anyway.

Groups: the attention norm -> q, k, v; the MLP's norm -> gate, up. Off by default, and not in the reference code:
up -> down (exact because a gate only multiplies; for an MLP without gate, ReLU commutes with a positive factor) and
v -> o (under grouped-query attention all query heads of a value head share s, from the largest a and w among them).

Differences from mit-han-lab/smoothquant: s is computed in float32 and only the folded tensors are rounded to the
model's dtype (there a is cast first). A channel that never fires, or whose maximum is not finite, keeps s = 1 (there
s = 1e-5, which multiplies the norm's weight by 1e5). Post-norm models (OPT-350m) are refused: their norm feeds the
residual too. Calibration text, number and length of samples are the job's (there: 512 samples of 512 tokens of the
Pile). Outputs of q, k, v are quantized only if the scheme says so (kv, q); there they are in its perplexity script.
Weights are symmetric with the job's `symmetric: true`, as there.

Published alphas (the reference code's README; LLaMA-3.1 from qllm-infer's sweep): OPT, BLOOM 0.5; LLaMA-2 7B, 13B and
LLaMA-3 0.85, LLaMA-2 70B 0.9; Mistral-7B 0.8; LLaMA-3.1-8B-Instruct 0.55; none for Qwen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from qfarm.errors import NonFinite, QfarmError
from qfarm.inputs import Statistic
from qfarm.layers.sites import Observed, Place
from qfarm.models.architecture import absorbs_scale
from qfarm.models.load import LoadedModel
from qfarm.recipe import STRICT, Transform

SMALLEST = 1e-5  # lower bound of w and s, from the reference code
MARK = "qfarm_smoothed"  # attribute of a smoothed model: smoothing twice would smooth the smoothed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SmoothQuant(Transform):
    source = "Xiao et al., ICML 2023, arXiv 2211.10438; github.com/mit-han-lab/smoothquant"

    alpha: float = Field(0.5, ge=0, le=1, description="migration strength; larger moves more into the weights")
    down: bool = Field(False, description="also smooth the input of down, by dividing the output of up")
    out: bool = Field(False, description="also smooth the input of o, by dividing the output of v")

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.MAX_ABS})

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        if not absorbs_scale(config, ("q", "k", "v")):
            return "the norms of this model feed the residual too (post-norm), so that they cannot absorb a factor"
        if self.down and not absorbs_scale(config, ("down",)):
            return "down: true needs a gated MLP or ReLU between up and down"
        return None

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        if hasattr(loaded.model, MARK):
            raise QfarmError("the model is smoothed already")
        setattr(loaded.model, MARK, True)
        loaded.on_restore(lambda: delattr(loaded.model, MARK))
        groups = [group for group in loaded.architecture.shared_inputs if self.producer(loaded, 0, group) is not None]
        notes = []
        for group in groups:
            scales = [self.smooth(loaded, block, group, observed) for block in range(len(loaded.blocks))]
            lowest, highest = min(float(s.min()) for s in scales), max(float(s.max()) for s in scales)
            notes.append(f"inputs of {', '.join(group)} divided by {lowest:.3g} .. {highest:.3g}")
        return notes

    def producer(self, loaded: LoadedModel, block: int, group: tuple[str, ...]) -> nn.Module | None:
        """What makes the input of these layers and can divide it; None: nothing does, or it is not wanted."""
        linears = loaded.linears(block)
        if group == ("down",):
            return linears["up"] if self.down else None
        if group == ("o",):
            return linears["v"] if self.out else None
        return loaded.norm(block, group)

    def smooth(self, loaded: LoadedModel, block: int, group: tuple[str, ...], observed: Observed) -> Tensor:
        """Fold the factors of one group of layers; returns them, [channels of the producer]."""
        producer, linears = self.producer(loaded, block, group), loaded.linears(block)
        assert producer is not None
        activity = observed[Place("linear_in", block, group[0])].max_abs
        assert activity is not None
        weights = torch.stack([linears[role].weight.detach().float().abs().amax(dim=0) for role in group]).amax(dim=0)
        sharing = _sharing(loaded, block) if group == ("o",) else None
        scale = factors(_largest(activity, sharing), _largest(weights, sharing), self.alpha)
        columns = scale if sharing is None else scale.reshape(sharing[0], 1, -1).expand(*sharing, -1).reshape(-1)
        for role in group:
            _replace(loaded, block, linears[role], "weight", linears[role].weight.float() * columns)
        for name, parameter in list(producer.named_parameters(recurse=False)):
            by_row = scale[:, None] if parameter.dim() == 2 else scale
            _replace(loaded, block, producer, name, parameter.float() / by_row)
        return scale


METHOD = SmoothQuant


def factors(activity: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s [channels] from the largest |x| and |W| of each channel, float32."""
    scale = (activity.pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)).clamp(min=SMALLEST)
    usable = (activity > 0) & torch.isfinite(activity) & torch.isfinite(scale)
    return torch.where(usable, scale, torch.ones_like(scale))


def _sharing(loaded: LoadedModel, block: int) -> tuple[int, int]:
    """(value heads, query heads per value head)."""
    linears = loaded.linears(block)
    heads = linears["v"].out_features // loaded.head_dim
    return heads, linears["o"].in_features // loaded.head_dim // heads


def _largest(values: Tensor, sharing: tuple[int, int] | None) -> Tensor:
    """Largest value among input channels that share a factor."""
    return values if sharing is None else values.reshape(*sharing, -1).amax(dim=1).reshape(-1)


def _replace(loaded: LoadedModel, block: int, module: nn.Module, name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values.to(loaded.dtype)).all()):
        raise NonFinite(f"layer {block}: a folded {name} does not fit {loaded.dtype}")
    loaded.replace_parameter(module, name, values)
