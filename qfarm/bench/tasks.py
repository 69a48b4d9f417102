"""Tasks asked twice: our way, and by lm-eval run by itself, of one model in memory and of the same files.

lm-eval builds its task from its own registered file, changed as its users do it: a YAML file that includes the
registered one and names the data files. It asks through its own wrapper. Every answer is compared, and both are timed,
from the task's items to its metrics. In float32 only the order of additions is left to differ; in bfloat16 lm-eval
rounds logits before the log-softmax, where qfarm does not.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from qfarm import environment
from qfarm.errors import InvalidInput
from qfarm.evaluate import build_evaluator
from qfarm.evaluate.tasks import Tasks
from qfarm.matrix import Cell, baseline_cell
from qfarm.models.reference import resolve
from qfarm.tasks.registry import Leaf
from qfarm.tasks.source import SPLIT_KEYS, Source, find_source
from qfarm.worker import Session

KIND = "multiple_choice"  # of tasks that can be compared choice by choice
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OWN = "lm_evals_own"  # the name under which lm-eval is given its task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked; checked by `run`."""

    model: str
    tasks: tuple[str, ...]  # NAME, or NAME:N for its first N items; questions with choices
    dtype: str = "float32"
    batch_size: int = 16  # lm-eval's
    clock: Literal["wall", "cpu"] = "wall"  # cpu: seconds of all threads, for machines that do other work too
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
        results.append(compare(session, evaluator, settings.batch_size, CLOCKS[settings.clock]))
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


def compare(
    session: Session, evaluator: Tasks, batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> TaskResult:
    """One task, asked by `evaluator` and by lm-eval in batches of `batch_size`."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    started = clock()
    evaluator.prepare(session)
    prepared_at = clock()
    result = evaluator.run(session, lambda done, total: None)
    done = clock()
    leaf = evaluator.entry.leaves[0]
    task = lm_evals_own(leaf, find_source(leaf, session.data))
    gc.collect()  # not on the other's clock

    again = clock()
    loaded = session.loaded
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    with torch.no_grad():
        output = evaluate(lm=theirs, task_dict={OWN: task}, bootstrap_iters=0, limit=evaluator.limit)
    elapsed = clock() - again
    samples = sorted(output["samples"][OWN], key=lambda sample: sample["doc_id"])
    choices = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    return TaskResult(
        task=evaluator.label,
        items=len(result.documents),
        accuracy=next(metric.value for metric in result.metrics if metric.metric == "acc"),
        accuracy_lm_eval=output["results"][OWN]["acc,none"],
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


def lm_evals_own(leaf: Leaf, source: Source) -> Any:
    """lm-eval's task object of a registered task, built by lm-eval, reading the files that our source reads."""
    changes: dict[str, Any] = {"include": str(Path(leaf.path).resolve()), "task": OWN}
    if source.pack is not None:
        files = source.pack.splits
        reader = "parquet" if source.pack.file(source.evaluated).suffix == ".parquet" else "json"
        changes |= {"dataset_path": reader, "dataset_name": None, "dataset_kwargs": {"data_files": _paths(source)}}
        # A split that the pack lacks would be asked for.
        changes |= {key: None for key in SPLIT_KEYS if leaf.config.get(key) and leaf.config[key] not in files}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{OWN}.yaml"
        path.write_text(yaml.safe_dump(changes))
        return _manager().load([str(path)])["tasks"][OWN]


@functools.cache
def _manager() -> Any:
    """Made once: it reads the names of lm-eval's 14,000 files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _paths(source: Source) -> dict[str, str]:
    assert source.pack is not None
    return {split: str(source.pack.file(split)) for split in source.pack.splits}


def _distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
