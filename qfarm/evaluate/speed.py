"""Speed: how fast a packed cell reads a prompt and generates, and what memory that takes, on the machine it is run on.

Random token ids of a fixed seed are the prompt, since a forward pass takes as long for any of them. Each repeat is one
generation with a fresh KV cache:

    first_token_s            prompt read, head applied to its last position, the most probable token chosen
    prefill_tokens_per_s     tokens of all prompts over that time
    decode_tokens_per_s      tokens after the first over the time after the first, one forward pass for each

Values are medians over the repeats, after `warmup` repeats that are thrown away; `_p20` and `_p80` are quantiles
(linear between ranks), and the interval of a median, from six repeats on, is that of order statistics: it covers the
median of such runs with 95 % at the least, as far as repeats are independent. Beside times:

    weight_bytes    all parameters as this run holds them: the operators' tensors, the rest in the model's dtype
    kv_bytes        what the KV cache stores at the end, metadata included; the last token is not written to it
    peak_bytes      the process's largest resident memory meanwhile (GPU: allocated). It holds more than the cell:
                    originals are kept for other cells

The machine (device, threads, version of torch) stands in the row's protocol, and rows of different machines stand in
different tables: times are compared on one machine, and a CPU's say nothing of a GPU. Simulated cells have no speed of
their own, so this is measured in packed runs alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.evaluate import Evaluator, Result
from qfarm.layers.cache import QuantizedLayer
from qfarm.layers.packed_run import weight_bytes
from qfarm.models.load import LoadedModel
from qfarm.models.past import cache_keyword, returned_cache
from qfarm.recipe import STRICT
from qfarm.record import Metric

if TYPE_CHECKING:
    from qfarm.worker import Session

now = time.perf_counter
LEVEL = 0.05  # an interval misses the median no more often


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Speed(Evaluator):
    runs = ("packed",)
    timed = True

    prompt: int = Field(128, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(32, ge=2, description="generated after each prompt, the first included")
    batch: int = Field(1, ge=1, description="prompts at once")
    repeats: int = Field(7, ge=1)
    warmup: int = Field(1, ge=0, description="repeats before those that count")

    @property
    def label(self) -> str:
        return f"speed {self.prompt}+{self.new_tokens}" + (f" batch {self.batch}" if self.batch > 1 else "")

    @property
    def window(self) -> int:
        return self.prompt + self.new_tokens

    def tokens(self) -> int:
        return self.batch * self.window * (self.repeats + self.warmup)

    def reading_cache(self) -> dict[str, Any]:
        """The prompt is read in full precision and stored quantized, as deployed caches do."""
        return {"prefill": "full", "chunk": None}

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        loaded = session.loaded
        vocabulary = loaded.model.get_input_embeddings().num_embeddings
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (self.batch, self.prompt), generator=draw).to(loaded.device)
        session.start_peak()
        timings: list[Timing] = []
        for index in range(self.warmup + self.repeats):
            timing = generate(loaded, ids, self.new_tokens)
            timings += [timing] if index >= self.warmup else []
            progress(index + 1, self.warmup + self.repeats)
        sizes = {
            "weight_bytes": weight_bytes(loaded, session.packed),
            "kv_bytes": timings[-1].kv_bytes,
            "peak_bytes": session.peak_bytes(),
        }
        return Result(metrics=(*self._times(timings), *_sizes(sizes, self.repeats)), documents=())

    def _times(self, timings: Sequence[Timing]) -> Iterator[Metric]:
        later = self.batch * (self.new_tokens - 1)
        yield from _spread("decode_tokens_per_s", "tokens/s", "higher", [later / one.decode_s for one in timings])
        read = self.batch * self.prompt
        yield from _spread("prefill_tokens_per_s", "tokens/s", "higher", [read / one.first_s for one in timings])
        yield from _spread("first_token_s", "seconds", "lower", [one.first_s for one in timings])


EVALUATOR = Speed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One generation."""

    first_s: float  # until the first new token
    decode_s: float  # from there to the last
    kv_bytes: int  # stored in the cache at the end


@torch.no_grad()
def generate(loaded: LoadedModel, ids: Tensor, new_tokens: int) -> Timing:
    """Greedy tokens after prompts [batch, tokens], with the cache that the model itself returns. Raises NonFinite."""
    body, past = loaded.model.base_model, None
    keyword = cache_keyword(body)
    step = ids
    marks = [_mark(loaded.device)]
    for index in range(new_tokens):
        out = body(input_ids=step, use_cache=True, **{keyword: past})
        logits = loaded.head(out.last_hidden_state[:, -1])
        past, step = returned_cache(out), logits.argmax(-1, keepdim=True)
        if index in (0, new_tokens - 1):
            marks.append(_mark(loaded.device))
    if not bool(torch.isfinite(logits).all()):
        raise NonFinite(f"speed: a logit of new token {new_tokens - 1} is not finite")
    return Timing(first_s=marks[1] - marks[0], decode_s=marks[2] - marks[1], kv_bytes=cache_bytes(past))


def _mark(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now()


def cache_bytes(cache: Any) -> int:
    """Bytes that a KV cache stores, quantized or not."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            total += layer.stored_bytes()
        else:
            total += sum(part.numel() * part.element_size() for part in (layer.keys, layer.values))
    return total


def _spread(name: str, unit: str, better: str, values: Sequence[float]) -> Iterator[Metric]:
    """The median with its interval, and two quantiles."""
    low, high = median_interval(values)
    n = len(values)
    yield Metric(metric=name, value=float(np.median(values)), unit=unit, better=better, n=n, low=low, high=high)
    for share in (20, 80):
        value = float(np.percentile(values, share))
        yield Metric(metric=f"{name}_p{share}", value=value, unit=unit, better=better, n=n)


def median_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The narrowest pair of order statistics, as far from one end as from the other, between which the median of the
    values' distribution lies with 95 %; None where not even the extremes are such."""
    n, ordered = len(values), sorted(values)
    outside, rank = 0.0, -1
    while (outside := outside + 2 * math.comb(n, rank + 1) / 2**n) <= LEVEL:
        rank += 1
    return (None, None) if rank < 0 else (ordered[rank], ordered[n - 1 - rank])


def _sizes(sizes: dict[str, int | None], n: int) -> Iterator[Metric]:
    for name, size in sizes.items():
        if size is not None:
            yield Metric(metric=name, value=float(size), unit="bytes", better="lower", n=n)
