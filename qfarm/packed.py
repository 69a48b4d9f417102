"""Packed: the files of a pack (qfarm.pack) as the store reads them."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterable

from qfarm.errors import StoreError


class PackedFolder:
    """The files of a pack, as qfarm.publish.LocalFolder gives those of a folder; nothing can be written."""

    def __init__(self, path: str) -> None:
        self.root = path
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise StoreError(f"{path}: no pack, or a torn one: {error}") from error
        self._names = frozenset(self._archive.namelist())

    def make(self, folders: Iterable[str]) -> None:
        raise self._read_only()

    def publish(self, path: str, data: bytes) -> bool:
        raise self._read_only()

    def remove(self, path: str) -> None:
        raise self._read_only()

    def read(self, path: str) -> bytes:
        """The whole file. Raises OSError."""
        try:
            return self._archive.read(path)
        except KeyError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        except zipfile.BadZipFile as error:  # a wrong CRC
            raise OSError(errno.EIO, str(error), path) from error

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted, without what lies deeper."""
        start = f"{folder}/" if folder else ""
        below = (name.removeprefix(start) for name in self._names if name.startswith(start))
        return sorted(name for name in below if name and "/" not in name)

    def stamps(self, folder: str) -> dict[str, str]:
        """What marks each file of a folder: its checksum."""
        return {name: f"{self._archive.getinfo(f'{folder}/{name}').CRC:08x}" for name in self.names(folder)}

    def age(self, path: str) -> float | None:
        return None

    def exists(self, path: str) -> bool:
        return path in self._names

    def _read_only(self) -> StoreError:
        return StoreError(f"{self.root}: a pack is read only; `qfarm store merge STORE PACK` makes a store of it")
