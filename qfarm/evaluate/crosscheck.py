"""Crosscheck: whether a packed run computes what the simulation does, before anything else is measured of it.

A few windows are read with both. What may differ is rounding: the operators of a packed run keep scales in the
model's dtype, multiply codes instead of rounded weights, and add up in another order (`qfarm.layers.products`). How
much rounding does to this very model on this very text is measured, not assumed: in the simulation every quantized
weight is moved by one unit in the last place of the model's dtype, up or down by a coin. That is twice the largest
error of rounding one weight to the dtype, 3.5 times the usual one (sqrt(12)).

    logits    rms over tokens and vocabulary of packed minus simulated, the mean of a token taken out (softmax does not
              see it), at most `ALLOWED` times the rms of moved minus simulated
    layers    the same of each linear layer's output, on the inputs of the simulation; rounding the output by one unit
              is added to what the moved weights do
    cache     where kernels read the KV cache: outputs of attention over packed keys and values minus those over the
              same ones dequantized to float32, rms, as a share of the latter's; a few tokens read one at a time, behind
              as many of the text (repeated, if it is shorter) as leave some in every kind of storage. At most
              `CACHE_ALLOWED`: keys rounded to float16 move a score of 16 by less than 0.01, and with it a probability
              by 1 %; a wrong group of codes or scales moves outputs by a tenth and more

Why `ALLOWED` is 4: of the usual errors scales and weights have 0.3 units each, scale times zero of a 4-bit code up to
0.6 where it counts eight scales beside a weight of four, inputs 0.3: together less than 1 unit, if their signs differ.
Those of a group's zero have one sign, so that inputs with a mean add them up, by sqrt(group) at the most. A wrong code,
scale or zero moves a layer's output by a tenth of itself and more, dozens of units of bfloat16. A mistake in one layer
may drown in the logits of a deep model; that is what the layers are for.

Beyond the bound the attempt ends with Disagreement, and none of the cell's packed evaluations is run.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from qfarm import divergence
from qfarm.errors import Disagreement, NonFinite
from qfarm.evaluate import Result, TextEvaluator
from qfarm.layers.linear import QuantLinear
from qfarm.layers.packed_attention import PackedAttention
from qfarm.layers.packed_run import PackedModel
from qfarm.models.load import LoadedModel
from qfarm.models.past import cache_keyword, returned_cache
from qfarm.recipe import STRICT
from qfarm.record import Metric
from qfarm.text import public_name, reference

if TYPE_CHECKING:
    from qfarm.worker import Session

ALLOWED = 4.0  # times what one unit in the last place of the weights does
CACHE_ALLOWED = 0.03  # of attention's output (an unpublished value)
STEPS = 4  # tokens read one at a time


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Crosscheck(TextEvaluator):
    runs = ("packed",)
    gate = True

    text: Annotated[str, BeforeValidator(reference)] = Field("python-docs", description="as of perplexity")
    length: int = Field(128, ge=2, description="tokens per window")
    windows: int = Field(2, ge=1, description="the first so many windows")

    @property
    def label(self) -> str:
        return f"crosscheck {public_name(self.text)} {self.length} x{self.windows}"

    def tokens(self) -> int:
        return 4 * self.length * self.windows

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        loaded, packed = session.loaded, session.packed
        assert packed is not None
        ids = session.windows(self.text, self.length, self.windows).ids
        with packed.running(False):
            with loaded.temporary():
                layers = Layers(loaded, packed)
                simulated = _logits(loaded, ids)
            progress(1, 3)
            with loaded.temporary():
                for index, name in enumerate(packed.layers):
                    linear = loaded.model.get_submodule(name)
                    loaded.replace_weight(linear, linear.weight + one_unit(linear.weight, index))
                moved = _logits(loaded, ids)
            progress(2, 3)
        found = _logits(loaded, ids)
        progress(3, 3)
        figures = compared(simulated, found, moved) | layers.worst()
        if packed.attention is not None:
            figures |= self._cache(session, packed.attention, ids)
        self._judge(figures, layers, str(loaded.dtype).removeprefix("torch."))
        units = {"logit_difference": "logits", "logit_rounding": "logits", "packed_kl": "nats per token"}
        units |= {"packed_agreement": "fraction of tokens", "worst_layer": "times rounding"}
        units |= {"cache_difference": "share of the output"}
        counts = {"cache_difference": STEPS}
        better = {"packed_agreement": "higher", "logit_rounding": "none"}
        return Result(
            metrics=tuple(
                Metric(
                    metric=name,
                    value=value,
                    unit=units[name],
                    better=better.get(name, "lower"),
                    n=counts.get(name, len(ids)),
                )
                for name, value in figures.items()
            ),
            documents=(),
        )

    def _cache(self, session: Session, attention: PackedAttention, ids: Tensor) -> dict[str, float]:
        """The largest difference of a block's attention, with a past that `ids` [windows, length] make up."""
        loaded = session.loaded
        past = max(make().words_from for make in loaded.cache_layers)
        limit = loaded.model.config.max_position_embeddings
        if past + STEPS > limit:
            session.note(f"{self.label}: the packed KV cache is not compared: {past + STEPS} tokens of at most {limit}")
            return {}
        text = ids.flatten().repeat(-(-(past + STEPS) // ids.numel()))[: past + STEPS]
        with attention.compared() as differences:
            _read_steps(loaded, text, past)
        if not differences:
            raise Disagreement(f"{self.label}: attention did not read the packed KV cache that it was given")
        return {"cache_difference": max(differences, key=_nan_last)}

    def _judge(self, figures: dict[str, float], layers: Layers, dtype: str) -> None:
        """Raises Disagreement beyond the bound, NonFinite where there is nothing to compare."""
        if not all(map(math.isfinite, figures.values())):
            raise NonFinite(f"{self.label}: a logit, a layer's or attention's output is not finite: {figures}")
        unit = f"moving the weights by one unit in the last place of {dtype}"
        worst = figures.get("worst_layer", 0.0)
        if worst > ALLOWED:
            raise Disagreement(
                f"{self.label}: {layers.name}: packed and simulated output differ by {worst:.3g} times what {unit} "
                f"does, at most {ALLOWED:g} is rounding ({layers.path})"
            )
        difference, rounding = figures["logit_difference"], figures["logit_rounding"]
        if difference > ALLOWED * rounding:
            raise Disagreement(
                f"{self.label}: packed and simulated logits differ by {difference:.3g} (rms), {unit} does "
                f"{rounding:.3g}, at most {ALLOWED:g} times that is rounding; worst layer {layers.name or 'none'}"
            )
        apart = figures.get("cache_difference", 0.0)
        if apart > CACHE_ALLOWED:
            raise Disagreement(
                f"{self.label}: attention over packed keys and values differs by {apart:.3g} of itself from that over "
                f"the same ones dequantized; at most {CACHE_ALLOWED:g} is rounding"
            )


EVALUATOR = Crosscheck


def one_unit(weight: Tensor, seed: int) -> Tensor:
    """One unit in the last place of each weight [out, in], in its dtype, with random signs; 0 for 0."""
    draw = torch.Generator(weight.device).manual_seed(seed)  # so other signs on another device
    sign = torch.randint(0, 2, weight.shape, generator=draw, device=weight.device) * 2 - 1
    exponent = torch.frexp(weight.float()).exponent  # |w| in [2^(e-1), 2^e)
    unit = torch.finfo(weight.dtype).eps * torch.exp2((exponent - 1).float())
    return (sign * unit * (weight != 0)).to(weight.dtype)


def compared(simulated: Tensor, packed: Tensor, moved: Tensor) -> dict[str, float]:
    """Figures of logits [tokens, vocabulary], float32."""
    centred = [logits - logits.mean(-1, keepdim=True) for logits in (simulated, packed, moved)]
    top = simulated.argmax(-1)
    return {
        "logit_difference": _rms(centred[1] - centred[0]),
        "logit_rounding": _rms(centred[2] - centred[0]),
        "packed_kl": float(divergence.score(packed, top, simulated)["kl"].mean()),
        "packed_agreement": float((packed.argmax(-1) == top).float().mean()),
    }


class Layers:
    """Compares each packed layer with the simulated one on the inputs that the simulation feeds it."""

    def __init__(self, loaded: LoadedModel, packed: PackedModel) -> None:
        """The simulation runs; hooks stay until what encloses them is undone."""
        self.packed = packed
        self._sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        self.name, self.path = "", ""
        for index, name in enumerate(packed.layers):
            linear = loaded.model.get_submodule(name)

            def compare(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name, index: int = index
            ) -> None:
                assert isinstance(module, nn.Linear)
                # Drawn again in each window: kept, all of them would be the model once more.
                self._add(name, module, args[0], output, one_unit(module.weight, index))

            loaded.on_restore(linear.register_forward_hook(compare).remove)

    def _add(self, name: str, module: nn.Module, x: Tensor, output: Tensor, unit: Tensor) -> None:
        rounded = module.quantize(x) if isinstance(module, QuantLinear) else x
        difference = _rms(self.packed.layers[name].forward(x).float() - output.float())
        weights, last = _rms(nn.functional.linear(rounded, unit)), torch.finfo(output.dtype).eps * _rms(output)
        sums = self._sums[name]
        sums[0] += difference**2
        sums[1] += weights**2 + last**2

    def worst(self) -> dict[str, float]:
        """The largest ratio of all layers; none where no layer is packed."""
        ratios = {
            name: math.sqrt(difference / rounding) if difference else 0.0
            for name, (difference, rounding) in self._sums.items()
        }
        if not ratios:
            return {}
        self.name = max(ratios, key=lambda name: _nan_last(ratios[name]))
        self.path = self.packed.layers[self.name].product.path
        return {"worst_layer": ratios[self.name]}


def _logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """[tokens, vocabulary] float32 of windows [windows, length], read one at a time."""
    return torch.cat(list(_each(loaded, ids)))


def _each(loaded: LoadedModel, ids: Tensor) -> Iterator[Tensor]:
    for window in ids:
        yield loaded.head(loaded.body(window[None].to(loaded.device))[0]).float()


def _read_steps(loaded: LoadedModel, text: Tensor, past: int) -> None:
    """Read the first `past` tokens [tokens] at once and the others one at a time."""
    body = loaded.model.base_model
    keyword, cache = cache_keyword(body), None
    ids = text.to(loaded.device)[None]
    for step in (ids[:, :past], *(ids[:, at : at + 1] for at in range(past, ids.shape[1]))):
        cache = returned_cache(body(input_ids=step, use_cache=True, **{keyword: cache}))


def _nan_last(value: float) -> tuple[bool, float]:
    """A key by which NaN is the largest."""
    return math.isnan(value), value


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
