"""Needle: where the key stands, what counts as found, Wilson intervals by hand, and the ledger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.errors import InvalidInput
from qfarm.evaluate import build_evaluator, eval_id, parse_evaluation
from qfarm.evaluate import needle as needle_module
from qfarm.evaluate.needle import FILLER, QUESTION, Needle, prompt
from qfarm.worker import Session
from tests.conftest import save_tiny, speaking
from tests.test_perplexity import make_cell

GRID: dict[str, Any] = {"lengths": [640, 1000], "depths": [0, 50, 100], "keys": 2}  # of a tokenizer of single bytes


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(save_tiny(tmp_path_factory.mktemp("long"), "llama", max_position_embeddings=1024))


@pytest.fixture
def session(long: Path) -> Session:
    session = Session(None)
    session.begin(make_cell(long))
    return session


def answering(monkeypatch: pytest.MonkeyPatch, session: Session, reply: Any) -> None:
    """Greedy decoding replaced by a function from a prompt's text to an answer."""

    def greedy(given: Session, ids: Tensor, new_tokens: int) -> Tensor:
        tokenizer = given.loaded.tokenizer
        text = reply(tokenizer.decode(ids[0]))
        return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])

    monkeypatch.setattr(needle_module, "greedy", greedy)


def key_in(text: str) -> str:
    found = re.findall(r"\d{6}", text)
    assert len(found) == 2 and found[0] == found[1]
    return str(found[0])


@pytest.mark.parametrize("length", [640, 1000])
@pytest.mark.parametrize("depth", [0, 30, 50, 100])
def test_a_prompt_is_as_long_as_it_may_be_and_its_needle_as_deep(session: Session, length: int, depth: int) -> None:
    tokenizer = session.loaded.tokenizer
    ids = prompt(tokenizer, "123456", length, depth)
    text = tokenizer.decode(ids)
    assert length - max(map(len, FILLER)) < len(ids) <= length
    assert text.endswith(QUESTION) and key_in(text) == "123456"
    before, after = re.split(r"The secret number is 123456\. .*123456 is the secret number\.", text)
    counts = [sum(part.count(sentence.strip()) for sentence in FILLER) for part in (before, after)]
    assert counts[0] == round(sum(counts) * depth / 100)


def test_a_grid_in_which_the_deep_half_is_found(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found if the key is anywhere in the answer; intervals against Wilson's formula."""

    def reply(text: str) -> str:
        return "no" if "harbour" in text.split("secret number is")[0] else f" '{key_in(text)}'."

    answering(monkeypatch, session, reply)
    result = Needle(**GRID).run(session, lambda done, total: None)
    metrics = {metric.metric: metric for metric in result.metrics}
    assert list(metrics) == ["acc", *(f"acc {length} at {depth} %" for length in (640, 1000) for depth in (0, 50, 100))]
    assert [metrics[f"acc 640 at {depth} %"].value for depth in (0, 50, 100)] == [1, 0, 0]
    total = metrics["acc"]
    assert total.n == 12 and total.value == pytest.approx(4 / 12)
    z, n, p = 1.959964, 12, 4 / 12
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert total.low == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-5)
    assert total.high == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-5)
    assert metrics["acc 640 at 0 %"].n == 2 and metrics["acc 640 at 0 %"].low == pytest.approx(2 / (2 + z**2), abs=1e-5)
    assert len({document.document for document in result.documents}) == 12
    assert [document.correct for document in result.documents] == [1, 1, 0, 0, 0, 0] * 2
    assert result.documents[2].answer == "no" and result.documents[2].task == "640 at 50 %"


def test_an_answer_is_right_if_it_holds_the_whole_key(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for before, change, after, right in ((" ", 0, ".", 1), ("", 0, "", 1), (" ", 1, ".", 0)):

        def reply(text: str, before: str = before, change: int = change, after: str = after) -> str:
            key = key_in(text)
            return before + key[:-1] + str((int(key[-1]) + change) % 10) + after

        answering(monkeypatch, session, reply)
        (document,) = Needle(lengths=[640], depths=[50], keys=1).run(session, lambda done, total: None).documents
        assert document.correct == right


def test_a_real_model_runs_and_changes_nothing_between_runs(session: Session) -> None:
    small = Needle(lengths=[640], depths=[50], keys=2)
    first, second = (small.run(session, lambda done, total: None) for _ in range(2))
    assert first == second and first.metrics[0].value == 0
    answers = [document.answer for document in first.documents]
    assert all(document.tokens == 7 + needle_module.SPARE_TOKENS for document in first.documents) and any(answers)


def test_bad_options_are_one_line(session: Session) -> None:
    for options, line in [
        ({"depths": [0, 101]}, r"needle: depths are percentages from 0 to 100, got \[0, 101\]"),
        ({"lengths": [512, 512]}, r"needle: lengths: \[512, 512\] names one twice"),
        ({"lengths": []}, "needle: lengths: "),
        ({"depht": [1]}, 'needle: unknown option "depht", did you mean "depths"'),
    ]:
        with pytest.raises(InvalidInput, match=f"^{line}"):
            build_evaluator("needle", options)
    Needle(lengths=[1013], depths=[0], keys=1).prepare(session)  # 7 characters of a key and 4 more: 1024
    with pytest.raises(InvalidInput, match=": 1025 tokens with the answer, but .* reads at most 1024$"):
        Needle(lengths=[1014], depths=[0], keys=1).prepare(session)
    with pytest.raises(InvalidInput, match="^needle: a prompt without any filler is longer than 100 tokens$"):
        Needle(lengths=[100]).prepare(session)


def test_prefill_is_full_unless_the_job_says_so_and_no_part_of_other_cells() -> None:
    (usual,), (strict,) = parse_evaluation("needle"), parse_evaluation({"needle": {"prefill": "quantized"}})

    def protocol(evaluator: Any, kv: bool) -> dict[str, Any]:
        return dict(evaluator.protocol("t", "float32", lambda name, part: "", kv=kv))

    assert eval_id(protocol(usual, False)) == eval_id(protocol(strict, False))
    assert [protocol(e, True)["kv"]["prefill"] for e in (usual, strict)] == ["full", "quantized"]
    again = build_evaluator("needle", usual.options())
    assert again == usual and protocol(again, True) == protocol(usual, True)
