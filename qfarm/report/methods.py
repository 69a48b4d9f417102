"""Methods as text: what there is, and the options of one with defaults, ranges and meaning; in Markdown a page each."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qfarm.errors import InvalidInput
from qfarm.recipe import Method, WeightSolver, Wrapper, lookup, method_names
from qfarm.report.render import terminal_text

MARK = "<!-- Written by `qfarm methods --write docs/methods`; change the method's docstring or options instead. -->"
ITEM = re.compile(r"- |\d+\. ")
MARKUP = re.compile(r"[*<\[\]]|(?<!\w)_|_(?!\w)")  # what Markdown would read as such; not the _ inside a name


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
    yield Text(_flowing(inspect.cleandoc(_module_doc(kind))))
    yield Text(f"\nsource: {kind.source}\nweights: {_weights(kind)}\noptions:")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column, no_wrap=column == "option", overflow="fold")
    for row in _option_rows(kind):
        table.add_row(*map(Text, row))
    yield table if table.rows else Text("  none")
    yield Text(f"\nin a job:  methods: [{name}]   or with options:  - {name}: {{OPTION: VALUE}}")


def _flowing(text: str) -> str:
    """Each paragraph and list item on one line, for any width; indented blocks stay as they are."""
    lines: list[str] = []
    for line in text.split("\n"):
        block = line.startswith("    ") or (bool(lines) and lines[-1].startswith("    "))
        if line and lines and lines[-1] and not block and not ITEM.match(line):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _option_rows(kind: type[Method]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type with its range, default and meaning of each option."""
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        default, meaning, bounds = _described(field)
        hint = typing.get_type_hints(kind)[field.name]
        yield field.name, _type(hint) + bounds, default, meaning


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


# -- pages ------------------------------------------------------------------------------------------------------------


def write_pages(folder: Path) -> list[Path]:
    """A Markdown page for each method of qfarm itself, and a list of them; pages of methods that are gone are removed.

    Raises InvalidInput when the folder cannot be written or holds other files.
    """
    pages = method_pages()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in folder.iterdir() if not _is_page(path)]
        if foreign:
            raise InvalidInput(
                f"{folder}: holds other files ({', '.join(sorted(foreign)[:3])}); give a folder of its own"
            )
        for path in folder.iterdir():
            if path.name not in pages:
                path.unlink()
        for name, text in pages.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be written: {error.strerror}") from error
    return [folder / name for name in pages]


def method_pages() -> dict[str, str]:
    """Markdown by file name."""
    kinds = {name: lookup(name) for name in method_names()}
    own = {name: kind for name, kind in kinds.items() if kind.__module__ == f"qfarm.methods.{name}"}
    listed = "\n".join(f"- [{name}]({name}.md): {_markdown(_summary(kind))}" for name, kind in own.items())
    index = f"{MARK}\n# Methods in full\n\n{listed}\n"
    return {"README.md": index} | {f"{name}.md": _page(kind, name) for name, kind in own.items()}


def _is_page(path: Path) -> bool:
    return path.suffix == ".md" and path.read_text().startswith(MARK)


def _page(kind: type[Method], name: str) -> str:
    rows = list(_option_rows(kind))
    table = "\n".join("| " + " | ".join(_markdown(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
    options = f"| option | type | default | meaning |\n|---|---|---|---|\n{table}" if rows else "None."
    more = f"With options: `{{{name}: {{OPTION: VALUE}}}}` in the place of the name.\n" if rows else ""
    return (
        f"{MARK}\n# {name}\n\n{_markdown(inspect.cleandoc(_module_doc(kind)))}\n\n- Source: {_markdown(kind.source)}\n"
        f"- Weights: {_weights(kind)}\n\n## Options\n\n{options}\n\n## In a job\n\n"
        f"```yaml\nmethods: [{name}]\n```\n\n{more}"
    )


def _markdown(text: str) -> str:
    """Plain text for Markdown: indented blocks and code spans stay as they are, elsewhere nothing is markup."""
    return "\n".join(line if line.startswith("    ") else _escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    parts = line.split("`")
    if len(parts) % 2 == 0:  # a backtick that opens nothing
        return MARKUP.sub(r"\\\g<0>", line).replace("`", "\\`")
    return "`".join(part if i % 2 else MARKUP.sub(r"\\\g<0>", part) for i, part in enumerate(parts))
