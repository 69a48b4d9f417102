"""Mapped: weights as pages of files, so that the workers of a machine share one copy of a model.

transformers maps safetensors and keeps what it maps wherever a tensor has the wanted dtype already: such a parameter
costs a process nothing, and the system may drop its pages and read them again. Where the checkpoint has another dtype
every worker would hold a converted copy of its own; therefore the files are converted once into the cache, and the
converted files are mapped. Rounding is the same, so are all numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from qfarm import cache
from qfarm.models.reference import ModelFacts

CONVERTED = "converted"  # cache folder
SMALL_BYTES = 64 << 20  # a model up to this size is converted by each worker for itself (an unpublished value)
SHARD_BYTES = 1 << 28  # of converted tensors that are held in memory at a time
INDEX = "model.safetensors.index.json"
CONFIGURATIONS = ("config.json", "generation_config.json")
FLOAT_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in a file's header
FLOATS = {"F64", *FLOAT_NAMES.values()}


def in_dtype(facts: ModelFacts, dtype: torch.dtype) -> tuple[str, str | None, str | None]:
    """Where transformers should load the model from: location, revision, and a note where workers need own copies.

    The files themselves where their tensors have the dtype, else a converted copy in the cache.
    """
    files = checkpoint_files(facts)
    size = dtype.itemsize * sum(_numbers_to_convert(path, dtype) for path in files)
    if size <= SMALL_BYTES:
        return facts.location, facts.revision, None
    key = hashlib.sha256(f"{facts.fingerprint} {dtype}".encode()).hexdigest()
    free = _free_bytes(cache.root() / CONVERTED / key)
    if free is not None and free < 2 * size:
        need = (
            f"{2 * size >> 20} MiB are wanted for weights in {str(dtype).removeprefix('torch.')}, {free >> 20} are free"
        )
        return facts.location, facts.revision, f"the model is not shared with other workers: {cache.root()}: {need}"
    folder = cache.entry(CONVERTED, key, lambda part: _convert(facts, files, part, dtype))
    return str(folder), None, None


def checkpoint_files(facts: ModelFacts) -> list[Path]:
    """The safetensors files that transformers loads; none where it has to look for others."""
    whole = _file(facts, "model.safetensors")
    if whole is not None:
        return [whole]
    index = _file(facts, INDEX)
    if index is None:
        return []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path for path in (_file(facts, name) for name in names) if path is not None]


def _file(facts: ModelFacts, name: str) -> Path | None:
    found = cached_file(facts.location, name, revision=facts.revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _numbers_to_convert(path: Path, dtype: torch.dtype) -> int:
    """Floating-point numbers of a file that a model in this dtype cannot use as they lie."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return sum(math.prod(entry["shape"]) for entry in entries if entry["dtype"] in FLOATS - {FLOAT_NAMES[dtype]})


def _free_bytes(final: Path) -> int | None:
    """Room for the cache's entry; None where it is there already."""
    if final.exists():
        return None
    return shutil.disk_usage(next(folder for folder in final.parents if folder.exists())).free


def _convert(facts: ModelFacts, files: Sequence[Path], folder: Path, dtype: torch.dtype) -> None:
    """The checkpoint with every floating-point tensor in the dtype, shard by shard."""
    shards = []
    for shard in _shards(files, dtype):
        shards.append(list(shard))
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
    weights = {name: f"{number}.safetensors" for number, names in enumerate(shards, 1) for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    for name in CONFIGURATIONS:
        path = _file(facts, name)
        if path is not None:
            shutil.copyfile(path, folder / name)


def _shards(files: Sequence[Path], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The converted tensors, about SHARD_BYTES at a time."""
    shard: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  # not a mapping
                tensor = stream.get_tensor(name)
                shard[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
                if sum(one.nbytes for one in shard.values()) >= SHARD_BYTES:
                    yield shard
                    shard = {}
    if shard:
        yield shard
