"""Names, data and identity of tasks: what planning needs, without lm-eval being imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qfarm import cache
from qfarm.errors import DataError, InvalidInput, JobError, Unavailable
from qfarm.evaluate import eval_id, parse_evaluation
from qfarm.evaluate.tasks import Tasks
from qfarm.job import parse_job
from qfarm.tasks import registry
from qfarm.tasks.build import Options, build_task, shared_content
from qfarm.tasks.registry import CSQA, find
from qfarm.tasks.source import find_source, task_hash
from qfarm.text import text_hash
from tests.tasks_example import choice_task, generation_task

JOB = "models: [m]\nevaluate: {}\nresources: {{gpus: 0}}\n"


def protocol(task: Tasks, data: str | None = None) -> dict[str, Any]:
    return task.protocol("tokenizer", "float32", lambda name, part: text_hash(name, part, data))


# -- names ------------------------------------------------------------------------------------------------------------


def test_csqa_is_the_plain_mean_of_six() -> None:
    entry = find("csqa")
    assert tuple(leaf.name for leaf in entry.leaves) == CSQA
    (mean,) = entry.aggregates
    assert (mean.metric, mean.weight_by_size, mean.tasks) == ("acc", False, CSQA)


def test_groups_of_lm_eval_are_read_as_lm_eval_writes_them() -> None:
    mmlu = find("mmlu")
    assert len(mmlu.leaves) == len({leaf.config["dataset_name"] for leaf in mmlu.leaves}) == 57
    assert [(a.name, a.weight_by_size) for a in mmlu.aggregates][0] == ("mmlu", True)
    assert sum(len(a.tasks) for a in mmlu.aggregates[1:]) == 57  # stem, other, social sciences, humanities
    assert mmlu.leaves[0].config["fewshot_split"] == "dev"  # from the included template
    bbh = find("bbh")
    assert len(bbh.leaves) == 27 and bbh.aggregates[0].filters == ("get-answer",)
    assert {leaf.few_shot(None) for leaf in bbh.leaves} == {3}
    # A tag, which one member has from the file that it includes.
    assert [leaf.name for leaf in find("truthfulqa").leaves] == ["truthfulqa_gen", "truthfulqa_mc1", "truthfulqa_mc2"]
    assert find("gsm8k").leaves[0].few_shot(None) == 5 and find("gsm8k").leaves[0].few_shot(8) == 8


def test_unknown_names_get_one_clear_line() -> None:
    with pytest.raises(InvalidInput, match=r'unknown task "arc_eazy", did you mean "arc_easy"\? known: csqa, mmlu'):
        find("arc_eazy")
    with pytest.raises(DataError, match="task file nowhere/x.yaml does not exist"):
        find("nowhere/x.yaml")
    with pytest.raises(InvalidInput, match="truthfulqa_gen fixes its prompt"):
        Tasks(task="truthfulqa", few_shot=2)


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise registry.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(registry.importlib.metadata, "version", absent)
    with pytest.raises(InvalidInput, match="pip install 'lm_eval"):
        registry.version()


def test_planning_imports_neither_torch_nor_lm_eval(pack: str) -> None:
    code = (
        "import sys; from qfarm.evaluate import parse_evaluation; from qfarm.text import text_hash\n"
        "for task in parse_evaluation({'tasks': ['csqa', 'gsm8k']}):\n"
        f"    task.protocol('t', 'd', lambda name, part: text_hash(name, part, {pack!r})), task.tokens(), task.label\n"
        "print([name for name in ('torch', 'lm_eval', 'datasets', 'transformers') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_a_list_of_names_is_one_evaluation_each() -> None:
    text = "[tasks: [csqa, gsm8k], tasks: {names: [gsm8k], limit: 100, few_shot: 8}, tasks: [csqa]]"
    found = parse_job(JOB.format(text), "job.yaml").evaluations
    assert [task.label for task in found] == ["csqa", "gsm8k", "gsm8k 8-shot x100"]  # csqa twice is once
    assert all(isinstance(task, Tasks) for task in found)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("tasks", "expected a list of names"),
        ("{tasks: {names: csqa}}", "names: expected a list"),
        ("{tasks: {names: []}}", "names: expected a list"),
        ("{tasks: {limit: 3}}", "expected a list of names"),
        ("{tasks: [arc_eazy]}", "did you mean"),
        ("{tasks: {names: [boolq], limits: 3}}", "limit"),
        ("{tasks: {names: [boolq], limit: 0}}", "limit"),
        ("{tasks: {names: [boolq], prefill: half}}", "prefill"),
        ("{perplexity: [c4]}", "expected an evaluation's name"),
    ],
)
def test_bad_entries_name_their_line(entry: str, message: str) -> None:
    with pytest.raises(JobError, match=rf"job.yaml: line 2: evaluate\[0\]: .*{message}"):
        parse_job(JOB.format(f"[{entry}]"), "job.yaml")


def test_options_that_change_results_change_the_identity(tmp_path: Path) -> None:
    path = str(choice_task(tmp_path))
    options: list[dict[str, Any]] = [
        {},
        {"few_shot": 1},
        {"few_shot": 1, "seed": 2},
        {"limit": 3},
        {"chat_template": True},
        {"batch_tokens": 64},
    ]
    ids = {eval_id(protocol(Tasks(task=path, **each))) for each in options}
    assert len(ids) == len(options)
    # What cannot change a result does not: an unused seed, the task's own number of examples, the file's place.
    same = [{"seed": 2}, {"few_shot": 0}, {"prefill": "quantized"}]
    assert {eval_id(protocol(Tasks(task=path, **each))) for each in same} == {eval_id(protocol(Tasks(task=path)))}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert eval_id(protocol(Tasks(task=str(choice_task(moved))))) == eval_id(protocol(Tasks(task=path)))


def test_prefill_belongs_to_cells_with_a_quantized_cache(tmp_path: Path) -> None:
    kinds = [Tasks(task=str(choice_task(tmp_path))), Tasks(task="gsm8k"), Tasks(task="gsm8k", prefill="quantized")]
    found = [task.protocol("t", "float32", lambda name, part: "", kv=True) for task in kinds]
    assert [each["kv"]["prefill"] for each in found] == ["quantized", "full", "quantized"]


@pytest.mark.parametrize("name", ["boolq", "csqa", "truthfulqa"])
def test_likelihoods_of_prompts_that_are_read_in_full_are_refused(name: str) -> None:
    """They would say nothing about the cache; a suite in which only some tasks generate reads what is stored too."""
    line = f"^tasks: prefill: full is for tasks that generate; {name} scores likelihoods$"
    with pytest.raises(InvalidInput, match=line):
        Tasks(task=name, prefill="full")
    assert Tasks(task=name).reading_cache()["prefill"] == "quantized"


def test_a_file_named_from_here_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = choice_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Tasks(task="./animals.yaml").task == str(path) and Tasks(task="./animals.yaml").label == "animals"


def test_estimates_follow_items_examples_and_limit() -> None:
    assert Tasks(task="gsm8k", limit=10, few_shot=0).tokens() < Tasks(task="gsm8k", limit=10).tokens()
    assert Tasks(task="boolq", limit=10).tokens() * 327 == Tasks(task="boolq").tokens()
    assert Tasks(task="csqa").tokens() == sum(Tasks(task=name).tokens() for name in CSQA)
    assert Tasks(task="mmlu").tokens() > 1e6


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_pack(tmp_path: Path) -> Path:
    """A pack with ARC-Easy (no train) and two MMLU subjects in one file."""
    rows = [
        {
            "id": f"q{i}",
            "question": f"What is {i}?",
            "choices": {"text": ["one", "two"], "label": ["A", "B"]},
            "answerKey": "AB"[i % 2],
        }
        for i in range(6)
    ]
    for split in ("validation", "test"):
        lines = [json.dumps({**row, "question": f"{split}: {row['question']}"}) for row in rows]
        (tmp_path / f"arc_{split}.jsonl").write_text("\n".join(lines))
    subjects = [
        {"question": f"{subject} {i}", "choices": list("wxyz"), "answer": i % 4, "subject": subject}
        for i in range(3)
        for subject in ("anatomy", "virology")
    ]
    (tmp_path / "mmlu.jsonl").write_text("\n".join(map(json.dumps, subjects)))
    arc = {"path": "allenai/ai2_arc", "name": "ARC-Easy"}
    mmlu = {"path": "cais/mmlu", "name": "*", "filter": "subject"}
    sets = [
        {**arc, "splits": {split: f"arc_{split}.jsonl" for split in ("validation", "test")}},
        {**mmlu, "splits": {"test": "mmlu.jsonl", "dev": "mmlu.jsonl"}},
        {"path": "openai/gsm8k", "name": "main", "splits": {"train": "mmlu.jsonl"}},
    ]
    (tmp_path / "pack.yaml").write_text(yaml.safe_dump({"version": 1, "datasets": sets}))
    return tmp_path


def options(few_shot: int | None = None) -> Options:
    return Options(few_shot=few_shot, limit=None, seed=1234, chat_template=False)


def test_a_pack_replaces_the_hub_and_missing_splits_are_left_out(made_pack: Path, offline: None) -> None:
    leaf = find("arc_easy").leaves[0]
    source = find_source(leaf, str(made_pack))
    assert (source.evaluated, source.examples) == ("test", "validation")  # train is not in the pack
    assert source.overrides()["training_split"] is None and source.overrides()["fewshot_split"] == "validation"
    task = build_task(leaf, options(2), source)
    assert len(task.eval_docs) == 6 and not task.has_training_docs()
    context = task.fewshot_context(task.eval_docs[0], 2)
    assert context.count("Question: validation:") == 2 and context.endswith("Question: test: What is 0?\nAnswer:")
    # The rest of the configuration is lm-eval's own.
    assert task.config.doc_to_choice == "{{choices.text}}" and task.config.metadata["version"] == 1.0


def test_one_file_for_many_configurations_is_filtered(made_pack: Path, offline: None) -> None:
    leaf = find("mmlu_virology").leaves[0]
    task = build_task(leaf, options(), find_source(leaf, str(made_pack)))
    assert [doc["question"] for doc in task.eval_docs] == ["virology 0", "virology 1", "virology 2"]
    other = find("mmlu_anatomy").leaves[0]
    assert task_hash("task:mmlu_virology", str(made_pack)) != task_hash("task:mmlu_anatomy", str(made_pack))
    assert other.digest != leaf.digest  # the prompts name the subject


def test_examples_from_the_evaluated_split_leave_the_item_out(made_pack: Path, tmp_path: Path, offline: None) -> None:
    index = yaml.safe_load((made_pack / "pack.yaml").read_text())
    del index["datasets"][0]["splits"]["validation"]
    (made_pack / "pack.yaml").write_text(yaml.safe_dump(index))
    leaf = find("arc_easy").leaves[0]
    source = find_source(leaf, str(made_pack))
    assert source.examples == source.evaluated == "test"
    task = build_task(leaf, options(5), source)
    for doc in task.eval_docs:
        assert task.fewshot_context(doc, 5).count(doc["question"]) == 1


def test_what_is_nowhere_to_be_had_is_said_in_one_line(made_pack: Path, offline: None) -> None:
    with pytest.raises(Unavailable, match=r"task boolq \(aps/super_glue, boolq, validation\): give a data pack"):
        task_hash("task:boolq", None)
    with pytest.raises(Unavailable, match="boolq .*: the data pack .* does not hold it; add it there, or run where"):
        task_hash("task:boolq", str(made_pack))
    # Another split than the one that the task evaluates is never put in its place.
    with pytest.raises(Unavailable, match="gsm8k .* holds only its train split"):
        task_hash("task:gsm8k", str(made_pack))


def test_without_a_pack_the_hub_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Info:
        sha = "abc123"

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info())
    source = find_source(find("boolq").leaves[0], None)
    assert source.overrides()["dataset_kwargs"] == {"revision": "abc123"}
    assert (source.evaluated, source.examples) == ("validation", "train")


def test_identity_follows_the_content_of_what_is_used(made_pack: Path, offline: None) -> None:
    data = str(made_pack)
    items, examples = task_hash("task:arc_easy", data), task_hash("examples:arc_easy", data)
    assert ", test, " in items and examples.startswith("validation, ") and "lm_eval 0.4" in items
    assert Tasks(task="arc_easy").texts() == (("task:arc_easy", "evaluation"),)
    assert Tasks(task="arc_easy", few_shot=1).texts()[1] == ("examples:arc_easy", "evaluation")
    with (made_pack / "arc_validation.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps({"question": "new"}))
    assert task_hash("task:arc_easy", data) == items and task_hash("examples:arc_easy", data) != examples


def test_a_local_file_is_known_by_its_content_and_its_functions(tmp_path: Path) -> None:
    path = choice_task(tmp_path)
    path.write_text(path.read_text() + "process_docs: !function helper.keep\n")
    helper = tmp_path / "helper.py"
    helper.write_text("def keep(docs):\n    return docs\n")
    before = find(str(path)).leaves[0].digest
    helper.write_text("def keep(docs):\n    return docs.select(range(3))\n")
    leaf = find(str(path)).leaves[0]
    assert leaf.digest != before
    assert len(build_task(leaf, options(), find_source(leaf, None)).eval_docs) == 3
    (tmp_path / "animals_test.jsonl").unlink()
    with pytest.raises(DataError, match="data_files: test: 'animals_test.jsonl' is no file"):
        task_hash(f"task:{path}", None)


def test_groups_may_override_their_members(tmp_path: Path) -> None:
    group = tmp_path / "two.yaml"
    members = ["boolq", {"task": "gsm8k", "num_fewshot": 2}]
    means = [{"metric": "acc", "weight_by_size": False}]
    group.write_text(yaml.safe_dump({"group": "two", "task": members, "aggregate_metric_list": means}))
    entry = find(str(group))
    assert [leaf.few_shot(None) for leaf in entry.leaves] == [0, 2] and entry.aggregates[0].tasks == ("boolq", "gsm8k")
    group.write_text(yaml.safe_dump({"group": "two", "task": ["no_such_task"]}))
    with pytest.raises(DataError, match="member 'no_such_task'"):
        find(str(group))


def test_examples_without_a_split_are_refused(tmp_path: Path) -> None:
    path = generation_task(tmp_path)
    config = yaml.safe_load(path.read_text()) | {"process_docs": None}
    leaf = find(str(path)).leaves[0]
    source = find_source(leaf, None)
    assert source.examples == "train" and config["training_split"] == "train"
    import dataclasses

    with pytest.raises(InvalidInput, match="no split to take examples from"):
        build_task(leaf, options(1), dataclasses.replace(source, examples=None))


def test_the_index_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry._index.cache_clear()
    first = registry._index()
    assert len(list((cache.root() / registry.INDEX).iterdir())) == 1
    registry._index.cache_clear()
    monkeypatch.setattr(registry, "_scan", lambda root: pytest.fail("scanned again"))
    assert registry._index() == first


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_what_items_share() -> None:
    boolq, winogrande, piqa, mmlu = (
        find(name).leaves[0].config for name in ("boolq", "winogrande", "piqa", "mmlu_anatomy")
    )
    assert shared_content(boolq, {"passage": "p", "question": "q"}) == "p"
    twin = {"sentence": "The trophy did not fit, so _ was big.", "option1": "trophy", "option2": "case"}
    other = twin | {"sentence": "The trophy did not fit, so _ was small.", "option1": "Case", "option2": "trophy"}
    assert shared_content(winogrande, twin) == shared_content(winogrande, other)
    assert shared_content(winogrande, twin | {"sentence": "A trophy did"}) != shared_content(winogrande, twin)
    assert shared_content(piqa, {"goal": "g", "sol1": "a"}) == "g"
    gen, mc1 = (find(f"truthfulqa_{name}").leaves[0].config for name in ("gen", "mc1"))
    assert shared_content(gen, {"question": "q", "best_answer": "b"}) == "q" == shared_content(mc1, {"question": "q"})
    passage = "This question refers to the following information.\nA text.\nWhat?"
    assert shared_content(mmlu, {"question": passage}) == passage.removesuffix("\nWhat?")
    assert shared_content(mmlu, {"question": "Line one\nWhat?"}) is None


def test_clusters_of_the_pack_are_those_that_were_counted(pack: str) -> None:
    """BoolQ: 2,939 passages; WinoGrande: 43 % of items in twin pairs."""
    from collections import Counter

    for name, check in (
        ("boolq", lambda c: len(c) == 2939),
        ("winogrande", lambda c: round(sum(n for n in c.values() if n > 1) / 1267, 2) in (0.43, 0.44)),
    ):
        leaf = find(name).leaves[0]
        docs = build_task(leaf, options(), find_source(leaf, pack)).eval_docs
        assert check(Counter(json.dumps(shared_content(leaf.config, doc)) for doc in docs)), name


def test_parsing_needs_no_data() -> None:
    """A job is checked on machines that have neither a pack nor a network."""
    (task,) = parse_evaluation({"tasks": ["hellaswag"]})
    assert task.label == "hellaswag"
