"""Publish: files that appear in a folder whole, once and durably, or not at all.

A file is written aside under a name that no reader matches, flushed to disk, and then linked to its final name. A link,
unlike a rename, refuses a name that is taken: of many writers exactly one wins, and nothing half-written ever has a
final name. `LocalFolder` is all that the store knows of storage; an object store needs the same few operations, with
one conditional put as `publish`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Iterable

from qfarm.errors import StoreError, StoreFull

logger = logging.getLogger(__name__)

ASIDE_SUFFIX = ".aside"
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NO_PERMISSION = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# What link(2) says on file systems without links; FUSE mounts add ENOSYS.
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS})


class LocalFolder:
    """Files below one local folder, named by paths relative to it with "/" between the names."""

    def __init__(self, root: str) -> None:
        self.root = root

    def make(self, folders: Iterable[str]) -> None:
        """Create these folders, "" for the one itself, where they are missing. Raises OSError."""
        for folder in folders:
            os.makedirs(self._absolute(folder), exist_ok=True)
            _sync_folder(os.path.dirname(self._absolute(folder)))

    def publish(self, path: str, data: bytes) -> bool:
        """Make `data` visible under `path`, durably. False if the name is taken; then nothing has changed.

        Raises StoreFull, with nothing left behind, when there is no space or no permission, StoreError when the folder
        is gone; other OSErrors pass.
        """
        final = self._absolute(path)
        try:
            return _publish(final, data)
        except OSError as error:
            if error.errno in NO_SPACE | NO_PERMISSION:
                raise StoreFull(f"{final}: {error.strerror}; {_free_bytes(self.root)}") from error
            if error.errno == errno.ENOENT:
                raise StoreError(
                    f"{os.path.dirname(final)}: the folder is gone; was the store moved or deleted?"
                ) from error
            raise

    def read(self, path: str) -> bytes:
        """The whole file. Raises OSError."""
        with open(self._absolute(path), "rb") as file:
            return file.read()

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted, of files written aside as well; none if it does not exist. Raises OSError."""
        try:
            return sorted(os.listdir(self._absolute(folder)))
        except FileNotFoundError:
            return []

    def stamps(self, folder: str) -> dict[str, str]:
        """What marks each file of a folder: its size and the time when it was written. Raises OSError."""
        found = {}
        try:
            with os.scandir(self._absolute(folder)) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # written aside, and published meanwhile
                        status = entry.stat()
                        found[entry.name] = f"{status.st_size}-{status.st_mtime_ns}"
        except FileNotFoundError:
            return {}
        return found

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file of a folder. Raises OSError."""
        return {name: int(stamp.partition("-")[0]) for name, stamp in self.stamps(folder).items()}

    def age(self, path: str) -> float | None:
        """Seconds since a file was written, by the clock of this machine; None if it is gone."""
        try:
            return time.time() - os.stat(self._absolute(path)).st_mtime
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.lexists(self._absolute(path))

    def remove(self, path: str) -> None:
        """Remove a file if that is possible."""
        with contextlib.suppress(OSError):
            os.unlink(self._absolute(path))

    def _absolute(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root


def is_aside(name: str) -> bool:
    """Whether a file of this name is one that its writer has not published yet, or never will."""
    return name.endswith(ASIDE_SUFFIX)


def _publish(final: str, data: bytes) -> bool:
    folder, name = os.path.split(final)
    # The dot hides it from globs and from Arrow's data sets as well.
    aside = os.path.join(folder, f".{name}.{secrets.token_hex(4)}{ASIDE_SUFFIX}")
    try:
        _write_new(aside, data)
        won = _link(aside, final)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)
    if won is None:
        won = _publish_unlinked(final, data)
    if won:
        _sync_folder(folder)
    return won


def _link(aside: str, final: str) -> bool | None:
    """Whether `aside` got the final name; None if the file system knows no links."""
    try:
        os.link(aside, final)
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and the repetition finds our own link.
        return os.path.samefile(aside, final)
    except OSError as error:
        if error.errno in NO_LINKS:
            return None
        raise
    return True


def _publish_unlinked(final: str, data: bytes) -> bool:
    """Exclusive but not atomic: a writer killed here leaves a torn file, which its reader must be able to tell."""
    try:
        _write_new(final, data)
    except FileExistsError:
        return False
    return True


def _write_new(path: str, data: bytes) -> None:
    """Write and flush a file that must not exist; removed again when that fails."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _sync_folder(folder: str) -> None:
    """Flush a folder's entries. Never raises: the file is visible by now, and others may have read it already."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # EINVAL: file systems that cannot flush a folder, and order its entries themselves.
        if error.errno != errno.EINVAL:
            logger.warning("%s: could not be flushed to disk: %s", folder, error)


def _free_bytes(folder: str) -> str:
    try:
        status = os.statvfs(folder)
    except OSError:
        return "free bytes unknown"
    return f"{status.f_bavail * status.f_frsize} bytes free"
