"""A user's package on the module path, and one that is made up on the spot (a pytest plugin: `pytest_plugins = [...]`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDER = ROOT / "tests" / "own_parts"


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the package `acme` of tests/own_parts, importable."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return FOLDER / "acme"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`package(name, source, version)` writes a one-module package, as pip would install it where a version is given."""
    place, made = tmp_path / "site", []
    monkeypatch.syspath_prepend(str(place))

    def write(name: str, source: str, version: str = "") -> Path:
        made.append(name)
        folder = place / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        if version:
            about = place / f"{name}_parts-{version}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-parts\nVersion: {version}\n")
            (about / "RECORD").write_text(f"{name}/__init__.py,,\n{about.name}/METADATA,,\n")
        return folder

    yield write
    for module in [module for module in sys.modules if module.partition(".")[0] in made]:
        del sys.modules[module]
