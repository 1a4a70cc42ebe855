"""What a run says about its origin: the code, the data, the machine, and names and texts that fit a tracking server."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from itm.environment import environment
from itm.kinds import origins

LONGEST_PARAM = 6000  # characters; MLflow's limits
LONGEST_TAG = 8000
LONGEST_NAME = 250


@dataclass(frozen=True)
class DatasetRef:
    """What a run read: a name, the manifest fingerprint and where it lies."""

    name: str
    digest: str
    source: str
    context: str = "training"


def packages_used(choices: Mapping[str, object]) -> dict[str, str]:
    """The tag `packages`: import path, version and source hash of each part of a user's own package that a recipe names and that is loaded.

    {} where there is none.
    """
    found = "; ".join(f"{path} of {origin}" for path, origin in origins(choices).items())
    return {"packages": found} if found else {}


def whole_environment() -> dict[str, object]:
    """As `environment`; the command, the host, and the version of every distribution installed here."""
    packages = {(part.metadata["Name"] or "").lower(): part.version for part in importlib.metadata.distributions()}
    return environment() | {"host": platform.node(), "command": " ".join(sys.argv), "packages": dict(sorted(packages.items()))}


def git_commit() -> str:
    """The commit of the code: ITM_GIT_COMMIT (set for jobs, whose copy has no .git), else asked of git, else ''."""
    given = os.environ.get("ITM_GIT_COMMIT")
    if given is not None:
        return given
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def plain_name(name: str) -> str:
    """`name` with only the characters and the length that a tracking server takes; what is cut is kept as a digest."""
    name = re.sub(r"[^\w\-. /:]", "_", name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def shorten(text: str, longest: int) -> str:
    """Cut with a digest of the whole, so that two long values that differ still differ."""
    if len(text) <= longest:
        return text
    tail = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
    return text[: longest - len(tail)] + tail


def texts(values: Mapping[str, object]) -> dict[str, str]:
    """Tags: plain names, texts that fit, nothing for a missing value."""
    return {plain_name(name): shorten(str(value), LONGEST_TAG) for name, value in values.items() if value not in (None, "")}
