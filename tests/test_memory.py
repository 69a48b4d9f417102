"""Memory: the bound of a cell against sums by hand, and against what a cell really allocates."""

from __future__ import annotations

import dataclasses

import pytest

from qfarm import memory
from qfarm.matrix import Cell
from qfarm.memory import Arrangement, arrange, needs
from tests.job_example import CONFIG, FACTS, changed, matrix

H, M, BLOCKS = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"]
BLOCK = 4 * H * H + 3 * H * M
TOKENS = 4 * 32


def cells(**job: str) -> tuple[Cell, Cell, Cell]:
    baseline, rtn, gptq = matrix(changed(**job)).cells
    return baseline, rtn, gptq


def test_needs_are_sums_over_shapes() -> None:
    *_, gptq = cells(dtype="bfloat16")
    found = needs(FACTS, gptq)
    assert found.model == 2 * (BLOCKS * BLOCK + 2 * 1000 * H) and found.block == 2 * BLOCK
    assert found.quantized == 2 * BLOCKS * BLOCK
    # Inputs of q/k/v, o and gate/up are H wide, that of down M; the widest is finished beside the sums.
    assert found.statistics == 4 * (3 * H * H + M * M) + 3 * 4 * M * M
    # gate and up are the most weights that are solved as one matrix; down has the widest input.
    assert found.solving == max(4 * H * H + 36 * 2 * H * M, 24 * M * M + 5 * H * M)
    passing = 2 * (4 * H + 2 * M + H + 2 * M + 4 * H) + 8 * (M + H)
    assert found.walk == 2 * TOKENS * H + TOKENS * passing
    assert found.scoring == 2048 * passing + 2 * 2 * 2048 * 1000 + 24 * 2**17
    assert found.peak == found.model + found.quantized + max(
        found.walk + found.statistics + found.solving, found.scoring
    )
    assert found.peak == found.model + found.private


def test_what_is_not_done_needs_nothing() -> None:
    baseline, rtn, gptq = cells()
    nothing = needs(FACTS, baseline)
    assert (nothing.quantized, nothing.walk, nothing.statistics, nothing.solving) == (0, 0, 0, 0)
    rounded = needs(FACTS, rtn)
    assert (rounded.walk, rounded.statistics) == (0, 0) and rounded.solving == 36 * 2 * H * M
    *_, attention = cells(bits="[w16/4]")
    assert needs(FACTS, attention).quantized == 2 * BLOCKS * 4 * H * H


def test_longer_windows_and_wider_numbers_need_more() -> None:
    *_, gptq = cells(dtype="bfloat16")
    *_, wide = cells(dtype="float32")
    scoring = [needs(FACTS, gptq, window=window).scoring for window in (0, 512, 2048, 4096)]
    assert scoring[1] < scoring[2] == scoring[0] < scoring[3]
    assert scoring[2] - scoring[1] == 2 * 2 * (2048 - 512) * 1000  # batches are as long as the usual ones
    large = dataclasses.replace(FACTS, config=FACTS.config | {"vocab_size": 10**6})
    assert needs(large, gptq, device="cpu").scoring - needs(large, gptq, device="cuda").scoring == 2 * 2 * (
        2**26 - 2**27
    ) + 24 * (2**17 - 2**27)
    assert needs(FACTS, wide).quantized == 2 * needs(FACTS, gptq).quantized


def test_constants_are_those_of_the_code() -> None:
    from qfarm import divergence, predictions, walk

    assert memory.BATCH_TOKENS == {"calibration": walk.BATCH_TOKENS, "evaluation": predictions.BATCH_TOKENS}
    assert memory.LOGITS == predictions.LOGIT_BUDGET and memory.COMPARED == divergence.BLOCK


NEEDED = memory.Needs(
    model=1000, block=20, tables=100, quantized=900, walk=30, statistics=20, solving=50, scoring=60
)  # working 100, peak 2000, blockwise 240


@pytest.mark.parametrize(
    ("gpus", "room", "how", "expected"),
    [
        (1, 2400, {"movable": True}, (1, False)),
        (1, 2399, {"movable": True}, (1, True)),
        (4, 2400, {"movable": True}, (1, False)),
        # tables 100, a quarter of the other 1800, two blocks and what is worked with: 690, and a fifth more
        (4, 828, {"movable": True}, (4, False)),
        (4, 827, {"movable": True}, (1, True)),
        (4, 828, {"movable": True, "short": True}, (1, True)),
        (4, 100, {"movable": False, "short": True}, (1, False)),
    ],
)
def test_a_model_lies_on_one_gpu_else_on_all_else_in_the_host(
    gpus: int, room: int, how: dict[str, bool], expected: tuple[int, bool]
) -> None:
    assert arrange(NEEDED, gpus, room, **how) == Arrangement(gpus=expected[0], streamed=expected[1])


def test_a_streamed_model_needs_a_block_and_not_the_model() -> None:
    assert NEEDED.blockwise == 100 + 2 * 20 + 100
    deeper = dataclasses.replace(NEEDED, model=10_000, quantized=9_000)
    assert deeper.blockwise == NEEDED.blockwise
