"""Formats: what a checkpoint can be written as, what each of them holds, and the refusal where it does not.

    compressed-tensors   weights of 1 to 8 bits on symmetric grids of consecutive columns, packed; 8-bit weights with
                         8-bit inputs per token
    gptq                 weights of 2, 4 and 8 bits on uniform grids, also asymmetric and of columns out of order
    gguf                 weights of up to 8 bits, asymmetric to 7, with groups of whole 32 columns; Llama, Mistral
    safetensors          any weights, in the model's own dtype: as large and as fast as the original

Nothing is ever written in another format than the one asked for, and nothing is left out without being named.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from qfarm.errors import InvalidInput, Unsupported, nearest
from qfarm.export.made import Made
from qfarm.matrix import Cell
from qfarm.models.load import DTYPES
from qfarm.quantized import QuantizedWeight, UniformWeight
from qfarm.scheme import parse_scheme

AUTO, TRIED = "auto", ("compressed-tensors", "safetensors")
SITES = {"kv_cache": "the KV cache", "q": "queries", "probs": "softmax probabilities", "linear_in": "linear inputs"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How a fresh process is to load what was written."""

    dtype: torch.dtype
    snippet: str  # Python, for the model card
    packages: tuple[str, ...]  # that transformers needs beside itself
    own: bool = False  # verified by a reader of our own, where these packages cannot be had
    file: str | None = None  # that transformers wants named, in a folder without a configuration


class Format(Protocol):
    """One way to write a checkpoint."""

    name: str
    summary: str  # one line for the model card
    writes_with: tuple[str, ...]  # modules of optional packages

    def refusal(self, cell: Cell) -> str | None:
        """Why this cell cannot be written, as far as that shows before it is quantized."""
        ...

    def layer_refusal(self, quantized: QuantizedWeight) -> str | None:
        """Why this layer cannot be written."""
        ...

    def left_out(self, cell: Cell) -> list[str]:
        """Sites that the cell quantizes and the checkpoint does not, in words."""
        ...

    def reader(self, cell: Cell) -> Reader: ...

    def running(self, made: Made) -> AbstractContextManager[None]:
        """What the reader does beside multiplying weights, done to the model in memory."""
        ...

    def limits(self, scheme: str) -> list[str]:
        """What a user of the checkpoint has to know, for the model card."""
        ...

    def write(self, made: Made, folder: Path) -> None:
        """Weights and configuration."""
        ...


def uniform_refusal(quantized: QuantizedWeight) -> str | None:
    """What no format of packed codes holds; the rest has the tensors of a plain `UniformWeight`."""
    if not isinstance(quantized, UniformWeight):
        kind = type(quantized).__name__
        return f"{quantized.solver} stores more than codes, scales and zeros ({kind})"
    if quantized.zero is not None and quantized.zero.is_floating_point():
        return f"the zeros of {quantized.solver} are no integers"
    if len(quantized.scale) != len(quantized.codes):
        return f"{quantized.solver} has one scale for the whole matrix"
    return None


def running_sites(cell: Cell) -> list[str]:
    """What the cell quantizes beside the weights, in words."""
    scheme = parse_scheme(cell.scheme)
    return [f"{SITES[site]} ({getattr(scheme, site)} bits)" for site in sorted(scheme.sites - {"weight"})]


def multiplied_in(cell: Cell) -> torch.dtype:
    """The dtype in which codes times scales give the cell's weights bit by bit, for a reader that casts scales first.

    The model's, where scales have it too: the product is exact in float32 and rounded once in either order. Otherwise
    float32, which holds every product; a float16 scale cast to bfloat16 would be another scale.
    """
    return DTYPES[cell.dtype] if cell.scale_dtype == cell.dtype else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def formats() -> dict[str, Format]:
    from qfarm.export.compressed import CompressedTensors
    from qfarm.export.gguf import Gguf
    from qfarm.export.gptq import Gptq
    from qfarm.export.plain import Plain

    known: tuple[Format, ...] = (CompressedTensors(), Gptq(), Gguf(), Plain())
    return {one.name: one for one in known}


def asked(name: str, cell: Cell) -> tuple[list[Format], dict[str, str]]:
    """Formats to try in this order, and why `auto` passes over others: packed ones come first, then floating point.

    Raises Unsupported before anything is loaded when none can hold the cell, or a package that writes it is missing.
    """
    known = formats()
    if name not in (AUTO, *known):
        raise InvalidInput(f'unknown format "{name}"{nearest(name, (AUTO, *known))}')
    tried = [known[one] for one in ((name,) if name != AUTO else TRIED)]
    refused = {one.name: problem for one in tried if (problem := one.refusal(cell))}
    # Asked for by its name, a format may leave out what runs beside the weights; nobody gets that by default.
    found = [one for one in tried if one.name not in refused and (name != AUTO or not one.left_out(cell))]
    if not found:
        first, problem = next(iter(refused.items()))
        raise Unsupported(f"{first}: {problem}; {_instead(other_formats(known, first, cell), cell)}")
    missing = [package for package in found[0].writes_with if importlib.util.find_spec(package) is None]
    if missing:
        raise Unsupported(f"{found[0].name}: {', '.join(missing)} is not installed: pip install 'qfarm[export]'")
    return found, refused


def other_formats(known: Mapping[str, Format], name: str, cell: Cell) -> list[Format]:
    return [one for one in known.values() if one.name != name and one.refusal(cell) is None]


def layer_problem(one: Format, module: str, quantized: QuantizedWeight) -> str | None:
    """The refusal of a layer with its name, or None."""
    problem = one.layer_refusal(quantized)
    return None if problem is None else f"{module}: {problem}"


def instead(name: str, quantized: QuantizedWeight, cell: Cell) -> str:
    """What would hold this layer of the cell in the place of that format."""
    others = other_formats(formats(), name, cell)
    return _instead([other for other in others if other.layer_refusal(quantized) is None], cell)


def _instead(others: Iterable[Format], cell: Cell) -> str:
    listed = []
    for one in others:
        without = "".join(f", without {site}" for site in one.left_out(cell))
        listed.append(f"--format {one.name} ({one.summary}{without})")
    return "what can hold it: " + ", ".join(listed) if listed else "no format holds it"


def quantization_of(made: Made) -> Mapping[str, Any]:
    """What was quantized how, for manifest and card."""
    cell = made.stored.cell
    return {
        "recipe": cell.recipe,
        "methods": [dict(method) for method in cell.methods],
        "scheme": cell.scheme,
        "group_size": cell.group_size,
        "symmetric": cell.symmetric,
        "scale_dtype": cell.scale_dtype,
        "dtype": cell.dtype,
        "calibration": dict(cell.calibration) if cell.calibration else None,
        "seed": cell.seed,
    }
