"""Source: where a task's items and its prompt's examples come from, and what identifies them.

A data pack comes first, then files that the task itself names, then the hub at its present commit. The split that is
evaluated is never exchanged for another; examples come from the first split there is of: the task's own choice, train,
validation, test, and the protocol says which.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qfarm import cache
from qfarm.errors import DataError, Unavailable
from qfarm.matrix import canonical_hash
from qfarm.sources import PackSet, pack_sets
from qfarm.tasks import registry
from qfarm.tasks.registry import Leaf

FILE_FORMATS = ("json", "parquet", "csv", "text", "arrow")  # `dataset_path`s that read the task's own data_files
SPLIT_KEYS = ("training_split", "validation_split", "test_split")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One task's data."""

    leaf: Leaf
    evaluated: str  # split
    examples: str | None  # split; None: the task brings its examples itself, or there are none
    pack: PackSet | None = None
    files: Mapping[str, Path] | None = None  # the task's own, by split
    commit: str | None = None  # of the hub's data set

    def split_hash(self, split: str) -> str:
        """Identity of one split's content."""
        if self.pack is not None:
            chosen = f"{self.pack.filter}={self.leaf.config.get('dataset_name')}" if self.pack.filter else ""
            return f"{cache.file_hash(self.pack.file(split))}{chosen}"
        if self.files is not None:
            return cache.file_hash(self.files[split])
        return f"{self.leaf.config.get('dataset_path')}@{self.commit}:{self.leaf.config.get('dataset_name')}:{split}"

    def has(self, split: str | None) -> bool:
        """Whether the split can be read; the hub is taken at the task's word."""
        if split is None:
            return False
        known = self.pack.splits if self.pack is not None else self.files
        return known is None or split in known

    def overrides(self) -> dict[str, Any]:
        """Changes to the task's configuration, so that lm-eval reads this source and nothing else."""
        config = self.leaf.config
        changes: dict[str, Any] = {
            key: config[key] if self.has(config.get(key)) else None for key in SPLIT_KEYS if config.get(key)
        }
        # lm-eval keeps an item out of its own examples only where fewshot_split equals test_split.
        examples = config.get("test_split") if self.examples == self.evaluated else self.examples
        changes["fewshot_split"] = examples
        if isinstance(own := config.get("fewshot_config"), Mapping) and own.get("split"):
            changes["fewshot_config"] = {**own, "split": examples}
        if self.pack is not None:
            changes["custom_dataset"] = functools.partial(_read_pack, self)
        elif self.files is not None:
            changes["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": _as_text(self.files)}
        elif self.commit is not None:
            changes["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "revision": self.commit}
        return changes


def find_source(leaf: Leaf, data: str | None) -> Source:
    """Where a task's data is. Raises DataError for broken files, Unavailable when it is nowhere to be had."""
    path, evaluated = leaf.config.get("dataset_path"), leaf.evaluated
    found = Source(leaf=leaf, evaluated=evaluated, examples=None)
    pack = _in_pack(leaf, data)
    if pack is not None and evaluated in pack.splits:
        found = dataclasses.replace(found, pack=pack)
    elif path in FILE_FORMATS:
        found = dataclasses.replace(found, files=_own_files(leaf))
    elif path is not None and not leaf.config.get("custom_dataset"):
        found = dataclasses.replace(found, commit=_hub_commit(leaf, data, pack))
    if not found.has(evaluated):
        raise DataError(f"task {leaf.name}: {leaf.path} names no data file for its split {evaluated}")
    return dataclasses.replace(found, examples=_examples(found))


def task_hash(name: str, data: str | None) -> str:
    """Identity of a task's items ('task:NAME') or of the pool of its examples ('examples:NAME'), with their splits."""
    kind, _, task = name.partition(":")
    sources = [find_source(leaf, data) for leaf in registry.find(task).leaves]
    if kind == "examples":
        pools = [(source, source.examples) for source in sources if source.examples is not None]
        digest = canonical_hash([[source.leaf.name, source.split_hash(split)] for source, split in pools if split])
        return f"{_list(split for _, split in pools)}, {digest}"
    digest = canonical_hash([[s.leaf.name, s.leaf.digest, s.split_hash(s.evaluated)] for s in sources])
    versions = _list(source.leaf.version for source in sources)
    return f"lm_eval {registry.version()}, version {versions}, {_list(s.evaluated for s in sources)}, {digest}"


def _list(values: Any) -> str:
    return " and ".join(sorted({str(value) for value in values}))


def _examples(source: Source) -> str | None:
    config = source.leaf.config
    own = config.get("fewshot_config") if isinstance(config.get("fewshot_config"), Mapping) else {}
    chosen = (own or {}).get("split") or config.get("fewshot_split")
    if not chosen and (own or {}).get("samples") is not None:
        return None
    wanted = (chosen, *(config.get(key) for key in SPLIT_KEYS))
    return next((str(split) for split in wanted if source.has(split)), None)


# -- packs and files --------------------------------------------------------------------------------------------------


def _in_pack(leaf: Leaf, data: str | None) -> PackSet | None:
    path, name = leaf.config.get("dataset_path"), leaf.config.get("dataset_name")
    for entry in pack_sets(data):
        if entry.path == path and (entry.name == name or entry.name == "*"):
            return entry
    return None


def _read_pack(source: Source, **_: object) -> dict[str, Any]:
    """The splits of a pack that a task uses, as lm-eval's `custom_dataset` gives them."""
    config, pack = source.leaf.config, source.pack
    assert pack is not None
    used = {source.evaluated, source.examples, *(config.get(key) for key in SPLIT_KEYS)}
    return {
        split: _read(pack.file(split), pack.filter, config.get("dataset_name"))
        for split in sorted(pack.splits)
        if split in used
    }


@functools.lru_cache(maxsize=8)  # one file holds many of MMLU's subjects
def _table(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


def _read(path: Path, column: str | None, value: Any) -> Any:
    """One split as a `datasets.Dataset`, in the file's order."""
    import json

    import datasets

    try:
        if path.suffix == ".parquet":
            table = _table(path)
            if column:
                import pyarrow.compute

                table = table.filter(pyarrow.compute.equal(table[column], value))
            rows = table.to_pylist()
        else:
            lines = path.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            rows = [row for row in rows if not column or row[column] == value]
        if not rows:
            raise DataError(f"{path}: no rows{f' with {column} = {value}' if column else ''}")
        return datasets.Dataset.from_list(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable as a task's items: {' '.join(str(error).split())[:200]}") from None


def _own_files(leaf: Leaf) -> dict[str, Path]:
    """The task's data_files by split; relative names start from its YAML file. Raises DataError for missing files."""
    given = (leaf.config.get("dataset_kwargs") or {}).get("data_files")
    named = given if isinstance(given, Mapping) else {"train": given}  # as `datasets` calls a lone file
    files = {}
    for split, name in named.items():
        path = Path(leaf.path).resolve().parent / str(name)
        if not isinstance(name, str) or not path.is_file():
            raise DataError(f"task {leaf.name}: {leaf.path}: data_files: {split}: {name!r} is no file here")
        files[str(split)] = path
    return files


def _as_text(files: Mapping[str, Path]) -> dict[str, str]:
    return {split: str(path) for split, path in files.items()}


# -- the hub ----------------------------------------------------------------------------------------------------------


def _hub_commit(leaf: Leaf, data: str | None, pack: PackSet | None) -> str:
    """Commit of the hub's data set, or of the cached copy when the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    path = str(leaf.config["dataset_path"])
    try:
        return str(huggingface_hub.HfApi().dataset_info(path).sha)
    except Exception as error:  # the client raises its HTTP library's errors too
        cached = Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "refs" / "main"
        if cached.is_file():
            return cached.read_text().strip()
        if data is None:
            where = "give a data pack that holds it (--data DIR or QFARM_DATA)"
        else:
            lacks = f"holds only its {_list(pack.splits)} split" if pack else "does not hold it"
            where = f"the data pack {data} {lacks}; add it there"
        name = f"{path}, {leaf.config.get('dataset_name') or 'default'}, {leaf.evaluated}"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:150]
        raise Unavailable(
            f"task {leaf.name} ({name}): {where}, or run where the hub can be reached ({reason})"
        ) from error
