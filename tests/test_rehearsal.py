"""The documentation's way on hosts of one's own, followed literally: `ray up`, a job, a host that dies, `ray down`."""

from __future__ import annotations

import collections
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import save_tiny
from tests.hosts import ADDRESSES, BRIDGE, Lan, missing

ROOT = Path(__file__).parents[1]
PORT = 5000
S3 = {
    "AWS_ENDPOINT_URL": f"http://{BRIDGE}:{PORT}",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
HUB_TOKEN = f"hf_{secrets.token_hex(16)}"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def exports(values: dict[str, str]) -> str:
    return "export " + " ".join(f"{name}={value}" for name, value in values.items())


def cluster_file() -> str:
    """docs/cluster_on_premises.yaml for these hosts: where the environment comes from and what a host has is theirs."""
    text = (ROOT / "docs" / "cluster_on_premises.yaml").read_text()
    text = text.replace("--num-cpus=0", "--num-cpus=0 --object-store-memory=100000000")
    # Each sees all of this machine's CPUs.
    text = text.replace("ray start --address", "ray start --num-cpus=1 --object-store-memory=100000000 --address")
    config = yaml.safe_load(text)
    config["provider"] |= {"head_ip": ADDRESSES["head"], "worker_ips": [ADDRESSES["w1"], ADDRESSES["w2"]]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    profile = [command for command in config["setup_commands"] if "bashrc" in command]
    assert len(profile) == 1 and len(config["setup_commands"]) == 4
    environment = f"grep -q AWS_ ~/.bashrc || echo '{exports(S3 | OFFLINE)}' >> ~/.bashrc"
    config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/qfarm-env", *profile, environment]
    return yaml.safe_dump(config, sort_keys=False)


def job_file() -> str:
    """jobs/llama_matrix.yaml for a tiny model on CPUs and the text that comes with Python."""
    job = yaml.safe_load((ROOT / "jobs" / "llama_matrix.yaml").read_text())
    job |= {
        "models": ["/srv/shared/model"],
        "methods": ["rtn", "gptq"],
        "group_sizes": [-1, 32],
        "calibration": {"text": "python-docs", "samples": 8, "length": 128},
        "evaluate": [{"perplexity": {"text": "python-docs", "length": 128, "windows": 300}}],
        "resources": {"gpus": 0, "cpus": 1},
    }
    return yaml.safe_dump(job, sort_keys=False)


CELLS = 9  # with the baseline
DRIVER = "pkill -{signal} -f '^python -m qfarm submit'"  # within the host's own processes


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    """Booted hosts; the desk has a checkout, a cluster.yaml, a token and a key for the others."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="qf", dir="/tmp") as folder, Lan(Path(folder)) as lan:
        save_tiny(lan.shared / "model", "llama")
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in ADDRESSES:
            lan.boot(name)
        home = lan.folder / "desk" / "home"
        subprocess.run(
            ["rsync", "-a", "--files-from=-", f"{ROOT}/", f"{home}/qfarm/"], input=listed.stdout, text=True, check=True
        )
        (home / "qfarm" / "cluster.yaml").write_text(cluster_file())
        (home / "qfarm" / "jobs" / "llama_matrix.yaml").write_text(job_file())
        key = home / ".ssh" / "id_ed25519"
        key.write_bytes(lan.key.read_bytes())
        key.chmod(0o600)
        (home / ".cache" / "huggingface").mkdir(parents=True)
        (home / ".cache" / "huggingface" / "token").write_text(HUB_TOKEN)
        path = f"export PATH={sys.prefix}/bin:$PATH PYTHONPATH=$HOME/qfarm QFARM_STORE=s3://rehearsal"
        (home / ".profile").write_text(f"{path}\n{exports(S3 | OFFLINE)}\ncd ~/qfarm\n")
        command = [sys.executable, "-m", "moto.server", "-H", BRIDGE, "-p", str(PORT)]
        with lan.serving(command, S3):
            made = "import boto3; boto3.client('s3').create_bucket(Bucket='rehearsal')"
            deadline = time.monotonic() + 120
            while desk(lan, f"python -c {made!r}", check=False).returncode:
                assert time.monotonic() < deadline, "moto does not start"
            yield lan


def desk(lan: Lan, command: str, *, check: bool = True, answer: str = "", timeout: float = 300) -> Any:
    """A command as the user types it, on a terminal where there is an `answer`."""
    done = lan.ssh("desk", command, answer=answer, timeout=timeout)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}\n{monitor(lan)}"
    return done


def monitor(lan: Lan) -> str:
    """What the autoscaler said of a worker that did not come."""
    return lan.ssh("head", "tail -n 40 /tmp/ray/session_latest/logs/monitor.*").stdout


def refused(lan: Lan, command: str) -> str:
    """The one line that a refused command ends with."""
    done = desk(lan, command, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(lines[0])


def alive(lan: Lan) -> set[str]:
    code = "import json, ray; ray.init('auto', log_to_driver=False, logging_level='ERROR'); "
    code += "print(json.dumps([n['NodeManagerHostname'] for n in ray.nodes() if n['Alive']]))"
    done = lan.ssh("head", f"source ~/.bashrc; python -c {code!r}")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_three_commands_on_three_hosts_of_which_one_dies(lan: Lan) -> None:
    desk(lan, "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
    desk(lan, "ray up cluster.yaml", answer="y\n")
    deadline = time.monotonic() + 180
    while alive(lan) != {"head", "w1", "w2"}:
        assert time.monotonic() < deadline, monitor(lan)

    # What is refused leaves nothing behind.
    token = refused(lan, "RAY_AUTH_MODE=disabled qfarm submit jobs/llama_matrix.yaml")
    assert token.startswith("error: cluster.yaml: the cluster refuses our token; RAY_AUTH_MODE is disabled")
    link = refused(lan, "ln -s nowhere broken; qfarm submit jobs/llama_matrix.yaml")
    assert "broken: a link to nowhere, which is not there" in link
    desk(lan, "rm broken")

    # A host loses its power in the middle of a cell; Ctrl-C, and the job goes on.
    line = lan.command("desk", "qfarm submit jobs/llama_matrix.yaml", terminal=True)
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None and client.stdout is not None
        said = []
        for text in client.stdout:
            said.append(text)
            if re.search(r"started +(?!baseline).* on \S+@w1", text):
                lan.cut_power("w1")
                # The driver stands still until a second submission has found it at work, however slow this machine is.
                assert lan.ssh("head", DRIVER.format(signal="STOP")).returncode == 0
                client.stdin.write("\x03")
                client.stdin.flush()
    output = "".join(said)
    assert client.returncode == 130 and "the job goes on; look at it with: qfarm status" in output, output
    assert f"cluster of cluster.yaml, head {ADDRESSES['head']}" in output

    again = refused(lan, "qfarm submit jobs/llama_matrix.yaml")
    name = re.search(r"at work there already, as (\S+) \(running\)", again)
    assert name, again
    assert lan.ssh("head", DRIVER.format(signal="CONT")).returncode == 0
    desk(lan, f"ray exec cluster.yaml 'ray job logs --follow {name[1]}'")
    status = desk(lan, "qfarm status").stdout
    assert f"{name[1]}: succeeded" in status and f"s3://rehearsal/results/llama: {CELLS} cells" in status, status

    # Submitted again, under the next name, it finds nothing to do.
    done = desk(lan, "qfarm submit jobs/llama_matrix.yaml")
    assert "nothing to run: every result is in the store" in done.stdout
    report = desk(lan, "qfarm report").stdout
    assert "gptq" in report and "baseline" in report

    query = "SELECT cell_id, outcome, node FROM attempts"
    rows = json.loads(desk(lan, f"qfarm query '{query}' --format json").stdout)
    finished = collections.Counter(row["cell_id"] for row in rows if row["outcome"] == "ok")
    assert len(finished) == CELLS and set(finished.values()) == {1}, rows
    lost = [row for row in rows if row["outcome"] != "ok"]
    assert lost and {(row["outcome"], row["node"]) for row in lost} == {("node_died", "w1")}, rows
    assert "the store is sound" in desk(lan, "qfarm store check").stdout

    # The hub's token was on every host, in memory: it is on no disk but the desk's, and not in the store.
    assert lan.ssh("w2", "cat $(source ~/.bashrc; echo $HF_TOKEN_PATH)").stdout == HUB_TOKEN
    for host in ("head", "w1", "w2"):
        for part in ("up", "home"):
            searched = subprocess.run(["grep", "-rlsI", HUB_TOKEN, str(lan.folder / host / part)], capture_output=True)
            assert searched.stdout == b""
    ended = refused(lan, "qfarm cancel")
    assert "has ended already (succeeded)" in ended
    desk(lan, "ray down cluster.yaml", answer="y\n")
    assert lan.ssh("head", "pgrep -f gcs_server").returncode == 1
