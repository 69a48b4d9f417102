"""Running: `plan`, `submit`, `status`."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfarm.cli.shared import (
    DATA,
    FAILED,
    INTERRUPTED,
    WATCH_SECONDS,
    color,
    cpu_only_if_asked,
    is_store,
    last_store,
    open_store,
    plan_of,
    print_report,
    read_job,
    remember,
    require_terminal,
    store_location,
    width,
)
from qfarm.errors import InvalidInput

if TYPE_CHECKING:
    from qfarm.job import Job
    from qfarm.store import Store

INVALID_SHOWN = 5  # combinations that cannot be, listed at submission; the plan lists all


@click.command()
@click.argument("job", type=click.Path())
@DATA
def plan(job: str, data: str | None) -> None:
    """Show what JOB would run: cells, what is done already, time and memory, and combinations that cannot be.

    \b
    Example:
      qfarm plan jobs/llama_matrix.yaml
    """
    from qfarm.report.plan import render_plan

    checked = read_job(job)
    location = store_location(checked)
    store = open_store(location) if is_store(location) else None
    cpu_only_if_asked(checked)
    click.echo(render_plan(plan_of(checked, store, data, provisional=True), width(), color()), nl=False)


@click.command()
@click.argument("job", type=click.Path())
@click.option(
    "--address", metavar="ADDRESS", help="Ray cluster: host:port, or http://head:8265 to submit as a Ray job."
)
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--only", metavar="CELL", help="Run one cell, by id (or its beginning) or by label such as 'gptq w4 g64'."
)
@click.option("--detach", is_flag=True, help="With an http address: return once the job is handed over.")
@click.option(
    "--trace", metavar="FILE", help="Write what each worker did when, for chrome://tracing or ui.perfetto.dev."
)
@DATA
def submit(
    job: str, address: str | None, local: bool, only: str | None, detach: bool, trace: str | None, data: str | None
) -> None:
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
    checked = read_job(job)
    if local and address:
        raise InvalidInput("--local and --address exclude each other")
    where = "this process, without Ray"
    if not local:
        from qfarm.cluster import find_address

        address, where = find_address(address, os.environ)
        if address and address.startswith(("http://", "https://")):
            if trace:
                raise InvalidInput("--trace is written by the machine that runs the driver; not with an http address")
            raise click.exceptions.Exit(_submit_remotely(checked, job, address, where, only, detach, data))
    if detach:
        raise InvalidInput("--detach needs an http address")
    from qfarm import depot

    depot.location()  # a place that cannot be shared is refused before anything runs
    if trace and not Path(trace).resolve().parent.is_dir():
        raise InvalidInput(f"--trace: {trace}: no such folder")
    from qfarm.record import utc_now

    began = utc_now()
    code = _submit_here(checked, job, address, where, local, only, data)
    if trace:
        _write_trace(trace, store_location(checked), began)
    raise click.exceptions.Exit(code)


def _write_trace(path: str, location: str, since: str) -> None:
    """Of this submission's attempts, and of others on the same store in that time."""
    import json

    from qfarm.report.timeline import COLUMNS, chrome_trace

    rows = open_store(location).read("attempts", columns=COLUMNS).to_pylist()
    trace = chrome_trace(row for row in rows if row["started"] >= since)
    Path(path).write_text(json.dumps(trace), encoding="utf-8")
    click.echo(f"{path}: {sum(event['ph'] == 'X' for event in trace['traceEvents'])} spans")


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

    location = store_location(job)
    if address:
        from qfarm.remote import require_shared_store

        require_shared_store(job.file.store)
    if local:
        cpu_only_if_asked(job)
    # Planned before the store is made: a job that cannot run leaves nothing behind.
    known = open_store(location) if is_store(location) else None
    planned = plan_of(job, known, data, provisional=False)
    work = open_work(planned, only)
    store = open_store(location, create=True)
    remember(store.location)
    settings = driver.Settings(
        address=address, resources=job.file.resources, retries=job.file.retries, data=data_folder(data)
    )
    with Console() as console, Beacon(store.location, console) as beacon:
        done = len(planned.cells) - len(work) if only is None else 0
        beacon.handle(
            JobStarted(
                job=job.file.name,
                where=where,
                store=store.location,
                cells=len(work),
                done_before=done,
                expected_s=sum(one.estimate_s or 0.0 for one in work),
            )
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
    print_report(store, "terminal", {}, job.margins)
    return FAILED if summary.failed or summary.stopped else 0


@click.command()
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

    found = open_store(store or last_store())

    def at_work() -> bool:
        return any(job.state != "gone" for job in running(found.location))

    if watch:
        require_terminal()
        while at_work():
            click.clear()
            click.echo(_status(found), nl=False)
            time.sleep(WATCH_SECONDS)
    click.echo(_status(found), nl=False)


def _status(store: Store) -> str:
    from qfarm.beacon import running
    from qfarm.report.status import render_status

    now = datetime.datetime.now(datetime.UTC)
    return render_status(store, store.location, running(store.location), now, width(), color())
