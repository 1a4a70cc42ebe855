"""Machines on one machine: each has a network, mounts, processes and a hostname of its own (Linux namespaces; needs root).

A machine is the first process of its process namespace. When that is killed the kernel kills all others with it, as a loss of power
does, and its network and mounts go as well. All machines hang on a switch, a namespace too: nothing is added to this machine's network,
and when the process that made them dies, however it dies, nothing of them is left.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support import ROOT

SUBNET = "10.77.0"
SERVICES = f"{SUBNET}.1"
"""Where the machines find the services: an address of the switch, behind proxies."""
DISK = "300m"
CLONE_NEWNET = 0x40000000
NEEDED = ("unshare", "nsenter", "setpriv", "ip", "mount", "bash")

# Of the files of this machine it keeps the system and "$keep" (read-only). Orphans are adopted and buried by the first process.
BOOT = """set -e
hostname "$0"; ip link set lo up
mount -t tmpfs tmpfs /mnt
n=0; for path in $keep; do n=$((n + 1)); mkdir /mnt/$n; mount --bind "$path" /mnt/$n; done
for path in $hide; do [ -d "$path" ] && mount -t tmpfs -o size=$disk,mode=1777 tmpfs "$path"; done
n=0; for path in $keep; do n=$((n + 1)); mkdir -p "$path"; mount --bind -o ro /mnt/$n "$path"; umount /mnt/$n; done
umount /mnt; mkdir -p /tmp/own
echo ready
while :; do sleep 1000 & wait; done
"""
SWITCH = f"""set -e
hostname "$0"; ip link set lo up
ip link add lab0 type bridge; ip addr add {SERVICES}/24 dev lab0; ip link set lab0 up
echo ready
while :; do sleep 1000 & wait; done
"""


def missing() -> str:
    """Why there can be no such machines here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root"
    if lacking := [name for name in NEEDED if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)} (util-linux, iproute2)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "lab0", "type", "bridge"], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


def asked_for() -> str:
    """Why the long walks on the machines are not begun unasked; empty where they are asked for."""
    return "" if os.environ.get("ITM_LAB") else "a quarter of an hour each, so `make lab` asks for it"


def _hidden() -> list[str]:
    """Folders that no machine shares with this one: the checkouts above all, so that code arrives as it would on another machine."""
    found = [Path("/tmp"), Path("/dev/shm"), Path.home(), ROOT]
    if (beside := Path(sys.prefix).parent).joinpath("pyproject.toml").exists():  # the checkout of an editable installation
        found.append(beside)
    return [str(path) for path in found if not any(path != other and path.is_relative_to(other) for other in found)]


@dataclass
class Machine:
    """A running machine. seen: folders of this machine that it sees as well, read-only, beside Python and what is installed in it."""

    name: str
    address: str
    switch: Machine | None = None
    seen: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    disk: str = DISK

    def __post_init__(self) -> None:
        keep = [str(path) for path in (*dict.fromkeys((sys.base_prefix, sys.prefix)), *self.seen)]
        words = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        told = {"keep": " ".join(keep), "hide": " ".join(_hidden()), "disk": self.disk, "PATH": os.environ["PATH"]}
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words, "bash", "-c", BOOT if self.switch else SWITCH, self.name],
            env=told,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            raise OSError(f"{self.name} did not start: {self.process.communicate()[1].decode()}")
        [first] = psutil.Process(self.process.pid).children()
        self.pid = first.pid
        if self.switch:
            self._plug_in(self.switch.pid)

    def _plug_in(self, switch: int) -> None:
        plug = f"v{self.address.rpartition('.')[2]}"
        _run(f"nsenter -t {switch} -n ip link add {plug} type veth peer name eth0 netns {self.pid}")
        _run(f"nsenter -t {switch} -n ip link set {plug} master lab0 up")
        _run(f"nsenter -t {self.pid} -n ip addr add {self.address}/24 dev eth0")
        _run(f"nsenter -t {self.pid} -n ip link set eth0 up")

    def cut_off(self, off: bool = True) -> None:
        """Pull out the network cable, or put it in again: what it sends meanwhile is lost, without an error."""
        assert self.switch is not None
        plug = f"v{self.address.rpartition('.')[2]}"
        _run(f"nsenter -t {self.switch.pid} -n ip link set {plug} {'down' if off else 'up'}")

    def traffic(self) -> tuple[int, int]:
        """Bytes that it has received and sent."""
        counted = next(line for line in self.run("cat /proc/net/dev").splitlines() if "eth0:" in line).partition(":")[2].split()
        return int(counted[0]), int(counted[8])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def start(self, command: str | Sequence[str], log: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in its folder /tmp/own. It sees the machine's environment, none of this process."""
        words = shlex.split(command) if isinstance(command, str) else list(command)
        given = {"PATH": f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp/own", "TMPDIR": "/tmp"}
        given |= {**self.environment, **environment}
        where = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", "--pid"]
        out = log.open("ab") if log else subprocess.PIPE
        try:
            return subprocess.Popen(
                [*where, "env", "--chdir=/tmp/own", "-i", *(f"{name}={value}" for name, value in given.items()), *words],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out if log else subprocess.STDOUT,
            )
        finally:
            if log:
                out.close()  # type: ignore[union-attr]

    def run(self, command: str | Sequence[str], *, given: bytes = b"", check: bool = True, **environment: str) -> str:
        """What the command printed. Raises AssertionError when it fails."""
        process = self.start(command, None, **environment)
        said = process.communicate(given)[0].decode()
        assert not check or process.returncode == 0, f"{self.name}: {command} ended with {process.returncode}:\n{said[-4000:]}"
        return said

    def write(self, path: str, text: str) -> None:
        self.run(["tee", path], given=text.encode())

    def processes(self, words: str = "") -> list[psutil.Process]:
        """Its processes but the first whose command holds `words`, as this machine sees them. Not by descent: a command that was started
        on it is no child of its first process."""
        own, found = self._namespace(self.pid), []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, OSError):
                if process.pid != self.pid and self._namespace(process.pid) == own and words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    @staticmethod
    def _namespace(pid: int) -> str:
        return os.readlink(f"/proc/{pid}/ns/pid")

    def lose(self) -> None:
        """It loses its power."""
        self.process.kill()  # --kill-child passes it on to the first process
        self.process.communicate()


def listen(machine: Machine, port: int) -> socket.socket:
    """A socket that listens on the machine's address, for use by this process, which stays in its own network."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as own, open(f"/proc/{machine.pid}/ns/net") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            return socket.create_server((machine.address, port), backlog=128)
        finally:
            libc.setns(own.fileno(), CLONE_NEWNET)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
