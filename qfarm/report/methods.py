"""Methods as text: what there is, and the options of one with defaults, ranges and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qfarm.recipe import Method, WeightSolver, Wrapper, lookup, method_names
from qfarm.report.render import terminal_text


def render_methods(width: int, color: bool = False) -> str:
    """All methods, one row each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "bits", "what", "source"):
        table.add_column(name, no_wrap=name in ("method", "bits"), overflow="fold")
    for name in method_names():
        kind = lookup(name)
        table.add_row(name, _widths(kind), Text(_summary(kind)), Text(kind.source))
    return terminal_text([table, Text("\n`qfarm methods NAME` lists a method's options.")], width, color)


def render_method(name: str, width: int, color: bool = False) -> str:
    """One method: its docstring and options. Raises InvalidInput for an unknown name."""
    return terminal_text(_parts(lookup(name), name), width, color)


def _parts(kind: type[Method], name: str) -> Iterator[RenderableType]:
    yield Text(inspect.cleandoc(_module_doc(kind)))
    yield Text(f"\nsource: {kind.source}\nweights: {_weights(kind)}\noptions:")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column, no_wrap=column == "option", overflow="fold")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        default, meaning, bounds = _described(field)
        hint = typing.get_type_hints(kind)[field.name]
        table.add_row(Text(field.name), Text(_type(hint) + bounds), Text(default), Text(meaning))
    yield table if table.rows else Text("  none")
    yield Text(f"\nin a job:  methods: [{name}]   or with options:  - {name}: {{OPTION: VALUE}}")


def _described(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    """Default, meaning and range of an option."""
    info = field.default
    default = getattr(info, "default", info)
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        (sign, getattr(mark, key))
        for mark in getattr(info, "metadata", [])
        for key, sign in signs.items()
        if hasattr(mark, key)
    ]
    bounds = "".join(f" {sign} {value}" for sign, value in found)
    shown = "automatic" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return shown, getattr(info, "description", None) or "", bounds


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_args(hint):
        return " | ".join(_type(part) for part in typing.get_args(hint) if part is not type(None))
    return str(getattr(hint, "__name__", hint))


def _widths(kind: type[Method]) -> str:
    """Widths of weights, as methods/README.md has them."""
    if issubclass(kind, Wrapper):
        return "as its solver"
    if not issubclass(kind, WeightSolver):
        return "-"
    first, last = kind.widths.start, kind.widths.stop - 1
    return f"{first}..{last}" if first < last else str(first)


def _weights(kind: type[Method]) -> str:
    widths = _widths(kind)
    return "left to other methods" if widths == "-" else widths + " bits" * (not issubclass(kind, Wrapper))


def _module_doc(kind: type[Method]) -> str:
    return inspect.getmodule(kind).__doc__ or ""


def _summary(kind: type[Method]) -> str:
    """The docstring's first paragraph."""
    return " ".join(_module_doc(kind).strip().split("\n\n")[0].split())
