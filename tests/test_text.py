"""Texts: where they come from, what their documents are, and what is said when they cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from qfarm.errors import DataError, Unavailable
from qfarm.text import (
    MAX_DOCUMENT,
    MIN_SHARED_PARAGRAPH,
    NAMES,
    Part,
    absolute,
    check_name,
    load_text,
    public_name,
    reference,
    text_hash,
)

WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
C4 = {"path": "allenai/c4", "name": "en"}
# Rows as the hub has them: each ends with a newline, blank rows are empty.
ROWS = [
    *("", " = First = \n", "", " Some text of the first article . \n", "", " = = Section = = \n", ""),
    *(" Text of a section , where x = 3 = y . \n", " = = = Deeper = = = \n", ""),
    *(
        "",
        " = 2 = \n",
        "",
        " The title above has one character . \n",
        " = 1 henry and capacitance C = \n",
        " 1 farad . \n",
    ),
    *("", " = Third = Last = \n", "", " The end . \n"),
]


def write_pack(folder: Path, rows: list[Any], source: dict[str, str], split: str, name: str = "rows.jsonl") -> str:
    """A pack with one split."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({"text": rows}), path)
    else:
        lines = [json.dumps({"text": row, "url": "u"}, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    index(folder, [source | {"splits": {split: name}}])
    return str(folder)


def index(folder: Path, datasets: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "pack.yaml").write_text(yaml.safe_dump({"version": 1, "datasets": datasets}))


def fault(kind: type[Exception], name: str, part: Part, data: str | None) -> str:
    with pytest.raises(kind) as caught:
        load_text(name, part, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- built in ---------------------------------------------------------------------------------------------------------


def paragraphs(part: Part) -> set[str]:
    """Long paragraphs of the built-in text, however they are broken into lines."""
    found = (" ".join(p.split()) for doc in load_text("python-docs", part, None).documents for p in doc.split("\n\n"))
    return {paragraph for paragraph in found if len(paragraph) >= MIN_SHARED_PARAGRAPH}


def test_python_docs_share_no_long_paragraph_between_calibration_and_evaluation() -> None:
    calibration, evaluation = paragraphs("calibration"), paragraphs("evaluation")
    assert len(calibration) > 50 and len(evaluation) > 50
    assert calibration.isdisjoint(evaluation)


@pytest.mark.parametrize("part", get_args(Part))
def test_python_docs_have_several_documents_and_enough_text(part: Part) -> None:
    text = load_text("python-docs", part, None)
    assert text.stream and len(text.documents) >= 10
    assert len(set(text.documents)) == len(text.documents)
    assert sum(map(len, text.documents)) > 50_000
    assert all(document.strip() and document.endswith("\n\n") for document in text.documents)


def test_documents_of_the_evaluation_are_short_enough_to_be_many() -> None:
    assert max(map(len, load_text("python-docs", "evaluation", None).documents)) <= MAX_DOCUMENT + len("\n\n")


def test_python_docs_are_the_same_in_every_process() -> None:
    code = "from qfarm.text import text_hash as h; print(*(h('python-docs', p, None) for p in PARTS))"
    code = code.replace("PARTS", str(get_args(Part)))
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert told == {" ".join(text_hash("python-docs", part, None) for part in get_args(Part))}
    assert len(set(told.pop().split())) == 2


# -- WikiText ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_articles_begin_at_top_level_headings(tmp_path: Path, name: str) -> None:
    pack = write_pack(tmp_path, ROWS, WIKITEXT, "test", name)
    text = load_text("wikitext2", "evaluation", pack)
    assert text.stream and "".join(text.documents) == "\n\n".join(ROWS)
    titles = [document.strip().split("\n")[0].strip() for document in text.documents]
    assert titles == ["= First =", "= 2 =", "= Third = Last ="]
    assert text.documents[0].startswith("\n\n = First = \n") and "1 farad" in text.documents[1]


def test_text_without_headings_is_one_document(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, ["Only this.", "And this."], WIKITEXT, "train")
    assert load_text("wikitext2", "calibration", pack).documents == ("Only this.\n\nAnd this.",)


def test_text_before_the_first_heading_is_a_document_of_its_own(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, ["Preface.\n", *ROWS], WIKITEXT, "test")
    documents = load_text("wikitext2", "evaluation", pack).documents
    assert len(documents) == 4 and documents[0].strip() == "Preface."
    assert "".join(documents) == "\n\n".join(["Preface.\n", *ROWS])


def test_a_text_is_known_by_its_content(tmp_path: Path) -> None:
    a = write_pack(tmp_path / "a", ROWS, WIKITEXT, "test")
    b = write_pack(tmp_path / "b", ROWS, WIKITEXT, "test", "other.parquet")
    c = write_pack(tmp_path / "c", [*ROWS, "more"], WIKITEXT, "test")
    assert text_hash("wikitext2", "evaluation", a) == text_hash("wikitext2", "evaluation", b)
    assert text_hash("wikitext2", "evaluation", a) != text_hash("wikitext2", "evaluation", c)
    documents = load_text("wikitext2", "evaluation", a).documents
    # Where documents end is part of it: it decides which windows share a cluster.
    expected = hashlib.sha256("".join(f"{len(each)}:{each}" for each in documents).encode()).hexdigest()
    assert text_hash("wikitext2", "evaluation", a) == f"sha256:{expected}"


# -- packs ------------------------------------------------------------------------------------------------------------


def test_each_part_reads_its_own_split(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_pack(tmp_path, [f"wikitext {split}"], WIKITEXT, split, f"w-{split}.jsonl")
        write_pack(tmp_path, [f"c4 {split}"], C4, split, f"c-{split}.jsonl")
    splits = ("train", "validation", "test")
    other = {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "splits": {"test": "c-test.jsonl"}}
    index(
        tmp_path,
        [other, *(s | {"splits": {x: f"{k}-{x}.jsonl" for x in splits}} for k, s in (("w", WIKITEXT), ("c", C4)))],
    )
    read = {
        (name, part): load_text(name, part, str(tmp_path)).documents[0] for name in NAMES[:2] for part in get_args(Part)
    }
    assert read == {
        ("wikitext2", "calibration"): "wikitext train",
        ("wikitext2", "evaluation"): "wikitext test",
        ("c4", "calibration"): "c4 train",
        ("c4", "evaluation"): "c4 validation",
    }


def test_documents_of_c4_stand_alone(tmp_path: Path) -> None:
    documents = ["one\n\n = Not a heading = \n\n\n\n\n", "two", "two"]
    text = load_text("c4", "evaluation", write_pack(tmp_path, documents, C4, "validation"))
    assert not text.stream and text.documents == tuple(documents)


def test_line_separators_inside_a_document_do_not_cut_it(tmp_path: Path) -> None:
    documents = ["a\u2028b\u2029c\x85d\x0be", "second"]
    pack = write_pack(tmp_path, documents, C4, "train")
    assert "\u2028" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")  # unescaped, or this tests nothing
    assert load_text("c4", "calibration", pack).documents == tuple(documents)


def test_c4_is_known_by_its_file(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, ["a"], C4, "validation")
    file_hash = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert text_hash("c4", "evaluation", pack) == f"sha256:{file_hash}"


def test_a_pack_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for data in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        message = fault(DataError, "c4", "evaluation", str(data))
        assert message == f"{data}: no data pack (pack.yaml is missing)"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "TypeError"),
        ("[1]", "TypeError"),
        ("{version: 1}", "KeyError: 'datasets'"),
        ("datasets: 5", "TypeError"),
        ("datasets: [{path: allenai/c4, name: en}]", "KeyError: 'splits'"),
        ("datasets: [", "ParserError"),
        ("datasets: \xff", "UnicodeDecodeError"),
    ],
)
def test_a_broken_index(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "pack.yaml").write_bytes(text.encode("latin-1"))
    message = fault(DataError, "c4", "evaluation", str(tmp_path))
    assert message.startswith(f"{tmp_path}/pack.yaml: not a valid index of a data pack ({problem}")


def test_a_pack_that_lacks_a_file(tmp_path: Path) -> None:
    index(tmp_path, [C4 | {"splits": {"validation": "c4/gone.jsonl"}}])
    message = fault(DataError, "c4", "evaluation", str(tmp_path))
    assert message == f"{tmp_path}/pack.yaml: {tmp_path}/c4/gone.jsonl is missing"


def test_a_pack_reads_nothing_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for path in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "link.jsonl"):
        index(pack, [C4 | {"splits": {"validation": path}}])
        assert fault(DataError, "c4", "evaluation", str(pack)).endswith("lies outside the pack")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": "a"}\n{"text": \n', "cannot read its text column: JSONDecodeError"),
        (b'{"body": "a"}\n', "cannot read its text column: KeyError: 'text'"),
        (b"[1, 2]\n", "cannot read its text column: TypeError"),
        (b'{"text": "\xff"}\n', "cannot read its text column: UnicodeDecodeError"),
        (b'{"text": "a"}\n\n{"text": null}\n', "row 1: text is None, not a string"),
        (b'{"text": 5}\n', "row 0: text is 5, not a string"),
    ],
)
def test_rows_that_are_no_text(tmp_path: Path, content: bytes, problem: str) -> None:
    pack = write_pack(tmp_path, [], C4, "validation")
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert fault(DataError, "c4", "evaluation", pack).startswith(f"{tmp_path}/rows.jsonl: {problem}")


def test_parquet_that_is_no_text(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, ["a", None], C4, "validation", "rows.parquet")
    assert fault(DataError, "c4", "evaluation", pack).endswith("row 1: text is None, not a string")
    pyarrow.parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "rows.parquet")
    assert "cannot read its text column: ArrowInvalid: No match" in fault(DataError, "c4", "evaluation", pack)
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    assert "cannot read its text column: Arrow" in fault(DataError, "c4", "evaluation", pack)


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_what_to_do_about_a_missing_text(tmp_path: Path, name: str, pack: bool) -> None:
    if pack:
        index(tmp_path, [])  # a pack that lacks the split is no reason not to ask the hub
    data = str(tmp_path) if pack else None
    message = fault(Unavailable, name, "evaluation", data)
    assert message.startswith(f'text "{name}" (')
    assert (
        "is neither in a data pack nor to be had from the hub (ConnectionError: no network in tests); give a pack with"
        in message
    )
    assert "--data DIR or QFARM_DATA, or use text: python-docs, which is built in" in message
    with pytest.raises(Unavailable, match="python-docs"):
        text_hash(name, "evaluation", data)


C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> dict[str, list[str]]:
        asked.append((path, options))
        return {"text": ["a", "b"]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("qfarm.sources.hub_commit", lambda source, name: "commit")
    assert load_text("wikitext2", "evaluation", None).documents == ("a\n\nb",)
    assert load_text("c4", "calibration", None).documents == ("a", "b")
    assert asked == [
        ("Salesforce/wikitext", {"split": "test", "name": "wikitext-2-raw-v1"}),
        # The shard of the very commit that names the text in a cell's identity.
        ("allenai/c4", {"split": "train", "data_files": {"train": C4_SHARD}, "revision": "commit"}),
    ]


def test_c4_of_the_hub_is_known_by_its_commit_with_or_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: None
) -> None:
    import huggingface_hub

    refs = tmp_path / "datasets--allenai--c4" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("commit\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = text_hash("c4", "calibration", None)
    assert cached == "hub:allenai/c4@commit:en/c4-train.00000-of-01024.json.gz"
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: SimpleNamespace(sha="commit"))
    assert text_hash("c4", "calibration", None) == cached
    assert text_hash("c4", "evaluation", None) == "hub:allenai/c4@commit:en/c4-validation.00000-of-00008.json.gz"


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\nline two\n\n  \nsecond\n", ["one\nline two", "second"]),
        ("a\n\nstill a\n<|endoftext|>\nb\n<|endoftext|>\n", ["a\n\nstill a", "b"]),
        ("says <|endoftext|> inside\n\nb", ["says <|endoftext|> inside", "b"]),
        ("one", ["one"]),
    ],
)
def test_documents_of_a_plain_text(tmp_path: Path, content: str, documents: list[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(content)
    for name in (str(path), f"file:{path}"):
        text = load_text(name, "evaluation", None)
        assert text.stream and text.documents == tuple(f"{document}\n\n" for document in documents)


def test_rows_of_a_file_are_documents(tmp_path: Path) -> None:
    rows = ["a\n\nb", "", "c"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    pyarrow.parquet.write_table(pa.table({"text": rows}), tmp_path / "mine.parquet")
    for name in ("mine.jsonl", "mine.parquet"):
        assert load_text(str(tmp_path / name), "evaluation", None).documents == ("a\n\nb\n\n", "c\n\n")


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    assert text_hash(a, "evaluation", None) == f"sha256:{hashlib.sha256(b'same').hexdigest()}"
    assert text_hash(a, "evaluation", None) == text_hash(b, "calibration", None)
    assert public_name(a) == "file:a.txt" and absolute(a) == f"file:{a}" and public_name("c4") == absolute("c4") == "c4"


def test_a_relative_file_is_found_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("mine.txt") == f"file:{tmp_path}/mine.txt"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(DataError) as caught:
            text_hash(str(tmp_path / name), "evaluation", None)
        return str(caught.value).replace(str(tmp_path), "DIR")

    (tmp_path / "empty.txt").write_text(" \n\n ")
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "folder.txt").mkdir()
    assert refusal("gone.txt") == refusal("folder.txt").replace("folder", "gone") == 'text "DIR/gone.txt": no such file'
    assert refusal("empty.txt") == 'text "DIR/empty.txt": holds no document'
    assert refusal("rows.jsonl") == "DIR/rows.jsonl: cannot read its text column: KeyError: 'text'"


# -- data sets of the hub ---------------------------------------------------------------------------------------------

SET = "hub:org/set/config:test:body"


def test_forms_of_a_hub_data_set() -> None:
    assert reference({"hub": "org/set", "config": "config", "split": "test", "column": "body"}) == SET
    assert reference({"hub": "org/set", "split": "test"}) == "hub:org/set:test:text"
    assert reference({"file": "a.txt"}) == "file:a.txt" and reference("c4") == "c4"
    for wrong in ("hub:set:test:text", "hub:org/set:test", "hub:org/set/a/b:test:text", "hub:"):
        with pytest.raises(DataError, match="is not of the form hub:OWNER/NAME"):
            check_name(wrong)
    with pytest.raises(DataError, match="^text: keys hub, part; give"):
        reference({"hub": "org/set", "part": "test"})


def test_a_hub_data_set_of_a_pack(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    index(tmp_path, [{"path": "org/set", "name": "config", "splits": {"test": "rows.jsonl"}}])
    text = load_text(SET, "evaluation", str(tmp_path))
    assert text.stream and text.documents == ("one\n\n", "two\n\n")
    digest = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert text_hash(SET, "evaluation", str(tmp_path)) == f"sha256:{digest}:body"


class FakeHub:
    """What `datasets` and the hub's client answer about one data set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        self.asked: list[Any] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: SimpleNamespace(sha="commit"))
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def builder(self, path: str, name: str | None, revision: str) -> Any:
        if name != "config":
            raise ValueError(f"BuilderConfig '{name}' not found. Available: ['config']")
        return SimpleNamespace(info=SimpleNamespace(splits={"train": 1, "test": 2}, features={"body": 1, "label": 2}))

    def load(self, path: str, **options: Any) -> Any:
        self.asked.append((path, options))
        return pa_dataset({"body": ["one", "two"]})


def pa_dataset(columns: dict[str, list[str]]) -> Any:
    import datasets

    return datasets.Dataset.from_dict(columns)


def test_a_hub_data_set_is_known_by_its_commit_and_read_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch)
    assert text_hash(SET, "evaluation", None) == "hub:org/set@commit:config:test:body"
    assert load_text(SET, "evaluation", None).documents == ("one\n\n", "two\n\n")
    assert hub.asked == [("org/set", {"split": "test", "name": "config", "revision": "commit"})]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:org/set/config:tests:body", 'no split "tests", did you mean "test"? known: test, train'),
        ("hub:org/set/config:test:text", 'no column "text"; known: body, label'),
        ("hub:org/set/other:test:body", "ValueError: BuilderConfig 'other' not found. Available: ['config']"),
    ],
)
def test_a_hub_data_set_is_checked_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    FakeHub(monkeypatch)
    with pytest.raises(DataError) as caught:
        text_hash(name, "evaluation", None)
    assert str(caught.value) == f"{name}: {message}"


@pytest.mark.usefixtures("offline")
def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(Unavailable, match="^text .hub:org/set/config:test:body. .org/set, config, test. is neither in"):
        text_hash(SET, "evaluation", None)


def test_c4_new_is_for_evaluation(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, ["a", "b"], C4, "validation")
    assert text_hash("c4-new", "evaluation", pack) == text_hash("c4", "evaluation", pack)
    assert load_text("c4-new", "evaluation", pack).documents == ("a ", "b")
    for read in (load_text, text_hash):
        with pytest.raises(DataError, match="^c4-new is an evaluation text; calibrate on c4$"):
            read("c4-new", "calibration", pack)


def test_an_unknown_text() -> None:
    for read in (load_text, text_hash):
        with pytest.raises(
            DataError, match='^unknown text "wiki", did you mean "wikitext2"\\? known: c4, c4-new, python-docs'
        ):
            read("wiki", "evaluation", None)


# -- the real thing ---------------------------------------------------------------------------------------------------


def test_wikitext2_of_the_pack(pack: str) -> None:
    text = load_text("wikitext2", "evaluation", pack)
    assert len(text.documents) == 60  # Merity et al., arXiv 1609.07843, table 1
    assert [" ".join(text.documents[i].split()[:4]) for i in (0, 1, -1)] == [
        *("= Robert Boulter =", "= Du Fu =", "= The Hustler (")
    ]
    assert text_hash("wikitext2", "evaluation", pack) == (
        "sha256:f50a5a217829cb481d7f85177290893bd9438094953e5593ca079c4690694a16"
    )


def test_c4_of_the_pack(pack: str) -> None:
    assert len(load_text("c4", "evaluation", pack).documents) >= 200
    assert len(load_text("c4", "calibration", pack).documents) >= 1000
    assert load_text("c4", "evaluation", pack).documents[0] != load_text("c4", "calibration", pack).documents[0]
