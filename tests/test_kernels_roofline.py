"""The model of kernels' times against a table worked out by hand, and the benchmark that shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qfarm.bench import kernels as bench
from qfarm.bench.show_kernels import render_kernels
from qfarm.errors import InvalidInput
from qfarm.kernels.bench import copies_needed, interleaved, quantiles, random_planes, random_tiles
from qfarm.kernels.pack import BCQWeight, T16Weight
from qfarm.kernels.roofline import FORMATS, GPUS, SHAPES, predict, stored_bytes

# us on an A100 at 100 % of its bandwidth / goal, of (n, k), M = 1.
# fp16: 134.3 MB / 2,039 GB/s = 65.8; / 0.80 + 2 = 84.3.
# w3: 67.1 M weights * 5.82 / (108 * 128 * 1.41 GHz) = 20.0; / 0.90 + 2 = 24.3, above 13.4 / 0.80 + 2.
BY_HAND = {
    ("fp16", 4096, 16384): (65.8, 84.3),
    ("w8", 4096, 16384): (32.9, 43.2),
    ("w4", 4096, 16384): (17.5, 23.9),
    ("w3", 4096, 16384): (13.4, 24.3),
    ("bcq4", 4096, 16384): (19.0, 26.4),
    ("bcq3", 4096, 16384): (14.4, 20.3),
    ("fp16", 12288, 49152): (593, 743),
    ("w4", 12288, 49152): (157, 199),
    ("w3", 12288, 49152): (120, 202),
    ("bcq3", 12288, 49152): (130, 166.6),
}


@pytest.mark.parametrize(("name", "n", "k"), BY_HAND)
def test_the_model_gives_the_tables_figures(name: str, n: int, k: int) -> None:
    found = predict(GPUS["a100"], FORMATS[name], 1, n, k)
    roofline, goal = BY_HAND[name, n, k]
    assert found.memory_s * 1e6 == pytest.approx(roofline, rel=8e-3)
    assert found.goal_s * 1e6 == pytest.approx(goal, rel=1e-2)


def test_what_decides() -> None:
    """3 bits are bound by instructions on an A100, not on a card with little bandwidth; many rows by tensor cores."""
    assert predict(GPUS["a100"], FORMATS["w3"], 1, 4096, 16384).limit == "issue"
    assert predict(GPUS["rtx4090"], FORMATS["w3"], 1, 4096, 16384).limit == "memory"
    assert predict(GPUS["a100"], FORMATS["fp16"], 4096, 4096, 4096).limit == "matrix"


def test_the_gain_at_one_row_is_that_of_the_bytes() -> None:
    bits = {name: stored_bytes(form, 4096, 16384) * 8 / (4096 * 16384) for name, form in FORMATS.items()}
    assert bits == pytest.approx({"fp16": 16, "w8": 8, "w4": 4.25, "w3": 3.25, "bcq4": 4.625, "bcq3": 3.5}, abs=2e-3)


def test_the_shapes_are_those_of_the_table() -> None:
    assert SHAPES[0] == (512, 2048) and SHAPES[-1] == (12288, 49152) and all(4 * n == k for n, k in SHAPES)


# -- the benchmark's own arithmetic -----------------------------------------------------------------------------------


def test_copies_leave_no_cache_warm() -> None:
    assert copies_needed(40 << 20, 1 << 20) == 120
    assert copies_needed(40 << 20, 100 << 20) == 2  # one copy alone would be read while it is still there


def test_samples_take_turns() -> None:
    order: list[str] = []

    def replay(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))

    assert interleaved([replay("a"), replay("b")], 3) == [[1, 3, 5], [2, 4, 6]]
    assert order == ["a", "b"] * 3


def test_quantiles() -> None:
    assert quantiles([5.0, 1, 2, 3, 4, 6]) == pytest.approx((3.5, 2, 5))


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.kind != "dense"])
def test_what_is_timed_has_the_bytes_that_are_counted(name: str) -> None:
    form, generator = FORMATS[name], torch.Generator().manual_seed(0)
    if form.kind == "planes":
        weight: BCQWeight | T16Weight = random_planes(form.bits, 64, 1024, generator)
    else:
        weight = random_tiles(form.bits, 64, 1024, 1024 if form.bits == 8 else 128, generator)
    assert weight.nbytes == stored_bytes(form, 64, 1024)
    assert weight.dequantize().shape == (64, 1024) and bool(weight.dequantize().isfinite().all())


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: kernels would be timed")
def test_without_a_gpu_the_first_line_says_so() -> None:
    report = bench.run(bench.Settings(gpus=("a100",)))
    lines = render_kernels(report, 100).splitlines()
    assert lines[0].startswith("No CUDA or ROCm device found: no kernel was timed.")
    assert "predicted for a100, not measured: one row of inputs, groups of 128" in lines
    [row] = [line.split() for line in lines if line.startswith("4096 x 16384") and " w4 " in line]
    assert row[3:] == ["w4", "35.7", "17.5", "23.9", "3.53", "memory"]
    assert report.measured == () and {row.kind for row in report.predicted} == {"predicted"}
    assert len(report.predicted) == len(SHAPES) * len(FORMATS)


def test_unknown_gpus_and_targets_are_refused() -> None:
    with pytest.raises(InvalidInput, match='--gpus: unknown "v100": expected some of a100, h100'):
        bench.run(bench.Settings(gpus=("v100",)))
    pytest.importorskip("triton")
    with pytest.raises(InvalidInput, match='--compile: unknown "sm_70": expected some of sm_80'):
        bench.compile_all(("sm_70",))
