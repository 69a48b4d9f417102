"""Stores: `pack`, `store merge`, `store check`, `store compact`."""

from __future__ import annotations

from pathlib import Path

import click

from qfarm.cli.shared import FAILED, Group, last_store, open_store

LEFTOVER_S = 86_400  # no writer is at work on one file for so long, even by a clock that is wrong


@click.command("pack")
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

    found = pack(open_store(store), Path(out))
    click.echo(f"{out}: {found.results:,} publications, {found.bytes:,} bytes, sha256 {found.sha256}")


@click.group("store", cls=Group)
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

    opened = [open_store(other) for other in others]
    found = merge(open_store(into, create=True), opened)
    click.echo(f"{into}: {found.added:,} publications added, {found.same:,} were there with the same contents")
    if found.other:
        click.echo(f"{found.other:,} were there with other contents and stay: `qfarm diff` tells what differs")


@store_group.command("check")
@click.argument("store", required=False)
@click.option("--clean", is_flag=True, help="Remove what killed writers left behind more than a day ago.")
def store_check(store: str | None, clean: bool) -> None:
    """Verify every file of STORE against its manifests; exit code 1 when something is wrong.

    STORE may be a pack. Files that a killed writer left behind are listed, but no reader sees them: the store is sound
    all the same.

    \b
    Example:
      qfarm store check results/quickstart
    """
    from qfarm.report.figures import plural

    found = open_store(store or last_store())
    if clean:
        for path in found.clean(LEFTOVER_S):
            click.echo(f"{found.location}/{path}: removed")
    faults, leftovers = found.check()
    for line in (*faults, *leftovers):
        click.echo(line)
    left = f"; {plural(len(leftovers), 'leftover file')}: harmless" if leftovers else ""
    click.echo((plural(len(faults), "fault") if faults else "the store is sound") + left)
    raise click.exceptions.Exit(FAILED if faults else 0)


@store_group.command("compact")
@click.argument("store", required=False)
def store_compact(store: str | None) -> None:
    """Copy the rows of STORE's many small files into a few large ones, which every reader takes from then on.

    What was published stays as it is and counts: results can be added, checked, packed and merged as before. Jobs may
    be at work meanwhile.

    \b
    Example:
      qfarm store compact results/quickstart
    """
    from qfarm.report.figures import plural, size

    found = open_store(store or last_store()).compact()
    if found is None:
        click.echo("another process has compacted the store meanwhile")
    else:
        click.echo(f"{plural(found.publications, 'publication')} in {plural(found.files, 'file')}, {size(found.bytes)}")
