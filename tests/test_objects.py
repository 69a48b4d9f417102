"""A store in an object store: by fsspec's memory for every rule, by moto's S3 on loopback as a process of its own."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from qfarm import cli, record, remote
from qfarm.beacon import Beacon
from qfarm.errors import InvalidInput, StoreError, StoreFull
from qfarm.objects import CONFLICT, ObjectFolder, check_url, is_url
from qfarm.pack import merge
from qfarm.query import query
from qfarm.store import Store, is_store
from tests.simulated_aws import simulated_aws
from tests.test_store import attempt_row, cell_row, document_row, fill, metric_row

URL = "s3://bucket/results"


class Memory(fsspec.get_filesystem_class("memory")):
    """A bucket in memory; `faults` are raised by the next puts."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        self.faults: list[Exception] = []

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if self.faults:
            raise self.faults.pop(0)
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        super().pipe_file(path, value, **options)


class Careless(Memory):
    """A service that knows no conditions."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, **options)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def store(memory: Memory) -> Store:
    store = Store(URL, ObjectFolder(URL, memory))
    store._create()
    return store


def everything(store: Store) -> dict[str, list[dict[str, object]]]:
    return {table: store.read(table).to_pylist() for table in record.TABLES}


def test_a_store_of_objects_is_like_one_of_files(store: Store, tmp_path: Path) -> None:
    local = Store.open(tmp_path / "store", create=True)
    for place in (store, local):
        fill(place, "c2")
        fill(place, "c1")
    assert everything(store) == everything(local)
    assert store.finished_evaluations() == local.finished_evaluations() == {("c1", "e1"), ("c2", "e1")}
    assert store.check() == ([], [])
    copy = Store.open(tmp_path / "copy", create=True)
    assert merge(copy, [store]).added == 8 and everything(copy) == everything(local)
    assert query(store, "SELECT count(*) FROM documents JOIN results USING (cell_id)").rows == ((4,),)
    with pytest.raises(StoreError, match="objects are no files"):
        store.files("cells")


def test_the_first_manifest_wins(store: Store, memory: Memory) -> None:
    fill(store)
    before = sorted(memory.store)
    assert not store.publish_evaluation("c1", "e1", "a2", [metric_row(value=9.0)], [document_row()])
    assert sorted(memory.store) == before


def test_the_loser_of_a_race_removes_its_parts(store: Store, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectFolder, "exists", lambda self, path: False)  # somebody else comes in between
    fill(store)
    before = sorted(memory.store)
    assert not store.publish_attempt(attempt_row(outcome="oom"))
    assert sorted(memory.store) == before and store.read("attempts")["outcome"].to_pylist() == ["ok"]


def test_a_put_whose_answer_was_lost_is_ours(memory: Memory) -> None:
    folder = ObjectFolder(URL, memory)
    memory.pipe_file("/bucket/results/a", b"mine")
    assert folder.publish("a", b"mine") and not folder.publish("a", b"another's")


@pytest.mark.parametrize("taken", [True, False])
def test_a_conflict_of_two_puts_is_looked_at_again(memory: Memory, taken: bool) -> None:
    folder = ObjectFolder(URL, memory)
    memory.faults = [OSError(errno.EIO, f"An error occurred ({CONFLICT}) when calling PutObject")]
    if taken:
        memory.store["/bucket/results/a"] = fsspec.implementations.memory.MemoryFile(memory, "a", b"theirs")
    assert folder.publish("a", b"mine") is not taken


def test_a_service_that_overwrites_is_refused() -> None:
    careless = Careless()
    with pytest.raises(StoreError, match="s3://bucket/results: this service overwrites objects"):
        Store(URL, ObjectFolder(URL, careless))._create()
    assert careless.store == {}


def test_a_put_that_is_not_allowed_stops_the_job_and_not_the_cell(store: Store, memory: Memory) -> None:
    memory.faults = [PermissionError(errno.EACCES, "Access Denied")]
    with pytest.raises(StoreFull, match="s3://bucket/results/parts/.*Access Denied"):
        store.publish_attempt(attempt_row())


def test_an_error_of_the_clients_own_is_one_line(store: Store, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Could not connect\nto the endpoint")

    monkeypatch.setattr(memory, "ls", fail)
    with pytest.raises(StoreError, match="cannot be read: RuntimeError: Could not connect to the endpoint"):
        store.read("cells")


def test_compacting_objects(store: Store, memory: Memory) -> None:
    for cell_id in ("c1", "c2"):
        fill(store, cell_id)
    before = everything(store)
    assert store.compact() is not None
    again = Store(URL, ObjectFolder(URL, memory))
    assert everything(again) == before and again._generation() is not None and again.check() == ([], [])


@pytest.mark.parametrize(
    ("location", "fault"),
    [
        ("s3://key:secret@bucket/results", "the URL holds credentials or options"),
        ("s3://bucket/results?secret=x", "the URL holds credentials or options"),
        ("http://bucket/results", "no object store that is known; give s3:// or gs://"),
        ("s3:///results", "not a store's URL; give s3://BUCKET/PREFIX"),
        ("s3://bucket/../other", "not a store's URL"),
    ],
)
def test_urls_that_are_refused(location: str, fault: str) -> None:
    for call in (check_url, Store.open, is_store, remote.require_shared_store):
        with pytest.raises(InvalidInput, match=fault) as raised:
            call(location)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("location", "url"), [("gs://b/r", True), (Path("s3://b/r"), True), ("C:/r", False), ("a:b", False)]
)
def test_what_is_a_url(location: str | Path, url: bool) -> None:
    assert is_url(location) is url


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", fail)
    with pytest.raises(StoreError, match=r"s3://b/r: needs another package; run: pip install 'qfarm\[s3\]'"):
        Store.open("s3://b/r")


def test_no_news_of_running_jobs_in_a_store_of_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Beacon(URL, None)._write()
    assert list(tmp_path.iterdir()) == []


# -- moto -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of moto's S3, and the environment by which clients find it."""
    with simulated_aws("us-east-1"):
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("qfarm-test")
        yield "s3://qfarm-test"


def race(url: str, start: Any, wins: Any) -> None:
    """Publish ten cells as one of several."""
    store = Store.open(url)
    start.wait()
    for number in range(10):
        if store.publish_cell(cell_row(f"c{number}", f"a{os.getpid()}"), []):
            wins.put(number)


@pytest.mark.slow
def test_a_store_on_s3(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{bucket}/one"
    assert not is_store(url)
    with pytest.raises(StoreError, match="no such store"):
        Store.open(url)
    store, local = Store.open(url, create=True), Store.open(tmp_path / "store", create=True)
    for place in (store, local):
        fill(place, "c2")
        fill(place, "c1")
    assert is_store(url) and everything(Store.open(url)) == everything(local)
    assert not store.publish_evaluation("c1", "e1", "a2", [metric_row(value=9.0)], [])
    assert store.compact() is not None and everything(Store.open(url)) == everything(local)
    assert Store.open(url).check() == ([], [])
    assert query(Store.open(url), "SELECT count(*) FROM documents").rows == ((4,),)
    cli_codes = [run_cli(["store", "check", url]), run_cli(["report", url])]
    assert cli_codes == [0, 0] and "the store is sound" in capsys.readouterr().out


def run_cli(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_of_three_processes_exactly_one_wins_each_name_on_s3(bucket: str) -> None:
    url = f"{bucket}/race"
    Store.open(url, create=True)
    context = multiprocessing.get_context("spawn")
    start, wins = context.Barrier(3), context.Queue()
    processes = [context.Process(target=race, args=(url, start, wins)) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(wins.get(timeout=300) for _ in range(10))
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert found == list(range(10)) and wins.empty()
    assert Store.open(url).check() == ([], []) and Store.open(url).read("cells").num_rows == 10


@pytest.mark.slow
def test_a_torn_object_is_passed_over_on_s3(bucket: str) -> None:
    url = f"{bucket}/torn"
    store = Store.open(url, create=True)
    fill(store, "c1")
    fill(store, "c2")
    path = "manifests/evaluation/c1.e1.json"
    whole = store._folder.read(path)
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{url.partition('://')[2]}/{path}", whole[:-5])
    assert {row["cell_id"] for row in Store.open(url).read("metrics").to_pylist()} == {"c2"}
    assert len(Store.open(url).check().faults) == 1


@pytest.mark.slow
def test_a_dead_endpoint_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="the store cannot be read: .*connect") as raised:
        Store.open(f"{bucket}/one")
    assert "\n" not in str(raised.value)
