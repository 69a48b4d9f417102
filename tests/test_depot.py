"""The cache that machines share: fetched where it is missing, never torn, bounded, and no cell's trouble."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from qfarm import cache, cluster, depot, objects
from qfarm.errors import InvalidInput
from tests.test_objects import Memory

URL = "s3://bucket/cache"
Move = Callable[[], None]


def text(words: str) -> Callable[[Path], None]:
    def write(part: Path) -> None:
        part.write_text(words)

    return write


def never(part: Path) -> None:
    raise AssertionError("made again")


@pytest.fixture
def move(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Move:
    """Go to another machine, whose own cache is empty."""
    return lambda: monkeypatch.setenv("QFARM_CACHE", str(tmp_path_factory.mktemp("machine")))


@pytest.fixture(params=["folder", "objects"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if request.param == "objects":
        memory = Memory()
        monkeypatch.setattr(objects, "_filesystem", lambda url: memory)
    found = URL if request.param == "objects" else str(tmp_path / "depot")
    monkeypatch.setenv(depot.VARIABLE, found)
    return found


def folder(place: str):
    return depot._folder(place)


def test_what_one_machine_made_another_finds(place: str, move: Move):
    depot.publish("hidden", "a", text("states"))
    move()
    assert cache.find_file("hidden", "a") is None
    found = depot.find("hidden", "a")
    assert found is not None and found.read_text() == "states" and found == cache.find_file("hidden", "a")
    assert depot.find("hidden", "b") is None and depot.find("other", "a") is None


def test_what_is_there_stays(place: str, move: Move):
    depot.publish("hidden", "a", text("first"))
    move()
    assert depot.publish("hidden", "a", text("second")).read_text() == "second"  # here
    move()
    assert depot.find("hidden", "a").read_text() == "first"


def test_a_torn_entry_is_made_again(place: str, move: Move, caplog: pytest.LogCaptureFixture):
    depot.publish("hidden", "a", text("states"))
    whole = folder(place).read("hidden/a")
    folder(place).remove("hidden/a")
    folder(place).publish("hidden/a", whole[:-1])
    move()
    with caplog.at_level(logging.WARNING):
        assert depot.find("hidden", "a") is None
    assert "hidden/a: torn" in caplog.text and not folder(place).exists("hidden/a")
    depot.publish("hidden", "a", text("states"))
    move()
    assert depot.find("hidden", "a").read_text() == "states"


def test_the_oldest_make_room(place: str, move: Move, monkeypatch: pytest.MonkeyPatch):
    size = depot.DIGEST_BYTES + 10
    monkeypatch.setenv("QFARM_CACHE_LIMIT", str(2 * size))
    ages = {"hidden/a": 30.0, "hidden/b": 40.0, "hidden/c": 10.0}
    monkeypatch.setattr(type(folder(place)), "age", lambda self, path: ages[path])
    for name in "ab":
        depot.publish("hidden", name, text("0123456789"))
    assert set(folder(place).sizes("hidden")) == {"a", "b"}
    depot.publish("hidden", "c", text("0123456789"))
    assert folder(place).sizes("hidden") == {"a": size, "c": size}


def test_a_depot_out_of_reach_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    class Gone(Memory):
        def cat_file(self, path: str, *args: object, **options: object) -> bytes:
            raise ConnectionError("no route")

    gone = Gone()
    monkeypatch.setattr(objects, "_filesystem", lambda url: gone)
    monkeypatch.setenv(depot.VARIABLE, URL)
    with caplog.at_level(logging.WARNING):
        assert depot.find("hidden", "a") is None
    assert f"{URL}: the shared cache cannot be read: no route" in caplog.text
    gone.faults = [ConnectionError("no route")]
    with caplog.at_level(logging.WARNING):
        assert depot.publish("hidden", "a", text("x")).read_text() == "x"
    assert f"{URL}: the shared cache cannot be written" in caplog.text


def test_without_a_depot_nothing_is_shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(depot.VARIABLE, raising=False)
    monkeypatch.setattr(depot, "_folder", never)
    assert depot.find("hidden", depot.publish("hidden", "a", text("x")).name).read_text() == "x"


@pytest.mark.parametrize("given", ["cache", "ftp://host/x", "s3://key:secret@bucket/x"])
def test_a_place_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, given: str):
    monkeypatch.setenv(depot.VARIABLE, given)
    with pytest.raises(InvalidInput) as refused:
        depot.location()
    assert "secret" not in str(refused.value)


def test_workers_are_told_where_it_is():
    environ = {depot.VARIABLE: URL, "QFARM_CACHE_LIMIT": "5"}
    assert cluster.worker_environment(environ, {}, 1).items() >= environ.items()


def _publish(number: int, root: str) -> None:
    import os

    os.environ["QFARM_CACHE"] = f"{root}/machine{number}"
    for name in map(str, range(20)):
        depot.publish("hidden", name, text(f"{name} " * 1000))


def test_machines_that_publish_together_leave_whole_entries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, move: Move
):
    monkeypatch.setenv(depot.VARIABLE, str(tmp_path / "depot"))
    workers = [
        multiprocessing.get_context("spawn").Process(target=_publish, args=(number, str(tmp_path)))
        for number in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    move()
    assert [depot.find("hidden", name).read_text() for name in map(str, range(20))] == [
        f"{name} " * 1000 for name in range(20)
    ]
    assert not list((tmp_path / "depot").rglob("*.aside"))
