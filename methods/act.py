"""Act: uniform rounding of activations with a choice of granularity, of when ranges are known, and of clipping.

    range      low, high of a token, of a block of it, of the whole tensor, or of a channel; dynamic: of each sequence
               at hand, static: of calibration text
    symmetric  s = max(-low, high) / (2^(b-1) - 1)     x_hat = s clamp(round(x / s), +-(2^(b-1) - 1))
    asymmetric low = min(low, 0), high = max(high, 0)  s = (high - low) / (2^b - 1)   z = round(-low / s)
               x_hat = s (clamp(round(x / s) + z, 0, 2^b - 1) - z)

Linear inputs are what is meant. `sites` gives queries, keys, values and probabilities formats of their own (`sites: {k:
{pre_rope: true}, v: {granularity: channel}, probs: {}}`), all dynamic; their widths are the scheme's (`q8`, `kv4`,
`p8`). Sites that are not named are rounded to nearest by the scheme, except that keys and values are one site: of
these, what is not named stays at 16 bits. Keys and values are rounded when they are written, to a cache that simulates,
so that ranges of a tensor or a channel are those of the tokens written together.

Clipping: `percentile` p takes the smallest value with p % of all values at or below it (nearest rank; of |x| for
symmetric grids, of x and -x for asymmetric ones); `mse` shrinks the range to 1, 0.99, .. 0.21 of itself and keeps what
makes sum |x_hat - x|^2.4 smallest, the search of GPTQ's reference code. Defaults (token, dynamic, none, symmetric) are
what a scheme gets from no method at all.

Dynamic tensor and channel ranges look at all tokens of a sequence, hence at later ones: cells are marked, and results
move with padding, but not with the other sequences of a batch. Static ranges do not; a token has none, so static means
tensor or channel. Channels have no integer product with the weights, since their scales differ inside a sum: a
measurement, not a deployment. Static ranges without clipping are the extremes of the calibration text. With clipping
that of a tensor comes from all its numbers there, rounded to bfloat16, massive tokens included; that of a channel from
a sample of ordinary tokens (up to 512, norms up to 4 times the median), since a histogram for each would not fit. What
lies beyond a static range is clipped; a channel that was always zero stays zero.

Stored: nothing for dynamic ranges; static: one float32 scale (and a zero point, of a byte up to 8 bits) per tensor or
channel, once for layers that read the same input. Arithmetic is float32,
rounding half to even, tokens of zeros stay zeros, NaN stays NaN.

Differences from qllm-infer, whose quantizer this follows: the symmetric range is restricted, so that both ends are
exact; its default, dynamic ranges per channel, has to be asked for; its ranges are of a whole batch, which is one
sequence in its evaluations; the search is reachable (there it is switched off in every call). Static ranges and
percentiles are not in it; how they are taken is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import TypedDict  # which pydantic wants before Python 3.12

from qfarm.inputs import InputStatistics, Statistic, patterns
from qfarm.layers.rtn import TINY, Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.models.architecture import linear_shapes
from qfarm.quantizer import SEARCH_GRID, SEARCH_NORM, SEARCH_STEPS
from qfarm.recipe import STRICT, ActivationMethod

USUAL_PERCENTILE = 99.9
SiteName = Literal["q", "k", "v", "probs"]


class Format(TypedDict, total=False):
    """How the tensor of one site in attention is rounded; what is left out is as for linear inputs."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    granularity: Literal["token", "tensor", "channel"]  # default token: of a head, for probabilities a query of a head
    group_size: int  # of token: consecutive channels of a head
    clip: Literal["none", "percentile", "mse"]
    percentile: float
    symmetric: bool  # default true for queries, else false; of probabilities, from zero up
    pre_rope: bool  # keys only: before the rotary embedding instead of after it


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Act(ActivationMethod):
    later = frozenset({"sites"})
    version = 2  # 2: dynamic ranges of a tensor or a channel are those of a sequence, not of a batch
    source = "github.com/aiha-lab/qllm-infer (its Quantizer, after github.com/IST-DASLab/gptq)"

    granularity: Literal["token", "tensor", "channel"] = Field("token", description="what shares a scale")
    group_size: int = Field(-1, description="token: consecutive features that share a scale; -1: the whole token")
    mode: Literal["dynamic", "static"] = Field("dynamic", description="ranges of each call, or of calibration text")
    clip: Literal["none", "percentile", "mse"] = Field("none", description="how ranges are narrowed")
    percentile: float | None = Field(None, gt=50, le=100, description="of clip: percentile; default 99.9")
    symmetric: bool = Field(True, description="grid around zero; false: from the smallest to the largest value")
    sites: dict[SiteName, Format] = Field(
        default_factory=dict, description="formats of q, k, v and probs, which it then quantizes too, always dynamic"
    )

    def __post_init__(self) -> None:
        schemes = {"k": "kv_cache", "v": "kv_cache"}
        if self.sites:
            object.__setattr__(self, "claims", self.claims | {schemes.get(site, site) for site in self.sites})
            object.__setattr__(self, "optional", frozenset({"linear_in"}))

    @property
    def causal(self) -> bool:
        by_token = all(form.get("granularity", "token") == "token" for form in self.sites.values())
        return by_token and (self.mode == "static" or self.granularity == "token")

    def statistics(self) -> frozenset[Statistic]:
        if self.mode == "dynamic":
            return frozenset()
        if self.clip == "none":
            return frozenset({Statistic.RANGE})
        return frozenset({Statistic.HISTOGRAM if self.granularity == "tensor" else Statistic.SAMPLE})

    @property
    def cell_version(self) -> int:
        """3: clipped static ranges of a tensor come from all calibration tokens, not from a sample of ordinary ones."""
        whole = self.mode == "static" and self.granularity == "tensor" and self.clip != "none"
        return 3 if whole else self.version

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.mode == "static" and self.granularity == "token":
            return "static ranges are of a tensor or a channel; use granularity: tensor or channel, or mode: dynamic"
        rule = _broken_rule(self.granularity, self.group_size, self.clip, self.percentile)
        return rule or next((found for site in self.sites if (found := self._site_refusal(site))), None)

    def _site_refusal(self, site: SiteName) -> str | None:
        form = self.sites[site]
        granularity, percentile = form.get("granularity", "token"), form.get("percentile")
        rule = _broken_rule(granularity, form.get("group_size", -1), form.get("clip", "none"), percentile)
        if percentile is not None and not 50 < percentile <= 100:
            rule = f"percentile is above 50 and at most 100, not {percentile:g}"
        if "pre_rope" in form and site != "k":
            rule = "pre_rope is of keys"
        if form.get("pre_rope") and granularity == "channel":
            rule = "pre_rope goes with granularity: token or tensor"
        if site == "probs" and "group_size" in form:
            rule = "probabilities have no groups, since a row grows with the text"
        return rule and f"sites: {site}: {rule}"

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for site, form in self.sites.items():
            if width % form.get("group_size", 1):
                return f"sites: {site}: group_size: {form['group_size']} does not divide the {width} numbers of a head"
        if self.group_size == -1:
            return None
        for role, (_, columns) in linear_shapes(config, "model").items():
            if columns % self.group_size:
                return f"group_size: {self.group_size} does not divide the {columns} inputs of {role}"
        return None

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
        if place.site != "linear_in":
            return self._in_attention(place.site, bits)
        grid = ActGrid(bits=bits, symmetric=self.symmetric, clip=self.clip, percentile=self.percentile)
        if self.mode == "dynamic":
            return Dynamic(grid=grid, granularity=self.granularity, group_size=self.group_size)
        low, high = self._calibrated(grid, observed[place])
        return Static(grid=grid, low=low, high=high)

    def _in_attention(self, tensor: str, bits: int) -> Quantizer | None:
        form = next((f for site, f in self.sites.items() if site == ("k" if tensor == "k_pre_rope" else tensor)), None)
        if form is None or (tensor in ("k", "k_pre_rope") and form.get("pre_rope", False) != (tensor == "k_pre_rope")):
            return None
        grid = ActGrid(
            bits=bits,
            symmetric=form.get("symmetric", tensor == "q"),
            clip=form.get("clip", "none"),
            percentile=form.get("percentile"),
        )
        return Dynamic(grid=grid, granularity=form.get("granularity", "token"), group_size=form.get("group_size", -1))

    def _calibrated(self, grid: ActGrid, inputs: InputStatistics) -> tuple[Tensor, Tensor]:
        """Ends of the range, [1] or [features]."""
        whole = self.granularity == "tensor"
        if self.clip == "none":
            assert inputs.low is not None and inputs.high is not None
            if whole:
                return inputs.low.amin(0, keepdim=True), inputs.high.amax(0, keepdim=True)
            return inputs.low, inputs.high
        if whole:
            assert inputs.histogram is not None
            values, counts = patterns(inputs.histogram)
            low, high = grid.range(values[None], counts)
        else:
            assert inputs.sample is not None
            low, high = grid.range(inputs.sample.T)
        return low[:, 0], high[:, 0]


METHOD = Act


def _broken_rule(granularity: str, group_size: int, clip: str, percentile: float | None) -> str | None:
    if percentile is not None and clip != "percentile":
        return "percentile needs clip: percentile"
    if group_size == -1:
        return None
    if group_size < 2:
        return f"group_size is -1 or at least 2, not {group_size}"
    return None if granularity == "token" else "group_size needs granularity: token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActGrid:
    """How values [rows, n] in float32 are rounded, given a range per row."""

    bits: int
    symmetric: bool
    clip: Literal["none", "percentile", "mse"]
    percentile: float | None

    def range(self, values: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ends [rows, 1] of the range, clipped as wanted; counts [n] say how often each value occurs, default once."""
        if self.clip == "percentile":
            return self._percentile(values, counts)
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        return self._search(values, low, high, counts) if self.clip == "mse" else (low, high)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale, and zero point unless symmetric, of ranges."""
        if self.symmetric:
            return (torch.maximum(-low, high) / (2.0 ** (self.bits - 1) - 1)).clamp(min=TINY), None
        low, high, top = low.clamp(max=0), high.clamp(min=0), 2.0**self.bits - 1
        scale = ((high - low) / top).clamp(min=TINY)
        return scale, torch.round(-low / scale).clamp(0, top)

    def round_trip(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Quantize and dequantize; low and high broadcast against values."""
        scale, zero = self.parameters(low, high)
        if zero is None:
            top = 2.0 ** (self.bits - 1) - 1
            return (values / scale).round_().clamp_(-top, top).mul_(scale)
        top = 2.0**self.bits - 1
        return (values / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)

    def _percentile(self, values: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        share = (USUAL_PERCENTILE if self.percentile is None else self.percentile) / 100
        total = values.shape[-1] if counts is None else int(counts.sum())
        # Products such as 0.999 * 1000 come out a hair above the whole number that is meant.
        rank = max(1, math.ceil(share * total - 1e-9))
        if self.symmetric:
            end = _ranked(values.abs(), counts, rank)
            return -end, end
        return -_ranked(-values, counts, rank), _ranked(values, counts, rank)

    def _search(self, values: Tensor, low: Tensor, high: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        best, chosen = torch.full_like(low, torch.inf), torch.ones_like(low)
        for step in range(SEARCH_STEPS):
            shrink = 1 - step / SEARCH_GRID
            error = (self.round_trip(values, low * shrink, high * shrink) - values).abs().pow(SEARCH_NORM)
            total = (error if counts is None else error.double() * counts).sum(-1, keepdim=True).float()
            chosen = torch.where(total < best, shrink, chosen)
            best = torch.minimum(best, total)
        return low * chosen, high * chosen


def _ranked(values: Tensor, counts: Tensor | None, rank: int) -> Tensor:
    """The rank-th smallest of each row, [rows, 1]."""
    if counts is None:
        return values.kthvalue(rank, dim=-1, keepdim=True).values
    ordered = values.sort(dim=-1)
    reached = counts[ordered.indices].cumsum(-1) >= rank
    return ordered.values.gather(-1, reached.int().argmax(-1, keepdim=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Ranges of the tensor at hand; x [sequences, tokens, features], or [tokens, features] of one sequence.

    In attention [sequences, heads, tokens, channels]: a token or a channel is one of a head.
    """

    grid: ActGrid
    granularity: Literal["token", "tensor", "channel"]
    group_size: int

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        values = x.float()
        if self.granularity == "tensor":
            rows = values.reshape(len(x) if x.dim() > 2 else 1, -1)
        elif self.granularity == "channel":
            rows = values.transpose(-1, -2).reshape(-1, x.shape[-2])
        else:
            rows = values.reshape(-1, x.shape[-1] if self.group_size == -1 else self.group_size)
        rounded = self.grid.round_trip(rows, *self.grid.range(rows))
        if self.granularity == "channel":
            rounded = rounded.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2]).transpose(-1, -2)
        return rounded.reshape(x.shape).to(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """A range that was calibrated, [1] for the tensor or [features] for its channels."""

    grid: ActGrid
    low: Tensor
    high: Tensor

    def stored(self) -> tuple[Tensor, ...]:
        scale, zero = self.grid.parameters(self.low, self.high)
        return (scale,) if zero is None else (scale, zero.to(torch.uint8 if self.grid.bits <= 8 else torch.int16))

    def __call__(self, x: Tensor) -> Tensor:
        return self.grid.round_trip(x.float(), self.low.to(x.device), self.high.to(x.device)).to(x.dtype)
