"""Registry: what a task's name stands for, read from lm-eval's YAML files without importing lm-eval.

Importing lm-eval and letting it index its 14,000 files takes some twenty seconds; planning a job needs only a name's
file. So the files are scanned for the keys that name them, and the few that a job asks for are read in full.

A name is one of ours (`csqa`), a task, a group or a tag of lm-eval, or the path of a task's YAML file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from qfarm import cache
from qfarm.errors import DataError, InvalidInput
from qfarm.matrix import canonical_hash

INDEX = "tasks"  # cache folder of the index of lm-eval's files
CSQA = ("boolq", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
SHOWN_NAMES = ("csqa", "mmlu", "gsm8k", "truthfulqa", "bbh")  # of 14,000, what an error message can list


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One task: lm-eval's configuration, functions as 'file.py:name'."""

    name: str
    path: str  # its YAML file
    config: Mapping[str, Any]  # includes merged, overrides of its group applied
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those overrides alone

    @property
    def digest(self) -> str:
        """Hash of everything in the configuration that can change a result, functions' source files included."""
        kept = {key: value for key, value in self.config.items() if key not in ("tag", "task_alias", "group")}
        return canonical_hash(json.loads(json.dumps(kept, default=_function_identity)))

    @property
    def version(self) -> str:
        metadata = self.config.get("metadata")
        return str(metadata.get("version", "none")) if isinstance(metadata, Mapping) else "none"

    @property
    def evaluated(self) -> str:
        """The split whose items are asked: test if the task has one, else validation, as in lm-eval."""
        split = self.config.get("test_split") or self.config.get("validation_split")
        if not split:
            raise DataError(f"task {self.name}: neither test_split nor validation_split is set in {self.path}")
        return str(split)

    def few_shot(self, asked: int | None) -> int:
        """Examples in the prompt: what was asked for, else the task's own number. Raises InvalidInput."""
        own = self.config.get("num_fewshot")
        if asked is not None and own == 0 and asked != 0:
            raise InvalidInput(f"task {self.name} fixes its prompt (num_fewshot: 0); leave few_shot: out")
        return int((own or 0) if asked is None else asked)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that a YAML file names with !function, not imported."""

    path: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregate:
    """A group's figure: the mean of a metric over tasks."""

    name: str
    tasks: tuple[str, ...]
    metric: str
    filters: tuple[str, ...] | None  # None: every filter that the tasks have
    weight_by_size: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What one name of a job stands for."""

    name: str
    leaves: tuple[Leaf, ...]
    aggregates: tuple[Aggregate, ...]  # the entry's own group first, then the groups in it


def version() -> str:
    """The installed lm-eval's version. Raises InvalidInput when there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise InvalidInput("tasks need lm-eval, which is not installed: pip install 'lm_eval>=0.4.13'") from None


def is_file(name: str) -> bool:
    """Whether a name is meant as a task's file."""
    return name.endswith((".yaml", ".yml")) or os.sep in name


def find(name: str) -> Entry:
    """What a name stands for. Raises InvalidInput for names that nobody knows, DataError for broken files."""
    if not is_file(name):
        return _find_known(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"task file {name} does not exist")
    config = read_yaml(path)
    return _entry(str(config.get("group") or config.get("task") or path.stem), str(path))


@functools.lru_cache(maxsize=64)
def _find_known(name: str) -> Entry:
    if name == "csqa":
        leaves = tuple(leaf for task in CSQA for leaf in find(task).leaves)
        mean = Aggregate(name="csqa", tasks=CSQA, metric="acc", filters=None, weight_by_size=False)
        return Entry(name=name, leaves=leaves, aggregates=(mean,))
    index = _index()
    if name in index["files"]:
        return _entry(name, index["files"][name])
    if name in index["tags"]:
        members = [_leaf(task, index["files"][task], {}) for task in sorted(index["tags"][name])]
        return Entry(name=name, leaves=tuple(members), aggregates=())
    raise InvalidInput(f'unknown task "{name}"{_nearest(name, index)}')


def _nearest(name: str, index: Mapping[str, Any]) -> str:
    import difflib

    known = [*SHOWN_NAMES, *CSQA, *index["files"], *index["tags"]]
    match = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f', did you mean "{match[0]}"?' if match else ";"
    return f"{hint} known: {', '.join(SHOWN_NAMES)}, every task of lm-eval {version()}, or a task's YAML file"


# -- groups and leaves ------------------------------------------------------------------------------------------------


def _entry(name: str, path: str) -> Entry:
    config = read_yaml(Path(path))
    if "group" not in config:
        return Entry(name=name, leaves=(_leaf(str(config.get("task", name)), path, {}),), aggregates=())
    leaves, aggregates = _group(config, {}, path)
    return Entry(name=name, leaves=tuple({leaf.name: leaf for leaf in leaves}.values()), aggregates=aggregates)


def _group(
    config: Mapping[str, Any], overrides: Mapping[str, Any], path: str
) -> tuple[list[Leaf], tuple[Aggregate, ...]]:
    structure = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include")
    passed_on = {**{key: value for key, value in config.items() if key not in structure}, **overrides}
    leaves: list[Leaf] = []
    inner: list[Aggregate] = []
    for item in config.get("task") or ():
        found, aggregates = _member(item, passed_on, path)
        leaves += found
        inner += aggregates
    names = tuple(dict.fromkeys(leaf.name for leaf in leaves))
    own = [_aggregate(str(config["group"]), names, mean) for mean in _as_list(config.get("aggregate_metric_list"))]
    return leaves, (*own, *inner)


def _member(item: Any, overrides: Mapping[str, Any], path: str) -> tuple[list[Leaf], tuple[Aggregate, ...]]:
    """A member of a group: a name, a name with overrides, or a group written in place."""
    index = _index()
    given = dict(item) if isinstance(item, Mapping) else {"task": item}
    if "group" in given and given["group"] not in index["files"]:
        return _group(given, overrides, path)
    name = given.pop("group") if "group" in given else given.pop("task", None)
    merged = {**overrides, **given}
    if name in index["files"]:
        config = read_yaml(Path(index["files"][name]))
        if "group" in config:
            return _group(config, merged, index["files"][name])
        return [_leaf(str(name), index["files"][name], merged)], ()
    if name in index["tags"]:
        return [_leaf(task, index["files"][task], merged) for task in sorted(index["tags"][name])], ()
    raise DataError(f"{path}: the group's member {name!r} is no task, group or tag of lm-eval {version()}")


def _leaf(name: str, path: str, overrides: Mapping[str, Any]) -> Leaf:
    config = {**read_yaml(Path(path)), **overrides}
    if "class" in config:
        raise InvalidInput(f"task {name} is a Python class of lm-eval; only tasks written as YAML are supported")
    for key in ("unsafe_code", "doc_to_image", "doc_to_audio"):
        if config.get(key):
            raise InvalidInput(f"task {name} sets {key}; tasks that run code or read media are not supported")
    return Leaf(name=name, path=path, config=config, overrides=overrides)


def _aggregate(name: str, tasks: tuple[str, ...], mean: Mapping[str, Any]) -> Aggregate:
    filters = mean.get("filter_list")
    return Aggregate(
        name=name,
        tasks=tasks,
        metric=str(mean["metric"]),
        filters=None if filters is None else tuple(_as_list(filters)),
        weight_by_size=bool(mean.get("weight_by_size", True)),
    )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


# -- files ------------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """A task's YAML file with its includes merged, local keys first; functions stay names. Raises DataError."""
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader(path.parent))  # noqa: S506  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not a readable task file: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: a task file is a mapping with keys such as task, dataset_path and doc_to_text")
    merged: dict[str, Any] = {}
    for include in _as_list(config.pop("include", None)):
        merged |= {key: value for key, value in read_yaml(path.parent / include).items() if key != "task_list"}
    return merged | config


def _loader(folder: Path) -> type[yaml.SafeLoader]:
    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Function:
        module, _, name = str(loader.construct_scalar(node)).rpartition(".")
        return Function(str(folder / f"{module.replace('.', '/')}.py"), name)

    Loader.add_constructor("!function", function)
    return Loader


def _function_identity(value: object) -> str:
    if isinstance(value, Function):
        source = Path(value.path)
        # A function of an installed module is pinned by lm-eval's version and by its name.
        return f"{cache.file_hash(source) if source.is_file() else value.path}:{value.name}"
    return str(value)


@functools.cache
def _index() -> dict[str, Any]:
    """{files: name -> YAML file, tags: name -> tasks} of the installed lm-eval, remembered in the cache."""
    release = version()
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent / "tasks"
    name = f"{canonical_hash([release, str(root)])}.json"
    known = cache.find_file(INDEX, name)
    if known is not None:
        found: dict[str, Any] = json.loads(known.read_text())
        return found
    made = _scan(root)
    cache.publish_file(INDEX, name, lambda part: _write(part, made))
    return made


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


# A top-level key with a scalar, or with the block list below it.
_KEY = re.compile(r'^["\']?(task|group|tag|include)["\']?[ \t]*:[ \t]*(.*(?:\n[ \t]*- .*)*)', re.MULTILINE)


def _scan(root: Path) -> dict[str, Any]:
    heads: dict[str, dict[str, str]] = {}
    for path in _yaml_files(root):
        heads[path] = dict(_KEY.findall(Path(path).read_text(encoding="utf-8", errors="replace")))
    files: dict[str, str] = {}
    tags: dict[str, list[str]] = {}
    for path, head in heads.items():
        if not path.endswith(".yaml"):
            continue  # templates
        name = head.get("group") or head.get("task", "")
        if not name or "\n" in name or name.lstrip().startswith("["):
            continue
        files.setdefault(_words(name)[0], path)
        if "group" not in head:
            for tag in _words(_inherited(heads, path, "tag")):
                tags.setdefault(tag, []).append(_words(name)[0])
    return {"files": files, "tags": {tag: names for tag, names in tags.items() if tag not in files}}


def _yaml_files(root: Path) -> Iterator[str]:
    for folder, _, names in sorted(os.walk(root)):
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith("yaml"))


def _inherited(heads: Mapping[str, Mapping[str, str]], path: str, key: str) -> str:
    """The key's text in a file, or in the file that it includes."""
    for _ in range(8):  # includes of includes
        head = heads.get(path, {})
        if key in head or "include" not in head:
            return head.get(key, "")
        path = os.path.normpath(os.path.join(os.path.dirname(path), (_words(head["include"]) or [""])[0]))
    return ""


def _words(text: str) -> list[str]:
    """Scalars of 'a', '[a, b]' or a block list."""
    bare = re.sub(r"(^|\s)#.*", "", text).strip().strip("[]")
    return [word.strip().strip("\"'") for word in re.split(r"\n\s*- |,|^- ", bare) if word.strip().strip("\"'")]
