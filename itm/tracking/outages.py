"""Tracking servers that go away: what was queued meanwhile is logged later, and the end of a run does not wait for them for ever.

MLflow itself makes a request again for about four minutes (MLFLOW_HTTP_REQUEST_MAX_RETRIES), metrics in a thread of their own.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import mlflow
from mlflow import MlflowClient

from itm.data.patience import ASKED
from itm.tracking.addresses import is_alive, shown, tracking_uri
from itm.tracking.lineage import plain_name

LAST_FLUSH = 30.0
"""Seconds for the queued metrics of a run that has failed."""


class Run(Protocol):
    """What is asked of a `Tracker` here."""

    run_id: str
    uri: str
    pending: Any

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...

    def flush(self) -> None: ...


def fill(run: Run, rows: Sequence[Mapping[str, float]], prefix: str = "") -> int:
    """Log the rows (`step`, `loss` and other values by name) whose step the run does not have; returns how many.

    They were queued by a process that ended before the server took them.
    """
    if not rows:
        return 0
    known = {int(point.step) for point in MlflowClient(run.uri).get_metric_history(run.run_id, plain_name(f"{prefix}loss"))}
    lost = [row for row in rows if row["step"] not in known]
    for row in lost:
        run.metrics({f"{prefix}{name}": value for name, value in row.items() if name != "step"}, step=int(row["step"]))
    return len(lost)


def sentence(said: str) -> str:
    """One sentence of an error of MLflow, with the remedy where it is known."""
    where = f"the tracking server at {shown(tracking_uri())}"
    if re.search(r"not in a valid JSON format|Expecting value: ", said):
        return (
            f"{where} gives an answer that MLflow does not understand, as the page of a login or of another service is: set "
            "MLFLOW_TRACKING_URI to an MLflow server, or MLFLOW_TRACKING_TOKEN (or _USERNAME and _PASSWORD) to be let in; what was "
            "finished is kept"
        )
    if re.search(r"out-of-date database schema|Can't locate revision", said):
        return (
            f"{where} has the tables of another version of MLflow than {mlflow.__version__}: keep a copy of the database and run "
            "`mlflow db upgrade` on it, or install the version that wrote it"
        )
    if re.search(r"Max retries exceeded|Connection refused|timed out|Connection aborted|failed with error code 50[234]", said):
        return f"{where} does not answer any more; what was finished is kept: run the stage again when it is back, it resumes"
    return f"{where} says: {' '.join(said.split())[:300]}"


def note_waits(run: Run) -> None:
    """The tag `store` of a run whose stage had to ask a store again: how often, and how long that took."""
    if said := str(ASKED):
        MlflowClient(run.uri).set_tag(run.run_id, "store", said)


def told_at_last(run: Run) -> bool:
    """Whether the server takes the end of a run that has failed; its queued metrics get half a minute, and none of their errors hides
    the failure."""
    if not is_alive(run.uri):
        print(f"{shown(run.uri)} does not answer: how run {run.run_id} ended is not recorded", file=sys.stderr)
        return False

    def flush() -> None:
        with suppress(Exception):
            run.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(LAST_FLUSH)
    run.pending.clear()
    return True
