"""Cells: `chat`, `export`, `verify`, which make a cell again or look at what was made of it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfarm.cli.shared import DATA, FAILED, cpu_only_if_asked, last_store, open_store, plan_of, read_job
from qfarm.errors import InvalidInput

if TYPE_CHECKING:
    from qfarm.store import Store


@click.command()
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

        checked = read_job(job)
        cpu_only_if_asked(checked)
        chosen = find_cell(
            tuple(planned.cell for planned in plan_of(checked, None, data, provisional=False).cells), cell
        )
    else:
        from qfarm.chat import stored_cell

        chosen = stored_cell(open_store(store or last_store()), cell)
    from qfarm.chat import answer, open_cell, opening
    from qfarm.environment import data_folder

    screen = Chat()
    session = open_cell(chosen, data_folder(data), screen.progress)
    start = opening(session.loaded.tokenizer)
    if not start:
        screen.note("the chat template takes no system message; it is left out")
    said = list(start)
    for question in questions if questions is not None else screen.questions(chosen.label):
        if questions is not None:  # each is a conversation of its own
            screen.echo(question)
            said = list(start)
        said.append({"role": "user", "content": question})
        said.append({"role": "assistant", "content": screen.stream(answer(session, said, new_tokens))})


def _lines(path: str) -> list[str]:
    """The lines of a file that are not blank. Raises InvalidInput."""
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise InvalidInput(f"{path}: holds no prompt; write one per line")
    return found


@click.command()
@click.argument("cell", required=False)
@click.argument("out", required=False)
@click.option("--store", metavar="STORE", help="Default: the last one submitted to.")
@click.option(
    "--format",
    "style",
    default="auto",
    show_default=True,
    metavar="FORMAT",
    help="compressed-tensors, gptq, gguf or safetensors; auto: packed if it can be.",
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
    raise click.exceptions.Exit(
        _export(open_store(store or last_store()), cell, out, style, (model, max_bits, by), data)
    )


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


@click.command()
@click.argument("folder", type=click.Path())
def verify(folder: str) -> None:
    """Check an exported FOLDER: every tensor's hash, then its weights as a fresh process loads them.

    Exit code 1 when something is wrong.

    \b
    Example:
      qfarm verify smollm2-w4
    """
    from qfarm.export.verify import verify as verify_export
    from qfarm.report.figures import plural

    found = verify_export(Path(folder))
    for line in found.faults:
        click.echo(line)
    click.echo(f"checked: {'; '.join(found.steps)}")
    click.echo(plural(len(found.faults), "fault") if found.faults else "the export is sound")
    raise click.exceptions.Exit(FAILED if found.faults else 0)
