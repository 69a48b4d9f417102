"""Job: a YAML file that says what to compare and how to measure it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from qfarm.errors import InvalidInput, JobError, nearest
from qfarm.scheme import Scheme, parse_scheme

MAX_JOB_BYTES = 1_000_000
FORBID = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

ScaleDtype = Literal["float16", "bfloat16", "float32"]
ModelDtype = Literal["bfloat16", "float16", "float32"]


class Calibration(pydantic.BaseModel):
    """Which text a method may look at. GPTQ papers: C4, 128 samples of 2048 tokens."""

    model_config = FORBID
    text: str = "c4"
    samples: int = pydantic.Field(128, ge=1)
    length: int = pydantic.Field(2048, ge=2, description="tokens per sample")


class Resources(pydantic.BaseModel):
    """What one worker takes. On a machine without GPUs say `gpus: 0`."""

    model_config = FORBID
    gpus: float = pydantic.Field(1, ge=0)
    cpus: int = pydantic.Field(1, ge=1)
    workers: int | None = pydantic.Field(None, ge=1, description="at most so many workers; default: all that fit")


class Match(pydantic.BaseModel):
    """A pattern over cells; a field that is absent matches everything."""

    model_config = FORBID
    model: str | None = None
    method: str | None = None
    bits: str | int | None = None
    group_size: int | None = None
    seed: int | None = None


class Include(pydantic.BaseModel):
    """Cells beside the matrix; a field that is absent takes the matrix's values."""

    model_config = FORBID
    models: list[str] | None = None
    methods: list[Any] | None = None
    bits: list[str | int] | None = None
    group_sizes: list[int] | None = None
    seeds: list[int] | None = None


class JobFile(pydantic.BaseModel):
    """The shape of a job file. Unknown keys are errors."""

    model_config = FORBID
    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    models: list[str] = pydantic.Field(min_length=1)
    methods: list[Any] = pydantic.Field(default_factory=list)
    bits: list[str | int] = pydantic.Field(default_factory=list)
    group_sizes: list[int] = pydantic.Field(default_factory=lambda: [-1], min_length=1)
    symmetric: bool | None = None
    scale_dtype: ScaleDtype = "float16"
    dtype: ModelDtype = "bfloat16"
    statistics: Literal["sequential", "independent"] = "sequential"
    calibration: Calibration = Calibration()
    seeds: list[int] = pydantic.Field(default_factory=lambda: [0], min_length=1)
    evaluate: list[Any] = pydantic.Field(min_length=1)
    include: list[Include] = pydantic.Field(default_factory=list)
    exclude: list[Match] = pydantic.Field(default_factory=list)
    resources: Resources = Resources()
    retries: int = pydantic.Field(2, ge=0, le=20)
    store: str = "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One product of axes: the matrix itself or one `include` entry."""

    models: tuple[str, ...]
    recipes: tuple[Any, ...]  # of qfarm.recipe.Recipe
    schemes: tuple[Scheme, ...]
    group_sizes: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A checked job: names resolved, options defaulted."""

    path: str
    file: JobFile
    blocks: tuple[Block, ...]
    exclude: tuple[Match, ...]
    evaluations: tuple[Any, ...]  # of qfarm.evaluate.Evaluator


def load_job(path: str | Path) -> Job:
    """Read and check a job file. Raises JobError with file, key and line."""
    source = Path(path)
    try:
        if source.stat().st_size > MAX_JOB_BYTES:
            raise JobError(f"{path}: larger than {MAX_JOB_BYTES} bytes, which no job file is")
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot read the job file: {getattr(error, 'strerror', None) or error}") from None
    return parse_job(text, str(path))


def parse_job(text: str, path: str) -> Job:
    """Check the text of a job file; `path` is for messages and for the default name."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise JobError(f"{path}: YAML aliases (*name) are not supported in job files")
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise JobError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    where = _Locator(path, tree)
    if not isinstance(data, dict):
        raise JobError(f"{path}: a job is a mapping with the keys {', '.join(JobFile.model_fields)}")
    where.refuse_duplicate_keys()
    data.setdefault("name", Path(path).stem)
    try:
        file = JobFile.model_validate(data)
    except pydantic.ValidationError as error:
        raise JobError(_first_fault(error, where)) from None
    return _resolve(file, path, where)


def _resolve(file: JobFile, path: str, where: _Locator) -> Job:
    from qfarm import evaluate, recipe

    def each(key: tuple[Any, ...], values: list[Any], read: Any) -> tuple[Any, ...]:
        out = []
        for index, value in enumerate(values):
            try:
                out.append(read(value))
            except InvalidInput as error:
                raise JobError(f"{where(*key, index)}: {error}") from None
        return tuple(out)

    def block(key: tuple[Any, ...], part: JobFile | Include, base: Block | None) -> Block:
        recipes = each((*key, "methods"), part.methods or [], recipe.parse_recipe)
        schemes = each((*key, "bits"), part.bits or [], parse_scheme)
        sizes = each((*key, "group_sizes"), part.group_sizes or [], _group_size)
        seeds = tuple(part.seeds or ())
        models = tuple(part.models or ())
        if base is None:
            return Block(models=models, recipes=recipes, schemes=schemes, group_sizes=sizes, seeds=seeds)
        return Block(
            models=models or base.models,
            recipes=recipes or base.recipes,
            schemes=schemes or base.schemes,
            group_sizes=sizes or base.group_sizes,
            seeds=seeds or base.seeds,
        )

    main = block((), file, None)
    if bool(file.methods) != bool(file.bits):
        missing, given = ("bits", "methods") if file.methods else ("methods", "bits")
        raise JobError(f"{path}: {missing}: is empty although {given} is not; nothing would be quantized")
    extra = tuple(block(("include", i), part, main) for i, part in enumerate(file.include))
    evaluations = each(("evaluate",), file.evaluate, evaluate.parse_evaluation)
    for index, match in enumerate(file.exclude):
        if match.bits is not None:
            try:
                parse_scheme(match.bits)
            except InvalidInput as error:
                raise JobError(f"{where('exclude', index, 'bits')}: {error}") from None
    return Job(path=path, file=file, blocks=(main, *extra), exclude=tuple(file.exclude), evaluations=evaluations)


def _group_size(value: int) -> int:
    if value != -1 and value < 2:
        raise InvalidInput(f"group size {value}: use -1 (per channel) or at least 2")
    return value


def _first_fault(error: pydantic.ValidationError, where: _Locator) -> str:
    # A union reports one fault per member; the deepest location says most.
    first = max(error.errors(), key=lambda fault: len(fault["loc"]))
    path = [part for part in first["loc"] if isinstance(part, int) or part in where.keys]
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        owner: Any = JobFile
        for part in first["loc"][:-1]:
            if isinstance(part, str) and part in owner.model_fields:
                owner = {"calibration": Calibration, "resources": Resources, "include": Include, "exclude": Match}[part]
        return f'{where(*path)}: unknown key "{key}"{nearest(key, owner.model_fields)}'
    if first["type"] == "missing":
        return f'{where(*path[:-1])}: the key "{first["loc"][-1]}" is missing'
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where(*path)}: {message}, got {first['input']!r}"


class _Locator:
    """Turns a key path into 'file: line 3: methods[1]'."""

    def __init__(self, path: str, tree: yaml.Node | None) -> None:
        self.path, self.tree = path, tree
        self.keys: set[str] = set()
        self._collect(tree)

    def _collect(self, node: yaml.Node | None) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self.keys.add(str(key.value))
                self._collect(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                self._collect(value)

    def __call__(self, *keys: str | int) -> str:
        node, line, name = self.tree, None, ""
        for key in keys:
            name += f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == key), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                found = (node.value[key], node.value[key])
            node = found[1] if found else None
            line = found[0].start_mark.line + 1 if found else line
        return ": ".join(part for part in (self.path, f"line {line}" if line else "", name) if part)

    def refuse_duplicate_keys(self, node: yaml.Node | None = None, keys: tuple[str | int, ...] = ()) -> None:
        """YAML keeps the last of two equal keys in silence; a job must not."""
        node = self.tree if node is None else node
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    raise JobError(
                        f"{self(*keys, key.value)}: the key stands twice (again in line {key.start_mark.line + 1})"
                    )
                seen.add(key.value)
                self.refuse_duplicate_keys(value, (*keys, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.refuse_duplicate_keys(value, (*keys, index))
