"""Ports for the servers and process groups of tests."""

from __future__ import annotations

import random
import socket

BELOW = 32768
"""Where the system's own choice for outgoing connections begins: another test's connection would take a port that is chosen there between
the look and the server's start. Ray's workers have 10000 to 19999."""


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, drawn at random between Ray's workers and the system's own choice."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, BELOW), 1000):
        if len(found) == count:
            return found
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    raise OSError(f"no {count} free ports between 20000 and {BELOW}")
