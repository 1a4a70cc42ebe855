"""The site builds without a warning, and no page of it loads anything from another host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

HAVE = importlib.util.find_spec("mkdocs") is not None and importlib.util.find_spec("mkdocstrings_handlers") is not None
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]+src="((?:https?:)?//[^"]+)"|<link[^>]+href="((?:https?:)?//[^"]+)"[^>]*>""")
IN_STYLES = re.compile(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')]+)")


@pytest.mark.skipif(not HAVE, reason="SKIPPED: the site is NOT checked here; it needs the extra docs (`make docs` installs it)")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    assert {found for page in pages for pair in LOADED.findall(page.read_text()) for found in pair if found} == set()
    styles = list((tmp_path / "site").rglob("*.css"))
    assert {found for style in styles for found in IN_STYLES.findall(style.read_text())} == set()
