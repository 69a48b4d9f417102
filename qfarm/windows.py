"""Windows: token sequences cut from a text for evaluation or drawn from it for calibration.

Fixed windows (GPTQ papers): all of one length. A stream is cut into non-overlapping windows and its tail dropped;
from stand-alone documents, windows are drawn with Python's generator seeded 0, 256 of them by default. Calibration
draws with the cell's seed. Both reproduce the index sequence of the published scripts (`random.seed`, `randint`).

Rolling windows (lm-eval's `loglikelihood_rolling`): every token of every document is predicted once, the first from a
prefix token; a document's last window is filled up with context from the one before.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
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
    """Fixed windows."""

    ids: Tensor  # int64 [windows, length]
    pieces: tuple[Piece, ...]  # position 0 of a window is never predicted and belongs to no piece
    eligible: int | None = None  # drawn windows: documents longer than a window, among those that were looked at
    examined: int | None = None

    @functools.cached_property  # thousands of short windows, asked for one by one
    def rows(self) -> tuple[Tensor, ...]:
        return tuple(self.ids)

    @property
    def reach(self) -> int:
        """Tokens that the model reads at once, at most."""
        return self.ids.shape[1]

    @property
    def digest(self) -> str:
        """Hash of the token ids and of how they are cut into windows."""
        return _hash(f"{list(self.ids.shape)} {_hash(self.ids.numpy())}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rolling:
    """Rolling windows: context and targets of each, in the documents' order."""

    rows: tuple[Tensor, ...]  # int64 [at most reach + 1]; the last token of a row is predicted, not read
    pieces: tuple[Piece, ...]  # one per row
    reach: int  # tokens that the model reads at once, at most
    sizes: tuple[tuple[int, int], ...]  # words and bytes of the row's document at its first row, else 0 and 0

    @property
    def documents(self) -> int:
        """Documents with a token to predict."""
        return sum(words > 0 for words, _ in self.sizes)

    @property
    def digest(self) -> str:
        """Hash of the token ids and of what is predicted of them."""
        return _hash(" ".join(f"{p.start} {_hash(row.numpy())}" for p, row in zip(self.pieces, self.rows, strict=True)))


def batches(rows: Sequence[Tensor], tokens: int) -> list[range]:
    """Neighbouring rows of one length, as many as fit `tokens`, at least one; the composition of forward passes."""
    found: list[range] = []
    for index, row in enumerate(rows):
        last = found[-1] if found else range(0)
        if last and len(rows[last.start]) == len(row) and (len(last) + 1) * len(row) <= tokens:
            found[-1] = range(last.start, index + 1)
        else:
            found.append(range(index, index + 1))
    return found


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
    count = min(count, limit or count, text.most_windows or count)
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
    return Windows(ids=torch.from_numpy(grid), pieces=tuple(pieces), eligible=draw.eligible, examined=len(draw.tokens))


def rolling_windows(text: Text, tokenizer: Any, reach: int, limit: int | None) -> Rolling:
    """Windows over whole documents, the first `limit` of them; each is tokenized with the tokenizer's own framing.

    As in lm-eval, what is tokenized is `Text.cleaned`, while words and bytes are counted in the document itself; a
    tokenizer that puts BOS before a text has it twice, as prefix and as first target. Raises DataError for a tokenizer
    without BOS and EOS and for a text without tokens.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise DataError(f"{text.name}: the tokenizer has neither BOS nor EOS, which word-level perplexity starts from")
    rows: list[Tensor] = []
    pieces: list[Piece] = []
    sizes: list[tuple[int, int]] = []
    documents = text.documents[:limit]
    for document, cleaned in zip(documents, text.cleaned[:limit], strict=True):
        ids = np.asarray([prefix, *tokenizer(cleaned, verbose=False)["input_ids"]], dtype=np.int64)
        size = (len(re.split(r"\s+", document)), len(document.encode()))
        for begin, start, stop in _spans(len(ids), reach):
            row = ids[begin:stop]
            pieces.append(_piece(len(rows), start - begin, stop - begin, row, _hash(document)))
            rows.append(torch.from_numpy(row))
            sizes.append(size if start == 1 else (0, 0))
    if not rows:
        raise DataError(f"{text.name}: no tokens to predict")
    return Rolling(rows=tuple(rows), pieces=tuple(pieces), reach=reach, sizes=tuple(sizes))


def _spans(tokens: int, reach: int) -> Iterator[tuple[int, int, int]]:
    """(first token read, first and last + 1 token predicted) of each window over `tokens`, a prefix included."""
    for start in range(1, tokens, reach):
        stop = min(start + reach, tokens)
        yield max(0, stop - reach - 1), start, stop


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
        self.tokens: dict[int, Any] = {}  # None: too short

    @property
    def eligible(self) -> int:
        return sum(ids is not None for ids in self.tokens.values())

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
