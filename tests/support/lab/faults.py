"""What befalls a lab while a stage runs on it, and how it is undone. Each fault is named, and happens at a moment that is drawn.

A wrong clock is not among them: namespaces shift no wall clock, and under libfaketime 0.9.10 `time.sleep` of Python 3.11 fails.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil

from tests.support.lab.cluster import Lab
from tests.support.lab.machines import Machine
from tests.support.lab.proxy import Fault, Proxy

AWAY = 20.0  # seconds that a service, a cable or a disk is away
SLOWER = 10  # times that a straggler takes
Wait = Callable[[float], bool]
"""Waits so many seconds, or until the stage has ended, which it tells."""
LIES: tuple[Fault, ...] = ("slow", "busy", "reset", "half")


@dataclass(frozen=True)
class Blow:
    """kind: a key of `FAULTS`; stage, and share of its usual time after which it falls; worker: the number of the machine it may hit."""

    kind: str
    stage: str
    share: float
    worker: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def lose_node(lab: Lab, worker: int, wait: Wait) -> None:
    """A machine loses its power; an empty one takes its place a little later."""
    lab.workers[worker].lose()
    wait(2)
    lab.replace(worker)


def kill_driver(lab: Lab, worker: int, wait: Wait) -> None:
    while not (found := lab.head.processes("-m pipelines.")) and not wait(0.5):
        pass
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def cut_store(lab: Lab, worker: int, wait: Wait) -> None:
    _failing(lab.store, "cut", wait)


def cut_tracking(lab: Lab, worker: int, wait: Wait) -> None:
    _failing(lab.tracking, "cut", wait)


def cut_cable(lab: Lab, worker: int, wait: Wait) -> None:
    """Packets of a machine are lost for a while: neither it nor the others get an error."""
    machine = lab.workers[worker]
    machine.cut_off()
    wait(AWAY / 2)
    if machine.alive:
        machine.cut_off(False)


def fill_disk(lab: Lab, worker: int, wait: Wait) -> None:
    """Not a byte is left below /tmp of a machine, where downloads, spilled objects and the job's folder lie."""
    machine = lab.workers[worker]
    machine.run("dd if=/dev/zero of=/tmp/full bs=1M", check=False)
    wait(AWAY)
    if machine.alive:
        machine.run("rm -f /tmp/full", check=False)


def slow_down(lab: Lab, worker: int, wait: Wait) -> None:
    """All processes of a machine run a tenth of the time."""
    end = time.monotonic() + AWAY
    while time.monotonic() < end and not wait(0):
        stopped = lab.workers[worker].processes()
        for sent, seconds in ((signal.SIGSTOP, 0.1 * (SLOWER - 1)), (signal.SIGCONT, 0.1)):
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(sent)
            time.sleep(seconds)


def _lie(fault: Fault) -> Callable[[Lab, int, Wait], None]:
    def lie(lab: Lab, worker: int, wait: Wait) -> None:
        _failing(lab.store, fault, wait, every=1 if fault == "slow" else 3)

    return lie


FAULTS: dict[str, Callable[[Lab, int, Wait], None]] = {
    "node lost": lose_node,
    "driver killed": kill_driver,
    "store cut": cut_store,
    "tracking cut": cut_tracking,
    "cable out": cut_cable,
    "disk full": fill_disk,
    "straggler": slow_down,
    **{f"store {fault}": _lie(fault) for fault in LIES},
}


def drawn(seed: int, stages: tuple[str, ...], workers: int, kinds: list[str], most: int = 6) -> list[Blow]:
    """One to `most` blows on a walk, of different kinds."""
    chance = random.Random(seed)
    some = chance.sample(kinds, chance.randint(1, most))
    return [Blow(kind, chance.choice(stages), round(chance.uniform(0.15, 0.95), 2), chance.randrange(workers)) for kind in some]


def _failing(proxy: Proxy, fault: Fault, wait: Wait, every: int = 1) -> None:
    with proxy.failing(fault, every):
        wait(AWAY)


def tidy(machine: Machine) -> None:
    """Let everything on it go on."""
    for process in machine.processes():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
