"""Stopwatch: which part of a run takes how long, measured from outside.

Sections nest, and an inner one's time is not counted in the outer one: the shares add up to the whole.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

Place = tuple[type | ModuleType, str]  # a method of a class, or a function of a module
SECTIONS = ("forwards", "statistics", "solving", "rest")


class Stopwatch:
    """Seconds per section. Time outside all sections is that of "rest"."""

    def __init__(self, clock: Callable[[], float] | None = None, sections: Sequence[str] = SECTIONS) -> None:
        self.seconds = dict.fromkeys((*sections, "rest"), 0.0)
        self._clock = clock or now
        self._stack = ["rest"]
        self._last = self._clock()

    @contextlib.contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        self._switch()
        self._stack.append(section)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def stop(self) -> float:
        """Seconds in all."""
        self._switch()
        return sum(self.seconds.values())

    def _switch(self) -> None:
        time_now = self._clock()
        self.seconds[self._stack[-1]] += time_now - self._last
        self._last = time_now


def now() -> float:
    """Seconds on a clock that waits for what the GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def timed(watch: Stopwatch, places: Mapping[Place, str]) -> Iterator[None]:
    """While this lasts, calls of these methods of classes are timed as these sections: {(class, name): section}.

    Functions of modules as well, where they are looked up at each call.
    """
    with contextlib.ExitStack() as stack:
        for (owner, name), section in places.items():
            own = owner.__dict__.get(name)  # None: inherited, and to be inherited again afterwards
            setattr(owner, name, _timed(getattr(owner, name), watch, section))
            stack.callback(_put_back, owner, name, own)
        yield


def _timed(function: Callable[..., Any], watch: Stopwatch, section: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch(section):
            return function(*args, **kwargs)

    return call


def _put_back(owner: type | ModuleType, name: str, own: Any) -> None:
    if own is None:
        delattr(owner, name)
    else:
        setattr(owner, name, own)
