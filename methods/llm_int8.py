"""LLM.int8(): 8-bit products of rows and columns, with the few input columns that hold outliers kept at 16 bits.

    W [N, K], cast to float16    sw_n = max_k |W_nk|    Wq = round(127 W_nk / sw_n)                  once
    x [T, K]    O = {k : some |x_tk| >= threshold}      sx_t = max_k |x_tk| over |x_tk| < threshold  each call
                Xq = round(127 x_tk / sx_t), 0 in columns of O
    y = sx sw^T / 127^2 * (Xq Wq^T) + b  +  x[:, O] (sw Wq[:, O] / 127)^T

(Dettmers et al., arXiv 2208.07339, section 3, and the code of bitsandbytes.) Rounding is half to even, the product of
codes exact: float32 over 1024 columns at a time stays below 2^24, and the parts are added in int32. `mode` chooses
between the two sources:

                        bnb (what qllm-infer measures)          paper
    outlier             |x| >= threshold                        |x| > threshold
    sx                  over all values below the threshold     over columns that are not in O
    weights of O        int8 codes times sw / 127               the original 16-bit ones

Stored: one int8 code a weight and one row maximum in the scale dtype, 8 + 16 / K bits (8 + 32 / K with scale_dtype:
float32, the library's). Maxima are numbers of float16, so float16 holds them exactly. Columns of O store nothing in
mode bnb. In mode paper any column can turn out to be one of O, so that the whole 16-bit weight has to be there and is
what is counted; codes are made from it at each call. The layer holds codes times sw / 127 in the model's dtype, from
which the codes are read again: in float32, float16 and bfloat16 that is without loss.

O depends on all tokens of a call: of other sequences of the batch, of padding (a layer knows no masks), and of later
tokens, so the method says that it is not causal, and results move with the batch size. threshold: 0 takes no column
out, which is causal. The notes of an attempt say how large O was, by
role and for each layer. Weights are always symmetric, whatever the job's
`symmetric`; the head and embeddings stay at 16 bits.

Differences from the library: arithmetic outside the integer product is float32, `half: true` casts where the library
does (x to float16, both partial results too); values beyond 65504 become Inf there. A token whose values are all
outliers, and a row of zeros, give codes 0 (a division by zero there). 1 / 127^2 is 6.200012e-05 (there 6.200124e-05).
`backend: bitsandbytes` runs the library's own operators. Left out: the paper's zero-point variant; padding is not
excluded from O.

Published figures: C4 perplexity of dense 6.7B / 13B models 13.24 / 12.45, float32 13.30 / 12.45, int8 without the
decomposition 14.13 / 16.48 (table 1); LLaMA-3.1-8B-Instruct, WikiText-2 / C4: 7.29 / 10.41 beside 7.24 / 10.34 at 16
bits (README of qllm-infer).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import InvalidInput, NonFinite
from qfarm.inputs import InputStatistics
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.quantized import QuantizedWeight
from qfarm.quantizer import Grid
from qfarm.recipe import STRICT, ActivationMethod, Recipe, WeightSolver

TOP = 127  # the largest code
EXACT_COLUMNS = 1024  # whose sum of products of two codes float32 holds exactly: 1024 * 127^2 < 2^24
EXTRA = "backend: bitsandbytes needs the library; pip install 'qfarm[bitsandbytes]'"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LLMInt8(WeightSolver, ActivationMethod):
    source = "Dettmers et al., NeurIPS 2022, arXiv 2208.07339; github.com/bitsandbytes-foundation/bitsandbytes"
    widths = range(8, 9)
    site_widths = {"linear_in": range(8, 9)}

    threshold: float = Field(
        6.0, ge=0, allow_inf_nan=False, description="|x| from which an input column is an outlier; 0: none is"
    )
    mode: Literal["bnb", "paper"] = Field("bnb", description="rules of the library or of the paper")
    half: bool = Field(False, description="cast inputs and both partial results to float16, as the library does")
    backend: Literal["simulated", "bitsandbytes"] = Field(
        "simulated", description="exact simulation, or the library's operators (mode: bnb, half: true)"
    )

    def packed_refusal(self) -> str | None:
        return "it takes outlier columns out of each call, and there is no packed operator for the rest"

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if group_size != -1:
            return f"every row has one scale: the group size must be -1, not {group_size}"
        if self.backend == "bitsandbytes" and (self.mode != "bnb" or not self.half):
            return "backend: bitsandbytes computes mode: bnb with half: true; set both"
        if self.backend == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
            return EXTRA
        return None

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        if recipe.wrappers:
            return f"its layers multiply int8 codes; {recipe.wrappers[0].name} can stand on rtn or gptq"
        return None

    def symmetric_weights(self, asked: bool) -> bool:
        return True

    @property
    def causal(self) -> bool:
        return self.threshold == 0

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        half = weight.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise NonFinite("the weights hold NaN, Inf or numbers beyond float16")
        if self.mode == "paper":
            return KeptWeight(weight=half)
        codes, absmax = int8_rows(half)
        stored = absmax[:, 0].to(grid.scale_dtype)
        if not torch.equal(stored.float(), absmax[:, 0]):
            raise InvalidInput(
                f"llm_int8: {grid.scale_dtype} does not hold row maxima exactly; scale_dtype: float16 does"
            )
        return Int8Weight(codes=codes.to(torch.int8), absmax=stored)

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        return MixedProduct(threshold=self.threshold, mode=self.mode, half=self.half, backend=self.backend)

    def report(self, quantizers: Mapping[Place, Quantizer]) -> list[str]:
        """How many input columns were outliers: mean over calls, by role and for each layer."""
        shares: dict[str, list[float]] = {}
        counts: dict[str, list[str]] = {}
        for place, product in quantizers.items():
            if isinstance(product, MixedProduct) and product.seen.columns:
                shares.setdefault(place.role, []).append(product.seen.outliers / product.seen.columns)
                count = product.seen.outliers / product.seen.calls
                counts.setdefault(place.role, []).append(f"{place.layer}: {count:.4g}")
        words = [
            f"{role} {_percent(sum(s) / len(s))} (layers {_percent(min(s))}-{_percent(max(s))})"
            for role, s in shares.items()
        ]
        if not words:
            return []
        listed = "; ".join(f"{role} {', '.join(found)}" for role, found in counts.items())
        return [
            f"llm_int8: input columns kept at 16 bits: {', '.join(words)}",
            f"llm_int8: |O|, mean over calls, by layer: {listed}",
        ]


METHOD = LLMInt8


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


@dataclasses.dataclass(kw_only=True)
class Int8Weight:
    """int8 codes and the largest magnitude of each row, as bitsandbytes stores them (`weight`, `SCB`)."""

    codes: Tensor  # int8 [rows, columns]
    absmax: Tensor  # [rows], storage dtype
    solver: str = "llm_int8"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    bits: int = 8
    group_size: int = -1

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.absmax.float()[:, None] / TOP

    def stored_bytes(self) -> int:
        rows, columns = self.shape
        return rows * columns + rows * self.absmax.element_size()

    def packed(self) -> dict[str, Tensor]:
        return {"weight": self.codes, "weight_absmax": self.absmax}

    def row_range(self, start: int, stop: int) -> Int8Weight:
        own = slice(start, stop)
        return dataclasses.replace(self, codes=self.codes[own], absmax=self.absmax[own], notes=dict(self.notes))


@dataclasses.dataclass(kw_only=True)
class KeptWeight:
    """The 16-bit weight, from which codes are made at each call."""

    weight: Tensor  # float16 [rows, columns]
    solver: str = "llm_int8"
    notes: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"stored": "the 16-bit weight, for outlier columns"}
    )
    bits: int = 8
    group_size: int = -1
    payload_bits = 16.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self) -> Tensor:
        return self.weight.float()

    def stored_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def packed(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def row_range(self, start: int, stop: int) -> KeptWeight:
        return dataclasses.replace(self, weight=self.weight[start:stop], notes=dict(self.notes))


@dataclasses.dataclass
class Seen:
    """Input columns that passed through one layer, added up over calls."""

    calls: int = 0
    columns: int = 0
    outliers: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedProduct:
    """x W^T + b by the rules above; W [out, in] is what the layer holds. Results do not depend on what was seen."""

    threshold: float
    mode: Literal["bnb", "paper"] = "bnb"
    half: bool = False
    backend: Literal["simulated", "bitsandbytes"] = "simulated"
    seen: Seen = dataclasses.field(default_factory=Seen, compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer multiplies, in floating point: rounded values, outlier columns as they are. x [..., in]."""
        values = self._read(x)
        parts = decompose(values, self.threshold, self.mode)
        rounded = parts.codes * parts.absmax / TOP
        rounded[:, parts.outliers] = values[:, parts.outliers]
        return rounded.reshape(x.shape).to(x.dtype)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = self._read(x)  # [tokens, in]
        parts = decompose(values, self.threshold, self.mode)
        self.seen.calls += 1
        self.seen.columns += x.shape[-1]
        self.seen.outliers += len(parts.outliers)
        run = self._library if self.backend == "bitsandbytes" else self._simulated
        return run(values, parts, weight, bias).to(x.dtype).reshape(*x.shape[:-1], len(weight))

    def _read(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return flat.to(torch.float16).float() if self.half else flat.float()

    def _simulated(self, values: Tensor, parts: Decomposition, weight: Tensor, bias: Tensor | None) -> Tensor:
        codes, absmax = int8_rows(weight)
        dtype = torch.float16 if self.half else torch.float32
        y = int8_product(parts.codes, codes) * (parts.absmax * absmax.T) / TOP**2
        y = (y if bias is None else y + bias.float()).to(dtype)
        if not len(parts.outliers):
            return y
        wide, columns = values[:, parts.outliers].to(dtype), weight[:, parts.outliers].to(dtype)
        return y + wide @ columns.T

    def _library(self, values: Tensor, parts: Decomposition, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operators of bitsandbytes on the same codes of the weight."""
        try:
            import bitsandbytes
        except ImportError:
            raise InvalidInput(f"llm_int8: {EXTRA}") from None
        codes, absmax = int8_rows(weight)
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights = codes.to(torch.int8), absmax[:, 0].contiguous(), False
        state.is_training = False  # on CPUs, training would multiply in floating point
        bias = None if bias is None else bias.to(torch.float16)
        y: Tensor = bitsandbytes.matmul(
            values.to(torch.float16), state.CB, bias=bias, state=state, threshold=self.threshold
        )
        return y


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Inputs [tokens, columns] as codes, and the columns that are taken out of them."""

    codes: Tensor  # float32 [tokens, columns]: whole numbers within +-127, 0 in outlier columns
    absmax: Tensor  # float32 [tokens, 1]
    outliers: Tensor  # int64 [number of outlier columns], ascending


def decompose(values: Tensor, threshold: float, mode: Literal["bnb", "paper"]) -> Decomposition:
    """values float32 [tokens, columns]; threshold 0 takes no column out. NaN makes its token's absmax NaN."""
    magnitude = values.abs()
    large = magnitude >= threshold if mode == "bnb" else magnitude > threshold
    if threshold == 0:
        large = torch.zeros_like(large)
    columns = large.any(dim=0)
    small = values.masked_fill(large if mode == "bnb" else columns, 0)
    absmax = small.abs().amax(dim=-1, keepdim=True)
    codes = _codes(small, absmax).masked_fill(columns, 0)
    return Decomposition(codes=codes, absmax=absmax, outliers=columns.nonzero()[:, 0])


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] and row maxima [rows, 1], float32. Of a weight that is codes times maximum / 127 already,
    in any of the model's dtypes, it returns these codes: 127 times a unit roundoff of 2^-8 is less than half a step."""
    values = weight.float()
    absmax = values.abs().amax(dim=-1, keepdim=True)
    return _codes(values, absmax), absmax


def _codes(values: Tensor, absmax: Tensor) -> Tensor:
    return torch.round(TOP * values / torch.where(absmax == 0, 1.0, absmax))


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """left [T, K] @ right [N, K]^T for whole numbers within +-127 in float32; exact, int32 [T, N]. K < 133,000."""
    total = torch.zeros(len(left), len(right), dtype=torch.int32, device=left.device)
    for start in range(0, left.shape[1], EXACT_COLUMNS):
        part = slice(start, start + EXACT_COLUMNS)
        # Codes have 7 bits and a sign, so that TF32 reads them exactly as well.
        total += (left[:, part] @ right[:, part].T).to(torch.int32)
    return total
