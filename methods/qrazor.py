"""QRazor: wide integers with one scale first, then per small group only the bits that matter (arXiv 2501.13331).

    1. base integers    q = round(x / s), s = max|x| / (2^(B-1) - 1)    B = 8 for weights, keys, values; 16 elsewhere
    2. razor            per group of g: drop all but r bits below the group's leading one, keep how many were dropped

The mathematics, with rounding and overflow, is qfarm.razor. r is the scheme's width: `w4a8kv4` razors weights and cache
to 4 bits and linear inputs to 8. Every site that the scheme names is razored, so one recipe serves w4a16, w4a8, w4a4,
w4kv4 and w4a4kv4. The job's group size is the razor group of weights, and of the rest unless options say otherwise.

Weights are razored once, groups along the input features. `gptq+qrazor` is GPTQ's column loop on this grid: base scales
come from the untouched weights; a group's flags are found when the loop reaches its first column, or on the untouched
weights where act_order or static_groups tear groups apart (GPTQ's default at group size -1 is act_order). Linear inputs
have one base scale per token, or with `per_tensor` per sequence, which looks at later tokens. Keys and values have one
per token and head, after the rotary embedding or before it (`pre_rope`, instead of after); they are stateless per
token, so that chunks, prefill and decoding store the same.

Stored: weights: r bits per code, F bits of flag per group, scales (`scale_dtype`); cache: the same with a float16 scale
per token and head. F = 3 for B = 8 and r = 4. Payload r + F / g: 4.375, 4.1875, 4.094, 4.047, 4.023 bits at
g = 8 .. 128; scales and padding of words come on top, and count.

Published (README of dnotitia/qllm-infer, LLaMA-3.1-8B-Instruct, WikiText-2 / C4, 16 bit: 7.22 / 10.39): W4A16 g8
7.68 / 11.03, g128 8.34 / 11.96; GPTQ (WikiText) + QRazor g8 7.49 / 10.93; W4A8 g8 7.71 / 11.10; W4A4 g8 8.26 / 11.76;
W4KV4 g8 8.01 / 11.41; W4A4KV4 g8 8.65 / 12.27. GPTQ there: act-order, 128 windows of 2048, `sdr_axis: out`.

Differences from dnotitia/qllm-infer (two versions of its code; the paper's tie rule is not confirmed, `ties` switches
it; the body of the paper was not at hand):
- groups never cross rows; a ragged last group is padded with zeros per row, where the code pads the flat tensor;
- what overflows is floored for every r, as its first version does for r = 4 only; the second lets negatives reach
  -2^(r-1) and is not symmetric in sign;
- base integers are always symmetric, whatever the job's `symmetric` says of uniform grids; its "asymmetric" mode drops
  the zero point and is not offered;
- scales of weights and cache are rounded to their storage dtype before use;
- GPTQ groups lie along input features (`sdr_axis: out` gives its groups of output rows of one column); both stages are
  kept for every column, where a single rounding to s 2^f could differ by one code in rare cases;
- inputs take a scale per token (its published runs: per tensor); `pre_rope` replaces the quantizer after the embedding,
  there it adds one; base scales per tensor for keys and values are not offered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import InvalidInput
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.cache import QuantizedLayer, extend
from qfarm.layers.inject import MakeLayer
from qfarm.layers.packing import pack_codes, unpack_codes
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.models.architecture import linear_shapes
from qfarm.quantizer import Grid
from qfarm.razor import (
    Axis,
    RazorGrid,
    RazorQuantizer,
    RazorWeight,
    Ties,
    base_integers,
    base_scale,
    flag_bits,
    razor,
    spread,
    steps,
)
from qfarm.recipe import STRICT, ActivationMethod, CacheMethod, GridProvider, Recipe

GROUPS = (8, 16, 32, 64, 128)
_NAMED = ", ".join(map(str, GROUPS))
USUAL_GROUP, USUAL_CACHE_GROUP = 32, 8  # where the job names none: the reference code's, and that of its sample script
UNIFORM = {"search": False, "convention": "restricted", "stale_block": None}  # options that mean uniform grids


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QRazor(GridProvider, ActivationMethod, CacheMethod):
    source = "Lee, Choi, Chang, 2025, arXiv 2501.13331; github.com/dnotitia/qllm-infer"
    claims = frozenset({"weight", "linear_in", "kv_cache", "q", "probs"})
    optional = claims
    site_widths = dict.fromkeys(("linear_in", "kv_cache", "q", "probs"), range(2, 9))

    group: int | None = Field(None, description="razor group of weights; default: the job's group size, 32 at -1")
    activation_group: int | None = Field(None, description="of linear inputs, queries, probabilities; default: group")
    cache_group: int | None = Field(None, description="of keys and values; default: the job's group size, 8 at -1")
    weight_base: Literal[8, 16] = Field(8, description="bits of the base integers of weights")
    activation_base: Literal[8, 16] = Field(16, description="of linear inputs, queries, probabilities")
    cache_base: Literal[8, 16] = Field(8, description="of keys and values")
    base_group: int = Field(-1, description="columns that share a base scale of weights, a multiple of group; -1: all")
    per_tensor: bool = Field(False, description="one base scale per sequence at linear inputs; looks at later tokens")
    pre_rope: bool = Field(False, description="razor keys before the rotary embedding instead of after it")
    refit_scale: bool = Field(False, description="refit scales of weights to their codes by least squares")
    sdr_axis: Axis = Field("in", description="groups of weights: input columns, or `out`, output rows of one column")
    ties: Ties = Field("even", description="halves go to the even neighbour, or up")

    def __post_init__(self) -> None:
        for name in ("group", "activation_group", "cache_group"):
            if getattr(self, name) not in (None, *GROUPS):
                raise InvalidInput(f"qrazor: {name}: razor groups are {_NAMED}, got {getattr(self, name)}")

    def packed_refusal(self) -> str | None:
        return "its weights carry a flag per group, which no packed operator reads"

    def resolve(self, group_size: int) -> Self:
        given = None if group_size == -1 else group_size
        group = self.group or given or USUAL_GROUP
        return dataclasses.replace(
            self,
            group=group,
            activation_group=self.activation_group or group,
            cache_group=self.cache_group or given or USUAL_CACHE_GROUP,
        )

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if group_size != -1 and group_size not in GROUPS:
            return f"razor groups are {_NAMED}; the job's group size is {group_size}"
        if group_size != -1 and self.group not in (None, group_size):
            return f"group {self.group} contradicts the job's group size {group_size}; leave one of them out"
        if self.sdr_axis == "out" and (group_size != -1 or self.group is None):
            return "sdr_axis: out groups output rows; take group size -1 and give the option group"
        if self.base_group != -1 and (self.base_group < 1 or self.base_group % self._group(group_size)):
            return f"base_group {self.base_group} is no multiple of the razor group {self._group(group_size)}"
        return None

    def _group(self, group_size: int) -> int:
        group = self.resolve(group_size).group
        assert group is not None
        return group

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        for role, (rows, columns) in linear_shapes(config, "the model").items():
            if self.base_group != -1 and columns % self.base_group:
                return f"base_group {self.base_group} does not divide the {columns} inputs of {role}"
            if self.sdr_axis == "out" and self.group is not None and rows % self.group:
                return f"sdr_axis: out: group {self.group} does not divide the {rows} outputs of {role}"
        return None

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        solver = recipe.solver
        if solver is None or solver == self:
            return None
        given = solver.options()
        for option, usual in UNIFORM.items():
            if given.get(option, usual) != usual:
                return f"{solver.name}'s option {option} is of uniform grids; leave it out beside {self.name}"
        if self.refit_scale:
            return f"refit_scale would undo what {solver.name} made up for; it is for {self.name} alone"
        return None

    def statistics(self) -> frozenset[Statistic]:
        return frozenset()

    def symmetric_weights(self, asked: bool) -> bool:
        return True

    @property
    def causal(self) -> bool:
        return not self.per_tensor

    def provide(self, grid: Grid, role: str = "", head_dim: int = 0) -> RazorGrid:
        return RazorGrid(
            bits=grid.bits,
            group_size=self._group(grid.group_size),
            symmetric=True,
            scale_dtype=grid.scale_dtype,
            base_bits=self.weight_base,
            base_group=self.base_group,
            axis=self.sdr_axis,
            ties=self.ties,
            refit=self.refit_scale,
        )

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> RazorWeight:
        return self.provide(grid).nearest(weight)

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        return RazorQuantizer(
            bits=bits,
            base_bits=self.activation_base,
            group_size=self.activation_group or self._group(-1),
            per_tensor=self.per_tensor and place.site == "linear_in",
            ties=self.ties,
        )

    def cache_layer(self, block: int, bits: int, observed: Observed) -> MakeLayer:
        kind = PreRopeRazorLayer if self.pre_rope else RazorLayer
        group = self.cache_group or USUAL_CACHE_GROUP
        return functools.partial(kind, bits, self.cache_base, group, self.ties)


METHOD = QRazor


class RazorLayer(QuantizedLayer):
    """Packed sign-magnitude codes, packed flags of all heads of a token, a float16 scale per token and head."""

    is_croppable = True

    def __init__(self, bits: int, base_bits: int, group_size: int, ties: Ties = "even") -> None:
        super().__init__()
        self.bits, self.base_bits, self.group_size, self.ties = bits, base_bits, group_size, ties

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.heads, self.width = keys.shape[1], keys.shape[-1]
        flags = []
        for name, tensor in (("k", keys.float()), ("v", values.float())):
            scale = base_scale(tensor.abs().amax(dim=-1, keepdim=True), self.base_bits, torch.float16)
            codes, found = razor(base_integers(tensor, scale, self.base_bits), self.bits, self.group_size, self.ties)
            # NaN has no code: it stays in the scale.
            signed = codes.nan_to_num().abs().to(torch.uint8) | ((codes < 0).to(torch.uint8) << (self.bits - 1))
            extend(self.state, {f"{name}_codes": pack_codes(signed, self.bits), f"{name}_scale": scale.half()})
            flags.append(found.to(torch.uint8).transpose(1, 2).flatten(2))  # [batch, tokens, heads x groups]
        width = flag_bits(self.base_bits, self.bits)
        if width:
            extend(self.state, {"flags": pack_codes(torch.cat(flags, dim=-1), width)[:, None]})

    def read(self) -> tuple[Tensor, Tensor]:
        groups = -(-self.width // self.group_size)
        width, count = flag_bits(self.base_bits, self.bits), 2 * self.heads * groups
        if width:
            flags = unpack_codes(self.state["flags"][:, 0], width, count)  # [batch, tokens, count]
        else:
            flags = torch.zeros(*self.state["k_scale"][:, 0, :, 0].shape, count, device=self.state["k_scale"].device)
        both = flags.int().reshape(*flags.shape[:2], 2, self.heads, groups).permute(2, 0, 3, 1, 4)
        keys, values = (self._dequantize(name, part) for name, part in zip("kv", both, strict=True))
        return keys, values

    def _dequantize(self, name: str, flags: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim], float32; flags [batch, heads, tokens, groups]."""
        signed = unpack_codes(self.state[f"{name}_codes"], self.bits, self.width).int()
        sign = 1 << (self.bits - 1)
        codes = torch.where(signed >= sign, sign - signed, signed).float()
        return codes * spread(steps(flags), self.group_size, self.width) * self.state[f"{name}_scale"].float()


class PreRopeRazorLayer(RazorLayer):
    """The same for keys as they are before the rotary embedding."""

    pre_rope = True
