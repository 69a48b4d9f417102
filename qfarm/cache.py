"""Cache: files that can be made again (converted models, baselines' hidden states), shared by processes of a machine.

Lives in `QFARM_CACHE`, else `~/.cache/qfarm`. Entries are content-addressed and published by rename, so that a crash
while writing leaves nothing behind that a reader would take for an entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from qfarm.errors import InvalidInput

logger = logging.getLogger(__name__)

HASH_BLOCK = 1 << 20
SETTLED_NS = 2_000_000_000  # a file may change twice within a tick of its file system's clock (FAT: 2 s)
DEFAULT_LIMIT = 64 << 30  # bytes of hidden states kept; QFARM_CACHE_LIMIT overrides


def root() -> Path:
    given = os.environ.get("QFARM_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "qfarm"


def entry(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `kind/key`, made by `make(empty folder)` if it is not there; one process makes it, others wait."""
    final = root() / kind / key
    if final.exists():
        return final
    lock = filelock.FileLock(f"{final}.lock")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise InvalidInput(f"{root()}: the cache cannot be written: {error.strerror}; set QFARM_CACHE") from error
    try:
        if not final.exists():
            with _aside(final) as part:
                part.mkdir()
                make(part)
                part.rename(final)
    finally:
        lock.release()
    return final


def publish_file(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """Write `kind/name` aside and rename it into place, replacing what was there; then trim the kind to its limit."""
    final, most = root() / kind / name, limit()
    final.parent.mkdir(parents=True, exist_ok=True)
    with _aside(final) as part:
        write(part)
        part.replace(final)
    _trim(final.parent, most, keep=final)
    return final


def limit() -> int:
    """Bytes of a kind that are kept. Raises InvalidInput for a limit that is no number."""
    given = os.environ.get("QFARM_CACHE_LIMIT")
    if not given:
        return DEFAULT_LIMIT
    if not given.isdecimal():
        raise InvalidInput(f'QFARM_CACHE_LIMIT: "{given}" is no number of bytes, such as {DEFAULT_LIMIT}')
    return int(given)


def find_file(kind: str, name: str) -> Path | None:
    """The cached file, marked as used just now; None if it is not there or cannot be read."""
    path = root() / kind / name
    try:
        os.utime(path)
    except OSError:  # another's file in a shared cache can be used, though not marked
        return path if os.access(path, os.R_OK) else None
    return path


@contextlib.contextmanager
def _aside(final: Path) -> Iterator[Path]:
    part = final.with_name(f".{final.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def _trim(folder: Path, limit: int, keep: Path) -> None:
    """Remove the files used longest ago until the folder is below its limit."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may trim at the same time
            if path.is_file() and not path.name.endswith((".part", ".lock")):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered by path, size, inode and time of change, once that time is past."""
    stat = path.stat()
    mark = f"{path.resolve()}:{stat.st_size}:{stat.st_ino}:{stat.st_ctime_ns}"
    name = hashlib.sha256(mark.encode()).hexdigest()
    known = root() / "hashes" / name
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads(known.read_text())["sha256"])
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    value = digest.hexdigest()
    if abs(time.time_ns() - stat.st_ctime_ns) < SETTLED_NS:
        return value
    try:
        publish_file("hashes", name, lambda part: _write_json(part, {"sha256": value, "path": str(path)}))
    except OSError as error:
        logger.warning("%s: the hash of %s cannot be remembered: %s", root(), path, error.strerror)
    return value


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
