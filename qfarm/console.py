"""Console: shows a running farm. A live view on a terminal, one plain line per event anywhere else.

Model names and errors are foreign text: nothing in them reaches the terminal as markup or as a control sequence.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qfarm.events import Event, Failed, Finished, JobEnded, JobStarted, Note, Progressed, Started
from qfarm.matrix import Cell
from qfarm.report.figures import duration, number, plain, plural, printable

LATEST = 5  # finished cells that stay in view
ERROR_SHOWN = 300  # characters of an error
IDLE_SECONDS = 15  # a worker without a cell for longer is not counted on
OTHER_LINES = LATEST + 5  # of the live view, beside the running cells
RESUME = "run the same command again: finished cells are kept"
_WORKER_GONE = ("worker_died", "node_died", "preempted")


def print_error(message: str) -> None:
    """One line on stderr."""
    print(f"error: {plain(message)}", file=sys.stderr)


class Chat:
    """A conversation on a terminal, or its answers in a pipe. Both sides' text is foreign."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """One line on stderr, rewritten on a terminal."""
        if sys.stderr.isatty():
            count = f" {done}/{total}" if total else ""
            print(f"\r{stage}{count}\x1b[K", end="\n" if total and done == total else "", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        print(plain(line), file=sys.stderr)

    def questions(self, name: str) -> Iterator[str]:
        """Lines from standard input until it ends, or one is empty or `exit`."""
        print(f"{plain(name)}; an empty line or `exit` ends", file=sys.stderr)
        while True:
            print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if line.strip() in ("", "exit"):
                return
            yield line.strip()

    def echo(self, question: str) -> None:
        print(f"> {plain(question)}")

    def stream(self, pieces: Iterator[str]) -> str:
        """Print pieces of an answer as they come, and return it whole."""
        found = []
        for piece in pieces:
            found.append(piece)
            print(printable(piece), end="", flush=True)
        print("\n")
        return "".join(found)


@dataclasses.dataclass
class _Running:
    name: str
    worker: str
    since: float
    stage: str = ""
    done: int = 0
    total: int = 0

    @property
    def progress(self) -> str:
        """'calibrate + quantize 12/30'"""
        count = f" {self.done}/{self.total}" if self.total else ""
        return f"{self.stage}{count}"


class _State:
    """What the events so far add up to."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.began = clock, clock()
        self.cells = 0
        self.finished = 0
        self.failed = 0
        self.ended = False
        self.running: dict[tuple[str, str], _Running] = {}  # by cell and worker: a straggler's cell may run twice
        self.latest: collections.deque[str] = collections.deque(maxlen=LATEST)
        self._seconds = 0.0  # of all finished cells
        self._expected_s: float | None = None  # of all cells; None: the plan expects nothing
        self._expected: dict[str, float] = {}  # of cells that have begun
        self._taken_s = self._foreseen_s = 0.0  # of finished cells that were expected to take some time
        self._closed_s = 0.0  # expected of cells finished or given up
        self._seen: dict[str, float] = {}  # when a worker last had a cell

    def update(self, event: Event) -> tuple[str, str]:
        """Take an event in. Returns the word and the text to print for it; no text: nothing to say."""
        match event:
            case JobStarted():
                self.began, self.cells, self._expected_s = self.clock(), event.cells, event.expected_s
                before = f", {event.done_before:,} finished before" if event.done_before else ""
                return "job", f"{event.job}: {plural(event.cells, 'cell')} to run{before}; results in {event.store}"
            case Started():
                name = _name(event.cell)
                self._seen[event.worker] = self.clock()
                if event.expected_s is not None:
                    self._expected[event.cell.cell_id] = event.expected_s
                self.running[event.cell.cell_id, event.worker] = _Running(name, event.worker, self.clock())
                again = f", attempt {event.attempt}" if event.attempt > 1 else ""
                return "started", f"{name} on {event.worker}{again}"
            case Progressed():
                return "stage", self._progressed(event)
            case Finished():
                return "finished", self._finished(event)
            case Failed():
                return "failed", self._failed(event)
            case Note():
                return "note", event.text
            case JobEnded():
                self.running.clear()
                self.ended = True
                counts = f"{event.finished:,} finished, {event.failed:,} failed in {duration(event.seconds)}"
                return "ended", f"interrupted: {counts}; {RESUME}" if event.interrupted else counts

    def eta(self) -> float | None:
        """Seconds until everything is done; None before the first finish."""
        remaining = self.cells - self.finished - self.failed
        if not self.finished or self.ended or remaining <= 0:
            return None
        now = self.clock()
        begun = {cell_id: now - running.since for (cell_id, _), running in self.running.items()}
        waiting = max(0, remaining - len(begun))
        work = self._work_expected(begun) if waiting or begun else 0.0
        if work is None:
            mean = self._seconds / self.finished
            work = waiting * mean + sum(max(0.0, mean - seconds) for seconds in begun.values())
        workers = {worker for worker, seen in self._seen.items() if now - seen < IDLE_SECONDS}
        workers |= {running.worker for running in self.running.values()}
        return work / max(1, min(len(workers), remaining))

    def _work_expected(self, begun: Mapping[str, float]) -> float | None:
        """Seconds of one worker for what is left, by the plan and how wrong it was so far; None without a plan."""
        if self._expected_s is None or not self._foreseen_s or not begun.keys() <= self._expected.keys():
            return None
        pace = self._taken_s / self._foreseen_s
        ahead = sum(max(0.0, pace * self._expected[cell_id] - seconds) for cell_id, seconds in begun.items())
        waiting_s = self._expected_s - self._closed_s - sum(self._expected[cell_id] for cell_id in begun)
        return ahead + pace * max(0.0, waiting_s)

    def _progressed(self, event: Progressed) -> str:
        running = self.running.get((event.cell_id, event.worker))
        if running is None:
            return ""
        is_new = event.stage != running.stage
        running.stage, running.done, running.total = event.stage, event.done, event.total
        return f"{running.name}: {event.stage}" if is_new else ""

    def _finished(self, event: Finished) -> str:
        for key in [key for key in self.running if key[0] == event.cell.cell_id]:
            del self.running[key]
        self._seen[event.worker] = self.clock()
        self.finished += 1
        self._seconds += event.seconds
        expected = self._expected.get(event.cell.cell_id, 0.0)
        self._closed_s += expected
        if expected:
            self._taken_s, self._foreseen_s = self._taken_s + event.seconds, self._foreseen_s + expected
        figures = [f"{label} {_figure(label, value)}" for label, value in event.figures]
        figures.append(f"{number(event.linear_bits, 'bits')} bits")
        result = f"{_name(event.cell)}: {', '.join(figures)}, {duration(event.seconds)}"
        self.latest.append(result)
        return f"{result} ({self.summary()})"

    def _failed(self, event: Failed) -> str:
        self.running.pop((event.cell.cell_id, event.worker), None)
        self._seen[event.worker] = self.clock()
        if event.kind in _WORKER_GONE:
            del self._seen[event.worker]
        self.failed += event.retry_in is None
        if event.retry_in is None:
            self._closed_s += self._expected.get(event.cell.cell_id, 0.0)
        then = "given up" if event.retry_in is None else f"retry in {duration(event.retry_in)}"
        return f"{_name(event.cell)}: {event.kind}: {plain(event.error, ERROR_SHOWN)} (attempt {event.attempt}, {then})"

    def summary(self) -> str:
        """'3 of 12 done, 1 failed, about 2m 10s left'"""
        parts = [f"{self.finished:,} of {self.cells:,} done"]
        parts += [f"{self.failed:,} failed"] if self.failed else []
        eta = self.eta()
        return ", ".join([*parts, f"about {duration(eta)} left"] if eta is not None else parts)


class Console:
    """Takes the events of one run. `live`: None chooses by the stream, `width`: None takes the terminal's."""

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._is_live = _suits_live(self._stream, self._encoding) if live is None else live
        self._rich = RichConsole(
            file=self._stream,
            width=width,
            force_terminal=self._is_live,
            markup=False,
            highlight=False,
            emoji=False,
        )
        self._state = _State(clock)
        self._lock = threading.Lock()  # the live view is drawn by a thread of its own
        self._view: Live | None = None
        self._gone = False  # nobody reads any more

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def handle(self, event: Event) -> None:
        """Show an event. A reader that has gone away never stops the farm."""
        with self._lock:
            word, text = self._state.update(event)
        try:
            if isinstance(event, JobStarted):
                self._print("where", event.where)
            if isinstance(event, JobEnded):
                self._stop()  # its last picture stays, and what follows stands below it
            if text and (not self._is_live or word not in ("started", "stage", "finished")):
                self._print(word, text)
            if self._is_live and isinstance(event, JobStarted):
                self._view = Live(console=self._rich, get_renderable=self._draw, refresh_per_second=4)
                self._view.start()
        except OSError:
            self._gone, self._view = True, None

    def snapshot(self) -> dict[str, Any]:
        """How far the run is, as plain data: `summary`, and `cells` with name, stage, worker and seconds."""
        with self._lock:
            now = self._state.clock()
            cells = [
                (one.name, one.progress, plain(one.worker), round(now - one.since, 1))
                for one in self._state.running.values()
            ]
            return {"summary": self._state.summary(), "cells": cells}

    def _print(self, word: str, text: str) -> None:
        if self._gone:
            return
        elapsed = duration(self._state.clock() - self._state.began)
        line = f"{elapsed:>7}  {word:<8}  {self._readable(text)}"
        if self._is_live:
            self._rich.print(Text(line, style={"failed": "red", "note": "yellow"}.get(word, ""), overflow="fold"))
        else:
            self._stream.write(f"{line}\n")
            self._stream.flush()

    def _readable(self, text: str) -> str:
        """Foreign text made safe, with ? for what the stream cannot write."""
        return plain(text).encode(self._encoding, "replace").decode(self._encoding)

    def _stop(self) -> None:
        if self._view is not None:
            self._view.stop()
            self._view = None

    def _draw(self) -> RenderableType:
        with self._lock:
            return Group(self._overall(), self._cells(), *(self._line(text) for text in self._state.latest))

    def _overall(self) -> RenderableType:
        state = self._state
        bar = ProgressBar(total=max(1, state.cells), completed=state.finished + state.failed, width=30)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(bar, self._line(f"{state.summary()}, {duration(state.clock() - state.began)} so far"))
        return grid

    def _cells(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for ratio in (3, 3, 2, None):
            grid.add_column(no_wrap=True, overflow="ellipsis", ratio=ratio)
        room = max(1, self._rich.size.height - OTHER_LINES)
        running = list(self._state.running.values())
        for cell in running[:room]:
            elapsed = duration(self._state.clock() - cell.since)
            grid.add_row(*(self._line(text) for text in (cell.name, cell.progress, cell.worker, elapsed)))
        if len(running) > room:
            grid.add_row(self._line(f"and {len(running) - room:,} more"))
        return grid

    def _line(self, text: str) -> Text:
        return Text(self._readable(text), no_wrap=True, overflow="ellipsis")


def _suits_live(stream: TextIO, encoding: str) -> bool:
    # The view draws with characters that other encodings lack.
    return stream.isatty() and os.environ.get("TERM") != "dumb" and encoding.lower().replace("-", "") == "utf8"


def _name(cell: Cell) -> str:
    """'gptq w4 g128 · SmolLM2-135M'"""
    model = plain(cell.model).rstrip("/").rpartition("/")[2]
    return f"{plain(cell.label)} · {model}"


def _figure(label: str, value: float) -> str:
    return number(value, "perplexity" if label.startswith("perplexity") else "")
