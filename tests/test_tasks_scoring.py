"""Batches, filters, metrics and errors of tasks, against brute force and hand-made strings."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qfarm import stats
from qfarm.errors import InvalidInput
from qfarm.models.load import load
from qfarm.models.reference import resolve
from qfarm.tasks.batches import Request, _common_prefix, batched, bundles, make_request
from qfarm.tasks.build import Item, Options, Prepared, build_task
from qfarm.tasks.model import SessionLM
from qfarm.tasks.registry import Aggregate, find
from qfarm.tasks.score import Scored, metrics
from qfarm.tasks.source import find_source


def random_requests(seed: int, items: int = 25) -> list[Request]:
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 200) for _ in range(draw.randint(low, high))]

    found = []
    for item in range(items):
        context, common = tokens(1, 40), tokens(0, 3)
        for _ in range(draw.randint(1, 5)):
            found.append(make_request(item, context, common + tokens(1, 6), 30))
    return found


# -- batches ----------------------------------------------------------------------------------------------------------


def test_truncation_is_on_the_left_and_the_last_token_is_only_predicted() -> None:
    request = make_request(0, [1, 2, 3, 4], [5, 6], 10)
    assert request.inputs == (1, 2, 3, 4, 5) and request.targets == (5, 6) and request.first == 3
    assert make_request(0, [1, 2, 3, 4], [5, 6], 3).inputs == (3, 4, 5)
    for continuation in ([], [1] * 4):
        with pytest.raises(InvalidInput, match="a continuation of"):
            make_request(0, [1], continuation, 3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [True, False])
def test_bundles_hold_every_request_once_and_rebuild_its_tokens(seed: int, share: bool) -> None:
    requests = random_requests(seed)
    found = bundles(requests, share)
    assert sorted(index for bundle in found for index in bundle.requests) == list(range(len(requests)))
    for bundle in found:
        for index, tail in zip(bundle.requests, bundle.tail_of, strict=True):
            assert bundle.prefix + (bundle.tails[tail] if tail is not None else ()) == requests[index].inputs
    assert any(bundle.tails for bundle in found) == share
    read = sum(len(bundle.prefix) + sum(map(len, bundle.tails)) for bundle in found)
    assert read <= sum(len(request.inputs) for request in requests)


@pytest.mark.parametrize("budget", [1, 60, 500, 100_000])
def test_batches_keep_order_kind_and_budget(budget: int) -> None:
    found = bundles(random_requests(3), share=True)
    batches = list(batched(found, budget))
    assert list(itertools.chain(*batches)) == found
    for batch in batches:
        assert len(batch) == 1 or sum(b.rows for b in batch) * max(b.length for b in batch) <= budget
        assert len({bool(bundle.tails) for bundle in batch}) == 1
        if batch[0].tails:
            assert len({len(bundle.prefix) for bundle in batch}) == 1  # prefixes are never padded


def test_without_padding_a_batch_has_one_length() -> None:
    found = bundles(random_requests(3), share=False)
    batches = list(batched(found, 10_000, pad=False))
    assert list(itertools.chain(*batches)) == found and max(map(len, batches)) > 1
    assert all(len({bundle.length for bundle in batch}) == 1 for batch in batches)


def test_common_prefix_by_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(300):
        rows = [tuple(draw.randrange(2) for _ in range(draw.randint(1, 6))) for _ in range(draw.randint(1, 4))]
        slow = next(n for n in range(6, -1, -1) if all(len(r) >= n and r[:n] == rows[0][:n] for r in rows))
        assert _common_prefix(rows) == slow


def test_choices_of_one_token_share_one_pass() -> None:
    requests = [make_request(0, [7, 8, 9], [choice], 10) for choice in (1, 2, 3, 4)]
    (bundle,) = bundles(requests, share=False)
    assert bundle.prefix == (7, 8, 9) and not bundle.tails and bundle.requests == (0, 1, 2, 3)


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_sharing_and_padding_equal_a_plain_loop(family: str, tiny_models: dict[str, Path]) -> None:
    """Mistral's attention window of 16 tokens is shorter than many prefixes."""
    loaded = load(resolve(str(tiny_models[family])), "float32", torch.device("cpu"))
    requests = random_requests(1)
    plain = []
    for request in requests:
        with torch.no_grad():
            logits = loaded.model(torch.tensor([request.inputs])).logits[0, request.first :].float()
        chosen = logits.log_softmax(-1)[range(len(request.targets)), list(request.targets)]
        plain.append((float(chosen.sum()), logits.argmax(-1).tolist() == list(request.targets)))
    for share, whole, budget in ((True, False, 4096), (True, False, 64), (False, False, 4096), (False, True, 4096)):
        model = SessionLM(loaded, budget, whole=whole)
        model.logit_rows = 7  # several chunks
        found = model.score(requests, bundles(requests, share))
        assert [value for value, _ in found] == pytest.approx([value for value, _ in plain], abs=2e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in plain]


def test_running_out_of_memory_halves_batches(tiny: Path) -> None:
    loaded = load(resolve(str(tiny)), "float32", torch.device("cpu"))
    usual, smaller = SessionLM(loaded, 4096), SessionLM(loaded, 4096, shrink=3)
    assert smaller.batch_tokens == usual.batch_tokens // 8 and smaller.logit_rows < usual.logit_rows
    assert SessionLM(loaded, 1, shrink=5).batch_tokens == 1


def test_logits_are_made_for_scored_positions_only(tiny: Path) -> None:
    loaded = load(resolve(str(tiny)), "float32", torch.device("cpu"))
    seen = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal seen
        seen += len(output)
        assert output.dim() == 2

    handle = loaded.head.register_forward_hook(count)
    requests = random_requests(2)
    SessionLM(loaded, 512).score(requests, bundles(requests, True))
    handle.remove()
    assert seen == sum(len(request.targets) for request in requests)


# -- filters ----------------------------------------------------------------------------------------------------------


def by_filter(task: Any, answers: list[str]) -> dict[str, list[str]]:
    from lm_eval.api.instance import Instance

    made = [Instance("generate_until", {}, ("", {}), 0, resps=[answer]) for answer in answers]
    task._instances = made
    task.apply_filters()
    return {name: [instance.filtered_resps[name] for instance in made] for name in made[0].filtered_resps}


def test_gsm8k_reads_the_number(pack: str) -> None:
    leaf = find("gsm8k").leaves[0]
    task = build_task(leaf, Options(few_shot=None, limit=None, seed=1234, chat_template=False), find_source(leaf, pack))
    found = by_filter(task, ["so 5 * 3 = 15\n#### 1,234", "the answer is $18.", "#### -7", "none"])
    assert found["strict-match"] == ["1,234", "[invalid]", "-7", "[invalid]"]
    assert found["flexible-extract"] == ["1,234", "$18.", "-7", "[invalid]"]
    doc = {"question": "q", "answer": "1200 + 34 = 1234\n#### 1234"}
    for answer, right in (("1,234", 1.0), ("$1234", 1.0), ("1234.", 1.0), ("1235", 0.0), ("[invalid]", 0.0)):
        assert task.process_results(doc, [answer]) == {"exact_match": right}
    context = task.fewshot_context(task.eval_docs[0], 5)
    assert context.count("Question:") == 6 and context.count("####") == 5


def test_bleu_accuracy_prefers_the_nearer_reference(pack: str) -> None:
    leaf = find("truthfulqa_gen").leaves[0]
    task = build_task(leaf, Options(few_shot=None, limit=None, seed=1234, chat_template=False), find_source(leaf, pack))
    doc = {
        "question": "q",
        "correct_answers": ["The seeds pass through your digestive system.", "Nothing happens."],
        "incorrect_answers": ["You grow watermelons in your stomach.", "You die."],
    }
    true, false = (task.process_results(doc, [refs[0]]) for refs in (doc["correct_answers"], doc["incorrect_answers"]))
    assert (true["bleu_acc"], false["bleu_acc"]) == (1, 0)
    assert true["bleu_max"] == pytest.approx(100) and false["bleu_diff"] < 0
    assert task.process_results(doc, [""])["bleu_acc"] == 0  # a tie is no hit
    assert len(task.eval_docs) == 817 and task.fewshot_context(task.eval_docs[0], 0).count("Q: ") == 7


# -- metrics ----------------------------------------------------------------------------------------------------------


class FakeTask:
    def aggregation(self) -> dict[str, Any]:
        return {}

    def higher_is_better(self) -> dict[str, bool]:
        return {"acc": True}


def scored(name: str, values: list[float], clusters: list[str] | None = None, filter_name: str = "none") -> Scored:
    clusters = clusters or [f"{name}{i}" for i in range(len(values))]
    items = tuple(Item(document=f"{name}{i}", cluster=c, doc={}, instances=()) for i, c in enumerate(clusters))
    leaf = dataclasses.replace(find("boolq").leaves[0], name=name)
    source: Any = None
    prepared = Prepared(leaf=leaf, source=source, task=FakeTask(), items=items, kind="multiple_choice")
    return Scored(prepared=prepared, values={("acc", filter_name): values})


def group(tasks: list[Scored], weight_by_size: bool) -> Aggregate:
    names = tuple(task.prepared.leaf.name for task in tasks)
    return Aggregate(name="suite", tasks=names, metric="acc", filters=None, weight_by_size=weight_by_size)


def test_group_errors_have_the_weights_of_their_means() -> None:
    draw = np.random.default_rng(0)
    tasks = [scored(f"t{n}", [float(x) for x in draw.random(n) < p]) for n, p in ((20, 0.3), (100, 0.6), (400, 0.9))]
    means = [float(np.mean(task.values["acc", "none"])) for task in tasks]
    variances = [p * (1 - p) / (n - 1) for p, n in zip(means, (20, 100, 400), strict=True)]
    plain, *rest = metrics(tasks, [group(tasks, False)])
    assert plain.metric == "acc" and plain.value == pytest.approx(np.mean(means)) and plain.n == 520
    assert plain.standard_error == pytest.approx(math.sqrt(sum(variances)) / 3)
    assert [metric.metric for metric in rest] == ["t20 acc", "t100 acc", "t400 acc"]
    weighted, *_ = metrics(tasks, [group(tasks, True)])
    shares = [20 / 520, 100 / 520, 400 / 520]
    assert weighted.value == pytest.approx(sum(w * m for w, m in zip(shares, means, strict=True)))
    error = math.sqrt(sum(w * w * v for w, v in zip(shares, variances, strict=True)))
    assert weighted.standard_error == pytest.approx(error)


def test_of_many_tasks_only_groups_get_metrics() -> None:
    tasks = [scored(f"t{i}", [0.0, 1.0] * 6) for i in range(11)]
    assert [metric.metric for metric in metrics(tasks, [group(tasks, True)])] == ["acc"]
    assert len(metrics(tasks, [])) == 11  # a tag has no mean: then every task is shown


def test_a_group_takes_only_its_filter() -> None:
    tasks = [scored("a", [0.0, 1.0] * 6, filter_name="strict"), scored("b", [1.0] * 12, filter_name="loose")]
    only = dataclasses.replace(group(tasks, False), filters=("strict",))
    assert metrics(tasks, [only])[0].metric == "acc,strict" and metrics(tasks, [only])[0].value == 0.5


@pytest.mark.parametrize(("right", "k"), [(1.0, 15), (0.0, 0)])
def test_all_right_or_all_wrong_is_no_certainty(right: float, k: int) -> None:
    """Clusters count, not items: 30 of 30 in 15 passages is Wilson's 15 of 15."""
    (metric,) = metrics([scored("t", [right] * 30, [f"c{i // 2}" for i in range(30)])], [])
    assert (metric.value, metric.low, metric.high) == pytest.approx(stats.wilson(k, 15))
    assert metric.standard_error is None
    tasks = [scored(name, [right] * 30) for name in ("a", "b")]
    mean = Aggregate(name="both", tasks=("a", "b"), metric="acc", filters=None, weight_by_size=False)
    group = metrics(tasks, [mean])[0]
    assert (group.metric, group.value, group.low, group.standard_error) == ("acc", right, None, None)


def test_clustered_items_get_a_clustered_interval() -> None:
    values = [1.0, 1.0, 0.0, 0.0] * 10
    clusters = [f"c{i // 2}" for i in range(40)]  # twins with equal answers
    (metric,) = metrics([scored("t", values, clusters)], [])
    expected = stats.clustered_mean(values, [1] * 40, clusters)
    assert (metric.low, metric.high) == expected.interval()[1:] and metric.clusters == 20
    (few,) = metrics([scored("t", values[:9])], [])
    assert few.low is None and few.standard_error is None
    (independent,) = metrics([scored("t", values)], [])
    assert (independent.low, independent.high) == stats.wilson(20, 40)[1:]
    assert metric.standard_error / independent.standard_error == pytest.approx(math.sqrt(2), rel=0.03)
