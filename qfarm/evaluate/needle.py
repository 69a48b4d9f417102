"""Needle: whether a key that stands somewhere in a long, dull text is found again, by length and depth of the text.

A prompt is an instruction, filler sentences, one sentence that names a key of six digits, filler again, and an
unfinished sentence that asks for the key. The model continues it greedily; right is an answer that holds the key. Every
point of the grid (tokens of the prompt x depth of the needle in percent of the filler) has `keys` prompts, each with a
key of its own, so that items are independent; their share of right answers has Wilson's interval. The wording is
qfarm's own, so figures are not those of other needle tests.

Prompts are read one at a time, unpadded, with the KV cache that the model itself returns. They are read in full
precision and stored quantized, as deployed caches do; `prefill: quantized` lets every token see what is stored.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import tensor

from qfarm import stats
from qfarm.errors import InvalidInput, NonFinite
from qfarm.evaluate import Evaluator, Result
from qfarm.evaluate.generation import greedy
from qfarm.ledger import measured
from qfarm.matrix import canonical_hash
from qfarm.recipe import STRICT
from qfarm.record import Document, Metric

if TYPE_CHECKING:
    from qfarm.worker import Session

INSTRUCTION = "Somewhere in the notes below stands a secret number. Read all of them and remember that number.\n\n"
FILLER = (
    "The kettle stands on the shelf. ",
    "Rain fell again in the afternoon. ",
    "A bicycle leans against the wall. ",
    "The baker opens at seven. ",
    "Two boats lie in the harbour. ",
)
NEEDLE = "The secret number is {key}. Remember it: {key} is the secret number. "
QUESTION = "\n\nThe notes end here. The secret number that they mentioned is"
SPARE_TOKENS = 4  # beyond those of the key, for an answer that begins with a quote or a colon
ANSWER_TOKENS = len(" 123456") + SPARE_TOKENS  # at most: a token is a character or more
Numbers = Annotated[tuple[int, ...], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)]


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt."""

    point: str  # of the grid
    key: str
    ids: list[int]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Needle(Evaluator):
    lengths: Numbers = Field((512, 1024, 2048), min_length=1, description="tokens of a prompt, at most")
    depths: Numbers = Field((0, 25, 50, 75, 100), min_length=1, description="percent of the filler before the needle")
    keys: int = Field(5, ge=1, description="prompts at each point of the grid, each with a key of its own")
    seed: int = Field(0, ge=0, description="of the keys")
    prefill: Literal["full", "quantized"] = Field("full", description="what a prompt's tokens see of a quantized cache")

    def __post_init__(self) -> None:
        if any(not 0 <= depth <= 100 for depth in self.depths):
            raise InvalidInput(f"needle: depths are percentages from 0 to 100, got {list(self.depths)}")
        for name in ("lengths", "depths"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise InvalidInput(f"needle: {name}: {list(given)} names one twice")

    @property
    def label(self) -> str:
        return f"needle {'/'.join(map(str, self.lengths))} x{len(self.depths)} depths x{self.keys}"

    @property
    def window(self) -> int:
        return max(self.lengths) + ANSWER_TOKENS

    def tokens(self) -> int:
        return sum(self.lengths) * len(self.depths) * self.keys

    def options(self) -> dict[str, Any]:
        return super().options() | {"lengths": list(self.lengths), "depths": list(self.depths)}

    def reading_cache(self) -> dict[str, Any]:
        return {"prefill": self.prefill, "chunk": None}

    def protocol(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without prefill, which belongs to cells with a quantized cache (see reading_cache)."""
        found = super().protocol(*args, **kwargs)
        return found | {"options": {name: value for name, value in found["options"].items() if name != "prefill"}}

    def prepare(self, session: Session) -> None:
        self._items(session)

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        items = self._items(session)
        documents = []
        for item in items:
            documents.append(self._ask(session, item))
            progress(len(documents), len(items))
        return Result(metrics=tuple(_metrics(documents)), documents=tuple(documents))

    def _items(self, session: Session) -> list[Item]:
        """All prompts as tokens, made once per model."""
        most = getattr(session.loaded.model.config, "max_position_embeddings", None)
        if most is not None and self.window > most:
            raise InvalidInput(
                f"{self.label}: {self.window} tokens with the answer, but {session.cell.model} reads at most {most}"
            )
        key = ("needle", self.lengths, self.depths, self.keys, self.seed)
        found: list[Item] = session.keep(key, lambda: list(self._made(session.loaded.tokenizer)))
        return found

    def _made(self, tokenizer: Any) -> Iterator[Item]:
        for length in self.lengths:
            for depth in self.depths:
                for number in range(self.keys):
                    draw = random.Random(f"{self.seed} {length} {depth} {number}")
                    key = f"{draw.randrange(100_000, 1_000_000)}"
                    yield Item(f"{length} at {depth} %", key, prompt(tokenizer, key, length, depth))

    def _ask(self, session: Session, item: Item) -> Document:
        new_tokens = len(session.loaded.tokenizer.encode(f" {item.key}", add_special_tokens=False)) + SPARE_TOKENS
        try:
            (made,) = greedy(session, tensor([item.ids]), new_tokens).tolist()
        except NonFinite as error:
            raise NonFinite(f"{self.label}: {item.point}: {error}") from None
        answer = session.loaded.tokenizer.decode(made, skip_special_tokens=True)
        name = canonical_hash(item.ids)
        return Document(
            document=name,
            cluster=name,
            tokens=new_tokens,
            task=item.point,
            answer=answer,
            correct=int(item.key in answer),
        )


EVALUATOR = Needle


def prompt(tokenizer: Any, key: str, length: int, depth: int) -> list[int]:
    """Token ids, as many filler sentences as fit into `length`, the tokenizer's BOS in front where it has one.

    Raises InvalidInput where not one fits.
    """
    sizes = [len(tokenizer.encode(sentence, add_special_tokens=False)) for sentence in FILLER]
    count = max(1, length * len(FILLER) // sum(sizes))
    while count > 0:
        sentences = [FILLER[index % len(FILLER)] for index in range(count)]
        before = round(count * depth / 100)
        text = "".join([INSTRUCTION, *sentences[:before], NEEDLE.format(key=key), *sentences[before:]])
        ids: list[int] = tokenizer.encode(text.rstrip() + QUESTION)
        if tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers close every text
        if len(ids) <= length:
            return ids
        count -= max(1, (len(ids) - length) // max(sizes))
    raise InvalidInput(f"needle: a prompt without any filler is longer than {length} tokens")


def _metrics(documents: Sequence[Document]) -> Iterator[Metric]:
    """The share of right answers, over all prompts and by point of the grid."""
    points = dict.fromkeys(document.task for document in documents)
    for name, point in [("acc", None), *((f"acc {point}", point) for point in points)]:
        right = [document.correct or 0 for document in documents if point in (None, document.task)]
        interval = stats.wilson(sum(right), len(right))
        error = stats.clustered_mean(right, [1.0] * len(right), range(len(right))).standard_error
        yield measured(
            name, "fraction of prompts", "higher", n=len(right), clusters=len(right), interval=interval, error=error
        )
