"""How a stage ends before its time: by Ctrl-C or SIGTERM, or by an error. One line or a few on stderr, and the exit code.

Ctrl-C and SIGTERM: what is kept and the command that goes on, exit code 130. What the user can mend (ValueError, OSError, a missing extra):
the message, exit code 2. Anything else: its type, its message and where it arose, exit code 1; the way there only with --traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from itm.extras import MissingExtra

STOPPED, MENDABLE, FAULT = 130, 2, 1
LINES, CHARACTERS = 6, 1200  # of a message that nobody wrote for the user
ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does: batch systems and `ray job stop` send it. In another thread than the main one, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    """As Ctrl-C, whoever has taken it over. A command that a script starts in the background has Ctrl-C ignored, but not this."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def stopped(stage: str, module: ModuleType | None, args: argparse.Namespace | None, argv: Sequence[str]) -> str:
    """The line of a stage that was stopped: what is kept, from the stage's own `kept(args)` where it has one, and how to go on."""
    if "ray" in sys.modules:  # its workers end first: what they finish meanwhile is counted
        import ray

        with suppress(Exception):
            ray.shutdown()
    what = "nothing was begun" if args is None else "what it had finished is kept"
    if args is not None and module is not None and hasattr(module, "kept"):
        with suppress(Exception):  # a place that cannot be read any more is no reason for a trace
            what = module.kept(args)
    again = shlex.join(["itm", stage, *(word for word in argv if word != "--overwrite")])
    return f"itm {stage}: stopped; {what}. To go on: {again}"


def failed(stage: str, error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code. An error of a worker on Ray is told as if it had arisen here."""
    error = _cause(error)
    if isinstance(error, MissingExtra):
        return str(error), MENDABLE
    if isinstance(error, json.JSONDecodeError) and _is_of(error, "mlflow"):
        from itm.tracking.outages import sentence

        return f"itm {stage}: {sentence(str(error))}", MENDABLE
    if isinstance(error, json.JSONDecodeError):
        return f"itm {stage}: a file holds no JSON: {error}{_place(error)}; --traceback shows the way there", MENDABLE
    if isinstance(error, ValueError | OSError):
        return f"itm {stage}: {error}", MENDABLE
    if type(error).__module__.startswith("mlflow"):
        from itm.tracking.outages import sentence

        return f"itm {stage}: {sentence(str(error))}", MENDABLE
    return f"itm {stage}: {type(error).__name__}: {_short(str(error))}{_place(error)}; --traceback shows the way there", FAULT


def traced() -> bool:
    """Whether errors are to be shown as Python shows them: --traceback, or ITM_TRACEBACK in the environment."""
    return bool(os.environ.get("ITM_TRACEBACK"))


def _cause(error: Exception) -> Exception:
    if "ray" not in sys.modules:
        return error
    from pipelines.on_ray.errors import cause_of

    return cause_of(error)


def _short(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # Ray's messages come in colours
    lines = [line for line in text[:CHARACTERS].splitlines() if line.strip()]
    return "\n".join(lines[:LINES]) + (" ..." if len(lines) > LINES or len(text) > CHARACTERS else "")


def _is_of(error: Exception, package: str) -> bool:
    """Whether an error arose in a function of an installed package, or below it."""
    return any(package in Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__))


def _place(error: Exception) -> str:
    """The innermost line of this project, ' (pipelines/train.py:12)'; '' where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.name != "stage_main" and (path.is_relative_to(ROOT / "itm") or path.is_relative_to(ROOT / "pipelines")):
            return f" ({path.relative_to(ROOT)}:{frame.lineno})"
    return ""
