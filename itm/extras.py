"""What the distribution installs only on demand, and the error that names the way to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTION = "itm-pipeline"
EXTRAS = {  # extra -> packages
    "tracking": ("mlflow", "psutil"),
    "pipeline": ("ray", "mlflow", "psutil"),
    "s3": ("boto3",),
    "hf": ("datasets",),
    "lora": ("peft",),
    "tensorboard": ("tensorboardX",),
    "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client", "grpc_reflection"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "faiss": ("faiss",),
}


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed; the message holds the pip line."""


@contextmanager
def needed_by(who: str, extra: str) -> Iterator[None]:
    """In this block an import of a package that an extra brings, and that is not there, raises MissingExtra.

    extra: the one that brings all that `who` usually needs; it is named where it has the package, else the first that has it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        having = [name for name in (extra, *EXTRAS) if package in EXTRAS[name]]
        if isinstance(error, MissingExtra) or not having:
            raise
        raise MissingExtra(f"{who} needs {package}: pip install '{DISTRIBUTION}[{having[0]}]'", name=error.name) from error
