"""Doctor: what this machine can run, and why not the rest. Looks, imports what it must, changes nothing.

A finding that stops every job is a fault; one that only rules some out is a note, with what to do about it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from qfarm import cache
from qfarm.environment import available_host_bytes, package_version
from qfarm.report.figures import plain, size
from qfarm.report.layout import grid
from qfarm.report.render import terminal_text

State = Literal["ok", "missing", "fault"]
MIN_FREE = 2 << 30  # bytes: below it a small model's copy and its results may not fit
HUB = "huggingface.co"
HUB_PATIENCE_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    state: State  # fault: no job runs; missing: some cannot
    text: str  # what was found, or what cannot run without it and how to get it


def examine(data: str | None, *, hub: bool = False) -> list[Finding]:
    """All findings; `data` is the data pack's folder, `hub` asks for a connection to the model hub."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _torch,
        _triton,
        lambda: _optional("bitsandbytes", "llm_int8 with backend: bitsandbytes", "bitsandbytes", "needs a CUDA GPU"),
        lambda: _optional("deepspeed", "the test of zeroquant against DeepSpeed's own quantizers", "deepspeed", ""),
        lambda: _optional("compressed_tensors", "qfarm export to packed checkpoints", "export", ""),
        lambda: _needed("transformers"),
        lambda: _needed("lm_eval"),
        lambda: _needed("ray"),
        _ray_dashboard,
        lambda: _pack(data),
        _hub if hub else _hub_not_asked,
        _disk,
        _memory,
    ]
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Finding(name="python", state="ok" if fine else "fault", text=version if fine else f"{version}: needs 3.11")


def _torch() -> Iterator[Finding]:
    module, problem = _imported("torch")
    if problem:
        yield Finding(name="torch", state="fault", text=problem)
        return
    kind = f"ROCm {module.version.hip}" if module.version.hip else f"CUDA {module.version.cuda}"
    build = kind if module.version.hip or module.version.cuda else "CPU build"
    threads = f"{module.get_num_threads()} threads"
    yield Finding(name="torch", state="ok", text=f"{module.__version__}, {build}, {threads}")
    if module.cuda.is_available():
        for index in range(module.cuda.device_count()):
            device = module.cuda.get_device_properties(index)
            text = f"{plain(device.name)}, {size(device.total_memory)}"
            yield Finding(name=f"gpu {index}", state="ok", text=text)
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    why = "this torch is a CPU build" if build == "CPU build" else "torch sees none (driver, or none in this machine)"
    why = "CUDA_VISIBLE_DEVICES hides them" if hidden else why
    yield Finding(name="gpu", state="missing", text=f"none, {why}: jobs need resources: {{gpus: 0}}")


def _triton() -> Iterator[Finding]:
    if importlib.util.find_spec("triton") is None:
        yield Finding(name="triton", state="missing", text="not installed: comes with CUDA builds of torch")
    else:
        yield Finding(name="triton", state="ok", text=package_version("triton") or "version unknown")


def _optional(module: str, purpose: str, extra: str, remark: str) -> Iterator[Finding]:
    name = module.replace("_", "-")
    if importlib.util.find_spec(module) is None:
        text = f"not installed: {purpose}; pip install 'qfarm[{extra}]'{f' ({remark})' if remark else ''}"
        yield Finding(name=name, state="missing", text=text)
        return
    found, problem = _imported(module)
    version = package_version(name) or getattr(found, "__version__", "version unknown")
    yield Finding(name=name, state="missing" if problem else "ok", text=problem or str(version))


def _needed(module: str) -> Iterator[Finding]:
    name = module.replace("_", "-")
    if importlib.util.find_spec(module) is None:
        yield Finding(name=name, state="fault", text="not installed: pip install qfarm brings it")
    else:
        yield Finding(name=name, state="ok", text=package_version(name) or "version unknown")


def _ray_dashboard() -> Iterator[Finding]:
    """What submission to a cluster's head over HTTP needs beside Ray."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        text = "not installed: submit --address http://HEAD:8265; pip install 'qfarm[cluster]'"
        yield Finding(name="ray[default]", state="missing", text=text)
    else:
        yield Finding(name="ray[default]", state="ok", text="jobs can be handed to a cluster's head")


def _pack(data: str | None) -> Iterator[Finding]:
    from qfarm.errors import QfarmError
    from qfarm.sources import pack_sets

    if data is None:
        text = "none (--data or QFARM_DATA): only built-in texts, files and the hub"
        yield Finding(name="data pack", state="missing", text=text)
        return
    try:
        entries = pack_sets(data)
        for entry in entries:
            for split in entry.splits:
                entry.file(split)
    except QfarmError as error:
        yield Finding(name="data pack", state="fault", text=str(error))
        return
    yield Finding(name="data pack", state="ok", text=f"{plain(data)}: {len(entries)} data sets")


def _hub_not_asked() -> Iterator[Finding]:
    yield Finding(name="hub", state="ok", text="not asked (--hub)")


def _hub() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding(name="hub", state="missing", text="HF_HUB_OFFLINE is set: only what is cached, files and wheels")
        return
    try:
        with socket.create_connection((HUB, 443), timeout=HUB_PATIENCE_S):
            yield Finding(name="hub", state="ok", text=f"{HUB} answers")
    except OSError as error:
        text = f"{HUB} does not answer ({error}): only what is cached, files and wheels"
        yield Finding(name="hub", state="missing", text=text)


def _disk() -> Iterator[Finding]:
    for name, folder in (("cache", cache.root()), ("disk", Path.cwd())):
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(place, os.W_OK):
            yield Finding(name=name, state="fault", text=f"{place}: cannot be written; set QFARM_CACHE")
            continue
        free = shutil.disk_usage(place).free
        yield _enough(name, f"{plain(folder)}: {size(free)} free", free)


def _memory() -> Iterator[Finding]:
    free = available_host_bytes()
    if free is None:
        yield Finding(name="memory", state="ok", text="how much is free is not known on this system")
        return
    yield _enough("memory", f"{size(free)} free, {os.cpu_count()} CPUs", free)


def _enough(name: str, text: str, free: int) -> Finding:
    if free >= MIN_FREE:
        return Finding(name=name, state="ok", text=text)
    return Finding(name=name, state="missing", text=f"{text}: less than {size(MIN_FREE)} is little for any model")


def render(findings: list[Finding], width: int, color: bool = False) -> str:
    """One line each, as wide as the terminal."""
    words = {"ok": "ok", "missing": "-", "fault": "FAULT"}
    rows = [(words[finding.state], finding.name, finding.text) for finding in findings]
    return terminal_text([grid(("", "what", "found"), rows, numeric=())], width, color)


def _imported(name: str) -> tuple[Any, str | None]:
    """The module, or why it cannot be imported: a broken installation shows only then."""
    try:
        return importlib.import_module(name), None
    except Exception as error:  # compiled extensions raise kinds of their own
        line = (str(error).strip().splitlines() or [""])[0]
        return None, f"cannot be imported: {type(error).__name__}: {plain(line, 200)}"
