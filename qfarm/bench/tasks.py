"""Tasks asked twice: our way and by lm-eval's own wrapper, of one model in memory, on the same items.

Both get the same task objects, hence the same prompts and the same files. What may differ is how the model is called
(see `qfarm.tasks.model`): so every answer is compared, and both are timed, from the task's items to its metrics. In
float32 only the order of additions is left to differ; in bfloat16 lm-eval rounds logits before the log-softmax, where
qfarm does not.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qfarm import environment
from qfarm.errors import InvalidInput
from qfarm.evaluate import build_evaluator
from qfarm.evaluate.tasks import Tasks
from qfarm.matrix import Cell, baseline_cell
from qfarm.models.reference import resolve
from qfarm.worker import Session

KIND = "multiple_choice"  # of tasks that can be compared choice by choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked; checked by `run`."""

    model: str
    tasks: tuple[str, ...]  # NAME, or NAME:N for its first N items; questions with choices
    dtype: str = "float32"
    batch_size: int = 16  # lm-eval's
    data: str | None = None  # a data pack; None: the hub


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One row. The model is loaded and the task's files are read before either clock starts."""

    task: str
    items: int
    accuracy: float  # ours; lm-eval's below
    accuracy_lm_eval: float
    same_answer: int  # items in which both prefer the same choice
    same_score: int  # items that both count as right, or both as wrong
    largest_difference: float  # nats, over the log-likelihoods of all choices
    prepare_s: float  # ours: prompts to tokens, done once for all cells of a model
    seconds: float  # ours: the model, and the metrics
    seconds_lm_eval: float  # all of lm-eval's: it tokenizes for every model that it is given

    @property
    def ratio(self) -> float:
        """lm-eval's seconds over ours, the preparation counted as if there were one cell only."""
        return self.seconds_lm_eval / (self.prepare_s + self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    settings: Settings
    machine: dict[str, Any]
    results: tuple[TaskResult, ...]


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Ask every task both ways. Raises InvalidInput for settings that cannot be, and what tasks and models raise."""
    evaluators = [_evaluator(name) for name in settings.tasks]
    if not evaluators:
        raise InvalidInput("--tasks: expected names of tasks, such as arc_easy,piqa:100")
    progress(f"loading {settings.model}")
    session = Session(settings.data)
    session.begin(_cell(settings))
    results = []
    for evaluator in evaluators:
        progress(f"{evaluator.label}: qfarm, then lm-eval")
        results.append(compare(session, evaluator, settings.batch_size))
    return Report(settings=settings, machine=environment.provenance(), results=tuple(results))


def _evaluator(text: str) -> Tasks:
    name, colon, limit = text.partition(":")
    if colon and not (limit.isdecimal() and int(limit)):
        raise InvalidInput(f'--tasks: {name}: expected a number of items after ":", got "{limit}"')
    evaluator = build_evaluator("tasks", {"task": name, "limit": int(limit) if colon else None})
    assert isinstance(evaluator, Tasks)
    leaves = evaluator.entry.leaves
    if len(leaves) != 1 or leaves[0].config.get("output_type") != KIND:
        raise InvalidInput(f"--tasks: {name}: expected one task whose questions have choices, such as arc_easy")
    return evaluator


def _cell(settings: Settings) -> Cell:
    return baseline_cell(resolve(settings.model), settings.dtype)


def compare(session: Session, evaluator: Tasks, batch_size: int) -> TaskResult:
    """One task, asked by `evaluator` and by lm-eval in batches of `batch_size`."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    started = time.perf_counter()
    evaluator.prepare(session)
    prepared_at = time.perf_counter()
    result = evaluator.run(session, lambda done, total: None)
    done = time.perf_counter()
    prepared = evaluator._prepared(session)[0]
    gc.collect()  # not on the other's clock

    again = time.perf_counter()
    loaded = session.loaded
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    with torch.no_grad():
        output = evaluate(
            lm=theirs, task_dict={evaluator.task: prepared.task}, bootstrap_iters=0, limit=evaluator.limit
        )
    elapsed = time.perf_counter() - again
    samples = sorted(output["samples"][evaluator.task], key=lambda sample: sample["doc_id"])
    choices = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    return TaskResult(
        task=evaluator.label,
        items=len(result.documents),
        accuracy=next(metric.value for metric in result.metrics if metric.metric == "acc"),
        accuracy_lm_eval=output["results"][evaluator.task]["acc,none"],
        same_answer=sum(
            document.answer == str(int(np.argmax(values)))
            for document, values in zip(result.documents, choices, strict=True)
        ),
        same_score=sum(
            document.correct == sample["acc"] for document, sample in zip(result.documents, samples, strict=True)
        ),
        largest_difference=max(
            _distance(document.choices or (), values)
            for document, values in zip(result.documents, choices, strict=True)
        ),
        prepare_s=prepared_at - started,
        seconds=done - prepared_at,
        seconds_lm_eval=elapsed,
    )


def _distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
