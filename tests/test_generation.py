"""Generation: where two greedy continuations part, brute force beside the cache, what is kept of the baseline."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qfarm import cache
from qfarm.errors import NonFinite
from qfarm.evaluate import build_evaluator
from qfarm.evaluate.generation import CONTINUATIONS, Generation, first_difference, greedy
from qfarm.models.past import given_cache, returned_cache
from qfarm.worker import Session
from tests.test_perplexity import make_cell

OPTIONS: dict[str, Any] = {"text": "python-docs", "prompts": 12, "prompt_tokens": 24, "new_tokens": 10}


@pytest.fixture
def session(tiny: Path) -> Session:
    session = Session(None)
    session.begin(make_cell(tiny))
    return session


def run(session: Session, **options: Any) -> tuple[dict[str, Any], Any]:
    evaluator = Generation(**OPTIONS | options)
    evaluator.prepare(session)
    result = evaluator.run(session, lambda done, total: None)
    return {metric.metric: metric for metric in result.metrics}, result.documents


def disturb(session: Session, size: float) -> None:
    torch.manual_seed(0)
    for linear in session.loaded.linears(0).values():
        session.loaded.replace_weight(linear, linear.weight + size * torch.randn_like(linear.weight))


def without_cache(session: Session, ids: Tensor, new_tokens: int) -> Tensor:
    """The whole context read again for every token."""
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = session.loaded.model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -new_tokens:]


def test_the_first_difference() -> None:
    tokens = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [9, 2, 3]])
    before = np.array([[1, 2, 3], [1, 2, 9], [1, 9, 3], [1, 2, 3]])
    assert first_difference(tokens, before).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_continuations_equal_those_without_a_cache(tiny_models: dict[str, Path], family: str) -> None:
    session = Session(None)
    session.begin(make_cell(tiny_models[family]))
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(greedy(session, ids, 8), without_cache(session, ids, 8))


def test_the_cache_is_the_one_that_the_model_returns(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that brings a cache of its own gets it back at every step."""
    body, given = session.loaded.model.base_model, []
    real = type(body).forward

    @functools.wraps(real)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        given.append(given_cache(options))
        out = real(self, *args, **options)
        returned_cache(out).mark = "installed"
        return out

    monkeypatch.setattr(type(body), "forward", forward)
    greedy(session, torch.zeros(1, 5, dtype=torch.long), 4)
    assert given[0] is None and [past.mark for past in given[1:]] == ["installed"] * 3


def test_the_baseline_never_parts_from_itself(session: Session, tiny: Path) -> None:
    for recipe in ("baseline", "rtn"):
        session.cell = make_cell(tiny, recipe)
        metrics, documents = run(session)
        assert metrics["first_divergence"].value == 10 and metrics["identical"].value == 1
        assert [document.agree for document in documents] == [10] * 12
    assert session.notes == []


def test_a_cell_is_compared_with_the_baseline_by_hand(session: Session, tiny: Path) -> None:
    run(session)
    windows = session.windows("python-docs", 24, None)
    chosen = [i * len(windows.ids) // 12 for i in range(12)]
    before = without_cache(session, windows.ids[chosen], 10)
    disturb(session, 0.02)
    after = without_cache(session, windows.ids[chosen], 10)
    session.cell = make_cell(tiny, "rtn")
    metrics, documents = run(session)
    agreed = [next((i for i in range(10) if a[i] != b[i]), 10) for a, b in zip(after, before, strict=True)]
    assert 0 < sum(agreed) < 120 and [document.agree for document in documents] == agreed
    assert metrics["first_divergence"].value == pytest.approx(np.mean(agreed))
    assert metrics["identical"].value == pytest.approx(np.mean([count == 10 for count in agreed]))
    assert metrics["first_divergence"].n == 12 == len(documents)
    assert [document.window for document in documents] == chosen


def test_prompts_come_from_all_over_the_text(session: Session) -> None:
    metrics, documents = run(session, prompts=30, new_tokens=1)
    clusters = {document.cluster for document in documents}
    assert len(clusters) >= 10 and metrics["identical"].clusters == len(clusters)
    assert metrics["first_divergence"].standard_error is not None


def test_a_lost_baseline_is_computed_again_and_announced(session: Session, tiny: Path) -> None:
    run(session)
    (file,) = (cache.root() / CONTINUATIONS).iterdir()
    kept = file.read_bytes()
    file.unlink()
    session.cell = make_cell(tiny, "rtn")
    Generation(**OPTIONS).prepare(session)
    assert file.read_bytes() == kept and "continuations are not in this machine's cache" in session.notes[0]


def test_more_prompts_than_the_text_holds(session: Session) -> None:
    windows = session.windows("python-docs", 200, None)
    _, documents = run(session, prompts=10**6, prompt_tokens=200, new_tokens=1)
    assert len(documents) == len(windows.ids)


def test_nan_is_refused(session: Session) -> None:
    head = session.loaded.head
    session.loaded.replace_weight(head, torch.full_like(head.weight, float("nan")))
    with pytest.raises(NonFinite, match="^generation python-docs 24\\+10 x12: a logit of new token 0 is not finite"):
        run(session)


def test_it_is_known_by_its_name_and_reads_prompt_and_continuation() -> None:
    found = build_evaluator("generation", {"text": "wikitext2", "prompts": 8})
    assert found.label == "generation wikitext2 64+64 x8" and found.window == 128 and found.needs_baseline
