"""A small job and a model that exists only as a description, for the tests of jobs and of their matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qfarm.job import parse_job
from qfarm.matrix import Matrix, expand
from qfarm.models.reference import ModelFacts

PATH = "jobs/example.yaml"
JOB = """\
name: example
models: [org/model]
methods: [rtn, gptq]
bits: [w4]
group_sizes: [64]
calibration: {text: python-docs, samples: 4, length: 32}
evaluate:
  - perplexity: {text: python-docs, length: 32}
"""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
FACTS = ModelFacts(
    reference="org/model",
    location="org/model",
    revision="commit",
    fingerprint="fingerprint",
    tokenizer="tokenizer",
    config=CONFIG,
)


def changed(**values: str | None) -> str:
    """The job with the values of some keys replaced or, by None, with the keys left out; new keys come last."""
    head, evaluate = JOB.split("evaluate:")
    keys: dict[str, str | None] = dict(line.split(": ", 1) for line in head.splitlines())
    keys |= {"evaluate": evaluate.rstrip()} | values
    return "".join(f"{key}: {value}\n" for key, value in keys.items() if value is not None)


def matrix(text: str = JOB, hashes: Callable[[str], str] = lambda name: f"hash of {name}", **facts: Any) -> Matrix:
    """The matrix of a job's text; `facts` changes what is known of every model."""

    def describe(reference: str) -> ModelFacts:
        return dataclasses.replace(FACTS, reference=reference, **facts)

    return expand(parse_job(text, PATH), describe, hashes)


def ids(text: str = JOB, **options: Any) -> list[str]:
    return [cell.cell_id for cell in matrix(text, **options).cells]


def labels(found: Matrix) -> list[str]:
    """Labels of the cells, without the baseline."""
    return [cell.label for cell in found.cells if not cell.is_baseline]
