"""CrossQuant: the step of an activation mixes the largest value of its token and of its channel (arXiv 2410.07505).

    t_i = max_j |x_ij|   c_j = max_i |x_ij|   step_ij = t_i^alpha c_j^(1 - alpha) / (2^(b-1) - 1)
    x_hat = step clamp(round(x / step), +-(2^(b-1) - 1))        alpha = 1: per token, alpha = 0: per channel

Per-token steps follow the outlier channels, and small channels vanish: the share of elements that become zero, the
"quantization kernel", is what the paper explains the loss of accuracy with. A mixed step shrinks it in total, though
not for every element: where c_j > t_i the step grows. Measure it with the evaluation `kernel`; `remove_only` sets the
kernel to zero and leaves the rest in floating point, which shows how much of the loss it carries.

Modes:

    dynamic   c_j from the tensor at hand, per sequence. The literal reading of the formula. It looks at later tokens
              (cells are marked), and with one token at a time nearly every element becomes exact: no model of decoding
    static    c_j from calibration text; causal. What exceeds c_j may clip
    folded    c_j^(1 - alpha) multiplied into the weights' columns before they are quantized, inputs divided by it, then
              rounded per token: a legal integer product. Its step is nowhere larger than the static one's. It is
              SmoothQuant with s_j = c_j^(1 - alpha), for all linear layers, with the division done online

Linear inputs of all decoder layers; weights are left to the recipe's solver (`crossquant+gptq`, `awq+crossquant`).
Stored: nothing for dynamic, one float32 vector per linear input otherwise. Scales cost b + 16 / channels + 16 / tokens
bits per activation while it lives. A channel or token of zeros comes out as zeros, 0^0 is 1, powers are float32.

Published (abstract): with a kernel below 19 % of elements (OPT) or 1 % (LLaMA) the loss of INT8 activations is
negligible; CrossQuant reaches about 16 % and 0.1 %. Tables of perplexity were not at hand.

Differences from the paper: no public code was found and its body was not at hand, so these are not confirmed: whether
c_j is dynamic, which layers, that attention products stay as they are, the weights' granularity. `static`, `folded` and
`skip_first` are ours. The cross rule for weights is not offered. alpha = 0.15 is the paper's, tuned on few models.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite, QfarmError
from qfarm.inputs import Statistic
from qfarm.layers.kernel import KernelRemoved
from qfarm.layers.linear import transform_input
from qfarm.layers.rtn import TINY, Quantizer, Symmetric
from qfarm.layers.sites import Observed, Place
from qfarm.models.load import LoadedModel
from qfarm.recipe import STRICT, ActivationMethod, Transform

MARK = "qfarm_crossed"  # attribute of a folded model: folding twice would fold the folded


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CrossQuant(Transform, ActivationMethod):
    source = "Liu, Ma, Zhang, Wang, 2024, arXiv 2410.07505"
    site_widths = {"linear_in": range(4, 9)}

    alpha: float = Field(
        0.15, ge=0, le=1, description="exponent of the token's maximum; 1 = per token, 0 = per channel"
    )
    mode: Literal["dynamic", "static", "folded"] = Field(
        "dynamic", description="the channels' maxima: of the tensor, of calibration text, or folded into weights"
    )
    skip_first: bool = Field(False, description="dynamic: the first token of a sequence has no part in channel maxima")
    remove_only: bool = Field(False, description="only set the kernel to zero, leave the rest in floating point")

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.skip_first and self.mode != "dynamic":
            return f"skip_first is of mode: dynamic, not {self.mode}"
        return None

    @property
    def needs_text(self) -> bool:
        return self.mode != "dynamic"

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.MAX_ABS} if self.mode == "folded" else ())

    def site_statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.MAX_ABS} if self.mode == "static" else ())

    @property
    def causal(self) -> bool:
        return self.mode != "dynamic"

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        """Folded mode: weights times c^(1 - alpha), inputs divided by it. Other modes change nothing here."""
        if self.mode != "folded":
            return []
        if hasattr(loaded.model, MARK):
            raise QfarmError("channel maxima are folded into the model already")
        setattr(loaded.model, MARK, True)
        loaded.on_restore(lambda: delattr(loaded.model, MARK))
        firsts = {group[0] for group in loaded.architecture.shared_inputs}
        lowest, highest = float("inf"), 0.0
        for block in range(len(loaded.blocks)):
            for role, linear in loaded.linears(block).items():
                place = Place("linear_in", block, role)
                factor = fold_factors(_largest(observed, place), self.alpha)
                values = linear.weight.detach().float() * factor
                if not bool(torch.isfinite(values.to(loaded.dtype)).all()):
                    raise NonFinite(f"{place}: a folded weight does not fit {loaded.dtype}")
                loaded.replace_weight(linear, values)
                transform_input(loaded, block, role, functools.partial(_divide, factor))
                if role in firsts:  # of layers that read one tensor, and so have one factor
                    loaded.store_beside(factor.numel() * factor.element_size())
                lowest, highest = min(lowest, float(factor.min())), max(highest, float(factor.max()))
        return [f"inputs of all linear layers divided by {lowest:.3g} .. {highest:.3g}"]

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        quantize: Quantizer
        if self.mode == "folded":
            quantize = Symmetric(bits=bits)
        else:
            columns = _largest(observed, place) if self.mode == "static" else None
            quantize = Cross(bits=bits, alpha=self.alpha, columns=columns, skip_first=self.skip_first)
        return KernelRemoved(quantize=quantize) if self.remove_only else quantize


METHOD = CrossQuant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
    """Round to nearest with steps of token and channel maxima; x [..., tokens, channels], channels maxima per sequence.

    Float32 inside, rounding half to even, cast back to the dtype of x. NaN and Inf come out as NaN.
    """

    bits: int
    alpha: float
    columns: Tensor | None = None  # c [channels] of calibration; None: of x
    skip_first: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        step = self.step(x)
        return self.codes(x, step).mul_(step).to(x.dtype)

    def stored(self) -> tuple[Tensor, ...]:
        return () if self.columns is None else (self.columns.float(),)

    def step(self, values: Tensor) -> Tensor:
        """[..., tokens, channels], float32: rank one in its last two axes."""
        size = values.abs()
        rows = _power(size.amax(dim=-1, keepdim=True).float(), self.alpha)
        counted = size[..., 1:, :] if self.skip_first and size.shape[-2] > 1 else size
        largest = counted.amax(dim=-2, keepdim=True) if self.columns is None else self.columns.to(size.device)
        return (rows * _power(largest.float(), 1 - self.alpha)).div_(2.0 ** (self.bits - 1) - 1)

    def codes(self, values: Tensor, step: Tensor) -> Tensor:
        """Signed codes as float32; 0 where the step is nothing."""
        top = 2.0 ** (self.bits - 1) - 1
        return (values / step).round_().masked_fill_(step < TINY, 0.0).clamp_(-top, top)


def _power(values: Tensor, exponent: float) -> Tensor:
    """values^exponent in float32, exact for exponents 0 and 1; 0^0 = 1.

    Taken in float64: in float32 its last bit depends on where in a vector a value stands, hence on the batch.
    """
    if exponent == 1:
        return values
    return torch.ones_like(values) if exponent == 0 else values.double().pow(exponent).float()


def fold_factors(largest: Tensor, alpha: float) -> Tensor:
    """c^(1 - alpha) [channels], float32; 1 for channels that never fire or whose maximum is not finite."""
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, _power(largest.float(), 1 - alpha), 1.0)


def _divide(factor: Tensor, x: Tensor) -> Tensor:
    return (x.float() / factor).to(x.dtype)


def _largest(observed: Observed, place: Place) -> Tensor:
    found = observed[place].max_abs
    assert found is not None
    return found
