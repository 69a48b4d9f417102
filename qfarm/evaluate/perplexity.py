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
now (gained). The baseline is also compared with itself: some of its windows are read once more in forward passes of
another shape, which is mathematically the same. What that moves (`kl_floor`, `flips_floor`) is arithmetic, not loss of
quality, and the least that a cell's KL and flips can be judged against.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm import divergence
from qfarm.betting import HopelessStop
from qfarm.errors import InvalidInput, NonFinite
from qfarm.evaluate import Evaluator, Result
from qfarm.layers.trace import first_nonfinite
from qfarm.ledger import documents_of, metrics_of
from qfarm.predictions import (
    BaselineStates,
    Columns,
    Keeper,
    Scorer,
    Spans,
    baseline_states,
    hidden_states,
    shortened_states,
    visiting_order,
)
from qfarm.recipe import STRICT, describe
from qfarm.record import Metric
from qfarm.text import Part, absolute, public_name, reference
from qfarm.windows import DRAWN_WINDOWS, Rolling, Windows

if TYPE_CHECKING:
    from qfarm.worker import Session

USUAL_WINDOWS = {"c4": DRAWN_WINDOWS, "c4-new": DRAWN_WINDOWS}  # for estimates, where a length is not known yet
FLOOR_WINDOWS = 3  # of the baseline, read twice
# Options that came later: left out of the protocol at these values, so that earlier results keep their identity.
_LATER = {"convention": "windows", "documents": None, "stop": None, "kv_chunk": None}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stop:
    """End a cell whose perplexity is hopeless; a bounded share of cells at the limit is stopped wrongly.

    The cell's other evaluations, which come after those with a stop, are not run either.
    """

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

    @property
    def stop_alpha(self) -> float | None:
        return self.stop.alpha if self.stop else None

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
        scorer = Scorer(session, int(spans.offsets[-1]), self.label)
        gambler = _Gambler(self.stop, order) if self.stop and before is not None else None
        columns: dict[int, Columns] = {}
        stopped = False
        for group in order:
            for batch in group:
                for index, hidden in zip(batch, hidden_states(session, windows, batch, spans), strict=True):
                    columns[index] = self._score(session, scorer, windows, spans, index, hidden, before)
                    if keeper:
                        keeper.keep(index, hidden)
                progress(len(columns), len(windows.rows))
            stopped = gambler is not None and gambler.hopeless([columns[i] for batch in group for i in batch])
            if stopped:
                break
        if keeper:
            keeper.save()
        _report_rounding(session, columns, self.label)
        documents = documents_of(windows, spans, columns)
        found = metrics_of(windows, spans, columns, documents)
        if stopped:
            found = [dataclasses.replace(metric, stopped_early=len(columns)) for metric in found]
        if keeper:
            found += _floors(session, scorer, windows, spans, [group[0][0] for group in order[:FLOOR_WINDOWS]], keeper)
        return Result(metrics=tuple(found), documents=tuple(documents))

    def _score(
        self,
        session: Session,
        scorer: Scorer,
        windows: Windows | Rolling,
        spans: Spans,
        index: int,
        hidden: Tensor,
        before: BaselineStates | None,
    ) -> Columns:
        targets = windows.rows[index][spans.first[index] :]
        try:
            return scorer.score(hidden, targets, None if before is None else before[spans.flat(index)])
        except NonFinite as error:
            where = first_nonfinite(session.loaded, windows.rows[index])
            first = f"; first in {where}" if where else "; inputs and outputs of all linear layers are"
            raise NonFinite(f"{self.label}: window {index}: {error}{first}") from None

    def _windows(self, session: Session) -> Windows | Rolling:
        if self.convention == "word":
            return session.rolling(self.text, self.length, self.documents)
        return session.windows(self.text, self.length, self.windows)


EVALUATOR = Perplexity


class _Gambler:
    """The hopeless stop, fed group by group: the last group may be smaller, so it counts by its windows."""

    def __init__(self, stop: Stop, order: Sequence[Sequence[range]]) -> None:
        sizes = [sum(map(len, group)) for group in order]
        self.size, windows = max(sizes), sum(sizes)
        # Sum over all windows at most windows * ln(above), as a mean over groups of `size` windows.
        limit = math.log(stop.above) * windows / (len(order) * self.size)
        self.test = HopelessStop(len(order), limit, stop.alpha)

    def hopeless(self, group: Sequence[Columns]) -> bool:
        differences = [float((figures["loss"] - figures["baseline_loss"]).mean()) for figures in group]
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


def _floors(
    session: Session,
    scorer: Scorer,
    windows: Windows | Rolling,
    spans: Spans,
    chosen: Sequence[int],
    keeper: Keeper,
) -> list[Metric]:
    """KL and flips of the baseline against itself: the chosen windows as they were read, and read another way."""
    found: list[Columns] = []
    for index in chosen:
        again = shortened_states(session, windows, index, spans)
        targets = windows.rows[index][spans.first[index] :][: len(again)]
        if len(again):
            found.append(scorer.score(again, targets, keeper.kept(index)[: len(again)]))
    if not found:
        return []
    kl = np.concatenate([one["kl"] for one in found]).mean()
    flips = np.concatenate([one["lost"] + one["gained"] for one in found]).mean()
    figures = (("kl_floor", "nats per token", kl), ("flips_floor", "fraction of tokens", flips))
    return [
        Metric(metric=name, value=float(value), unit=unit, better="none", n=len(found)) for name, unit, value in figures
    ]
