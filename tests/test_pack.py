"""Packs: one file with all that a store's manifests name, read as a store, verified and merged."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest

from qfarm import record
from qfarm.errors import StoreError
from qfarm.manifest import Manifest
from qfarm.pack import merge, pack
from qfarm.report.render import render
from qfarm.report.tables import load
from qfarm.store import Store
from tests.report_example import FAILED, GPTQ, RTN, attempt_row, cell_row, example
from tests.test_query import published


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return published(tmp_path / "store", example())


def same_rows(one: Store, other: Store) -> bool:
    return all(one.read(table).equals(other.read(table)) for table in record.TABLES)


def rewritten(path: Path, out: Path, change) -> Path:
    """A pack with other files in it; `change` gets name and data and gives the new data."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, change(name, archive.read(name)))
    return out


def test_a_pack_reads_like_its_store(store: Store, tmp_path: Path) -> None:
    (tmp_path / "store" / "parts" / "cells" / "orphan.parquet").write_bytes(b"left behind")
    found = pack(store, tmp_path / "one.qfarm")
    assert found.results == 3 + 3 + 4 and found.bytes == (tmp_path / "one.qfarm").stat().st_size
    packed = Store.open(tmp_path / "one.qfarm")
    assert same_rows(packed, store)
    assert packed.finished_evaluations() == store.finished_evaluations()
    assert packed.check() == ([], [])  # the orphan stayed behind
    assert render(load(packed), width=100) == render(load(store), width=100)


def test_the_same_results_give_the_same_bytes(store: Store, tmp_path: Path) -> None:
    one, other = (pack(store, tmp_path / name) for name in ("one", "other"))
    assert one == other and (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_pack_is_merged_into_a_store_of_its_own(store: Store, tmp_path: Path) -> None:
    pack(store, tmp_path / "one.qfarm")
    into = Store.open(tmp_path / "new", create=True)
    assert merge(into, [Store.open(tmp_path / "one.qfarm")]) == (10, 0, 0)
    assert same_rows(into, store) and into.check() == ([], [])
    assert merge(into, [Store.open(tmp_path / "one.qfarm")]) == (0, 10, 0)


def test_what_both_hold_stays_and_is_told_apart(store: Store, tmp_path: Path) -> None:
    small = example()
    small.store.rows["attempts"] = [attempt_row(GPTQ, attempt_id="another")]
    small.store.rows["cells"] = [
        dataclasses.replace(cell, model_bits=9.0) if cell.cell_id == GPTQ else cell
        for cell in small.store.rows["cells"]
    ]
    other = published(tmp_path / "other", small)
    new = cell_row("77" * 8, "hqq", "w4")
    other.publish_cell(new, [])
    # One cell differs, two are the same but for the token in their parts' names; so are the three evaluations.
    assert merge(store, [other]) == (2, 5, 1)
    bits = dict(zip(*(store.read("cells")[name].to_pylist() for name in ("cell_id", "model_bits")), strict=True))
    assert (bits[GPTQ], bits[RTN]) == (5.25, 5.25) and new.cell_id in bits
    assert store.check() == ([], [])


def test_nothing_can_be_written_to_a_pack(store: Store, tmp_path: Path) -> None:
    pack(store, tmp_path / "one.qfarm")
    packed = Store.open(tmp_path / "one.qfarm")
    with pytest.raises(StoreError, match="a pack is read only"):
        packed.publish_attempt(attempt_row(FAILED, attempt_id="new"))
    with pytest.raises(StoreError, match="a pack is read only"):
        Store.open(tmp_path / "one.qfarm", create=True)
    with pytest.raises(StoreError, match="makes a store of it"):
        packed.files("cells")
    with pytest.raises(StoreError, match="exists; a pack is never written over"):
        pack(store, tmp_path / "one.qfarm")


def test_an_altered_part_is_found_and_not_merged(store: Store, tmp_path: Path) -> None:
    pack(store, tmp_path / "one.qfarm")

    def flip(name: str, data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if name.startswith("parts/metrics/") else data

    altered = Store.open(rewritten(tmp_path / "one.qfarm", tmp_path / "altered.qfarm", flip))
    faults, _ = altered.check()
    assert len(faults) == 3 and all("was altered" in fault for fault in faults)
    with pytest.raises(StoreError, match="was altered"):
        merge(Store.open(tmp_path / "new", create=True), [altered])
    assert Store.open(tmp_path / "new").check().faults == []  # what was merged before is whole


def test_a_store_that_was_altered_is_not_packed(store: Store, tmp_path: Path) -> None:
    part = next((tmp_path / "store" / "parts" / "metrics").iterdir())
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(StoreError, match="was altered"):
        pack(store, tmp_path / "one.qfarm")
    assert {path.name for path in tmp_path.iterdir()} == {"store"}  # nothing half-written


def test_a_manifest_cannot_place_a_part_outside(store: Store, tmp_path: Path) -> None:
    pack(store, tmp_path / "one.qfarm")

    def elsewhere(name: str, data: bytes) -> bytes:
        if not name.startswith("manifests/cell/"):
            return data
        made = Manifest.load(data)
        parts = tuple(dataclasses.replace(part, path="parts/cells/../../../evil.parquet") for part in made.parts)
        return dataclasses.replace(made, parts=parts).dump()

    evil = rewritten(tmp_path / "one.qfarm", tmp_path / "evil.qfarm", elsewhere)
    with pytest.raises(StoreError, match="is no place of a part"):
        merge(Store.open(tmp_path / "new", create=True), [Store.open(evil)])
    assert not list(tmp_path.rglob("evil.parquet"))


def test_torn_and_foreign_files(store: Store, tmp_path: Path) -> None:
    pack(store, tmp_path / "one.qfarm")
    torn = tmp_path / "torn.qfarm"
    torn.write_bytes((tmp_path / "one.qfarm").read_bytes()[:-30])
    with pytest.raises(StoreError, match="a file, neither a whole pack nor the folder of a store"):
        Store.open(torn)
    foreign = tmp_path / "foreign.zip"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("readme", json.dumps({}))
    with pytest.raises(StoreError, match="is no store|no such store"):
        Store.open(foreign)
