"""Small tasks of every output type as lm-eval writes them: YAML and JSON lines, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ANIMALS = ("cat", "dog", "horse", "sparrow", "whale", "ant", "bee", "fox", "owl", "frog", "newt", "crab")


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> Path:
    """A task whose items are the rows; the training rows are the same with their order turned around."""
    for split, content in (("test", rows), ("train", rows[::-1])):
        lines = "\n".join(json.dumps(row) for row in content)
        (folder / f"{name}_{split}.jsonl").write_text(lines + "\n")
    path = folder / f"{name}.yaml"
    given = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}_test.jsonl", "train": f"{name}_train.jsonl"}},
        "test_split": "test",
        "training_split": "train",
        **config,
    }
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path


def choice_task(folder: Path, name: str = "animals", **config: Any) -> Path:
    """Three choices of several tokens, two of which begin alike."""
    rows = [
        {
            "question": f"Which animal number {i} is a {animal}",
            "options": [f"{animal}s", f"{animal} x", "no " * (1 + i % 3)],
        }
        | {"gold": i % 2, "zoo": i // 3}
        for i, animal in enumerate(ANIMALS)
    ]
    return write_task(
        folder,
        name,
        rows,
        **{
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}?\nAnswer:",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
            "metadata": {"version": 1.0},
            **config,
        },
    )


def likelihood_task(folder: Path) -> Path:
    rows = [{"text": f"The {animal} says", "target": f" {animal[::-1]} and goes"} for animal in ANIMALS]
    means = [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ]
    return write_task(
        folder,
        "sayings",
        rows,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        metric_list=means,
    )


def rolling_task(folder: Path) -> Path:
    # Never periodic: lm-eval 0.4.13 mixes up windows of one text that are alike but for where scoring starts.
    rows = [
        {"text": " ".join(f"{animal} {7 * k * k} is no {ANIMALS[k % 5]}." for k in range(1 + 3 * i))}
        for i, animal in enumerate(ANIMALS)
    ]
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    return write_task(
        folder,
        "stories",
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[metric],
    )


def generation_task(folder: Path, name: str = "echoes", until: str = "e", **kwargs: Any) -> Path:
    rows = [{"question": f"Say {animal} {'again ' * (i % 4)}", "answer": animal} for i, animal in enumerate(ANIMALS)]
    means = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    first = {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]}
    last = {
        "name": "last",
        "filter": [{"function": "regex", "group_select": -1, "regex_pattern": "(.)"}, {"function": "take_first"}],
    }
    return write_task(
        folder,
        name,
        rows,
        output_type="generate_until",
        doc_to_text="{{question}}:",
        doc_to_target="{{answer}}",
        metric_list=means,
        filter_list=[first, last],
        generation_kwargs={"until": [until], "max_gen_toks": 12, "do_sample": False, **kwargs},
    )
