"""GGUF: weights in blocks of 32 columns, configuration and tokenizer in one file, written by llama.cpp's own library.

Names, keys and the order of query and key rows are those of its architecture `llama`, which stands for Llama and for
Mistral without a sliding window. transformers reads it back; llama.cpp itself has not been run on what is written here.

Linear layers that are left alone, the embedding and the head keep the model's dtype, norms are float32 as llama.cpp
wants them. What the keys that transformers reads cannot say, scaled rotary positions and biases among them, is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qfarm.errors import QfarmError
from qfarm.export.blocks import COLUMNS, block_type, blocks, interleaved
from qfarm.export.formats import Reader, dtype_name, running_sites, uniform_refusal
from qfarm.export.made import Made
from qfarm.export.vocabulary import tokenizer_refusal, write_tokenizer
from qfarm.matrix import Cell
from qfarm.models.architecture import head_width
from qfarm.models.load import load_tokenizer
from qfarm.models.reference import first_line, resolve
from qfarm.quantized import QuantizedWeight, UniformWeight
from qfarm.scheme import parse_scheme

FILE = "model.gguf"
FAMILIES = ("llama", "mistral")


class Gguf:
    name = "gguf"
    writes_with: tuple[str, ...] = ("gguf",)
    summary = "one file of packed codes and scales, with the tokenizer"

    def refusal(self, cell: Cell) -> str | None:
        scheme = parse_scheme(cell.scheme)
        running = running_sites(cell)
        if running:
            return f"the format has no quantizer of {' and '.join(running)}"
        for bits in scheme.weight_widths:
            if block_type(bits, cell.symmetric) is None:
                return f"no block holds asymmetric codes of {bits} bits less their zeros"
        if cell.group_size != -1 and cell.group_size % COLUMNS:
            return f"the format has a scale for {COLUMNS} columns, which groups of {cell.group_size} do not fill"
        if cell.scale_dtype != "float16":
            return f"the format has float16 scales, and this cell {cell.scale_dtype} ones"
        return _model_refusal(cell.model)

    def layer_refusal(self, quantized: QuantizedWeight) -> str | None:
        problem = uniform_refusal(quantized)
        if problem is not None:
            return problem
        assert isinstance(quantized, UniformWeight)
        if quantized.g_idx is not None:
            return "columns are grouped out of order (act_order without static_groups), and the format has no g_idx"
        if quantized.scale.dtype != torch.float16:
            return f"the format has float16 scales, and {quantized.solver} {dtype_name(quantized.scale.dtype)} ones"
        if quantized.shape[1] // quantized.scale.shape[1] % COLUMNS:
            return f"its {quantized.shape[1]} columns in {quantized.scale.shape[1]} groups are no blocks of {COLUMNS}"
        if block_type(quantized.bits, quantized.zero is None) is None:
            return f"no block holds asymmetric codes of {quantized.bits} bits less their zeros"
        return None

    def left_out(self, cell: Cell) -> list[str]:
        return []

    def reader(self, cell: Cell) -> Reader:
        snippet = f'model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="{FILE}", dtype=torch.float32)'
        return Reader(dtype=torch.float32, snippet=snippet, packages=("gguf", "accelerate"), file=FILE)

    def running(self, made: Made) -> AbstractContextManager[None]:
        return nullcontext()

    def limits(self, scheme: str) -> list[str]:
        return [
            "Every 32 columns have a scale in the file, that of their group: 4.5 (Q4_0), 5.5 (Q5_0) or 8.5 (Q8_0) bits "
            "a weight, whatever the group size. transformers unpacks all weights as it loads.",
            "llama.cpp has not been run on this file: transformers alone has loaded it.",
            "If the file's key `tokenizer.ggml.pre` is `smollm`, transformers makes other tokens of spaces before a "
            "digit than the base model's own tokenizer does; take that one to repeat the scores above.",
            "Settings for generation, but for the token that ends a text, are not in the file.",
        ]

    def write(self, made: Made, folder: Path) -> None:
        import gguf

        loaded = made.loaded
        config = loaded.model.config.to_dict()
        heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
        writer = gguf.GGUFWriter(folder / FILE, "llama")
        _write_config(writer, config)
        layers = {name: layer for name, layer in made.quantized.items() if isinstance(layer, UniformWeight)}
        most = Counter(_type_name(layer) for layer in layers.values()).most_common(1)[0][0]
        writer.add_name(f"{Path(made.stored.cell.model).name} {made.stored.cell.label}")
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_tokenizer(writer, loaded.tokenizer, config["vocab_size"])
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        for name, value in _tensors(loaded.model):
            module, _, kind = name.rpartition(".")
            layer = layers.get(module) if kind == "weight" else None
            content, dtype = (blocks(layer), _type_name(layer)) if layer is not None else _floating(value)
            turned = {"q_proj": heads, "k_proj": keys}.get(module.rpartition(".")[2])
            if turned is not None:
                content = content[interleaved(len(content), turned)]
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)),
                content.contiguous().numpy(),
                raw_dtype=gguf.GGMLQuantizationType[dtype],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _model_refusal(reference: str) -> str | None:
    """Why a file cannot describe this model, or its tokenizer."""
    try:
        facts = resolve(reference)
        problem = _config_refusal(facts.config)
        return problem or tokenizer_refusal(load_tokenizer(facts), facts.config["vocab_size"])
    except QfarmError as error:
        return str(error)
    except Exception as error:  # transformers and its libraries raise anything for files that they cannot read
        return f"the tokenizer of {reference} cannot be loaded: {first_line(error)}"


def _config_refusal(config: Mapping[str, Any]) -> str | None:
    family = config["model_type"]
    if family not in FAMILIES:
        return f"the format is written for {' and '.join(FAMILIES)} models, and this is {family}"
    window, context = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if family == "mistral" and ("sliding_window" not in config or (window is not None and window < context)):
        return "transformers' reader of the format has no sliding window, and this model has one"
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rotary.get("rope_type", rotary.get("type", "default")) != "default":
        return "transformers' reader of the format has no scaled rotary positions, and this model has them"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "transformers' reader of the format has no biases of linear layers, and this model has them"
    if config.get("hidden_act", "silu") != "silu":
        return f"the format has the activation silu, and this model {config['hidden_act']}"
    return None


def _write_config(writer: Any, config: Mapping[str, Any]) -> None:
    width = head_width(config, "config.json")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Name and value of each parameter; a tied head is the embedding."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return [(name, value) for name, value in model.state_dict().items() if not (tied and name == f"{head}.weight")]


def _floating(value: Tensor) -> tuple[Tensor, str]:
    """A tensor that is not quantized, as the library takes it, and its type."""
    value = value.detach().cpu().contiguous()
    if value.dim() == 1:
        return value.float(), "F32"
    if value.dtype == torch.bfloat16:  # numpy has no such type: as bytes
        return value.view(torch.uint8), "BF16"
    return value, {torch.float16: "F16", torch.float32: "F32"}[value.dtype]


def _type_name(layer: UniformWeight) -> str:
    kind = block_type(layer.bits, layer.zero is None)
    assert kind is not None
    return kind.name
