"""Evaluators: each measures a model under a protocol and keeps the per-document results.

An evaluator is a frozen pydantic dataclass in `qfarm/evaluate/`, named in a job by its file name; its fields are the
protocol. It never changes the model.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import reprlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from qfarm.errors import InvalidInput, nearest
from qfarm.matrix import canonical_hash
from qfarm.recipe import describe
from qfarm.runs import RUNS, Run, run_protocol
from qfarm.text import absolute, public_name

if TYPE_CHECKING:
    from qfarm.record import Document, LayerStatistic, Metric
    from qfarm.text import Part
    from qfarm.worker import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one evaluation of one cell gives."""

    metrics: tuple[Metric, ...]
    documents: tuple[Document, ...]  # the ledger
    analysis: tuple[LayerStatistic, ...] = ()  # figures of linear layers


class Evaluator:
    """Base of all evaluators."""

    version: ClassVar[int] = 1  # raise it when a fix changes results: it enters the evaluation's identity
    runs: ClassVar[tuple[Run, ...]] = RUNS  # those in which it means something
    gate: ClassVar[bool] = False  # runs before the others of its run, none of which is run where it fails
    one_device: ClassVar[bool] = False  # the model has to lie on one device as a whole
    timed: ClassVar[bool] = False  # its figures are times: never the same twice, and of one machine only

    @property
    def name(self) -> str:
        return type(self).__module__.rsplit(".", 1)[-1]

    @classmethod
    def expand(cls, options: object) -> list[Mapping[str, Any]]:
        """What stands behind the name in a job, as the options of one evaluator each. Raises InvalidInput."""
        if isinstance(options, Mapping):
            return [options]
        raise InvalidInput(f"expected an evaluation's name or {{name: options}}, got {reprlib.repr(options)}")

    @property
    def label(self) -> str:
        """Short and human: 'perplexity wikitext2 2048'."""
        raise NotImplementedError

    @property
    def window(self) -> int | None:
        """Tokens that the model reads at once, where that is fixed."""
        return None

    def texts(self) -> tuple[tuple[str, Part], ...]:
        """(text, part) pairs whose hashes belong to the protocol."""
        return ()

    @property
    def needs_baseline(self) -> bool:
        """True if cells are compared with what the baseline's evaluation leaves in the cache."""
        return False

    @property
    def stop_alpha(self) -> float | None:
        """Chance that a cell at the limit is ended early, with all of the job's evaluations; None: it never is."""
        return None

    def tokens(self) -> int:
        """About how many tokens one run feeds to the model; for estimates only."""
        raise NotImplementedError

    def prepare(self, session: Session) -> None:
        """Called before the cell is quantized, while the model is still the original one."""

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Plain data from which a worker builds the evaluator again."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def reading_cache(self) -> dict[str, Any]:
        """How a quantized KV cache is read (`LoadedModel.reading_cache`); evaluators that generate prefill in full.

        It enters the protocol of cells that have one, and of no other; so does `kv_chunk`, an option of evaluators
        that can read in chunks.
        """
        chunk = getattr(self, "kv_chunk", None)
        return {"prefill": "quantized", "chunk": None} if chunk is None else {"prefill": "windowed", "chunk": chunk}

    def protocol(
        self, tokenizer: str, dtype: str, text_hash: Callable[[str, Part], str], *, kv: bool = False, run: Run = "fake"
    ) -> dict[str, Any]:
        """Everything two rows must agree on before they may be compared; kv: the cell's KV cache is quantized.

        Where a file lies is no part of it; its name and its content are.
        """
        options = {name: value for name, value in self.options().items() if name != "kv_chunk"}
        if isinstance(options.get("text"), str):
            options["text"] = public_name(options["text"])
        found = {
            "evaluator": self.name,
            "version": self.version,
            "options": options,
            "texts": {f"{public_name(text)}/{part}": text_hash(text, part) for text, part in self.texts()},
            "tokenizer": tokenizer,
            "dtype": dtype,
        }
        return found | run_protocol(run) | ({"kv": self.reading_cache()} if kv else {})


class TextEvaluator(Evaluator):
    """Base of those whose options are a `text` and the `length` of its windows, read one by one."""

    text: str
    length: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", absolute(self.text))

    @property
    def window(self) -> int:
        return self.length

    def texts(self) -> tuple[tuple[str, Part], ...]:
        return ((self.text, "evaluation"),)


def eval_id(protocol: Mapping[str, Any]) -> str:
    return canonical_hash(protocol)


def evaluator_names() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def evaluator_kind(name: str) -> type[Evaluator]:
    """Raises InvalidInput for a name that no evaluator has."""
    if name not in evaluator_names():
        raise InvalidInput(f'unknown evaluation "{name}"{nearest(name, evaluator_names())}')
    kind: type[Evaluator] = importlib.import_module(f"qfarm.evaluate.{name}").EVALUATOR
    return kind


def build_evaluator(name: str, options: Mapping[str, Any]) -> Evaluator:
    kind = evaluator_kind(name)
    try:
        return kind(**options)
    except pydantic.ValidationError as error:
        raise InvalidInput(f"{name}: {describe(error, [f.name for f in dataclasses.fields(kind)])}") from None  # type: ignore[arg-type]


def parse_evaluation(entry: object) -> tuple[Evaluator, ...]:
    """Read one entry of a job's `evaluate`: a name or {name: options}; some stand for several evaluations.

    Raises InvalidInput.
    """
    if isinstance(entry, str):
        entry = {entry: None}
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if options is None or isinstance(options, (Mapping, list)):
            return tuple(build_evaluator(str(name), each) for each in evaluator_kind(str(name)).expand(options or {}))
    raise InvalidInput(f"expected an evaluation's name or {{name: options}}, got {reprlib.repr(entry)}")
