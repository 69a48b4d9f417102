"""Compare as text: what `qfarm compare` prints for people, and the same as JSON."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from qfarm.report.changes import AnswerChanges, TaskChange
from qfarm.report.compare import Comparison, PairResult
from qfarm.report.data import difference_data, json_text
from qfarm.report.figures import interval, number, plain, plural
from qfarm.report.layout import grid, pairs, section, words
from qfarm.report.render import MIN_WIDTH, terminal_text
from qfarm.report.rows import ID_SHOWN, headline, label
from qfarm.stats import (
    TEST_CHANGED,
    TEST_CLUSTERS,
    TEST_ITEMS,
    AccuracyDifference,
    Difference,
    Interval,
    SeedsMean,
)

PROVENANCE_SHOWN = 12
ANSWER_SHOWN = 24  # characters of a generated answer: its end, where the answer mostly stands
_BESIDE = ("kl", "top1_agreement")  # of the metrics beside the headline, those that are shown


def render_comparison(comparison: Comparison, *, width: int | None = None, color: bool = False) -> str:
    """For a terminal of `width` columns."""
    return terminal_text(_parts(comparison), max(MIN_WIDTH, width or shutil.get_terminal_size().columns), color)


def comparison_json(comparison: Comparison) -> str:
    """One object with every digit; differences are first minus second."""
    sides = {
        name: {"cell_id": cell.cell_id, "label": label(cell), "model": cell.model}
        for name, cell in (("first", comparison.first), ("second", comparison.second))
    }
    value = sides | {
        "evaluations": [_data(result) for result in comparison.results],
        "not_compared": [{"evaluation": name, "reason": reason} for name, reason in comparison.refused],
        "provenance": list(comparison.provenance),
    }
    return json_text(value)


# -- for people -------------------------------------------------------------------------------------------------------


def _parts(comparison: Comparison) -> Iterator[RenderableType]:
    cells = (comparison.first, comparison.second)
    one, two = (f"{label(cell)} of {cell.model} ({cell.cell_id[:ID_SHOWN]})" for cell in cells)
    yield from section(
        "first against second", [pairs({"first": one, "second": two, "difference": "first minus second"})]
    )
    for result in comparison.results:
        yield from section(plain(result.evaluation), list(_result(result)))
    if comparison.refused:
        yield from section("not compared", [pairs(dict(comparison.refused))])
    if not comparison.results:
        yield Text("the two cells have no evaluation in common")
    shown = comparison.provenance[:PROVENANCE_SHOWN]
    more = len(comparison.provenance) - len(shown)
    lines = [Text(plain(line), overflow="fold") for line in shown] + ([Text(f"and {more} more")] if more > 0 else [])
    if comparison.results:
        yield from section("provenance", lines or [Text("nothing that was recorded differs")])


def _result(result: PairResult) -> Iterator[RenderableType]:
    found = result.difference
    known = headline({name: both[0] for name, both in result.metrics.items()})
    names = [known.metric, *(name for name in _BESIDE if name in result.metrics)] if known else list(result.metrics)
    facts = {plain(name): _both(result, name) for name in names}
    if found:
        facts |= {"verdict": _verdict(result, found), "change": _change(found), "test": _test(found)}
        facts |= _items(found, result.answers) if isinstance(found, AccuracyDifference) else {}
        facts |= {"margin": _margin(result), "seeds": _seeds(result, found), "noise": _noise(result, found)}
        facts["on"] = f"{plural(found.n, _unit(found))}, {plural(found.clusters, 'cluster')}, paired"
    facts["remark"] = result.remark
    facts["protocol"] = f"{words(dict(result.protocol))}"
    yield pairs(facts)
    if result.documents and found:
        yield Text("")
        yield from _documents(result, found)
    if result.tasks:
        yield Text("")
        yield from _tasks(result.tasks)
    if result.answers and result.answers.largest:
        yield Text("")
        yield from _answers(result.answers)


def _tasks(tasks: Sequence[TaskChange]) -> Iterator[RenderableType]:
    """Tasks with a flip, and how many have none."""
    rows = [
        (
            task.task,
            f"{task.n:,}",
            number(100 * task.change, "points", signed=True),
            interval(*task.difference.shown[1:], "points", signed=True),
            "" if task.difference.p is None else p_text(task.difference.p).removeprefix("= "),
            str(task.lost),
            str(task.gained),
        )
        for task in tasks
        if task.lost or task.gained
    ]
    if rows:
        yield Text("tasks one by one, each p on its own (not adjusted for how many they are):", overflow="fold")
        headings = ("task", "n", "points", "95 % interval", "p", "lost", "gained")
        yield grid(headings, rows, numeric=(1, 2, 4, 5, 6))
    if len(rows) < len(tasks):
        yield Text(f"{plural(len(tasks) - len(rows), 'task')} without a flip")


def _answers(answers: AnswerChanges) -> Iterator[RenderableType]:
    """Items that changed most: flips first, then by how much probability moved between the choices."""
    yield Text("answers that changed most, flips first (moved: share of the choices' probability):", overflow="fold")
    rows = [
        (
            item.document[:ID_SHOWN],
            item.task,
            *(_answer(text, right) for text, right in zip(item.answers, item.right, strict=True)),
            number(item.moved, "fraction"),
        )
        for item in answers.largest
    ]
    yield grid(("item", "task", "first", "second", "moved"), rows, numeric=(4,))


def _answer(text: str, right: int | None) -> str:
    """'2 right', '... is 18 wrong'."""
    line = plain(text)
    shown = line if len(line) <= ANSWER_SHOWN else f"…{line[-ANSWER_SHOWN:]}"
    return f"{shown} {'' if right is None else 'right' if right else 'wrong'}".strip()


def _both(result: PairResult, name: str) -> str:
    return ", ".join(
        f"{side} {number(metric.value, metric.unit)}"
        for side, metric in zip(("first", "second"), result.metrics[name], strict=True)
    )


def _verdict(result: PairResult, found: Difference) -> str:
    """'worse, within 1 %', 'undecided (3.7 % would be found in 80 % of cases)'."""
    said: str = result.verdict or "none"
    if result.verdict == "identical":
        if isinstance(found, AccuracyDifference):
            return f"no flips: right and wrong on the same items, {found.n:,} in all"
        return f"identical on {plural(found.n, _unit(found))}"
    if result.verdict is None:
        return f"none: {_why_not_tested(result, found)}"
    if result.within_margin and result.margin:
        said = f"within {result.margin.text}" if said == "within margin" else f"{said}, within {result.margin.text}"
        said += ", direction undecided" if result.verdict == "within margin" else ""
    if result.seeds:
        said += f", over {result.seeds.seeds} shared seeds"
    elif result.verdict == "undecided" and found.detectable is not None:
        said += f", which is not 'equal': {_amount(found, found.detectable)} would be found in 80 % of cases"
    return said


def _why_not_tested(result: PairResult, found: Difference) -> str:
    if any(metric.stopped_early is not None for both in result.metrics.values() for metric in both):
        return "a cell was stopped early"
    if isinstance(found, AccuracyDifference):
        return f"a test needs {TEST_ITEMS} items, {TEST_CHANGED} of them changed, and {TEST_CLUSTERS} clusters"
    return f"a test needs {TEST_CLUSTERS} clusters"


def _change(found: Difference) -> str:
    value, low, high = found.shown
    error = None if low is None or high is None else (high - low) / 2
    suffix = " points" if found.unit == "points" else ""
    ends = interval(low, high, found.unit, signed=True)
    tail = f" {ends}, 95 % interval for other text of this kind" if ends else ""
    return f"{number(value, found.unit, error, signed=True)}{suffix}{tail}"


def _test(found: Difference) -> str:
    if found.p is None:
        return ""
    name = found.test if isinstance(found, AccuracyDifference) else "t over clusters"
    exact = found.exact_p if isinstance(found, AccuracyDifference) else None
    return f"{name}, p {p_text(found.p)}" + (f"; McNemar exact p {p_text(exact)}" if exact is not None else "")


def p_text(p: float) -> str:
    """'= 0.013', '< 0.001'."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _items(found: AccuracyDifference, answers: AnswerChanges | None) -> dict[str, str]:
    low, high = found.flips.low, found.flips.high
    changed = f"{answers.changed:,} of {answers.items:,}, from wrong to another wrong included" if answers else ""
    return {
        "answers changed": changed,
        "flips": f"{number(found.flips.value, 'fraction')} {interval(low, high, 'fraction')} of items: "
        f"{found.lost:,} lost (right in the second only), {found.gained:,} gained (right in the first only)",
    }


def _margin(result: PairResult) -> str:
    if result.margin is None:
        return ""
    if result.within_margin is None:
        return f"{result.margin.text}: not tested"
    within = "within (equivalence test)" if result.within_margin else "not shown to be within"
    p = result.non_inferior_p
    return f"{result.margin.text}: {within}" + ("" if p is None else f"; not worse by more: p {p_text(p)}, one-sided")


def _seeds(result: PairResult, found: Difference) -> str:
    if result.seeds is None:
        return "1 seed: calibration noise not included" if result.one_seed else ""
    value, low, high = _shown(found, result.seeds.interval())
    error = None if low is None or high is None else (high - low) / 2
    return (
        f"over {result.seeds.seeds} shared seeds: {number(value, found.unit, error, signed=True)} "
        f"{interval(low, high, found.unit, signed=True)} for other calibration samples and other text; "
        f"spread {_amount(found, result.seeds.spread)}"
    )


def _noise(result: PairResult, found: Difference) -> str:
    numeric = result.numeric
    amount = "" if numeric.amount is None else f"{_amount(found, numeric.amount)} "
    flips = "" if numeric.flips is None else f", flips {number(numeric.flips, 'fraction')}"
    words = [f"numeric floor {amount}{f'({numeric.source}{flips})' if amount else numeric.source}"]
    if result.seed_floor is not None:
        words.append(f"noise of seeds {_amount(found, result.seed_floor)} (2 sigma of alike cells with several seeds)")
    if result.below_floor:
        words.append("the difference is below the floor: no direction")
    return "; ".join(words)


def _documents(result: PairResult, found: Difference) -> Iterator[RenderableType]:
    """The largest changes, what they add up to, and the difference without the first if it carries most of it."""
    share = sum(abs(document.share) for document in result.documents)
    yield Text(
        f"largest changes, together {number(share, 'fraction')} of all change (share: of the sum of absolute changes):",
        overflow="fold",
    )
    rows = [
        (
            document.document[:ID_SHOWN],
            document.windows,
            f"{document.pieces:,}",
            f"{document.tokens:,}",
            f"{document.change:+,.2f}",
            number(document.share, "fraction", signed=True),
        )
        for document in result.documents
    ]
    yield grid(("document", "windows", "pieces", "tokens", "nats", "share"), rows, numeric=(2, 3, 4, 5))
    if result.without_largest:
        yield Text(
            f"document {plain(result.documents[0].document[:ID_SHOWN])} carries more than half of all change; "
            f"without it: {_change(result.without_largest)}",
            overflow="fold",
        )


def _unit(found: Difference) -> str:
    return "item" if isinstance(found, AccuracyDifference) else "piece"


def _amount(found: Difference, amount: float) -> str:
    suffix = " points" if found.unit == "points" else ""
    return number(found.show(amount), found.unit, found.show(amount)) + suffix


def _shown(found: Difference, ends: Interval) -> tuple[float, float | None, float | None]:
    low, high = (None if end is None else found.show(end) for end in ends[1:])
    return found.show(ends.value), low, high


# -- for programs -----------------------------------------------------------------------------------------------------


def _data(result: PairResult) -> dict[str, Any]:
    found = result.difference
    return {
        "evaluation": result.evaluation,
        "eval_id": result.eval_id,
        "protocol": dict(result.protocol),
        "metrics": {name: [metric.value for metric in both] for name, both in sorted(result.metrics.items())},
        **difference_data(found),
        "verdict": result.verdict,
        "margin": result.margin.text if result.margin else None,
        "within_margin": result.within_margin,
        "p_non_inferior": result.non_inferior_p,
        "numeric_floor": result.numeric.amount,
        "numeric_floor_source": result.numeric.source,
        "numeric_floor_flips": result.numeric.flips,
        "seed_floor": result.seed_floor,
        "seeds": _seeds_data(result.seeds, found) if result.seeds and found else None,
        "largest_documents": [
            {name: getattr(one, name) for name in ("document", "windows", "pieces", "tokens", "change", "share")}
            for one in result.documents
        ],
        "without_largest": difference_data(result.without_largest) if result.without_largest else None,
        "tasks": [
            {name: getattr(one, name) for name in ("task", "n", "change", "lost", "gained")}
            | {"low": one.difference.low, "high": one.difference.high, "p": one.difference.p}
            for one in result.tasks
        ],
        "answers": dataclasses.asdict(result.answers) if result.answers else None,
        "remark": result.remark,
    }


def _seeds_data(seeds: SeedsMean, found: Difference) -> dict[str, Any]:
    value, low, high = _shown(found, seeds.interval())
    return {
        "seeds": seeds.seeds,
        "change": value,
        "change_low": low,
        "change_high": high,
        "spread": seeds.spread,
        "standard_error": seeds.error,
        "df": seeds.df,
    }
