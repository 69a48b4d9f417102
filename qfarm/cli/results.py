"""Results: `report`, `show`, `compare`, `diff`, `query`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from qfarm.cli.shared import (
    FAILED,
    MARGIN,
    WATCH_SECONDS,
    color,
    last_store,
    margins_of,
    open_store,
    print_report,
    require_terminal,
    width,
)
from qfarm.errors import InvalidInput

if TYPE_CHECKING:
    from qfarm.margin import Margin
    from qfarm.store import Store


@click.command()
@click.argument("store", required=False)
@click.option(
    "--format", "style", type=click.Choice(["terminal", "markdown", "latex", "csv", "json"]), default="terminal"
)
@click.option("--html", metavar="FILE", type=click.Path(), help="Write a page with charts instead, in one file.")
@click.option("--model", metavar="NAME", help="Only this model; * and ? match.")
@click.option("--method", metavar="NAME", help="Only this recipe, e.g. 'gptq' or 'smoothquant+*'.")
@click.option("--bits", metavar="SCHEME", help="Only this scheme, e.g. 'w4'.")
@click.option("--where", metavar="CONDITION", help="Only rows for which it holds, e.g. 'stored<=4.5 and best=yes'.")
@click.option("--sort", metavar="COLUMN", help="Order of the rows, e.g. 'change'; '-change' for falling.")
@click.option("--watch", is_flag=True, help="On a terminal: print it again when results come in, until Ctrl-C.")
@click.option("--against", metavar="NAME", help="Beside published figures: of a paper or repository, or a *.yaml file.")
@MARGIN
def report(
    store: str | None,
    style: str,
    html: str | None,
    model: str | None,
    method: str | None,
    bits: str | None,
    where: str | None,
    sort: str | None,
    watch: bool,
    against: str | None,
    margin: str | None,
) -> None:
    """Print the results in STORE (default: the last one submitted to).

    \b
    Examples:
      qfarm report
      qfarm report results/quickstart --html report.html
      qfarm report --bits w4 --where "stored<=4.5" --sort change
      qfarm report results/quickstart --format latex
      qfarm report results/published-gptq --against qllm-infer
    """
    filters = {"model": model, "recipe": method, "scheme": bits}
    if against is not None:
        _refuse_with_against(style, {"--margin": margin, "--html": html, "--where": where, "--sort": sort})
        _refuse_watch(watch, "--against")
        _print_against(open_store(store or last_store()), against, style, filters)
        return
    filters |= {"where": where, "sort": sort}
    if html is not None:
        if style != "terminal":
            raise InvalidInput(f"--html and --format {style} exclude each other")
        _refuse_watch(watch, "--html")
        _write_html(open_store(store or last_store()), Path(html), filters, margins_of(margin))
        return
    found, given = open_store(store or last_store()), margins_of(margin)
    if watch:
        _refuse_watch(style != "terminal", f"--format {style}")
        _watch(found, lambda: print_report(found, style, filters, given))
    print_report(found, style, filters, given)


def _refuse_watch(both: bool, option: str) -> None:
    if both:
        raise InvalidInput(f"--watch and {option} exclude each other")


def _watch(store: Store, show: Callable[[], None]) -> NoReturn:
    """Show on a cleared terminal, again whenever results come in, until it is interrupted."""
    require_terminal()
    seen: object = None
    while True:
        held = store.finished_evaluations(), store.finished_attempts()
        if held != seen:
            click.clear()
            show()
            seen = held
        time.sleep(WATCH_SECONDS)


def _write_html(store: Store, path: Path, filters: dict[str, str | None], margins: Mapping[str, Margin]) -> None:
    from qfarm.record import utc_now
    from qfarm.report.choose import chosen
    from qfarm.report.html import to_html
    from qfarm.report.tables import load

    text = to_html(chosen(load(store, margins), **filters), store, written=utc_now())
    _write_whole(path, text.encode())
    click.echo(f"{path}: {len(text.encode()):,} bytes; opens in any browser, without a network")


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all. Raises InvalidInput where it cannot be written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error


def _refuse_with_against(style: str, given: Mapping[str, str | None]) -> None:
    for option, value in given.items():
        if value is not None:
            raise InvalidInput(f"{option} judges or places what was measured; it has no part in --against")
    if style == "latex":
        raise InvalidInput("--format latex has no part in --against; markdown, csv and json have")


def _print_against(store: Store, name: str, style: Any, filters: dict[str, str | None]) -> None:
    from qfarm import published
    from qfarm.report.against import compare as compare_with
    from qfarm.report.against_text import render_against
    from qfarm.report.tables import load

    source = published.load(name)
    found = compare_with(load(store), source, **filters)
    click.echo(render_against(found, style, width=width(), color=color()), nl=False)


@click.command()
@click.argument("cell")
@click.option("--store", metavar="STORE", help="Default: the last one submitted to.")
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def show(cell: str, store: str | None, style: str) -> None:
    """Show one CELL whole: options, sizes, layers, metrics, attempts with tracebacks, provenance.

    \b
    Examples:
      qfarm show 5353cf
      qfarm show 5353cf --format json
    """
    from qfarm.report.show import show as show_cell
    from qfarm.report.show import show_json

    found = open_store(store or last_store())
    text = show_json(found, cell) if style == "json" else show_cell(found, cell, width=width(), color=color())
    click.echo(text, nl=False)


@click.command()
@click.argument("first", metavar="CELL")
@click.argument("second", metavar="CELL")
@click.option("--store", metavar="STORE", help="Default: the last one submitted to.")
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
@MARGIN
def compare(first: str, second: str, store: str | None, style: str, margin: str | None) -> None:
    """Explain how the first CELL differs from the second, by id (or its beginning) or by label.

    Per evaluation: the paired difference with its interval, p and verdict, and the documents that it comes from.

    \b
    Examples:
      qfarm compare 5353cf 82aa01
      qfarm compare "gptq w4 g64" "rtn w4 g64" --margin "perplexity=1%"
    """
    from qfarm.report.compare import compare as compare_cells
    from qfarm.report.compare_text import comparison_json, render_comparison

    found = compare_cells(open_store(store or last_store()), first, second, margins_of(margin))
    text = comparison_json(found) if style == "json" else render_comparison(found, width=width(), color=color())
    click.echo(text, nl=False)


@click.command("diff")
@click.argument("first", metavar="STORE")
@click.argument("second", metavar="STORE")
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def diff_command(first: str, second: str, style: str) -> None:
    """Tell what changed from the first STORE to the second: two runs, commits or clusters.

    Significant differences, paired by document, what only one of them holds, and what differs in their provenance. Exit
    code 1 when something differs significantly.

    \b
    Example:
      qfarm diff results/monday results/tuesday
    """
    from qfarm.report.diff import diff
    from qfarm.report.diff_text import diff_json, render_diff

    found = diff(open_store(first), open_store(second))
    text = diff_json(found) if style == "json" else render_diff(found, (first, second), width(), color())
    click.echo(text, nl=False)
    raise click.exceptions.Exit(FAILED if found.significant else 0)


@click.command("query")
@click.argument("sql", required=False)
@click.option("--store", metavar="STORE", help="Default: the last one submitted to.")
@click.option("--format", "style", type=click.Choice(["table", "csv", "json"]), default="table")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds after which a query is stopped.")
def query_command(sql: str | None, store: str | None, style: str, timeout: float) -> None:
    """Ask the store anything: one SELECT over its views. Without SQL: list the views and their columns.

    \b
    Examples:
      qfarm query
      qfarm query "SELECT recipe, scheme, value FROM results ORDER BY value"
      qfarm query "SELECT * FROM failures" --format json
    """
    from qfarm import query
    from qfarm.report.answers import render_answer, render_views

    if sql is None:
        click.echo(render_views(width(), color()), nl=False)
        return
    answer = query.query(open_store(store or last_store()), sql, timeout)
    if style == "table":
        text = render_answer(answer, width(), color())
    else:
        text = query.to_csv(answer) if style == "csv" else query.to_json(answer)
    click.echo(text, nl=False)
