"""Remote: submits qfarm itself as a Ray job to the head of a cluster, follows it from here, asks for it and ends it.

The working directory travels along. It is looked through first, because Ray packs links by following them, leaves out
broken ones without a word, and learns only after packing that the result is too large.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import logging
import os
import re
import shlex
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qfarm.cluster import answers, is_file_address, process_environment, ray_environment, token_line
from qfarm.errors import InvalidInput, Unavailable
from qfarm.objects import check_url, is_url

logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 100 * 2**20  # Ray's DASHBOARD_CLIENT_MAX_SIZE, a constant of its job server
NAMED_FILES = 5  # of the largest, when it is too much
# Loggers of Ray's that tell of every ignore file and upload.
TALKATIVE = tuple(
    f"ray.{name}"
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
)
END_S = 10.0  # for the status to follow the end of the logs
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that a cluster was handed."""

    name: str  # its submission id
    status: str  # as Ray calls it, in small letters: pending, running, stopped, succeeded, failed
    at_work: bool
    started: datetime.datetime | None
    ended: datetime.datetime | None
    said: str  # the last line of its log, or Ray's message


def is_remote(address: str | None) -> bool:
    """Whether a job for this address is handed over instead of being driven from here."""
    return address is not None and (address.startswith(("http://", "https://")) or is_file_address(address))


def submit(
    address: str,
    argv: Sequence[str],
    working_dir: Path,
    *,
    detach: bool = False,
    submission_id: str,
    environment: Mapping[str, str] | None = None,
    accepted: Callable[[str], object] = lambda name: None,
    write: Callable[[str], object] | None = None,
) -> int:
    """Run `python -m qfarm ARGV...` on the cluster whose job server is at `address`; returns the driver's exit code.

    Follows the log until the job ends, or returns 0 at once with `detach`. The job belongs to the cluster: an interrupt
    here leaves it running. While a job called `submission_id` is at work there another is refused; once it has ended
    the next is called ID.2, and so on: `accepted` is told. `environment` holds no secrets, for Ray shows it in logs and
    in its dashboard. Raises InvalidInput for what cannot be sent or is refused, Unavailable when the connection breaks.
    """
    check_upload(working_dir)
    write = write or _print
    with _job_server(address) as client:
        name = _free_name(client, address, submission_id)
        entrypoint = shlex.join(["python", "-m", "qfarm", *_without_address(argv)])
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                # Unbuffered, since its log is followed from here.
                runtime_env={
                    "working_dir": str(working_dir),
                    "env_vars": {"PYTHONUNBUFFERED": "1", **(environment or {})},
                },
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise InvalidInput(f"{address}: the job was not accepted: {_last_line(error)}") from None
        accepted(name)
        hint = _hint(address, name)
        if detach:
            write(f"submitted as {name}; {hint}\n")
            return 0
        try:
            asyncio.run(_follow(client, name, write))
            return _exit_code(client, name)
        except KeyboardInterrupt:
            write(f"\nthe job goes on; {hint}\n")
            return INTERRUPTED
        except (RuntimeError, OSError) as error:
            raise Unavailable(
                f"{address}: lost the connection ({_last_line(error)}); the job may go on; {hint}"
            ) from None


def _print(text: str) -> None:
    """At once, also into a pipe."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _hint(address: str, name: str) -> str:
    logs = f"ray job logs --follow {name}"
    if is_file_address(address):
        follow = shlex.join(["ray", "exec", address, logs])
    else:
        follow = f"ray job logs --address {address} --follow {name}"
    return f"look at it with: qfarm status; follow it with: {follow}; end it with: qfarm cancel {name}"


def jobs(address: str, name: str | None = None) -> list[Submitted]:
    """The jobs of qfarm that the server at `address` knows, the latest first; only the one of that name where given."""
    with _job_server(address) as client:
        found = [job for job in _known(client, address) if name in (None, job.submission_id)]
        found.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [_submitted(client, job) for job in found]


def cancel(address: str, name: str) -> Submitted:
    """End a job: its driver is interrupted, what its workers have finished stays in the store. How it ended.

    Raises InvalidInput when there is no such job, or it has ended before.
    """
    with _job_server(address) as client:
        known = {job.submission_id: job for job in _known(client, address)}
        if name not in known:
            have = ", ".join(sorted(known)) or "none"
            raise InvalidInput(f"{address}: no job {name} there; its jobs: {have}")
        job = known[name]
        if job.status.is_terminal():
            raise InvalidInput(f"{address}: the job {name} has ended already ({job.status.value.lower()})")
        client.stop_job(name)
        deadline = time.monotonic() + END_S
        while not job.status.is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
            job = client.get_job_info(name)
        return _submitted(client, job)


def _submitted(client: Any, job: Any) -> Submitted:
    lines = [line for line in client.get_job_logs(job.submission_id).splitlines() if line.strip()]
    return Submitted(
        name=job.submission_id,
        status=job.status.value.lower(),
        at_work=not job.status.is_terminal(),
        started=_time(job.start_time),
        ended=_time(job.end_time),
        said=(lines or [job.message or ""])[-1].strip(),
    )


def _time(milliseconds: int | None) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC) if milliseconds else None


def require_shared_store(store: str) -> None:
    """Refuse a store that the cluster's machines cannot share. Raises InvalidInput.

    A relative one would lie in a folder of the cluster that is deleted later.
    """
    if is_url(store):
        check_url(store)
    elif not os.path.isabs(store):
        raise InvalidInput(
            f'store: "{store}" is relative, and the job does not run on this machine; set QFARM_STORE to s3://BUCKET '
            "or to the absolute path of a folder that all machines of the cluster share, or give either in the job"
        )


def path_there(given: str, working_dir: Path, remedy: str) -> str:
    """A path of this machine as the job knows it, relative to the working directory that travels with it.

    Raises InvalidInput, which ends with `remedy`, for a path outside.
    """
    path = Path(given).expanduser()
    for found, folder in ((path.absolute(), working_dir.absolute()), (path.resolve(), working_dir.resolve())):
        relative = os.path.relpath(found, folder)
        if relative.split(os.sep)[0] != os.pardir:
            return relative
    raise InvalidInput(f"{given}: outside the current folder, which is all that is sent to the cluster; {remedy}")


def check_upload(folder: Path) -> None:
    """Refuse what Ray would pack badly: broken links, links that lead back to their own parents, too many bytes.

    What .gitignore and .rayignore leave out is not looked at, as Ray does not send it. Raises InvalidInput.
    """
    sizes = sorted(((path.stat().st_size, path) for path in _packed_files(folder)), reverse=True)
    total = sum(size for size, _ in sizes)
    if total > MAX_UPLOAD_BYTES:
        largest = ", ".join(f"{path.relative_to(folder)} ({_mib(size)})" for size, path in sizes[:NAMED_FILES])
        raise InvalidInput(
            f"{folder}: {_mib(total)} to send, at most {_mib(MAX_UPLOAD_BYTES)} can be; the largest: {largest}; "
            "name what the job does not need in .rayignore"
        )


def _packed_files(folder: Path) -> Iterator[Path]:
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _get_excludes

    always = _get_excludes(folder, ray_constants.get_runtime_env_default_excludes())
    return _walk(folder.absolute(), [always], (os.path.realpath(folder),))


def _walk(folder: Path, excludes: list[Any], parents: tuple[str, ...]) -> Iterator[Path]:
    """Files below a folder, links followed, without what the ignore files on the way exclude."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    # An ignore file binds its own folder and what lies below.
    excludes = excludes + get_excludes_from_ignore_files(folder, include_gitignore=True, logger=logger)
    for path in sorted(folder.iterdir()):
        if any(exclude(path) for exclude in excludes):
            continue
        if path.is_symlink() and not path.exists():
            raise InvalidInput(f"{path}: a link to {os.readlink(path)}, which is not there; remove it or fix it")
        if path.is_dir():
            real = os.path.realpath(path)
            if real in parents:
                link = next(place for place in (path, *path.parents) if place.is_symlink())
                raise InvalidInput(f"{link}: a link to {os.readlink(link)} leads back to where it is; remove it")
            yield from _walk(path, excludes, (*parents, real))
        elif path.is_file():
            yield path


@contextlib.contextmanager
def _job_server(address: str) -> Iterator[Any]:
    """A client of the job server that an address means; that of a launcher's file is reached through its ssh."""
    if not is_file_address(address):
        yield _client(address, address)
        return
    from qfarm.launcher import tunnel

    # Ray's client uses a token only where it is told to. Through ssh nobody else can hear it.
    mode = os.environ.get("RAY_AUTH_MODE") or "token"
    with tunnel(Path(address)) as url, ray_environment({"RAY_AUTH_MODE": mode}):
        yield _client(url, address)


def _client(url: str, address: str) -> Any:
    """`address` is what the user knows the server by."""
    try:
        import aiohttp  # noqa: F401  # of ray[default], as are requests and the client itself
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise InvalidInput(
            f"{address}: submitting to a cluster needs ray[default]; run: pip install 'qfarm[cluster]'"
        ) from None
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    unreachable = f"{address}: no Ray job server answers there; is the cluster up and its port reachable?"
    # Without this look, packets that vanish are waited for during minutes.
    if not answers(parts.hostname or "", port):
        raise InvalidInput(unreachable)
    try:
        # Ray lets these variables override the address that it is given.
        with process_environment({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}):
            client = JobSubmissionClient(url.rstrip("/"))
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        return client
    except AuthenticationError:
        # Ray's own text runs over several lines; which token and which mode is what helps.
        raise InvalidInput(f"{address}: the cluster refuses our token; {token_line(os.environ)}") from None
    except (ConnectionError, requests.exceptions.ConnectionError):
        raise InvalidInput(unreachable) from None
    except (RuntimeError, ValueError, KeyError, requests.exceptions.RequestException) as error:
        raise InvalidInput(f"{address}: this is no Ray job server: {_last_line(error)}") from None


def _known(client: Any, address: str) -> list[Any]:
    """Jobs that were submitted, not drivers that joined the cluster."""
    try:
        return [job for job in client.list_jobs() if job.submission_id]
    except (RuntimeError, OSError) as error:
        raise InvalidInput(f"{address}: {_last_line(error)}") from None


def _free_name(client: Any, address: str, base: str) -> str:
    """The name, or the next with a number. Of two who come here at once Ray refuses the second."""
    taken: dict[int, Any] = {}
    for job in _known(client, address):
        match = re.fullmatch(re.escape(base) + r"(?:\.(\d+))?", job.submission_id)
        if match:
            taken[int(match[1] or 1)] = job
    for job in taken.values():
        if not job.status.is_terminal():
            raise InvalidInput(
                f"{address}: this job is at work there already, as {job.submission_id} ({job.status.value.lower()}); "
                f"{_hint(address, job.submission_id)}"
            )
    return f"{base}.{max(taken) + 1}" if taken else base


def _without_address(argv: Sequence[str]) -> list[str]:
    """The arguments for the driver there, which runs on the cluster that it is on and must not submit itself again."""
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith("--address="):
            skip = False
        elif word == "--address":
            skip = True
        else:
            kept.append(word)
    return kept


async def _follow(client: Any, submission_id: str, write: Callable[[str], object]) -> None:
    async for text in client.tail_job_logs(submission_id):
        write(text)


def _exit_code(client: Any, submission_id: str) -> int:
    """The driver's exit code; a signal counts as a shell counts it. 1 when the job ended without a code."""
    deadline = time.monotonic() + END_S
    info = client.get_job_info(submission_id)
    while not info.status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
        info = client.get_job_info(submission_id)
    if not info.status.is_terminal():
        raise RuntimeError("its log ended before the job did")
    code: int | None = info.driver_exit_code
    if code is None:
        return 0 if info.status.value == "SUCCEEDED" else 1
    return code if code >= 0 else 128 - code


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
