"""Vocabulary: a tokenizer as the keys of a GGUF file, and the refusal where these would describe another one.

Byte-level BPE only. The file holds tokens, merges and special tokens; how text is cut before merging is a name that
readers know. These names stand for the cuts they mean in llama.cpp (`tokenizer_pre` in its llama-vocab.cpp):

    gpt-2    the expression of GPT-2
    smollm   every digit on its own, then the expression of GPT-2

transformers reads `smollm` without the first step: spaces before a digit become other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
CUTS: dict[str, list[dict[str, Any]]] = {"gpt-2": [_GPT2], "smollm": [_DIGITS, _GPT2]}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # the format's types of tokens


def tokenizer_refusal(tokenizer: Any, size: int) -> str | None:
    """Why a file cannot describe this tokenizer, for a model with `size` token ids."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return f"a {type(tokenizer).__name__} is no byte-level BPE, the only tokenizer that is written"
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    options = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout", "ignore_merges")
    if model["type"] != "BPE" or parts["normalizer"] is not None or any(model.get(option) for option in options):
        return "the tokenizer is no plain byte-level BPE, the only one that is written"
    if not model["merges"]:
        return "the tokenizer has no merges, and the library writes no empty list of them"
    if cut(parts["pre_tokenizer"]) is None:
        return f"the tokenizer cuts text in a way that is neither that of {' nor of '.join(CUTS)}"
    alphabet = set(_alphabet())
    for token in parts["added_tokens"]:
        text = token["content"]
        if not set(text) <= alphabet or token["lstrip"] or token["rstrip"] or token["single_word"]:
            return f"the format cannot describe the added token {text!r}"
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        return f"the tokenizer has a token {largest}, the model {size} tokens"
    if not isinstance(tokenizer.chat_template, (str, type(None))):
        return "the tokenizer has several chat templates, and transformers' reader of the format knows one"
    if _ends(tokenizer) is None:
        return "the tokenizer puts other tokens around a text than those of its beginning and end"
    return None


def cut(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The name for how text is cut before merging, or None."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    # `trim_offsets` says where tokens lie in the text, not which they are.
    found = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    return next((name for name, known in CUTS.items() if found == known), None)


def write_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Keys of a tokenizer that was not refused, for `gguf.GGUFWriter`."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    types = dict.fromkeys(texts, NORMAL)
    types |= {one["id"]: CONTROL if one["special"] else USER_DEFINED for one in parts["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut(parts["pre_tokenizer"]))
    # Embeddings may have more rows than there are tokens; readers take their number from this list.
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, UNUSED) for index in range(size)])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    )
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    begins, stops = _ends(tokenizer) or (False, False)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(stops)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _ends(tokenizer: Any) -> tuple[bool, bool] | None:
    """Whether a text gets the token of its beginning and that of its end; None: it gets others."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for stops in (False, True):
            first, last = [tokenizer.bos_token_id] * begins, [tokenizer.eos_token_id] * stops
            if whole == [*first, *inner, *last]:
                return begins, stops
    return None


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())
