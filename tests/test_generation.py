"""Compacting a store: the same rows in the same order from few files, and the small files still decide."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qfarm import cli, generation, record
from qfarm.errors import StoreError
from qfarm.manifest import KINDS
from qfarm.pack import merge, pack
from qfarm.publish import LocalFolder
from qfarm.query import query
from qfarm.store import Store
from tests.test_store import attempt_row, document_row, fill, metric_row


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three cells, of which the middle one by name comes last, with two evaluations."""
    store = Store.open(tmp_path / "store", create=True)
    for cell_id in ("c1", "c3", "c2"):
        fill(store, cell_id)
    store.publish_evaluation("c1", "e0", "a1", [metric_row("c1", "e0")], [document_row("c1", "e0", "d9")])
    store.publish_attempt(attempt_row("a-2", "c1", outcome="oom"))  # "-" sorts before the dot that ends "a1"
    return store


def reopened(store: Store) -> Store:
    return Store.open(store.location)


def everything(store: Store) -> dict[str, list[dict[str, object]]]:
    return {table: store.read(table).to_pylist() for table in record.TABLES}


class Counting(LocalFolder):
    """Remembers what was read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.paths: list[str] = []

    def read(self, path: str) -> bytes:
        self.paths.append(path)
        return super().read(path)


def test_the_same_rows_in_the_same_order_from_few_files(store: Store) -> None:
    before = everything(store)
    found = store.compact()
    assert found is not None and found.publications == 3 + 4 + 4 + 3 and found.files == len(record.TABLES) + 1
    assert everything(store) == everything(reopened(store)) == before
    folder = Counting(store.location)
    assert everything(Store(store.location, folder)) == before
    assert all(path.startswith("generations/") for path in folder.paths)
    assert len(set(folder.paths)) == 1 + len(record.TABLES) + 1  # the manifest, a file per table, what is covered


def test_what_comes_later_is_read_in_its_place(store: Store) -> None:
    store.compact()
    fill(store, "c0")
    fill(store, "c25")
    store.publish_evaluation("c2", "e0", "a1", [metric_row("c2", "e0")], [document_row("c2", "e0")])
    store.publish_attempt(attempt_row("a0", "c3"))
    compacted = everything(reopened(store))
    for path in Path(store.location).glob("generations/*"):
        path.unlink()
    assert compacted == everything(reopened(store))


@pytest.mark.parametrize("cell_ids", [[], ["c2"], ["c1", "c9"], ["c0"]])
def test_some_cells_and_some_columns(store: Store, cell_ids: list[str]) -> None:
    store.compact()
    fill(store, "c0")
    compacted, plain = reopened(store), reopened(store)
    plain._looked = True  # so that it reads the small files
    for table, column in (("documents", "tokens"), ("layers", "bits"), ("attempts", "outcome"), ("kernels", "form")):
        chosen = {"columns": [column], "cell_ids": cell_ids}
        assert compacted.read(table, **chosen).equals(plain.read(table, **chosen))


def test_what_a_later_version_has_compacted_is_read_without_kinds_that_are_unknown(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.compact()
    monkeypatch.delitem(KINDS, "kernels")
    monkeypatch.delitem(record.TABLES, "kernels")
    folder = Counting(store.location)
    assert Store(store.location, folder).read("cells").num_rows == 3
    assert all(path.startswith("generations/") for path in folder.paths)


def test_queries_read_the_large_files(store: Store) -> None:
    store.compact()
    fill(store, "c0")
    found = reopened(store)
    assert [Path(path).parent.name for path in found.files("cells")] == ["generations", "cells"]
    assert query(found, "SELECT count(*) FROM documents").rows == ((2 * 4 + 1,),)


def test_what_is_published_twice_is_still_refused(store: Store) -> None:
    store.compact()
    assert not store.publish_evaluation("c1", "e1", "a2", [metric_row(value=9.0)], [])
    assert ("c1", "e1") in reopened(store).finished_evaluations()


def test_a_result_that_was_deleted_to_be_measured_again_is_not_served(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.compact()
    (Path(store.location) / "manifests/evaluation/c1.e1.json").unlink()
    again = reopened(store)
    with caplog.at_level(logging.WARNING):
        assert ("c1", "e1") not in {(row["cell_id"], row["eval_id"]) for row in again.read("metrics").to_pylist()}
    assert "c1.e1.json has changed since; run `qfarm store compact`" in caplog.text
    store.publish_evaluation("c1", "e1", "a2", [metric_row(value=9.0)], [])
    assert 9.0 in reopened(store).read("metrics")["value"].to_pylist()
    assert any("the newest is not used" in fault for fault in reopened(store).check().faults)
    store.compact()
    assert reopened(store).check().faults == []


def test_a_second_generation_keeps_the_one_before_for_its_readers(store: Store) -> None:
    store.compact()
    reader = reopened(store)
    before = reader.read("cells").num_rows
    for cell_id in ("c5", "c6"):
        fill(store, cell_id)
        store.compact()
        reader = reader if cell_id == "c5" else reopened(store)
        assert reader.read("cells").num_rows > before - 1
    numbers = sorted(path.name for path in Path(store.location).glob("generations/*.json"))
    assert numbers == ["00000002.json", "00000003.json"]
    assert not list(Path(store.location).glob("generations/00000001.*"))


def test_what_a_killed_compaction_left_is_told_and_harms_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = LocalFolder.publish

    def die(self: LocalFolder, path: str, data: bytes) -> bool:
        if path.endswith(".json"):
            raise KeyboardInterrupt
        return publish(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "publish", die)
        patch.setattr(LocalFolder, "remove", lambda self, path: None)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    before = everything(reopened(store))
    store.compact()  # under the same number
    faults, leftovers = reopened(store).check()
    assert (faults, len(leftovers)) == ([], len(record.TABLES) + 1) and everything(reopened(store)) == before
    assert len(store.clean(older_s=0)) == len(record.TABLES) + 1 and reopened(store).check() == ([], [])


def test_of_two_that_compact_at_once_one_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, raced = LocalFolder.publish, []

    def race(self: LocalFolder, path: str, data: bytes) -> bool:
        if path.endswith("00000001.json") and not raced:
            raced.append(path)
            assert Store.open(store.location).compact() is not None
        return publish(self, path, data)

    monkeypatch.setattr(LocalFolder, "publish", race)
    assert store.compact() is None
    assert reopened(store).check() == ([], [])


@pytest.mark.parametrize("damage", ["torn", "missing", "elsewhere"])
def test_a_torn_generation_is_passed_over_and_reported(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything(store)
    store.compact()
    [path] = Path(store.location).glob("generations/*.json")
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "missing":
        next(path.parent.glob("*.covered.*")).unlink()
    else:  # a foreign generation could name any file
        fields = json.loads(path.read_text())
        del fields["checksum"]
        fields["parts"][0]["path"] = "generations/../../secret.parquet"
        path.write_text(json.dumps(generation._with_checksum(fields)))
    assert everything(reopened(store)) == before
    assert "passed over" in caplog.text
    assert len(reopened(store).check().faults) == 1


def test_an_altered_large_file_is_an_error_and_compacting_mends_it(store: Store) -> None:
    before = everything(store)
    store.compact()
    [path] = Path(store.location).glob("generations/*.cells.*")
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(StoreError, match=r"cells.*was altered; run `qfarm store compact` again"):
        reopened(store).read("cells")
    assert len(reopened(store).check().faults) == 1
    store.compact()
    assert everything(reopened(store)) == before and reopened(store).check() == ([], [])


def test_a_broken_publication_is_not_compacted_away(store: Store) -> None:
    next(Path(store.location).glob("parts/documents/c2.*")).unlink()
    with pytest.raises(StoreError, match="is missing, though a manifest names it"):
        store.compact()
    assert not list(Path(store.location).glob("generations/*"))


def test_a_compacted_store_packs_and_merges_as_before(store: Store, tmp_path: Path) -> None:
    before = everything(store)
    plain = pack(store, tmp_path / "before.qfarm")
    store.compact()
    assert pack(reopened(store), tmp_path / "after.qfarm").sha256 == plain.sha256
    other = Store.open(tmp_path / "other", create=True)
    assert merge(other, [reopened(store)]).added == 14 and everything(other) == before


def test_many_publications_are_written_in_row_groups(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BATCH", 2)
    before = everything(store)
    store.compact()
    assert everything(reopened(store)) == before
    [path] = Path(store.location).glob("generations/*.attempts.*")
    assert pq.ParquetFile(path).metadata.num_row_groups == 2


def test_the_command(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (("compact", "14 publications in 8 files, "), ("check", "the store is sound\n")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["store", command, store.location])
        assert not ended.value.code and capsys.readouterr().out.startswith(said)


def test_only_old_leftovers_are_removed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(store.location) / "parts/cells"
    for name, age_s in (("old.a.b.parquet", 90_000), ("new.a.b.parquet", 0), (".x.parquet.0.aside", 90_000)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    before = everything(store)
    with pytest.raises(SystemExit):
        cli.main(["store", "check", store.location, "--clean"])
    assert not (folder / "old.a.b.parquet").exists() and not (folder / ".x.parquet.0.aside").exists()
    assert (folder / "new.a.b.parquet").exists() and everything(store) == before
    assert "the store is sound; 1 leftover file: harmless" in capsys.readouterr().out
