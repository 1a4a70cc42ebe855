"""What the distribution installs only on demand, and the error that names the way to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTION = "itm-pipeline"
EXTRAS = {"ray": "pipeline", "mlflow": "tracking", "boto3": "s3"}  # package -> extra


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed; the message holds the pip line."""


@contextmanager
def needed_by(who: str) -> Iterator[None]:
    """In this block an import of a package that an extra brings, and that is not there, raises MissingExtra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingExtra) or package not in EXTRAS:
            raise
        line = f"{who} needs {package}: pip install '{DISTRIBUTION}[{EXTRAS[package]}]'"
        raise MissingExtra(line, name=error.name) from error
