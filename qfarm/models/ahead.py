"""Ahead: the model that a worker will load next comes to its machine while the worker is busy with another.

What is not there yet is downloaded or unpacked, weights in another dtype are converted once (`qfarm.models.mapped`),
and the files are read, so that their pages are in memory when the model is loaded. Nothing is held by this process.
"""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

from qfarm.models.load import DTYPES
from qfarm.models.mapped import checkpoint_files, in_dtype
from qfarm.models.reference import resolve

READ_BYTES = 1 << 24  # at a time
MOST_MEMORY = 0.5  # of what is available: more pages than that would drive out those in use


class Ahead:
    """Fetches one model at a time, in a thread; a worker has one."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._latest: tuple[str, str] | None = None

    def start(self, reference: str, dtype: str) -> None:
        """Begin to fetch a model in a dtype, unless it is the latest one or another is still on its way."""
        if self._latest == (reference, dtype) or (self._thread is not None and self._thread.is_alive()):
            return
        self._latest = (reference, dtype)
        self._thread = threading.Thread(target=_fetch, args=(reference, dtype), daemon=True, name="qfarm ahead")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is on its way."""
        if self._thread is not None:
            self._thread.join()


def _fetch(reference: str, dtype: str) -> None:
    try:
        facts = resolve(reference)
        location, _, _ = in_dtype(facts, DTYPES[dtype])
        files = checkpoint_files(facts) if location == facts.location else sorted(Path(location).glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        if size <= MOST_MEMORY * psutil.virtual_memory().available:
            for path in files:
                _read(path)
    except Exception:  # the load that follows meets the same, is the one who needs the model, and says so
        return


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as stream:
        while stream.read(READ_BYTES):
            continue
