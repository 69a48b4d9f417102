"""Windows: token sequences of one length, cut from a text for evaluation or drawn from it for calibration.

Evaluation (fixed windows, as in the GPTQ papers): a stream is cut into non-overlapping windows and its tail dropped;
from stand-alone documents, windows are drawn with Python's generator seeded 0, 256 of them by default. Calibration
draws with the cell's seed. Both reproduce the index sequence of the published scripts (`random.seed`, `randint`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qfarm.errors import DataError
from qfarm.text import Text

DRAWN_WINDOWS = 256  # windows of an evaluation on stand-alone documents
DRAW_LIMIT = 100_000  # draws without an eligible document before giving up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a window that lies in one document: targets [start, stop) of the window's positions."""

    window: int
    start: int
    stop: int
    document: str  # hash of the piece's token ids
    cluster: str  # hash of the document it belongs to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    ids: Tensor  # int64 [windows, length]
    pieces: tuple[Piece, ...]  # position 0 of a window is never predicted and belongs to no piece

    @property
    def digest(self) -> str:
        """Hash of the token ids and of how they are cut into windows."""
        return _hash(f"{list(self.ids.shape)} {_hash(self.ids.numpy())}")


def _hash(data: Any) -> str:
    raw = data.encode() if isinstance(data, str) else np.ascontiguousarray(data).tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def evaluation_windows(text: Text, tokenizer: Any, length: int, limit: int | None) -> Windows:
    """Windows of `length` tokens; the first `limit` of them. Raises DataError when the text holds none."""
    if text.stream:
        return _stream_windows(text, tokenizer, length, limit)
    return _drawn_windows(text, tokenizer, length, limit)


def _stream_windows(text: Text, tokenizer: Any, length: int, limit: int | None) -> Windows:
    encoded = tokenizer("".join(text.documents), return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    count = len(ids) // length
    if not count:
        raise DataError(f"{text.name}: {len(ids)} tokens, fewer than one window of {length}")
    count = min(count, limit or count)
    # Monotone, because a special token at the end has offset 0.
    starts = np.maximum.accumulate([start for start, _ in encoded["offset_mapping"][: count * length]])
    ends = np.cumsum([len(document) for document in text.documents])
    owner = np.searchsorted(ends, starts, side="right").reshape(count, length)
    clusters = [_hash(document) for document in text.documents]
    grid = ids[: count * length].reshape(count, length)
    pieces = []
    for window in range(count):
        edges = np.flatnonzero(np.diff(owner[window, 1:])) + 2
        for start, stop in zip([1, *edges], [*edges, length], strict=True):
            cluster = clusters[owner[window, start]]
            pieces.append(_piece(window, int(start), int(stop), grid[window], cluster))
    return Windows(ids=torch.from_numpy(grid.copy()), pieces=tuple(pieces))


def _drawn_windows(text: Text, tokenizer: Any, length: int, limit: int | None) -> Windows:
    draw = _Draw(text, tokenizer, length, random.Random(0))
    drawn = [draw.document_window() for _ in range(min(DRAWN_WINDOWS, limit or DRAWN_WINDOWS))]
    grid = np.stack([ids for ids, _ in drawn])
    pieces = [_piece(i, 1, length, ids, _hash(text.documents[document])) for i, (ids, document) in enumerate(drawn)]
    return Windows(ids=torch.from_numpy(grid), pieces=tuple(pieces))


def _piece(window: int, start: int, stop: int, ids: Any, cluster: str) -> Piece:
    # The context counts: the same tokens after another prefix are another measurement.
    return Piece(window=window, start=start, stop=stop, document=_hash(ids[:stop]), cluster=cluster)


def calibration_windows(text: Text, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """int64 [samples, length]. Raises DataError when the text is too short."""
    generator = random.Random(seed)
    if not text.stream:
        draw = _Draw(text, tokenizer, length, generator)
        return torch.from_numpy(np.stack([draw.document_window()[0] for _ in range(samples)]))
    ids = np.asarray(tokenizer("".join(text.documents), verbose=False)["input_ids"], dtype=np.int64)
    if len(ids) <= length:
        raise DataError(f"{text.name}: {len(ids)} calibration tokens, no more than one sample of {length}")
    starts = [generator.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]))


class _Draw:
    """Rejection sampling of documents longer than a window, as in the GPTQ scripts; each is tokenized once."""

    def __init__(self, text: Text, tokenizer: Any, length: int, generator: random.Random) -> None:
        self.text, self.tokenizer, self.length, self.generator = text, tokenizer, length, generator
        self.tokens: dict[int, Any] = {}

    def document_window(self) -> tuple[Any, int]:
        """Token ids [length] and the document's index."""
        for _ in range(DRAW_LIMIT if self.text.documents else 0):
            index = self.generator.randint(0, len(self.text.documents) - 1)
            if index not in self.tokens:
                ids = np.asarray(self.tokenizer(self.text.documents[index], verbose=False)["input_ids"], dtype=np.int64)
                # Exactly `length` tokens would leave no room for a start: such documents are rejected.
                self.tokens[index] = ids if len(ids) > self.length else None
            ids = self.tokens[index]
            if ids is not None:
                start = self.generator.randint(0, len(ids) - self.length - 1)
                return ids[start : start + self.length], index
            if len(self.tokens) == len(self.text.documents) and not any(x is not None for x in self.tokens.values()):
                break
        raise DataError(f"{self.text.name}: no document of more than {self.length} tokens; use a shorter length")
