"""Perplexity, and how far the model has moved from its full-precision baseline.

Two conventions, which give different numbers and are never mixed:

    windows   `perplexity`: exp(mean cross entropy) over the predicted positions 1 .. length-1 of non-overlapping
              windows, each read alone, without a KV cache (GPTQ papers). All windows have one length, so the mean
              over tokens equals the mean of window means.
    word      `word_perplexity`, `byte_perplexity`, `bits_per_byte`: the log-likelihood of whole documents over their
              words and bytes, in rolling windows of `length` tokens (lm-eval's task wikitext, detokenized like there).
              lm-eval takes the model's whole context for `length` unless told otherwise.

Logits are upcast to float32 in both; lm-eval's log-softmax stays in the model's dtype, so that it agrees to rounding
for float32 models only.

Divergence from the baseline is measured on the same tokens: KL(baseline || cell) and KL(cell || baseline), the share
of positions whose most probable token agrees, and flips: right before and wrong now (lost), wrong before and right
now (gained). The median and the 99 % quantile of token KL have Woodruff intervals.

The ledger has one row per window and document, since a window of running text may span two articles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm import divergence, stats
from qfarm.betting import HopelessStop
from qfarm.errors import InvalidInput, NonFinite
from qfarm.evaluate import Evaluator, Result
from qfarm.predictions import (
    BaselineStates,
    Columns,
    Keeper,
    Spans,
    baseline_states,
    hidden_states,
    score,
    visiting_order,
)
from qfarm.recipe import STRICT, describe
from qfarm.record import Document, Metric
from qfarm.text import Part, absolute, public_name, reference
from qfarm.windows import DRAWN_WINDOWS, Piece, Rolling, Windows

if TYPE_CHECKING:
    from qfarm.worker import Session

USUAL_WINDOWS = {"c4": DRAWN_WINDOWS, "c4-new": DRAWN_WINDOWS}  # for estimates, where a length is not known yet
QUANTILES = (("kl_median", 0.5), ("kl_p99", 0.99))
# Options that came later: left out of the protocol at these values, so that earlier results keep their identity.
_LATER = {"convention": "windows", "documents": None, "stop": None, "kv_chunk": None}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stop:
    """End a cell whose perplexity is hopeless; a bounded share of cells at the limit is stopped wrongly."""

    above: float = Field(gt=1, allow_inf_nan=False, description="times the baseline's perplexity")
    alpha: float = Field(0.01, gt=0, lt=1, description="chance to stop a cell at the limit; for m cells take 0.01 / m")


def _stop(value: object) -> object:
    """A Stop from a job's mapping; raises InvalidInput. Anything else is left for the caller to refuse."""
    if not isinstance(value, Mapping):
        return value
    try:
        return Stop(**{str(key): option for key, option in value.items()})
    except ValidationError as error:
        raise InvalidInput(f"perplexity: stop: {describe(error, ['above', 'alpha'])}") from None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Perplexity(Evaluator):
    text: Annotated[str, BeforeValidator(reference)] = Field(
        description="wikitext2, c4, c4-new, python-docs, a file or a data set of the hub"
    )
    length: int = Field(2048, ge=2, description="tokens per window; of rolling windows, the tokens read at once")
    windows: int | None = Field(None, ge=1, description="the first so many windows; default: all")
    divergence: bool = Field(True, description="compare with the baseline's predictions token by token")
    convention: Literal["windows", "word"] = "windows"
    documents: int | None = Field(None, ge=1, description="convention word: the first so many documents; default: all")
    stop: Annotated[Stop | None, BeforeValidator(_stop)] = Field(
        None, description="end hopeless cells early; default: never"
    )
    kv_chunk: int | None = Field(
        None, ge=1, description="read windows in chunks where the KV cache is quantized; 1 is what decoding sees"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", absolute(self.text))
        word = self.convention == "word"
        if word and (self.windows is not None or self.stop is not None):
            raise InvalidInput("perplexity: convention word takes `documents`, not `windows`, and no `stop`")
        if not word and self.documents is not None:
            raise InvalidInput("perplexity: `documents` needs convention: word; fixed windows take `windows`")
        if self.stop is not None and not self.divergence:
            raise InvalidInput("perplexity: `stop` compares with the baseline, which divergence: false leaves out")

    @property
    def label(self) -> str:
        words = ["perplexity", public_name(self.text), str(self.length)]
        if self.convention == "word":
            words.append("by word")
        if limit := self.windows or self.documents:
            words.append(f"x{limit}")
        if self.stop:
            words.append(f"stop above {self.stop.above:g}x")
        return " ".join(words)

    @property
    def window(self) -> int:
        return self.length

    def texts(self) -> tuple[tuple[str, Part], ...]:
        return ((self.text, "evaluation"),)

    @property
    def needs_baseline(self) -> bool:
        return self.divergence

    def tokens(self) -> int:
        return self.length * (self.windows or USUAL_WINDOWS.get(self.text, 150))

    def options(self) -> dict[str, Any]:
        given = super().options() | {"stop": dataclasses.asdict(self.stop) if self.stop else None}
        return {name: value for name, value in given.items() if name not in _LATER or value != _LATER[name]}

    def prepare(self, session: Session) -> None:
        if self.divergence and not session.cell.is_baseline:
            session.baseline_states[str(self)] = baseline_states(session, self._windows(session), self.label)

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        windows = self._windows(session)
        spans = Spans.of(windows)
        is_baseline = session.cell.is_baseline
        keeper = Keeper(session, windows, spans) if is_baseline and self.divergence else None
        before = session.baseline_states[str(self)] if self.divergence and not is_baseline else None
        order = visiting_order(session, windows)
        gambler = _Gambler(self.stop, order) if self.stop and before is not None else None
        columns: dict[int, Columns] = {}
        stopped = False
        for batch in order:
            for index, hidden in zip(batch, hidden_states(session, windows, batch, spans), strict=True):
                columns[index] = self._score(session, windows, spans, index, hidden, before)
                if keeper:
                    keeper.keep(index, hidden)
            progress(len(columns), len(windows.rows))
            stopped = gambler is not None and gambler.hopeless([columns[index] for index in batch])
            if stopped:
                break
        if keeper:
            keeper.save()
        _report_rounding(session, columns, self.label)
        return _result(windows, spans, columns, stopped)

    def _score(
        self,
        session: Session,
        windows: Windows | Rolling,
        spans: Spans,
        index: int,
        hidden: Tensor,
        before: BaselineStates | None,
    ) -> Columns:
        targets = windows.rows[index][spans.first[index] :]
        try:
            return score(session, hidden, targets, None if before is None else before[spans.flat(index)])
        except NonFinite as error:
            raise NonFinite(f"{self.label}: window {index}: {error}") from None

    def _windows(self, session: Session) -> Windows | Rolling:
        if self.convention == "word":
            return session.rolling(self.text, self.length, self.documents)
        return session.windows(self.text, self.length, self.windows)


EVALUATOR = Perplexity


def _result(windows: Windows | Rolling, spans: Spans, columns: dict[int, Columns], stopped: bool) -> Result:
    """Metrics and ledger of the windows that were seen."""
    seen = [(piece, _part(columns, spans, piece)) for piece in windows.pieces if piece.window in columns]
    documents = [_document(piece, figures) for piece, figures in seen]
    kl = [figures["kl"] for _, figures in seen if "kl" in figures]
    found = [*_headline(windows, documents), *_means(documents), *_quantiles(documents, kl), *_eligible(windows)]
    used = windows.documents if isinstance(windows, Rolling) else len(columns)
    metrics = (dataclasses.replace(m, n=m.n or used, stopped_early=used if stopped else None) for m in found)
    return Result(metrics=tuple(metrics), documents=tuple(documents))


class _Gambler:
    """The hopeless stop, fed batch by batch: the last batch may be smaller, so it counts by its windows."""

    def __init__(self, stop: Stop, order: Sequence[range]) -> None:
        self.size = max(len(batch) for batch in order)
        windows = sum(len(batch) for batch in order)
        # Sum over all windows at most windows * ln(above), as a mean over batches of `size` windows.
        limit = math.log(stop.above) * windows / (len(order) * self.size)
        self.test = HopelessStop(len(order), limit, stop.alpha)

    def hopeless(self, batch: Sequence[Columns]) -> bool:
        differences = [float((figures["loss"] - figures["baseline_loss"]).mean()) for figures in batch]
        return self.test.add(sum(differences) / self.size)


def _report_rounding(session: Session, columns: dict[int, Columns], label: str) -> None:
    """Raises ArithmeticError for a KL that is a bug, with its window; notes what may be much rounding."""
    rounded = 0
    for index, figures in sorted(columns.items()):
        for name in ("kl", "kl_reverse"):
            if name in figures:
                rounded += divergence.refuse_negative(figures[name], f"{label}: {name} of window {index}")
    if rounded:
        session.note(f"{label}: KL of {rounded} tokens is below {divergence.KL_ROUNDING:g} nats by rounding; kept")


# -- the ledger -------------------------------------------------------------------------------------------------------


def _part(columns: dict[int, Columns], spans: Spans, piece: Piece) -> Columns:
    """The piece's share of its window's figures."""
    first = spans.first[piece.window]
    part = slice(piece.start - first, piece.stop - first)
    return {name: values[part] for name, values in columns[piece.window].items()}


def _document(piece: Piece, figures: Columns) -> Document:
    sums = {name: float(values.sum()) for name, values in figures.items()}

    def count(name: str) -> int | None:
        return round(sums[name]) if name in sums else None

    return Document(
        document=piece.document,
        cluster=piece.cluster,
        window=piece.window,
        tokens=piece.stop - piece.start,
        loss=sums["loss"],
        kl=sums.get("kl"),
        kl_reverse=sums.get("kl_reverse"),
        kl_histogram=divergence.histogram(figures["kl"]) if "kl" in figures else None,
        baseline_loss=sums.get("baseline_loss"),
        correct=count("correct"),
        agree=count("agree"),
        lost=count("lost"),
        gained=count("gained"),
    )


# -- metrics ----------------------------------------------------------------------------------------------------------

_FIGURES = (
    # metric, ledger column, unit, better
    ("kl", "kl", "nats per token", "lower"),
    ("kl_reverse", "kl_reverse", "nats per token", "lower"),
    ("top1_agreement", "agree", "fraction of tokens", "higher"),
    ("top1_accuracy", "correct", "fraction of tokens", "higher"),
    ("flips", "flips", "fraction of tokens", "lower"),
    ("lost", "lost", "fraction of tokens", "lower"),
    ("gained", "gained", "fraction of tokens", "none"),
)


def _headline(windows: Windows | Rolling, documents: Sequence[Document]) -> Iterator[Metric]:
    """Perplexity in the convention of the windows."""
    clusters = [d.cluster for d in documents]
    losses = [d.loss or 0.0 for d in documents]
    if isinstance(windows, Windows):
        yield _exponentiated("perplexity", stats.clustered_mean(losses, [d.tokens for d in documents], clusters))
        return
    words, size = zip(*windows.sizes, strict=True)
    yield _exponentiated("word_perplexity", stats.clustered_mean(losses, words, clusters))
    by_byte = stats.clustered_mean(losses, size, clusters)
    yield _exponentiated("byte_perplexity", by_byte)
    bits = stats.Mean(by_byte.value / math.log(2), by_byte.error / math.log(2), by_byte.clusters)
    yield _metric("bits_per_byte", "bits per byte", "lower", bits.clusters, bits.interval(), bits.standard_error)


def _exponentiated(name: str, loss: stats.Mean) -> Metric:
    perplexity = loss.exponentiated()
    error = None if loss.standard_error is None else perplexity.value * loss.standard_error
    return _metric(name, "perplexity", "lower", loss.clusters, perplexity, error)


def _means(documents: Sequence[Document]) -> Iterator[Metric]:
    tokens = [d.tokens for d in documents]
    clusters = [d.cluster for d in documents]
    for metric, column, unit, better in _FIGURES:
        sums = [value for document in documents if (value := _sum(document, column)) is not None]
        if sums:
            mean = stats.clustered_mean(sums, tokens, clusters)
            yield _metric(metric, unit, better, mean.clusters, mean.interval(), mean.standard_error)


def _quantiles(documents: Sequence[Document], kl: Sequence[np.ndarray[Any, Any]]) -> Iterator[Metric]:
    """Quantiles of token KL; kl [document][token]."""
    if not kl:
        return
    names, index = np.unique([d.cluster for d in documents], return_inverse=True)
    clusters = np.repeat(index, [len(values) for values in kl])
    values = np.concatenate(kl)
    for name, q in QUANTILES:
        found = stats.clustered_quantile(values, clusters, q)
        yield _metric(name, "nats per token", "lower", len(names), found, None)


def _eligible(windows: Windows | Rolling) -> Iterator[Metric]:
    """Of how many documents drawn windows can come."""
    if isinstance(windows, Windows) and windows.eligible is not None and windows.examined is not None:
        count = stats.Interval(float(windows.eligible), None, None)
        found = _metric("eligible_documents", "documents", "none", windows.eligible, count, None)
        yield dataclasses.replace(found, n=windows.examined)


def _sum(document: Document, column: str) -> float | None:
    if column == "flips":
        return None if document.lost is None or document.gained is None else document.lost + document.gained
    value: float | None = getattr(document, column)
    return value


def _metric(name: str, unit: str, better: str, clusters: int, interval: stats.Interval, error: float | None) -> Metric:
    """A metric whose n is still to be filled in."""
    return Metric(
        metric=name,
        value=interval.value,
        unit=unit,
        better=better,
        n=0,
        clusters=clusters,
        standard_error=error,
        low=interval.low,
        high=interval.high,
    )
