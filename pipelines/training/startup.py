"""Where the seconds go between the command and the first step of a training: a line that is shown when that step is done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class StartUp:
    """The parts of a start in their order, in seconds. began: when the process started, by the clock of `time.time`.

    It goes from the driver to the worker. Where their clocks differ, the part that lies between the two, `workers`, is off by as much.
    """

    began: float = field(default_factory=time.time)
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls) -> StartUp:
        """From when the process started."""
        import psutil

        return cls(psutil.Process().create_time())

    def reached(self, part: str) -> None:
        """The part that began where the last one ended is over. A part of a moment more is added to it."""
        self.parts[part] = self.parts.get(part, 0.0) + max(0.0, time.time() - self.began - self.seconds)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"first step after {self.seconds:.1f} s: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
