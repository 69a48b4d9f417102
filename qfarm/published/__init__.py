"""Published figures: what papers and repositories report, as data, for comparison with what was measured here.

One YAML file per source. A file holds tables; a table holds rows, and a row one value per column of its table. A column
is an evaluation: a metric and what it is taken of (`perplexity wikitext2 2048`, `acc boolq`). What a row does not name
is not known of it. `confirmed: false` marks figures that were read at second hand or from memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml

from qfarm.errors import InvalidInput, nearest
from qfarm.scheme import parse_scheme

ENDING = ".yaml"
BASELINE = "baseline"
# Units of the metrics that occur; `share` is of numbers that a quantizer rounds to zero.
UNITS: Mapping[str, str] = {
    "perplexity": "perplexity",
    "acc": "percent",
    "exact_match": "percent",
    "exact_match,strict-match": "percent",
    "bleu_acc": "percent",
    "score": "points",
    "share": "percent",
    "found_of_5": "",
}
WITH_LENGTH = ("perplexity",)  # metrics of a text, read in windows of so many tokens
LOWER_IS_BETTER = ("perplexity", "share")

FORBID = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)
Text = Annotated[str, pydantic.Field(min_length=1)]
Value = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Prefill = Literal["full", "quantized"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """What a number is a measurement of."""

    metric: str  # a key of UNITS
    of: str  # a text or a task
    length: int | None = None  # tokens per window, of metrics of a text

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.metric, self.of, self.length) if part is not None)

    @property
    def unit(self) -> str:
        return UNITS.get(self.metric, "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One published number, with all that its source says about it."""

    model: str  # of the hub; what has no checkpoint there is named in words
    recipe: str  # as in a job: "smoothquant+gptq", "baseline"
    options: Mapping[str, Mapping[str, Any]]  # by method of the recipe, in qfarm's names
    settings: Mapping[str, Any]  # what else the source set, in its own names
    scheme: str  # canonical
    group_size: int  # of weights; -1 = per channel
    symmetric: bool | None  # of weights; None: not stated
    calibration: Mapping[str, Any]  # text, samples, length; what is stated
    prefill: Prefill | None  # what a prompt's tokens see of a quantized KV cache; None: not stated, or there is none
    measure: Measure
    value: float
    section: str  # where in the source it stands
    table: int  # figures of the same number were measured under the same baseline
    notes: tuple[str, ...]
    confirmed: bool

    @property
    def is_baseline(self) -> bool:
        return self.recipe == BASELINE


def parse_measure(text: str) -> Measure:
    """Read 'perplexity wikitext2 2048' or 'acc boolq'. Raises InvalidInput."""
    metric, *rest = text.split()
    if metric not in UNITS:
        raise InvalidInput(f'column "{text}": unknown metric "{metric}"{nearest(metric, UNITS)}')
    wanted = 2 if metric in WITH_LENGTH else 1
    if len(rest) != wanted or (wanted == 2 and not rest[1].isdigit()):
        form = "TEXT LENGTH" if wanted == 2 else "TASK"
        raise InvalidInput(f'column "{text}": expected "{metric} {form}"')
    return Measure(metric=metric, of=rest[0], length=int(rest[1]) if wanted == 2 else None)


class Calibration(pydantic.BaseModel):
    """Calibration text as far as the source states it; names of texts as in a job."""

    model_config = FORBID
    text: Text | None = None
    samples: int | None = pydantic.Field(None, ge=1)
    length: int | None = pydantic.Field(None, ge=1, description="tokens per sample")


class Line(pydantic.BaseModel):
    """One row of a table: a cell and its values, null where the source has none."""

    model_config = FORBID
    model: Text | None = None
    recipe: Text
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    settings: dict[str, Any] = pydantic.Field(default_factory=dict)
    scheme: Text | None = None
    group: int = pydantic.Field(-1, ge=-1)
    symmetric: bool | None = None
    calibration: Calibration | None = None
    values: list[Value | None] = pydantic.Field(min_length=1)
    note: Text | None = None
    confirmed: bool = True

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (self.recipe == BASELINE) != (self.scheme is None):
            raise ValueError("a baseline has no scheme, and every other row needs one")
        if self.scheme is not None:
            try:
                parse_scheme(self.scheme)
            except InvalidInput as error:
                raise ValueError(str(error)) from None
        parts = self.recipe.split("+")
        if len(parts) > 1:
            stray = [name for name in self.options if name not in parts or not isinstance(self.options[name], dict)]
            if stray:
                raise ValueError(f"options of a chain stand under its methods' names, got {stray[0]}")
        return self

    @property
    def by_method(self) -> dict[str, dict[str, Any]]:
        parts = self.recipe.split("+")
        return dict(self.options) if len(parts) > 1 else {parts[0]: dict(self.options)} if self.options else {}


class Sheet(pydantic.BaseModel):
    """One table of a source."""

    model_config = FORBID
    section: Text
    columns: list[Text] = pydantic.Field(min_length=1)
    model: Text | None = None
    symmetric: bool | None = None
    calibration: Calibration | None = None
    settings: dict[str, Any] = pydantic.Field(default_factory=dict)
    prefill: Prefill | None = None
    note: Text | None = None
    confirmed: bool = True
    rows: list[Line] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for column in self.columns:
            try:
                parse_measure(column)
            except InvalidInput as error:
                raise ValueError(str(error)) from None
        for index, row in enumerate(self.rows):
            if len(row.values) != len(self.columns):
                raise ValueError(f"rows[{index}]: {len(row.values)} values for {len(self.columns)} columns")
            if row.model is None and self.model is None:
                raise ValueError(f"rows[{index}]: neither the row nor its table names a model")
        return self


class Source(pydantic.BaseModel):
    """A file: where its figures come from, and its tables."""

    model_config = FORBID
    title: Text
    address: Text
    notes: list[Text] = pydantic.Field(default_factory=list)
    tables: list[Sheet] = pydantic.Field(min_length=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    name: str
    title: str
    address: str
    notes: tuple[str, ...]  # of the source as a whole
    figures: tuple[Figure, ...]


def names() -> list[str]:
    """The sources that come with qfarm."""
    return sorted(path.stem for path in Path(__file__).parent.glob(f"*{ENDING}"))


def load(name: str) -> Published:
    """A source by its name, or from a file of the same form (`*.yaml`). Raises InvalidInput."""
    if name.endswith(ENDING):
        return _read(Path(name), name)
    if name not in names():
        raise InvalidInput(f'no published figures called "{name}"{nearest(name, names())}, or a file *{ENDING}')
    return _shipped(name)


@functools.cache
def _shipped(name: str) -> Published:
    return _read(Path(__file__).parent / f"{name}{ENDING}", name)


def _read(path: Path, name: str) -> Published:
    try:
        source = Source.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidInput(f"{path}: {where}: {first['msg']}") from None
    figures = [
        figure
        for number, sheet in enumerate(source.tables)
        for line in sheet.rows
        for figure in _figures(number, sheet, line)
    ]
    return Published(
        name=Path(name).stem if name.endswith(ENDING) else name,
        title=source.title,
        address=source.address,
        notes=tuple(source.notes),
        figures=tuple(figures),
    )


def _figures(number: int, sheet: Sheet, line: Line) -> list[Figure]:
    stated = line.calibration or sheet.calibration
    # A baseline calibrates nothing and quantizes nothing, whatever its table says of the rows around it.
    plain = line.recipe == BASELINE
    model = line.model or sheet.model
    assert model is not None  # checked by Sheet
    return [
        Figure(
            model=model,
            recipe=line.recipe,
            options=line.by_method,
            settings={} if plain else {**sheet.settings, **line.settings},
            scheme=str(parse_scheme(line.scheme or "w16")),
            group_size=line.group,
            symmetric=None if plain else sheet.symmetric if line.symmetric is None else line.symmetric,
            calibration={} if plain or stated is None else stated.model_dump(exclude_none=True),
            prefill=None if plain else sheet.prefill,
            measure=parse_measure(column),
            value=value,
            section=sheet.section,
            table=number,
            notes=tuple(filter(None, (line.note, None if plain else sheet.note))),
            confirmed=line.confirmed and sheet.confirmed,
        )
        for column, value in zip(sheet.columns, line.values, strict=True)
        if value is not None
    ]
