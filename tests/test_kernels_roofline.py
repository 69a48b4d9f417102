"""The model of kernels' times against a table worked out by hand."""

from __future__ import annotations

import pytest

from qfarm.kernels.roofline import FORMATS, GPUS, SHAPES, predict, profile, refusal, stored_bytes

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


# The same of (m, n, k) for several rows. What is moved includes 32 inputs of 16,384 and 32 outputs of 4,096 bytes.
# w3, 4 rows: four passes of 20.0 / 0.90 each. w4, 16 rows: one pass. w8, 16 rows: the float16 weight is written and
# read, (67.1 + 0.7 + 268.4) MB / 2,039 GB/s / 0.80, and launched twice. bcq3, 16 rows: 16 launches of 16.45 / 0.90.
SEVERAL_ROWS = {
    ("fp16", 16): (66.2, 84.7),
    ("w3", 4): (13.45, 91.0),
    ("w4", 16): (17.8, 24.3),
    ("w8", 16): (33.3, 210.1),
    ("bcq3", 16): (14.7, 324.5),
}


@pytest.mark.parametrize(("name", "m"), SEVERAL_ROWS)
def test_several_rows_of_inputs(name: str, m: int) -> None:
    found = predict(GPUS["a100"], FORMATS[name], m, 4096, 16384)
    assert (found.memory_s * 1e6, found.goal_s * 1e6) == pytest.approx(SEVERAL_ROWS[name, m], rel=3e-3)


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


def test_devices_go_by_their_whole_name() -> None:
    """An A100 of 40 GB or on PCIe, or an A10G, has another bandwidth."""
    assert {name: profile(gpu.device) for name, gpu in GPUS.items()} == {name: name for name in GPUS}
    assert profile("NVIDIA A100-SXM4-40GB") is None and profile("NVIDIA A10G") is None


def test_groups_must_divide_the_inputs() -> None:
    refused = {name for name, form in FORMATS.items() if refusal(form, 576)}
    assert refused == {"w4", "w3", "bcq4", "bcq3"}  # 8 bits have a scale per row
    assert refusal(FORMATS["w4"], 576) == "groups of 128 do not divide 576 inputs"
    assert not any(refusal(form, 640) for form in FORMATS.values())
