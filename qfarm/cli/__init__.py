"""The command line: one function per command, `qfarm --help` lists them.

It only says where and how to run; every experiment option stands in the job file. Exit codes: 0 all well, 1 some
cells failed for good, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

import qfarm
from qfarm.cli import cells, machine, results, running, stores
from qfarm.cli.shared import BAD_INPUT, INTERRUPTED, Group
from qfarm.errors import QfarmError


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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qfarm.__version__, prog_name="qfarm")
def group() -> None:
    """Compare LLM quantization methods: a matrix of models, methods and bit widths, every cell measured the same way.

    \b
    Try it (two CPU cores, four minutes):
      qfarm submit jobs/quickstart.yaml
    """


COMMANDS: tuple[click.Command, ...] = (
    running.plan,
    running.submit,
    running.status,
    running.cancel,
    results.report,
    results.show,
    results.compare,
    results.diff_command,
    results.query_command,
    cells.chat,
    cells.export,
    cells.verify,
    stores.pack_command,
    stores.store_group,
    machine.methods,
    machine.doctor,
    machine.bench_group,
)
for command in COMMANDS:
    group.add_command(command)
