"""Predictions: a model reads windows; each prediction is scored, and compared with the baseline's for the same token.

Full logits are never stored: the baseline's final hidden states at the predicted positions are kept in the cache, flat
[predictions, hidden], and its output head is applied to them again.

Windows are visited in one random order that all cells of an evaluation share, so that what was seen when an evaluation
ends early is a random sample. Which windows share a forward pass is fixed by the text's order, because the batch's
shape can move the last bits of a loss: a result does not depend on the order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qfarm import depot, divergence, sums
from qfarm.betting import shared_order
from qfarm.errors import NonFinite
from qfarm.matrix import canonical_hash
from qfarm.windows import Rolling, Windows, batches

if TYPE_CHECKING:
    from qfarm.worker import Session

BATCH_TOKENS = 2048  # per forward pass; fixed, since the batch's shape can move the last bits of a loss
# Elements of one chunk of logits: few tokens at once make the head's product slow (341 take 1.9 times as long per token
# as 1,024: docs/benchmarks.md#one-evaluation), all of them take gigabytes.
LOGIT_BUDGET = {"cpu": 1 << 26, "cuda": 1 << 27}
HIDDEN = "hidden"  # cache folder of baselines' hidden states

# Per predicted position of one window, float64 [predictions]: loss and so on, by the ledger's names.
Columns = dict[str, NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Where the predictions of each window lie: in the window, and in the flat sequence of all predictions."""

    first: tuple[int, ...]  # by window: the first predicted position
    offsets: NDArray[np.int64]  # [windows + 1]

    @classmethod
    def of(cls, windows: Windows | Rolling) -> Spans:
        first = [0] * len(windows.rows)
        for piece in reversed(windows.pieces):
            first[piece.window] = piece.start
        counts = [len(row) - start for row, start in zip(windows.rows, first, strict=True)]
        return cls(tuple(first), np.concatenate([[0], np.cumsum(counts)]))

    def flat(self, window: int) -> slice:
        return slice(int(self.offsets[window]), int(self.offsets[window + 1]))


def visiting_order(session: Session, windows: Windows | Rolling) -> list[list[range]]:
    """Groups of windows in the order that all cells of the session's evaluation share, each as batches that fit.

    A group is what one forward pass reads. Where memory ran out it takes several, and the order stays the same.
    """
    groups = batches(windows.rows, BATCH_TOKENS)
    return [_parts(windows, groups[index], session.shrink) for index in shared_order(session.evaluation, len(groups))]


def _parts(windows: Windows | Rolling, group: range, shrink: int) -> list[range]:
    parts = batches(windows.rows[group.start : group.stop], BATCH_TOKENS >> shrink)
    return [range(group.start + part.start, group.start + part.stop) for part in parts]


@torch.no_grad()
def hidden_states(session: Session, windows: Windows | Rolling, batch: range, spans: Spans) -> Iterator[Tensor]:
    """Final hidden states [predictions, hidden] of each window of a batch, where the next token is predicted."""
    ids = torch.stack([windows.rows[index][: windows.reach] for index in batch])
    states = session.loaded.body(ids.to(session.loaded.device))
    for index, window in zip(batch, states, strict=True):
        yield window[spans.first[index] - 1 : len(windows.rows[index]) - 1]


@torch.no_grad()
def shortened_states(session: Session, windows: Windows | Rolling, index: int, spans: Spans) -> Tensor:
    """Hidden states of one window, read alone and without the last token; there may be one fewer.

    Causality makes them those of `hidden_states`, but for rounding: the forward pass has another shape.
    """
    ids = windows.rows[index][: windows.reach][:-1]
    states: Tensor = session.loaded.body(ids[None].to(session.loaded.device))
    return states[0, spans.first[index] - 1 : len(windows.rows[index]) - 1]


class Scorer:
    """Scores predictions of one evaluation; holds what its windows share."""

    def __init__(self, session: Session, predictions: int, label: str) -> None:
        self._session = session
        weight = session.loaded.head.weight
        budget = (LOGIT_BUDGET[session.device.type] >> session.shrink) // weight.shape[0]
        self._rows = max(16, budget)
        self._places: dict[str, Tensor] = {}
        self._functions: sums.Functions | None = None
        if sums.wanted(predictions, weight.shape[0], session.device):
            found = sums.compiled(weight.dtype)
            if isinstance(found, str):
                session.note(f"{label}: figures are computed op by op, torch.compile gives no function: {found}")
            else:
                self._functions = found

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor, before: Tensor | None) -> Columns:
        """One window's figures: hidden states [predictions, hidden], the baseline's likewise, targets [predictions].

        Raises NonFinite when a figure is not finite.
        """
        session = self._session
        targets = targets.to(hidden.device)
        head = session.loaded.head
        chunks = -(-len(targets) // self._rows)
        rows = -(-len(targets) // chunks)  # as even as they can be: few at once are slow
        parts = []
        for start in range(0, len(targets), rows):
            chosen = slice(start, start + rows)
            logits_before = None
            if before is not None:
                states = before[chosen].to(hidden.device)
                logits_before = self._logits("before", states, *session.baseline_head)
            logits = self._logits("after", hidden[chosen], head.weight, head.bias)
            parts.append(divergence.score(logits, targets[chosen], logits_before, self._functions))
        columns = {name: torch.cat([part[name] for part in parts]).double().cpu().numpy() for name in parts[0]}
        for name, values in columns.items():
            if not np.isfinite(values).all():
                raise NonFinite(f"{name} is not finite")
        return columns

    def _logits(self, name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits [tokens, vocabulary], in memory that the next ones take again.

        To clear new memory of that size takes a CPU as long as to multiply.
        """
        place = self._places.get(name)
        if place is None or len(place) < len(hidden):
            self._places.pop(name, None)
            place = self._places[name] = hidden.new_empty(len(hidden), len(weight))
        part = place[: len(hidden)]
        if bias is None:
            return torch.mm(hidden, weight.T, out=part)
        return torch.addmm(bias, hidden, weight.T, out=part)


class BaselineStates:
    """The baseline's hidden states in the cache, held open: the cache may drop the file to make room for another's."""

    def __init__(self, path: Path) -> None:
        self._states: Any = safe_open(path, framework="pt").get_slice(HIDDEN)  # type: ignore[no-untyped-call]

    def __getitem__(self, part: slice) -> Tensor:
        states: Tensor = self._states[part.start : part.stop]
        return states


class Keeper:
    """Collects a baseline's hidden states, in whatever order they come."""

    def __init__(self, session: Session, windows: Windows | Rolling, spans: Spans) -> None:
        self.session, self.windows, self.spans = session, windows, spans
        self._states: Tensor | None = None

    def keep(self, window: int, hidden: Tensor) -> None:
        if self._states is None:
            self._states = torch.empty(int(self.spans.offsets[-1]), hidden.shape[1], dtype=hidden.dtype)
        self._states[self.spans.flat(window)] = hidden.cpu()

    def kept(self, window: int) -> Tensor:
        assert self._states is not None
        return self._states[self.spans.flat(window)]

    def save(self) -> Path:
        assert self._states is not None
        states = self._states
        name = _hidden_name(self.session, self.windows)
        return depot.publish(HIDDEN, name, lambda part: save_file({HIDDEN: states}, part))


def baseline_states(session: Session, windows: Windows | Rolling, label: str) -> BaselineStates:
    """The session's baseline on these windows; computed, with a note, where the cache lacks it.

    To be called while the model is still the original one.
    """
    path = depot.find(HIDDEN, _hidden_name(session, windows))
    if path is None:
        session.note(f"{label}: the baseline's hidden states are in no cache; computed again")
        spans = Spans.of(windows)
        keeper = Keeper(session, windows, spans)
        for batch in itertools.chain.from_iterable(visiting_order(session, windows)):
            for window, hidden in zip(batch, hidden_states(session, windows, batch, spans), strict=True):
                keeper.keep(window, hidden)
        path = keeper.save()
    return BaselineStates(path)


def _hidden_name(session: Session, windows: Windows | Rolling) -> str:
    cell = session.cell
    identity = [cell.fingerprint, cell.dtype, windows.digest, BATCH_TOKENS, session.device.type, session.loaded.chunk]
    return f"{canonical_hash(identity)}.safetensors"
