"""Times of matrix products on a GPU, with a cold cache. It has never run: no GPU was there.

    one candidate   a CUDA graph of launches that take turns over copies of the weight, >= 3 L2 / bytes of them and at
                    least two, each launched at least twice: fewer would leave the cache warm
    one sample      the graph's time / its launches, by events on the device; candidates take turns, sample by sample

Split sums, tables of sums and whatever else a product needs are inside. Before anything is timed, outputs are compared
with the reference; what is out of tolerance gets no time. Weights and inputs are random, never zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qfarm.kernels import reference
from qfarm.kernels.pack import TILE_WORDS, WIDTHS, WORD_BITS, BCQWeight, T16Weight
from qfarm.kernels.roofline import FORMATS, GROUP, stored_bytes

TOLERANCE = 4 * 5e-6  # of the largest output, on a GPU (docs/kernels.md)
HALF_TOLERANCE = 2e-3  # of the library's float16 product, whose output is rounded to it
FEWEST_COPIES = 2
TURNS = 2  # of a graph over all copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per launch of one product; `error` in words, and no times, where its output was wrong."""

    form: str
    m: int
    n: int
    k: int
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    samples: int
    error: str | None = None


def copies_needed(cache_bytes: int, stored: int) -> int:
    """Copies of a weight that no cache holds: three times its size together, and two at least."""
    return max(FEWEST_COPIES, math.ceil(3 * cache_bytes / stored))


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), cuts[0], cuts[3]


def interleaved(replays: Sequence[Callable[[], float]], samples: int) -> list[list[float]]:
    """Samples of each replay, taken in turns, so that a machine that slows down slows all of them."""
    found: list[list[float]] = [[] for _ in replays]
    for _ in range(samples):
        for replay, taken in zip(replays, found, strict=True):
            taken.append(replay())
    return found


def time_products(n: int, k: int, names: Sequence[str], samples: int = 21) -> list[Timing]:
    """x [1, k] times a weight [n, k] in each of these formats (`roofline.FORMATS`), on the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)
    cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    x = torch.randn(1, k, generator=generator, device=device).half()
    wrong: dict[str, str] = {}
    replays: dict[str, Callable[[], float]] = {}
    for name in names:
        copies = copies_needed(cache_bytes, stored_bytes(FORMATS[name], n, k))
        calls = [product(name, x, n, k, generator) for _ in range(copies)]
        found, expected = calls[0]()
        limit = (HALF_TOLERANCE if name == "fp16" else TOLERANCE) * float(expected.abs().max())
        error = float((found.double() - expected).abs().max())
        if not error <= limit:
            wrong[name] = f"error {error:.3g} above {limit:.3g}"
            continue
        replays[name] = graph([functools.partial(call, False) for call in calls])
    taken = dict(zip(replays, interleaved(list(replays.values()), samples), strict=True))
    timings = []
    for name in names:
        middle: tuple[float | None, float | None, float | None] = (None, None, None)
        if name in taken:
            middle = quantiles(taken[name])
        timings.append(
            Timing(
                form=name,
                m=1,
                n=n,
                k=k,
                median_s=middle[0],
                p20_s=middle[1],
                p80_s=middle[2],
                samples=len(taken.get(name, ())),
                error=wrong.get(name),
            )
        )
    return timings


def graph(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """A replay of all calls `TURNS` times over -> seconds per launch. Compiles and warms up first."""
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


def product(name: str, x: Tensor, n: int, k: int, generator: torch.Generator) -> Callable[..., tuple[Tensor, Tensor]]:
    """A call on a fresh random weight -> output and, unless told otherwise, what it should be."""
    form = FORMATS[name]
    weight: Tensor | T16Weight | BCQWeight
    if form.kind == "dense":
        weight = torch.randn(n, k, generator=generator, device=x.device).half() * 0.02
    elif form.kind == "planes":
        weight = random_planes(form.bits, n, k, generator)
    else:
        weight = random_tiles(form.bits, n, k, k if form.bits == 8 else GROUP, generator)

    def call(compare: bool = True) -> tuple[Tensor, Tensor]:
        found = multiply(x, weight)
        return found, (expected(x, weight) if compare else found)

    return call


def multiply(x: Tensor, weight: Tensor | T16Weight | BCQWeight) -> Tensor:
    """The product as it is timed: 4 bits on tensor cores, others on CUDA cores, float16 by the library."""
    if isinstance(weight, Tensor):
        return x @ weight.T
    from qfarm.kernels import tri_bcq, tri_weight

    if isinstance(weight, BCQWeight):
        return tri_bcq.gemv(x[0], weight)[None]
    return tri_weight.gemm_small(x, weight) if weight.bits == 4 else tri_weight.gemv(x, weight)


def expected(x: Tensor, weight: Tensor | T16Weight | BCQWeight) -> Tensor:
    """The product in float64."""
    return x.double() @ weight.double().T if isinstance(weight, Tensor) else reference.linear(x, weight)


def _words(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=generator.device, generator=generator)


def _scales(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, device=generator.device, generator=generator) * 0.01 + 0.002).half()


def random_tiles(bits: int, n: int, k: int, group: int, generator: torch.Generator) -> T16Weight:
    """Any words are codes. Integer zeros with groups, none for whole rows, as `roofline.stored_bytes` counts."""
    words = tuple(_words((k * width // (WORD_BITS * TILE_WORDS), n, TILE_WORDS), generator) for width in WIDTHS[bits])
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
