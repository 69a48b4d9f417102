"""Build: a job's entry as lm-eval's task objects, and their items as token requests, made once per model.

The registered configuration is built with overrides of its data only: what lm-eval would ask is asked, in its order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry as IndexEntry
from lm_eval.tasks._index import Kind

from qfarm.errors import DataError, InvalidInput, QfarmError
from qfarm.tasks.batches import Request, make_request
from qfarm.tasks.generate import Prompt
from qfarm.tasks.model import SessionLM
from qfarm.tasks.registry import Entry, Leaf
from qfarm.tasks.source import Source, find_source

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a task."""

    document: str  # hash of its content
    cluster: str  # hash of what it shares with items that are not independent of it
    doc: Any  # as lm-eval's functions take it
    instances: Sequence[Any]  # lm-eval's requests, in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """One task, ready to be asked of any cell of the same model."""

    leaf: Leaf
    source: Source
    task: Any  # lm-eval's
    items: tuple[Item, ...]
    kind: str  # lm-eval's output type
    requests: tuple[Request, ...] = ()  # of log-likelihoods
    owners: tuple[int, ...] = ()  # by request: its place among the instances of all items
    prompts: tuple[Prompt, ...] = ()  # of generation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What decides a task's requests, besides the model's tokenizer."""

    few_shot: int | None  # examples in the prompt; None: the task's own number
    limit: int | None  # the first so many items of each task
    seed: int  # of the choice of examples
    chat_template: bool


def prepare(entry: Entry, options: Options, data: str | None, model: SessionLM) -> list[Prepared]:
    """Raises InvalidInput, DataError or Unavailable with the task's name."""
    return [_prepare(leaf, options, find_source(leaf, data), model) for leaf in entry.leaves]


def _prepare(leaf: Leaf, options: Options, source: Source, model: SessionLM) -> Prepared:
    task = build_task(leaf, options, source)
    with _quiet():
        task.build_all_requests(
            limit=options.limit,
            rank=0,
            world_size=1,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.chat_template,
            chat_template=model.apply_chat_template if options.chat_template else None,
            tokenizer_name=model.tokenizer_name,
        )
    items = _items(task, leaf)
    prepared = Prepared(leaf=leaf, source=source, task=task, items=items, kind=str(task.OUTPUT_TYPE))
    instances = [(number, instance) for number, item in enumerate(items) for instance in item.instances]
    if prepared.kind == "generate_until":
        prompts = tuple((model.tok_encode(i.args[0]), i.args[1]) for _, i in instances)
        return dataclasses.replace(prepared, prompts=prompts)
    rolling = prepared.kind == "loglikelihood_rolling"
    requests: list[Request] = []
    owners: list[int] = []
    for place, (number, instance) in enumerate(instances):
        for pair in model.windows(*instance.args) if rolling else [model.encode(*instance.args)]:
            requests.append(make_request(number, *pair, model.max_length))
            owners.append(place)
    return dataclasses.replace(prepared, requests=tuple(requests), owners=tuple(owners))


def build_task(leaf: Leaf, options: Options, source: Source) -> Any:
    """lm-eval's task object reading this source. Raises DataError when lm-eval cannot build it."""
    shots = leaf.few_shot(options.few_shot)
    if shots and source.examples is None and not _brings_examples(leaf):
        raise InvalidInput(f"task {leaf.name}: few_shot: {shots}, but its data has no split to take examples from")
    overrides = {**leaf.overrides, **source.overrides(), "task": leaf.name, "num_fewshot": shots}
    entry = IndexEntry(name=leaf.name, kind=Kind.TASK, yaml_path=Path(leaf.path))
    try:
        with _quiet():
            task = TaskFactory().build(entry, overrides=overrides, registry={})
    except (QfarmError, ImportError, MemoryError):
        raise
    except Exception as error:  # a task's own functions and templates raise kinds of their own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise DataError(f"task {leaf.name}: lm-eval cannot build it from {leaf.path}: {reason}") from error
    task.set_fewshot_seed(options.seed)
    return task


def _brings_examples(leaf: Leaf) -> bool:
    config = leaf.config.get("fewshot_config")
    return isinstance(config, Mapping) and config.get("samples") is not None


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep lm-eval's and datasets' progress bars out of a worker's output; what is logged still is."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


# -- items ------------------------------------------------------------------------------------------------------------


def _items(task: Any, leaf: Leaf) -> tuple[Item, ...]:
    groups: dict[int, list[Any]] = {}
    for instance in task.instances:
        groups.setdefault(instance.doc_id, []).append(instance)
    seen: dict[str, int] = {}
    items = []
    for instances in groups.values():
        instances.sort(key=lambda instance: instance.idx)
        doc = instances[0].doc
        content, shared = _hash([leaf.name, doc]), shared_content(leaf.config, doc)
        # The same question may stand in a set twice; with other examples it is asked in another way.
        seen[content] = seen.get(content, 0) + 1
        document = content if seen[content] == 1 else f"{content}.{seen[content]}"
        # Without the task's name: two tasks of a suite may ask the same question in two ways.
        cluster = _hash([leaf.config.get("dataset_path"), doc if shared is None else shared])
        items.append(Item(document=document, cluster=cluster, doc=doc, instances=instances))
    return tuple(items)


def shared_content(config: Mapping[str, Any], doc: Mapping[str, Any]) -> Any:
    """What makes an item depend on others of its set; None when nothing does.

    BoolQ: the passage. WinoGrande: the same two options after the same three first words (twins). PIQA: the goal.
    MMLU's history subjects: the text above a question that 'refers to the following information'. TruthfulQA: the
    question, which three tasks ask. A task's own file may name columns under `metadata: {cluster: [...]}`.
    """
    metadata = config.get("metadata")
    if isinstance(metadata, Mapping) and metadata.get("cluster"):
        names = metadata["cluster"] if isinstance(metadata["cluster"], list) else [metadata["cluster"]]
        if missing := [name for name in names if name not in doc]:
            raise DataError(f"task {config.get('task')}: metadata: cluster: no column {missing[0]!r}")
        return [doc[name] for name in names]
    data = (config.get("dataset_path"), config.get("dataset_name"))
    if data == ("aps/super_glue", "boolq"):
        return doc["passage"]
    if data[0] == "allenai/winogrande":
        opening = doc["sentence"].lower().split()[:3]
        return [sorted((doc["option1"].lower(), doc["option2"].lower())), opening]
    if data[0] == "baber/piqa":
        return doc["goal"]
    if data[0] == "truthfulqa/truthful_qa":
        return doc["question"]
    if data[0] == "cais/mmlu" and "refers to the following information" in doc["question"][:200]:
        return doc["question"].rpartition("\n")[0]
    return None


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
