"""Generation: the rows of many small publications in a few large files, which readers take in their place.

    STORE/generations/NUMBER.json                     names the files below, with checksum
    STORE/generations/NUMBER.TABLE.TOKEN.parquet      the rows of a table, in the order of their manifests' names
    STORE/generations/NUMBER.covered.TOKEN.parquet    which manifests they come from, and what marked each (its stamp)

Manifests and parts stay where they are, and stay what counts: a generation only saves opening them one by one. It is
used as long as each manifest that it covers is there with the same stamp (size and time of change, or an object's tag),
so a result that was deleted to be measured again is not served from it. What was published later is read as always.
The number is taken exclusively; the generation before stays for readers that have begun with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qfarm import record
from qfarm.errors import StoreError
from qfarm.manifest import KINDS, Manifest, Part, checksum, key_of, newer

if TYPE_CHECKING:
    from qfarm.store import Folder, Store

logger = logging.getLogger(__name__)

FOLDER = "generations"
COVERED = "covered"
KEPT = 2  # generations: the newest, and the one that readers may be at
BATCH = 2_000  # publications whose rows are held at once
ROW_GROUP = 100_000  # rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    number: int
    parts: tuple[Part, ...]
    covered: Mapping[str, frozenset[str]]  # by kind: the names of its manifests

    def of(self, table: str) -> list[Part]:
        return [part for part in self.parts if part.table == table]


def latest(folder: Folder) -> Generation | None:
    """The newest generation, if everything that it covers is as it was. Raises OSError, StoreError."""
    numbers = _numbers(folder)
    if not numbers:
        return None
    path = f"{FOLDER}/{numbers[-1]:08}.json"
    try:
        parts = _load(folder.read(path))
        [index] = [part for part in parts if part.table == COVERED]
        covered = pq.read_table(pa.BufferReader(verified(folder, index))).to_pydict()
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        logger.warning("%s: passed over, for it is torn or no generation (%s)", path, error)
        return None
    names: dict[str, set[str]] = {kind: set() for kind in KINDS}
    stamps = {kind: folder.stamps(f"manifests/{kind}") for kind in KINDS}
    for kind, name, stamp in zip(covered["kind"], covered["name"], covered["stamp"], strict=True):
        if kind not in KINDS:  # of a later version, as are its tables
            continue
        if stamps[kind].get(name) != stamp:
            logger.warning("%s: not used, for %s/%s has changed since; run `qfarm store compact`", path, kind, name)
            return None
        names[kind].add(name)
    frozen = {kind: frozenset(found) for kind, found in names.items()}
    return Generation(number=numbers[-1], parts=tuple(parts), covered=frozen)


def strangers(folder: Folder) -> list[str]:
    """Files among the generations that none of them names: of a process that died while it compacted, or is at it."""
    names = folder.names(FOLDER)
    known = {f"{FOLDER}/{number:08}.json" for number in _numbers(folder)}
    for path in list(known):
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # torn ones are told of as such
            known |= {part.path for part in _load(folder.read(path))}
    return [f"{FOLDER}/{name}" for name in names if f"{FOLDER}/{name}" not in known]


def verified(folder: Folder, part: Part) -> bytes:
    """A generation's file, compared with its hash. Raises ValueError, OSError."""
    data = folder.read(part.path)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise ValueError(f"{part.path} was altered")
    return data


def in_order(table: pa.Table, kind: str) -> pa.Table:
    """Rows in the order of their manifests' names, those of one manifest as they stand."""
    ids = [table[name] for name in KINDS[kind].ids]
    names = pc.binary_join_element_wise(*ids, pa.scalar("json"), pa.scalar("."))
    return table.take(pc.sort_indices(names))  # which is stable


def compact(store: Store, folder: Folder) -> tuple[Generation, int] | None:
    """Publish a new generation of all that is published now; None when another process did meanwhile.

    The second is its size in bytes. Torn manifests are passed over. Raises StoreError for a part that is not what its
    manifest promises.
    """
    folder.make([FOLDER])
    numbers = _numbers(folder)
    number = (numbers[-1] if numbers else 0) + 1
    stamps = {kind: folder.stamps(f"manifests/{kind}") for kind in KINDS}
    covered: dict[str, list[str]] = {kind: [] for kind in KINDS}
    parts: list[Part] = []
    published = False
    try:
        for kind, about in KINDS.items():
            names = [name for name in sorted(stamps[kind]) if key_of(kind, name)]
            sinks = {table: _Sink(table) for table in about.tables}
            for manifest in _whole(store.manifests(kind, names)):
                covered[kind].append(manifest.path.rpartition("/")[2])
                for part in manifest.parts:
                    sinks[part.table].add(store.rows_of(part))
            for sink in sinks.values():
                parts += sink.publish(folder, number)
        index = [(kind, name, stamps[kind][name]) for kind, found in covered.items() for name in found]
        parts.append(_publish(folder, number, COVERED, len(index), _encoded(_index(index))))
        fields = {"format": record.FORMAT, "kind": "generation", "created": record.utc_now()}
        text = json.dumps(_with_checksum(fields | {"parts": [dataclasses.asdict(part) for part in parts]}), indent=1)
        published = folder.publish(f"{FOLDER}/{number:08}.json", text.encode())
    finally:
        if not published:
            for part in parts:
                folder.remove(part.path)
    if not published:
        return None
    for old in numbers[: 1 - KEPT] if KEPT > 1 else numbers:
        _remove(folder, old)
    frozen = {kind: frozenset(found) for kind, found in covered.items()}
    return Generation(number=number, parts=tuple(parts), covered=frozen), sum(part.bytes for part in parts)


def _whole(manifests: Iterable[Manifest | None]) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest is not None)


class _Sink:
    """Collects a table's rows as one Parquet file in memory."""

    def __init__(self, table: str) -> None:
        self.table, self.rows = table, 0
        # Older parts may lack columns, so all are nullable here as they are for readers.
        fields = [field.with_nullable(True) for field in record.schema(table)]
        self.schema = pa.schema(fields, metadata=record.schema(table).metadata)
        self._out = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._out, self.schema, compression="zstd")
        self._held: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        self._held.append(rows)
        if len(self._held) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        merged = pa.concat_tables([self.schema.empty_table(), *self._held], promote_options="permissive")
        self._held = []
        self.rows += merged.num_rows
        self._writer.write_table(
            merged.select(self.schema.names).cast(self.schema).combine_chunks(), row_group_size=ROW_GROUP
        )

    def publish(self, folder: Folder, number: int) -> list[Part]:
        """A table without rows has no file."""
        self._flush()
        self._writer.close()
        if not self.rows:
            return []
        return [_publish(folder, number, self.table, self.rows, self._out.getvalue().to_pybytes())]


def _publish(folder: Folder, number: int, table: str, rows: int, data: bytes) -> Part:
    path = f"{FOLDER}/{number:08}.{table}.{secrets.token_hex(4)}.parquet"
    folder.publish(path, data)
    return Part(table=table, path=path, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _index(rows: Sequence[tuple[str, str, str]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    names = ("kind", "name", "stamp")
    return pa.table({name: pa.array(values, pa.string()) for name, values in zip(names, columns, strict=True)})


def _encoded(table: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd")
    data: bytes = out.getvalue().to_pybytes()
    return data


def _with_checksum(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**fields, "checksum": checksum(fields)}


def _load(data: bytes) -> list[Part]:
    """Raises ValueError, KeyError or TypeError for what is no whole generation, StoreError for a newer format."""
    fields = json.loads(data)
    if not isinstance(fields, dict) or fields.pop("checksum", None) != checksum(fields):
        raise ValueError("its checksum is wrong")
    if fields["format"] > record.FORMAT:
        raise StoreError(newer(fields["format"]))
    parts = [Part(**part) for part in fields["parts"]]
    if not all(re.fullmatch(rf"{FOLDER}/[A-Za-z0-9._]+\.parquet", part.path) for part in parts):
        raise ValueError("it names files elsewhere")
    return parts


def _numbers(folder: Folder) -> list[int]:
    found = (re.fullmatch(r"(\d{8})\.json", name) for name in folder.names(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def _remove(folder: Folder, number: int) -> None:
    """The name that readers look for goes first."""
    names = [name for name in folder.names(FOLDER) if name.startswith(f"{number:08}.")]
    for name in sorted(names, key=lambda name: not name.endswith(".json")):
        folder.remove(f"{FOLDER}/{name}")
