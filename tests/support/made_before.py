"""What version 0.1.0 left on disk (`tests.support.record_formats` says how), unpacked where a test may use it up."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

from tests.support import ROOT

WRITTEN = ROOT / "tests" / "fixtures" / "v0_1_0"


def recorded() -> dict[str, Any]:
    """Names, shapes, keys and bytes as they were."""
    return json.loads((WRITTEN / "formats.json").read_text())


def unpack(root: Path, *names: str) -> Path:
    """`matchers`, `registry`, `runs` and `shards`, or those named, and recipe.yaml below `root`."""
    shutil.copy(WRITTEN / "recipe.yaml", root)
    for name in names or ("matchers", "registry", "runs", "shards"):
        with tarfile.open(WRITTEN / f"{name}.tar.gz") as tar:
            tar.extractall(root / name, filter="data")
    return root


def move_here(root: Path) -> None:
    """The runs and the registry below `root` name it where they name the folder in which they were written."""
    started = json.loads((root / "runs" / "whole" / "started.json").read_text())
    before = started["tracking_uri"].removeprefix("sqlite:///").removesuffix("/registry/mlflow.db")
    for path in (root / "runs").glob("*/*.json"):
        path.write_text(path.read_text().replace(before, str(root)))
    with contextlib.closing(sqlite3.connect(root / "registry" / "mlflow.db")) as database, database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(table, row[1]) for table in tables for row in database.execute(f'PRAGMA table_info("{table}")')]
        for table, column in columns:
            change = f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)'
            database.execute(change, (before, str(root), before))
