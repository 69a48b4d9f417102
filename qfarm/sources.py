"""Sources: where a text's rows come from, a data pack, the hub, or a local file, and what identifies them.

A data pack is a folder whose `pack.yaml` maps hub data sets to local files (`--data DIR` or `QFARM_DATA`); it is asked
first. A file is known by its content, a data set of the hub by its commit.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from qfarm import cache
from qfarm.errors import DataError, Unavailable, nearest

ENDING = "<|endoftext|>"  # a line of this separates the documents of a .txt file that has one


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSet:
    """A hub data set's split, as the pack's index and `datasets` name it."""

    path: str
    name: str | None  # configuration
    split: str
    column: str = "text"
    data_file: str | None = None  # one file of the repository, when the whole split is not wanted

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.path, self.name, self.split)))


def parse_hub(reference: str) -> HubSet:
    """Read 'hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN'. Raises DataError."""
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?:([\w.-]+):([^:]+)", reference)
    if match is None:
        raise DataError(f'"{reference}" is not of the form hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN')
    path, name, split, column = match.groups()
    return HubSet(path=path, name=name, split=split, column=column)


def read_hub(source: HubSet, data: str | None, name: str) -> list[str]:
    """The text column of a split, from the pack or else from the hub.

    Raises DataError for a broken pack or an unknown column, Unavailable when the split cannot be had.
    """
    local = pack_file(source, data)
    if local is not None:
        return read_file(local, source.column)
    try:
        import datasets

        options: dict[str, Any] = {"split": source.split}
        if source.data_file:
            options["data_files"] = {source.split: source.data_file}
        elif source.name:
            options["name"] = source.name
        if source.data_file or name.startswith("hub:"):
            options["revision"] = hub_commit(source, name)
        found = datasets.load_dataset(source.path, **options)
        columns = getattr(found, "column_names", [source.column])
    except Unavailable:
        raise
    except Exception as error:  # datasets raises the errors of several HTTP and file layers
        raise Unavailable(missing(source, name, error)) from error
    if source.column not in columns:
        raise DataError(f'{name}: no column "{source.column}"{nearest(source.column, columns)}')
    return _strings(list(found[source.column]), name, source.column)


def missing(source: HubSet, name: str, error: Exception) -> str:
    return (
        f'text "{name}" ({source}) is neither in a data pack nor to be had from the hub ({in_short(error)}); give a '
        "pack with --data DIR or QFARM_DATA, or use text: python-docs, which is built in"
    )


def in_short(error: Exception) -> str:
    """Kind and message of a foreign error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# -- data packs -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackSet:
    """One entry of a pack's index."""

    folder: Path
    path: str
    name: str | None  # configuration; '*': one file for all, of which `filter` picks the rows
    filter: str | None  # column that must equal the configuration's name
    splits: Mapping[str, str]  # split -> file, relative to the folder

    def file(self, split: str) -> Path:
        """Raises DataError for a file that is missing or outside the pack, KeyError for a split that is not there."""
        path, index = self.folder / str(self.splits[split]), self.folder / "pack.yaml"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"{index}: {path} lies outside the pack")
        if not path.is_file():
            raise DataError(f"{index}: {path} is missing")
        return path


def pack_sets(data: str | None) -> list[PackSet]:
    """What a pack holds; nothing without a pack. Raises DataError for a broken index."""
    if data is None:
        return []
    folder = Path(data)
    index = folder / "pack.yaml"
    try:
        return [
            PackSet(
                folder=folder,
                path=entry["path"],
                name=entry["name"],
                filter=entry.get("filter"),
                splits=dict(entry["splits"]),
            )
            for entry in yaml.safe_load(index.read_text(encoding="utf-8"))["datasets"]
        ]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{data}: no data pack (pack.yaml is missing)") from None
    except OSError as error:
        raise DataError(f"{index}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index}: not a valid index of a data pack ({in_short(error)})") from None


def pack_file(source: HubSet, data: str | None) -> Path | None:
    """The pack's file for a split, or None when there is no pack or the pack lacks it."""
    for entry in pack_sets(data):
        if entry.path == source.path and entry.name == source.name and source.split in entry.splits:
            return entry.file(source.split)
    return None


# -- files ------------------------------------------------------------------------------------------------------------


def read_file(path: Path, column: str = "text") -> list[str]:
    """A column of a Parquet or JSON-lines file, or the documents of a plain text. Raises DataError."""
    try:
        if path.suffix == ".txt":
            return _plain_documents(path.read_text(encoding="utf-8"))
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows: list[Any] = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
        else:
            # Lines end with \n only: str.splitlines would also cut at the separators that JSON leaves unescaped.
            lines = path.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line)[column] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot read its {column} column: {in_short(error)}") from None
    return _strings(rows, str(path), column)


def _plain_documents(text: str) -> list[str]:
    """Separated by lines that say ENDING where there are any, else by blank lines."""
    marked = re.search(rf"^\s*{re.escape(ENDING)}\s*$", text, flags=re.MULTILINE)
    parts = re.split(rf"\s*{re.escape(ENDING)}\s*" if marked else r"\n[ \t\r]*\n\s*", text)
    return [part.strip("\n") for part in parts if part.strip()]


def _strings(rows: Iterable[Any], where: str, column: str) -> list[str]:
    checked = list(rows)
    for index, row in enumerate(checked):
        if not isinstance(row, str):
            raise DataError(f"{where}: row {index}: {column} is {row!r}, not a string")
    return checked


# -- identity ---------------------------------------------------------------------------------------------------------


def hub_identity(source: HubSet, data: str | None, name: str) -> str:
    """Of a split: its pack's file by content, else the hub's commit. Raises DataError, Unavailable."""
    local = pack_file(source, data)
    if local is not None:
        return file_identity(local, source.column)
    commit = hub_commit(source, name)
    if source.data_file:
        return f"hub:{source.path}@{commit}:{source.data_file}"
    _refuse_unknown(source, commit, name)
    return f"hub:{source.path}@{commit}:{source.name or ''}:{source.split}:{source.column}"


def file_identity(path: Path, column: str = "text") -> str:
    """Raises DataError when the file cannot be read."""
    try:
        return f"sha256:{cache.file_hash(path)}" + (f":{column}" if column != "text" else "")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def hub_commit(source: HubSet, name: str) -> str:
    """Commit of the hub's data set, or of the cached copy when the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.path).sha)
    except Exception as error:  # the client raises its HTTP library's errors too
        folder = Path(HF_HUB_CACHE) / f"datasets--{source.path.replace('/', '--')}"
        cached = folder / "refs" / "main"
        if not cached.is_file():
            raise Unavailable(missing(source, name, error)) from error
        return cached.read_text().strip()


def _refuse_unknown(source: HubSet, commit: str, name: str) -> None:
    """What the data set's own description says about splits and columns; many describe neither, and pass."""
    import datasets

    try:
        info = datasets.load_dataset_builder(source.path, source.name, revision=commit).info
    except ValueError as error:  # 'BuilderConfig x not found. Available: [...]'
        raise DataError(f"{name}: {in_short(error)}") from None
    except Exception as error:  # the errors of several HTTP and file layers
        raise Unavailable(missing(source, name, error)) from error
    for what, given, known in (("split", source.split, info.splits), ("column", source.column, info.features)):
        if known and given not in known:
            raise DataError(f'{name}: no {what} "{given}"{nearest(given, known)}')
