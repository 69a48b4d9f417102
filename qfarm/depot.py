"""Depot: what one machine has computed, for the workers of others, in a place that all of them reach.

`QFARM_SHARED_CACHE` names it: an absolute path on a shared file system, or s3://BUCKET/PREFIX. It stands behind the
machine's own cache: what is missing there is fetched and kept there, what is made is put in both. Names are hashes of
everything that an entry is made of, so it does not matter who was first. An entry begins with the SHA-256 of the rest;
one that was torn is removed and made again. A depot that cannot be reached costs time and a warning, never a cell.

Hessians and other statistics of calibration do not go there: those of an 8B model take tens of GB, which is longer on
the way than one pass over the calibration text.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from qfarm import cache
from qfarm.errors import InvalidInput, QfarmError
from qfarm.objects import ObjectFolder, check_url, is_url
from qfarm.publish import LocalFolder

logger = logging.getLogger(__name__)

VARIABLE = "QFARM_SHARED_CACHE"
DIGEST_BYTES = hashlib.sha256().digest_size


def location() -> str | None:
    """Where the depot is; None without one. Raises InvalidInput for a place that machines cannot share."""
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    if is_url(given):
        return check_url(given)
    if not os.path.isabs(given):
        raise InvalidInput(f'{VARIABLE}: "{given}" is relative; give an absolute path or s3://BUCKET/PREFIX')
    return given


def find(kind: str, name: str) -> Path | None:
    """The file in this machine's cache, fetched if only the depot has it; None if neither does."""
    path, place = cache.find_file(kind, name), location()
    if path is not None or place is None:
        return path
    try:
        folder = _folder(place)
        found = folder.read(f"{kind}/{name}")
        data = memoryview(found)[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != found[:DIGEST_BYTES]:
            logger.warning("%s/%s/%s: torn; it is removed and made again", place, kind, name)
            folder.remove(f"{kind}/{name}")
            return None
    except FileNotFoundError:
        return None
    except (OSError, QfarmError) as error:
        logger.warning("%s: the shared cache cannot be read: %s", place, error)
        return None
    return cache.publish_file(kind, name, lambda part: _write(part, data))


def publish(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """`cache.publish_file`, and a copy for others; then the depot's kind is trimmed to the cache's limit."""
    path, place = cache.publish_file(kind, name, write), location()
    if place is None:
        return path
    data = path.read_bytes()
    try:
        folder = _folder(place)
        folder.make(["", kind])
        folder.publish(f"{kind}/{name}", hashlib.sha256(data).digest() + data)
        _trim(folder, kind, keep=name)
    except (OSError, QfarmError) as error:
        logger.warning("%s: the shared cache cannot be written: %s", place, error)
    return path


def _folder(place: str) -> LocalFolder | ObjectFolder:
    return ObjectFolder(place) if is_url(place) else LocalFolder(place)


def _trim(folder: LocalFolder | ObjectFolder, kind: str, keep: str) -> None:
    """Remove the entries written longest ago until the rest is below the limit; who reads one has it whole already."""
    sizes, limit = folder.sizes(kind), cache.limit()
    total = sum(sizes.values())
    if total <= limit:
        return
    ages = {name: folder.age(f"{kind}/{name}") or 0.0 for name in sizes}
    for name in sorted(sizes, key=lambda name: -ages[name]):
        if total > limit and name != keep:
            folder.remove(f"{kind}/{name}")
            total -= sizes[name]


def _write(part: Path, data: memoryview) -> None:
    with part.open("wb") as file:
        file.write(data)
