"""Run: one export from a store's cell to a folder. Written aside, verified there, and renamed only when all is well."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import qfarm
from qfarm.environment import git_commit, package_version
from qfarm.errors import InvalidInput, NotVerified, Unsupported
from qfarm.export import manifest
from qfarm.export.card import model_card
from qfarm.export.formats import Format, asked, dtype_name, instead, layer_problem, quantization_of
from qfarm.export.made import TEXT, Made, Say, make
from qfarm.export.stored import StoredCell
from qfarm.export.verify import BOUNDS, codes_hash, compare_weights, difference, read_afresh, weight_hash
from qfarm.quantized import QuantizedWeight

PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf", "safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, for whoever asked for it."""

    folder: Path
    format: str
    manifest: dict[str, Any]
    notes: tuple[str, ...]


def export(stored: StoredCell, out: str, format: str, data: str | None, command: str, say: Say) -> Exported:
    """Write the cell to the folder `out`, which must not be there yet.

    Raises Unsupported when no format asked for holds the cell, InvalidInput when it cannot be made again here, and
    NotVerified when what was written does not read back; in each case nothing is left behind.
    """
    candidates, refused = asked(format, stored.cell)
    final = Path(out).expanduser().absolute()
    if final.exists() or final.is_symlink():
        raise InvalidInput(f"{out}: is there already; name a new folder")

    def check(module: str, layer: QuantizedWeight) -> None:
        for one in candidates:
            problem = None if one.name in refused else layer_problem(one, module, layer)
            if problem:
                refused[one.name] = problem
        if all(one.name in refused for one in candidates):
            last = candidates[-1].name
            raise Unsupported(f"{last}: {refused[last]}; {instead(last, layer, stored.cell)}")

    with _aside(final) as part:
        made = make(stored, data, check, say)
        chosen = next(one for one in candidates if one.name not in refused)
        say(f"writing {chosen.name}")
        try:
            chosen.write(made, part)
            facts = _facts(made, chosen, command) | manifest.hashes(part)
            facts["sizes"] = _sizes(made, part)
            say("loading it in a fresh process")
            facts["verified"] = _verified(made, chosen, part, facts)
            manifest.write(part, facts)
            (part / "README.md").write_text(model_card(stored, chosen, facts, final.name))
            _settle(part)
            os.rename(part, final)
            _sync(final.parent)
        except OSError as error:
            raise InvalidInput(f"{out}: cannot be written: {error.strerror}") from error
    why = [f"not written as {name}: {problem}" for name, problem in refused.items()]
    left = [f"not included: {site}" for site in chosen.left_out(stored.cell)]
    return Exported(folder=final, format=chosen.name, manifest=facts, notes=(*made.notes, *why, *left))


@contextlib.contextmanager
def _aside(final: Path) -> Iterator[Path]:
    """A folder beside the final one, under a name that nobody takes for it; gone when it was not renamed."""
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
    except OSError as error:
        raise InvalidInput(f"{final.parent}: no folder can be made here: {error.strerror}") from error
    try:
        yield part
    finally:
        if part.exists():
            shutil.rmtree(part)


def _facts(made: Made, chosen: Format, command: str) -> dict[str, Any]:
    stored, reader = made.stored, chosen.reader(made.stored.cell)
    layers = {
        module: {"weight": weight_hash(layer, reader.dtype), "codes": codes_hash(layer)}
        for module, layer in made.quantized.items()
    }
    return {
        "format": chosen.name,
        "cell_id": stored.cell.cell_id,
        "label": stored.cell.label,
        "model": stored.cell.model,
        "fingerprint": stored.cell.fingerprint,
        "quantization": dict(quantization_of(made)),
        "left_alone": {name: one.reason for name, one in made.results.items() if one.solver is None},
        "left_out": chosen.left_out(stored.cell),
        "reader": {
            "dtype": dtype_name(reader.dtype),
            "snippet": reader.snippet,
            "packages": list(reader.packages),
            "own": reader.own,
            "file": reader.file,
        },
        "text": {"text": TEXT, "ids": made.tokens[0].tolist()},
        "layers": layers,
        "command": command,
        "qfarm": qfarm.__version__,
        "commit": git_commit(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "notes": list(made.notes),
    }


def _sizes(made: Made, folder: Path) -> dict[str, int]:
    """Bytes on disk and what they are made of."""
    weights = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    return {
        "weight_files": weights,
        "linear": sum(layer.stored_bytes() for layer in made.quantized.values()),
        "rest": made.stored.row.model_bytes - made.stored.row.linear_bytes,
        "original": _original_bytes(made),
    }


def _original_bytes(made: Made) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in made.loaded.model.parameters())


def _verified(made: Made, chosen: Format, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Load what was written in a fresh process and compare it with the cell. Raises NotVerified."""
    reader = chosen.reader(made.stored.cell)
    with made.reading_in(reader.dtype), chosen.running(made):
        reference = made.logits()
    expected = {module: layer["weight"] for module, layer in facts["layers"].items()}
    reading = read_afresh(folder, facts["text"]["ids"], list(expected), TEXT, made.session.device.type)
    faults = compare_weights(expected, reading, facts["reader"]["dtype"])
    if faults:
        raise NotVerified(f"{chosen.name}: {'; '.join(faults)}; nothing was kept")
    if reading.ids[: len(facts["text"]["ids"])] != facts["text"]["ids"]:
        raise NotVerified(f"{chosen.name}: its tokenizer makes other tokens of a text; nothing was kept")
    same = difference(reference, reading.logits)
    bound = BOUNDS[reader.dtype] * same["largest_logit"]
    if not same["max_abs"] <= bound:
        raise NotVerified(
            f"{chosen.name}: the logits of a fresh process differ from the cell's weights by {same['max_abs']:.3g}, "
            f"above the bound of {bound:.3g}; nothing was kept"
        )
    return {"same_dtype": same | {"bound": bound}, "cell": difference(_cell_logits(made, chosen), reading.logits)}


def _cell_logits(made: Made, chosen: Format) -> Tensor:
    """Of the cell as it was measured, without what the checkpoint leaves out and says so."""
    return made.logits() if chosen.left_out(made.stored.cell) else made.cell_logits()


def _settle(folder: Path) -> None:
    """Readable as the configuration is, whatever a library made of it, and on disk."""
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
