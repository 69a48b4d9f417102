"""Generation: how long a cell's greedy continuation of a prompt stays that of its full-precision baseline.

Each prompt is a window of a text; both models continue it by their most probable token, `new_tokens` times, past any
end-of-sequence token. Per prompt: the index of the first token that differs, `new_tokens` if none does. From that token
on the two texts are different contexts, so nothing after it is compared. Unlike divergence on given text this sees a
quantized KV cache as it is used: keys and values of earlier tokens are read back at every step.

Prompts have one length, hence no padding, and are spread evenly over the text so that they come from many documents.
The baseline's continuations are kept in the machine's cache and computed again where they are lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor

from qfarm import depot, stats
from qfarm.errors import NonFinite
from qfarm.evaluate import Evaluator, Result
from qfarm.ledger import measured
from qfarm.matrix import canonical_hash
from qfarm.models.past import cache_keyword, returned_cache
from qfarm.recipe import STRICT
from qfarm.record import Document, Metric
from qfarm.text import Part, absolute, public_name, reference
from qfarm.windows import Piece, Windows

if TYPE_CHECKING:
    from qfarm.models.load import LoadedModel
    from qfarm.worker import Session

BATCH_TOKENS = 2048  # of prompts per batch; fixed, since the batch's shape can move the last bits of a logit
CONTINUATIONS = "continuations"  # cache folder of baselines' continuations


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Generation(Evaluator):
    text: Annotated[str, BeforeValidator(reference)] = Field(description="as of perplexity")
    prompts: int = Field(64, ge=1, description="fewer where the text does not hold so many")
    prompt_tokens: int = Field(64, ge=2)
    new_tokens: int = Field(64, ge=1, description="greedy tokens after each prompt")

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", absolute(self.text))

    @property
    def label(self) -> str:
        return f"generation {public_name(self.text)} {self.prompt_tokens}+{self.new_tokens} x{self.prompts}"

    @property
    def window(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def texts(self) -> tuple[tuple[str, Part], ...]:
        return ((self.text, "evaluation"),)

    @property
    def needs_baseline(self) -> bool:
        return True

    def tokens(self) -> int:
        return self.prompts * self.window

    def reading_cache(self) -> dict[str, Any]:
        """The prompt is read in full precision and stored quantized, as deployed caches do."""
        return {"prefill": "full", "chunk": None}

    def prepare(self, session: Session) -> None:
        if session.cell.is_baseline:
            return
        windows = session.windows(self.text, self.prompt_tokens, None)
        path = depot.find(CONTINUATIONS, self._name(session, windows))
        if path is None:
            session.note(f"{self.label}: the baseline's continuations are in no cache; computed again")
            path = self._save(session, windows, self._continue(session, windows, lambda done, total: None))
        session.baseline_states[str(self)] = load_file(path)[CONTINUATIONS]

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        windows = session.windows(self.text, self.prompt_tokens, None)
        tokens = self._continue(session, windows, progress)
        if session.cell.is_baseline:
            self._save(session, windows, tokens)
        before = tokens if session.cell.is_baseline else session.baseline_states[str(self)]
        agreed = first_difference(tokens.numpy(), before.numpy())
        last = {piece.window: piece for piece in windows.pieces}  # what a prompt ends in is what is continued
        documents = [
            _document(last[window], int(count), self.new_tokens)
            for window, count in zip(self._chosen(windows), agreed, strict=True)
        ]
        return Result(metrics=tuple(_metrics(documents, agreed, self.new_tokens)), documents=tuple(documents))

    def _chosen(self, windows: Windows) -> list[int]:
        """Indices of the windows that are the prompts."""
        count = len(windows.ids)
        prompts = min(self.prompts, count)
        return [i * count // prompts for i in range(prompts)]

    def _continue(self, session: Session, windows: Windows, progress: Callable[[int, int], None]) -> Tensor:
        """The session's model's continuations of all prompts, int64 [prompts, new tokens]."""
        chosen = windows.ids[self._chosen(windows)]
        found: list[Tensor] = []
        for ids in torch.split(chosen, session.batch(BATCH_TOKENS, self.prompt_tokens)):
            try:
                found.append(greedy(session, ids, self.new_tokens))
            except NonFinite as error:
                raise NonFinite(f"{self.label}: {error}") from None
            progress(sum(map(len, found)), len(chosen))
        return torch.cat(found)

    def _name(self, session: Session, windows: Windows) -> str:
        prompts = canonical_hash(windows.ids[self._chosen(windows)].tolist())
        cell, loaded = session.cell, session.loaded
        identity = [cell.fingerprint, cell.dtype, prompts, self.new_tokens, BATCH_TOKENS, session.device.type]
        return f"{canonical_hash([*identity, loaded.chunk])}.safetensors"

    def _save(self, session: Session, windows: Windows, tokens: Tensor) -> Path:
        name = self._name(session, windows)
        return depot.publish(CONTINUATIONS, name, lambda part: save_file({CONTINUATIONS: tokens}, part))


EVALUATOR = Generation


@torch.no_grad()
def greedy(session: Session, ids: Tensor, new_tokens: int) -> Tensor:
    """Most probable continuations, int64 [prompts, new tokens], of prompts [prompts, tokens] of one length."""
    return torch.cat(list(itertools.islice(greedy_steps(session.loaded, ids), new_tokens)), dim=1).cpu()


def greedy_steps(loaded: LoadedModel, ids: Tensor) -> Iterator[Tensor]:
    """The most probable next token of each prompt, int64 [prompts, 1], without end; called without gradients.

    The KV cache is the one that the model itself returns, so that an installed quantized one is used. Raises NonFinite.
    """
    body = loaded.model.base_model
    step, past, keyword = ids.to(loaded.device), None, cache_keyword(body)
    for index in itertools.count():
        out = body(input_ids=step, use_cache=True, **{keyword: past})
        logits = loaded.head(out.last_hidden_state[:, -1])  # [prompts, vocabulary]
        if not bool(torch.isfinite(logits).all()):
            raise NonFinite(f"a logit of new token {index} is not finite")
        past, step = returned_cache(out), logits.argmax(-1, keepdim=True)
        yield step


def first_difference(tokens: NDArray[Any], before: NDArray[Any]) -> NDArray[np.int64]:
    """Index [prompts] of the first token that differs between two [prompts, tokens], their length if none does."""
    differs = tokens != before
    found: NDArray[np.int64] = np.where(differs.any(axis=1), differs.argmax(axis=1), tokens.shape[1])
    return found


def _document(piece: Piece, agreed: int, new_tokens: int) -> Document:
    return Document(
        document=piece.document, cluster=piece.cluster, window=piece.window, tokens=new_tokens, agree=agreed
    )


def _metrics(documents: Sequence[Document], agreed: NDArray[np.int64], new_tokens: int) -> Iterator[Metric]:
    clusters = [document.cluster for document in documents]
    ones = np.ones(len(documents))
    for name, values, unit in (
        ("first_divergence", agreed, "tokens"),
        ("identical", agreed == new_tokens, "fraction of prompts"),
    ):
        mean = stats.clustered_mean(values, ones, clusters)
        interval, error = mean.interval(), mean.standard_error
        yield measured(name, unit, "higher", n=len(documents), clusters=mean.clusters, interval=interval, error=error)
