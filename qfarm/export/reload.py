"""Reload: what a fresh process makes of an exported checkpoint. A script that knows transformers and nothing of qfarm.

    python -P reload.py FOLDER REQUEST.json RESULT.safetensors

Loads FOLDER as any user would, in the dtype that its configuration states (a GGUF file in float32), reads token ids and
writes the logits, with the SHA-256 of each named layer's weight (as it multiplies) and the text's token ids in the
file's metadata. GPTQ's layout, whose reader transformers does not bring, is unpacked here, by other code than the one
that packed it.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def main(folder: str, request_path: str, result_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder, **file_in(Path(folder)))
    model = load(Path(folder)).to(request["device"]).eval()
    ids = torch.tensor([request["ids"]], device=request["device"])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    weights = {name: digest(model.get_submodule(name).weight) for name in request["modules"]}
    found = {
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "weights": weights,
        "ids": tokenizer(request["text"])["input_ids"],
    }
    save_file({"logits": logits.contiguous()}, result_path, metadata={"found": json.dumps(found)})


def file_in(folder: Path) -> dict[str, str]:
    """What names a GGUF file to transformers, where the folder has one."""
    found = next(folder.glob("*.gguf"), None)
    return {} if found is None else {"gguf_file": found.name}


def load(folder: Path) -> PreTrainedModel:
    file = file_in(folder)
    if file:
        return AutoModelForCausalLM.from_pretrained(folder, **file, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder)
    settings = getattr(config, "quantization_config", None)
    if settings is None or settings["quant_method"] != "gptq":
        return AutoModelForCausalLM.from_pretrained(folder)
    del config.quantization_config
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {part: tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        tensors[f"{module}.weight"] = unpacked(**parts, bits=settings["bits"], format=settings["checkpoint_format"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"unexpected {unexpected}, missing {missing}")
    model.tie_weights()
    return model


def unpacked(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    format: str,
) -> torch.Tensor:
    """The weight [out, in] in float16, as kernels multiply."""
    shifts = range(0, 32, bits)
    mask = 2**bits - 1
    # [in / p, p, out] and [groups, out / p, p]: code i of a word lies i * bits above its low end.
    codes = torch.stack([(qweight >> shift) & mask for shift in shifts], dim=1).flatten(0, 1)  # [in, out]
    zeros = torch.stack([(qzeros >> shift) & mask for shift in shifts], dim=2).flatten(1, 2)  # [groups, out]
    zeros = zeros + (format == "gptq")
    order = g_idx.long()
    return ((codes - zeros[order]).half() * scales[order]).T.contiguous()


def digest(weight: torch.Tensor) -> str:
    data = weight.detach().cpu().reshape(-1).contiguous()
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
