"""Tasks: questions of lm-eval, answered by log-likelihood or by greedy generation.

One name is one evaluation: `csqa` (BoolQ, ARC-Easy, ARC-Challenge, HellaSwag, PIQA, WinoGrande and the plain mean of
their accuracies), `mmlu` (57 subjects, weighted by size), `gsm8k`, `truthfulqa`, `bbh`, any task, group or tag of
lm-eval, or a task's YAML file. A job writes `tasks: [csqa, mmlu]` or `tasks: {names: [gsm8k], limit: 100}`.

Tasks come from lm-eval as they are; what is ours is the source of their data, how the model is called, and what is
kept: a ledger row per item with the log-likelihood of each choice. Nothing of lm-eval is imported to plan a job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from qfarm.errors import InvalidInput, NonFinite
from qfarm.evaluate import Evaluator, Result
from qfarm.recipe import STRICT
from qfarm.scheme import parse_scheme
from qfarm.tasks import registry

if TYPE_CHECKING:
    from qfarm.record import Document
    from qfarm.tasks.build import Prepared
    from qfarm.tasks.model import SessionLM
    from qfarm.worker import Session

# (items, tokens read for one item, tokens of one example), for estimates only: the first 100 items of the data pack
# with SmolLM2's tokenizer, shared prefixes once. Lengths of answers are guesses: 120 for gsm8k, 50 for TruthfulQA.
SIZES: Mapping[str, tuple[int, int, int]] = {
    "boolq": (3270, 153, 164),
    "arc_easy": (2376, 40, 34),
    "arc_challenge": (1172, 52, 36),
    "hellaswag": (10042, 152, 81),
    "piqa": (1838, 52, 37),
    "winogrande": (1267, 28, 25),
    "gsm8k": (1319, 184, 182),
    "truthfulqa_gen": (817, 233, 0),
    "truthfulqa_mc1": (817, 231, 0),
    "truthfulqa_mc2": (817, 255, 0),
}
# Of any other task: a subject of MMLU by its choices, a task of BIG-Bench Hard by its answers.
USUAL = {True: (250, 130, 90), False: (250, 700, 150)}  # by: does not generate


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tasks(Evaluator):
    version = 2  # 2: nothing is padded for quantizers that look across tokens

    task: str = Field(description="a name of lm-eval, csqa, or a task's YAML file; jobs write names: [...]")
    few_shot: int | None = Field(None, ge=0, description="examples in the prompt; default: the task's own number")
    limit: int | None = Field(None, ge=1, description="the first so many items of each task; default: all")
    seed: int = Field(1234, ge=0, description="of the choice of examples; 1234 is lm-eval's")
    chat_template: bool = Field(False, description="wrap prompts in the tokenizer's chat template")
    batch_tokens: int = Field(4096, ge=1, description="per forward pass; the last bits of a result depend on it")
    prefill: Literal["full", "quantized"] | None = Field(
        None, description="what a prompt's tokens see of a quantized KV cache; default: full where all tasks generate"
    )

    def __post_init__(self) -> None:
        if registry.is_file(self.task):
            object.__setattr__(self, "task", str(Path(self.task).expanduser().resolve()))  # workers run elsewhere
        if all(leaf.few_shot(self.few_shot) == leaf.few_shot(None) for leaf in self.entry.leaves):
            object.__setattr__(self, "few_shot", None)  # the same evaluation, however it is written
        if self.prefill == "full" and not self._generates():
            # One forward pass of a prompt that is read in full shows no error of the cache at all.
            raise InvalidInput(f"tasks: prefill: full is for tasks that generate; {self.entry.name} scores likelihoods")

    @classmethod
    def expand(cls, options: object) -> list[Mapping[str, Any]]:
        """A list of names, or {names: [...], options}, as the options of one evaluator each."""
        if isinstance(options, list):
            options = {"names": options}
        if not isinstance(options, Mapping) or ("names" in options) == ("task" in options):
            raise InvalidInput("tasks: expected a list of names or {names: [...], few_shot: ..., limit: ...}")
        if "task" in options:
            return [options]
        names = options["names"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InvalidInput(f"tasks: names: expected a list of names, such as [csqa, mmlu], got {names!r}")
        rest = {key: value for key, value in options.items() if key != "names"}
        return [{"task": name, **rest} for name in names]

    @property
    def entry(self) -> registry.Entry:
        return registry.find(self.task)

    @property
    def label(self) -> str:
        shots = "" if self.few_shot is None else f" {self.few_shot}-shot"
        return self.entry.name + shots + (f" x{self.limit}" if self.limit else "") + (" chat" * self.chat_template)

    def texts(self) -> tuple[tuple[str, Any], ...]:
        """The items, and the pool of examples where prompts have any."""
        parts = ["task"] + (["examples"] if self._asks_for_examples() else [])
        return tuple((f"{part}:{self.task}", "evaluation") for part in parts)

    def _asks_for_examples(self) -> bool:
        return any(leaf.few_shot(self.few_shot) for leaf in self.entry.leaves)

    def reading_cache(self) -> dict[str, Any]:
        """Prompts of answers that are generated are read in full, as deployed caches do; what is scored, as stored."""
        return {"prefill": self.prefill or ("full" if self._generates() else "quantized"), "chunk": None}

    def _generates(self) -> bool:
        """Whether no task of the suite scores likelihoods."""
        return all(leaf.config.get("output_type", "generate_until") == "generate_until" for leaf in self.entry.leaves)

    def protocol(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without what cannot matter: the place of a task's file, prefill (see reading_cache), an unused seed."""
        found = super().protocol(*args, **kwargs)
        unused = {"prefill"} if self._asks_for_examples() else {"prefill", "seed"}
        options = {name: value for name, value in found["options"].items() if name not in unused}
        return found | {"options": options | {"task": self.entry.name}}

    def tokens(self) -> int:
        total = 0
        for leaf in self.entry.leaves:
            usual = USUAL[leaf.config.get("output_type", "generate_until") != "generate_until"]
            items, each, example = SIZES.get(leaf.name, usual)
            total += min(items, self.limit or items) * (each + leaf.few_shot(self.few_shot) * example)
        return total

    def prepare(self, session: Session) -> None:
        self._prepared(session)

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        from qfarm.tasks import score

        prepared, model = self._prepared(session), self._model(session)
        total, done = sum(len(task.items) for task in prepared), 0
        scored: list[score.Scored] = []
        documents: list[Document] = []
        for task in prepared:
            answers = self._ask(task, model, _after(progress, done, total))
            found = score.score_task(task, answers)
            scored.append(found)
            documents += score.documents(found, answers)
            done += len(task.items)
            progress(done, total)
        return Result(metrics=tuple(score.metrics(scored, self.entry.aggregates)), documents=tuple(documents))

    def _model(self, session: Session) -> SessionLM:
        from qfarm.tasks.model import SessionLM

        # A quantized cache changes what a continuation sees of its context; padding would enter its groups of tokens.
        whole = not session.causal or "kv_cache" in parse_scheme(session.cell.scheme).sites
        return SessionLM(session.loaded, self.batch_tokens, session.shrink, whole)

    def _prepared(self, session: Session) -> list[Prepared]:
        """The task's items as tokens, made once per model."""
        from qfarm.tasks.build import Options, prepare

        model = self._model(session)
        if self.chat_template and not session.loaded.tokenizer.chat_template:
            raise InvalidInput(f"{self.label}: {session.cell.model} has no chat template; leave chat_template out")
        options = Options(few_shot=self.few_shot, limit=self.limit, seed=self.seed, chat_template=self.chat_template)
        key = ("tasks", self.task, *dataclasses.astuple(options))
        found: list[Prepared] = session.keep(key, lambda: prepare(self.entry, options, session.data, model))
        return found

    def _ask(self, task: Prepared, model: SessionLM, progress: Callable[[int, int], None]) -> list[Any]:
        """One answer per request of lm-eval."""
        from qfarm.tasks.batches import bundles

        if task.kind == "generate_until":
            return list(model.generate(task.prompts, progress))
        try:
            pieces = model.score(task.requests, bundles(task.requests, not model.whole), progress)
        except NonFinite as error:
            raise NonFinite(f"{self.label}: {task.leaf.name}: {error}") from None
        if task.kind != "loglikelihood_rolling":
            return list(pieces)
        totals = [0.0] * (max(task.owners) + 1)
        for owner, (value, _) in zip(task.owners, pieces, strict=True):
            totals[owner] += value
        return totals


def _after(progress: Callable[[int, int], None], done: int, total: int) -> Callable[[int, int], None]:
    """Progress of a task that comes after `done` items of others."""
    return lambda items, _: progress(done + items, total)


EVALUATOR = Tasks
