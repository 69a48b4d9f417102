"""Figures: how numbers, times and foreign text are written, the same in the console and in every report format."""

from __future__ import annotations

import math
import re
import unicodedata

# By a unit's first word: "nats per token" is written as "nats".
_DECIMALS = {
    "perplexity": 2,
    "percent": 2,
    "points": 2,
    "fraction": 2,
    "bits": 3,
}  # of a value without an error, after scaling
_PERCENT = ("percent", "fraction")
_SIGNIFICANT = 3  # digits where decimals would not do
_SCIENTIFIC = 1e6  # from here on, digits before the decimal point say less than the exponent
_CONTROL_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS, ...: titles, links
    r"|\x1b[ -/]*[0-~]"  # two-character escapes
)
_SPACE = re.compile(r"[\s\u2028\u2029]+")
_DROPPED = ("Cc", "Cf", "Cs")  # controls, invisible format marks (also bidirectional overrides), lone surrogates


def plain(text: object, limit: int | None = None) -> str:
    """Foreign text on one line, without anything that a terminal would act on; cut to `limit` characters."""
    line = _SPACE.sub(" ", _CONTROL_SEQUENCES.sub("", str(text))).strip()
    line = "".join(char for char in line if unicodedata.category(char) not in _DROPPED)
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def printable(text: str) -> str:
    """Foreign text as it is, line breaks included, without anything else that a terminal would act on."""
    kept = (char for char in text if char in "\n\t" or unicodedata.category(char) not in _DROPPED)
    return "".join(kept)


def number(value: float | None, unit: str, error: float | None = None, signed: bool = False) -> str:
    """A number as a reader sees it: to two digits of its error if that is known, else as is usual for its unit.

    Fractions are written in percent. None is empty; what is not finite is written as such.
    """
    if value is None:
        return ""
    kind, sign = unit.partition(" ")[0], "+" if signed else ""
    scale = 100.0 if kind == "fraction" else 1.0
    scaled, suffix = value * scale, " %" if kind in _PERCENT else ""
    if not math.isfinite(scaled) or abs(scaled) >= _SCIENTIFIC:
        return f"{scaled:{sign}.3g}{suffix}"
    decimals = _decimals(scaled, kind, None if error is None else error * scale)
    if decimals is None:
        digits = f"{scaled:{sign}z#.{_SIGNIFICANT}g}"
        return digits.rstrip(".") + suffix
    return f"{scaled:{sign}z.{decimals}f}{suffix}"


def interval(low: float | None, high: float | None, unit: str, signed: bool = False) -> str:
    """'[+3.9, +6.5]', to two digits of half its width; empty when an end is unknown."""
    if low is None or high is None:
        return ""
    ends = (number(end, unit, (high - low) / 2, signed).removesuffix(" %") for end in (low, high))
    return f"[{', '.join(ends)}]"


def duration(seconds: float | None) -> str:
    """'3.2s', '42s', '12m 05s', '3h 05m', '2d 03h'; empty when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes // 1440}d {minutes % 1440 // 60:02d}h"


def size(count: int | None) -> str:
    """Bytes as '1.23 GB' (decimal units); empty when unknown."""
    if count is None:
        return ""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"


def plural(count: int, noun: str) -> str:
    """'1 cell', '1,204 cells'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _decimals(scaled: float, kind: str, error: float | None) -> int | None:
    """Decimals to print; None means significant digits instead."""
    if error is not None and math.isfinite(error) and error > 0:
        rounded = float(f"{error:.1e}")  # 0.0996 has its two digits at 0.10
        return min(12, max(0, 1 - math.floor(math.log10(rounded))))
    if kind not in _DECIMALS:
        return None
    return _DECIMALS[kind] if abs(scaled) < 1000 else 0
