"""Random model: a checkpoint of any size with weights drawn at random and a tokenizer of bytes.

For what does not depend on what a model has learnt: faults, memory, speed. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What a model's size is made of, where the caller says nothing else.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 256,
}


def save_random(folder: Path, family: str = "llama", *, seed: int = 0, std: float = 0.15, **config: Any) -> Path:
    """Write a checkpoint (float32, safetensors) of a family, by its `model_type`; matrices have deviation `std`.

    `config` overrides fields of the family's configuration. Returns the folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**SMALL, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes, 256 for the begin and 257 for the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
