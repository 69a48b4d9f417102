"""Memory: one cell of a random Llama from loading to evaluation, against the bound of `qfarm.memory`.

The checkpoint is written shard by shard, so that making it takes no more memory than a block. The cell runs in a
process of its own (`qfarm.bench.memory_cell`), which this one watches: anonymous memory is what the process allocated,
pages of files are what it read and what the system may drop. Peaks between two looks are missed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qfarm import environment
from qfarm.errors import InvalidInput, QfarmError

METHODS = ("gptq", "rtn")  # whose memory qfarm.memory counts
LOOK_S = 0.05  # between two looks at the process's memory
PROCESS_BYTES = 256 << 20  # libraries that a cell imports on its way, kernels and buffers of torch (an allowance)
VOCABULARY = 32_000
BLOCKS = 50  # hidden size over the number of blocks, about as Llamas have it
WIDE = 1 << 30  # parameters from which heads are 128 wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    parameters: float = 3e9  # of the model, about
    method: str = "gptq"
    samples: int = 2  # calibration windows
    length: int = 512  # tokens per window, of calibration and evaluation
    windows: int = 2  # evaluation windows
    folder: str | None = None  # where the checkpoint is made, and kept; None: a temporary folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Bytes; `bound` is of `private`."""

    settings: Settings
    parameters: int
    model: int  # of the checkpoint's tensors
    before: int  # allocated before anything is loaded
    loaded: int  # allocated once the model is loaded
    private: int  # peak of what was allocated
    resident: int  # peak with pages of files
    needs: dict[str, int]  # by part, see qfarm.memory
    allowance: int  # for what the process takes beside the cell's tensors
    bound: int
    seconds: float
    stages: dict[str, float]  # seconds by stage

    @property
    def missed(self) -> bool:
        return self.private > self.bound


def run(settings: Settings, say: Callable[[str], None]) -> Report:
    """Make the model, run the cell, compare. Raises QfarmError when the cell fails, InvalidInput beside Linux."""
    if environment.allocated_host_bytes() is None:
        raise InvalidInput("bench memory: this system does not tell what a process has allocated (RssAnon of Linux)")
    if settings.folder is not None:
        return _measured(settings, Path(settings.folder), say)
    with tempfile.TemporaryDirectory(prefix="qfarm-bench-") as folder:
        return _measured(settings, Path(folder), say)


def _measured(settings: Settings, folder: Path, say: Callable[[str], None]) -> Report:
    config = shape(settings.parameters)
    checkpoint = folder / "model"
    if not (checkpoint / "config.json").is_file():
        say(f"{checkpoint}: writing a random Llama of {settings.parameters:g} parameters ...")
        write_checkpoint(checkpoint, config)
    say("running the cell ...")
    with tempfile.TemporaryDirectory(prefix="cell-", dir=folder) as scratch:
        return _watched(settings, checkpoint, Path(scratch))


def shape(parameters: float) -> dict[str, Any]:
    """A Llama of about so many parameters: blocks of 12 h^2, as many as h / 50."""
    hidden = max(128, 128 * round((BLOCKS * parameters / 12) ** (1 / 3) / 128))
    mlp = 128 * round(hidden * 8 / 3 / 128)
    blocks = (parameters - 2 * VOCABULARY * hidden) / (4 * hidden**2 + 3 * hidden * mlp)
    head = 128 if parameters >= WIDE else 64
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": max(2, round(blocks)),
        "num_attention_heads": hidden // head,
        "num_key_value_heads": hidden // head,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """A random bfloat16 checkpoint with a tokenizer of bytes; a block in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from qfarm.bench.random_model import save_byte_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    weights = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weights.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tables = {name: normal(VOCABULARY, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save("tables.safetensors", {**tables, "model.norm.weight": ones})
    del tables
    shapes = dict.fromkeys((f"self_attn.{role}_proj" for role in "qkvo"), (hidden, hidden))
    shapes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    for index in range(config["num_hidden_layers"]):
        block = {f"{path}.weight": normal(*sizes) for path, sizes in shapes.items()}
        block |= {f"{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
        save(f"block-{index}.safetensors", {f"model.layers.{index}.{name}": values for name, values in block.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    save_byte_tokenizer(folder)
    # Last, since it marks a checkpoint that is whole.
    LlamaConfig(**config, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)


def job_text(settings: Settings, checkpoint: Path) -> str:
    text = f"text: python-docs, length: {settings.length}"
    return (
        f"models: [{json.dumps(str(checkpoint))}]\nmethods: [{settings.method}]\nbits: [w4]\ngroup_sizes: [128]\n"
        f"calibration: {{{text}, samples: {settings.samples}}}\n"
        f"evaluate: [perplexity: {{{text}, windows: {settings.windows}, divergence: false}}]\n"
        "resources: {gpus: 0, cpus: 1}\n"
    )


def _watched(settings: Settings, checkpoint: Path, scratch: Path) -> Report:
    job = scratch / "job.yaml"
    job.write_text(job_text(settings, checkpoint))
    command = [sys.executable, "-m", "qfarm.bench.memory_cell", str(job), str(scratch / "store")]
    started = time.perf_counter()
    with (scratch / "errors").open("w+b") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=os.environ)
        private = resident = 0
        for anonymous, files in _looks(process):
            private, resident = max(private, anonymous), max(resident, anonymous + files)
        assert process.stdout is not None
        answer = process.stdout.read()
        errors.seek(0)
        if process.wait():
            tail = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise QfarmError(f"bench memory: the cell failed: {' '.join(tail)}")
    found = json.loads(answer)
    parts = found["needs"]
    return Report(
        settings=settings,
        parameters=found["parameters"],
        model=parts["model"],
        before=found["before"],
        loaded=found["loaded"],
        private=private,
        resident=max(resident, found["peak_host_bytes"] or 0),
        needs=parts,
        allowance=PROCESS_BYTES,
        bound=found["before"] + PROCESS_BYTES + found["private"],
        seconds=time.perf_counter() - started,
        stages=found["stages"],
    )


def _looks(process: subprocess.Popen[bytes]) -> Iterator[tuple[int, int]]:
    """(anonymous, files) bytes that are resident, until the process ends."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except FileNotFoundError:
            return
        if "RssAnon" in fields:  # a process that ends has none
            yield _bytes(fields["RssAnon"]), _bytes(fields["RssFile"])
        time.sleep(LOOK_S)


def _bytes(field: str) -> int:
    return 1024 * int(field.split()[0])
