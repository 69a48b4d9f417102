"""Margins: how large a loss of quality a job calls negligible, fixed before anything is measured.

A margin judges results and changes none, so it enters no identity. It is kept in the provenance of each attempt, where
the report finds it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from qfarm.errors import InvalidInput, nearest

Measure = Literal["perplexity", "accuracy"]
_UNITS: dict[Measure, str] = {"perplexity": "%", "accuracy": "points"}
_FORMS = {"perplexity": "'1 %'", "accuracy": "'1 point'"}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|points?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin:
    """A margin of one measure, in the scale that differences have."""

    amount: float  # ln of the ratio of perplexities, or a fraction of items
    text: str  # as people write it: "1 %", "0.5 points"


def parse_margin(measure: str, text: object) -> Margin:
    """Read '1 %' for perplexity or '1 point' for accuracy. Raises InvalidInput, one line with what would be valid."""
    if measure not in _UNITS:
        raise InvalidInput(f'no margin for "{measure}"{nearest(measure, list(_UNITS))}')
    unit = _UNITS[measure]
    found = _AMOUNT.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None or found[2].rstrip("s") != unit.rstrip("s"):
        raise InvalidInput(f"a margin of {measure} is written like {_FORMS[measure]}, got {text!r}")
    value = float(found[1])
    if not 0 < value < 100:
        raise InvalidInput(f"a margin lies between 0 and 100 {unit}, got {text!r}")
    amount = math.log1p(value / 100) if unit == "%" else value / 100
    return Margin(amount=amount, text=f"{value:g} {unit.removesuffix('s') if value == 1 else unit}")


def parse_margins(given: Mapping[str, object]) -> dict[str, Margin]:
    """Margins by measure. Raises InvalidInput."""
    return {measure: parse_margin(measure, text) for measure, text in given.items()}


def read_option(text: str) -> dict[str, Margin]:
    """Read 'perplexity=1%, accuracy=1 point', as the command line takes it. Raises InvalidInput."""
    given: dict[str, object] = {}
    for part in text.split(","):
        measure, equals, amount = (word.strip() for word in part.partition("="))
        if not equals:
            raise InvalidInput(f"--margin is written like 'perplexity=1%,accuracy=1 point', got \"{text}\"")
        if measure in given:
            raise InvalidInput(f'--margin names {measure} twice: "{text}"')
        given[measure] = amount
    return parse_margins(given)
