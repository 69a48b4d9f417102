"""Shared: what several commands need: options, exit codes, opening stores, the terminal."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from qfarm import cache
from qfarm.errors import InvalidInput, StoreError, nearest

if TYPE_CHECKING:
    from qfarm.job import Job
    from qfarm.margin import Margin
    from qfarm.plan import Plan
    from qfarm.store import Store

logger = logging.getLogger(__name__)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
WATCH_SECONDS = 2.0  # between looks at a store
SUMMARY = 200  # characters of a command's first sentence that its group's help shows, on as many lines as they take
MARGIN = click.option(
    "--margin",
    metavar="M",
    help="Loss to be called negligible, e.g. 'perplexity=1%,accuracy=1 point'; default: the job's.",
)
DATA = click.option("--data", metavar="DIR", help="Folder of a data pack (index pack.yaml); default: QFARM_DATA.")


class Group(click.Group):
    """A group that names its commands when it is given another, and lists them with their whole first sentence."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(SUMMARY)) for name, command in sorted(self.commands.items())]
            )

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0]
        if self.get_command(context, name) is None:
            raise InvalidInput(f'unknown command "{name}"{nearest(name, self.list_commands(context))}')
        return super().resolve_command(context, arguments)


def read_job(path: str) -> Job:
    from qfarm.job import load_job

    return load_job(path)


def plan_of(job: Job, store: Store | None, data: str | None, *, provisional: bool) -> Plan:
    from qfarm.environment import data_folder
    from qfarm.plan import make_plan

    return make_plan(job, store, data_folder(data), allow_provisional=provisional)


def store_location(job: Job) -> str:
    from qfarm.environment import placed_store

    given = placed_store(job.file.store)
    return given if "://" in given else str(Path(given).expanduser().resolve())


def is_store(location: str) -> bool:
    from qfarm import store

    return store.is_store(location)


def open_store(location: str, *, create: bool = False) -> Store:
    from qfarm.store import Store

    return Store.open(location, create=create)


class Submission(NamedTuple):
    """A job that was handed to a cluster from this machine."""

    address: str
    name: str
    store: str


def remember(location: str) -> None:
    """As the last store."""
    _remember("last-store", location)


def remember_submission(submission: Submission) -> None:
    """As the last one, and its store as the last store."""
    remember(submission.store)
    _remember("last-submission", json.dumps(submission))


def last_submission() -> Submission | None:
    path = cache.find_file("state", "last-submission")
    if path is None:
        return None
    try:
        address, name, store = json.loads(path.read_text())
    except ValueError:  # of another version
        return None
    return Submission(str(address), str(name), str(store))


def _remember(name: str, text: str) -> None:
    def write(part: Path) -> None:
        part.write_text(text)

    try:
        cache.publish_file("state", name, write)
    except OSError as error:  # a convenience: `qfarm report` has to be told the store
        logger.warning("%s: this store cannot be remembered: %s", cache.root(), error.strerror)


def last_store() -> str:
    path = cache.find_file("state", "last-store")
    if path is None:
        raise StoreError("no store named and none remembered: give its folder, e.g. qfarm report results/quickstart")
    return path.read_text()


def margins_of(text: str | None) -> Mapping[str, Margin]:
    from qfarm.margin import read_option

    return read_option(text) if text else {}


def print_report(
    store: Store, style: Any, filters: dict[str, str | None], margins: Mapping[str, Margin] | None = None
) -> None:
    from qfarm.report.render import render
    from qfarm.report.tables import load

    text = render(load(store, margins), style, width=width(), color=color(), **filters)
    click.echo(text, nl=False)


def require_terminal() -> None:
    if not sys.stdout.isatty():
        raise InvalidInput("--watch needs a terminal")


def cpu_only_if_asked(job: Job) -> None:
    # Before torch is imported: a job without GPUs must not take one because it happens to run in this process.
    if job.file.resources.gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def width() -> int:
    return shutil.get_terminal_size().columns


def color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
