"""GPTQ's layout: codes, zeros and scales transposed, p = 32 / b codes in each int32, low bits first.

    qweight  int32 [in / p, out]      word r of output o holds inputs r p .. r p + p - 1
    qzeros   int32 [groups, out / p]  v1: zero - 1, v2: zero
    scales   float16 [groups, out]
    g_idx    int32 [in]               group of each input column, in the original order

Readers of v1 add 1 to the zeros, and disagree on what becomes of a zero of 0; symmetric grids never have one. So v1,
which most software reads, is written for these, v2 for asymmetric ones. Readers multiply in float16.

The layout is written by hand from its public descriptions. transformers reads it through optimum and gptqmodel, which
wants another torch than we do (7.7: >= 2.14.1): what is written is unpacked by `qfarm.export.reload` instead.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qfarm.export.checkpoint import write_checkpoint
from qfarm.export.formats import Reader, running_sites, uniform_refusal
from qfarm.export.made import Made
from qfarm.matrix import Cell
from qfarm.quantized import QuantizedWeight, UniformWeight, pack_bits
from qfarm.scheme import UNTOUCHED, parse_scheme

WIDTHS = (2, 4, 8)  # those that divide a word; the layout of 3 bits differs between readers


class Gptq:
    name = "gptq"
    writes_with: tuple[str, ...] = ()
    summary = "packed codes, scales, zeros and the group of each column"

    def refusal(self, cell: Cell) -> str | None:
        scheme = parse_scheme(cell.scheme)
        running = running_sites(cell)
        if running:
            return f"the format has no quantizer of {' and '.join(running)}"
        if len(scheme.weight_widths) != 1 or UNTOUCHED in (scheme.weight, scheme.weight_attention):
            return "the format has one width for all layers"
        if scheme.weight_widths[0] not in WIDTHS:
            return f"the format is written for {', '.join(map(str, WIDTHS))} bits"
        if cell.scale_dtype != "float16":
            return f"the format has float16 scales, and this cell {cell.scale_dtype} ones"
        return None

    def layer_refusal(self, quantized: QuantizedWeight) -> str | None:
        problem = uniform_refusal(quantized)
        if problem is not None:
            return problem
        count = 32 // quantized.bits
        if quantized.bits not in WIDTHS or any(size % count for size in quantized.shape):
            return f"{quantized.bits}-bit codes of a {quantized.shape} matrix do not fill whole words"
        return None

    def left_out(self, cell: Cell) -> list[str]:
        return []

    def reader(self, cell: Cell) -> Reader:
        snippet = "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)"
        return Reader(dtype=torch.float16, snippet=snippet, packages=("optimum", "gptqmodel"), own=True)

    def running(self, made: Made) -> AbstractContextManager[None]:
        return nullcontext()

    def limits(self, scheme: str) -> list[str]:
        return ["No other software has loaded this file yet: it was unpacked by a reader of qfarm's own."]

    def write(self, made: Made, folder: Path) -> None:
        layers = {name: layer for name, layer in made.quantized.items() if isinstance(layer, UniformWeight)}
        tensors = {name: packed(layer) for name, layer in layers.items()}
        settings = configuration(made.stored.cell, next(iter(layers.values())), any_order(layers))
        write_checkpoint(made.loaded, tensors, folder, torch.float16, settings)
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def any_order(layers: dict[str, UniformWeight]) -> bool:
    return any(layer.g_idx is not None for layer in layers.values())


def packed(layer: UniformWeight) -> dict[str, Tensor]:
    """The four tensors of a layer."""
    rows, columns = layer.shape
    groups = layer.scale.shape[1]
    middle = 2 ** (layer.bits - 1)
    # v1 of a symmetric grid has its zero less one, v2 of an asymmetric one the zero itself.
    zeros = torch.full((rows, groups), middle - 1, dtype=torch.uint8) if layer.zero is None else layer.zero
    order = torch.arange(columns) // (columns // groups) if layer.g_idx is None else layer.g_idx
    return {
        "qweight": pack_bits(layer.codes, layer.bits).T.contiguous(),
        "qzeros": pack_bits(zeros.T.contiguous(), layer.bits),
        "scales": layer.scale.T.contiguous(),
        "g_idx": order.to(torch.int32),
    }


def configuration(cell: Cell, layer: UniformWeight, permuted: bool) -> dict[str, Any]:
    symmetric = layer.zero is None
    return {
        "quant_method": "gptq",
        "bits": layer.bits,
        "group_size": cell.group_size,
        "desc_act": permuted,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["qfarm"]},
    }
