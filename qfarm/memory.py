"""Memory: the most that one cell takes, from shapes alone: what `qfarm plan` estimates and `qfarm bench memory` checks.

    model       every parameter in the model's dtype; on a CPU these are pages of the checkpoint, shared by all workers
    quantized   the new weights of the decoder's linear layers, kept until the cell ends
    walk        calibration text: what each token is at the current block, and one batch of it passing through
    statistics  one float32 [n, n] for each input of a block, n wide, and a copy of them being finished
    solving     the widest inputs' second moments being factored, and the most weights that are solved as one matrix
    scoring     a batch of windows passing through a block, then chunks of logits of model and baseline

    peak        = model + quantized + max(walk + statistics + solving, scoring)
    peak of one block on the device = the same with one block of `model` and nothing of `quantized`

Constants are bytes per number that the code of today has alive at once, counted from it; solvers other than GPTQ and
rounding to nearest, and statistics that are kept for other cells (`statistics: independent`), are not in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qfarm.models.architecture import architecture_of

if TYPE_CHECKING:
    from qfarm.matrix import Cell
    from qfarm.models.reference import ModelFacts

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FACTOR_BYTES = 52  # per entry of a Hessian while it is factored: six float64 copies and the float32 sum
# Per weight while it is solved: float32 of the original, the loop's copy, its codes, values and errors, what rounding
# to nearest gives, and four more while errors are measured and the result is dequantized.
WEIGHT_BYTES = 48
BATCH_TOKENS = 4096  # tokens per forward pass of calibration (qfarm.walk) and at most of evaluations
LOGITS, LOGIT_BYTES = 1 << 24, 32  # logits of a chunk (qfarm.predictions), and bytes for each while they are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that one cell takes at most, by what for; the module says what each is."""

    model: int
    block: int  # of the model: one decoder block
    tables: int  # of the model: embeddings and head
    quantized: int
    walk: int
    statistics: int
    solving: int
    scoring: int

    @property
    def working(self) -> int:
        """Beside the weights."""
        return max(self.walk + self.statistics + self.solving, self.scoring)

    @property
    def private(self) -> int:
        """What a worker on a CPU allocates; the model itself stays in the files' pages."""
        return self.quantized + self.working

    @property
    def peak(self) -> int:
        """Everything on one device."""
        return self.model + self.private

    @property
    def blockwise(self) -> int:
        """On the device when all blocks but the current one are in the host's memory."""
        return self.tables + 2 * self.block + self.working


def needs(facts: ModelFacts, cell: Cell, window: int = 0) -> Needs:
    """What a cell takes at most; `window` is the longest window that its evaluations read, in tokens."""
    return needs_of(
        facts.config,
        facts.linear_shapes,
        facts.parameters,
        dtype=cell.dtype,
        calibration=cell.calibration,
        quantizes=not cell.is_baseline,
        window=window,
    )


def needs_of(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    parameters: tuple[int, int],
    *,
    dtype: str,
    calibration: Mapping[str, Any] | None,
    quantizes: bool,
    window: int = 0,
) -> Needs:
    """The same from a configuration, (rows, columns) by role, and the parameters of linear layers and of tables."""
    size, hidden = DTYPE_BYTES[dtype], config["hidden_size"]
    linear, tables = parameters
    groups = architecture_of(config, "").shared_inputs
    widths = [shapes[group[0]][1] for group in groups]
    walk = statistics = factors = 0
    if calibration:
        samples, length = calibration["samples"], calibration["length"]
        batch = max(length, min(samples * length, BATCH_TOKENS))
        walk = samples * length * hidden * size + _passing(shapes, hidden, size, batch)
        statistics = 4 * (sum(n * n for n in widths) + 3 * max(widths) ** 2)
        factors = FACTOR_BYTES * max(widths) ** 2
    stacked = max(sum(shapes[role][0] * shapes[role][1] for role in group) for group in groups)
    return Needs(
        model=(linear + tables) * size,
        block=linear // config["num_hidden_layers"] * size,
        tables=tables * size,
        quantized=linear * size if quantizes else 0,
        walk=walk,
        statistics=statistics,
        solving=factors + (WEIGHT_BYTES * stacked if quantizes else 0),
        scoring=_passing(shapes, hidden, size, max(window, BATCH_TOKENS // 2))
        + LOGIT_BYTES * max(LOGITS, 16 * config["vocab_size"]),
    )


def _passing(shapes: Mapping[str, tuple[int, int]], hidden: int, size: int, tokens: int) -> int:
    """Bytes of a batch inside a block: every layer's output, the residual stream with norms in float32, and the
    widest input as statistics see it."""
    outputs = sum(rows for rows, _ in shapes.values()) + 2 * max(columns for _, columns in shapes.values())
    return tokens * (outputs * size + 4 * hidden * size + 12 * hidden + 8 * max(columns for _, columns in shapes.values()))
