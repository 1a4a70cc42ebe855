"""Which process drives a run: a driver that was killed cannot end its run, so whoever sees the run next does."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

DRIVER, ENDED = "driver", "ended"  # tags
_NEWEST = 200  # running runs of an experiment that are looked at


def mark() -> str:
    """This process, as the tag `driver` has it: host, process id and the second of its start (ids are used again)."""
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"


def is_dead(run: Run) -> bool:
    """Whether a run is said to be running by a driver of this machine that is gone. Of other machines nothing is known."""
    host, _, process = run.data.tags.get(DRIVER, "").rpartition(" ")[0].rpartition(" ")
    if run.info.status != "RUNNING" or host != socket.gethostname():
        return False
    return _started(int(process)) != int(run.data.tags[DRIVER].rpartition(" ")[2])


def close_dead(door: MlflowClient, experiment_id: str) -> list[str]:
    """End the runs of an experiment whose driver is dead: KILLED, with the tag `ended`. Returns their ids."""
    found: Any = door.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=_NEWEST)
    dead = [run for run in found if is_dead(run)]
    for run in dead:
        door.set_tag(run.info.run_id, ENDED, f"its driver ({run.data.tags[DRIVER]}) died without a word; seen later")
        door.set_terminated(run.info.run_id, "KILLED")
    return [str(run.info.run_id) for run in dead]


def _started(process: int) -> int:
    """Second of the start of a process, -1 for one that is gone."""
    try:
        found = psutil.Process(process)
        return -1 if found.status() == psutil.STATUS_ZOMBIE else int(found.create_time())
    except psutil.NoSuchProcess:
        return -1
