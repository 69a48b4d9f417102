"""Reload: what a fresh process makes of an exported checkpoint. A script that knows transformers and nothing of qfarm.

    python -P reload.py FOLDER REQUEST.json RESULT.safetensors

Loads FOLDER as any user would, in the dtype that its configuration states, reads token ids and writes the logits, with
the SHA-256 of each named layer's weight (as it multiplies) and the text's token ids in the file's metadata.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, request_path: str, result_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(request["device"]).eval()
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


def digest(weight: torch.Tensor) -> str:
    data = weight.detach().cpu().reshape(-1).contiguous()
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
