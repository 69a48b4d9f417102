"""Ahead: the model that a worker will load next comes to its machine while the worker is busy with another.

What is not there yet is downloaded or unpacked, weights in another dtype are converted once (`qfarm.models.mapped`),
and the files are read, so that their pages are in memory when the model is loaded. It is a process of its own, of low
priority: loading a model changes settings of torch that belong to a whole process, and the worker's memory is measured.

    python -m qfarm.models.ahead REFERENCE DTYPE
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import psutil

READ_BYTES = 1 << 24  # at a time
MOST_MEMORY = 0.5  # of what is available: more pages than that would drive out those in use
NICE = 10  # beside the worker's own priority


class Ahead:
    """Fetches one model at a time; a worker has one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._latest: tuple[str, str] | None = None

    def start(self, reference: str, dtype: str) -> None:
        """Begin to fetch a model in a dtype, unless it is the latest one or another is still on its way."""
        if self._latest == (reference, dtype) or (self._process is not None and self._process.poll() is None):
            return
        self._latest, self._said = (reference, dtype), tempfile.TemporaryFile()
        command = [sys.executable, "-m", __name__, reference, dtype]
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=self._said)

    def wait(self) -> None:
        """Until nothing is on its way."""
        if self._process is not None:
            self._process.wait()

    def failure(self) -> str | None:
        """Why the latest model was not fetched, said once; the load that follows will meet the same."""
        if self._process is None or self._said is None or self._process.poll() is None:
            return None
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().rpartition("\n")[2]
        code = self._process.returncode
        self._said.close()
        self._process = self._said = None
        assert self._latest is not None
        return f"{self._latest[0]} could not be fetched ahead: {last or f'exit code {code}'}" if code else None


def fetch(reference: str, dtype: str) -> None:
    """Have the files of a model on this machine and in its memory. Raises what loading it would."""
    from qfarm.models.load import DTYPES
    from qfarm.models.mapped import checkpoint_files, in_dtype
    from qfarm.models.reference import resolve

    facts = resolve(reference)
    location, _, _ = in_dtype(facts, DTYPES[dtype])
    files = checkpoint_files(facts) if location == facts.location else sorted(Path(location).glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    if size <= MOST_MEMORY * psutil.virtual_memory().available:
        for path in files:
            _read(path)


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as stream:
        while stream.read(READ_BYTES):
            continue


if __name__ == "__main__":
    os.nice(NICE)
    fetch(*sys.argv[1:])
