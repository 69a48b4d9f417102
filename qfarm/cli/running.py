"""Running: `plan`, `submit`, `status`, `cancel`."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfarm.cli.shared import (
    DATA,
    FAILED,
    INTERRUPTED,
    WATCH_SECONDS,
    Submission,
    color,
    cpu_only_if_asked,
    is_store,
    last_store,
    last_submission,
    open_store,
    plan_of,
    print_report,
    read_job,
    remember,
    remember_submission,
    require_terminal,
    store_location,
    width,
)
from qfarm.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from qfarm import remote
    from qfarm.job import Job
    from qfarm.store import Store

SENT_ALONG = ("QFARM_STORE", "QFARM_SHARED_CACHE")  # to the driver on a cluster; no secrets
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
    "--address",
    metavar="ADDRESS",
    help="Ray cluster: host:port, or http://head:8265 or a file for `ray up` to submit as a Ray job.",
)
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--only", metavar="CELL", help="Run one cell, by id (or its beginning) or by label such as 'gptq w4 g64'."
)
@click.option("--detach", is_flag=True, help="On a cluster: return once the job is handed over.")
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
        from qfarm.remote import is_remote

        address, where = find_address(address, os.environ)
        if address and is_remote(address):
            if trace:
                raise InvalidInput("--trace is written by the machine that runs the driver; not for a job handed over")
            raise click.exceptions.Exit(_submit_remotely(checked, job, address, where, only, detach, data))
    if detach:
        raise InvalidInput("--detach needs an http address or a cluster.yaml")
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
    from qfarm.environment import placed_store

    store = placed_store(job.file.store)
    remote.require_shared_store(store)
    arguments = ["submit", remote.path_there(path, Path.cwd(), "copy the job file here, or submit from its folder")]
    if only:
        arguments += ["--only", only]
    if data:
        remedy = "put the data on the cluster and set QFARM_DATA there"
        arguments += ["--data", remote.path_there(data, Path.cwd(), remedy)]
    click.echo(where)
    if "HF_TOKEN" in os.environ:
        click.echo("HF_TOKEN stays here: the cluster uses the token that it was started with")
    # The same job gets the same name, by which a second one at a time is noticed.
    content = hashlib.sha256("\0".join([Path(path).read_text(encoding="utf-8"), store, only or ""]).encode())
    return remote.submit(
        address,
        arguments,
        Path.cwd(),
        detach=detach,
        submission_id=f"qfarm-{job.file.name}-{content.hexdigest()[:8]}",
        environment={name: os.environ[name] for name in SENT_ALONG if name in os.environ},
        accepted=lambda name: remember_submission(Submission(_lasting(address), name, store)),
    )


def _lasting(address: str) -> str:
    """An address that holds in other folders too."""
    return address if "://" in address else str(Path(address).resolve())


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
        from qfarm.environment import placed_store
        from qfarm.remote import require_shared_store

        require_shared_store(placed_store(job.file.store))
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
@click.option("--address", metavar="ADDRESS", help="A cluster's job server: list the jobs that it was handed.")
@click.option("--watch", is_flag=True, help="On a terminal: follow until no job is at work any more.")
def status(store: str | None, address: str | None, watch: bool) -> None:
    """Tell what STORE holds by now and which jobs are at work on it, from any terminal that sees it.

    A running job writes how far it is into its store; on another machine only the time of its last sign tells whether
    it lives. A job that was handed to a cluster is asked for at the cluster.

    \b
    Examples:
      qfarm status
      qfarm status results/quickstart --watch
      qfarm status --address http://head:8265
    """
    if watch:
        require_terminal()
    if address is not None and store is not None:
        raise InvalidInput("--address lists a cluster's jobs; a STORE is looked at without it")
    known = last_submission()
    location = None if address is not None else store or last_store()
    if address is None and known is not None and known.store == location:
        look = functools.partial(_status_of_submission, known)
    elif location is not None:
        look = functools.partial(_status_of_store, location)
    else:
        assert address is not None
        look = functools.partial(_status_of_cluster, address)
    text, at_work = look()
    while watch and at_work:
        click.clear()
        click.echo(text, nl=False)
        time.sleep(WATCH_SECONDS)
        text, at_work = look()
    if watch:
        click.clear()
    click.echo(text, nl=False)


def _status_of_store(location: str) -> tuple[str, bool]:
    """What to print, and whether a job is at work."""
    from qfarm.beacon import running

    found = open_store(location)
    at_work = any(job.state != "gone" for job in running(found.location))
    return _status(found), at_work


def _status_of_submission(submission: Submission) -> tuple[str, bool]:
    """The job as its cluster sees it, then its store as far as it can be seen from here."""
    from qfarm import remote

    try:
        jobs = remote.jobs(submission.address, submission.name)
        text = _describe(jobs) or f"{submission.address}: knows no job {submission.name} any more\n"
    except (InvalidInput, Unavailable) as error:
        jobs, text = [], f"{submission.name}: its cluster does not answer: {error}\n"
    if is_store(submission.store):
        text += _status(open_store(submission.store))
    else:
        text += f"{submission.store}: no store yet, or none that this machine sees\n"
    return text, any(job.at_work for job in jobs)


def _status_of_cluster(address: str) -> tuple[str, bool]:
    from qfarm import remote

    checked, _ = find_job_server(address)
    jobs = remote.jobs(checked)
    return _describe(jobs) or f"{address}: no job was handed to it\n", any(job.at_work for job in jobs)


def _describe(jobs: Sequence[remote.Submitted]) -> str:
    from qfarm.report.figures import duration, plain

    now = datetime.datetime.now(datetime.UTC)
    lines = []
    for job in jobs:
        since = f" for {duration(((job.ended or now) - job.started).total_seconds())}" if job.started else ""
        lines += [
            f"{job.name}: {job.status}{since}",
            *([f"  {plain(job.said)}"] if job.said and job.status != "succeeded" else []),
        ]
    return "".join(f"{line}\n" for line in lines)


@click.command()
@click.argument("submission", required=False)
@click.option("--address", metavar="ADDRESS", help="The cluster's job server; default: where the last job went.")
def cancel(submission: str | None, address: str | None) -> None:
    """End a job that was handed to a cluster: SUBMISSION, or the last one from this machine.

    What its workers have finished is in the store; submitting the job again runs the rest.

    \b
    Examples:
      qfarm cancel
      qfarm cancel qfarm-llama-matrix-1f2e3d4c --address http://head:8265
    """
    from qfarm import remote

    known = last_submission()
    if (submission is None or address is None) and known is None:
        raise InvalidInput("no job was handed to a cluster from here: give its name and --address")
    if address is None:
        assert known is not None
        address, name = known.address, submission or known.name
    elif submission is None:
        raise InvalidInput("with --address, name the job: qfarm status --address ADDRESS lists them")
    else:
        (address, _), name = find_job_server(address), submission
    click.echo(_describe([remote.cancel(address, name)]), nl=False)


def find_job_server(given: str) -> tuple[str, str]:
    """An address that jobs can be handed to, and the line that says where. Raises InvalidInput for another."""
    from qfarm.cluster import find_address
    from qfarm.remote import is_remote

    address, where = find_address(given, os.environ)
    if address is None or not is_remote(address):
        raise InvalidInput(f"{given}: no job server; give http://HOST:8265 or a file for Ray's cluster launcher")
    return address, where


def _status(store: Store) -> str:
    from qfarm.beacon import running
    from qfarm.report.status import render_status

    now = datetime.datetime.now(datetime.UTC)
    return render_status(store, store.location, running(store.location), now, width(), color())
