"""Windows: how many there are, which tokens they hold, to which document each prediction belongs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qfarm.errors import DataError
from qfarm.text import Text, load_text
from qfarm.windows import (
    DRAWN_WINDOWS,
    Windows,
    batches,
    calibration_windows,
    evaluation_windows,
    rolling_windows,
)
from tests.test_text import write_pack


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    """One token per byte, no special tokens."""
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def framing(tiny: Path) -> Any:
    """The same with <s> before and </s> after each text."""
    from tokenizers.processors import TemplateProcessing

    made = AutoTokenizer.from_pretrained(tiny)
    frame = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)])
    made.backend_tokenizer.post_processor = frame
    assert made("ab")["input_ids"][0] == 256 and made("ab")["input_ids"][-1] == 257
    return made


def read(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """What each row of token ids says."""
    return ["".join(tokenizer.convert_ids_to_tokens(row)).replace("Ġ", " ") for row in ids.tolist()]


def stream(*documents: str) -> Text:
    return Text(name="stream", stream=True, documents=documents)


def separate(*documents: str) -> Text:
    return Text(name="documents", stream=False, documents=documents)


def letters(count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=count))


def spans(windows: Windows) -> list[list[tuple[int, int]]]:
    """Pieces of each window as (start, stop)."""
    grouped = itertools.groupby(windows.pieces, key=lambda piece: piece.window)
    return [[(piece.start, piece.stop) for piece in pieces] for _, pieces in grouped]


# -- running text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "count"), [(8, 1), (15, 1), (16, 2), (17, 2), (8 * 9 + 7, 9)])
def test_windows_cut_the_stream_and_drop_its_tail(tokenizer: Any, tokens: int, count: int) -> None:
    text = letters(tokens)
    windows = evaluation_windows(stream(text), tokenizer, 8, None)
    assert windows.ids.shape == (count, 8) and windows.ids.dtype == torch.int64
    assert read(tokenizer, windows.ids) == [text[8 * i : 8 * i + 8] for i in range(count)]


def test_two_texts_keep_their_own_counts(tokenizer: Any) -> None:
    counts = [len(evaluation_windows(stream(letters(n)), tokenizer, 4, None).ids) for n in (40, 401)]
    assert counts == [10, 100]


@pytest.mark.parametrize(("limit", "count"), [(None, 10), (1, 1), (3, 3), (10, 10), (99, 10)])
def test_a_limit_takes_the_first_windows(tokenizer: Any, limit: int | None, count: int) -> None:
    text = stream(*(letters(20, i) for i in range(4)))
    everything = evaluation_windows(text, tokenizer, 8, None)
    windows = evaluation_windows(text, tokenizer, 8, limit)
    assert torch.equal(windows.ids, everything.ids[:count])
    assert windows.pieces == tuple(piece for piece in everything.pieces if piece.window < count)


def test_a_text_shorter_than_a_window(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="^stream: 7 tokens, fewer than one window of 8$"):
        evaluation_windows(stream("1234567"), tokenizer, 8, None)
    with pytest.raises(DataError, match="^stream: 0 tokens"):
        evaluation_windows(stream(), tokenizer, 8, None)


def test_pieces_cover_every_prediction_once(tokenizer: Any) -> None:
    length = 16
    text = stream(*(letters(random.Random(i).randint(1, 40), i) for i in range(50)))
    windows = evaluation_windows(text, tokenizer, length, None)
    assert any(len(pieces) > 2 for pieces in spans(windows))
    for pieces in spans(windows):
        assert [position for start, stop in pieces for position in range(start, stop)] == list(range(1, length))
        assert all(start < stop for start, stop in pieces)


def test_a_piece_belongs_to_the_document_of_its_targets(tokenizer: Any) -> None:
    documents = ("aaaaa", "bbbbbbb", "c", "ddddd")
    windows = evaluation_windows(stream(*documents), tokenizer, 4, None)
    assert read(tokenizer, windows.ids) == ["aaaa", "abbb", "bbbb", "cddd"]
    assert spans(windows) == [
        [(1, 4)],
        [(1, 4)],  # position 0 holds the last a, but nothing is predicted there
        [(1, 4)],
        [(1, 4)],
    ]
    clusters = [piece.cluster for piece in windows.pieces]
    assert clusters[1] == clusters[2] and len(set(clusters)) == 3  # c itself is never predicted
    shifted = evaluation_windows(stream(*documents), tokenizer, 6, None)
    assert read(tokenizer, shifted.ids) == ["aaaaab", "bbbbbb", "cddddd"]
    assert spans(shifted) == [[(1, 5), (5, 6)], [(1, 6)], [(1, 6)]]
    assert [piece.cluster for piece in shifted.pieces] == [clusters[0], clusters[1], clusters[1], clusters[3]]


def test_a_window_may_span_many_documents(tokenizer: Any) -> None:
    windows = evaluation_windows(stream("ab", "c", "", "d", "efgh"), tokenizer, 8, None)
    assert spans(windows) == [[(1, 2), (2, 3), (3, 4), (4, 8)]]
    assert len({piece.cluster for piece in windows.pieces}) == 4


def test_equal_documents_are_one_cluster(tokenizer: Any) -> None:
    windows = evaluation_windows(stream("same ", "other", "same "), tokenizer, 5, None)
    assert [piece.cluster for piece in windows.pieces].count(windows.pieces[0].cluster) == 2
    assert windows.pieces[1].cluster != windows.pieces[0].cluster


def test_a_pieces_name_depends_on_what_precedes_it_in_its_window(tokenizer: Any) -> None:
    def last(*documents: str) -> Any:
        return evaluation_windows(stream(*documents), tokenizer, 8, None).pieces[-1]

    assert last("abcd", "efgh") == last("abcd", "efgh")
    assert last("abcd", "efgh").cluster == last("xbcd", "efgh").cluster
    assert last("abcd", "efgh").document != last("xbcd", "efgh").document


def test_letters_of_several_tokens_stay_in_their_document(tokenizer: Any) -> None:
    windows = evaluation_windows(stream("é", "世世"), tokenizer, 8, None)  # 2 and 3 bytes each
    assert spans(windows) == [[(1, 2), (2, 8)]]


def test_special_tokens_belong_to_the_text_beside_them(framing: Any) -> None:
    windows = evaluation_windows(stream("abc", "def"), framing, 4, None)
    assert windows.ids[0, 0] == 256 and windows.ids[1, -1] == 257  # each once, around the whole stream
    assert spans(windows) == [[(1, 4)], [(1, 4)]]
    assert windows.pieces[0].cluster != windows.pieces[1].cluster


def test_digest_is_of_tokens_and_of_windows(tokenizer: Any) -> None:
    text = stream(letters(64))
    digest = evaluation_windows(text, tokenizer, 8, None).digest
    assert digest == evaluation_windows(stream(*text.documents[0]), tokenizer, 8, None).digest
    assert digest != evaluation_windows(stream(letters(64, 1)), tokenizer, 8, None).digest
    # The same tokens read in other windows are another measurement.
    assert digest != evaluation_windows(text, tokenizer, 16, None).digest


def test_wikitext2_windows_split_at_articles(tokenizer: Any, pack: str) -> None:
    text = load_text("wikitext2", "evaluation", pack)
    windows = evaluation_windows(text, tokenizer, 2048, None)
    size = len("".join(text.documents).encode())
    assert len(windows.ids) == size // 2048
    assert len({piece.cluster for piece in windows.pieces}) == 60
    assert len(windows.pieces) == len(windows.ids) + 59  # every article but the first begins inside a window


# -- documents that stand alone ---------------------------------------------------------------------------------------


def reference_draw(
    documents: Sequence[str], tokenizer: Any, length: int, count: int, seed: int
) -> list[tuple[list[int], int]]:
    """What the published scripts draw, with Python's global generator."""
    state = random.getstate()
    random.seed(seed)
    drawn = []
    for _ in range(count):
        while True:
            index = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[index])["input_ids"]
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        drawn.append((ids[start : start + length], index))
    random.setstate(state)
    return drawn


@pytest.fixture(scope="module")
def corpus() -> Text:
    """60 documents, among them ones of exactly a window and ones of a token more."""
    sizes = [random.Random(i).choice((3, 15, 16, 17, 40, 90)) for i in range(60)]
    assert {16, 17} < set(sizes)
    return separate(*(letters(size, i) for i, size in enumerate(sizes)))


def test_drawn_windows_are_those_of_the_published_scripts(tokenizer: Any, corpus: Text) -> None:
    windows = evaluation_windows(corpus, tokenizer, 16, None)
    expected = reference_draw(corpus.documents, tokenizer, 16, DRAWN_WINDOWS, 0)
    assert windows.ids.tolist() == [ids for ids, _ in expected] and len(expected) == 256
    drawn = {index for _, index in expected}
    assert min(len(corpus.documents[index]) for index in drawn) == 17  # 16 would leave no room for a start
    assert [(piece.window, piece.start, piece.stop) for piece in windows.pieces] == [(i, 1, 16) for i in range(256)]
    clusters: dict[str, set[int]] = {}
    for piece, (_, index) in zip(windows.pieces, expected, strict=True):
        clusters.setdefault(piece.cluster, set()).add(index)
    assert all(len(documents) == 1 for documents in clusters.values()) and len(clusters) == len(drawn)


def test_drawing_is_the_same_each_time_and_leaves_other_generators_alone(tokenizer: Any, corpus: Text) -> None:
    random.seed(5)
    before = random.getstate()
    first = evaluation_windows(corpus, tokenizer, 16, None)
    random.random()
    random.seed(6)
    assert evaluation_windows(corpus, tokenizer, 16, None).pieces == first.pieces
    random.seed(5)
    calibration_windows(corpus, tokenizer, 4, 16, 3)
    assert random.getstate() == before
    assert torch.equal(evaluation_windows(corpus, tokenizer, 16, 7).ids, first.ids[:7])


def test_documents_of_exactly_one_window_are_rejected(tokenizer: Any) -> None:
    windows = evaluation_windows(separate("x" * 16, "y" * 17, "z" * 15), tokenizer, 16, 20)
    assert set(read(tokenizer, windows.ids)) == {"y" * 16}


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.calls += 1
        return self.tokenizer(text, **options)


def test_each_document_is_tokenized_once(tokenizer: Any, corpus: Text) -> None:
    counting = Counting(tokenizer)
    evaluation_windows(corpus, counting, 16, None)
    assert counting.calls <= len(corpus.documents)


@pytest.mark.parametrize("documents", [("x" * 16, "y" * 16, "z"), ("", ""), ()], ids=["short", "empty", "none"])
def test_no_document_that_is_long_enough(tokenizer: Any, documents: tuple[str, ...]) -> None:
    counting = Counting(tokenizer)
    for draw in (
        lambda: evaluation_windows(separate(*documents), counting, 16, None),
        lambda: calibration_windows(separate(*documents), counting, 4, 16, 0),
    ):
        with pytest.raises(DataError, match="^documents: no document of more than 16 tokens; use a shorter length$"):
            draw()
    assert counting.calls == 2 * len(documents)


def test_a_single_document_that_is_long_enough_is_found(tokenizer: Any) -> None:
    text = separate(*["short"] * 300, "x" * 17)
    assert read(tokenizer, evaluation_windows(text, tokenizer, 16, 3).ids) == ["x" * 16] * 3


def test_c4_of_the_pack_has_256_windows(tokenizer: Any, pack: str) -> None:
    text = load_text("c4", "evaluation", pack)
    windows = evaluation_windows(text, tokenizer, 2048, None)
    assert windows.ids.shape == (256, 2048)
    assert windows.ids[:8].tolist() == [i for i, _ in reference_draw(text.documents, tokenizer, 2048, 8, 0)]


# -- rolling windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("reach", [1, 2, 8])
def test_rolling_windows_are_lm_evals(tokenizer: Any, length: int, reach: int) -> None:
    """The same tokens read, the same predicted, window by window."""
    utils = pytest.importorskip("lm_eval.utils")
    text = letters(length)
    found = rolling_windows(stream(text), tokenizer, reach, None)
    ids = tokenizer(text)["input_ids"]
    theirs = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(ids, prefix_token=256, max_seq_len=reach, context_len=1)
    ]
    ours = [(row[: p.start].tolist(), row[p.start :].tolist()) for row, p in zip(found.rows, found.pieces, strict=True)]
    assert [predicted for _, predicted in ours] == [continuation for _, continuation in theirs]
    # lm-eval reads the last `reach` tokens before the last predicted one.
    assert [(c + p)[:-1] for c, p in ours] == [(c + p)[-(reach + 1) :][:-1] for c, p in theirs]
    assert all(piece.stop == len(row) for row, piece in zip(found.rows, found.pieces, strict=True))


def test_rolling_windows_measure_each_document_once(tokenizer: Any) -> None:
    text = stream("one two three", "", "vier fünf")
    found = rolling_windows(text, tokenizer, 4, None)
    assert found.documents == 2 and found.sizes == ((3, 13), (0, 0), (0, 0), (0, 0), (2, 10), (0, 0), (0, 0))
    assert sum(p.stop - p.start for p in found.pieces) == 13 + 10  # one token per byte
    assert len({p.cluster for p in found.pieces}) == 2
    assert len(rolling_windows(text, tokenizer, 4, 1).rows) == 4


def test_rolling_windows_need_something_to_start_from(tokenizer: Any, tiny: Path) -> None:
    bare = AutoTokenizer.from_pretrained(tiny, bos_token=None, eos_token=None)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(DataError, match="^stream: the tokenizer has neither BOS nor EOS"):
        rolling_windows(stream("text"), bare, 4, None)
    with pytest.raises(DataError, match="^stream: no tokens to predict$"):
        rolling_windows(stream("", ""), tokenizer, 4, None)


def test_batches_hold_neighbours_of_one_length() -> None:
    rows = [torch.zeros(n, dtype=torch.long) for n in (4, 4, 4, 4, 4, 3, 3, 9, 9)]
    assert [list(batch) for batch in batches(rows, 8)] == [[0, 1], [2, 3], [4], [5, 6], [7], [8]]
    assert [len(batch) for batch in batches(rows[:5], 1)] == [1] * 5


# -- c4-new -----------------------------------------------------------------------------------------------------------


def test_c4_new_reads_1100_documents_and_256_windows(tokenizer: Any, tmp_path: Path) -> None:
    rows = [letters(20, i) for i in range(1200)]
    pack = write_pack(tmp_path, rows, {"path": "allenai/c4", "name": "en"}, "validation")
    whole = tokenizer(" ".join(rows[:1100]))["input_ids"]
    few = evaluation_windows(load_text("c4-new", "evaluation", pack), tokenizer, 16, None)
    assert few.ids.flatten().tolist() == whole[: 256 * 16]
    all_of_it = evaluation_windows(load_text("c4-new", "evaluation", pack), tokenizer, 200, None)
    assert all_of_it.ids.flatten().tolist() == whole[: len(whole) // 200 * 200]
    assert len({piece.cluster for piece in all_of_it.pieces}) >= 1090


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_calibration_starts_are_those_of_the_published_scripts(tokenizer: Any, seed: int) -> None:
    text = stream(*(letters(100, i) for i in range(10)))
    whole = tokenizer("".join(text.documents))["input_ids"]
    state = random.getstate()
    random.seed(seed)
    starts = [random.randint(0, len(whole) - 16 - 1) for _ in range(20)]
    random.setstate(state)
    samples = calibration_windows(text, tokenizer, 20, 16, seed)
    assert samples.dtype == torch.int64
    assert samples.tolist() == [whole[start : start + 16] for start in starts]


def test_calibration_starts_of_seed_0(tokenizer: Any) -> None:
    """Python promises that its generator keeps this sequence: random.seed(0); random.randint(0, 99)."""
    digits = "".join(chr(33 + i) for i in range(94)) + letters(16)  # 110 tokens, of which 94 are all different
    samples = calibration_windows(stream(digits[:110]), tokenizer, 4, 10, 0)
    assert [digits.index(sample) for sample in read(tokenizer, samples)] == [49, 97, 53, 5]


def test_calibration_from_separate_documents(tokenizer: Any, corpus: Text) -> None:
    samples = calibration_windows(corpus, tokenizer, 30, 16, 3)
    assert samples.tolist() == [i for i, _ in reference_draw(corpus.documents, tokenizer, 16, 30, 3)]
    assert not torch.equal(samples, calibration_windows(corpus, tokenizer, 30, 16, 4))


def test_the_shortest_text_to_calibrate_on(tokenizer: Any) -> None:
    text = letters(17)
    assert read(tokenizer, calibration_windows(stream(text), tokenizer, 3, 16, 0)) == [text[:16]] * 3
    with pytest.raises(DataError, match="^stream: 16 calibration tokens, no more than one sample of 16$"):
        calibration_windows(stream(text[:16]), tokenizer, 3, 16, 0)


def test_beginning_of_sequence_stands_once_before_a_stream(framing: Any) -> None:
    samples = calibration_windows(stream(letters(20), letters(20, 1)), framing, 50, 8, 0)
    assert {int(column) for row, column in (samples == 256).nonzero()} == {0}
