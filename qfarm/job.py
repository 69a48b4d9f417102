"""Job: a YAML file that says what to compare and how to measure it."""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic_core import PydanticCustomError

from qfarm.errors import InvalidInput, JobError, nearest
from qfarm.margin import Margin, parse_margin
from qfarm.runs import RUNS, Run
from qfarm.scheme import Scheme, parse_scheme
from qfarm.text import check_name

MAX_JOB_BYTES = 1_000_000
MAX_DEPTH = 20  # of nested lists and mappings
FORBID = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

ScaleDtype = Literal["float16", "bfloat16", "float32"]
ModelDtype = Literal["bfloat16", "float16", "float32"]
Name = Annotated[str, pydantic.Field(min_length=1)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=1 << 32)]  # Python's generator takes -1 for 1, NumPy's takes 32 bits


def _listed(given: object) -> object:
    """One name, or a list of them, as a list."""
    return [given] if isinstance(given, str) else given


def _placeable(gpus: float) -> float:
    """Ray gives a worker a part of one GPU or several whole ones."""
    if gpus > 1 and not gpus.is_integer():
        raise PydanticCustomError("gpus", "input should be a part of one GPU or a whole number of them")
    return gpus


class Calibration(pydantic.BaseModel):
    """Which text a method may look at. GPTQ papers: C4, 128 samples of 2048 tokens."""

    model_config = FORBID
    text: str = "c4"
    samples: int = pydantic.Field(128, ge=1)
    length: int = pydantic.Field(2048, ge=2, description="tokens per sample")


class Resources(pydantic.BaseModel):
    """What one worker takes. On a machine without GPUs say `gpus: 0`."""

    model_config = FORBID
    gpus: Annotated[float, pydantic.AfterValidator(_placeable)] = pydantic.Field(1, ge=0, allow_inf_nan=False)
    cpus: int = pydantic.Field(1, ge=1)
    gpu_memory: float | None = pydantic.Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="GB of one GPU: small cells then share one, large ones take several, too large ones are refused",
    )
    price: float | None = pydantic.Field(
        None, ge=0, allow_inf_nan=False, description="of one GPU, or of one worker without GPUs, per hour"
    )
    workers: int | None = pydantic.Field(None, ge=1, description="at most so many workers; default: all that fit")


class Margins(pydantic.BaseModel):
    """Losses of quality to be called negligible: fixed beforehand, part of no identity."""

    model_config = FORBID
    perplexity: Any = pydantic.Field(None, description="'1 %'")
    accuracy: Any = pydantic.Field(None, description="'1 point'")


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
    models: list[Name] | None = None
    methods: list[Any] | None = None
    bits: list[str | int] | None = None
    group_sizes: list[int] | None = None
    seeds: list[Seed] | None = None


class JobFile(pydantic.BaseModel):
    """The shape of a job file. Unknown keys are errors."""

    model_config = FORBID
    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    models: list[Name] = pydantic.Field(min_length=1)
    methods: list[Any] = pydantic.Field(default_factory=list)
    bits: list[str | int] = pydantic.Field(default_factory=list)
    group_sizes: list[int] = pydantic.Field(default_factory=lambda: [-1], min_length=1)
    symmetric: bool | None = None
    scale_dtype: ScaleDtype = "float16"
    dtype: ModelDtype = "bfloat16"
    statistics: Literal["sequential", "independent"] = "sequential"
    calibration: Calibration = Calibration()
    seeds: list[Seed] = pydantic.Field(default_factory=lambda: [0], min_length=1)
    evaluate: list[Any] = pydantic.Field(min_length=1)
    run: Annotated[list[Run], pydantic.BeforeValidator(_listed)] = ["fake"]
    margin: Margins = Margins()
    include: list[Include] = pydantic.Field(default_factory=list)
    exclude: list[Match] = pydantic.Field(default_factory=list)
    resources: Resources = Resources()
    retries: int = pydantic.Field(2, ge=0, le=20)
    store: Name = "results"


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
    margins: Mapping[str, Margin] = dataclasses.field(default_factory=dict)  # by measure

    @property
    def runs(self) -> tuple[Run, ...]:
        """In the order in which each cell has them."""
        return tuple(run for run in RUNS if run in self.file.run)


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
        _refuse_unsafe_structure(text, path)
        loader = yaml.SafeLoader(text)
        tree = loader.get_single_node()
        where = _Locator(path, tree)
        where.refuse_unsafe_keys()
        data = loader.construct_document(tree) if tree else None
    except yaml.YAMLError as error:
        raise JobError(_yaml_fault(error, text, path)) from None
    except ValueError as error:  # a date that does not exist, an integer of thousands of digits
        raise JobError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise JobError(f"{path}: a job is a mapping with the keys {', '.join(JobFile.model_fields)}")
    data.setdefault("name", Path(path).stem)
    try:
        file = JobFile.model_validate(data)
    except pydantic.ValidationError as error:
        raise JobError(_first_fault(error, where)) from None
    return _resolve(file, path, where)


def _refuse_unsafe_structure(text: str, path: str) -> None:
    """Refuse what a job file does not need: aliases can grow without bound, depth exhausts the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"{path}: line {event.start_mark.line + 1}" if event.start_mark else path
        if isinstance(event, yaml.AliasEvent):
            raise JobError(f"{line}: YAML aliases (*{event.anchor}) are not supported in job files")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise JobError(f"{line}: nested more than {MAX_DEPTH} levels deep, which no job file is")


def _yaml_fault(error: yaml.YAMLError, text: str, path: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark:
        line, problem = mark.line + 1, ": ".join(filter(None, (error.context, error.problem)))  # type: ignore[attr-defined]
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character {chr(error.character)!r} is not allowed"
    else:
        return f"{path}: not valid YAML: {' '.join(str(error).split())}"
    return f"{path}: line {line}: not valid YAML: {problem}"


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

    def complete(key: tuple[Any, ...], found: Block) -> Block:
        if bool(found.recipes) != bool(found.schemes):
            missing, given = ("bits", "methods") if found.recipes else ("methods", "bits")
            raise JobError(f"{where(*key)}: {missing}: is empty although {given} is not; nothing would be quantized")
        return found

    main = complete((), block((), file, None))
    extra = tuple(complete(key := ("include", i), block(key, part, main)) for i, part in enumerate(file.include))
    # The same evaluation written twice is one.
    evaluations = tuple(dict.fromkeys(itertools.chain(*each(("evaluate",), file.evaluate, evaluate.parse_evaluation))))
    try:
        check_name(file.calibration.text)
    except InvalidInput as error:
        raise JobError(f"{where('calibration', 'text')}: {error}") from None
    for index, match in enumerate(file.exclude):
        if match.bits is not None:
            try:
                parse_scheme(match.bits)
            except InvalidInput as error:
                raise JobError(f"{where('exclude', index, 'bits')}: {error}") from None
    job = Job(
        path=path,
        file=file,
        blocks=(main, *extra),
        exclude=tuple(file.exclude),
        evaluations=evaluations,
        margins=_margins(file.margin, where),
    )
    _check_runs(job, where)
    return job


def _check_runs(job: Job, where: _Locator) -> None:
    if not job.runs:
        raise JobError(f"{where('run')}: empty; use {', '.join(RUNS)} or both")
    for evaluation in job.evaluations:
        if not set(evaluation.runs) & set(job.runs):
            able, asked = " and ".join(evaluation.runs), " and ".join(job.runs)
            raise JobError(
                f"{where('run')}: {evaluation.name} is measured in run: {able}, not {asked}; [fake, packed] has both"
            )


def _margins(given: Margins, where: _Locator) -> dict[str, Margin]:
    margins = {}
    for measure, text in given.model_dump(exclude_none=True).items():
        try:
            margins[measure] = parse_margin(measure, text)
        except InvalidInput as error:
            raise JobError(f"{where('margin', measure)}: {error}") from None
    return margins


def _group_size(value: int) -> int:
    if value != -1 and value < 2:
        raise InvalidInput(f"group size {value}: use -1 (per channel) or at least 2")
    return value


_NESTED: dict[str, type[pydantic.BaseModel]] = {
    "calibration": Calibration,
    "resources": Resources,
    "margin": Margins,
    "include": Include,
    "exclude": Match,
}


def _first_fault(error: pydantic.ValidationError, where: _Locator) -> str:
    from qfarm.recipe import fault_message

    # A key that is missing is most likely the one that is misspelt; of a union's faults the deepest says most.
    faults = error.errors()
    first = max(faults, key=lambda fault: (fault["type"] == "extra_forbidden", len(fault["loc"])))
    path = _keys(first["loc"])
    owner = next((_NESTED[part] for part in path if part in _NESTED), JobFile)
    last = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        return f'{where(*path)}: unknown key "{last}"{nearest(last, owner.model_fields)}'
    if first["type"] == "missing":
        return f'{where(*path[:-1])}: the key "{last}" is missing'
    if first["type"] == "model_type":
        message = f"a mapping with the keys {', '.join(owner.model_fields)} is needed"
    else:
        message = " or ".join(dict.fromkeys(fault_message(f) for f in faults if _keys(f["loc"]) == path))
    return f"{where(*path)}: {message}, got {reprlib.repr(first['input'])}"


def _keys(location: tuple[str | int, ...]) -> list[str | int]:
    """A fault's path in the file: pydantic adds the members of unions to it."""
    return [part for part in location if part not in ("str", "int")]


class _Locator:
    """Turns a key path into 'file: line 3: methods[1]'."""

    def __init__(self, path: str, tree: yaml.Node | None) -> None:
        self.path, self.tree = path, tree

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

    def refuse_unsafe_keys(self, node: yaml.Node | None = None, keys: tuple[str | int, ...] = ()) -> None:
        """Keys must be text, and differ: YAML keeps the last of two equal keys in silence."""
        node = self.tree if node is None else node
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag != "tag:yaml.org,2002:str":
                    given = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                    raise JobError(f"{self.path}: line {line}: a key must be text, got {given} (quote it if it is)")
                if key.value in seen:
                    raise JobError(f"{self(*keys, key.value)}: the key stands twice (again in line {line})")
                seen.add(key.value)
                self.refuse_unsafe_keys(value, (*keys, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.refuse_unsafe_keys(value, (*keys, index))
