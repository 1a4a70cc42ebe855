"""A PostgreSQL server for tests, where one is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.ports import free_ports


def postgres_binaries() -> Path | None:
    """Where initdb, postgres and createdb lie together: Debian keeps them off the PATH."""
    on_path = [Path(found).resolve().parent] if (found := shutil.which("initdb")) else []
    for folder in (*on_path, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)):
        if (folder / "postgres").exists():
            return folder
    return None


@contextlib.contextmanager
def postgres(user: str, password: str, database: str) -> Iterator[int]:
    """The port of a server on 127.0.0.1 that lives as long as the context, with one empty database."""
    binaries, [port] = postgres_binaries(), free_ports(1)
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="itm-postgres-", dir="/tmp"))  # pytest's own folders are closed to the server's account
    secret = folder / "password"
    secret.write_text(password)
    account: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:  # it refuses to run as root
        account["user"] = "postgres"
        for path in (folder, secret):
            shutil.chown(path, "postgres")
    data, log = folder / "data", (folder / "log").open("wb")
    initdb = [binaries / "initdb", "--pgdata", data, "--username", user, "--pwfile", secret, "--auth", "scram-sha-256", "--no-sync"]
    try:
        subprocess.run([*initdb, "--encoding", "UTF8", "--locale", "C"], **account, stdout=log, stderr=log, check=True)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        server = subprocess.Popen([binaries / "postgres", "-D", data, *options], **account, stdout=log, stderr=log)
        try:
            create = [binaries / "createdb", "--host", "127.0.0.1", "--port", str(port), "--username", user, database]
            for _ in range(300):
                done = subprocess.run(create, env={"PGPASSWORD": password}, capture_output=True, check=False)
                if done.returncode == 0:
                    break
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            assert done.returncode == 0, done.stderr
            yield port
        finally:
            server.send_signal(signal.SIGINT)  # its fast shutdown
            server.wait(30)
    finally:
        log.close()
        shutil.rmtree(folder)
