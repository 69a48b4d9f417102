"""Times of matrix products on a GPU, with a cold cache. No GPU was there: `graph` has never run.

    one candidate   a CUDA graph of launches that take turns over copies of the weight, >= 3 L2 / bytes of them and at
                    least two, each launched at least twice: fewer would leave the cache warm
    one sample      the graph's time / its launches, by events on the device; candidates take turns, sample by sample,
                    after half a second of the same as warm-up
    baselines       the library's float16 and bfloat16 products, and a copy of the float16 weight on the device
    drift           the float16 product's median over the last third of its samples / over the first third - 1; beyond
                    3 % either way clocks have changed meanwhile, and nothing of that shape gets a time

Split sums, tables of sums and whatever else a product needs are inside. Before anything is timed, outputs are compared
with the reference; what is out of tolerance gets no time. Weights and inputs are random, never zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qfarm.kernels import ops, reference
from qfarm.kernels.pack import TILE_WORDS, WIDTHS, WORD_BITS, BCQWeight, T16Weight, tile_inputs
from qfarm.kernels.roofline import FORMATS, GROUP, refusal, stored_bytes

BASELINES = {"fp16": torch.float16, "bf16": torch.bfloat16, "copy": torch.float16}
CANDIDATES = (*BASELINES, *(name for name in FORMATS if name not in BASELINES))
# Of the largest output: four times what is shown without a GPU (docs/kernels.md), or four roundings of the output.
TOLERANCES = {torch.float32: 4 * 5e-6, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}
FEWEST_COPIES = 2
TURNS = 2  # of a graph over all copies
SAMPLES = 21
WARM_UP_S = 0.5
DRIFT = 0.03
SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per launch of one product, or of a copy; `error` in words, and no times, where there can be none."""

    form: str
    m: int
    n: int
    k: int
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    samples: int
    error: str | None = None


# -- samples ----------------------------------------------------------------------------------------------------------


def copies_needed(cache_bytes: int, stored: int) -> int:
    """Copies of a weight that no cache holds: three times its size together, and two at least."""
    return max(FEWEST_COPIES, math.ceil(3 * cache_bytes / stored))


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), cuts[0], cuts[3]


def drift(samples: Sequence[float]) -> float:
    """Median of the last third over that of the first third, less one."""
    third = max(1, len(samples) // 3)
    return statistics.median(samples[-third:]) / statistics.median(samples[:third]) - 1


def warm_up(replays: Sequence[Callable[[], float]], clock: Callable[[], float] = time.perf_counter) -> None:
    """Replay in turns until `WARM_UP_S` have passed, so that clocks have risen."""
    start = clock()
    while replays and clock() - start < WARM_UP_S:
        for replay in replays:
            replay()


def interleaved(replays: Sequence[Callable[[], float]], samples: int) -> list[list[float]]:
    """Samples of each replay, taken in turns, so that a machine that slows down slows all of them."""
    found: list[list[float]] = [[] for _ in replays]
    for _ in range(samples):
        for replay, taken in zip(replays, found, strict=True):
            taken.append(replay())
    return found


def timings(m: int, n: int, k: int, taken: Mapping[str, Sequence[float]], wrong: Mapping[str, str]) -> list[Timing]:
    """A timing per candidate, from the samples of those that were timed and the reasons of those that were not."""
    moved = drift(taken["fp16"]) if "fp16" in taken else None
    rejected = None
    if moved is None:
        rejected = "rejected: no float16 product was timed beside it"
    elif abs(moved) > DRIFT:
        rejected = f"rejected: the float16 product beside it drifted by {moved:+.1%}"
    found = []
    for name in (*taken, *wrong):
        error = wrong.get(name, rejected)
        median, low, high = quantiles(taken[name]) if error is None else (None, None, None)
        samples = len(taken.get(name, ()))
        found.append(
            Timing(form=name, m=m, n=n, k=k, median_s=median, p20_s=low, p80_s=high, samples=samples, error=error)
        )
    return sorted(found, key=lambda timing: CANDIDATES.index(timing.form))


# -- a run ------------------------------------------------------------------------------------------------------------


def graph(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """A replay of all calls `TURNS` times over as one CUDA graph -> seconds per launch. Compiles first."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's stubs
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(TURNS):
            for call in calls:
                call()

    def replay() -> float:
        # torch's stubs leave these untyped as well.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        captured.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (TURNS * len(calls))

    return replay


def time_products(
    m: int,
    n: int,
    k: int,
    device: torch.device,
    cache_bytes: int,
    samples: int = SAMPLES,
    replayed: Callable[[Sequence[Callable[[], object]]], Callable[[], float]] = graph,
) -> list[Timing]:
    """x [m, k] times a weight [n, k] in every format and by the baselines, on a device with so large an L2 cache."""
    generator = torch.Generator(device).manual_seed(SEED)
    x = torch.randn(m, k, generator=generator, device=device).half()
    calls, wrong = candidates(x, n, cache_bytes, generator)
    replays = {name: replayed(found) for name, found in calls.items()}
    warm_up(list(replays.values()))
    taken = dict(zip(replays, interleaved(list(replays.values()), samples), strict=True))
    return timings(m, n, k, taken, wrong)


# -- products ---------------------------------------------------------------------------------------------------------


def candidates(
    x: Tensor, n: int, cache_bytes: int, generator: torch.Generator
) -> tuple[dict[str, list[Callable[[], object]]], dict[str, str]]:
    """What is to be timed, a call per copy of a weight, for candidates whose output is right; why others are not."""
    k = x.shape[1]
    calls: dict[str, list[Callable[[], object]]] = {}
    wrong: dict[str, str] = {}
    for name in CANDIDATES:
        form = FORMATS.get(name, FORMATS["fp16"])
        error = refusal(form, k)
        if error is None:
            copies = copies_needed(cache_bytes, stored_bytes(form, n, k))
            products = [product(name, x, n, generator) for _ in range(copies)]
            error = deviation(*products[0]())
        if error is None:
            calls[name] = [functools.partial(call, False) for call in products]
        else:
            wrong[name] = error
    return calls, wrong


def deviation(found: Tensor, expected: Tensor) -> str | None:
    """What is wrong with an output, in words; None within tolerance."""
    limit = TOLERANCES[found.dtype] * float(expected.abs().max())
    error = float((found.double() - expected).abs().max())
    return None if error <= limit else f"wrong: error {error:.3g} above {limit:.3g}"


def product(name: str, x: Tensor, n: int, generator: torch.Generator) -> Callable[..., tuple[Tensor, Tensor]]:
    """A call on a fresh random weight [n, k] -> output and, unless told otherwise, what it should be."""
    weight = random_weight(name, n, x.shape[1], generator)
    if isinstance(weight, Tensor):
        if name == "copy":
            return functools.partial(copy, weight, torch.empty_like(weight))
        x = x.to(weight.dtype)

    def call(compare: bool = True) -> tuple[Tensor, Tensor]:
        found = multiply(x, weight)
        return found, (expected(x, weight) if compare else found)

    return call


def copy(source: Tensor, target: Tensor, compare: bool = True) -> tuple[Tensor, Tensor]:
    """The target, and what it should hold."""
    target.copy_(source)
    return target, (source.double() if compare else source)


def multiply(x: Tensor, weight: Tensor | T16Weight | BCQWeight) -> Tensor:
    """The product as it is timed: the library's, or a kernel's float32 output where one takes so many rows.

    4 bits go to tensor cores, for one row as well; other widths and planes to CUDA cores. The rest is `ops`'s.
    """
    if isinstance(weight, Tensor):
        return x @ weight.T
    if not x.is_cuda:
        return ops.bcq_linear(x, weight) if isinstance(weight, BCQWeight) else ops.linear(x, weight)
    return by_kernel(x, weight)


def by_kernel(x: Tensor, weight: T16Weight | BCQWeight) -> Tensor:
    """The product on a GPU, or in Triton's interpreter."""
    from qfarm.kernels import tri_bcq, tri_weight

    if isinstance(weight, BCQWeight):
        return torch.stack([tri_bcq.gemv(row, weight) for row in x])
    if weight.bits == 4 and len(x) <= ops.SMALL_ROWS:
        return tri_weight.gemm_small(x, weight)
    return tri_weight.gemv(x, weight) if len(x) <= ops.GEMV_ROWS else ops.linear(x, weight)


def expected(x: Tensor, weight: Tensor | T16Weight | BCQWeight) -> Tensor:
    """The product in float64."""
    return x.double() @ weight.double().T if isinstance(weight, Tensor) else reference.linear(x, weight)


def random_weight(name: str, n: int, k: int, generator: torch.Generator) -> Tensor | T16Weight | BCQWeight:
    """What a candidate multiplies with, or copies, on the generator's device."""
    if name in BASELINES:
        return (torch.randn(n, k, generator=generator, device=generator.device) * 0.02).to(BASELINES[name])
    form = FORMATS[name]
    if form.kind == "planes":
        return random_planes(form.bits, n, k, generator)
    return random_tiles(form.bits, n, k, k if form.bits == 8 else GROUP, generator)


def _words(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=generator.device, generator=generator)


def _scales(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, device=generator.device, generator=generator) * 0.01 + 0.002).half()


def random_tiles(bits: int, n: int, k: int, group: int, generator: torch.Generator) -> T16Weight:
    """Any words are codes. Integer zeros with groups, none for whole rows, as `roofline.stored_bytes` counts."""
    padded = -(-k // tile_inputs(bits)) * tile_inputs(bits)
    tiles = [padded * width // (WORD_BITS * TILE_WORDS) for width in WIDTHS[bits]]
    words = tuple(_words((count, n, TILE_WORDS), generator) for count in tiles)
    zero = None
    if group != k:
        zero = torch.randint(0, 2**bits, (k // group, n), device=generator.device, generator=generator).half()
    scale = _scales((k // group, n), generator)
    return T16Weight(bits=bits, columns=k, group=group, words=words, scale=scale, zero=zero, scaled_zero=None)


def random_planes(bits: int, n: int, k: int, generator: torch.Generator) -> BCQWeight:
    """Any words are signs."""
    return BCQWeight(
        columns=k,
        group=GROUP,
        planes=_words((k // WORD_BITS, bits, n), generator),
        alpha=_scales((k // GROUP, bits, n), generator),
        offset=_scales((k // GROUP, n), generator),
    )
