"""Predicted: how well the plan's expectations of time held, over the attempts that ended well."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from qfarm.report.figures import plain, plural
from qfarm.report.rows import Attempt

FEW = 3  # attempts below which nothing is said


def predicted(attempts: Iterable[Attempt]) -> str:
    """One line; empty where the store cannot tell."""
    known = [one for one in attempts if one.outcome == "ok" and one.expected_s]
    if len(known) < FEW:
        return ""
    ratios = sorted(one.wall_s / one.expected_s for one in known if one.expected_s)
    tenth = len(ratios) // 10
    low, high = ratios[tenth], ratios[-1 - tenth]
    sources = ", ".join(sorted({plain(one.expected_from or "unknown") for one in known}))
    middle = f" (the middle 80 %: {low:.2g} to {high:.2g})" if tenth else f" ({low:.2g} to {high:.2g})"
    taken = f"{plural(len(known), 'attempt')} took {statistics.median(ratios):.2g} times as long as the plan expected"
    return f"times: {taken}{middle}; expected from: {sources}"
