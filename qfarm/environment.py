"""Environment: what a result was made with. Versions, commit, hardware, threads; never secrets."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import qfarm
from qfarm.errors import InvalidInput

PACKAGES = (
    "torch",
    "transformers",
    "ray",
    "datasets",
    "lm-eval",
    "tokenizers",
    "triton",
    "numpy",
    "pyarrow",
    "bitsandbytes",
)


@functools.cache
def provenance() -> dict[str, Any]:
    """Provenance of this process as plain data. Imports torch."""
    import torch

    found: dict[str, Any] = {
        "qfarm": qfarm.__version__,
        "commit": git_commit(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _nvidia_driver(),
        }
    return found


def machine(device: Any) -> dict[str, Any]:
    """What times depend on beside what is run: a torch.device, its name, threads, version of torch."""
    import torch

    known = provenance()
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "name": known["gpu"] if on_gpu else known["cpu"],
        "threads": torch.get_num_threads(),  # unlike provenance's, as it is now
        "torch": known["packages"]["torch"],
    }


def package_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with '-dirty' appended; None outside a checkout."""
    folder = Path(qfarm.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    described = _output(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    return described or None


def _nvidia_driver() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0] or None


GPU_STATE = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def gpu_state(uuid: str) -> dict[str, float | None]:
    """What times on a GPU depend on and changes from moment to moment; None where nvidia-smi does not tell."""
    query = f"--query-gpu={','.join(GPU_STATE.values())}"
    one = f"--id=GPU-{uuid.removeprefix('GPU-')}"
    line = _output(["nvidia-smi", one, query, "--format=csv,noheader,nounits"]).split("\n")[0]
    told = line.split(", ") if line.count(", ") == len(GPU_STATE) - 1 else [""] * len(GPU_STATE)
    return {name: _number(value) for name, value in zip(GPU_STATE, told, strict=True)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def reset_peak_host_bytes() -> None:
    """Start measuring this process's peak memory anew, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_host_bytes() -> int | None:
    """Largest resident memory of this process since the last reset; None where it is not known."""
    return _kibibytes("/proc/self/status", "VmHWM:")


def resident_host_bytes() -> int | None:
    """Resident memory of this process now; None where it is not known."""
    return _kibibytes("/proc/self/status", "VmRSS:")


def allocated_host_bytes() -> int | None:
    """Of that, what this process has allocated or changed: pages of files are not in it; None where it is not known."""
    return _kibibytes("/proc/self/status", "RssAnon:")


def available_host_bytes() -> int | None:
    """Memory of this machine that can be had without swapping; None where it is not known."""
    return _kibibytes("/proc/meminfo", "MemAvailable:")


def _kibibytes(path: str, field: str) -> int | None:
    file = Path(path)
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def data_folder(given: str | None) -> str | None:
    """The data pack's folder: the command line's, else QFARM_DATA; absolute."""
    folder = given or os.environ.get("QFARM_DATA")
    return str(Path(folder).expanduser().resolve()) if folder else None


def placed_store(given: str) -> str:
    """A job's store where QFARM_STORE (a URL or an absolute path) puts it: below that, if it is a relative path.

    Raises InvalidInput when QFARM_STORE is relative itself.
    """
    root = os.environ.get("QFARM_STORE", "")
    if not root or "://" in given or given.startswith(("/", "~")):
        return given
    if "://" not in root and not os.path.isabs(root):
        raise InvalidInput(f"QFARM_STORE: {root}: give s3://BUCKET, gs://BUCKET or an absolute path")
    return f"{root.rstrip('/')}/{os.path.normpath(given)}"
