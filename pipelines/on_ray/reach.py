"""Whether every node of a cluster sees the same folder: a token that the driver writes, read by a task on each node.

Without that check a path of one machine scatters a run: the manifest on the head, shards on two workers, weights on a third.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from itm.data import files
from itm.data.patience import ASKED

TOKEN = ".itm-reach"
SECONDS = 120.0  # that a node may take to start the process that looks


Tokens = tuple[tuple[str, str], ...]
"""(key, path) of what every node must see."""


@contextmanager
def shared(places: Mapping[str, str], read: Mapping[str, str] | None = None) -> Iterator[Tokens]:
    """Around work on several nodes in the folders `places` (key of the recipe -> path or URI), a token in each; `read` are files and
    folders that are only looked for.

    Yields what `confirm` looks for on nodes that join later. Raises ValueError naming the key, the path and the nodes that do not see it.
    One node, and URIs of stores, need no look.
    """
    import ray

    from pipelines.on_ray.session import connect

    connect()
    if not os.environ.get("RAY_ADDRESS") and len(ray.nodes()) == 1:  # a session of this process: no other node can join
        yield ()
        return
    local = {key: files.absolute(place) for key, place in places.items() if not files.is_remote(place)}
    tokens: list[tuple[str, str]] = [(key, path) for key, place in (read or {}).items() if os.path.exists(path := files.absolute(place))]
    put: list[str] = []
    try:
        for key, folder in local.items():
            put.append(_put(folder))
            tokens.append((key, put[-1]))
        _look(tuple(tokens))
        yield tuple(tokens)
    finally:
        for token in put:
            with suppress(OSError):
                os.remove(token)


def _look(tokens: Tokens) -> None:
    """By a task on each node. Raises ValueError."""
    import ray

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    blind = _blind(nodes, [path for _, path in tokens]) if tokens and len(nodes) > 1 else {}
    for key, path in tokens:
        if lost := sorted(nodes[node] for node, missing in blind.items() if path in missing):
            raise ValueError(not_shared(key, path, ", ".join(lost)))


def confirm(tokens: Tokens) -> None:
    """On a worker, also on a node that joined after the look: raises ValueError when it does not see what the driver sees."""
    for key, path in tokens:
        if not os.path.exists(path):
            raise ValueError(not_shared(key, path, socket.gethostname()))


def confirmed(tokens: Tokens, work: Callable[..., Any], *given: Any) -> Any:
    """`work(*given)` on a node that sees what the driver sees."""
    confirm(tokens)
    return work(*given)


def counted(tokens: Tokens, work: Callable[..., Any], *given: Any) -> tuple[Any, int, float]:
    """As `confirmed`; besides, how often a store was asked again in it, and the seconds that passed: the driver adds them up."""
    again, waited = ASKED.again, ASKED.waited
    found = confirmed(tokens, work, *given)
    return found, ASKED.again - again, ASKED.waited - waited


def not_shared(key: str, path: str, nodes: str) -> str:
    place = Path(path).parent if TOKEN in path.rpartition("/")[2] else path
    return (
        f"{key}={place} is not shared: what the driver sees there is not there on {nodes}. "
        f"Say {key}=s3://bucket/..., or mount the same folder on every node"
    )


def _put(folder: str) -> str:
    """Raises OSError naming the folder."""
    token = files.join(folder, f"{files.temporary(TOKEN)}")
    files.write_atomic(token, uuid.uuid4().hex.encode())
    return token


def _blind(nodes: Mapping[str, str], tokens: list[str]) -> dict[str, list[str]]:
    """Node -> tokens that it does not see. A node that dies meanwhile, or answers not in time, is not asked again."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(missing)
    asked = {look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(tokens): node for node in nodes}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS)
    found = {}
    for promise in done:
        with suppress(ray.exceptions.RayError):
            found[asked[promise]] = ray.get(promise)
    return found


def missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]
