"""Perplexity and divergence: closed forms, agreement with a plain loop, what the ledger says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qfarm import cache
from qfarm.errors import DataError, NonFinite
from qfarm.evaluate.perplexity import HIDDEN, Perplexity, _score_chunk
from qfarm.matrix import Cell
from qfarm.models.load import LoadedModel
from qfarm.models.reference import resolve
from qfarm.record import Metric
from qfarm.worker import Session

OPTIONS: dict[str, Any] = {"text": "python-docs", "length": 64, "windows": 40}


def make_cell(model: Path, recipe: str = "baseline") -> Cell:
    facts = resolve(str(model))
    return Cell(
        model=str(model),
        fingerprint=facts.fingerprint,
        tokenizer=facts.tokenizer,
        dtype="float32",
        recipe=recipe,
        methods=(),
        scheme="w16",
        group_size=-1,
        symmetric=False,
        scale_dtype="float16",
        statistics=None,
        calibration=None,
        seed=None,
    )


@pytest.fixture
def session(tiny: Path) -> Session:
    session = Session(None)
    session.begin(make_cell(tiny))
    return session


def run(session: Session, **options: Any) -> tuple[dict[str, Metric], Any]:
    evaluator = Perplexity(**OPTIONS | options)
    evaluator.prepare(session)
    result = evaluator.run(session, lambda done, total: None)
    return {metric.metric: metric for metric in result.metrics}, result.documents


def as_quantized(session: Session, tiny: Path) -> None:
    """The session's model now counts as a quantized cell of the same model."""
    session.cell = make_cell(tiny, "rtn")


def test_uniform_model_has_the_vocabulary_as_perplexity(session: Session) -> None:
    head = session.loaded.head
    session.loaded.replace_weight(head, torch.zeros_like(head.weight))
    assert run(session)[0]["perplexity"].value == pytest.approx(260, rel=1e-6)


def test_clairvoyant_model_has_perplexity_one(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that name the next token, read by an identity head."""

    def body(self: LoadedModel, ids: Tensor) -> Tensor:
        following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        return 100.0 * nn.functional.one_hot(following, 260).float()

    monkeypatch.setattr(LoadedModel, "body", body)
    monkeypatch.setattr(LoadedModel, "head", nn.Linear(260, 260, bias=False))
    nn.init.eye_(session.loaded.head.weight)
    metrics, _ = run(session)
    assert metrics["perplexity"].value == pytest.approx(1, abs=1e-6) and metrics["top1_accuracy"].value == 1


@pytest.mark.parametrize("length", [64, 100])
def test_equals_a_plain_loop(session: Session, length: int) -> None:
    metrics, documents = run(session, length=length, windows=9)
    losses, right = [], 0
    for ids in session.windows("python-docs", length, 9).ids:
        logits = session.loaded.model(ids[None]).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, ids[1:]).item())
        right += int((logits.argmax(-1) == ids[1:]).sum())
    # The mean of window means is the mean over tokens, since all windows are equally long.
    assert metrics["perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert metrics["top1_accuracy"].value == pytest.approx(right / (9 * (length - 1)))
    assert sum(document.tokens for document in documents) == 9 * (length - 1)
    by_window = [sum(d.loss for d in documents if d.window == i) / (length - 1) for i in range(9)]
    assert by_window == pytest.approx(losses, rel=1e-5)


def test_baseline_against_itself_is_identical(session: Session, tiny: Path) -> None:
    first, documents = run(session)
    assert set(first) == {"perplexity", "top1_accuracy"}
    as_quantized(session, tiny)
    again, paired = run(session)
    assert again["kl"].value == pytest.approx(0, abs=1e-7) and again["top1_agreement"].value == 1
    assert again["lost"].value == again["gained"].value == 0
    assert again["perplexity"].value == first["perplexity"].value
    assert [d.loss for d in documents] == [d.baseline_loss for d in paired]


def test_divergence_equals_its_definition(session: Session, tiny: Path) -> None:
    run(session)
    windows = session.windows("python-docs", 64, 40)
    with torch.no_grad():
        before = torch.cat([session.loaded.model(ids[None]).logits[0, :-1] for ids in windows.ids]).log_softmax(-1)
        for linear in session.loaded.linears(0).values():
            session.loaded.replace_weight(linear, linear.weight + 0.1 * torch.randn_like(linear.weight))
        after = torch.cat([session.loaded.model(ids[None]).logits[0, :-1] for ids in windows.ids]).log_softmax(-1)
    targets = windows.ids[:, 1:].reshape(-1)
    as_quantized(session, tiny)
    metrics, documents = run(session)
    assert metrics["kl"].value == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4)
    assert metrics["kl_reverse"].value == pytest.approx(
        float((after.exp() * (after - before)).sum(-1).mean()), rel=1e-4
    )
    agree = before.argmax(-1) == after.argmax(-1)
    assert metrics["top1_agreement"].value == pytest.approx(float(agree.float().mean()))
    right_before, right_after = before.argmax(-1) == targets, after.argmax(-1) == targets
    assert metrics["lost"].value == pytest.approx(float((right_before & ~right_after).float().mean()))
    assert metrics["gained"].value == pytest.approx(float((~right_before & right_after).float().mean()))
    assert sum(d.lost for d in documents) == int((right_before & ~right_after).sum())


def test_chunk_formulas_survive_large_logits() -> None:
    logits, before = 1e3 * torch.randn(4, 50), 1e3 * torch.randn(4, 50)
    out = _score_chunk(logits.clone(), torch.zeros(4, dtype=torch.long), before.clone())
    assert all(torch.isfinite(value).all() for value in out.values()) and (out["kl"] >= 0).all()


def test_few_clusters_give_a_value_without_an_error(session: Session) -> None:
    few, documents = run(session, windows=2)
    assert len({d.cluster for d in documents}) < 10
    assert few["perplexity"].standard_error is None and few["perplexity"].low is None
    many, documents = run(session, length=256, windows=None)
    clusters = len({d.cluster for d in documents})
    assert clusters >= 10 and many["perplexity"].clusters == clusters
    low, high = many["perplexity"].low, many["perplexity"].high
    assert low is not None and high is not None and low < many["perplexity"].value < high


def test_nan_names_the_window(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LoadedModel.body

    def body(self: LoadedModel, ids: Tensor) -> Tensor:
        hidden = real(self, ids)
        third = session.windows("python-docs", 64, 40).ids[3]
        hidden[(ids == third).all(dim=1)] = float("nan")
        return hidden

    monkeypatch.setattr(LoadedModel, "body", body)
    with pytest.raises(NonFinite, match="window 3"):
        run(session)


def test_a_lost_baseline_is_computed_again_and_announced(session: Session, tiny: Path) -> None:
    run(session)
    (states,) = (cache.root() / HIDDEN).iterdir()
    kept = states.read_bytes()
    states.unlink()
    as_quantized(session, tiny)
    evaluator = Perplexity(**OPTIONS)
    evaluator.prepare(session)
    assert states.read_bytes() == kept and "computed again" in session.notes[0]
    session.notes.clear()
    evaluator.prepare(session)
    assert session.notes == []


def test_without_divergence_no_baseline_is_needed(session: Session, tiny: Path) -> None:
    as_quantized(session, tiny)
    evaluator = Perplexity(**OPTIONS, divergence=False)
    evaluator.prepare(session)
    result = evaluator.run(session, lambda done, total: None)
    assert {metric.metric for metric in result.metrics} == {"perplexity", "top1_accuracy"}
    assert not (cache.root() / HIDDEN).exists()


def test_text_shorter_than_a_window_is_refused(session: Session) -> None:
    with pytest.raises(DataError, match="fewer than one window"):
        run(session, length=10_000_000)
