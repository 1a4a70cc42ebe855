"""A Slurm of two nodes on this machine: controller, two node daemons and munge with keys and sockets of their own, as root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")


def why_not() -> str | None:
    """Why it cannot run here; None where it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} are not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "its daemons need root"


@contextmanager
def two_nodes(cpus: int = 2) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` finds it. Only what was started here is ended."""
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # paths of sockets must stay short
    host, (controller, *nodes) = socket.gethostname(), free_ports(3)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(f"""
ClusterName=itm
SlurmctldHost={host}
SlurmctldAddr=127.0.0.1
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldPort={controller}
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ReturnToService=2
KillWait=30
NodeName=a,b NodeHostname={host} NodeAddr=127.0.0.1 Port={",".join(map(str, nodes))} CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    commands = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", name] for name in "ab"),
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}-{len(running)}.out").open("wb")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            log.close()
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _idle(environment) == 2, folder)
        yield environment
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _idle(environment: dict[str, str]) -> int:
    said = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=environment, capture_output=True, text=True, check=False).stdout
    return said.split().count("idle")


def _wait(ready: object, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():  # type: ignore[operator]
        logs = "\n".join(path.read_text(errors="replace")[-1000:] for path in folder.glob("*.[ol]*"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)
