"""Word-level perplexity: lm-eval's own numbers, its pages and its detokenizer."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qfarm.text import detokenize, load_pages
from qfarm.worker import Session
from tests.test_perplexity import as_quantized, make_cell, run, spoil
from tests.test_text import WIKITEXT, write_pack


@pytest.fixture
def session(tiny: Path) -> Session:
    session = Session(None)
    session.begin(make_cell(tiny))
    return session


ROWS = [
    *("", " = First = \n", "", ' Some text of the " first " article , with 1 @,@ 000 ( many ) words . \n', ""),
    *(" = = Section = = \n", "", " Text of a section 's end , where x = 3 = y ; and more of it . \n", ""),
    *(" = 2 = \n", "", " The title above has one character . \n", " = 1 henry and capacitance C = \n", " 1 farad . \n"),
    *("", " = Third = Last = \n", "", " The end N . \n"),
]


def lm_eval_wikitext() -> Any:
    """lm-eval's own functions of its task wikitext."""
    lm_eval = pytest.importorskip("lm_eval")
    path = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lm_eval_numbers(session: Session, pages: list[str], reach: int) -> dict[str, float]:
    """What lm-eval itself computes for these pages with the session's model."""
    from lm_eval.api import metrics
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    task = lm_eval_wikitext()
    model = HFLM(
        pretrained=session.loaded.model,
        tokenizer=session.loaded.tokenizer,
        max_length=reach,
        batch_size=1,
        device="cpu",
    )
    requests = [
        Instance(
            request_type="loglikelihood_rolling", doc={}, arguments=(task.wikitext_detokenizer({"page": p}),), idx=0
        )
        for p in pages
    ]
    found = model.loglikelihood_rolling(requests, disable_tqdm=True)
    items = [task.process_results({"page": p}, (value,)) for p, value in zip(pages, found, strict=True)]
    return {
        "word_perplexity": metrics.weighted_perplexity([item["word_perplexity"] for item in items]),
        "byte_perplexity": metrics.weighted_perplexity([item["byte_perplexity"] for item in items]),
        "bits_per_byte": metrics.bits_per_byte([item["bits_per_byte"] for item in items]),
    }


@pytest.mark.parametrize("reach", [16, 100, 250])
def test_word_perplexity_is_lm_evals_own_number(session: Session, tmp_path: Path, reach: int) -> None:
    session.data = write_pack(tmp_path, ROWS, WIKITEXT, "test")
    metrics, documents = run(session, text="wikitext2", length=reach, windows=None, convention="word")
    pages = load_pages("wikitext2", session.data).documents
    assert len(pages) == 4 == metrics["word_perplexity"].n  # 'henry' counts as a heading there
    expected = lm_eval_numbers(session, list(pages), reach)
    for name, value in expected.items():
        assert metrics[name].value == pytest.approx(value, rel=1e-5), name
    assert "perplexity" not in metrics and metrics["word_perplexity"].standard_error is None
    assert sum(d.tokens for d in documents) == sum(
        len(session.loaded.tokenizer(page)["input_ids"]) for page in load_pages("wikitext2", session.data).cleaned
    )


def test_the_detokenizer_is_lm_evals(pack: str) -> None:
    theirs = lm_eval_wikitext().wikitext_detokenizer
    pages = load_pages("wikitext2", pack).documents
    assert len(pages) == 62  # of the test split of EleutherAI/wikitext_document_level
    assert [detokenize(page) for page in pages] == [theirs({"page": page}) for page in pages]


def test_word_convention_compares_with_the_baseline_too(session: Session, tiny: Path) -> None:
    options: dict[str, Any] = {"length": 64, "windows": None, "convention": "word", "documents": 11}
    first, _ = run(session, **options)
    assert first["word_perplexity"].n == first["word_perplexity"].clusters == 11
    low, high = first["bits_per_byte"].low, first["bits_per_byte"].high
    assert low is not None and high is not None and low < first["bits_per_byte"].value < high
    as_quantized(session, tiny)
    again, paired = run(session, **options)
    assert again["word_perplexity"].value == first["word_perplexity"].value and again["kl"].value == 0
    assert [d.loss for d in paired] == [d.baseline_loss for d in paired]
    spoil(session, 1.0)
    assert run(session, **options)[0]["word_perplexity"].value > again["word_perplexity"].value


def test_the_conventions_agree_where_they_measure_the_same(session: Session, tmp_path: Path) -> None:
    """bits per byte of one document, by hand from its tokens."""
    (tmp_path / "one.txt").write_text("A short text of a few words.")
    metrics, documents = run(
        session, text=str(tmp_path / "one.txt"), length=200, windows=None, convention="word", divergence=False
    )
    text = "A short text of a few words.\n\n"
    ids = torch.tensor([256, *session.loaded.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = nn.functional.cross_entropy(
            session.loaded.model(ids[None]).logits[0, :-1], ids[1:], reduction="sum"
        ).item()
    assert metrics["bits_per_byte"].value == pytest.approx(loss / math.log(2) / 30, rel=1e-5)
    assert metrics["word_perplexity"].value == pytest.approx(math.exp(loss / 8), rel=1e-5)  # 7 words and an end
