"""Cluster: which Ray a job runs on, how this process joins it, and how many workers fit there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import signal
import socket
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qfarm.errors import InvalidInput, QfarmError
from qfarm.job import Resources

DASHBOARD_PORT = 8265
PROBE_S = 3.0  # a head that does not accept a connection within this does not answer
MAX_WORKERS = 64  # asked of a cluster at once when the job sets no limit
ADDRESS_FORMS = (
    "HOST:6379 on a machine of the cluster, http://HOST:8265 from outside, a file for Ray's cluster launcher, auto, or "
    "local"
)

# A new Ray on this machine, where the user has not decided otherwise.
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's default of 0.95 leaves about 1 GiB on a machine of 24: too late to end one worker instead of all.
    "RAY_memory_usage_threshold": "0.90",
}
# Ray's default leaves all GPUs visible to a worker that asked for none.
ANY_ENVIRONMENT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
HANDED_ON = frozenset(
    {"QFARM_DATA", "QFARM_CACHE", "QFARM_CACHE_LIMIT", "QFARM_SHARED_CACHE", "CUBLAS_WORKSPACE_CONFIG"}
    | {"AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"}
)
HANDED_ON_PREFIXES = ("HF_", "OPENBLAS_")
SECRETS = frozenset(
    {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
)


def find_address(
    address: str | None, environ: Mapping[str, str], cluster_yaml: Path = Path("cluster.yaml")
) -> tuple[str | None, str]:
    """The address to run at and the line that says where: `address`, else RAY_ADDRESS, else cluster.yaml, else here.

    None means a Ray of our own on this machine. With http(s):// the job is handed over by `qfarm.remote`, and so it is
    with a launcher's file, to the cluster that it describes. Raises InvalidInput for an address that is none.
    """
    source = "--address" if address else "RAY_ADDRESS"
    given = (address or environ.get("RAY_ADDRESS") or "").strip()
    note = ""
    if given:
        _check_address(given, source)
        if given != "local":
            return given, f"cluster at {given}"
    elif cluster_yaml.is_file():
        from qfarm.launcher import look_up

        found = look_up(cluster_yaml)
        if found.head:
            return str(cluster_yaml), f"cluster of {cluster_yaml}, head {found.head}"
        note = f" (no cluster of {cluster_yaml}: {found.reason})"
    return None, f"local Ray, {_cpu_count()} CPUs{note}"


def _check_address(address: str, source: str) -> None:
    if address.startswith("ray://"):
        raise InvalidInput(f"{source} {address}: Ray Client addresses are not supported; use {ADDRESS_FORMS}")
    if address in ("local", "auto") or (is_file_address(address) and Path(address).is_file()):
        return
    with contextlib.suppress(ValueError):  # urlsplit's word for a bad port or bracket
        parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
        web = parts.scheme in ("http", "https")
        if parts.hostname and (web or (not parts.scheme and parts.port)):
            return
    raise InvalidInput(f"{source} {address}: not an address; use {ADDRESS_FORMS}")


def is_file_address(address: str) -> bool:
    """Whether an address names a file for Ray's cluster launcher."""
    return address.endswith((".yaml", ".yml"))


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def token_line(environ: Mapping[str, str]) -> str:
    """Which mode and which source of a token Ray's clients use here; never the token."""
    mode = environ.get("RAY_AUTH_MODE", "unset")
    if environ.get("RAY_AUTH_TOKEN"):
        source = "RAY_AUTH_TOKEN"
    elif environ.get("RAY_AUTH_TOKEN_PATH"):
        source = f"the file {environ['RAY_AUTH_TOKEN_PATH']} (RAY_AUTH_TOKEN_PATH)"
    else:
        default = Path.home() / ".ray" / "auth_token"
        source = str(default) if default.is_file() else "nowhere"
    return f"RAY_AUTH_MODE is {mode}, the token comes from {source}"


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray for the length of a job: the cluster at `address`, or a new one on this machine for None.

    A Ray that this process has initialized before is used as it is and left running. Raises InvalidInput when there
    is no cluster at the address or it refuses us, QfarmError when none can be started here.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    chosen = dict(ANY_ENVIRONMENT) if address else local_environment()
    # RAY_ADDRESS has been weighed already; Ray would let it win over what it is told.
    with ray_environment({**chosen, "RAY_ADDRESS": None}):
        try:
            _join(address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # ray.init() has put one of its own there
            yield
        finally:
            with exit_on_interrupt():
                ray.shutdown()


def _join(address: str | None) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": f"qfarm-{uuid.uuid4().hex[:12]}"}
    if address is None:
        # Named, since ray.init() without an address would follow RAY_ADDRESS.
        try:
            ray.init(address="local", include_dashboard=False, **quiet)
        except Exception as error:  # a node that does not come up in time is a plain Exception
            reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
            raise QfarmError(f"cannot start Ray on this machine: {reason}; --local runs without it") from error
        return
    parts = urllib.parse.urlsplit(f"//{address}")
    # Ray itself tries for ever.
    if parts.hostname and parts.port and not answers(parts.hostname, parts.port):
        raise InvalidInput(f"no Ray cluster answers at {address}; start one, or name another with --address")
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        # A wrong token shows as AuthenticationError or, after 20 s, as a plain ConnectionError.
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise InvalidInput(f"cannot join the Ray cluster at {address}: {reason}; {token_line(os.environ)}") from None


def local_environment() -> dict[str, str]:
    """Ray's ports listen on every interface even for a cluster of one machine, and whoever reaches them runs code.

    So a token is required, one of our own that lives in the environment of these processes only. Ray's default would
    write one to ~/.ray, which changes how every later Ray on this machine behaves. A user's RAY_AUTH_MODE stands.
    """
    values = {name: os.environ.get(name, value) for name, value in LOCAL_ENVIRONMENT.items()} | ANY_ENVIRONMENT
    if "RAY_AUTH_MODE" not in os.environ:
        values |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _own_token()}
    return values


@functools.cache
def _own_token() -> str:
    """One per process: Ray reads it once and keeps it."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def ray_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """The environment for Ray in this process. Ray reads it when it is imported, so it has to be told to look again."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    try:
        with process_environment(values):
            Config.initialize("")
            yield
    finally:
        Config.initialize("")


@contextlib.contextmanager
def process_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """This process's environment with these values (None: without the variable), restored afterwards."""
    before = {name: os.environ.get(name) for name in values}

    def put(settings: Mapping[str, str | None]) -> None:
        for name, value in settings.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """While workers are being ended, another interrupt ends this process at once.

    Signals belong to the main thread; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        os._exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the job's resources come to on this Ray."""

    workers: int  # at most at once
    cpus: int  # per worker
    gpus: float  # per worker at most
    local: bool
    room: float | None = None  # GPUs in all; None: the cluster may grow


def capacity(local: bool, resources: Resources, note: Callable[[str], None]) -> Capacity:
    """How many workers fit. A cluster may grow, so there the job's limit counts and not what is there now.

    On one machine, more CPUs than it has are clamped with a note and GPUs that it lacks raise InvalidInput: a job that
    asks for a GPU never runs on the CPU in silence.
    """
    import ray

    gpus, cpus = resources.gpus, resources.cpus
    if not local:
        _refuse_hopeless(cpus, gpus)
        return Capacity(workers=resources.workers or MAX_WORKERS, cpus=cpus, gpus=gpus, local=False)
    total = ray.cluster_resources()
    here_cpus, here_gpus = int(total.get("CPU", 1)), float(total.get("GPU", 0))
    if gpus > here_gpus:
        raise InvalidInput(lacking_gpu(gpus, here_gpus))
    if cpus > here_cpus:
        note(f"the job asks for {cpus} CPUs per worker but this machine has {here_cpus}; using {here_cpus}")
        cpus = here_cpus
    # The small addition is for sums like 3 * 0.1. With `gpu_memory` smaller cells share a GPU.
    by_gpus = [int(here_gpus / gpus + 1e-9)] if gpus and resources.gpu_memory is None else []
    fit = min([here_cpus // cpus, *by_gpus])
    workers = max(1, min(fit, resources.workers or fit))
    return Capacity(workers=workers, cpus=cpus, gpus=gpus, local=True, room=here_gpus)


def _refuse_hopeless(cpus: int, gpus: float) -> None:
    """Refuse workers that fit on no node of a cluster which cannot grow. Raises InvalidInput; they would wait for ever.

    A cluster with an autoscaler says what it may grow to, and is believed where it says less than a worker needs.
    """
    import ray
    from ray._private.state import state

    wanted = {"CPU": float(cpus), "GPU": gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    # A private call, as Ray's own libraries make it; {} or None where there is no autoscaler.
    most = state.get_max_resources_from_cluster_config()
    if most and all(most.get(name, 0) >= amount for name, amount in wanted.items()):
        return
    there = "; ".join(sorted({f"{node.get('CPU', 0):g} CPU(s) and {node.get('GPU', 0):g} GPU(s)" for node in nodes}))
    raise InvalidInput(
        f"a worker wants {cpus} CPU(s) and {gpus:g} GPU(s), but no node of this cluster has them, and it "
        f"{'may not grow so far' if most else 'has no autoscaler'}; its nodes have {there or 'nothing'}"
    )


def lacking_gpu(gpus: float, here: float = 0) -> str:
    """The refusal of a job that asks for more GPUs per worker than this machine has."""
    have = f"only {here:g}" if here else "none"
    return (
        f"the job asks for {gpus:g} GPU(s) per worker but this machine has {have}; "
        "set resources: {gpus: 0} in the job to run on the CPU, or name a cluster with --address"
    )


def worker_environment(environ: Mapping[str, str], extra: Mapping[str, str], cpus: int) -> dict[str, str]:
    """The environment that workers start with: set before Python, so before torch.

    Secrets are not among it, because Ray shows runtime environments in logs and in its dashboard.
    """
    handed = {
        name: value
        for name, value in environ.items()
        if (name in HANDED_ON or name.startswith(HANDED_ON_PREFIXES)) and name not in SECRETS
    }
    # On a cluster made by `ray up` Ray would leave 1 thread everywhere.
    threads = {"OMP_NUM_THREADS": str(cpus), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    return {**handed, **threads, **ANY_ENVIRONMENT, **extra}
