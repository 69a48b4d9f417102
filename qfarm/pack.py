"""Pack: a store as one file, to be sent, verified and merged.

A pack is a zip archive without compression (parts are compressed) of the store's format file, its manifests, and the
parts that they name; leftovers of killed writers stay behind. Files stand in the order of their names with no time, so
the same results give the same bytes. A pack is opened like a store, and read only: `qfarm report`, `show`, `diff` and
`store check` take it as it is. Nothing is ever unpacked to a path that the archive names: merging reads manifests and
publishes what they promise, after comparing it with its hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from qfarm.errors import StoreError
from qfarm.publish import ASIDE_SUFFIX
from qfarm.store import FORMAT_FILE, Store

NO_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip archive can hold


class Packed(NamedTuple):
    results: int  # manifests
    bytes: int
    sha256: str


class Merged(NamedTuple):
    """Publications of the other stores."""

    added: int
    same: int  # were there already, with the same contents
    other: int  # were there already with other contents: the first wins, as everywhere


def pack(store: Store, out: Path) -> Packed:
    """Write a store to one file, whole or not at all.

    Raises StoreError for a part that is not what its manifest promises, and when `out` exists or cannot be written.
    """
    if out.exists():
        raise StoreError(f"{out}: exists; a pack is never written over")
    aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}{ASIDE_SUFFIX}")
    try:
        with zipfile.ZipFile(aside, "x", zipfile.ZIP_STORED) as archive:
            results = _write(store, archive)
        found = Packed(results, aside.stat().st_size, _digest(aside))
        os.link(aside, out)  # unlike a rename, a link refuses a name that was taken meanwhile
    except OSError as error:
        raise StoreError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return found


def _write(store: Store, archive: zipfile.ZipFile) -> int:
    def add(name: str, data: bytes) -> None:
        archive.writestr(zipfile.ZipInfo(name, NO_TIME), data)

    add(FORMAT_FILE, store.format_file())
    manifests = sorted(store.publications(), key=lambda manifest: manifest.path)
    for manifest in manifests:
        add(manifest.path, manifest.dump())
        for part in manifest.parts:
            add(part.path, store.bytes_of(part))
    return len(manifests)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def merge(store: Store, others: Iterable[Store]) -> Merged:
    """Publish in a store what others hold and it lacks; everything is compared with its hash first.

    Raises StoreError for a part that is not what its manifest promises; what was merged before it stays, and is whole.
    """
    counts = {"added": 0, "same": 0, "other": 0}
    for other in others:
        for manifest in other.publications():
            counts[store.adopt(manifest, other)] += 1
    return Merged(**counts)
