"""Manifest: a small JSON file that says which Parquet parts make up one publication.

A manifest becomes visible last, under a name that only its first writer gets, and with a checksum of itself: where
that name cannot be given to a finished file, a writer that dies leaves a torn one, and readers can tell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from qfarm import record
from qfarm.errors import StoreError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one manifest stands for: the ids in its name (the cell's first, if it has one) and its parts' tables."""

    ids: tuple[str, ...]
    tables: tuple[str, ...]


KINDS = {
    "cell": Kind(("cell_id",), ("cells", "layers")),
    "evaluation": Kind(("cell_id", "eval_id"), ("metrics", "documents", "analysis")),
    "attempt": Kind(("cell_id", "attempt_id"), ("attempts",)),
    "kernels": Kind(("run_id",), ("kernels",)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One Parquet file, as its manifest describes it."""

    table: str
    path: str  # below the store's folder
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parts of one publication. A table without rows has no part."""

    format: int
    kind: str
    ids: Mapping[str, str]
    created: str  # UTC, ISO 8601
    parts: tuple[Part, ...]

    @property
    def path(self) -> str:
        return manifest_path(self.kind, tuple(self.ids[name] for name in KINDS[self.kind].ids))

    def dump(self) -> bytes:
        fields = dataclasses.asdict(self)
        return json.dumps(fields | {"checksum": checksum(fields)}, indent=1).encode()

    @classmethod
    def load(cls, data: bytes) -> Manifest:
        """Raises ValueError for anything but a whole manifest, StoreError for one of a newer format."""
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("checksum", None) != checksum(fields):
            raise ValueError("its checksum is wrong")
        if fields["format"] > record.FORMAT:
            raise StoreError(newer(fields["format"]))
        return cls(**fields | {"parts": tuple(Part(**part) for part in fields["parts"])})


def manifest_path(kind: str, key: tuple[str, ...]) -> str:
    return f"manifests/{kind}/{'.'.join(key)}.json"


def key_of(kind: str, name: str) -> tuple[str, ...]:
    """The ids in a manifest's name; () for any other file."""
    *key, ending = name.split(".")
    return tuple(key) if ending == "json" and len(key) == len(KINDS[kind].ids) and all(key) else ()


def checksum(fields: Mapping[str, Any]) -> str:
    """Of a manifest's other fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def newer(version: int) -> str:
    return f"the store has format {version}, this version of qfarm reads up to {record.FORMAT}; update qfarm"
