"""The console: events in, lines or a live view out."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys

import pytest

from qfarm.console import Console, print_error
from qfarm.errors import Failure
from qfarm.events import Failed, Finished, JobEnded, JobStarted, Note, Progressed, Started
from qfarm.matrix import Cell

LABEL = "perplexity wikitext2 2048"
HOSTILE = "[red]x[/red]\x1b[31m\x1b]0;title\x07\n\u202e\udcff[/]y"
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
TERMINAL_CONTROLS = re.compile(r"\x1b\[(?:\d*(?:;\d+)*m|\?25[hl]|\d*[AK])|\r")  # what rich itself writes


def cell(recipe="gptq", model="example/Tiny-135M") -> Cell:
    return Cell(
        model=model,
        fingerprint="f",
        tokenizer="t",
        dtype="bfloat16",
        recipe=recipe,
        methods=({"name": recipe, "version": 1, "options": {}},),
        scheme="w4",
        group_size=128,
        symmetric=False,
        scale_dtype="float16",
        statistics=None,
        calibration=None,
        seed=None,
    )


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watch:
    """A console on a text buffer, with a clock that the test sets."""

    def __init__(self, *, live=False, width=80, encoding=None) -> None:
        self.clock = Clock()
        self.stream = io.StringIO() if encoding is None else io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        self.console = Console(stream=self.stream, live=live, width=width, clock=self.clock)

    def __call__(self, *events) -> list[str]:
        """The lines that these events add."""
        before = len(self.text)
        for event in events:
            self.console.handle(event)
        return self.text[before:].splitlines()

    @property
    def text(self) -> str:
        if isinstance(self.stream, io.StringIO):
            return self.stream.getvalue()
        self.stream.flush()
        return self.stream.buffer.getvalue().decode(self.stream.encoding)


def job(cells=3, done_before=1, where="local Ray, 2 CPUs") -> JobStarted:
    return JobStarted(job="tiny", where=where, store="/results", cells=cells, done_before=done_before)


def started(one, worker="worker-0", attempt=1) -> Started:
    return Started(cell=one, attempt=attempt, worker=worker)


def progressed(one, stage, done=0, total=0, worker="worker-0") -> Progressed:
    return Progressed(cell_id=one.cell_id, worker=worker, stage=stage, done=done, total=total)


def finished(one, seconds=60.0, worker="worker-0") -> Finished:
    return Finished(cell=one, worker=worker, seconds=seconds, figures=((LABEL, 18.0531),), linear_bits=4.156)


def failed(one, retry_in, attempt=1, kind=Failure.OOM, error="CUDA out of memory", worker="worker-0") -> Failed:
    return Failed(cell=one, worker=worker, kind=kind, error=error, attempt=attempt, retry_in=retry_in)


# -- lines ------------------------------------------------------------------------------------------------------------


def test_where_it_runs_comes_first():
    assert Watch()(job()) == [
        "   0.0s  where     local Ray, 2 CPUs",
        "   0.0s  job       tiny: 3 cells to run, 1 finished before; results in /results",
    ]


def test_one_line_per_event():
    watch, one = Watch(), cell()
    watch(job())
    watch.clock.now += 5
    assert watch(started(one)) == ["   5.0s  started   gptq w4 g128 · Tiny-135M on worker-0"]
    watch.clock.now += 60
    assert watch(finished(one)) == [
        " 1m 05s  finished  gptq w4 g128 · Tiny-135M: perplexity wikitext2 2048 18.05, 4.156 bits, 1m 00s "
        "(1 of 3 done, about 2m 00s left)"
    ]
    assert watch(Note(text="worker-1 was lost")) == [" 1m 05s  note      worker-1 was lost"]
    assert watch(JobEnded(finished=2, failed=1, interrupted=False, seconds=200)) == [
        " 1m 05s  ended     2 finished, 1 failed in 3m 20s"
    ]


def test_one_line_per_stage_not_per_step():
    watch, one = Watch(), cell()
    watch(job(), started(one))
    lines = watch(*(progressed(one, "calibrate + quantize", done, 30) for done in range(30)))
    assert lines == ["   0.0s  stage     gptq w4 g128 · Tiny-135M: calibrate + quantize"]
    assert len(watch(progressed(one, "evaluate"), progressed(one, "evaluate", 1, 5))) == 1


def test_progress_of_an_unknown_cell_is_passed_over():
    watch = Watch()
    assert watch(job(), progressed(cell(), "load"))[2:] == []


def test_failures_say_what_follows():
    watch, one = Watch(), cell()
    watch(job(), started(one))
    assert watch(failed(one, retry_in=10.0)) == [
        "   0.0s  failed    gptq w4 g128 · Tiny-135M: oom: CUDA out of memory (attempt 1, retry in 10s)"
    ]
    assert watch(started(one, attempt=2))[0].endswith("on worker-0, attempt 2")
    assert watch(failed(one, retry_in=None, attempt=2))[0].endswith("(attempt 2, given up)")


def test_an_interrupted_job_says_how_to_go_on():
    (line,) = Watch()(JobEnded(finished=1, failed=0, interrupted=True, seconds=9))
    assert line.endswith(
        "interrupted: 1 finished, 0 failed in 9.0s; run the same command again: finished cells are kept"
    )


# -- time left --------------------------------------------------------------------------------------------------------


def test_no_estimate_before_the_first_finish():
    watch, one, two = Watch(), cell("rtn"), cell("gptq")
    lines = watch(job(), started(one), started(two, "worker-1"), progressed(one, "load"))
    lines += watch(failed(one, retry_in=None))
    assert "left" not in "".join(lines)


def test_time_left_counts_workers_and_what_has_begun():
    watch = Watch()
    one, two = cell("rtn"), cell("gptq")
    watch(job(cells=10), started(one), started(two, "worker-1"))
    watch.clock.now += 60
    # 8 waiting cells of 60 s, one that has had its 60 s, two workers.
    assert "about 4m 00s left" in watch(finished(one))[0]
    watch(started(cell("awq")))
    watch.clock.now += 30
    # Mean (60 + 90) / 2; 7 wait, awq has had 30 of 75 s; two workers: (525 + 45) / 2.
    assert "about 4m 45s left" in watch(finished(two, seconds=90.0, worker="worker-1"))[0]


def test_time_left_follows_what_the_plan_expects():
    watch, one, two = Watch(), cell("rtn"), cell("gptq")
    begun = [dataclasses.replace(started(one), expected_s=30.0)]
    begun.append(dataclasses.replace(started(two, "worker-1"), expected_s=100.0))
    watch(dataclasses.replace(job(cells=4), expected_s=330.0), *begun)
    watch.clock.now += 60
    # It took twice what was expected: gptq has 200 - 60 left, two waiting cells 2 * (330 - 30 - 100); two workers.
    assert "about 4m 30s left" in watch(finished(one))[0]
    watch(failed(two, retry_in=None, worker="worker-1"))
    again = dataclasses.replace(started(cell("awq")), expected_s=150.0)
    watch.clock.now += 100
    # awq is expected to take 300, the last cell 2 * (330 - 30 - 100 - 150); two cells, and one worker seen lately.
    assert "2 of 4 done" not in watch.text
    assert watch(again) and watch.console.snapshot()["summary"].endswith("about 6m 40s left")


@pytest.mark.parametrize(
    ("kind", "before", "left"),
    [
        (Failure.OOM, 55, "1m 30s"),  # the worker lives on
        (Failure.OOM, 5, "3m 00s"),  # it has had nothing to do for long
        (Failure.NODE_DIED, 55, "3m 00s"),
    ],
)
def test_lost_and_idle_workers_are_not_counted_on(kind, before, left):
    watch = Watch()
    one, two = cell("rtn"), cell("gptq")
    watch(job(cells=4), started(one), started(two, "worker-1"))
    watch.clock.now += before
    (line,) = watch(failed(two, retry_in=0.0, kind=kind, worker="worker-1"))
    assert line.endswith("(attempt 1, retry in 0.0s)")
    watch.clock.now += 60 - before
    assert f"about {left} left" in watch(finished(one))[0]


def test_nothing_is_left_at_the_end():
    watch, one = Watch(), cell()
    assert "left" not in watch(job(cells=1), started(one), finished(one))[-1]


# -- foreign text -----------------------------------------------------------------------------------------------------


def hostile_events():
    one = cell(model=f"org/{HOSTILE}")
    return (
        job(where=HOSTILE),
        started(one, worker=HOSTILE),
        progressed(one, HOSTILE, 1, 2, worker=HOSTILE),
        failed(one, retry_in=1.0, error=HOSTILE, worker=HOSTILE),
        started(one),
        progressed(one, HOSTILE, 1, 2),
        finished(one),
        Note(text=HOSTILE),
        JobEnded(finished=1, failed=0, interrupted=False, seconds=1.0),
    )


@pytest.mark.parametrize("encoding", [None, "utf-8", "ascii", "latin-1"])
def test_foreign_text_is_one_harmless_line(encoding):
    lines = Watch(encoding=encoding)(*hostile_events())
    assert len(lines) == 10
    assert not CONTROLS.search("\n".join(lines))
    assert all("[red]x[/red] [/]y" in lines[i] for i in (0, 2, 3, 4, 8))


def test_foreign_text_in_the_live_view(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    watch = Watch(live=True)
    *before, end = hostile_events()
    watch(*before)
    watch.console._view.refresh()
    watch(end)
    text = TERMINAL_CONTROLS.sub("", watch.text)
    assert not CONTROLS.search(text)
    assert "[red]x[/red]" in text and "title" not in text


def test_long_errors_are_cut():
    watch, one = Watch(), cell()
    watch(job(), started(one))
    assert len(watch(failed(one, retry_in=None, error="x" * 10_000))[0]) < 400


def test_errors_of_the_command_line_are_one_line(capsys):
    print_error("jobs/a.yaml: line 3\n\x1b[31m[red]bad")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: jobs/a.yaml: line 3 [red]bad\n")


# -- the live view ----------------------------------------------------------------------------------------------------


def frame(watch) -> str:
    """What the live view would draw now."""
    with watch.console._rich.capture() as capture:
        watch.console._rich.print(watch.console._draw())
    return TERMINAL_CONTROLS.sub("", capture.get())


def test_live_view_shows_running_and_finished_cells():
    watch = Watch(live=True, width=120)
    one, two = cell("rtn"), cell("gptq")
    watch(job(), started(one), started(two, "worker-1"), progressed(two, "quantize", 12, 30, "worker-1"))
    watch.clock.now += 60
    watch(finished(one))
    lines = frame(watch).splitlines()
    assert "1 of 3 done, about 30s left, 1m 00s so far" in lines[0]
    assert lines[1].split() == "gptq w4 g128 · Tiny-135M quantize 12/30 worker-1 1m 00s".split()
    assert lines[2].startswith("rtn w4 g128 · Tiny-135M: perplexity wikitext2 2048 18.05, 4.156 bits")
    watch(JobEnded(finished=1, failed=0, interrupted=True, seconds=60))
    assert "gptq" not in frame(watch) and "left" not in frame(watch)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_live_view_fits(width):
    watch = Watch(live=True, width=width)
    watch(job(cells=200))
    for index in range(100):
        one = cell(f"method{index}", model="organisation/" + "long-name-" * 10)
        watch(started(one, f"worker-{index}"), progressed(one, "calibrate + quantize", index, 100, f"worker-{index}"))
        if index < 20:
            watch(finished(one, worker=f"worker-{index}"))
    lines = frame(watch).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= watch.console._rich.size.height
    assert any("more" in line for line in lines)
    watch(JobEnded(finished=20, failed=0, interrupted=False, seconds=1.0))


def test_live_view_prints_failures_above_and_the_end_below():
    watch, one = Watch(live=True, width=120), cell()
    watch(job(), started(one), failed(one, retry_in=None))
    watch(JobEnded(finished=0, failed=1, interrupted=False, seconds=5.0))
    text = TERMINAL_CONTROLS.sub("", watch.text)
    assert "failed    gptq w4 g128 · Tiny-135M: oom: CUDA out of memory (attempt 1, given up)" in text
    assert text.rstrip().endswith("ended     0 finished, 1 failed in 5.0s")
    assert watch.console._view is None


def test_leaving_the_context_stops_the_live_view():
    watch = Watch(live=True)
    with pytest.raises(KeyboardInterrupt), watch.console:
        watch(job())
        assert watch.console._view is not None
        raise KeyboardInterrupt
    assert watch.console._view is None
    assert watch.text.endswith("\x1b[?25h")  # the cursor is back


def test_no_color_is_honoured(monkeypatch):
    def colours() -> bool:
        watch = Watch(live=True)
        with watch.console:
            watch(job(), failed(cell(), retry_in=None))
        return bool(re.search(r"\x1b\[(?:\d+;)*3\d", watch.text))

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()


def test_a_buffer_is_no_terminal():
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.handle(job())
    assert "\x1b" not in stream.getvalue()


def test_a_reader_that_has_gone_does_not_stop_the_farm():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Console(stream=Gone(), live=False) as console:
        console.handle(job())
        console.handle(Note(text="still here"))


def test_the_console_needs_neither_torch_nor_ray_nor_the_driver():
    script = (
        "import sys, qfarm.console\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'qfarm.driver'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
