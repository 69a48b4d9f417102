"""Tasks as an evaluator: what lm-eval's own wrapper and loop give, item by item, and what the ledger keeps."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm import record
from qfarm.errors import InvalidInput, NonFinite
from qfarm.evaluate import build_evaluator
from qfarm.evaluate.tasks import Tasks
from qfarm.layers.linear import quantize_input
from qfarm.record import DocumentRow, Metric
from qfarm.worker import Session
from tests.tasks_example import ANIMALS, choice_task, generation_task, likelihood_task, rolling_task, write_task
from tests.test_perplexity import make_cell


@pytest.fixture
def session(tiny: Path) -> Session:
    session = Session(None)
    session.begin(make_cell(tiny))
    return session


def run(session: Session, task: Path | str, **options: Any) -> tuple[dict[str, Metric], Any]:
    evaluator = build_evaluator("tasks", {"task": str(task), **options})
    evaluator.prepare(session)
    result = evaluator.run(session, lambda done, total: None)
    return {metric.metric: metric for metric in result.metrics}, result.documents


def by_lm_eval(session: Session, task: Path, **options: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """lm-eval's own loop and its own wrapper around the same model: metrics, and samples in the items' order."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    evaluator = Tasks(task=str(task), **options)
    found = evaluator._prepared(session)[0].task
    found.set_fewshot_seed(evaluator.seed)
    model = HFLM(pretrained=session.loaded.model, tokenizer=session.loaded.tokenizer, batch_size=2)
    limit = {"limit": options["limit"]} if "limit" in options else {}
    output = evaluate(lm=model, task_dict={"tasks": {"it": found}}, bootstrap_iters=0, **limit)
    samples = [s for s in output["samples"]["it"] if s["filter"] == output["samples"]["it"][0]["filter"]]
    return output["results"]["it"], sorted(samples, key=lambda sample: sample["doc_id"])


def test_multiple_choice_equals_lm_eval(session: Session, tmp_path: Path) -> None:
    path = choice_task(tmp_path)
    metrics, documents = run(session, path)
    theirs, samples = by_lm_eval(session, path)
    assert metrics["acc"].value == theirs["acc,none"] and metrics["acc_norm"].value == theirs["acc_norm,none"]
    assert 0 < theirs["acc,none"] < 1
    for document, sample in zip(documents, samples, strict=True):
        likelihoods = [float(response[0][0]) for response in sample["resps"]]
        assert document.choices == pytest.approx(likelihoods, abs=1e-4)
        assert document.answer == str(likelihoods.index(max(likelihoods)))
        assert document.correct == sample["acc"] and document.task == "animals"
        # One token a byte, with the space before it.
        assert document.tokens == sum(1 + len(option) for option in sample["doc"]["options"])


@pytest.mark.parametrize("options", [{"few_shot": 3}, {"few_shot": 2, "seed": 5}, {"few_shot": 1, "limit": 7}])
def test_examples_and_limit_equal_lm_eval(session: Session, tmp_path: Path, options: dict[str, Any]) -> None:
    # The tiny model reads 256 tokens: with three examples, prompts are cut on the left.
    path = choice_task(tmp_path)
    metrics, documents = run(session, path, **options)
    theirs, samples = by_lm_eval(session, path, **options)
    assert metrics["acc"].value == theirs["acc,none"] and metrics["acc"].n == options.get("limit", len(ANIMALS))
    for document, sample in zip(documents, samples, strict=True):
        assert document.choices == pytest.approx([float(response[0][0]) for response in sample["resps"]], abs=1e-4)


def test_the_seed_chooses_the_examples(session: Session, tmp_path: Path) -> None:
    path = choice_task(tmp_path)
    first, again, other = (run(session, path, few_shot=1, seed=seed)[1] for seed in (1, 1, 2))
    assert [d.choices for d in first] == [d.choices for d in again] != [d.choices for d in other]
    assert [d.document for d in first] == [d.document for d in other]  # the items are the same


def test_loglikelihood_equals_lm_eval(session: Session, tmp_path: Path) -> None:
    path = likelihood_task(tmp_path)
    metrics, documents = run(session, path)
    theirs, samples = by_lm_eval(session, path)
    assert metrics["perplexity"].value == pytest.approx(theirs["perplexity,none"], rel=1e-5)
    assert metrics["perplexity"].standard_error is None and metrics["perplexity"].better == "lower"
    assert [d.loss for d in documents] == pytest.approx([-float(s["resps"][0][0][0]) for s in samples], rel=1e-5)
    assert all(document.choices is None and document.answer is None for document in documents)


def test_rolling_loglikelihood_equals_lm_eval(session: Session, tmp_path: Path) -> None:
    path = rolling_task(tmp_path)  # the longest are several windows of the model's 256 tokens
    metrics, documents = run(session, path)
    theirs, samples = by_lm_eval(session, path)
    assert metrics["word_perplexity"].value == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)
    assert [d.loss for d in documents] == pytest.approx([-float(s["resps"][0][0]) for s in samples], rel=1e-5)
    assert [d.tokens for d in documents] == [len(s["doc"]["text"]) for s in samples]


def test_generation_equals_lm_eval(session: Session, tmp_path: Path) -> None:
    path = generation_task(tmp_path)
    metrics, documents = run(session, path)
    theirs, samples = by_lm_eval(session, path)
    for name in ("exact_match,first", "exact_match,last"):
        assert metrics[name].value == theirs[name]
    assert [document.answer for document in documents] == [sample["resps"][0][0] for sample in samples]
    assert len({document.answer for document in documents}) > 1
    assert all("e" not in document.answer for document in documents)


def test_generation_does_not_depend_on_the_batch(session: Session, tmp_path: Path) -> None:
    path = generation_task(tmp_path)
    _, together = run(session, path)
    _, alone = run(session, path, batch_tokens=1)
    assert [document.answer for document in together] == [document.answer for document in alone]


def test_sampling_is_refused(session: Session, tmp_path: Path) -> None:
    path = generation_task(tmp_path, do_sample=True, temperature=0.7)
    with pytest.raises(InvalidInput, match="only greedy"):
        run(session, path)


def test_every_batch_size_and_no_sharing_give_the_same(session: Session, tmp_path: Path) -> None:
    path = choice_task(tmp_path)
    _, usual = run(session, path)
    _, single = run(session, path, batch_tokens=1)
    session.cell = dataclasses.replace(session.cell, scheme="kv4")  # a quantized cache: sequences are read whole
    _, whole = run(session, path)
    assert Tasks(task=str(path))._model(session).whole
    for a, b, c in zip(usual, single, whole, strict=True):
        assert a.choices == pytest.approx(b.choices, abs=1e-4) == c.choices


@pytest.mark.parametrize("make", [choice_task, generation_task])
def test_quantizers_that_look_across_tokens_see_no_padding(session: Session, tmp_path: Path, make: Any) -> None:
    """One grid per sequence, as a cell that is not causal has it; read alone, a sequence has no padding."""
    path = make(tmp_path)

    def per_sequence(x: torch.Tensor) -> torch.Tensor:
        step = 2 * x.abs().mean((1, 2), keepdim=True)
        return torch.round(x / step) * step if x.shape[1] > 1 else x

    for block in range(len(session.loaded.blocks)):
        for role in ("q", "k", "v"):
            quantize_input(session.loaded, block, role, per_sequence)
    session.causal = False
    _, together = run(session, path)
    _, alone = run(session, path, batch_tokens=1)
    for a, b in zip(together, alone, strict=True):
        assert a.answer == b.answer and (a.choices is None or a.choices == pytest.approx(b.choices, abs=1e-4))
    session.causal = True  # the planted fault: padded, it is another result
    _, padded = run(session, path)
    assert any(
        a.answer != b.answer or a.choices != pytest.approx(b.choices, abs=1e-2)
        for a, b in zip(padded, alone, strict=True)
    )


def test_items_are_tokenized_once_for_all_cells(session: Session, tmp_path: Path, monkeypatch: Any) -> None:
    from qfarm.tasks.model import SessionLM

    path, calls = choice_task(tmp_path), []
    encode = SessionLM.encode
    monkeypatch.setattr(SessionLM, "encode", lambda self, *pair: calls.append(pair) or encode(self, *pair))
    _, before = run(session, path)
    assert len(calls) == 3 * len(ANIMALS)
    session.begin(session.cell)  # the next cell of the same model
    with torch.no_grad():
        linear = session.loaded.linears(0)["q"]
        session.loaded.replace_weight(linear, -linear.weight)
    _, after = run(session, path)
    assert len(calls) == 3 * len(ANIMALS)
    assert [d.document for d in before] == [d.document for d in after]
    assert [d.choices for d in before] != [d.choices for d in after]


def test_progress_counts_items(session: Session, tmp_path: Path) -> None:
    for path in (choice_task(tmp_path), generation_task(tmp_path)):
        evaluator, seen = Tasks(task=str(path), batch_tokens=16), []
        evaluator.run(session, lambda done, total, seen=seen: seen.append((done, total)))
        counts = [done for done, _ in seen]
        assert counts == sorted(counts) and counts[-1] == len(ANIMALS) and {total for _, total in seen} == {12}
        assert len(set(counts)) > 3


def test_a_likelihood_that_is_no_number_names_the_item(session: Session, tmp_path: Path, monkeypatch: Any) -> None:
    from qfarm.tasks.model import SessionLM

    path = choice_task(tmp_path)
    marked = session.loaded.tokenizer.encode("sparrow")  # the fourth item
    real = SessionLM._hidden

    def hidden(self: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        states = real(self, ids, mask, cache)
        for row, line in enumerate(ids.tolist()):
            if any(line[i : i + len(marked)] == marked for i in range(len(line))):
                states[row] = float("nan")
        return states

    monkeypatch.setattr(SessionLM, "_hidden", hidden)
    with pytest.raises(NonFinite, match="animals: the log-likelihood of item 3 is not finite"):
        run(session, path)


def test_clusters_repeated_items_and_intervals(session: Session, tmp_path: Path) -> None:
    metrics, documents = run(session, choice_task(tmp_path))
    assert len({d.cluster for d in documents}) == metrics["acc"].clusters == len(ANIMALS)
    p, n = metrics["acc"].value, len(ANIMALS)
    assert metrics["acc"].standard_error == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    z = 1.959963985
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert metrics["acc"].low == pytest.approx(middle - half / (1 + z * z / n), abs=1e-6)  # Wilson
    path = choice_task(tmp_path, "zoos", metadata={"version": 1.0, "cluster": "zoo"})
    metrics, documents = run(session, path)
    assert metrics["acc"].clusters == 4 == len({d.cluster for d in documents})
    assert metrics["acc"].standard_error is None and metrics["acc"].low is None  # too few clusters
    rows = [json.loads(line) for line in (tmp_path / "animals_test.jsonl").read_text().splitlines()]
    twice = write_task(tmp_path, "twice", [*rows[:2], rows[0]], **_config(tmp_path))
    _, documents = run(session, twice)
    assert documents[2].document == f"{documents[0].document}.2" and documents[2].cluster == documents[0].cluster


def test_a_question_in_two_tasks_is_two_items_of_one_cluster(session: Session, tmp_path: Path) -> None:
    _, documents = run(session, choice_task(tmp_path))
    _, others = run(session, choice_task(tmp_path, "again"))
    assert [d.cluster for d in documents] == [d.cluster for d in others]
    assert not {d.document for d in documents} & {d.document for d in others}


def _config(folder: Path) -> dict[str, Any]:
    import yaml

    config = yaml.safe_load((folder / "animals.yaml").read_text())
    return {key: config[key] for key in ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "metric_list")}


def test_ids_are_of_the_content_not_of_the_place(session: Session, tmp_path: Path) -> None:
    _, documents = run(session, choice_task(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "animals_test.jsonl").read_text().splitlines()]
    turned = tmp_path / "turned"
    turned.mkdir()
    _, other = run(session, write_task(turned, "animals", rows[::-1], **_config(tmp_path)))
    assert [d.document for d in other] == [d.document for d in documents][::-1]


def test_the_ledger_stores_choices_and_reads_older_parts(session: Session, tmp_path: Path) -> None:
    _, documents = run(session, choice_task(tmp_path))
    rows = [DocumentRow(**dataclasses.asdict(d), cell_id="c", eval_id="e") for d in documents]
    table = record.to_table("documents", [*rows, dataclasses.replace(rows[0], choices=None)])
    assert table["choices"].to_pylist() == [*(d.choices for d in documents), None]
    assert record.schema("documents").field("choices").nullable and record.FORMAT == 1


def test_chat_template_changes_the_prompt(session: Session, tmp_path: Path) -> None:
    path = choice_task(tmp_path)
    with pytest.raises(InvalidInput, match="no chat template"):
        run(session, path, chat_template=True)
    session.loaded.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    evaluator = Tasks(task=str(path), chat_template=True)
    request = evaluator._prepared(session)[0].requests[0]
    text = session.loaded.tokenizer.decode(request.inputs).replace(" ", "")
    assert text.startswith("<s><user>") and text.count("<s>") == 1 and "<assistant>" in text
    assert run(session, path)[1] != run(session, path, chat_template=True)[1]
    assert evaluator.label == "animals chat"
