"""How numbers, times and foreign text are written."""

from __future__ import annotations

import pytest

from qfarm.report import figures


@pytest.mark.parametrize(
    ("value", "unit", "error", "signed", "text"),
    [
        (26.4, "perplexity", None, False, "26.40"),
        (12345.6, "perplexity", None, False, "12346"),
        (1.5e9, "perplexity", None, False, "1.5e+09"),
        (5.234, "percent", 1.3, True, "+5.2 %"),
        (71.814, "percent", 0.0996, False, "71.81 %"),
        (-0.0004, "percent", 0.3, True, "+0.00 %"),
        (0.97214, "fraction of tokens", None, False, "97.21 %"),
        (0.97214, "fraction of tokens", 0.004, False, "97.21 %"),
        (0.03163, "nats per token", None, False, "0.0316"),
        (123.4, "nats per token", None, False, "123"),
        (4.25, "bits", None, False, "4.250"),
        (float("inf"), "perplexity", None, False, "inf"),
        (float("nan"), "percent", None, True, "+nan %"),
        (None, "percent", None, True, ""),
    ],
)
def test_numbers(value, unit, error, signed, text):
    assert figures.number(value, unit, error, signed) == text


def test_intervals():
    assert figures.interval(3.94, 6.53, "percent", signed=True) == "[+3.9, +6.5]"
    assert figures.interval(0.961, 0.981, "fraction of tokens") == "[96.1, 98.1]"
    assert figures.interval(None, 1.0, "percent") == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (9.96, "10s"),
        (59.7, "1m 00s"),
        (3599.6, "1h 00m"),
        (100_000, "27h 47m"),
        (200_000, "2d 07h"),
        (None, ""),
    ],
)
def test_durations(seconds, text):
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999_600, "1 MB"), (16_060_000_000, "16.1 GB"), (None, "")])
def test_sizes(count, text):
    assert figures.size(count) == text


@pytest.mark.parametrize(
    ("foreign", "safe"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("\x1b]0;title\x07x\x9b1my", "xy"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x1b]never closed", "never closed"),
        ("one\r\n\ttwo\u2028three", "one two three"),
        ("\u202eevil\x00\udcff", "evil"),
        ("[bold]kept[/bold] ü 量", "[bold]kept[/bold] ü 量"),
    ],
)
def test_foreign_text_becomes_plain(foreign, safe):
    assert figures.plain(foreign) == safe


def test_plain_text_is_cut():
    assert figures.plain("x" * 50, 10) == "x" * 9 + "…"
