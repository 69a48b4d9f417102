"""Perplexity and divergence: closed forms, agreement with a plain loop, what the ledger says."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qfarm import cache, divergence, predictions, sums
from qfarm.divergence import histogram_counts, histogram_quantile
from qfarm.errors import DataError, InvalidInput, NonFinite
from qfarm.evaluate import build_evaluator, eval_id
from qfarm.evaluate.perplexity import Perplexity, Stop, _Gambler
from qfarm.layers.linear import quantize_input
from qfarm.layers.trace import first_nonfinite
from qfarm.matrix import Cell, baseline_cell
from qfarm.models.load import LoadedModel
from qfarm.models.reference import resolve
from qfarm.predictions import HIDDEN
from qfarm.record import Metric
from qfarm.worker import Session
from tests.test_text import write_pack

OPTIONS: dict[str, Any] = {"text": "python-docs", "length": 64, "windows": 40}


def make_cell(model: Path | str, recipe: str = "baseline") -> Cell:
    return dataclasses.replace(baseline_cell(resolve(str(model)), "float32"), recipe=recipe)


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
    metrics, _ = run(session, divergence=False)
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


def test_chunks_and_a_head_with_a_bias_equal_a_plain_loop(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.loaded.head, "bias", nn.Parameter(torch.linspace(-3, 3, 260)))
    monkeypatch.setitem(predictions.LOGIT_BUDGET, "cpu", 25 * 260)  # 63 predictions: three chunks of 21
    metrics, _ = run(session, windows=4, divergence=False)
    losses = []
    for ids in session.windows("python-docs", 64, 4).ids:
        logits = session.loaded.model(ids[None]).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, ids[1:]).item())
    assert metrics["perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_large_evaluations_use_compiled_sums_or_say_why_not(
    session: Session, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(session)
    as_quantized(session, tiny)
    for linear in session.loaded.linears(0).values():
        session.loaded.replace_weight(linear, linear.weight + 0.1 * torch.randn_like(linear.weight))
    by_blocks, _ = run(session)
    monkeypatch.setattr(sums, "compiled", lambda dtype: pytest.fail("too small for it"))
    run(session)
    asked = []
    monkeypatch.setattr(sums, "WANTED_FROM", 40 * 63 * 260)
    monkeypatch.setattr(sums, "compiled", lambda dtype: asked.append(dtype) or sums.Functions(sums.one, sums.both))
    found, _ = run(session)
    assert asked == [session.loaded.dtype] and not session.notes
    for name, metric in by_blocks.items():
        assert found[name].value == pytest.approx(metric.value, rel=1e-5, abs=1e-9), name
    assert found["kl"].value != by_blocks["kl"].value  # sums in float64
    monkeypatch.setattr(sums, "compiled", lambda dtype: "no compiler")
    again, _ = run(session)
    assert again["kl"].value == by_blocks["kl"].value
    said = "figures are computed op by op, torch.compile gives no function: no compiler"
    assert session.notes == [f"perplexity python-docs 64 x40: {said}"]


def test_baseline_against_itself_is_identical(session: Session, tiny: Path) -> None:
    first, documents = run(session)
    assert set(first) == {"perplexity", "top1_accuracy", "kl_floor", "flips_floor"}
    assert abs(first["kl_floor"].value) < 1e-6 and first["flips_floor"].value == 0 and first["kl_floor"].n == 2
    as_quantized(session, tiny)
    again, paired = run(session)
    assert again["kl"].value == pytest.approx(0, abs=1e-7) and again["top1_agreement"].value == 1
    assert again["lost"].value == again["gained"].value == 0
    assert again["perplexity"].value == first["perplexity"].value
    assert [d.loss for d in documents] == [d.baseline_loss for d in paired]


def test_the_floor_is_what_another_shape_of_the_forward_pass_moves(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding is planted: single windows, shortened, are read by a body that misses by a known vector."""
    real, seen = LoadedModel.body, []

    def body(self: LoadedModel, ids: Tensor) -> Tensor:
        states = real(self, ids)
        if len(ids) > 1:
            return states
        seen.append((ids[0], states[0]))
        return states + 0.1 * torch.linspace(-1, 1, states.shape[-1])

    monkeypatch.setattr(LoadedModel, "body", body)
    metrics, _ = run(session)
    kl, flips = [], []
    rows = {tuple(ids[:-1].tolist()): ids for ids in session.windows("python-docs", 64, 40).ids}
    for ids, states in seen:
        before = session.loaded.head(states).log_softmax(-1)
        after = session.loaded.head(states + 0.1 * torch.linspace(-1, 1, states.shape[-1])).log_softmax(-1)
        kl.append((before.exp() * (before - after)).sum(-1))
        targets = rows[tuple(ids.tolist())][1:]
        flips.append((before.argmax(-1) == targets) != (after.argmax(-1) == targets))
    assert metrics["kl_floor"].n == len(seen) > 1 and metrics["kl_floor"].value > 1e-4
    assert metrics["kl_floor"].value == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert metrics["flips_floor"].value == pytest.approx(float(torch.cat(flips).float().mean()))


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


def test_few_clusters_give_a_value_without_an_error(session: Session) -> None:
    few, documents = run(session, windows=2)
    assert len({d.cluster for d in documents}) < 10
    assert few["perplexity"].standard_error is None and few["perplexity"].low is None
    many, documents = run(session, length=256, windows=120)
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


def test_numbers_that_are_not_finite_name_the_first_layer(session: Session) -> None:
    loaded = session.loaded
    ids = session.windows("python-docs", 32, None).rows[0]
    assert first_nonfinite(loaded, ids) is None
    loaded.replace_weight(loaded.linears(1)["up"], loaded.linears(1)["up"].weight * 1e38)
    with pytest.raises(NonFinite, match=r"window \d+: loss is not finite; first in the output of layer 1 up$"):
        run(session)
    loaded.restore()
    quantize_input(loaded, 0, "o", lambda x: x * torch.nan)
    assert first_nonfinite(loaded, ids) == "the output of layer 0 o"
    loaded.attention(0).register_forward_hook(lambda module, args, out: (out[0] * torch.nan, *out[1:]))
    loaded.restore()
    assert first_nonfinite(loaded, ids) == f"the input of layer 0 {'gate' if 'gate' in loaded.linears(0) else 'up'}"
    assert not any(linear._forward_hooks or linear._forward_pre_hooks for linear in loaded.linears(0).values())


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


# -- order and early end ----------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_order_of_the_windows(
    session: Session, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-equal to the text's order, the kept hidden states included."""
    options = {"length": 50, "windows": 123}  # batches of 40 windows, the last of 3
    visited: list[list[int]] = []
    results, states = [], []
    real = predictions.hidden_states

    def watched(session: Session, windows: Any, batch: range, spans: Any) -> Any:
        visited[-1].append(batch.start)
        return real(session, windows, batch, spans)

    monkeypatch.setattr("qfarm.evaluate.perplexity.hidden_states", watched)
    for evaluation, order in (("one", None), ("another", None), ("text", lambda _, count: range(count))):
        if order:
            monkeypatch.setattr(predictions, "shared_order", order)
        visited.append([])
        session.evaluation = evaluation
        results.append(run(session, **options))
        (file,) = (cache.root() / HIDDEN).iterdir()
        states.append(file.read_bytes())
    assert sorted(visited[0]) == visited[2] == list(range(0, 123, 40))
    assert len({tuple(each) for each in visited}) == 3, "the order must depend on the evaluation"
    assert results[0] == results[1] == results[2] and states[0] == states[1] == states[2]


def spoil(session: Session, factor: float) -> None:
    """A head whose predictions are confident and wrong."""
    head = session.loaded.head
    session.loaded.replace_weight(head, -factor * head.weight)


def test_a_hopeless_cell_is_stopped_and_says_on_what(session: Session, tiny: Path) -> None:
    options: dict[str, Any] = {"length": 256, "windows": 128, "stop": {"above": 2.0}}
    session.evaluation = "some eval_id"
    baseline, _ = run(session, **options)
    assert baseline["perplexity"].stopped_early is None
    as_quantized(session, tiny)
    spoil(session, 10.0)
    metrics, documents = run(session, **options)
    seen = {document.window for document in documents}
    assert 0 < len(seen) < 128 and len(seen) % 8 == 0
    assert {m.stopped_early for m in metrics.values()} == {len(seen)} == {m.n for m in metrics.values()}
    mean = sum(d.loss for d in documents) / sum(d.tokens for d in documents)
    assert metrics["perplexity"].value == pytest.approx(math.exp(mean))
    assert (metrics["perplexity"].low is None) == (metrics["perplexity"].clusters < 10)
    whole, every = run(session, length=256, windows=128)
    assert whole["perplexity"].stopped_early is None and {d.window for d in every} == set(range(128))
    kept = {d.document: d for d in every}
    assert all(kept[d.document] == d for d in documents)  # what was seen is what a whole run says of it


def test_after_running_out_of_memory_the_windows_come_in_the_same_order(session: Session, tiny: Path) -> None:
    """Halved batches are parts of the groups that all cells share, and the stop looks at whole groups."""
    options: dict[str, Any] = {"length": 256, "windows": 128, "stop": {"above": 2.0}}
    session.evaluation = "some eval_id"
    run(session, **options)
    as_quantized(session, tiny)
    spoil(session, 10.0)
    windows = session.windows("python-docs", 256, 128)
    orders, seen = [], []
    for shrink in (0, 1, 3):
        session.shrink = shrink
        order = predictions.visiting_order(session, windows)
        orders.append([[index for batch in group for index in batch] for group in order])
        assert all(len(batch) == 8 >> shrink for group in order for batch in group)
        metrics, documents = run(session, **options)
        seen.append({document.window for document in documents})
        assert metrics["perplexity"].stopped_early == len(seen[-1])
    assert orders[0] == orders[1] == orders[2] and seen[0] == seen[1] == seen[2]


def test_a_good_cell_runs_to_its_end(session: Session, tiny: Path) -> None:
    options: dict[str, Any] = {"length": 128, "windows": 80, "stop": {"above": 2.0, "alpha": 0.5}}
    run(session, **options)
    as_quantized(session, tiny)
    metrics, documents = run(session, **options)
    assert metrics["perplexity"].stopped_early is None and metrics["perplexity"].n == 80


def test_a_smaller_last_batch_counts_by_its_windows() -> None:
    """Two batches of four windows and one of two: their sums against ten windows' limit."""
    gambler = _Gambler(Stop(above=math.exp(0.6)), [[range(4)], [range(8, 10)], [range(4, 6), range(6, 8)]])
    assert gambler.test.n == 3 and gambler.test.limit == pytest.approx(0.6 * 10 / 12)
    ones = {"loss": np.full(5, 1.5), "baseline_loss": np.full(5, 0.5)}
    gambler.hopeless([ones] * 4)
    assert gambler.test.mean == pytest.approx(1.0)
    gambler.hopeless([ones] * 2)
    assert gambler.test.mean == pytest.approx((1.0 + 0.5) / 2)


def test_two_texts_in_one_session_keep_their_own_window_counts(session: Session, tmp_path: Path) -> None:
    """The published loop counts the first text's windows and uses the number for the second."""
    (tmp_path / "short.txt").write_text("word " * 100)  # 500 bytes and two newlines
    short, _ = run(session, text=str(tmp_path / "short.txt"), windows=None)
    long, _ = run(session, windows=90)
    again, _ = run(session, text=str(tmp_path / "short.txt"), windows=None)
    assert [m["perplexity"].n for m in (short, long, again)] == [501 // 64, 90, 501 // 64]


# -- identity and options ---------------------------------------------------------------------------------------------


def identity(**options: Any) -> tuple[str, dict[str, Any]]:
    protocol = Perplexity(**options).protocol("tokenizer", "bfloat16", lambda name, part: "hash")
    return eval_id(protocol), protocol


def test_earlier_evaluations_keep_their_identity() -> None:
    found, protocol = identity(text="wikitext2")
    assert protocol == {
        "evaluator": "perplexity",
        "version": 1,
        "options": {"text": "wikitext2", "length": 2048, "windows": None, "divergence": True},
        "texts": {"wikitext2/evaluation": "hash"},
        "tokenizer": "tokenizer",
        "dtype": "bfloat16",
        "run": "fake",
    }
    assert found == eval_id(protocol)
    others = [
        {"convention": "word"},
        {"stop": {"above": 2.0}},
        {"stop": {"above": 2.0, "alpha": 0.001}},
        {"windows": 9},
    ]
    assert len({found, *(identity(text="wikitext2", **options)[0] for options in others)}) == 5


def test_options_build_the_same_evaluator_again() -> None:
    for options in ({"stop": {"above": 2.0}, "windows": 7}, {"convention": "word", "documents": 3}, {}):
        made = build_evaluator("perplexity", {"text": "wikitext2", **options})
        assert build_evaluator("perplexity", json.loads(json.dumps(made.options()))) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "word", "windows": 3}, "convention word takes `documents`, not `windows`"),
        ({"convention": "word", "stop": {"above": 2.0}}, "no `stop`"),
        ({"documents": 3}, "`documents` needs convention: word"),
        ({"stop": {"above": 2.0}, "divergence": False}, "`stop` compares with the baseline"),
        ({"stop": {"above": 1.0}}, "greater than 1"),
        ({"stop": {"above": 2.0, "alpha": 1.0}}, "less than 1"),
        ({"stop": {"above": 2.0, "beyond": 2.0}}, "beyond"),
        ({"stop": {"alpha": 0.1}}, 'stop: the option "above" is missing'),
        ({"convention": "token"}, "'windows' or 'word'"),
        ({"text": {"hub": "a/b"}}, "keys hub; give"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        build_evaluator("perplexity", {"text": "python-docs", **options})
    assert "\n" not in str(caught.value)


def test_where_a_file_lies_is_no_part_of_the_protocol(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text("text")
    (one, protocol), (other, _) = (identity(text=str(tmp_path / folder / "mine.txt")) for folder in ("a", "b"))
    assert one == other and protocol["texts"] == {"file:mine.txt/evaluation": "hash"}
    assert protocol["options"]["text"] == "file:mine.txt"
    assert Perplexity(text=str(tmp_path / "a" / "mine.txt")).options()["text"] == f"file:{tmp_path}/a/mine.txt"


# -- quantiles --------------------------------------------------------------------------------------------------------


def test_quantiles_of_token_kl(session: Session, tiny: Path) -> None:
    options: dict[str, Any] = {"length": 256, "windows": 60}
    run(session, **options)
    as_quantized(session, tiny)
    for linear in session.loaded.linears(0).values():
        session.loaded.replace_weight(linear, linear.weight + 0.1 * torch.randn_like(linear.weight))
    metrics, documents = run(session, **options)
    median, top = metrics["kl_median"], metrics["kl_p99"]
    assert 0 < median.value < metrics["kl"].value < top.value and median.standard_error is None
    counts = sum(histogram_counts(d.kl_histogram) for d in documents)
    assert counts.sum() == sum(d.tokens for d in documents) == 60 * 255
    for metric, q in ((median, 0.5), (top, 0.99)):
        assert histogram_quantile(counts, q) == pytest.approx(metric.value, rel=0.09)
        assert metric.clusters < 20 or metric.low < metric.value < metric.high
        assert (metric.low is None) == (metric.clusters < 20)


def test_a_negative_kl_is_a_bug(session: Session, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(session)
    as_quantized(session, tiny)
    real = divergence.score
    shift = -1e-3

    def wrong(*args: Any) -> Any:
        out = real(*args)
        return out | {"kl": out["kl"] + shift}

    monkeypatch.setattr(divergence, "score", wrong)
    with pytest.raises(ArithmeticError, match="^perplexity python-docs 64 x40: kl of window 0 is -0.001 nats"):
        run(session)
    shift = -1e-5
    run(session)
    assert "rounding; kept" in session.notes[0] and f"KL of {40 * 63} tokens" in session.notes[0]


# -- drawn windows ----------------------------------------------------------------------------------------------------


def test_few_long_documents_are_counted_and_give_no_interval(session: Session, tmp_path: Path) -> None:
    documents = ["x y " * 40] * 2 + ["z" * 101, "w" * 100, *("short" for _ in range(30))]
    session.data = write_pack(tmp_path, documents, {"path": "allenai/c4", "name": "en"}, "validation")
    metrics, ledger = run(session, text="c4", length=100, windows=None)
    assert metrics["perplexity"].n == 256 and metrics["perplexity"].clusters == 2 == len({d.cluster for d in ledger})
    assert metrics["eligible_documents"].value == 3 and metrics["eligible_documents"].n == 34
    for metric in metrics.values():
        assert metric.low is None and metric.standard_error is None
