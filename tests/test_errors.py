"""Failure kinds of exceptions, and how messages name what is near and what is known."""

from __future__ import annotations

import pytest
import torch

from qfarm.errors import (
    DataError,
    Failure,
    InvalidInput,
    JobError,
    ModelError,
    NonFinite,
    QfarmError,
    StoreError,
    StoreFull,
    Unavailable,
    Unsupported,
    classify,
    nearest,
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (JobError("x"), Failure.INVALID),
        (ModelError("x"), Failure.INVALID),
        (DataError("x"), Failure.INVALID),
        (StoreError("x"), Failure.INVALID),
        (NonFinite("x"), Failure.NONFINITE),
        (Unavailable("x"), Failure.UNAVAILABLE),
        (ConnectionResetError(), Failure.UNAVAILABLE),
        (TimeoutError(), Failure.UNAVAILABLE),
        (MemoryError(), Failure.OOM),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Failure.OOM),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes"), Failure.OOM),
        (RuntimeError("shape mismatch"), Failure.BUG),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), Failure.BUG),
        (ValueError("x"), Failure.BUG),
        (KeyError("x"), Failure.BUG),
    ],
    ids=lambda value: str(value) if isinstance(value, Failure) else type(value).__name__,
)
def test_classify(error: Exception, kind: Failure) -> None:
    assert classify(error) is kind


def test_an_allocation_that_really_fails_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert classify(caught.value) is Failure.OOM


def test_the_tree() -> None:
    assert all(issubclass(kind, InvalidInput) for kind in (JobError, ModelError, DataError, StoreError, Unsupported))
    assert all(issubclass(kind, QfarmError) for kind in (InvalidInput, Unavailable, NonFinite, StoreFull))
    assert not issubclass(StoreFull, InvalidInput)  # not the user's fault: the cell is tried again


@pytest.mark.parametrize(
    ("word", "known", "message"),
    [
        ("gtpq", ["rtn", "gptq"], ', did you mean "gptq"? known: gptq, rtn'),
        ("RTN", ["rtn", "gptq"], ', did you mean "rtn"? known: gptq, rtn'),
        ("kl", ["KL", "x"], ', did you mean "KL"? known: KL, x'),
        ("quantum", ["rtn", "gptq"], "; known: gptq, rtn"),
        ("", ["rtn"], "; known: rtn"),
        ("x", [], ""),
    ],
)
def test_nearest(word: str, known: list[str], message: str) -> None:
    assert nearest(word, known) == message
