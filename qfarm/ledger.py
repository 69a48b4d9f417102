"""Ledger: from the figures of single predictions to ledger rows and metrics of perplexity and divergence.

One row per window and document, since a window of running text may span two articles. Errors have documents as their
clusters; the median and the 99 % quantile of token KL have Woodruff intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qfarm import divergence, stats
from qfarm.predictions import Columns, Spans
from qfarm.record import Document, Metric
from qfarm.windows import Piece, Rolling, Windows

QUANTILES = (("kl_median", 0.5), ("kl_p99", 0.99))
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


def measured(
    name: str, unit: str, better: str, *, n: int, clusters: int, interval: stats.Interval, error: float | None
) -> Metric:
    """A metric with its interval and standard error."""
    return Metric(
        metric=name,
        value=interval.value,
        unit=unit,
        better=better,
        n=n,
        clusters=clusters,
        standard_error=error,
        low=interval.low,
        high=interval.high,
    )


def documents_of(windows: Windows | Rolling, spans: Spans, columns: Mapping[int, Columns]) -> list[Document]:
    """Ledger rows of the windows that were seen."""
    return [_document(piece, _part(columns, spans, piece)) for piece in windows.pieces if piece.window in columns]


def metrics_of(
    windows: Windows | Rolling, spans: Spans, columns: Mapping[int, Columns], documents: Sequence[Document]
) -> list[Metric]:
    """Metrics of the windows that were seen, the headline first; `documents` are their ledger rows."""
    n = windows.documents if isinstance(windows, Rolling) else len(columns)
    kl = [_part(columns, spans, p).get("kl") for p in windows.pieces if p.window in columns]
    return [
        *_headline(windows, documents, n),
        *_means(documents, n),
        *_quantiles(documents, [values for values in kl if values is not None], n),
        *_eligible(windows),
    ]


# -- rows -------------------------------------------------------------------------------------------------------------


def _part(columns: Mapping[int, Columns], spans: Spans, piece: Piece) -> Columns:
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


def _headline(windows: Windows | Rolling, documents: Sequence[Document], n: int) -> Iterator[Metric]:
    """Perplexity in the convention of the windows."""
    clusters = [d.cluster for d in documents]
    losses = [d.loss or 0.0 for d in documents]
    if isinstance(windows, Windows):
        yield _exponentiated("perplexity", stats.clustered_mean(losses, [d.tokens for d in documents], clusters), n)
        return
    words, size = zip(*windows.sizes, strict=True)
    yield _exponentiated("word_perplexity", stats.clustered_mean(losses, words, clusters), n)
    by_byte = stats.clustered_mean(losses, size, clusters)
    yield _exponentiated("byte_perplexity", by_byte, n)
    yield _mean(
        "bits_per_byte",
        "bits per byte",
        "lower",
        stats.Mean(by_byte.value / math.log(2), by_byte.error / math.log(2), by_byte.clusters),
        n,
    )


def _exponentiated(name: str, loss: stats.Mean, n: int) -> Metric:
    perplexity = loss.exponentiated()
    error = None if loss.standard_error is None else perplexity.value * loss.standard_error
    return measured(name, "perplexity", "lower", n=n, clusters=loss.clusters, interval=perplexity, error=error)


def _mean(name: str, unit: str, better: str, mean: stats.Mean, n: int) -> Metric:
    interval = mean.interval()
    return measured(name, unit, better, n=n, clusters=mean.clusters, interval=interval, error=mean.standard_error)


def _means(documents: Sequence[Document], n: int) -> Iterator[Metric]:
    tokens = [d.tokens for d in documents]
    clusters = [d.cluster for d in documents]
    for metric, column, unit, better in _FIGURES:
        sums = [value for document in documents if (value := _sum(document, column)) is not None]
        if sums:
            yield _mean(metric, unit, better, stats.clustered_mean(sums, tokens, clusters), n)


def _quantiles(documents: Sequence[Document], kl: Sequence[NDArray[np.float64]], n: int) -> Iterator[Metric]:
    """Quantiles of token KL; kl [document][token]."""
    if not kl:
        return
    names, index = np.unique([d.cluster for d in documents], return_inverse=True)
    clusters = np.repeat(index, [len(values) for values in kl])
    values = np.concatenate(kl)
    for name, q in QUANTILES:
        found = stats.clustered_quantile(values, clusters, q)
        yield measured(name, "nats per token", "lower", n=n, clusters=len(names), interval=found, error=None)


def _eligible(windows: Windows | Rolling) -> Iterator[Metric]:
    """Of how many documents drawn windows can come."""
    if isinstance(windows, Windows) and windows.eligible is not None and windows.examined is not None:
        yield measured(
            "eligible_documents",
            "documents",
            "none",
            n=windows.examined,
            clusters=windows.eligible,
            interval=stats.Interval(float(windows.eligible), None, None),
            error=None,
        )


def _sum(document: Document, column: str) -> float | None:
    if column == "flips":
        return None if document.lost is None or document.gained is None else document.lost + document.gained
    value: float | None = getattr(document, column)
    return value
