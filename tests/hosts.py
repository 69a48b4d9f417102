"""Hosts made of namespaces: a network of our own with machines on it that have their own disk, processes and sshd.

A host is a network, mount, pid, ipc and uts namespace around an overlay of this machine's root, with sshd as its first
process. Killing that is a power cut; nothing outside sees the host's processes, so that `ray stop` on it is harmless.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

LAN, BRIDGE = "qf-lan", "10.77.0.1"
ADDRESSES = {"desk": "10.77.0.2", "head": "10.77.0.10", "w1": "10.77.0.11", "w2": "10.77.0.12"}
TOOLS = ("ip", "unshare", "rsync", "ssh", "ssh-keygen")
SSHD = Path("/usr/sbin/sshd")
BOOT_S = 60.0

# $1 name, $2 the host's disk, $3 the public key, $4 what is shared with it, then folders that it sees as they are here.
INIT = r"""
set -e
name=$1 disk=$2 key=$3 shared=$4 root=$2/root; shift 4
mkdir -p "$disk/up" "$disk/work" "$disk/home/.ssh" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$disk/up,workdir=$disk/work" "$root"
mount -t proc proc "$root/proc"; mount --rbind /sys "$root/sys"; mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=512m,mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o size=1g,mode=1777 tmp "$root/tmp"
mount -t tmpfs -o mode=755 run "$root/run"; mkdir -p "$root/run/sshd" "$root/srv/shared"
# An empty home: the machine's own holds tokens that change what Ray does.
chmod 700 "$disk/home" "$disk/home/.ssh"; cp "$key" "$disk/home/.ssh/authorized_keys"
mount --bind "$disk/home" "$root/root"
for folder in "$@"; do
  mkdir -p "$root$folder"; mount --bind "$folder" "$root$folder"; mount -o remount,bind,ro "$root$folder"
done
mount --bind "$shared" "$root/srv/shared"; mount -o remount,bind,ro "$root/srv/shared"
hostname "$name"; cp "$shared/hosts" "$root/etc/hosts"
rm -f "$root"/etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f "$root/etc/ssh/ssh_host_ed25519_key"
printf '%s\n' 'PasswordAuthentication no' 'UsePAM no' 'PermitRootLogin prohibit-password' 'AcceptEnv nothing' \
  'HostKey /etc/ssh/ssh_host_ed25519_key' 'Subsystem sftp internal-sftp' > "$root/etc/ssh/sshd_config"
exec chroot "$root" /usr/sbin/sshd -D -e
"""


def missing() -> str | None:
    """Why there can be no such hosts here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "namespaces as hosts need root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None] + ([] if SSHD.is_file() else ["sshd"])
    if lacking:
        return f"not installed: {', '.join(lacking)} (iproute2, openssh-server, openssh-client, rsync)"
    tried = subprocess.run(["unshare", "-m", "-n", "-p", "-u", "-i", "--fork", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"no namespaces here: {tried.stderr.strip()}"
    return None


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=120)


class Lan:
    """The network, its hosts and a folder `shared` that all see at /srv/shared."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shared, self.key = folder, folder / "shared", folder / "key"
        self.shared.mkdir()
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (self.shared / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        self._first: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Lan:
        run("ip", "netns", "add", LAN)
        for command in (
            "link set lo up",
            "link add br0 type bridge",
            f"addr add {BRIDGE}/24 dev br0",
            "link set br0 up",
        ):
            run("ip", "-n", LAN, *command.split())
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._first):
            self.cut_power(name)
        for name in ADDRESSES:
            run("umount", "-l", str(self.folder / name), check=False)
            run("ip", "netns", "del", f"qf-{name}", check=False)
        run("ip", "netns", "del", LAN, check=False)

    def boot(self, name: str) -> None:
        """A new machine at its address, and its sshd answers."""
        space, disk = f"qf-{name}", self.folder / name
        run("ip", "netns", "add", space)
        run("ip", "link", "add", f"v-{name}", "netns", LAN, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "-n", LAN, "link", "set", f"v-{name}", "master", "br0", "up")
        run("ip", "-n", space, "link", "set", "lo", "up")
        run("ip", "-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        disk.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=1500m,mode=755", space, str(disk))
        script = self.folder / "init.sh"
        script.write_text(INIT)
        # What a host's own /tmp or home would hide; a link is seen by its name and where it leads.
        here = [Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix)]
        seen = sorted({str(path) for path in here} - {"/usr", "/usr/local"})
        unshare = "unshare -m -p -u -i --fork --kill-child --propagation private bash".split()
        arguments = [str(script), name, str(disk), f"{self.key}.pub", str(self.shared), *seen]
        with open(self.folder / f"{name}.log", "wb") as log:
            self._first[name] = subprocess.Popen(
                ["ip", "netns", "exec", space, *unshare, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + BOOT_S
        while self.ssh(name, "true").returncode:
            if self._first[name].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not boot: {(self.folder / f'{name}.log').read_text()}")
            time.sleep(0.1)

    def cut_power(self, name: str) -> None:
        """All processes of the host are gone at once; its disk stays."""
        first = self._first.pop(name)
        first.kill()
        first.wait()

    def command(self, name: str, words: str, *, terminal: bool = False) -> list[str]:
        """What runs a line in a login shell of a host."""
        options = [
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ConnectTimeout=2",
        ]
        ssh = ["ssh", *(["-tt"] if terminal else []), "-i", str(self.key), *(f"-o{one}" for one in options)]
        inside = f"bash -c {shlex.quote(f'source ~/.profile 2>/dev/null; {words}')}"
        return ["ip", "netns", "exec", LAN, *ssh, f"root@{ADDRESSES[name]}", inside]

    def ssh(self, name: str, words: str, *, answer: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, words, terminal=bool(answer)),
            input=answer,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @contextlib.contextmanager
    def serving(self, command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """A server of our own on the bridge's address."""
        with subprocess.Popen(
            ["ip", "netns", "exec", LAN, *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as server:
            try:
                yield server
            finally:
                server.send_signal(signal.SIGKILL)
