"""The GPUs of a cluster: which are there, to how many it can grow, how they are asked for, and whether torch can use them.

Ray has no public call that tells to what a cluster can grow, so the cluster says it itself: the node label `itm/gpus` (of its head, as a
rule) is the number of GPUs that its autoscaler may start.
"""

from __future__ import annotations

import functools
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from itm.device import resolve_device
from pipelines.on_ray.errors import cause_of

LABEL = "itm/gpus"
PATIENCE, LINE, LOOK = 900.0, 60.0, 2.0
"""Seconds: how long GPUs are waited for, between two lines about it, and between two looks."""
_missed = False  # GPUs have not come in time: this process waits for no more of them than it needs
FINEST = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Seats:
    """Places for actors: how many, the share of a GPU that each takes (0 = none), and the device that each computes on."""

    count: int
    gpus: float
    device: str


def gpus_there() -> int:
    """GPUs of the nodes that are there, free or not. `connect` comes first."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def most_gpus() -> int:
    """GPUs that the cluster has or can grow to."""
    import ray

    said = [node["Labels"].get(LABEL, "0") for node in ray.nodes() if node["Alive"]]
    if wrong := [value for value in said if not value.isdigit()]:
        raise ValueError(f"node label {LABEL}={wrong[0]}: it is the number of GPUs that the cluster can grow to, such as {LABEL}=8")
    return max(gpus_there(), *map(int, said))


def awaited(wanted: int, least: int = 1) -> int:
    """GPUs that are there, at most `wanted`. Those that the cluster has yet to start are asked for and waited for, with a line a minute.

    Raises ValueError when fewer than `least` are there after PATIENCE seconds.
    """
    global _missed
    from ray.autoscaler.sdk import request_resources

    wished = least if _missed else wanted
    began, said, asked = time.monotonic(), -LINE, False
    try:
        while (there := gpus_there()) < wished and (waited := time.monotonic() - began) < PATIENCE:
            request_resources(bundles=[{"GPU": 1}] * wanted)  # each time: a request of another job takes its place
            asked = True
            if waited - said >= LINE:
                print(f"waiting for {wanted} GPUs that the cluster can grow to, {there} are there ({waited:.0f} s)", flush=True)
                said = waited
            time.sleep(LOOK)
    finally:
        if asked:
            request_resources(bundles=[])
    if there < least:
        raise ValueError(
            f"asked for {wanted} GPUs, {there} are there after {PATIENCE:.0f} s, although the node label {LABEL} promises "
            f"{most_gpus()}: `ray status` says what the autoscaler waits for; correct the label where it promises too much"
        )
    if there < wished:
        _missed = True
        print(f"going on with {there} of {wanted} GPUs: the others have not come in {PATIENCE:.0f} s", flush=True)
    return min(there, wanted)


def gpu_seats(actors: int | None, jobs: int, cpus: float) -> Seats | None:
    """Seats for up to `jobs` actors, each with `cpus` and a GPU or an equal share of one; None in a cluster that cannot have GPUs.

    actors: how many were asked for, unset = one for each GPU that the cluster can grow to. Fewer start where that many equal shares do
    not fit, which is printed. Where torch cannot use the GPUs it warns, and they compute on CPUs.
    Raises ValueError when no node has room for one actor, and as `awaited`.
    """
    if not (most := most_gpus()) or not jobs:
        return None
    wanted = min(actors or most, jobs)
    there = awaited(min(wanted, most))
    together = min(max(1, wanted // there), FINEST)
    count = min(wanted, _room(together, cpus))
    if not count:
        raise ValueError(
            f"an actor needs {cpus:g} CPUs beside its GPU, and no node with a GPU has them: "
            "give such nodes CPUs (`ray start --num-cpus`, or the CPU request of the GPU group)"
        )
    if count < wanted:
        share = "a GPU each" if together == 1 else f"{together} to a GPU"
        print(f"{wanted} actors asked for, {count} start: {share}, and the cluster has {gpus_there()} GPUs", flush=True)
    return Seats(count, FINEST // together / FINEST, "cuda" if _can_cuda() else "cpu")


def _room(together: int, cpus: float) -> int:
    """How many actors the nodes have room for, `together` to a GPU: an actor takes its CPUs where its GPU is."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get("GPU", 0)) * together, int(node.get("CPU", 0) / cpus)) for node in nodes)


def why_no_cuda() -> str | None:
    """Why torch cannot use the cluster's GPUs; None where it can. A worker that holds one is asked, as the driver may have none."""
    if not os.environ.get("RAY_ADDRESS"):
        return _reason()  # a local session: its workers are what this process is
    import ray

    job = ray.get_runtime_context()
    return _reason_of_worker(job.gcs_address, job.get_job_id())


@functools.cache
def _reason_of_worker(cluster: str, job: str) -> str | None:
    """Asked once a job of Ray, which these two name."""
    why: str | None = _on_worker(_reason, gpus=0.01)
    return why


def _reason() -> str | None:
    try:
        resolve_device("cuda")
    except ValueError as error:
        return f"on {socket.gethostname()}, {error}"
    return None


def _can_cuda() -> bool:
    """Warns where not."""
    if why := why_no_cuda():
        warnings.warn(f"computing on CPUs, although the cluster names {gpus_there()} GPUs: {why}", stacklevel=3)
    return not why


def at_gpu(function: Callable[..., Any], *given: Any) -> Any:
    """`function(*given)` on a worker that holds a GPU, which is asked for where there is none yet.

    Raises ValueError as `awaited`, and what the function raises.
    """
    awaited(1)
    _can_cuda()
    return _on_worker(function, *given, gpus=1)


def _on_worker(function: Callable[..., Any], *given: Any, gpus: float) -> Any:
    """Says once a minute while all GPUs are taken, or the work goes on."""
    import ray

    promise = ray.remote(num_cpus=0, num_gpus=gpus)(function).remote(*given)
    while not ray.wait([promise], timeout=LINE)[0]:
        print("waiting for a worker with a GPU, which is working or not free yet", flush=True)
    return fetched(promise)


def fetched(promise: Any) -> Any:
    """The value of a task. Its error is raised as the task raised it, without Ray's own around it."""
    import ray

    try:
        return ray.get(promise)
    except ray.exceptions.RayError as error:
        raise cause_of(error) from error


def gpus_elsewhere() -> bool:
    """Whether this process has no GPU, and the cluster that it belongs to has or can grow to some: what is heavy is computed there."""
    if not os.environ.get("RAY_ADDRESS") or resolve_device().type != "cpu":
        return False
    from pipelines.on_ray.session import connect

    connect()
    return most_gpus() > 0
