"""One quiet Ray session per process: attach to RAY_ADDRESS, or start a local instance sized for this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from itm.kinds import local_packages

# Token auth and usage reports are for clusters that ask for them; worker niceness 15 would starve Ray on a busy machine.
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # an error line a pool about constructor arguments that this use cannot meet
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
STORE_BYTES = 512 << 20
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # what Ray adds to its folder
LONGEST_SOCKET = 107  # bytes of a socket's path; the limit of the system
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_sent: list[Path] | None = None  # the user's packages that the session of `connect` sends to its workers; None = no such session


def quiet() -> None:
    """Set the environment, before Ray and torch are imported; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def connect() -> None:
    """Idempotent. A local instance gets at least 4 logical CPUs: on fewer, actors and readers would wait for each other.

    Packages that parts were imported from by path, and that are not installed, travel to the workers. Ray sends them when a session
    starts: one of ours that started without them starts again; whoever started Ray himself has sent them himself.
    """
    global _sent
    quiet()
    import ray

    packages = local_packages()
    if ray.is_initialized() and _sent is not None and not set(packages) <= set(_sent):
        ray.shutdown()
    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)  # Ray puts one of its own in its place, which ends the process at once
        _sent = packages
        env: dict[str, Any] = {"runtime_env": {"py_modules": [str(package) for package in packages]}} if packages else {}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.WARNING, **env)
        else:
            cpus = max(4, os.cpu_count() or 1)
            # Worker output stays in Ray's log files: stages show their own progress and raise their workers' errors in the driver.
            silent: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
            make_sockets_short()
            ray.init(address="local", num_cpus=cpus, object_store_memory=STORE_BYTES, **silent, **env)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    set_up_data()


def make_sockets_short() -> None:
    """Have a local session keep its sockets where their paths fit, whatever TMPDIR is.

    Raises ValueError for a RAY_TMPDIR that is too long, and where no short folder can be written to.
    """
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    longest = LONGEST_SOCKET - len(SOCKET)
    if len(os.fsencode(os.path.abspath(chosen))) <= longest:
        return
    short = [folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)]
    if os.environ.get("RAY_TMPDIR") or not short:
        what = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        raise ValueError(f"{what}={chosen} is too long for the sockets of Ray: set RAY_TMPDIR to a folder of at most {longest} bytes")
    os.environ["RAY_TMPDIR"] = short[0]


@contextmanager
def interruptible() -> Iterator[None]:
    """Around `trainer.fit`: Ctrl-C raises KeyboardInterrupt, inside and after.

    Ray Train takes SIGINT for itself, to abort its workers; it then ends the process with exit code 0, and its handler stays behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def core() -> int:
    """Ray's CPUs (whole ones) of a task that keeps one core busy: a local session has more of them than a small machine has cores.

    More such tasks than cores would win nothing, and each process takes 2 to 5 CPU-seconds to start.
    """
    import ray

    alone = not os.environ.get("RAY_ADDRESS") and len(ray.nodes()) == 1
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // (os.cpu_count() or 1)) if alone else 1


def set_up_data() -> Any:
    """Ray Data's settings in this process, which is the driver or a trainer; returns its DataContext."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [Pause]  # type: ignore[list-item]  # by its four methods: their class would import Ray here
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


class Pause:
    """An execution callback of Ray Data.

    Its scheduling loop waits for running tasks only: when the consumer is the slower side there are none, and the loop spins on a whole
    core, with the interpreter lock of the trainer's process. With pauses of 30 ms it still handles any number of tasks each time round.
    """

    def before_execution_starts(self, executor: object) -> None: ...

    def on_execution_step(self, executor: object) -> None:
        time.sleep(0.03)

    def after_execution_succeeds(self, executor: object) -> None: ...

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...
