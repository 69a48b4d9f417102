"""Processes: processor time and memory of a command and of all that it starts, from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

import psutil

LOOK_S = 0.2  # between two looks at memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a command took."""

    wall_s: float
    cpu_s: float  # of all its processes, all threads; what ran between two looks and was adopted elsewhere is missed
    peak_bytes: int  # largest sum of resident memory; pages that processes share count in each
    code: int  # exit status
    tail: str  # the last lines of its standard error


def watched(command: Sequence[str], environ: Mapping[str, str], look_s: float = LOOK_S) -> Usage:
    """Run a command to its end. Ray's daemons outlive their driver by a moment: they count until the driver ends."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=dict(environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    tree, peak, lines = _Tree(process.pid), 0, list[str]()
    assert process.stderr is not None
    reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
    reader.start()
    while process.poll() is None:
        peak = max(peak, tree.look())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(look_s)
    wall = time.perf_counter() - started
    reader.join(timeout=5)  # a daemon may hold the pipe a little longer
    return Usage(
        wall_s=wall, cpu_s=tree.cpu_s, peak_bytes=peak, code=process.returncode, tail="".join(lines[-20:]).strip()
    )


class _Tree:
    """A process and its descendants; those that are gone keep the processor time of the last look."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seconds: dict[tuple[int, float], float] = {}  # by pid and start, since pids come again

    @property
    def cpu_s(self) -> float:
        return sum(self._seconds.values())

    def look(self) -> int:
        """Resident bytes now."""
        try:
            root = psutil.Process(self._root)
            members = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        total = 0
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), member.oneshot():
                times = member.cpu_times()
                self._seconds[member.pid, member.create_time()] = times.user + times.system
                total += member.memory_info().rss
        return total
