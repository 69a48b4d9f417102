"""The cache: entries are whole or absent, made once however many ask, and old ones make room for new ones."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from qfarm import cache
from qfarm.errors import InvalidInput

SPAWN = multiprocessing.get_context("spawn")
YEAR = 365 * 86400


def contents(kind: str) -> dict[str, str]:
    """Files of a kind, leftovers included."""
    folder = cache.root() / kind
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"}


def put(name: str, size: int, age: float, kind: str = "kind") -> Path:
    """Publish a file that was used `age` seconds ago."""
    path = cache.publish_file(kind, name, lambda part: part.write_text("x" * size) and None)
    used = time.time() - age
    os.utime(path, (used, used))
    return path


def never(_: Path) -> None:
    raise AssertionError("made again")


# -- entries ----------------------------------------------------------------------------------------------------------


def test_the_root_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.root() == Path(os.environ["QFARM_CACHE"])
    monkeypatch.delenv("QFARM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.root() == tmp_path / ".cache" / "qfarm"


def test_an_entry_is_made_once() -> None:
    made = cache.entry("kind", "key", lambda folder: (folder / "a").write_text("1") and None)
    assert made == cache.root() / "kind" / "key" and (made / "a").read_text() == "1"
    assert cache.entry("kind", "key", never) == made
    other = cache.entry("kind", "other", lambda folder: None)
    assert other != made and list(other.iterdir()) == []


def _ask(barrier: Any, log: Any, root: str) -> None:
    """One of several processes that want the same entry at the same time."""
    os.environ["QFARM_CACHE"] = root

    def make(folder: Path) -> None:
        log.put("made")
        for i in range(100):
            (folder / str(i)).write_text("x" * 1000)

    barrier.wait(60)
    found = cache.entry("kind", "key", make)
    log.put(sum(len(path.read_text()) for path in found.iterdir()))


def test_processes_that_ask_together_get_one_whole_entry() -> None:
    barrier, log = SPAWN.Barrier(4), SPAWN.Queue()
    processes = [SPAWN.Process(target=_ask, args=(barrier, log, str(cache.root()))) for _ in range(4)]
    for process in processes:
        process.start()
    told = [log.get(timeout=60) for _ in range(5)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert told.count("made") == 1 and told.count(100_000) == 4
    assert log.empty()


def test_an_error_while_making_leaves_nothing_behind() -> None:
    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "half").write_text("x")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        cache.entry("kind", "key", make)
    assert [path.name for path in (cache.root() / "kind").iterdir() if path.suffix != ".lock"] == []
    assert cache.entry("kind", "key", lambda folder: None).is_dir()


def _die_while_making(root: str) -> None:
    os.environ["QFARM_CACHE"] = root

    def make(folder: Path) -> None:
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    cache.entry("kind", "key", make)


def test_a_process_killed_while_making_leaves_no_entry_and_no_lock() -> None:
    process = SPAWN.Process(target=_die_while_making, args=(str(cache.root()),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (cache.root() / "kind" / "key").exists()
    made = cache.entry("kind", "key", lambda folder: (folder / "whole").write_text("y") and None)
    assert [path.name for path in made.iterdir()] == ["whole"]


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_in_one_step() -> None:
    final = put("a", 3, age=0)

    def write(part: Path) -> None:
        assert part.parent == final.parent and part != final
        part.write_text("half of the n")
        assert final.read_text() == "xxx"  # readers still have the old one
        part.write_text("new")

    assert cache.publish_file("kind", "a", write) == final
    assert contents("kind") == {"a": "new"}


def test_a_file_that_could_not_be_written_changes_nothing() -> None:
    put("a", 3, age=0)

    def write(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.publish_file("kind", "a", write)
    assert contents("kind") == {"a": "xxx"}


def test_find_file() -> None:
    assert cache.find_file("kind", "a") is None
    path = put("a", 1, age=YEAR)
    assert cache.find_file("kind", "a") == path
    assert time.time() - path.stat().st_mtime < YEAR / 2  # finding it is using it


def test_the_files_used_longest_ago_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFARM_CACHE_LIMIT", "350")
    for age, name in enumerate("abc", start=1):
        put(name, 100, age=age * YEAR)
    cache.find_file("kind", "c")  # the oldest, but wanted just now
    put("new", 100, age=0)
    assert set(contents("kind")) == {"a", "c", "new"}
    put("large", 250, age=0)
    assert set(contents("kind")) == {"large", "new"}


def test_a_limit_is_reached_before_anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFARM_CACHE_LIMIT", "300")
    for name in "abc":
        put(name, 100, age=YEAR)
    assert set(contents("kind")) == {"a", "b", "c"}


def test_the_new_file_stays_even_if_it_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFARM_CACHE_LIMIT", "10")
    put("other", 5, age=0, kind="elsewhere")
    put("a", 5, age=-YEAR)  # by its time newer than the new one
    put("b", 100, age=0)
    assert set(contents("kind")) == {"b"} and set(contents("elsewhere")) == {"other"}


def test_what_others_are_writing_is_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    put("a", 1, age=0)
    monkeypatch.setenv("QFARM_CACHE_LIMIT", "1")
    folder = cache.root() / "kind"
    (folder / ".b.5.part").write_text("half")
    (folder / "c.lock").write_text("")
    (folder / "entry").mkdir()
    put("b", 1, age=0)
    assert {path.name for path in folder.iterdir()} == {"b", ".b.5.part", "c.lock", "entry"}


@pytest.mark.parametrize("limit", ["64G", "-1", "1e9"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("QFARM_CACHE_LIMIT", limit)
    with pytest.raises(InvalidInput, match=f'QFARM_CACHE_LIMIT: "{limit}" is no number of bytes'):
        put("a", 1, age=0)


def test_a_root_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFARM_CACHE", "/dev/null/x")
    assert cache.find_file("kind", "a") is None
    with pytest.raises(InvalidInput, match="/dev/null/x: the cache cannot be written: Not a directory; set QFARM_CA"):
        cache.entry("kind", "key", never)


# -- hashes of files --------------------------------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock an hour ahead: no file has changed just now."""
    now = time.time_ns()
    monkeypatch.setattr(cache.time, "time_ns", lambda: now + 3600 * 10**9)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remembered() -> list[Path]:
    folder = cache.root() / "hashes"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    for size in (0, 1, cache.HASH_BLOCK, cache.HASH_BLOCK + 1):
        path = tmp_path / str(size)
        path.write_bytes(os.urandom(size))
        assert cache.file_hash(path) == sha256(path)


@pytest.mark.usefixtures("later")
def test_a_hash_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("content")
    known = cache.file_hash(path)
    (entry,) = remembered()
    entry.write_text('{"sha256": "from memory"}')
    assert cache.file_hash(path) == "from memory"
    entry.write_text("{torn")
    assert cache.file_hash(path) == known


@pytest.mark.usefixtures("later")
def test_a_change_is_noticed_whatever_it_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("content")
    before = path.stat()
    cache.file_hash(path)
    (entry,) = remembered()
    entry.write_text('{"sha256": "from memory"}')
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has ticked
        path.write_text("CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as archivers do
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert cache.file_hash(path) == sha256(path)


@pytest.mark.usefixtures("later")
def test_a_file_that_took_anothers_place_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("content")
    cache.file_hash(path)
    (tmp_path / "b").write_text("CONTENT")
    (tmp_path / "b").replace(path)
    assert cache.file_hash(path) == sha256(path)


@pytest.mark.usefixtures("later")
def test_a_hash_that_cannot_be_remembered_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QFARM_CACHE", "/dev/null/x")
    path = tmp_path / "a"
    path.write_text("content")
    assert cache.file_hash(path) == sha256(path)
    assert "cannot be remembered: Not a directory" in caplog.text


def test_a_file_that_changes_right_now_is_not_remembered(tmp_path: Path) -> None:
    """Two changes within one tick of the clock look like one."""
    path = tmp_path / "a"
    for text in ("first!", "second", "third!"):
        path.write_text(text)
        assert cache.file_hash(path) == sha256(path)
    assert remembered() == []
