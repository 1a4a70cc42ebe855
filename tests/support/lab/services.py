"""The services of the lab: an S3 store and an MLflow server, real processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.lab.machines import SERVICES
from tests.support.ports import free_ports
from tests.support.postgres import postgres, postgres_binaries
from tests.support.registry_world import wait_for
from tests.support.s3_server import BUCKET, s3_server

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def services(folder: Path, tracking: str) -> Iterator[tuple[int, int]]:
    """Ports on 127.0.0.1 of the store, with one empty bucket, and of the MLflow server, which answers to `tracking` (host:port)."""
    with ExitStack() as stack:
        store = stack.enter_context(s3_server())
        database = f"sqlite:///{folder}/mlflow.db"
        if postgres_binaries():
            database = f"postgresql+psycopg2://mlflow:mlflow@127.0.0.1:{stack.enter_context(postgres('mlflow', 'mlflow', 'mlflow'))}/mlflow"
        port = stack.enter_context(mlflow_server(folder, database, store, tracking))
        yield int(store.rpartition(":")[2]), port


@contextmanager
def mlflow_server(folder: Path, database: str, store: str, tracking: str) -> Iterator[int]:
    [port], log = free_ports(1), folder / "mlflow.log"
    words = f"""-m mlflow server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri {database}
        --artifacts-destination s3://{BUCKET}/mlflow --allowed-hosts {tracking},{SERVICES},127.0.0.1:{port}"""
    given = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": store, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as out:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))} | given
        command = [sys.executable, *words.split()]
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
