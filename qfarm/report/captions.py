"""Captions: the words over and under the report's tables, which say what its numbers rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qfarm.report.figures import number, plain, plural
from qfarm.report.rows import ID_SHOWN, FailedCell, Row, Table, units_used
from qfarm.stats import (
    FAMILY_ALPHA,
    INTERVAL_CLUSTERS,
    LEVEL,
    MARK_CLUSTERS,
    STRONG_ALPHA,
    AccuracyDifference,
    Difference,
    count_skewed,
)

ROWS_SHOWN = 50  # of one table in a terminal
ERROR_SHOWN = 300  # characters of an error's one line
NAMES_SHOWN = 8  # of rows listed in a sentence
POOLS_SHOWN = 3  # of recipes and schemes with several seeds
RUN_WORDS = {"fake": "fake quantization", "packed": "packed weights"}
LEGEND = (
    "stored: bits per weight of the quantized layers, scales and zeros included; KV bits: per cached number. change: "
    "of perplexity per token against the baseline; points: of accuracy. KL: nats per token, baseline against cell (KL "
    "back: the reverse). agree: positions whose most probable token is the baseline's; right: is the true one; lost, "
    "gained: right only before, only now; flips: both; answers: items answered in another way, from wrong to another "
    "wrong included. causal: no where a quantizer looks across tokens. time: the attempt that measured the row. `qfarm "
    "show CELL` tells all about a cell, `qfarm compare CELL CELL` about two."
)


def title(table: Table) -> str:
    return " · ".join(plain(part) for part in (table.model, table.evaluation, *_cache_read(table)))


def _cache_read(table: Table) -> Iterator[str]:
    """How quantized KV caches were read, where cells have some: 'KV prefill windowed, chunks of 16'."""
    kv = table.protocol.get("kv")
    if isinstance(kv, dict):
        chunk = kv.get("chunk")
        yield f"KV prefill {kv.get('prefill')}" + ("" if chunk is None else f", chunks of {chunk}")


def over_seeds(table: Table) -> str:
    return "over seeds: means, and intervals for other calibration samples and other text"


def caption(table: Table, brief: bool = False) -> Iterator[str]:
    """What all rows of a table rest on; `brief`: without the floors."""
    yield _measured(table)
    if not brief:
        yield from _divergence_floor(table)
    differences = [row.difference for row in table.rows if row.difference and row.stopped is None]
    if differences:
        yield _meaning(table, differences)
        yield from _family(table)
        yield from _best(table)
        if not brief:
            yield from _noise(table, differences)
    yield from (f"{_name(group.first)}: {plain(group.remark)}" for group in table.replicates if group.remark)
    yield from (plain(text, ERROR_SHOWN) for text in table.remarks)


def row_notes(rows: Sequence[Row]) -> Iterator[str]:
    """What single rows rest on, or were done differently."""
    for row in rows:
        for text in (row.remark, *row.notes):
            if text:
                yield f"{plain(row.name)} {plain(row.cell.scheme)}: {plain(text, ERROR_SHOWN)}"


def hidden_rows(table: Table) -> Iterator[str]:
    hidden = len(table.rows) - ROWS_SHOWN
    if hidden > 0:
        yield f"{plural(hidden, 'more row')} than a terminal shows: --format csv has all"


def _measured(table: Table) -> str:
    """'141 windows, 62 clusters; perplexity, text wikitext2, length 2048; bfloat16, fake quantization; ...'"""
    metrics = [metric for row in table.rows for metric in row.metrics.values()]
    counts = [plural(max(units_used(row.metrics) for row in table.rows), _unit(table))]
    clusters = [metric.clusters for metric in metrics if metric.clusters is not None]
    if clusters:
        counts.append(plural(max(clusters), "cluster"))
    options = table.protocol.get("options")
    said = options.items() if isinstance(options, dict) else ()
    words = [f"{key} {value}" for key, value in said if value is not None and not isinstance(value, bool)]
    words += _cache_read(table)
    words += [str(table.protocol[key]) for key in ("dtype",) if table.protocol.get(key)]
    run = table.protocol.get("run")
    words += [RUN_WORDS.get(str(run), str(run))] if run else []
    words += [machine_words(table)] if "machine" in table.protocol else []
    return plain(f"{', '.join(counts)}; {', '.join([*words, f'protocol {table.eval_id[:ID_SHOWN]}'])}")


def machine_words(table: Table) -> str:
    """'timed on a CPU: Intel Xeon, 1 thread, torch 2.13.0'."""
    machine = table.protocol["machine"]
    kind = "CPU" if machine.get("device") == "cpu" else "GPU"
    threads = f", {plural(machine['threads'], 'thread')}" if kind == "CPU" else ""
    return f"timed on a {kind}: {machine.get('name')}{threads}, torch {machine.get('torch')}"


def _unit(table: Table) -> str:
    """What a metric's n counts."""
    options = table.protocol.get("options")
    by_word = isinstance(options, dict) and options.get("convention") == "word"
    units = {"perplexity": "document" if by_word else "window", "generation": "prompt"}
    units |= dict.fromkeys(("analysis", "kernel", "crosscheck"), "window") | {"speed": "repeat"}
    return units.get(str(table.protocol.get("evaluator")), "item")


def _divergence_floor(table: Table) -> Iterator[str]:
    """What arithmetic alone does to KL and flips, and who does no more than that."""
    floors = [row.metrics for row in table.rows if row.is_baseline and "kl_floor" in row.metrics]
    if not floors:
        return
    kl, flips = (floors[0].get(name) for name in ("kl_floor", "flips_floor"))
    assert kl is not None
    beside = f", flips {number(flips.value, flips.unit)}" if flips else ""
    below = [
        _name(row)
        for row in table.rows
        if not row.is_baseline and "kl" in row.metrics and row.metrics["kl"].value < 2 * kl.value
    ]
    words = f"; below twice that, and not to be ranked by KL: {', '.join(below)}" if below else ""
    yield (
        f"numeric floor: KL {number(kl.value, kl.unit)}{beside} (the baseline against itself, "
        f"{plural(kl.n, 'window')} read in another shape of the forward pass){words}"
    )


def _meaning(table: Table, differences: Sequence[Difference]) -> str:
    """What the interval answers, and what it leaves out."""
    clusters = min(difference.clusters for difference in differences)
    if clusters < INTERVAL_CLUSTERS:
        return f"paired by document; no intervals below {INTERVAL_CLUSTERS} clusters"
    if all(difference.low is None for difference in differences):
        return "paired by document; no intervals: nothing differs, or a task has one cluster only"
    words = [
        f"{100 * LEVEL:g} % intervals paired by document: how far the change would move on other text of this kind"
    ]
    seeds = {row.cell.seed for row in table.rows} - {None}
    if seeds:
        words.append(f"{'1 seed' if len(seeds) == 1 else 'each row is one seed'}: calibration noise not included")
    if clusters < MARK_CLUSTERS:
        words.append(f"no marks below {MARK_CLUSTERS} clusters")
    if skewed := count_skewed(differences):
        words.append(f"intervals of {plural(skewed, 'row')} may be too narrow: few clusters, strongly skewed")
    return "; ".join(words)


def _family(table: Table) -> Iterator[str]:
    """What the marks mean, and how many small p values are no news."""
    family = plural(table.family, "cell")
    if any(row.marked for row in table.rows):
        yield (
            f"* differs from the baseline: Holm-adjusted p < {FAMILY_ALPHA} over {family} of this table"
            + (f", ** p < {STRONG_ALPHA}" if any("**" in row.mark for row in table.rows) else "")
        )
    if table.margin and not table.family:
        yield f"margin {table.margin.text}: not tested below {MARK_CLUSTERS} clusters"
    elif table.margin:
        yield (
            f"= within {table.margin.text} of the baseline, the margin fixed in the job or on the command line: "
            f"equivalence test, Holm over {family}"
        )
        safe = list(dict.fromkeys(_name(row) for row in table.rows if row.non_inferior))
        yield f"not worse by {table.margin.text} or more (one-sided, Holm over {family}): {_listed(safe) or 'none'}"
    tested = table.tested
    if len(tested) > 1:
        small, expected = sum(p < FAMILY_ALPHA for p in tested), FAMILY_ALPHA * len(tested)
        yield f"{small} of {len(tested)} with unadjusted p below {FAMILY_ALPHA}; {expected:.2g} expected by chance"


def _best(table: Table) -> Iterator[str]:
    ranked = [row for row in table.rows if row.best is not None]
    if not ranked:
        return
    best = list(dict.fromkeys(_name(row) for row in ranked if row.best))
    yield f"not shown worse than the best (|): {_listed(best)}; no claim that these are equal"
    if table.left_out:
        yield f"{plural(table.left_out, 'row')} without a place: too few clusters, or not on all of the documents"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _name(row: Row) -> str:
    group = "" if row.cell.group_size == -1 else f" g{row.cell.group_size}"
    return f"{plain(row.name)} {plain(row.cell.scheme)}{group}"


def _noise(table: Table, differences: Sequence[Difference]) -> Iterator[str]:
    """How large differences come from nothing, seeds or arithmetic; and apart from it, what so much text can show."""
    one = differences[0]
    floors: list[float] = []
    words = []
    largest = sorted(table.noise.seeds.items(), key=lambda pool: -pool[1].variance)
    for (recipe, scheme), found in largest[:POOLS_SHOWN]:
        floors.append(2 * 2**0.5 * found.sigma)
        words.append(
            f"seeds {_amount(one, floors[-1])} (2 sqrt 2 sigma; sigma {_amount(one, found.sigma)} of {plain(recipe)} "
            f"{plain(scheme)}, {plural(found.cells, 'cell')}, {found.df} degrees of freedom)"
        )
    if table.noise.numeric is None:
        words.append(f"arithmetic {table.noise.numeric_source}")
    else:
        floors.append(table.noise.numeric)
        words.append(f"arithmetic {_amount(one, table.noise.numeric)} ({table.noise.numeric_source})")
    floor = f" {_amount(one, max(floors))}" + ", the largest of" * (len(floors) > 1) if floors else " of the change"
    yield f"noise floor{floor}: {'; '.join(words)}"
    yield from _flips_floor(table)
    detectable = [one.detectable for one in differences if one.detectable is not None]
    if detectable:
        yield f"detectable: {_amount(one, float(np.median(detectable)))} (2.8 standard errors, median row)"


def _flips_floor(table: Table) -> Iterator[str]:
    """What arithmetic alone does to right and wrong items, and who does no more than that."""
    floor = table.noise.numeric_flips
    if floor is None:
        return
    below = [
        _name(row)
        for row in table.rows
        if isinstance(row.difference, AccuracyDifference) and row.difference.flips.value < 2 * floor
    ]
    words = f"; below twice that, which is no evidence against a cell: {_listed(below)}" if below else ""
    yield f"numeric floor of flips: {number(floor, 'fraction')} of items ({table.noise.numeric_source}){words}"


def _amount(difference: Difference, amount: float) -> str:
    suffix = " points" if difference.unit == "points" else ""
    return number(difference.show(amount), difference.unit, difference.show(amount)) + suffix


def failures(failed: Sequence[FailedCell]) -> Iterator[str]:
    """A heading and one indented line per cell; nothing when there are none."""
    if failed:
        yield f"{plural(len(failed), 'cell')} failed"
    for cell in failed:
        name = " ".join(plain(part) for part in (cell.label, cell.model) if part)
        where = f"{plural(cell.attempts, 'attempt')}, last stage {plain(cell.stage)}"
        error = plain(cell.error, ERROR_SHOWN) or "no message"
        yield f"  {plain(cell.kind)}: {plain(cell.cell_id)[:ID_SHOWN]} {name and f'{name} '}({where}): {error}"
