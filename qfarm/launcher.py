"""Launcher: the cluster of a file for `ray up`: whether it runs, and a way to its head's job server through ssh.

The job server listens on the head's loopback only, so that no port has to be opened and nothing travels in the clear.
Everything is asked of Ray's own commands, in processes of their own: they may print, import a cloud's SDK, or wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from qfarm.cluster import DASHBOARD_PORT, answers
from qfarm.errors import Unavailable

LOOKUP_S = 30.0  # `ray get-head-ip` asks the cloud's API
TUNNEL_S = 60.0  # ssh on a slow line, behind a cloud's API
RAY = (sys.executable, "-P", "-m", "ray.scripts.scripts")
SDKS = {"aws": "boto3"}  # without which a provider cannot be asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a launcher's file leads to."""

    head: str | None  # its address, as the provider gives it; None: no cluster of this file runs
    reason: str = ""  # why there is none, as far as it is known


def look_up(cluster_yaml: Path) -> Found:
    """The head of the cluster that a launcher's file describes, if one runs."""
    try:
        config = yaml.safe_load(cluster_yaml.read_text())
        sdk = SDKS.get(config["provider"]["type"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return Found(head=None, reason="not a file for Ray's cluster launcher")
    if sdk is not None and importlib.util.find_spec(sdk) is None:
        return Found(head=None, reason=f"not asked for, {sdk} is not installed")
    try:
        answer = subprocess.run(
            [*RAY, "get-head-ip", str(cluster_yaml)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LOOKUP_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Found(head=None, reason=f"no answer within {LOOKUP_S:g} s")
    lines = answer.stdout.split()
    if answer.returncode == 0 and lines and re.fullmatch(r"[A-Za-z0-9.:-]+", lines[-1]):
        return Found(head=lines[-1])
    return Found(head=None, reason=_last_line(answer.stderr))


@contextlib.contextmanager
def tunnel(cluster_yaml: Path) -> Iterator[str]:
    """The address on this machine at which the head's job server answers while the context lasts.

    Raises Unavailable when the launcher cannot reach the head.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*RAY, "dashboard", str(cluster_yaml), "--port", str(port), "--remote-port", str(DASHBOARD_PORT)]
    with tempfile.TemporaryFile("w+") as said:
        # A session of its own: an interrupt of ours must not cut the line, and its ssh ends with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + TUNNEL_S
            while not answers("127.0.0.1", port):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise Unavailable(f"{cluster_yaml}: the head cannot be reached: {_last_line(said.read())}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _last_line(text: str) -> str:
    """What a command of Ray's said last, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
