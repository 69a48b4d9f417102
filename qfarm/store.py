"""Store: results that are only ever added, as Parquet parts that manifests name.

    STORE/qfarm-store.json                                   the format
    STORE/manifests/cell/CELL.json                           names the parts of tables cells and layers
    STORE/manifests/evaluation/CELL.EVALUATION.json          of metrics, documents, analysis
    STORE/manifests/attempt/CELL.ATTEMPT.json                of attempts
    STORE/manifests/kernels/RUN.json                         of kernels (`qfarm bench kernels`)
    STORE/parts/TABLE/CELL[.EVALUATION].ATTEMPT.TOKEN.parquet, of kernels RUN.TOKEN.parquet
    STORE/generations/                                       the same rows in few files (qfarm.generation)
    STORE/running/HOST-PID.json                              news of jobs at work (qfarm.beacon); no result

Parts are published first, their manifest last. The first manifest of a name wins, and readers read only what manifests
name, so the work of losers, of stragglers and of writers that died cannot be seen. Anything that reads Parquet reads
the parts; `Store.check` says whether they are what the manifests promise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qfarm import record
from qfarm.errors import StoreError, StoreFull, nearest
from qfarm.generation import FOLDER as GENERATIONS
from qfarm.generation import Generation, compact, in_order, latest, strangers, verified
from qfarm.manifest import KINDS, Manifest, Part, key_of, manifest_path, newer
from qfarm.objects import ObjectFolder, is_url
from qfarm.packed import PackedFolder
from qfarm.publish import NO_SPACE, LocalFolder, is_aside
from qfarm.record import AnalysisRow, AttemptRow, CellRow, DocumentRow, KernelRow, LayerRow, MetricRow

logger = logging.getLogger(__name__)

FORMAT_FILE = "qfarm-store.json"
CHECK_HINT = "run `qfarm store check`"
# 5,000 parts of 150 documents on two cores: 3.7 s with one reader, 2.1 s with two, 2.0 s with four, 2.5 s with eight.
READERS = 4


class Folder(Protocol):
    """Where a store's files are: qfarm.publish.LocalFolder, qfarm.objects.ObjectFolder, or a pack."""

    def make(self, folders: Iterable[str]) -> None: ...
    def publish(self, path: str, data: bytes) -> bool: ...
    def read(self, path: str) -> bytes: ...
    def names(self, folder: str) -> list[str]: ...
    def stamps(self, folder: str) -> dict[str, str]: ...
    def age(self, path: str) -> float | None: ...
    def exists(self, path: str) -> bool: ...
    def remove(self, path: str) -> None: ...


def is_store(location: str) -> bool:
    """Whether there is one, of whatever format. Raises StoreError for a URL that cannot be asked."""
    if not is_url(location):
        return os.path.exists(os.path.join(location, FORMAT_FILE))
    try:
        return Store._at(location)._folder.exists(FORMAT_FILE)
    except OSError as error:
        raise StoreError(f"{location}: the store cannot be read: {error.strerror or error}") from error


class Findings(NamedTuple):
    """What `Store.check` found, one line each."""

    faults: list[str]  # something that a reader needs is missing, altered or unreadable
    leftovers: list[str]  # files of writers that died, or are still at work; no reader ever sees them


class Compacted(NamedTuple):
    """What `Store.compact` made."""

    publications: int
    files: int
    bytes: int


class Store:
    """A store in a folder or an object store. Any number of processes may publish and read at the same time."""

    def __init__(self, location: str, folder: Folder | None = None) -> None:
        self.location = location
        self._folder = folder or LocalFolder(location)
        self._compacted: Generation | None = None
        self._looked = False  # for it

    @classmethod
    def open(cls, location: str | Path, *, create: bool = False) -> Store:
        """The store at `location`: a folder, a pack, or s3://BUCKET/PREFIX; `create` makes it where there is none.

        Raises StoreError when there is no store, when it cannot be read or made, or when its format is newer than ours.
        """
        store = cls._at(location)
        if create:
            store._create()
        store._check_format()
        return store

    @classmethod
    def _at(cls, location: str | Path) -> Store:
        if is_url(location):
            # A Path has made one slash of the two.
            folder = ObjectFolder(str(location).replace(":/", "://", 1) if isinstance(location, Path) else location)
            return cls(folder.root, folder)
        path = os.path.abspath(os.path.expanduser(location))
        return cls(path, PackedFolder(path)) if os.path.isfile(path) and zipfile.is_zipfile(path) else cls(path)

    @property
    def has_files(self) -> bool:
        """Whether its parts are files that other programs can open."""
        return isinstance(self._folder, LocalFolder)

    def publish_cell(self, cell: CellRow, layers: Sequence[LayerRow]) -> bool:
        """Publish a quantized cell. False: somebody was first, and nothing has changed."""
        assert all(layer.cell_id == cell.cell_id for layer in layers)
        ids = {"cell_id": cell.cell_id, "attempt_id": cell.attempt_id}
        return self._publish("cell", ids, {"cells": [cell], "layers": layers})

    def publish_evaluation(
        self,
        cell_id: str,
        eval_id: str,
        attempt_id: str,
        metrics: Sequence[MetricRow],
        documents: Sequence[DocumentRow],
        analysis: Sequence[AnalysisRow] = (),
    ) -> bool:
        """Publish an evaluation of a cell. False: somebody was first, and nothing has changed."""
        rows: list[MetricRow | DocumentRow | AnalysisRow] = [*metrics, *documents, *analysis]
        assert all((row.cell_id, row.eval_id) == (cell_id, eval_id) for row in rows)
        ids = {"cell_id": cell_id, "eval_id": eval_id, "attempt_id": attempt_id}
        return self._publish("evaluation", ids, {"metrics": metrics, "documents": documents, "analysis": analysis})

    def publish_attempt(self, attempt: AttemptRow) -> bool:
        """Publish how an attempt went. False: it is published already, and nothing has changed."""
        ids = {"cell_id": attempt.cell_id, "attempt_id": attempt.attempt_id}
        return self._publish("attempt", ids, {"attempts": [attempt]})

    def publish_kernels(self, run_id: str, kernels: Sequence[KernelRow]) -> bool:
        """Publish a run of `qfarm bench kernels`. False: it is published already, and nothing has changed."""
        assert all(row.run_id == run_id for row in kernels)
        return self._publish("kernels", {"run_id": run_id}, {"kernels": kernels})

    def finished_cells(self) -> frozenset[str]:
        """Ids of the cells published, from the manifests' names alone."""
        return frozenset(cell_id for (cell_id,) in self._keys("cell"))

    def finished_evaluations(self) -> frozenset[tuple[str, str]]:
        """(cell_id, eval_id) of the evaluations published, from the manifests' names alone."""
        return frozenset((cell_id, eval_id) for cell_id, eval_id in self._keys("evaluation"))

    def finished_attempts(self) -> frozenset[tuple[str, str]]:
        """(cell_id, attempt_id) of the attempts published, from the manifests' names alone."""
        return frozenset((cell_id, attempt_id) for cell_id, attempt_id in self._keys("attempt"))

    def read(
        self, table: str, *, columns: Sequence[str] | None = None, cell_ids: Collection[str] | None = None
    ) -> pa.Table:
        """The rows of a table, ordered by their manifests' names and then as they were published.

        Every field is nullable, for a store of an older format may lack any column; columns unknown to us are dropped.
        `cell_ids` (of kernels: ids of runs) limits which parts are opened. Each part is compared with its manifest:
        raises StoreError for one that is missing or altered. Torn manifests are passed over with a warning.
        """
        target = _target(table, columns)
        kind = next(name for name, kind in KINDS.items() if table in kind.tables)
        cell_ids = None if cell_ids is None else frozenset(cell_ids)
        keys = [key for key in self._uncovered(kind) if cell_ids is None or key[0] in cell_ids]
        wanted = list(dict.fromkeys([*target.names, *KINDS[kind].ids]))
        old = self._compacted_rows(table, wanted, cell_ids)
        with ThreadPoolExecutor(READERS) as pool:
            loaded = pool.map(lambda key: self._load(kind, key, table, wanted if old else target.names), keys)
            parts = [part for parts in loaded for part in parts]
        try:
            merged = pa.concat_tables([target.empty_table(), *old, *parts], promote_options="permissive")
            if old and parts:
                merged = in_order(merged, kind)
            # Thousands of tiny chunks make every query that follows some 20 times slower.
            return merged.select(target.names).cast(target).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise StoreError(f'{self.location}: table "{table}" has a column of another type: {error}') from error

    def files(self, table: str) -> list[str]:
        """The parts of a table that manifests name, as files, in the order of `read`; for programs that read Parquet.

        They are not compared with their manifests: `check` does that.
        """
        _target(table, None)
        if isinstance(self._folder, ObjectFolder):
            raise StoreError(f"{self.location}: objects are no files; read its tables instead")
        if os.path.isfile(self.location):
            raise StoreError(
                f"{self.location}: a pack holds no files; `qfarm store merge STORE PACK` makes a store of it"
            )
        kind = next(name for name, kind in KINDS.items() if table in kind.tables)
        old = self._generation()
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda key: self._found(manifest_path(kind, key)), self._uncovered(kind))
            parts = [part for manifest in found for part in (manifest.parts if manifest else ()) if part.table == table]
        return [os.path.join(self.location, part.path) for part in (*(old.of(table) if old else ()), *parts)]

    def publications(self) -> list[Manifest]:
        """Every manifest that readers see, kind by kind in the order of the names. Torn ones are passed over."""
        paths = (manifest_path(kind, key) for kind in KINDS for key in self._keys(kind))
        return [manifest for path in paths if (manifest := self._found(path)) is not None]

    def manifests(self, kind: str, names: Iterable[str]) -> Iterator[Manifest | None]:
        """Manifests of a kind by name, in that order; None for a torn one."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(lambda name: self._found(f"manifests/{kind}/{name}"), names)

    def rows_of(self, part: Part) -> pa.Table:
        """All columns of a part, compared with its manifest. Raises StoreError."""
        try:
            return self._part(part).read(use_threads=False)
        except ValueError as error:
            raise StoreError(f"{self.location}/{part.path}: {error}; {CHECK_HINT}") from error

    def compact(self) -> Compacted | None:
        """Put the rows of everything published so far into few files, which readers take from now on.

        Nothing is removed but the generations before the last. None: another process did it meanwhile.
        """
        done = compact(self, self._folder)
        self._looked = False
        if done is None:
            return None
        generation, size = done
        return Compacted(sum(map(len, generation.covered.values())), len(generation.parts), size)

    def _generation(self) -> Generation | None:
        """The store's generation, looked for once: what is published later is read beside it."""
        if not self._looked:
            try:
                self._compacted, self._looked = latest(self._folder), True
            except OSError as error:
                raise StoreError(f"{self.location}: the store cannot be read: {error.strerror or error}") from error
        return self._compacted

    def _uncovered(self, kind: str) -> list[tuple[str, ...]]:
        """The ids of manifests whose rows are in no generation."""
        old = self._generation()
        covered = old.covered[kind] if old else frozenset()
        return [key for key in self._keys(kind) if f"{'.'.join(key)}.json" not in covered]

    def _compacted_rows(self, table: str, columns: list[str], cell_ids: Collection[str] | None) -> list[pa.Table]:
        old = self._generation()
        of = next(kind.ids[0] for kind in KINDS.values() if table in kind.tables)
        found = []
        for part in old.of(table) if old else ():
            try:
                file = pa.BufferReader(verified(self._folder, part))
                there = [name for name in columns if name in pq.read_schema(file).names]
                chosen = None if cell_ids is None else pc.field(of).isin(pa.array(list(cell_ids), pa.string()))
                file.seek(0)
                found.append(pq.read_table(file, columns=there, filters=chosen))
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.location}/{part.path}: {error}; run `qfarm store compact` again") from error
        return found

    def bytes_of(self, part: Part) -> bytes:
        """A part as it lies, compared with its manifest. Raises StoreError."""
        try:
            return self._bytes(part)
        except ValueError as error:
            raise StoreError(f"{self.location}/{part.path}: {error}; {CHECK_HINT}") from error

    def format_file(self) -> bytes:
        """The file that makes a folder a store."""
        return self._folder.read(FORMAT_FILE)

    def adopt(self, manifest: Manifest, other: Store) -> Literal["added", "same", "other"]:
        """Publish what another store has published, unless it is here: with the same contents, or with other."""
        if not self._folder.exists(manifest.path):
            for part in manifest.parts:  # a foreign manifest could name any place
                place = rf"parts/{re.escape(part.table)}/[A-Za-z0-9_-][A-Za-z0-9._-]*\.parquet"
                if part.table not in record.TABLES or not re.fullmatch(place, part.path):
                    raise StoreError(f"{other.location}/{manifest.path}: {part.path} is no place of a part")
            parts = [(part, other.bytes_of(part)) for part in manifest.parts]
            for part, data in parts:
                self._folder.publish(part.path, data)
            if self._folder.publish(manifest.path, manifest.dump()):
                return "added"
        mine = self._found(manifest.path)
        alike = mine is not None and [(part.table, part.sha256) for part in mine.parts] == [
            (part.table, part.sha256) for part in manifest.parts
        ]
        return "same" if alike else "other"

    def check(self) -> Findings:
        """Hold every file against its manifest. A sound store has no faults; leftovers do it no harm."""
        faults, left = self._examined()
        words = "no manifest names it; its writer died or is still at work"
        return Findings(faults, [f"{self.location}/{path}: {words}" for path in left])

    def clean(self, older_s: float) -> list[str]:
        """Remove the leftovers that were written longer ago than so many seconds; what was removed.

        Nobody who is still at work may be so slow: their clocks may differ, and a part lies there before its manifest.
        """
        old = []
        for path in self._examined()[1]:
            age = self._folder.age(path)
            if age is not None and age >= older_s:
                self._folder.remove(path)
                old.append(path)
        return old

    def _examined(self) -> tuple[list[str], list[str]]:
        """Faults, and the paths of leftovers."""
        # Parts are listed before the manifests, so that a publication that ends meanwhile leaves no orphans.
        lying = [f"parts/{table}/{name}" for table in record.TABLES for name in self._names(f"parts/{table}")]
        lying += [name for name in self._names("") if is_aside(name)]
        named: set[str] = set()
        faults = []
        for kind in KINDS:
            for name in self._names(f"manifests/{kind}"):
                path = f"manifests/{kind}/{name}"
                if is_aside(name):
                    lying.append(path)
                else:
                    faults += self._check_manifest(path, named)
        faults += self._check_generation(lying)
        return faults, [path for path in lying if path not in named]

    def _create(self) -> None:
        """Make the folder a store, unless it is one. Raises StoreError, or StoreFull when there is no space."""
        try:
            self._folder.make([""])
            foreign = [name for name in self._folder.names("") if not is_aside(name)]
            # Another process may be making the same store; it publishes this file before it makes folders.
            if not self._folder.exists(FORMAT_FILE):
                if foreign:
                    raise StoreError(
                        f"{self.location}: holds other files and is no store; give an empty or a new folder"
                    )
                text = json.dumps({"kind": "qfarm store", "format": record.FORMAT, "created": record.utc_now()})
                self._folder.publish(FORMAT_FILE, text.encode())
            self._folder.make([f"manifests/{kind}" for kind in KINDS])
            self._folder.make([f"parts/{table}" for table in record.TABLES])
        except OSError as error:
            raised = StoreFull if error.errno in NO_SPACE else StoreError
            raise raised(f"{self.location}: no store can be made here: {error.strerror or error}") from error

    def _check_format(self) -> None:
        try:
            found = json.loads(self._folder.read(FORMAT_FILE))
            version = int(found["format"])
        except FileNotFoundError as error:
            problem = f"has no {FORMAT_FILE}, so it is no store" if os.path.isdir(self.location) else "no such store"
            raise StoreError(f"{self.location}: {problem}; give a folder that `qfarm submit` has written") from error
        except NotADirectoryError as error:
            raise StoreError(f"{self.location}: a file, neither a whole pack nor the folder of a store") from error
        except OSError as error:
            raise StoreError(f"{self.location}: the store cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.location}/{FORMAT_FILE}: does not say the format of a store") from error
        if version > record.FORMAT:
            raise StoreError(f"{self.location}: {newer(version)}")

    def _publish(self, kind: str, ids: Mapping[str, str], rows: Mapping[str, Sequence[Any]]) -> bool:
        for name, value in ids.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", value):
                raise StoreError(f'{name} "{value}": only letters, digits, "_" and "-" can name a result')
        path = manifest_path(kind, tuple(ids[name] for name in KINDS[kind].ids))
        if self._folder.exists(path):
            return False
        # The token keeps apart even two writers that believe to be the same attempt.
        stem = ".".join((*ids.values(), secrets.token_hex(4)))
        built = [_build(table, stem, values) for table, values in rows.items() if values]
        parts = tuple(part for part, _ in built)
        manifest = Manifest(format=record.FORMAT, kind=kind, ids=ids, created=record.utc_now(), parts=parts).dump()
        try:
            for part, data in built:
                self._folder.publish(part.path, data)
            return self._folder.publish(path, manifest)
        finally:
            # What is visible decides, not what returned: an interrupt can strike right after the manifest was linked.
            if not self._holds(path, manifest):
                for part in parts:
                    self._folder.remove(part.path)

    def _holds(self, path: str, data: bytes) -> bool:
        """Whether a file has this content; if nobody can tell, it has."""
        try:
            return self._folder.read(path) == data
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def _names(self, folder: str) -> list[str]:
        try:
            return self._folder.names(folder)
        except OSError as error:
            raise StoreError(f"{self.location}: the store cannot be read: {error.strerror or error}") from error

    def _keys(self, kind: str) -> list[tuple[str, ...]]:
        """The ids in the names of a kind's manifests, in the order of the names."""
        keys = [key_of(kind, name) for name in self._names(f"manifests/{kind}")]
        return [key for key in keys if key]

    def _manifest(self, path: str) -> Manifest:
        """Raises ValueError if it is torn or gone, StoreError if it cannot be read or its format is newer than ours."""
        try:
            manifest = Manifest.load(self._folder.read(path))
            proper = manifest.path
        except FileNotFoundError as error:
            raise ValueError("was deleted meanwhile") from error
        except OSError as error:
            raise StoreError(f"{self.location}/{path}: cannot be read: {error.strerror or error}") from error
        except StoreError as error:
            raise StoreError(f"{self.location}/{path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"is torn or no manifest ({error}); delete it to have its work done again") from error
        if proper != path:
            raise ValueError(f"is a copy of {proper}")
        return manifest

    def _found(self, path: str) -> Manifest | None:
        """A manifest, or None and a warning where it is torn."""
        try:
            return self._manifest(path)
        except ValueError as error:
            logger.warning("%s/%s: passed over, for it %s", self.location, path, error)
            return None

    def _load(self, kind: str, key: tuple[str, ...], table: str, columns: list[str]) -> list[pa.Table]:
        """These columns, as far as they exist, of the parts of a table that one manifest names."""
        manifest = self._found(manifest_path(kind, key))
        loaded = []
        for part in manifest.parts if manifest else ():
            if part.table == table:
                try:
                    # The parts are read side by side already.
                    loaded.append(self._part(part).read(columns=columns, use_threads=False))
                except ValueError as error:
                    raise StoreError(f"{self.location}/{part.path}: {error}; {CHECK_HINT}") from error
        return loaded

    def _part(self, part: Part) -> pq.ParquetFile:
        """A part, compared with its manifest. Raises ValueError, which pyarrow's ArrowInvalid is as well."""
        file = pq.ParquetFile(pa.BufferReader(self._bytes(part)))
        if file.metadata.num_rows != part.rows:
            raise ValueError(f"has {file.metadata.num_rows} rows, its manifest says {part.rows}")
        return file

    def _bytes(self, part: Part) -> bytes:
        try:
            data = self._folder.read(part.path)
        except FileNotFoundError as error:
            raise ValueError("is missing, though a manifest names it") from error
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise ValueError(
                f"was altered: {len(data)} bytes of another sha256 than the manifest's ({part.bytes} bytes)"
            )
        return data

    def _check_manifest(self, path: str, named: set[str]) -> list[str]:
        """The faults of one file among the manifests; adds the parts that it names to `named`."""
        try:
            manifest = self._manifest(path)
        except StoreError as error:
            return [str(error)]
        except ValueError as error:
            return [f"{self.location}/{path}: {error}"]
        faults = []
        for part in manifest.parts:
            named.add(part.path)
            try:
                self._part(part)
            except ValueError as error:
                faults.append(f"{self.location}/{part.path}: {error}")
        return faults

    def _check_generation(self, lying: list[str]) -> list[str]:
        """Faults of the newest generation; its strangers are added to what lies about."""
        names = self._names(GENERATIONS)
        lying += strangers(self._folder)
        old = self._generation()
        if old is None:
            whole = any(name.endswith(".json") for name in names)
            hint = "torn, or what it covers has changed; run `qfarm store compact`"
            return [f"{self.location}/{GENERATIONS}: the newest is not used: {hint}"] if whole else []
        faults = []
        for part in old.parts:
            try:
                verified(self._folder, part)
            except (OSError, ValueError) as error:
                faults.append(f"{self.location}/{part.path}: {error}; run `qfarm store compact` again")
        return faults


def _target(table: str, columns: Sequence[str] | None) -> pa.Schema:
    """The schema that a reader gets."""
    if table not in record.TABLES:
        raise StoreError(f'unknown table "{table}"{nearest(table, record.TABLES)}')
    schema = record.schema(table)
    for name in columns or ():
        if name not in schema.names:
            raise StoreError(f'table "{table}" has no column "{name}"{nearest(name, schema.names)}')
    chosen = schema.names if columns is None else columns
    return pa.schema([schema.field(name).with_nullable(True) for name in chosen], metadata=schema.metadata)


def _build(table: str, stem: str, rows: Sequence[Any]) -> tuple[Part, bytes]:
    sink = pa.BufferOutputStream()
    # Dictionaries cost small parts a third of their reading time and make even large ones bigger: zstd does better.
    pq.write_table(record.to_table(table, rows), sink, compression="zstd", use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    path = f"parts/{table}/{stem}.parquet"
    digest = hashlib.sha256(data).hexdigest()
    return Part(table=table, path=path, rows=len(rows), bytes=len(data), sha256=digest), data
