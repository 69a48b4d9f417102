"""Objects: the files of a store in an object store (`s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`), through fsspec.

An object appears whole or not at all, and a conditional put creates it only where there is none: that is `publish`.
Whether a service honours the condition is tried before the first write, since some that look like S3 overwrite
instead. Credentials come from the environment, as the service's own tools find them; a URL that holds any is refused.
Tried against moto's S3 only: neither the real S3 nor Google's service has been seen.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import re
import secrets
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

from qfarm.errors import StoreError, StoreFull
from qfarm.publish import ASIDE_SUFFIX

logger = logging.getLogger(__name__)

EXTRAS = {"s3": "s3", "gs": "gs"}  # schemes, and the extra that brings what they need
CONFLICT = "ConditionalRequestConflict"  # S3's answer 409 while another put of the same key is under way


def is_url(location: object) -> bool:
    """Whether this names an object store rather than a folder; a Path has made one slash of the two."""
    # A drive letter is no scheme.
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(location)) is not None


def check_url(location: str) -> str:
    """The URL without a slash at its end. Raises StoreError for another scheme, no bucket, or credentials within."""
    parts = urllib.parse.urlsplit(location)
    shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # never a password
    if parts.username or parts.password or parts.query or parts.fragment:
        raise StoreError(
            f"{shown}: the URL holds credentials or options, which would end up in logs; use the environment"
        )
    if parts.scheme not in EXTRAS:
        raise StoreError(f"{shown}: no object store that is known; give {' or '.join(f'{s}://' for s in EXTRAS)}")
    if not parts.netloc or any(name in (".", "..") for name in parts.path.split("/")):
        raise StoreError(f"{shown}: not a store's URL; give {parts.scheme}://BUCKET/PREFIX")
    return location.rstrip("/")


class ObjectFolder:
    """Objects below one prefix, as qfarm.publish.LocalFolder gives the files of a folder."""

    def __init__(self, url: str, filesystem: Any = None) -> None:
        self.root = check_url(url)
        self._fs = filesystem if filesystem is not None else _filesystem(self.root)
        self._prefix = self.root.partition("://")[2]
        self._tried = False  # that a put can be conditional

    def make(self, folders: Iterable[str]) -> None:
        """There are no folders; refuses a service that overwrites what must be created once. Raises StoreError."""
        if self._tried:
            return
        probe = f".probe-{secrets.token_hex(8)}{ASIDE_SUFFIX}"
        try:
            first, second = self._create(probe, b"1"), self._create(probe, b"2")
        finally:
            self.remove(probe)
        if not first or second:
            raise StoreError(
                f"{self.root}: this service overwrites objects instead of creating them once; no store can be here"
            )
        self._tried = True

    def publish(self, path: str, data: bytes) -> bool:
        """Create an object. False if the name is taken; then nothing has changed.

        Raises StoreFull without permission; OSErrors pass.
        """
        try:
            # A put whose answer was lost is sent again, and then finds itself there.
            return self._create(path, data) or self.read(path) == data
        except PermissionError as error:
            raise StoreFull(f"{self.root}/{path}: {error.strerror or error}") from error

    def _create(self, path: str, data: bytes) -> bool:
        for last in (False, True):
            try:
                with _os_errors():
                    self._fs.pipe_file(self._key(path), data, mode="create")
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if CONFLICT not in str(error) or last:
                    raise
                if self.exists(path):
                    return False
        raise AssertionError("unreachable")

    def read(self, path: str) -> bytes:
        """The whole object. Raises OSError."""
        with _os_errors():
            data: bytes = self._fs.cat_file(self._key(path))
        return data

    def names(self, folder: str) -> list[str]:
        """Names below a prefix, sorted, without what lies deeper; none if there is nothing. Raises OSError."""
        return sorted(name for name, _ in self._listed(folder))

    def stamps(self, folder: str) -> dict[str, str]:
        """What marks each object below a prefix: its size and its tag."""
        return {name: f"{info.get('size')}-{_tag(info)}" for name, info in self._listed(folder)}

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each object below a prefix. Raises OSError."""
        return {name: int(info.get("size") or 0) for name, info in self._listed(folder)}

    def _listed(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            with _os_errors():
                found = self._fs.ls(self._key(folder), detail=True)
        except FileNotFoundError:
            return
        for info in found:
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            if str(info["name"]).strip("/") != self._key(folder).strip("/"):  # a marker of the "folder" itself
                yield name, info

    def age(self, path: str) -> float | None:
        """Seconds since an object was written, by the clock of this machine; None if it is gone."""
        try:
            with _os_errors():
                written: datetime.datetime = self._fs.modified(self._key(path))
        except OSError:
            return None
        return (datetime.datetime.now(datetime.UTC) - written.astimezone(datetime.UTC)).total_seconds()

    def exists(self, path: str) -> bool:
        with _os_errors():
            return bool(self._fs.exists(self._key(path)))

    def remove(self, path: str) -> None:
        """Remove an object if that is possible."""
        with contextlib.suppress(OSError), _os_errors():
            self._fs.rm_file(self._key(path))

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if path else self._prefix


def _filesystem(url: str) -> Any:
    """Without caches of listings: others write at the same time. Raises StoreError where a package is missing."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise StoreError(f"{url}: needs another package; run: pip install 'qfarm[{EXTRAS[scheme]}]'") from None


def _tag(info: dict[str, Any]) -> str:
    found = next(
        (info[name] for name in ("ETag", "etag", "md5Hash", "LastModified", "updated", "created") if name in info), ""
    )
    return str(found)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """What a service's client raises beside OSError (no connection, no credentials), as an OSError of one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # botocore's and google's exceptions share no base with each other
        raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
