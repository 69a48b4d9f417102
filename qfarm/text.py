"""Text: corpora for calibration and evaluation, from the hub, from a data pack, or built in.

    wikitext2     Salesforce/wikitext, wikitext-2-raw-v1: rows joined with two newlines and tokenized in one call;
                  calibration reads train, evaluation reads test. Documents are articles.
    c4            allenai/c4, English: first shard of train (calibration) or of validation (evaluation). Each document
                  is tokenized alone; windows are drawn from documents longer than a window.
    python-docs   built in: the language reference that CPython ships as `pydoc_data.topics`. Topics that share text
                  stay on one side of a fixed split into calibration and evaluation.

A data pack is a folder whose `pack.yaml` maps hub data sets to local files (`--data DIR` or `QFARM_DATA`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from qfarm import cache
from qfarm.errors import DataError, Unavailable, nearest

Part = Literal["calibration", "evaluation"]
MIN_SHARED_PARAGRAPH = 120  # characters; shorter paragraphs recur by chance in unrelated topics
MAX_DOCUMENT = 6000  # characters of one evaluation document, so that a few windows already see many documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus. `stream`: the documents follow one another in one running text; otherwise each stands alone."""

    name: str
    stream: bool
    documents: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HubSet:
    """A hub data set's split, as the pack's index and `datasets` name it."""

    path: str
    name: str
    split: str
    data_file: str | None = None  # one file of the repository, when the whole split is not wanted


_SPLITS: dict[tuple[str, Part], _HubSet] = {
    ("wikitext2", "calibration"): _HubSet(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train"),
    ("wikitext2", "evaluation"): _HubSet(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test"),
    ("c4", "calibration"): _HubSet(
        path="allenai/c4", name="en", split="train", data_file="en/c4-train.00000-of-01024.json.gz"
    ),
    ("c4", "evaluation"): _HubSet(
        path="allenai/c4", name="en", split="validation", data_file="en/c4-validation.00000-of-00008.json.gz"
    ),
}
NAMES = ("wikitext2", "c4", "python-docs")


def check_name(name: str) -> str:
    """The name itself if it is a known text. Raises DataError."""
    if name not in NAMES:
        raise DataError(f'unknown text "{name}"{nearest(name, NAMES)}')
    return name


def load_text(name: str, part: Part, data: str | None) -> Text:
    """Read a corpus. Raises DataError for an unknown name or a broken pack, Unavailable when it cannot be had."""
    check_name(name)
    if name == "python-docs":
        return Text(name=name, stream=True, documents=_python_docs(part))
    rows = _rows(_SPLITS[name, part], data, name)
    if name == "wikitext2":
        return Text(name=name, stream=True, documents=_articles("\n\n".join(rows)))
    return Text(name=name, stream=False, documents=tuple(rows))


def text_hash(name: str, part: Part, data: str | None) -> str:
    """Identity of a corpus, without downloading more than a few megabytes."""
    check_name(name)
    if name == "c4":
        local = _pack_file(_SPLITS[name, part], data)
        if local is None:
            return _hub_identity(_SPLITS[name, part])
        return f"sha256:{cache.file_hash(local)}"
    digest = hashlib.sha256()
    for document in load_text(name, part, data).documents:
        # Where documents end counts too: it decides which windows share a cluster.
        digest.update(f"{len(document)}:{document}".encode())
    return f"sha256:{digest.hexdigest()}"


# -- data packs and the hub -------------------------------------------------------------------------------------------


def _rows(source: _HubSet, data: str | None, name: str) -> list[str]:
    local = _pack_file(source, data)
    if local is not None:
        return _read_rows(local)
    try:
        import datasets

        options: dict[str, Any] = {"split": source.split}
        if source.data_file:
            options["data_files"] = {source.split: source.data_file}
            options["revision"] = _hub_commit(source)
        else:
            options["name"] = source.name
        return list(datasets.load_dataset(source.path, **options)["text"])
    except Unavailable:
        raise
    except Exception as error:  # datasets raises the errors of several HTTP and file layers
        raise Unavailable(missing(source, name, error)) from error


def missing(source: _HubSet, name: str, error: Exception) -> str:
    return (
        f'text "{name}" ({source.path}, {source.name}, {source.split}) is neither in a data pack nor to be had from '
        f"the hub ({_in_short(error)}); give a pack with --data DIR or QFARM_DATA, or use text: python-docs, which is "
        "built in"
    )


def _pack_file(source: _HubSet, data: str | None) -> Path | None:
    """The pack's file for a split, or None when there is no pack or the pack lacks it."""
    if data is None:
        return None
    folder = Path(data)
    index = folder / "pack.yaml"
    try:
        entries = yaml.safe_load(index.read_text(encoding="utf-8"))["datasets"]
        for entry in entries:
            if entry["path"] == source.path and entry["name"] == source.name and source.split in entry["splits"]:
                path = folder / str(entry["splits"][source.split])
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise DataError(f"{index}: {path} lies outside the pack")
                if not path.is_file():
                    raise DataError(f"{index}: {path} is missing")
                return path
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{data}: no data pack (pack.yaml is missing)") from None
    except OSError as error:
        raise DataError(f"{index}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index}: not a valid index of a data pack ({_in_short(error)})") from None
    return None


def _in_short(error: Exception) -> str:
    """Kind and message of a foreign error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _read_rows(path: Path) -> list[str]:
    """The `text` column of a Parquet or JSON-lines file."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows: list[Any] = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
        else:
            # Lines end with \n only: str.splitlines would also cut at the separators that JSON leaves unescaped.
            lines = path.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line)["text"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot read its text column: {_in_short(error)}") from None
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise DataError(f"{path}: row {index}: text is {row!r}, not a string")
    return rows


def _hub_identity(source: _HubSet) -> str:
    return f"hub:{source.path}@{_hub_commit(source)}:{source.data_file}"


def _hub_commit(source: _HubSet) -> str:
    """Commit of the hub's data set, or of the cached copy when the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.path).sha)
    except Exception as error:  # the client raises its HTTP library's errors too
        folder = Path(HF_HUB_CACHE) / f"datasets--{source.path.replace('/', '--')}"
        cached = folder / "refs" / "main"
        if not cached.is_file():
            raise Unavailable(missing(source, "c4", error)) from error
        return cached.read_text().strip()


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
