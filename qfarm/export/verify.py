"""Verify: an exported folder against its manifest, and what plain transformers makes of it in a fresh process."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qfarm.errors import NotVerified
from qfarm.export import manifest, reload
from qfarm.quantized import QuantizedWeight, UniformWeight

# Of the largest logit. The weights are compared bit by bit; this is for what else the reader does: norms, positions,
# the head. Sums of the same numbers in another order stay below it.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a fresh process made of a checkpoint."""

    logits: Tensor  # [tokens, vocabulary] float32
    dtype: str
    weights: Mapping[str, str]  # SHA-256 of each quantized layer's weight, by module
    ids: list[int]  # token ids of the text


def read_afresh(folder: Path, ids: Sequence[int], modules: Sequence[str], text: str, device: str) -> Reading:
    """Load the folder with plain transformers in another process. Raises NotVerified when that fails."""
    with tempfile.TemporaryDirectory() as scratch:
        request, result = Path(scratch) / "request.json", Path(scratch) / "result.safetensors"
        asked = {"ids": list(ids), "modules": list(modules), "text": text, "device": device}
        request.write_text(json.dumps(asked | {"threads": torch.get_num_threads()}))
        # -P: the script's own folder is not on its path, so that it imports nothing of ours.
        command = [sys.executable, "-P", str(Path(reload.__file__)), str(folder), str(request), str(result)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise NotVerified(f"a fresh process cannot load it: {last}")
        with safe_open(result, framework="pt") as file:
            found, logits = json.loads(file.metadata()["found"]), file.get_tensor("logits")
    return Reading(logits=logits, dtype=found["dtype"], weights=found["weights"], ids=found["ids"])


def weight_hash(quantized: QuantizedWeight, dtype: torch.dtype) -> str:
    """Of the weight as a reader multiplies with it."""
    return reload.digest(quantized.dequantize().to(dtype))


def codes_hash(quantized: QuantizedWeight) -> str | None:
    """Of codes, scales and zeros in our own layout, the same whatever the format; None where there are no such."""
    if not isinstance(quantized, UniformWeight):
        return None
    parts = [quantized.codes, quantized.scale, quantized.zero, quantized.g_idx]
    return hashlib.sha256("".join(reload.digest(part) for part in parts if part is not None).encode()).hexdigest()


def compare_weights(expected: Mapping[str, str], reading: Reading, dtype: str) -> list[str]:
    """Faults, one line each."""
    if reading.dtype != dtype:
        return [f"loads in {reading.dtype}, not in {dtype}"]
    wrong = [module for module, digest in expected.items() if reading.weights.get(module) != digest]
    shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
    return [f"{len(wrong)} of {len(expected)} layers read back with other weights: {shown}"] if wrong else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    faults: tuple[str, ...]
    steps: tuple[str, ...]  # what was checked, or why it could not be


def verify(folder: Path) -> Verdict:
    """Hold a folder against its manifest, then load it afresh and compare every quantized weight bit by bit.

    Raises InvalidInput when the folder is no export.
    """
    told = manifest.read(folder)
    faults = manifest.faults(folder, told)
    steps = [f"hashes of {len(told['tensors'])} tensors and {len(told['files'])} other files"]
    own = bool(told["reader"].get("own"))
    missing = [] if own else [name for name in told["reader"]["packages"] if not _installed(name)]
    if faults:
        steps.append("not loaded: it is damaged")
    elif missing:
        steps.append(f"not loaded: {', '.join(missing)} not installed")
    else:
        expected = {module: facts["weight"] for module, facts in told["layers"].items()}
        try:
            reading = read_afresh(folder, told["text"]["ids"], list(expected), told["text"]["text"], "cpu")
            faults += compare_weights(expected, reading, told["reader"]["dtype"])
            if reading.ids[: len(told["text"]["ids"])] != told["text"]["ids"]:
                faults.append("its tokenizer makes other tokens of the text")
        except NotVerified as error:
            faults.append(str(error))
        how = "unpacked by a reader of our own" if own else "loaded"
        steps.append(f"weights of {len(expected)} layers, {how} in a fresh process")
    return Verdict(faults=tuple(faults), steps=tuple(steps))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def difference(reference: Tensor, found: Tensor) -> dict[str, Any]:
    """How logits [tokens, vocabulary] differ: largest deviation, mean KL in nats, share of equal first choices."""
    reference, found = reference.cpu().double(), found.cpu().double()
    p, q = reference.log_softmax(-1), found.log_softmax(-1)
    return {
        "max_abs": float((reference - found).abs().max()),
        "largest_logit": float(reference.abs().max()),
        "mean_kl": max(0.0, float((p.exp() * (p - q)).sum(-1).mean())),
        "agreement": float((reference.argmax(-1) == found.argmax(-1)).double().mean()),
    }
