"""compressed-tensors: packed weights, or int8 weights with int8 inputs, written through the library of that name.

Its loader in transformers builds the packed layout without packing zero points, so that asymmetric packed checkpoints
fail to load (transformers 5.24, compressed-tensors 0.20; `tests/test_export_compressed.py` watches for a fix): they are
refused. Act-order with permuted groups was removed from the format in August 2026.

The library's reference path rounds inputs by s = max|x| / 127.5 to [-128, 127], we and vLLM by max|x| / 127; a w8a8
checkpoint has our weights bit by bit, but transformers emulates it with slightly other inputs than were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.export.checkpoint import other_linears, write_checkpoint
from qfarm.export.formats import Reader, dtype_name, multiplied_in, running_sites, uniform_refusal
from qfarm.export.made import Made
from qfarm.matrix import Cell
from qfarm.quantized import QuantizedWeight, UniformWeight
from qfarm.scheme import parse_scheme

PACKED, INT8 = "pack-quantized", "int-quantized"
Kind = tuple[int, int]  # bits and group size of a layer's weights


class CompressedTensors:
    name = "compressed-tensors"
    writes_with: tuple[str, ...] = ("compressed_tensors",)
    summary = "packed codes and scales"

    def refusal(self, cell: Cell) -> str | None:
        scheme = parse_scheme(cell.scheme)
        running = scheme.sites - {"weight"}
        if "weight" not in scheme.sites:
            return "the format is for quantized weights, and this cell has none"
        if running and not _is_w8a8(cell):
            sites = " and ".join(running_sites(cell))
            return f"the format has no quantizer of {sites}; beside weights it knows w8a8 rounded to nearest"
        if not cell.symmetric:
            return "transformers cannot load asymmetric packed weights"
        return None

    def layer_refusal(self, quantized: QuantizedWeight) -> str | None:
        problem = uniform_refusal(quantized)
        if problem is not None:
            return problem
        assert isinstance(quantized, UniformWeight)
        if quantized.g_idx is not None:
            return "columns are grouped out of order (act_order without static_groups), and the format has no g_idx"
        if quantized.zero is not None:
            return "transformers cannot load asymmetric packed weights"
        return None

    def left_out(self, cell: Cell) -> list[str]:
        return []

    def reader(self, cell: Cell) -> Reader:
        dtype = multiplied_in(cell)
        snippet = f"model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype_name(dtype)})"
        return Reader(dtype=dtype, snippet=snippet, packages=("compressed-tensors",))

    def running(self, made: Made) -> AbstractContextManager[None]:
        if not _is_w8a8(made.stored.cell):
            return nullcontext()
        return _as_the_library_rounds(made.loaded.model, list(made.quantized))

    def limits(self, scheme: str) -> list[str]:
        unpacked = "transformers unpacks all weights at the first forward pass: the file is small, its memory is not."
        if scheme != "w8a8":
            return [unpacked]
        return [
            unpacked,
            "transformers rounds linear inputs by max|x| / 127.5, the scores above were measured with max|x| / 127, as "
            "vLLM's kernel has it by its documentation (not run here): scores in transformers are slightly others.",
        ]

    def write(self, made: Made, folder: Path) -> None:
        int8 = _is_w8a8(made.stored.cell)
        layers = {name: layer for name, layer in made.quantized.items() if isinstance(layer, UniformWeight)}
        tensors = {name: _int8(layer) if int8 else _packed(layer) for name, layer in layers.items()}
        kinds = {name: (layer.bits, layer.group_size) for name, layer in layers.items()}
        quantization = configuration(kinds, other_linears(made.loaded, layers), INT8 if int8 else PACKED)
        write_checkpoint(made.loaded, tensors, folder, self.reader(made.stored.cell).dtype, quantization)


def _is_w8a8(cell: Cell) -> bool:
    """8-bit weights and inputs rounded to nearest per token: all that the format's `token` strategy means."""
    return cell.scheme == "w8a8" and cell.group_size == -1 and "linear_in" in cell.rounded


def _packed(layer: UniformWeight) -> dict[str, Tensor]:
    """The library's packer adds 2^(b-1) to signed codes, which gives our unsigned ones back."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: Tensor = pack_to_int32(_signed(layer), layer.bits)
    return {
        "weight_packed": packed,
        "weight_scale": layer.scale,
        "weight_shape": torch.tensor(layer.shape),
    }


def _int8(layer: UniformWeight) -> dict[str, Tensor]:
    return {"weight": _signed(layer), "weight_scale": layer.scale}


def _signed(layer: UniformWeight) -> Tensor:
    signed: Tensor = layer.codes.to(torch.int16) - 2 ** (layer.bits - 1)
    return signed.to(torch.int8)


def configuration(kinds: Mapping[str, Kind], ignore: list[str], form: str) -> dict[str, Any]:
    """`quantization_config`: one group of layers for each width and group size; built from the library's own classes.

    `ignore` names every other linear layer: the loader would look for packed weights there.
    """
    from compressed_tensors import __version__ as version
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups = {}
    for index, ((bits, size), targets) in enumerate(_targets(kinds).items()):
        channel = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, **channel)
        groups[f"group_{index}"] = QuantizationScheme(
            targets=targets, weights=weights, input_activations=_inputs() if form == INT8 else None, format=form
        )
    config = QuantizationConfig(
        config_groups=groups, format=form, ignore=sorted(ignore), quantization_status="compressed"
    )
    return {**config.model_dump(mode="json"), "version": version}


def _inputs() -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)


def _targets(kinds: Mapping[str, Kind]) -> dict[Kind, list[str]]:
    """The layers of each kind: all linear layers, or their last names where these tell the kinds apart, or each one."""
    of_kind: dict[Kind, list[str]] = {}
    for module, kind in kinds.items():
        of_kind.setdefault(kind, []).append(module)
    if len(of_kind) == 1:
        return dict.fromkeys(of_kind, ["Linear"])
    last = {kind: sorted({module.rpartition(".")[2] for module in modules}) for kind, modules in of_kind.items()}
    if sum(map(len, last.values())) > len(set().union(*last.values())):
        return of_kind
    return {kind: [f"re:.*\\.{name}$" for name in names] for kind, names in last.items()}


@contextmanager
def _as_the_library_rounds(model: nn.Module, modules: list[str]) -> Iterator[None]:
    """Inputs of these layers rounded by the library's own rule, which is not the one that was measured (127.5)."""
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = _inputs()

    def rounded(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale, zero = compute_dynamic_scales_and_zp(inputs[0], args, module)
        return (fake_quantize(inputs[0], scale, zero, args), *inputs[1:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(rounded) for name in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
