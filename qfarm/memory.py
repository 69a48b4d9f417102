"""Memory: the most that one cell takes, from shapes alone: what `qfarm plan` estimates and `qfarm bench memory` checks.

    model       every parameter in the model's dtype; on a CPU these are pages of files, which all workers share
    quantized   new weights of the decoder's linear layers, kept until the cell ends
    walk        calibration text: what each token is at the current block, and one batch of it passing through
    statistics  a float32 [n, n] for each input of a block, n wide, and one of them being finished
    solving     the second moments of an input being factored, or the weights that read it in the column loop
    scoring     windows passing through a block, then a chunk of logits of the model and of its baseline

    packing     of a packed run: codes until they are packed, packed layers, the moved weights of `crosscheck`

    peak      = model + quantized + packing + max(walk + statistics + solving, scoring)
    private   = the same without `model`: what a worker on a CPU allocates
    blockwise = tables + two copies of a block + max(...): on a device to which blocks are streamed

The constants are bytes that are alive at once for each number, counted in the code of GPTQ and of rounding to nearest.
Other solvers may take more; so do statistics that are kept for other cells (`statistics: independent`), which are
collected only where they fit.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qfarm.models.architecture import architecture_of
from qfarm.scheme import UNTOUCHED, parse_scheme

if TYPE_CHECKING:
    from qfarm.matrix import Cell
    from qfarm.models.reference import ModelFacts

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FACTOR_BYTES = 24  # of an entry of a Hessian being factored: two float64 copies, and the factor in float32 twice
LOOP_BYTES = 36  # of a weight in the column loop: nine float32 copies (original, columns, codes, values, errors, moves)
WAITING_BYTES = 5  # of a weight while its Hessian is factored: the original in float32, codes of rounding to nearest
BATCH_TOKENS = {"calibration": 4096, "evaluation": 2048}  # per forward pass (qfarm.walk, qfarm.predictions)
# Logits of a chunk (qfarm.predictions), and of how many of them float32 copies are made at once (qfarm.divergence).
LOGITS, COMPARED = {"cpu": 1 << 26, "cuda": 1 << 27}, {"cpu": 1 << 17, "cuda": 1 << 27}
COMPARED_BYTES = 24  # of each of these: logits and probabilities of both models, and two differences
BLOCKS_ELSEWHERE = "blocks "  # so begins the note of an attempt whose model was not on one device as a whole
SHRUNK, OFFLOADED = "batches halved", "original weights kept"  # and of those that ran out of memory before
SLACK = 1.2  # of what an allocator takes beside (an unpublished value)


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
    packing: int = 0

    @property
    def working(self) -> int:
        """Beside the weights."""
        return max(self.walk + self.statistics + self.solving, self.scoring)

    @property
    def private(self) -> int:
        """What a worker on a CPU allocates; the model itself stays in the files' pages."""
        return self.quantized + self.packing + self.working

    @property
    def peak(self) -> int:
        """Everything on one device."""
        return self.model + self.private

    def on_each(self, gpus: int) -> int:
        """On each of several devices over which the blocks are spread; on the first are the tables as well."""
        return self.tables + (self.model - self.tables + self.quantized) // gpus + 2 * self.block + self.working

    @property
    def blockwise(self) -> int:
        """On the device when all blocks but the current one are in the host's memory."""
        return self.tables + 2 * self.block + self.working


def needs(facts: ModelFacts, cell: Cell, *, window: int = 0, device: str = "cpu", packed: bool = False) -> Needs:
    """What a cell takes at most; `window` is the longest that its evaluations read, in tokens; `packed`: by any."""
    size, hidden = DTYPE_BYTES[cell.dtype], facts.config["hidden_size"]
    linear, tables = facts.parameters
    shapes, scheme = facts.linear_shapes, parse_scheme(cell.scheme)
    blocks = facts.config["num_hidden_layers"]
    groups = architecture_of(facts.config, facts.reference).shared_inputs
    counts = {role: rows * columns for role, (rows, columns) in shapes.items()}
    changed = {role for role in shapes if scheme.weight_bits(role) < UNTOUCHED}
    quantized = sum(counts[role] for role in changed) * blocks
    walk = statistics = 0
    if cell.calibration:
        tokens, length = cell.calibration["samples"] * cell.calibration["length"], cell.calibration["length"]
        walk = tokens * hidden * size + _passing(facts, size, max(length, min(tokens, BATCH_TOKENS["calibration"])))
        squares = [4 * shapes[group[0]][1] ** 2 for group in groups]
        statistics = sum(squares) + 3 * max(squares)
    solving = max(
        (
            _solving(shapes[group[0]][1] if cell.calibration else 0, sum(counts[role] for role in group))
            for group in groups
            if changed.intersection(group)
        ),
        default=0,
    )
    vocabulary = facts.config["vocab_size"]
    # A chunk of logits is of one window.
    logits = max(min(LOGITS[device], (window or BATCH_TOKENS["evaluation"]) * vocabulary), 16 * vocabulary)
    return Needs(
        model=(linear + tables) * size,
        block=linear // blocks * size,
        tables=tables * size,
        quantized=quantized * size,
        packing=quantized * (1 + 1 + size) if packed else 0,  # packed layers: a byte per weight at most
        walk=walk,
        statistics=statistics,
        solving=solving,
        scoring=_passing(facts, size, max(window, BATCH_TOKENS["evaluation"]))
        + 2 * size * logits
        + COMPARED_BYTES * COMPARED[device],
    )


def _solving(width: int, weights: int) -> int:
    """Bytes for layers that read one input and are solved as one matrix; width 0: without its second moments."""
    return max(FACTOR_BYTES * width**2 + WAITING_BYTES * weights, 4 * width**2 + LOOP_BYTES * weights)


def _passing(facts: ModelFacts, size: int, tokens: int) -> int:
    """Bytes of tokens inside a block: every layer's output, the widest once more activated and as float32, the residual
    stream and a norm in float32."""
    shapes = facts.linear_shapes.values()
    hidden: int = facts.config["hidden_size"]
    outputs, widest = sum(rows for rows, _ in shapes), max(columns for _, columns in shapes)
    return tokens * (size * (outputs + 2 * widest + 4 * hidden) + 8 * (widest + hidden))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Over how many GPUs a model's blocks are spread; streamed: in the host's memory until they are used."""

    gpus: int
    streamed: bool

    @property
    def note(self) -> str | None:
        """For the attempt's row; None where the model lies on one device as a whole."""
        if self.streamed:
            return f"{BLOCKS_ELSEWHERE}streamed from the host's memory: the model does not fit on the device"
        return f"{BLOCKS_ELSEWHERE}spread over {self.gpus} GPUs" if self.gpus > 1 else None


def arrange(needed: Needs, gpus: int, room: int, *, movable: bool, short: bool = False) -> Arrangement:
    """Where a cell's model should lie on a worker's GPUs, of which each has `room` bytes.

    On one if it fits, else over all of them, else streamed. `movable`: the cell takes blocks on several devices;
    `short`: it has run out of memory although smaller batches were tried.
    """
    if movable and short:
        return Arrangement(gpus=1, streamed=True)
    if not movable or SLACK * needed.peak <= room:
        return Arrangement(gpus=1, streamed=False)
    fits = gpus > 1 and SLACK * needed.on_each(gpus) <= room
    return Arrangement(gpus=gpus, streamed=False) if fits else Arrangement(gpus=1, streamed=True)
