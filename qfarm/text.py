"""Text: corpora for calibration and evaluation, and how each is cut into documents.

    wikitext2     Salesforce/wikitext, wikitext-2-raw-v1: rows joined with two newlines and tokenized in one call;
                  calibration reads train, evaluation reads test. Documents are articles.
    c4            allenai/c4, English: first shard of train (calibration) or of validation (evaluation). Each document
                  is tokenized alone; windows are drawn from documents longer than a window.
    python-docs   built in: the language reference that CPython ships as `pydoc_data.topics`. Topics that share text
                  stay on one side of a fixed split into calibration and evaluation.

    c4-new        the first 1100 documents of that validation shard, joined by one space; at most 256 windows
    *.txt, *.jsonl, *.parquet, file:PATH
                  a local file: the column `text`, or plain text whose documents are separated by lines that say
                  <|endoftext|> or else by blank lines
    hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN
                  any data set of the hub
The last two are running text, their documents joined with two newlines; calibration and evaluation read the same.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from qfarm.errors import DataError, nearest
from qfarm.sources import HubSet, file_identity, hub_identity, parse_hub, read_file, read_hub

Part = Literal["calibration", "evaluation"]
# Prefixes of names that stand for a task's items and for the pool of its prompt's examples, not for a text.
TASK_PARTS = ("task:", "examples:")
MIN_SHARED_PARAGRAPH = 120  # characters; shorter paragraphs recur by chance in unrelated topics
MAX_DOCUMENT = 6000  # characters of one evaluation document, so that a few windows already see many documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus. `stream`: the documents follow one another in one running text; otherwise each stands alone."""

    name: str
    stream: bool
    documents: tuple[str, ...]
    most_windows: int | None = None  # of an evaluation, where the text's protocol limits them
    cleaned_documents: tuple[str, ...] | None = None

    @property
    def cleaned(self) -> tuple[str, ...]:
        """The documents as word-level perplexity gives them to the model."""
        return self.documents if self.cleaned_documents is None else self.cleaned_documents


_SPLITS: dict[tuple[str, Part], HubSet] = {
    ("wikitext2", "calibration"): HubSet(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train"),
    ("wikitext2", "evaluation"): HubSet(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test"),
    ("c4", "calibration"): HubSet(
        path="allenai/c4", name="en", split="train", data_file="en/c4-train.00000-of-01024.json.gz"
    ),
    ("c4", "evaluation"): HubSet(
        path="allenai/c4", name="en", split="validation", data_file="en/c4-validation.00000-of-00008.json.gz"
    ),
}
_SPLITS["c4-new", "evaluation"] = _SPLITS["c4", "evaluation"]
NAMES = ("wikitext2", "c4", "c4-new", "python-docs")
FILE_ENDINGS = (".txt", ".jsonl", ".parquet")
NEW_C4_DOCUMENTS = 1100
NEW_C4_WINDOWS = 256


def check_name(name: str) -> str:
    """The name itself if it is a known text, or has the form of a file's or a hub data set's. Raises DataError."""
    if name.startswith("hub:"):
        parse_hub(name)
    elif _path(name) is None and name not in NAMES:
        known = nearest(name, NAMES)
        raise DataError(f'unknown text "{name}"{known}, file:PATH, hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN')
    return name


def reference(value: object) -> object:
    """A text's name from its name or from a mapping: {file: PATH} or {hub: OWNER/NAME, config:, split:, column:}.

    Anything else is left for the caller to refuse. Raises DataError for a mapping of another form.
    """
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"file"}:
        return f"file:{value['file']}"
    if "hub" in value and "split" in value and set(value) <= {"hub", "config", "split", "column"}:
        config = f"/{value['config']}" if value.get("config") else ""
        return f"hub:{value['hub']}{config}:{value['split']}:{value.get('column', 'text')}"
    keys = ", ".join(map(str, value))
    raise DataError(f"text: keys {keys}; give {{file: PATH}} or {{hub: OWNER/NAME, config: C, split: S, column: C}}")


def absolute(name: str) -> str:
    """The name as every process understands it: of a file with its full path. Raises DataError as `check_name`."""
    path = _path(check_name(name))
    return name if path is None else f"file:{path.absolute()}"


def public_name(name: str) -> str:
    """The name without the place: of a file its base name only, so that moving it changes no identity."""
    kind, colon, task = name.partition(":")
    if name.startswith(TASK_PARTS):
        return f"{kind}{colon}{Path(task).name}"
    path = _path(name)
    return name if path is None else f"file:{path.name}"


def _path(name: str) -> Path | None:
    """The local file that a text names, or None."""
    if name.startswith("file:"):
        return Path(name.removeprefix("file:")).expanduser()
    return Path(name).expanduser() if name.endswith(FILE_ENDINGS) and not name.startswith("hub:") else None


def load_text(name: str, part: Part, data: str | None) -> Text:
    """Read a corpus. Raises DataError for an unknown name or a broken file, Unavailable when it cannot be had."""
    check_name(name)
    path = _path(name)
    if path is not None:
        return _running(name, read_file(path))
    if name.startswith("hub:"):
        return _running(name, read_hub(parse_hub(name), data, name))
    if name == "python-docs":
        return Text(name=name, stream=True, documents=_python_docs(part))
    rows = read_hub(_split(name, part), data, name)
    if name == "wikitext2":
        return Text(name=name, stream=True, documents=_articles("\n\n".join(rows)))
    if name == "c4-new":
        first = rows[:NEW_C4_DOCUMENTS]
        joined = tuple(f"{row} " for row in first[:-1]) + tuple(first[-1:])
        return Text(name=name, stream=True, documents=joined, most_windows=NEW_C4_WINDOWS)
    return Text(name=name, stream=False, documents=tuple(rows))


def load_pages(name: str, data: str | None) -> Text:
    """The evaluation part cut into documents as lm-eval does: the same but for wikitext2."""
    if name != "wikitext2":
        return load_text(name, "evaluation", data)
    rows = read_hub(_split(name, "evaluation"), data, name)
    pages = tuple(_pages(rows))
    return Text(name=name, stream=True, documents=pages, cleaned_documents=tuple(map(detokenize, pages)))


def text_hash(name: str, part: Part, data: str | None) -> str:
    """Identity of a corpus or of a task's items, without downloading more than a few megabytes."""
    if name.startswith(TASK_PARTS):
        from qfarm.tasks.source import task_hash

        return task_hash(name, data)
    check_name(name)
    path = _path(name)
    if path is not None:
        if not path.is_file():
            raise DataError(f'text "{name}": no such file')
        _refuse_empty(load_text(name, part, data))
        return file_identity(path)
    if name.startswith("hub:"):
        return hub_identity(parse_hub(name), data, name)
    if name in ("c4", "c4-new"):
        return hub_identity(_split(name, part), data, name)
    digest = hashlib.sha256()
    for document in load_text(name, part, data).documents:
        # Where documents end counts too: it decides which windows share a cluster.
        digest.update(f"{len(document)}:{document}".encode())
    return f"sha256:{digest.hexdigest()}"


def _split(name: str, part: Part) -> HubSet:
    if (name, part) not in _SPLITS:
        raise DataError(f"{name} is an evaluation text; calibrate on {name.removesuffix('-new')}")
    return _SPLITS[name, part]


def _refuse_empty(text: Text) -> None:
    if not text.documents:
        raise DataError(f'text "{text.name}": holds no document')


def _running(name: str, rows: Iterable[str]) -> Text:
    return Text(name=name, stream=True, documents=tuple(f"{row}\n\n" for row in rows if row.strip()))


# -- documents --------------------------------------------------------------------------------------------------------


def _articles(text: str) -> tuple[str, ...]:
    """Cut WikiText's running text before each top-level heading, ' = Title = '.

    A heading is followed by a blank row; lines of formulas such as ' = 1 henry and capacitance C = ' are not.
    """
    heading = r"^ = [^=\n](?:.*[^=\n])? = *(?=\n{4})"
    starts = [match.start() for match in re.finditer(heading, text, flags=re.MULTILINE)]
    if starts and not text[: starts[0]].strip():
        starts[0] = 0  # blank rows before the first article are no article
    edges = sorted({0, *starts, len(text)})
    return tuple(text[a:b] for a, b in itertools.pairwise(edges))


def _pages(rows: Iterable[str]) -> Iterator[str]:
    """WikiText's rows cut into pages as EleutherAI/wikitext_document_level is, which lm-eval reads.

    Its rule takes every line ' = ... = ' for a heading: 62 pages of the test split, where there are 60 articles.
    """
    lines = "".join(row or " \n" for row in rows).split("\n")  # the raw file; a blank line of it holds one space
    page: list[str] = []
    for line in lines:
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "\n".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


# lm-eval's rule for WikiText (tasks/wikitext, version 2), in its order, its ineffective second line included.
_DETOKENIZE: tuple[tuple[str, str, bool], ...] = (
    # pattern, replacement, whether the pattern is a regular expression
    ("s '", "s'", False),
    (r"/' [0-9]/", r"/'[0-9]/", True),
    *((f" @{mark}@ ", mark, False) for mark in "-,."),
    *((f" {mark} ", f"{mark} ", False) for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)", True),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]", True),
    (r"{\s*([^}]*?)\s*}", r"{\1}", True),
    *((rf"{quote}\s*([^{quote}]*?)\s*{quote}", rf"{quote}\1{quote}", True) for quote in ('"', "'")),
    ("= = = =", "====", False),
    ("= = =", "===", False),
    ("= =", "==", False),
    (" \u00b0 ", "\u00b0", False),
    (" \n", "\n", False),
    ("\n ", "\n", False),
    (" N ", " 1 ", False),
    (" 's", "'s", False),
)


def detokenize(page: str) -> str:
    """WikiText as prose: its spaces around punctuation undone."""
    for pattern, replacement, regular in _DETOKENIZE:
        page = re.sub(pattern, replacement, page) if regular else page.replace(pattern, replacement)
    return page


@functools.cache
def _python_docs(part: Part) -> tuple[str, ...]:
    from pydoc_data.topics import topics

    sides: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    sizes = {"calibration": 0, "evaluation": 0}
    # In an order that no topic's content or name decides; each group goes to the side that is shorter so far.
    for group in sorted(_related(topics), key=_digest):
        side: Part = "evaluation" if sizes["evaluation"] <= sizes["calibration"] else "calibration"
        document = "\n\n".join(dict.fromkeys(paragraph for topic in group for paragraph in _paragraphs(topics[topic])))
        kept = document[:MAX_DOCUMENT] if side == "evaluation" else document
        sides[side].append(kept + "\n\n")
        sizes[side] += len(kept)
    return tuple(sides[part])


def _paragraphs(topic: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", topic.strip()) if paragraph.strip()]


def _digest(group: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(group).encode()).hexdigest()


def _related(topics: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """Groups of topics connected by a paragraph that they share: several repeat whole sections of others."""
    holders: dict[str, list[str]] = collections.defaultdict(list)
    for name in sorted(topics):
        for paragraph in set(_paragraphs(topics[name])):
            if len(paragraph) >= MIN_SHARED_PARAGRAPH:
                holders[" ".join(paragraph.split())].append(name)
    neighbours: dict[str, set[str]] = {name: set() for name in topics}
    for names in holders.values():
        for name in names:
            neighbours[name].update(names)
    left = set(topics)
    for name in sorted(topics):
        if name in left:
            group = _reach(name, neighbours)
            left -= group
            yield tuple(sorted(group))


def _reach(start: str, neighbours: dict[str, set[str]]) -> set[str]:
    seen, queue = {start}, [start]
    while queue:
        fresh = neighbours[queue.pop()] - seen
        seen |= fresh
        queue += fresh
    return seen
