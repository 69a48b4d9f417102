"""Score: from answers to metrics and ledger rows.

Per task: the mean of each of lm-eval's metrics; with items in clusters Student's t on clusters, for independent
right-or-wrong items Wilson's interval. Where nothing varies there is no standard error, and where items in clusters are
all right or all wrong, Wilson's interval counts clusters. Per group: the mean over tasks (plain, or weighted by size)
with the stratified error that belongs to the same weights. Aggregations other than means (F1, perplexity) have a value
and no error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.metrics import mean

from qfarm import stats
from qfarm.errors import NonFinite
from qfarm.ledger import measured
from qfarm.record import Document, Metric
from qfarm.tasks.build import Item, Prepared
from qfarm.tasks.generate import Generated
from qfarm.tasks.registry import Aggregate

Answer = tuple[float, bool] | float | Generated  # of one request

# What a suite is known by, and what `correct` in the ledger means: the first of these that a task has.
HEADLINES = ("acc", "exact_match", "bleu_acc")
NO_FILTER = "none"  # lm-eval's name for it
SINGLE_TASKS_SHOWN = 10  # of a larger suite only its groups get metrics; the ledger has every task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """One task's items under all of its metrics."""

    prepared: Prepared
    values: Mapping[tuple[str, str], list[Any]]  # (metric, filter) -> one value per item


def score_task(prepared: Prepared, answers: Sequence[Answer]) -> Scored:
    """Apply lm-eval's filters and scoring to one answer per request. Raises NonFinite with the item's index."""
    instances = [instance for item in prepared.items for instance in item.instances]
    for instance, answer in zip(instances, answers, strict=True):
        response = answer.text if isinstance(answer, Generated) else answer
        instance.resps, instance.filtered_resps = [response] * (instance.repeats or 1), {}
    prepared.task.apply_filters()
    values: dict[tuple[str, str], list[Any]] = {}
    for name in instances[0].filtered_resps:
        for index, item in enumerate(prepared.items):
            responses = [instance.filtered_resps[name] for instance in item.instances]
            for metric, value in prepared.task.process_results(item.doc, responses).items():
                if isinstance(value, float) and value != value:
                    raise NonFinite(f"{prepared.leaf.name}: {metric} of item {index} is not a number")
                values.setdefault((metric, name), []).append(value)
    return Scored(prepared=prepared, values=values)


# -- metrics ----------------------------------------------------------------------------------------------------------


def metrics(scored: Sequence[Scored], aggregates: Sequence[Aggregate]) -> list[Metric]:
    """Groups first, then single tasks; the suite's headline stands first."""
    found = [metric for aggregate in aggregates for metric in _group_metrics(scored, aggregate, aggregates[0].name)]
    if len(scored) <= SINGLE_TASKS_SHOWN or not found:
        prefix = len(scored) > 1
        found += [metric for task in scored for metric in _task_metrics(task, prefix)]
    return sorted(found, key=lambda metric: _rank(metric.metric))


def _rank(name: str) -> int:
    """Stable order: the headline, then the rest as lm-eval has it."""
    base = name.split(",")[0]
    return HEADLINES.index(base) if base in HEADLINES else len(HEADLINES)


def metric_name(metric: str, filter_name: str, task: str | None = None) -> str:
    """'acc', 'exact_match,strict-match', 'arc_easy acc'."""
    name = metric if filter_name == NO_FILTER else f"{metric},{filter_name}"
    return name if task is None else f"{task} {name}"


def _task_metrics(scored: Scored, prefix: bool) -> Iterator[Metric]:
    task, items = scored.prepared.task, scored.prepared.items
    clusters = [item.cluster for item in items]
    for (metric, filter_name), values in scored.values.items():
        name = metric_name(metric, filter_name, scored.prepared.leaf.name if prefix else None)
        aggregate = task.aggregation().get(metric, mean)
        better = {True: "higher", False: "lower"}.get(task.higher_is_better().get(metric), "none")
        if aggregate is not mean:
            yield Metric(metric=name, value=float(aggregate(values)), unit="", better=better, n=len(values))
            continue
        yield _mean(name, [float(value) for value in values], clusters, better)


def _mean(name: str, values: Sequence[float], clusters: Sequence[str], better: str) -> Metric:
    if _right_or_wrong(values):
        found, interval = stats.share(values, clusters)
    else:
        found = stats.clustered_mean(values, [1] * len(values), clusters)
        interval = _spread_only(found)
    return _measured(name, found, interval, len(values), better, _unit(values))


def _spread_only(mean: stats.Mean) -> stats.Interval:
    """No ends where nothing varies between clusters."""
    return mean.interval() if mean.error else stats.Interval(mean.value, None, None)


def _measured(name: str, mean: stats.Mean, interval: stats.Interval, n: int, better: str, unit: str) -> Metric:
    error = mean.standard_error or None
    return measured(name, unit, better, n=n, clusters=mean.clusters, interval=interval, error=error)


def _right_or_wrong(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _unit(values: Sequence[float]) -> str:
    return "fraction of items" if all(0 <= value <= 1 for value in values) else ""


def _group_metrics(scored: Sequence[Scored], aggregate: Aggregate, suite: str) -> Iterator[Metric]:
    members = [task for task in scored if task.prepared.leaf.name in aggregate.tasks]
    filters = aggregate.filters or dict.fromkeys(
        name for task in members for metric, name in task.values if metric == aggregate.metric
    )
    for filter_name in filters:
        key = (aggregate.metric, filter_name)
        with_it = [task for task in members if key in task.values]
        if not with_it:
            continue
        pieces = [
            (float(value), item.cluster, task.prepared.leaf.name)
            for task in with_it
            for value, item in zip(task.values[key], task.prepared.items, strict=True)
        ]
        values, clusters, tasks = zip(*pieces, strict=True)
        mean = stats.stratified_mean(
            values, [1] * len(values), clusters, tasks, weights="size" if aggregate.weight_by_size else "plain"
        )
        name = metric_name(*key, None if aggregate.name == suite else aggregate.name)
        yield _measured(name, mean, _spread_only(mean), len(values), "higher", _unit(values))


# -- ledger -----------------------------------------------------------------------------------------------------------


def documents(scored: Scored, answers: Sequence[Answer]) -> Iterator[Document]:
    """One row per item."""
    prepared, start = scored.prepared, 0
    tokens = _tokens(prepared, answers)
    right = next((values for key in HEADLINES for (name, _), values in scored.values.items() if name == key), None)
    if right is not None and not _right_or_wrong(right):
        right = None  # shares, such as those of TruthfulQA's mc2
    for index, item in enumerate(prepared.items):
        own = slice(start, start + len(item.instances))
        start = own.stop
        value = None if right is None else right[index]
        yield Document(
            document=item.document,
            cluster=item.cluster,
            task=prepared.leaf.name,
            tokens=sum(tokens[own]),
            correct=None if value is None else int(value),
            **_answer(prepared, item, answers[own]),
        )


def _tokens(prepared: Prepared, answers: Sequence[Answer]) -> list[int]:
    """By instance: the tokens that were scored or generated."""
    counts = [answer.tokens if isinstance(answer, Generated) else 0 for answer in answers]
    for request, owner in zip(prepared.requests, prepared.owners, strict=True):
        counts[owner] += len(request.targets)
    return counts


def _answer(prepared: Prepared, item: Item, answers: Sequence[Answer]) -> dict[str, Any]:
    first = answers[0]
    if isinstance(first, Generated):
        return {"answer": first.text}
    choices = [_likelihood(answer) for answer in answers]
    if prepared.kind != "multiple_choice":
        return {"loss": -sum(choices)}
    best = max(range(len(choices)), key=lambda index: choices[index])
    return {"answer": str(best), "choices": choices}


def _likelihood(answer: Answer) -> float:
    assert not isinstance(answer, Generated)
    return answer[0] if isinstance(answer, tuple) else answer
