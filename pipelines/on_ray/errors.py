"""The error behind an error of Ray: what a worker raised, without the traces that Ray wraps it in."""

from __future__ import annotations

import sys

DEEPEST = 8


def cause_of(error: Exception) -> Exception:
    """What a task, an actor or a training worker raised for the user, else the error itself.

    Of the workers of a training that failed the first error that says what to mend counts: the others only lost their peer.
    """
    if "ray" not in sys.modules:  # nothing has been asked of it, and it may not be installed
        return error
    import ray.exceptions

    for _ in range(DEEPEST):
        inner = _inner(error)
        if inner is None or inner is error:
            break
        error = inner
    born_dead = isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed
    if born_dead or isinstance(error, ray.exceptions.RayTaskError):  # the message is a trace: its last line is the error
        return RuntimeError(_last_line(str(error)))
    return error


def _inner(error: Exception) -> Exception | None:
    """One wrapping less; None where there is none."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        causes = [cause_of(failure) for failure in failures.values()]
        return next((cause for cause in causes if isinstance(cause, ValueError | OSError) or of_tracking(cause)), causes[0])
    for name in ("controller_failure", "cause", "_base_exc"):  # the last is Ray Train's, which has no other name for it
        found = getattr(error, name, None)
        if isinstance(found, Exception):
            return found
    return None


def of_tracking(error: Exception) -> bool:
    """Whether it is MLflow's, which is not imported for that."""
    return type(error).__name__ in ("MlflowException", "RestException") and type(error).__module__.startswith("mlflow")


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), text)
