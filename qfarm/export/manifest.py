"""Manifest: `qfarm_export.json`, the hashes by which damage to an exported checkpoint is found.

One flipped bit of one code moves no score that anybody could see, so every tensor has its hash. In safetensors files
tensors are hashed, not the file: a copy that was cut into other shards still verifies. A GGUF file, whose keys count as
much as its tensors, is hashed too.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qfarm.errors import InvalidInput

NAME, FORMAT = "qfarm_export.json", 1
FREE = (NAME, "README.md", "model.safetensors.index.json")  # a card may be edited, and an index follows the shards


def hashes(folder: Path) -> dict[str, Any]:
    """Of every tensor and of every file that is no safetensors file."""
    tensors = {name: facts for path in sorted(folder.glob("*.safetensors")) for name, facts in _tensors(path)}
    tensors |= {name: facts for path in sorted(folder.glob("*.gguf")) for name, facts in _blocks(path)}
    others = [path for path in sorted(folder.iterdir()) if path.suffix != ".safetensors" and path.name not in FREE]
    return {"tensors": tensors, "files": {path.name: _file_hash(path) for path in others if path.is_file()}}


def faults(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """How the folder's content differs from what the manifest says, one line each."""
    try:
        found = hashes(folder)
    except (ValueError, KeyError, IndexError, OSError) as error:
        return [f"{folder}: cannot be read: {error}"]
    lines = []
    for kind, what in (("tensors", "tensor"), ("files", "file")):
        expected, here = manifest[kind], found[kind]
        lines += [f"{what} {name}: missing" for name in expected if name not in here]
        lines += [f"{what} {name}: not in the manifest" for name in here if name not in expected]
        lines += [f"{what} {name}: altered" for name in expected if name in here and here[name] != expected[name]]
    return lines


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an export. Raises InvalidInput."""
    try:
        found = json.loads((folder / NAME).read_text())
        version = int(found["format_version"])
        _ = (found["tensors"], found["files"], found["layers"], found["text"]["ids"])
        _ = (found["reader"]["dtype"], found["reader"]["packages"])
    except OSError as error:
        raise InvalidInput(f"{folder}: no {NAME} ({error.strerror}): not a folder that `qfarm export` wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder / NAME}: torn, or no manifest of an export ({error})") from error
    if version > FORMAT:
        raise InvalidInput(f"{folder / NAME}: written by a newer qfarm (version {version} of the manifest)")
    return dict(found)


def write(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps({"format_version": FORMAT, **content}, indent=1, sort_keys=True, allow_nan=False)
    (folder / NAME).write_text(text + "\n")


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, dtype, shape and SHA-256 of the raw bytes of each tensor of a safetensors file."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, facts in sorted(header.items()):
            if name != "__metadata__":
                first, last = (8 + length + offset for offset in facts["data_offsets"])
                digest = hashlib.sha256(memoryview(data)[first:last]).hexdigest()
                yield name, {"dtype": facts["dtype"], "shape": facts["shape"], "sha256": digest}


def _blocks(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, type, shape and SHA-256 of the raw bytes of each tensor of a GGUF file."""
    from gguf import GGUFReader

    for tensor in sorted(GGUFReader(path).tensors, key=lambda one: one.name):
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        shape = [int(size) for size in reversed(tensor.shape)]
        yield tensor.name, {"dtype": tensor.tensor_type.name, "shape": shape, "sha256": digest}


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
