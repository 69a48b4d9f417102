"""Exceptions and failure kinds.

QfarmError
|-- InvalidInput      what the user gave cannot work; exit code 2, never retried
|   |-- JobError      a job file
|   |-- ModelError    a model reference or an unsupported architecture
|   |-- DataError     a text or data set
|   |-- StoreError    a results store
|   `-- Unsupported   an export that its format cannot hold
|-- Unavailable       a hub, an index or a file server does not answer; retried
|-- NotVerified       an export does not read back as what was measured; it is not kept
|-- NonFinite         NaN or Inf where a number was needed; given up
|-- Disagreement      two runs of one cell that differ by more than rounding; given up
`-- StoreFull         no space (or no permission) left where results go; not the cell's fault
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable


class QfarmError(Exception):
    """Base of everything qfarm raises on purpose."""


class InvalidInput(QfarmError):
    """Bad input. The message is one line: what, where, what would be valid."""


class JobError(InvalidInput):
    pass


class ModelError(InvalidInput):
    pass


class DataError(InvalidInput):
    pass


class StoreError(InvalidInput):
    pass


class Unsupported(InvalidInput):
    pass


class Unavailable(QfarmError):
    pass


class NotVerified(QfarmError):
    pass


class NonFinite(QfarmError):
    pass


class Disagreement(QfarmError):
    pass


class StoreFull(QfarmError):
    pass


class Failure(enum.StrEnum):
    """Why an attempt ended without a result."""

    OOM = "oom"
    NONFINITE = "nonfinite"
    WORKER_DIED = "worker_died"
    NODE_DIED = "node_died"
    PREEMPTED = "preempted"
    HUNG = "hung"
    SUPERSEDED = "superseded"  # another copy of the cell was first
    UNAVAILABLE = "unavailable"
    INVALID = "invalid"
    BUG = "bug"


def classify(error: BaseException) -> Failure:
    """The failure kind of an exception raised inside a worker.

    Kinds that only an onlooker can see (a dead worker, node or heartbeat) are set by the driver.
    """
    name = type(error).__name__
    if isinstance(error, InvalidInput):
        return Failure.INVALID
    if isinstance(error, NonFinite):
        return Failure.NONFINITE
    if (
        isinstance(error, MemoryError)
        or name in ("OutOfMemoryError", "AcceleratorError")
        and "out of memory" in str(error)
    ):
        return Failure.OOM
    # torch's CPU allocator raises a plain RuntimeError; its text is the only mark.
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return Failure.OOM
    if isinstance(error, (Unavailable, ConnectionError, TimeoutError)):
        return Failure.UNAVAILABLE
    return Failure.BUG


def nearest(word: str, known: Iterable[str]) -> str:
    """How a message about an unknown name goes on: ', did you mean "x"? known: x, y', or '; known: x, y'."""
    names = sorted(set(known))
    return f"{did_you_mean(word, names)} known: {', '.join(names)}" if names else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """How a message goes on before it lists what there is: ', did you mean "x"?' or ';'."""
    names = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), names, n=1)
    return f', did you mean "{names[match[0]]}"?' if match else ";"
