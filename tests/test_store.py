"""Store: what is published is whole, durable, unique and readable; everything else cannot be seen."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qfarm import manifest, publish, record
from qfarm.errors import StoreError, StoreFull
from qfarm.publish import LocalFolder
from qfarm.record import AnalysisRow, AttemptRow, CellRow, DocumentRow, KernelRow, LayerRow, MetricRow
from qfarm.store import Store

NOW = "2025-01-02T03:04:05+00:00"


def cell_row(cell_id: str = "c1", attempt_id: str = "a1", seed: int | None = None) -> CellRow:
    return CellRow(
        cell_id=cell_id,
        attempt_id=attempt_id,
        job="job",
        model="toy",
        fingerprint="f",
        recipe="gptq",
        scheme="w4",
        group_size=128,
        seed=seed,
        symmetric=False,
        scale_dtype="float16",
        dtype="bfloat16",
        statistics=None,
        spec="{}",
        linear_bits=4.25,
        model_bits=5.5,
        linear_bytes=1000,
        model_bytes=2000,
        layers_quantized=7,
        layers_skipped=1,
        created=NOW,
    )


def layer_row(cell_id: str = "c1", layer: int = 0, reason: str | None = None) -> LayerRow:
    return LayerRow(
        cell_id=cell_id,
        layer=layer,
        role="q",
        module="model.layers.0.self_attn.q_proj",
        rows=8,
        columns=16,
        solver=None if reason else "gptq",
        reason=reason,
        bits=None if reason else 4,
        stored_bytes=80,
    )


def kernel_row(run_id: str = "r1", kind: str = "measured") -> KernelRow:
    return KernelRow(
        kind=kind,
        gpu="NVIDIA H200",
        form="w4",
        m=1,
        n=4096,
        k=4096,
        median_s=2.5e-6,
        run_id=run_id,
        created=NOW,
        provenance="{}",
    )


def attempt_row(attempt_id: str = "a1", cell_id: str = "c1", outcome: str = "ok") -> AttemptRow:
    return AttemptRow(
        model="org/model",
        label="gptq w4 g128",
        evaluations="[]",
        attempt_id=attempt_id,
        cell_id=cell_id,
        job="job",
        number=1,
        outcome=outcome,
        stage="evaluate",
        error=None if outcome == "ok" else "out of memory",
        worker="w",
        node="n",
        started=NOW,
        wall_s=1.5,
        stages="{}",
        provenance="{}",
    )


def metric_row(cell_id: str = "c1", eval_id: str = "e1", value: float = 7.5) -> MetricRow:
    return MetricRow(
        metric="perplexity",
        value=value,
        unit="",
        better="lower",
        n=3,
        cell_id=cell_id,
        eval_id=eval_id,
        attempt_id="a1",
        evaluation="wikitext2",
        protocol="{}",
        created=NOW,
    )


def document_row(cell_id: str = "c1", eval_id: str = "e1", document: str = "d1") -> DocumentRow:
    return DocumentRow(document=document, cluster="k", tokens=5, loss=1.25, cell_id=cell_id, eval_id=eval_id)


def analysis_row(cell_id: str = "c1", eval_id: str = "e1", value: float = 31.5) -> AnalysisRow:
    figure = {"layer": 0, "role": "q", "tensor": "output", "statistic": "sqnr", "value": value}
    return AnalysisRow(**figure, cell_id=cell_id, eval_id=eval_id)


def fill(store: Store, cell_id: str = "c1", attempt_id: str = "a1", eval_id: str = "e1") -> None:
    """Publish one row or two into each table."""
    layers = [layer_row(cell_id, 0), layer_row(cell_id, 1, reason="excluded")]
    documents = [document_row(cell_id, eval_id, "d2"), document_row(cell_id, eval_id, "d1")]
    assert store.publish_cell(cell_row(cell_id, attempt_id), layers)
    metrics, analysis = [metric_row(cell_id, eval_id)], [analysis_row(cell_id, eval_id)]
    assert store.publish_evaluation(cell_id, eval_id, attempt_id, metrics, documents, analysis)
    assert store.publish_attempt(attempt_row(attempt_id, cell_id))
    assert store.publish_kernels(cell_id, [kernel_row(cell_id)])


def first_id(table: str) -> str:
    """The column that `cell_ids` chooses by."""
    return "run_id" if table == "kernels" else "cell_id"


def files(store: Store, pattern: str = "*") -> list[str]:
    """Files below the store, relative to it."""
    root = Path(store.location)
    return sorted(str(path.relative_to(root)) for path in root.rglob(pattern) if path.is_file())


def only(store: Store, pattern: str) -> Path:
    found = list(Path(store.location).glob(pattern))
    assert len(found) == 1, found
    return found[0]


def rewrite_manifest(path: Path, **fields: object) -> None:
    """Change a manifest and make its checksum right again."""
    old = json.loads(path.read_text())
    del old["checksum"]
    old |= fields
    path.write_text(json.dumps(old | {"checksum": manifest.checksum(old)}))


def run_script(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python that can use this file's row makers, in a process of its own."""
    here = Path(__file__).parent
    head = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\nfrom test_store import *\n"
    command = [sys.executable, "-c", head + textwrap.dedent(text), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


def test_a_missing_store_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none: no such store; give a folder that `qfarm submit` has written"):
        Store.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_store_opens_again_and_again(store: Store) -> None:
    fill(store)
    for create in (False, True):
        assert Store.open(store.location, create=create).finished_cells() == {"c1"}
    assert Store.open(Path(store.location)).location == store.location


def test_location_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.open("a/b", create=True).location == str(tmp_path / "a" / "b")
    assert Store.open("~/r", create=True).location == str(tmp_path / "home" / "r")


@pytest.mark.parametrize("create", [False, True])
def test_a_folder_of_other_files_is_refused(tmp_path: Path, create: bool) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match="is no store"):
        Store.open(tmp_path, create=create)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("create", [False, True])
def test_a_file_is_refused(tmp_path: Path, create: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file: "):
        Store.open(tmp_path / "file", create=create)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "new"}'])
def test_a_broken_format_file_is_refused(store: Store, text: str) -> None:
    (Path(store.location) / "qfarm-store.json").write_text(text)
    with pytest.raises(StoreError, match="qfarm-store.json: does not say the format"):
        Store.open(store.location)


def test_an_unreadable_store_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: LocalFolder, path: str) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(LocalFolder, "read", read)
    with pytest.raises(StoreError, match="cannot be read: Permission denied"):
        Store.open(store.location)


def test_a_newer_format_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setattr(record, "FORMAT", record.FORMAT - 1)
    with pytest.raises(StoreError, match="format 1, this version of qfarm reads up to 0"):
        Store.open(store.location)
    with pytest.raises(StoreError, match=r"c1\.json: .*format 1, this version of qfarm reads up to 0"):
        store.read("cells")
    assert len([fault for fault in store.check().faults if "reads up to 0" in fault]) == 4


def test_a_store_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def makedirs(path: str, exist_ok: bool) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "makedirs", makedirs)
    code = errno.EROFS
    with pytest.raises(StoreError, match="no store can be made here: Read-only file system"):
        Store.open(tmp_path / "results", create=True)
    code = errno.ENOSPC
    with pytest.raises(StoreFull, match="No space left"):
        Store.open(tmp_path / "results", create=True)


def test_a_creation_that_died_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / ".qfarm-store.json.0123abcd.aside").write_text("{")
    fill(Store.open(tmp_path, create=True))


def test_all_tables_come_back_as_published(store: Store) -> None:
    cell, layers = cell_row(seed=3), [layer_row(layer=0), layer_row(layer=1, reason="excluded")]
    metrics, documents = (
        [metric_row(value=7.25), metric_row(value=-1e-300)],
        [document_row(), document_row(document="é")],
    )
    attempt = attempt_row(outcome="oom")
    assert store.publish_cell(cell, layers)
    analysis = [analysis_row(value=math.inf), analysis_row(value=-3.5)]
    assert store.publish_evaluation("c1", "e1", "a1", metrics, documents, analysis)
    assert store.publish_attempt(attempt)
    published = {"cells": [cell], "layers": layers, "metrics": metrics, "documents": documents, "attempts": [attempt]}
    kernels = [kernel_row(), kernel_row(kind="predicted")]
    assert store.publish_kernels("r1", kernels)
    assert not store.publish_kernels("r1", kernels[:1])
    published |= {"analysis": analysis, "kernels": kernels}
    assert published.keys() == record.TABLES.keys()
    for table, rows in published.items():
        assert [record.TABLES[table](**row) for row in store.read(table).to_pylist()] == rows
    assert store.read("layers")["bits"].to_pylist() == [4, None]
    assert store.check() == ([], [])


def test_an_empty_store_reads_as_empty_tables(store: Store) -> None:
    for table in record.TABLES:
        assert store.read(table).num_rows == 0
        assert store.read(table).schema.names == record.schema(table).names
    assert store.finished_cells() == frozenset()
    assert store.finished_evaluations() == frozenset()
    assert store.check() == ([], [])


def test_tables_without_rows_have_no_part(store: Store) -> None:
    assert store.publish_cell(cell_row(), [])
    assert store.publish_evaluation("c1", "e1", "a1", [metric_row()], [])
    assert files(store, "*.parquet") == files(store, "c1.*.parquet")
    assert [path.split("/")[1] for path in files(store, "*.parquet")] == ["cells", "metrics"]
    assert store.read("layers").num_rows == store.read("documents").num_rows == 0
    assert store.check() == ([], [])


def test_a_store_from_before_the_table_of_layers_figures(store: Store) -> None:
    """It has no folder for them until it is opened for writing."""
    assert store.publish_evaluation("c1", "e1", "a1", [metric_row()], [])
    (Path(store.location) / "parts" / "analysis").rmdir()
    assert store.read("analysis").num_rows == 0 and store.check() == ([], [])
    fill(Store.open(store.location, create=True), "c2")
    assert store.read("analysis").num_rows == 1 and store.read("metrics").num_rows == 2


def test_a_store_from_before_the_table_of_kernels(store: Store) -> None:
    """It has neither a folder for their manifests nor one for their parts until it is opened for writing."""
    (Path(store.location) / "manifests" / "kernels").rmdir()
    (Path(store.location) / "parts" / "kernels").rmdir()
    assert store.read("kernels").num_rows == 0 and store.check() == ([], [])
    assert store.compact() is not None
    assert Store.open(store.location, create=True).publish_kernels("r1", [kernel_row()])
    again = Store.open(store.location)
    assert again.read("kernels")["form"].to_pylist() == ["w4"] and again.check() == ([], [])


def test_what_is_finished(store: Store) -> None:
    fill(store, "c1", "a1", "e1")
    assert store.publish_evaluation("c2", "e-2_x", "a2", [metric_row("c2", "e-2_x")], [])
    store.publish_attempt(attempt_row("a3", "c3", outcome="oom"))
    assert store.finished_cells() == {"c1"}
    assert store.finished_evaluations() == {("c1", "e1"), ("c2", "e-2_x")}


def test_rows_come_by_id_whatever_the_order_of_publication(store: Store) -> None:
    for cell_id in ("c2", "c10", "c1"):
        fill(store, cell_id)
    assert store.read("cells")["cell_id"].to_pylist() == ["c1", "c10", "c2"]
    # Within a part, as they were given.
    assert store.read("documents")["document"].to_pylist() == ["d2", "d1"] * 3


def test_reading_some_columns(store: Store) -> None:
    fill(store)
    table = store.read("cells", columns=["scheme", "cell_id"])
    assert table.to_pylist() == [{"scheme": "w4", "cell_id": "c1"}]
    with pytest.raises(StoreError, match='table "cells" has no column "schem", did you mean "scheme"'):
        store.read("cells", columns=["schem"])
    with pytest.raises(StoreError, match='unknown table "cell", did you mean "cells"'):
        store.read("cell")


@pytest.mark.parametrize("table", record.TABLES)
def test_reading_some_cells_opens_only_their_parts(store: Store, table: str) -> None:
    for number in (1, 2, 3):
        fill(store, f"c{number}", f"a{number}")
    for path in Path(store.location).rglob("c2.*"):
        path.write_bytes(b"never opened")
    chosen = store.read(table, cell_ids={"c1", "c3", "absent"})
    assert set(chosen[first_id(table)].to_pylist()) == {"c1", "c3"}
    assert store.read(table, cell_ids=[]).num_rows == 0


def test_units_survive(store: Store) -> None:
    fill(store)
    part = pq.read_table(only(store, "parts/layers/*.parquet"))
    for table in (part, store.read("layers")):
        assert table.schema.field("weight_error").metadata == {b"unit": b"||W - Q||^2 / ||W||^2"}
        assert table.schema.metadata[b"qfarm_table"] == b"layers"


def test_parts_are_plain_parquet(store: Store) -> None:
    fill(store)
    path = only(store, "parts/documents/*.parquet")
    assert pq.read_table(path)["loss"].to_pylist() == [1.25, 1.25]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert duckdb.sql(f"SELECT count(*), sum(tokens), max(kl) FROM '{path}'").fetchall() == [(2, 10, None)]


def test_duckdb_reads_what_the_store_reads(store: Store) -> None:
    fill(store)
    layers = store.read("layers")
    assert duckdb.sql("SELECT layer, bits FROM layers ORDER BY layer").fetchall() == [(0, 4), (1, None)]
    assert layers.num_rows == 2


def narrow(schema: Callable[[str], pa.Schema], column: str) -> Callable[[str], pa.Schema]:
    return lambda table: pa.schema([field for field in schema(table) if field.name != column])


def test_a_column_that_an_older_part_lacks_is_null(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(record, "schema", narrow(record.schema, "linear_bytes"))
        fill(store, "old")
    assert store.read("cells")["linear_bytes"].to_pylist() == [None]
    fill(store, "new")
    table = store.read("cells")
    assert table.to_pydict()["linear_bytes"] == [1000, None]
    assert table.schema.names == record.schema("cells").names
    assert store.read("cells", columns=["linear_bytes"])["linear_bytes"].to_pylist() == [1000, None]
    assert store.check() == ([], [])


def test_an_unknown_column_is_dropped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setattr(record, "schema", narrow(record.schema, "linear_bytes"))
    table = store.read("cells")
    assert table.num_rows == 1
    assert "linear_bytes" not in table.schema.names


def test_a_narrower_number_is_widened(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setitem(record._ARROW, int, pa.int32())
        fill(store)
    assert store.read("cells").schema.field("linear_bytes").type == pa.int64()
    assert store.read("cells")["linear_bytes"].to_pylist() == [1000]


def test_a_column_of_another_kind_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setitem(record._ARROW, str, pa.int64())
    with pytest.raises(StoreError, match='table "cells" has a column of another type'):
        store.read("cells")


def test_the_second_is_told_and_changes_nothing(store: Store) -> None:
    fill(store)
    before = files(store)
    assert not store.publish_cell(cell_row(attempt_id="a2"), [layer_row()])
    assert not store.publish_evaluation("c1", "e1", "a2", [metric_row(value=0.0)], [])
    assert not store.publish_attempt(attempt_row(outcome="oom"))
    assert files(store) == before
    assert store.read("cells")["attempt_id"].to_pylist() == ["a1"]
    assert store.read("metrics")["value"].to_pylist() == [7.5]


@pytest.mark.parametrize("attempt_id", ["a1", "a2"])
def test_the_loser_of_the_race_removes_its_own_parts_only(
    store: Store, monkeypatch: pytest.MonkeyPatch, attempt_id: str
) -> None:
    """Also when both claim to be the same attempt."""
    fill(store)
    before = files(store)
    # Both looked before either published.
    monkeypatch.setattr(LocalFolder, "exists", lambda self, path: False)
    assert not store.publish_cell(cell_row(attempt_id=attempt_id), [layer_row()])
    assert files(store) == before
    assert store.check() == ([], [])


def compete(
    location: str, writer: int, barrier: "multiprocessing.synchronize.Barrier", wins: "multiprocessing.Queue"
) -> None:
    store = Store.open(location, create=True)
    barrier.wait(timeout=60)
    won = [number for number in range(50) if store.publish_cell(cell_row(f"c{number}", f"w{writer}"), [])]
    wins.put((writer, won))


def test_of_four_processes_exactly_one_wins_each_name(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, wins = spawn.Barrier(4), spawn.Queue()
    location = str(tmp_path / "results")
    processes = [
        spawn.Process(target=compete, args=(location, writer, barrier, wins), daemon=True) for writer in range(4)
    ]
    for process in processes:
        process.start()
    winner = {}
    for _ in processes:
        writer, won = wins.get(timeout=60)
        assert winner.keys().isdisjoint(won)
        winner |= {f"c{number}": f"w{writer}" for number in won}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = Store.open(location)
    assert len(winner) == 50
    rows = store.read("cells", columns=["cell_id", "attempt_id"]).to_pylist()
    assert {row["cell_id"]: row["attempt_id"] for row in rows} == winner
    assert len(rows) == 50
    assert store.check() == ([], [])


def test_a_link_whose_answer_was_lost_is_a_win(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    fill(store)
    assert store.check() == ([], [])


@pytest.fixture(params=["EPERM", "ENOTSUP", "EOPNOTSUPP", "EXDEV"])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str) -> None:
        code = getattr(errno, request.param)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)


def test_without_links_the_first_still_wins(store: Store, no_links: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    before = files(store)
    monkeypatch.setattr(LocalFolder, "exists", lambda self, path: False)
    assert not store.publish_cell(cell_row(attempt_id="a2"), [])
    assert files(store) == before
    assert store.read("cells")["attempt_id"].to_pylist() == ["a1"]
    assert store.check() == ([], [])


def test_a_full_disk_without_links_leaves_nothing(
    store: Store, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(store)
    fail_write(monkeypatch, errno.ENOSPC, r"\.json$")
    with pytest.raises(StoreFull):
        store.publish_cell(cell_row(), [])
    assert files(store) == before


def test_a_part_without_a_manifest_is_invisible(store: Store) -> None:
    fill(store)
    part = only(store, "parts/cells/*.parquet")
    orphan = part.with_name("c9.a9.00000000.parquet")
    orphan.write_bytes(part.read_bytes())
    assert store.read("cells").num_rows == 1
    assert store.finished_cells() == {"c1"}
    assert store.check() == ([], [f"{orphan}: no manifest names it; its writer died or is still at work"])


@pytest.mark.parametrize("size", [0, 1, 200, -1])
def test_a_torn_manifest_is_passed_over_and_reported(store: Store, size: int, caplog: pytest.LogCaptureFixture) -> None:
    fill(store, "c1")
    fill(store, "c2")
    torn = Path(store.location, "manifests/cell/c1.json")
    torn.write_bytes(torn.read_bytes()[:size])
    assert store.read("cells")["cell_id"].to_pylist() == ["c2"]
    assert f"{torn}: passed over" in caplog.text
    faults, leftovers = store.check()
    assert len(faults) == 1 and f"{torn}: is torn" in faults[0]
    assert ["parts/cells/c1." in leftovers[0], "parts/layers/c1." in leftovers[1], len(leftovers)] == [True, True, 2]


def test_a_manifest_changed_by_hand_is_passed_over_and_reported(store: Store) -> None:
    fill(store)
    path = only(store, "manifests/cell/*.json")
    path.write_text(path.read_text().replace('"rows": 1', '"rows": 2'))
    assert store.read("cells").num_rows == 0
    assert "its checksum is wrong" in store.check().faults[0]


def test_a_manifest_that_vanishes_while_reading_is_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setattr(LocalFolder, "names", lambda self, folder: ["c0.json", "c1.json"])
    assert store.read("cells")["cell_id"].to_pylist() == ["c1"]


def test_a_manifest_that_cannot_be_read_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows what it names, so a table without its rows would be wrong."""
    fill(store)
    read = LocalFolder.read

    def fail(self: LocalFolder, path: str) -> bytes:
        if path == "manifests/cell/c1.json":
            raise OSError(errno.EIO, "Input/output error")
        return read(self, path)

    monkeypatch.setattr(LocalFolder, "read", fail)
    with pytest.raises(StoreError, match=r"c1\.json: cannot be read: Input/output error"):
        store.read("cells")
    assert "c1.json: cannot be read: Input/output error" in store.check().faults[0]


@pytest.mark.parametrize("before", ["manifests/", "parts/layers/", "os.link"])
def test_a_killed_writer_leaves_a_readable_store(store: Store, before: str) -> None:
    """Killed between part and manifest, between two parts, and after writing aside."""
    fill(store, "c1")
    killed = run_script(
        """
        location, before = sys.argv[1:]
        put, link = LocalFolder.publish, os.link

        def publish(self, path, data):
            if path.startswith(before):
                os.kill(os.getpid(), signal.SIGKILL)
            return put(self, path, data)

        def link(source, target):
            os.kill(os.getpid(), signal.SIGKILL)

        if before == "os.link":
            os.link = link
        LocalFolder.publish = publish
        fill(Store.open(location), "c2")
        """,
        store.location,
        before,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert store.finished_cells() == {"c1"}
    for table in record.TABLES:
        assert set(store.read(table)[first_id(table)].to_pylist()) == {"c1"}
    assert store.check().faults == []
    assert len(store.check().leftovers) == {"manifests/": 2, "parts/layers/": 1, "os.link": 1}[before]
    fill(store, "c2", "a2")
    assert store.finished_cells() == {"c1", "c2"}


def test_an_interrupt_after_the_manifest_keeps_its_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put = LocalFolder.publish

    def publish_then_interrupt(self: LocalFolder, path: str, data: bytes) -> bool:
        won = put(self, path, data)
        if path.startswith("manifests/"):
            raise KeyboardInterrupt
        return won

    monkeypatch.setattr(LocalFolder, "publish", publish_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.publish_cell(cell_row(), [layer_row()])
    assert store.check() == ([], [])
    assert store.read("layers").num_rows == 1


def fail_write(monkeypatch: pytest.MonkeyPatch, code: int, pattern: str) -> None:
    """Let the first bytes of files whose path matches be written, and the rest fail."""
    open_file, write = os.open, os.write
    paths: dict[int, str] = {}

    def remember(path: str, *arguments: int) -> int:
        descriptor = open_file(path, *arguments)
        paths[descriptor] = os.fspath(path)
        return descriptor

    def fail(descriptor: int, data: bytes) -> int:
        if re.search(pattern, paths.get(descriptor, "")):
            if len(data) > 8:
                return write(descriptor, data[:8])
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "write", fail)


@pytest.mark.parametrize("ending", ["parts/cells", "parts/layers", "manifests/"])
@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EFBIG"])
def test_no_space_raises_store_full_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: str, ending: str
) -> None:
    before = files(store)
    number = getattr(errno, code)
    with monkeypatch.context() as full:
        fail_write(full, number, ending)
        with pytest.raises(StoreFull, match=rf"{ending}.*: {os.strerror(number)}; [0-9]+ bytes free$"):
            store.publish_cell(cell_row(), [layer_row()])
    assert files(store) == before
    fill(store)
    assert store.check() == ([], [])


def test_writes_in_small_pieces_add_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    fill(store)
    assert store.check() == ([], [])


def test_a_real_limit_on_file_size(store: Store) -> None:
    limited = run_script(
        """
        import resource
        store = Store.open(sys.argv[1])
        fill(store, "c1")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        documents = [document_row("c2", "e1", os.urandom(20).hex()) for _ in range(2000)]
        try:
            store.publish_evaluation("c2", "e1", "a1", [metric_row("c2")], documents)
        except StoreFull as error:
            print(error)
        fill(store, "c3")
        """,
        store.location,
    )
    assert limited.returncode == 0, limited.stderr
    assert "parts/documents/c2.e1.a1." in limited.stdout
    assert "File too large; " in limited.stdout
    assert store.check() == ([], [])
    assert store.finished_evaluations() == {("c1", "e1"), ("c3", "e1")}


def test_a_store_deleted_meanwhile_is_not_made_again(store: Store) -> None:
    Path(store.location).rename(Path(store.location).with_name("elsewhere"))
    with pytest.raises(StoreError, match="the folder is gone"):
        store.publish_cell(cell_row(), [])
    assert not Path(store.location).exists()


def test_a_folder_that_cannot_be_flushed_is_only_logged(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_file = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECTORY:
            raise OSError(errno.EIO, "Input/output error")
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    fill(store)
    assert "could not be flushed" in caplog.text


def test_everything_is_flushed_before_it_gets_its_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, link = os.fsync, os.link

    def name(path: str) -> str:
        return os.path.relpath(path, store.location).split(".")[0]

    def record_flush(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(f"flush {'folder ' + name(path) if os.path.isdir(path) else 'file'}")
        flush(descriptor)

    def record_link(source: str, target: str) -> None:
        events.append(f"link {name(target)}")
        link(source, target)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(os, "link", record_link)
    store.publish_cell(cell_row(), [])
    assert events == [
        "flush file",
        "link parts/cells/c1",
        "flush folder parts/cells",
        "flush file",
        "link manifests/cell/c1",
        "flush folder manifests/cell",
    ]


def test_files_written_aside_are_no_parquet_to_anybody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(publish, "_write_new", lambda path, data: written.append(path) or Path(path).touch())
    store._folder.publish("parts/cells/x.parquet", b"")
    assert len(written) == 1
    assert not written[0].endswith(".parquet")
    assert os.path.basename(written[0]).startswith(".")
    assert publish.is_aside(written[0])


@pytest.mark.parametrize("bad", ["", "../x", "a/b", "a.b", ".", "c1\n", "é", "a b"])
def test_names_that_leave_the_store_are_refused(store: Store, bad: str) -> None:
    before = files(store)
    with pytest.raises(StoreError, match="can name a result"):
        store.publish_cell(cell_row(bad), [])
    with pytest.raises(StoreError, match="can name a result"):
        store.publish_cell(cell_row(attempt_id=bad), [])
    with pytest.raises(StoreError, match="can name a result"):
        store.publish_evaluation("c1", bad, "a1", [metric_row(eval_id=bad)], [])
    with pytest.raises(StoreError, match="can name a result"):
        store.publish_attempt(attempt_row(bad))
    assert files(store) == before


def test_rows_of_another_cell_are_our_own_mistake(store: Store) -> None:
    with pytest.raises(AssertionError):
        store.publish_cell(cell_row("c1"), [layer_row("c2")])
    with pytest.raises(AssertionError):
        store.publish_evaluation("c1", "e1", "a1", [metric_row("c1", "e2")], [])
    with pytest.raises(AssertionError):
        store.publish_evaluation("c1", "e1", "a1", [], [document_row("c2", "e1")])


def test_part_names_tell_whose_they_are(store: Store) -> None:
    fill(store)
    names = [name.rsplit(".", 2)[0] for name in files(store, "*.parquet")]
    assert names == [
        "parts/analysis/c1.e1.a1",
        "parts/attempts/c1.a1",
        "parts/cells/c1.a1",
        "parts/documents/c1.e1.a1",
        "parts/kernels/c1",
        "parts/layers/c1.a1",
        "parts/metrics/c1.e1.a1",
    ]


def test_a_missing_part(store: Store) -> None:
    fill(store)
    part = only(store, "parts/cells/*.parquet")
    part.unlink()
    with pytest.raises(StoreError, match=rf"{part}: is missing.*run `qfarm store check`"):
        store.read("cells")
    assert store.read("layers").num_rows == 2
    assert store.check().faults == [f"{part}: is missing, though a manifest names it"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"X" + data[1:], lambda data: b""])
def test_an_altered_part(store: Store, damage: Callable[[bytes], bytes]) -> None:
    fill(store)
    part = only(store, "parts/cells/*.parquet")
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(StoreError, match=rf"{part}: was altered.*run `qfarm store check`"):
        store.read("cells")
    (fault,) = store.check().faults
    assert fault.startswith(f"{part}: was altered")


def test_a_wrong_row_count(store: Store) -> None:
    fill(store)
    path = only(store, "manifests/attempt/*.json")
    part = json.loads(path.read_text())["parts"][0]
    rewrite_manifest(path, parts=[part | {"rows": 5}])
    with pytest.raises(StoreError, match="has 1 rows, its manifest says 5"):
        store.read("attempts")
    assert store.check().faults == [f"{store.location}/{part['path']}: has 1 rows, its manifest says 5"]


def test_a_manifest_under_another_name(store: Store) -> None:
    fill(store)
    path = only(store, "manifests/cell/*.json")
    copy = path.with_name("c2.json")
    copy.write_bytes(path.read_bytes())
    assert store.read("cells")["cell_id"].to_pylist() == ["c1"]
    assert store.check().faults == [f"{copy}: is a copy of manifests/cell/c1.json"]


@pytest.mark.parametrize("fields", [{"ids": {}}, {"kind": "other"}, {"parts": [{}]}, {"extra": 1}])
def test_a_manifest_with_other_fields(store: Store, fields: dict[str, object]) -> None:
    fill(store)
    path = only(store, "manifests/cell/*.json")
    rewrite_manifest(path, **fields)
    assert store.read("cells").num_rows == 0
    assert store.check().faults[0].startswith(f"{path}: is torn or no manifest")


def test_files_left_aside_and_strangers(store: Store) -> None:
    fill(store)
    root = Path(store.location)
    strange = [
        "manifests/cell/notes.txt",
        "manifests/evaluation/c1.json",
        "manifests/cell/.c2.json.0123abcd.aside",
        "parts/cells/.c2.a1.0123abcd.parquet.0123abcd.aside",
        ".qfarm-store.json.0123abcd.aside",
    ]
    for name in strange:
        (root / name).write_bytes(b"{}")
    faults, leftovers = store.check()
    assert [fault.split(": ")[0] for fault in faults] == [f"{root}/{name}" for name in strange[:2]]
    assert {leftover.split(": ")[0] for leftover in leftovers} == {f"{root}/{name}" for name in strange[2:]}
    assert store.finished_cells() == {"c1"}
    assert store.finished_evaluations() == {("c1", "e1")}
    assert store.read("cells").num_rows == 1


def test_a_publication_during_the_check_is_no_fault(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    names = LocalFolder.names

    def publish_after_first_listing(self: LocalFolder, folder: str) -> list[str]:
        found = names(self, folder)
        if folder == "parts/cells":
            monkeypatch.setattr(LocalFolder, "names", names)
            fill(store)
        return found

    monkeypatch.setattr(LocalFolder, "names", publish_after_first_listing)
    assert store.check() == ([], [])


def test_manifest_says_what_was_published(store: Store) -> None:
    fill(store)
    fields = json.loads(only(store, "manifests/evaluation/*.json").read_text())
    assert fields["format"] == record.FORMAT
    assert fields["kind"] == "evaluation"
    assert fields["ids"] == {"cell_id": "c1", "eval_id": "e1", "attempt_id": "a1"}
    assert fields["created"].endswith("+00:00")
    parts = [(part["table"], part["rows"]) for part in fields["parts"]]
    assert parts == [("metrics", 1), ("documents", 2), ("analysis", 1)]
    for part in fields["parts"]:
        assert part["bytes"] == Path(store.location, part["path"]).stat().st_size
    assert dataclasses.asdict(manifest.Manifest.load(json.dumps(fields).encode()))["ids"] == fields["ids"]
