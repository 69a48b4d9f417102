"""Perplexity on fixed windows, and how far the model has moved from its full-precision baseline.

Perplexity is exp(mean cross entropy) over the predicted positions 1 .. length-1 of non-overlapping windows, each
window read alone, without a KV cache, logits in float32 (the convention of the GPTQ papers; word-level perplexity of
lm-eval is another number). All windows have one length, so the mean over tokens equals the mean of window means.

Divergence from the baseline is measured on the same tokens: KL(baseline || cell) and KL(cell || baseline), the share
of positions whose most probable token agrees, and flips: right before and wrong now (lost), wrong before and right
now (gained). Full logits are never stored: the baseline's final hidden states are kept in the cache and its output
head is applied to them again.

The ledger has one row per window and document, since a window of running text may span two articles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qfarm import cache, stats
from qfarm.errors import NonFinite
from qfarm.evaluate import Evaluator, Result
from qfarm.matrix import canonical_hash
from qfarm.recipe import STRICT
from qfarm.record import Document, Metric
from qfarm.text import Part, check_name
from qfarm.windows import DRAWN_WINDOWS, Piece, Windows

if TYPE_CHECKING:
    from qfarm.worker import Session

BATCH_TOKENS = 2048  # per forward pass; fixed, since the batch's shape can move the last bits of a loss
# Elements of one chunk of float32 logits: on a CPU it should stay in the caches, a GPU wants few large kernels.
LOGIT_BUDGET = {"cpu": 1 << 22, "cuda": 1 << 27}
USUAL_WINDOWS = {"c4": DRAWN_WINDOWS}  # for estimates, where a text's length is not known yet
HIDDEN = "hidden"  # cache folder of baselines' hidden states


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Perplexity(Evaluator):
    text: str = Field(description="wikitext2, c4 or python-docs")
    length: int = Field(2048, ge=2, description="tokens per window")
    windows: int | None = Field(None, ge=1, description="the first so many windows; default: all")
    divergence: bool = Field(True, description="compare with the baseline's predictions token by token")

    def __post_init__(self) -> None:
        check_name(self.text)

    @property
    def label(self) -> str:
        return f"perplexity {self.text} {self.length}" + (f" x{self.windows}" if self.windows else "")

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

    def prepare(self, session: Session) -> None:
        if not self.divergence or session.cell.is_baseline:
            return
        windows = session.windows(self.text, self.length, self.windows)
        path = cache.find_file(HIDDEN, _hidden_name(session, windows))
        if path is None:
            session.note(f"{self.label}: the baseline's hidden states are not in this machine's cache; computed again")
            hidden = torch.cat([states.cpu() for states in _hidden_states(session, windows)])
            path = _save_hidden(session, windows, hidden)
        # Held open from here on: the cache may drop the file to make room for another evaluation's.
        session.baseline_states[self.label] = safe_open(path, framework="pt").get_slice(HIDDEN)  # type: ignore[no-untyped-call]

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        windows = session.windows(self.text, self.length, self.windows)
        is_baseline = session.cell.is_baseline
        compares = self.divergence and not is_baseline
        reference = session.baseline_states[self.label] if compares else None
        kept: list[Tensor] = []
        columns: list[Columns] = []
        done = 0
        for states in _hidden_states(session, windows):
            batch = slice(done, done + len(states))
            before = reference[batch.start : batch.stop] if reference is not None else None
            columns += [
                _score(session, states[i], windows.ids[done + i], before[i] if before is not None else None)
                for i in range(len(states))
            ]
            if is_baseline and self.divergence:
                kept.append(states.cpu())
            done += len(states)
            progress(done, len(windows.ids))
        _refuse_nonfinite(columns, self.label)
        if kept:
            _save_hidden(session, windows, torch.cat(kept))
        documents = tuple(_document(piece, columns[piece.window]) for piece in windows.pieces)
        return Result(metrics=tuple(_metrics(documents, len(windows.ids))), documents=documents)


EVALUATOR = Perplexity

# Per predicted position of one window, float64 [length - 1]: loss and so on, by the ledger's names.
Columns = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


@torch.no_grad()
def _hidden_states(session: Session, windows: Windows) -> Iterator[Tensor]:
    """Final hidden states [batch, length, hidden], batch by batch."""
    batch = session.batch(BATCH_TOKENS, windows.ids.shape[1])
    for ids in torch.split(windows.ids, batch):
        yield session.loaded.body(ids.to(session.loaded.device))


@torch.no_grad()
def _score(session: Session, hidden: Tensor, ids: Tensor, before: Tensor | None) -> Columns:
    """Everything about one window: hidden [length, hidden], ids [length], the baseline's hidden states or None."""
    head = session.loaded.head
    targets = ids[1:].to(hidden.device)
    chunk = max(16, (LOGIT_BUDGET[session.device.type] >> session.shrink) // head.weight.shape[0])
    parts = [
        _score_chunk(
            head(hidden[start:stop]).float(),
            targets[start:stop],
            session.baseline_head(before[start:stop].to(hidden.device)).float() if before is not None else None,
        )
        for start, stop in _chunks(len(targets), chunk)
    ]
    return {name: torch.cat([part[name] for part in parts]).double().cpu().numpy() for name in parts[0]}


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _score_chunk(logits: Tensor, targets: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    """logits, before [tokens, vocabulary] float32 -> figures [tokens]."""
    norm = logits.logsumexp(-1)
    top = logits.argmax(-1)
    out = {"loss": norm - logits.gather(-1, targets[:, None])[:, 0], "correct": (top == targets).float()}
    if before is None:
        return out
    norm_before = before.logsumexp(-1)
    top_before = before.argmax(-1)
    right_before = (top_before == targets).float()
    out["baseline_loss"] = norm_before - before.gather(-1, targets[:, None])[:, 0]
    out["agree"] = (top == top_before).float()
    out["lost"] = right_before * (1 - out["correct"])
    out["gained"] = (1 - right_before) * out["correct"]
    shift = norm - norm_before
    difference = before - logits
    # KL(b || q) = sum_v p_b (log p_b - log p_q); the normalisers' difference is constant over v.
    out["kl"] = (before.sub_(norm_before[:, None]).exp_() * difference).sum(-1) + shift
    out["kl_reverse"] = -(logits.sub_(norm[:, None]).exp_() * difference).sum(-1) - shift
    return out


def _refuse_nonfinite(columns: Sequence[Columns], label: str) -> None:
    for window, figures in enumerate(columns):
        for name, values in figures.items():
            if not np.isfinite(values).all():
                raise NonFinite(f"{label}: {name} of window {window} is not finite")


def _document(piece: Piece, figures: Columns) -> Document:
    part = slice(piece.start - 1, piece.stop - 1)  # column j holds the prediction of position j + 1
    sums = {name: float(values[part].sum()) for name, values in figures.items()}

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
        baseline_loss=sums.get("baseline_loss"),
        correct=count("correct"),
        agree=count("agree"),
        lost=count("lost"),
        gained=count("gained"),
    )


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


def _metrics(documents: Sequence[Document], windows: int) -> Iterator[Metric]:
    tokens = [d.tokens for d in documents]
    clusters = [d.cluster for d in documents]
    loss = stats.clustered_mean([d.loss or 0.0 for d in documents], tokens, clusters)
    perplexity = loss.exponentiated()
    error = None if loss.standard_error is None else perplexity.value * loss.standard_error
    yield _metric("perplexity", "perplexity", "lower", windows, loss.clusters, perplexity, error)
    for metric, column, unit, better in _FIGURES:
        sums = [value for document in documents if (value := _sum(document, column)) is not None]
        if sums:
            mean = stats.clustered_mean(sums, tokens, clusters)
            yield _metric(metric, unit, better, windows, mean.clusters, mean.interval(), mean.standard_error)


def _sum(document: Document, column: str) -> float | None:
    if column == "flips":
        return None if document.lost is None or document.gained is None else document.lost + document.gained
    value: float | None = getattr(document, column)
    return value


def _metric(
    name: str, unit: str, better: str, n: int, clusters: int, interval: stats.Interval, error: float | None
) -> Metric:
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


# -- the baseline's hidden states -------------------------------------------------------------------------------------


def _hidden_name(session: Session, windows: Windows) -> str:
    identity = [session.cell.fingerprint, session.cell.dtype, windows.digest, BATCH_TOKENS, session.device.type]
    return f"{canonical_hash(identity)}.safetensors"


def _save_hidden(session: Session, windows: Windows, hidden: Tensor) -> Path:
    name = _hidden_name(session, windows)
    return cache.publish_file(HIDDEN, name, lambda part: save_file({HIDDEN: hidden.contiguous()}, part))
