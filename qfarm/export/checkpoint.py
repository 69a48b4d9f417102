"""Checkpoint: the files that transformers loads, from a model whose linear layers are replaced by other tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from qfarm.export.formats import dtype_name
from qfarm.models.load import LoadedModel

SHARD = "5GB"


def write_checkpoint(
    loaded: LoadedModel,
    replaced: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None,
) -> None:
    """Weights in safetensors, configuration and tokenizer.

    `replaced` has by module the tensors that stand for its weight; everything else is written as the model holds it.
    `dtype` is the one that a reader shall load it in.
    """
    model = loaded.model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    skip = {f"{module}.weight" for module in replaced}
    if tied:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        skip.add(f"{head}.weight")
    tensors = {name: value for name, value in model.state_dict().items() if name not in skip}
    for module, parts in replaced.items():
        tensors |= {f"{module}.{name}": value for name, value in parts.items()}
    # Cloned, for layers that were solved as one matrix are views of it.
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_torch_state_dict(whole, folder, max_shard_size=SHARD, metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    config.pop("_name_or_path", None)
    config |= {
        "architectures": [type(model).__name__],
        "dtype": dtype_name(dtype),
        "tie_word_embeddings": tied,
        "use_cache": True,
    }
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def other_linears(loaded: LoadedModel, quantized: Mapping[str, Any]) -> list[str]:
    """Names of the linear layers that are not quantized, the head included."""
    return [
        name for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear) and name not in quantized
    ]
