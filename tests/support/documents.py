"""The pages of the documentation as text: sections by heading, fenced blocks by language."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def section(page: str, heading: str) -> str:
    """The text below a heading of a page of docs/, up to the next heading of the same or a higher level.

    Raises AssertionError when the page has no such heading.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/{page} has no heading {heading!r}"
    return found[2]


def fenced(page: Path, language: str) -> list[str]:
    """The contents of the ```language blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of the console blocks of a page, and the lines of its indented blocks, that are commands of `itm`."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fenced(page, "console") for line in block.splitlines()]
    lines += [line for line in text.splitlines() if line.startswith("    ")]
    found = [re.split(r"\s+#|(?<=\S) {4,}", line)[0].strip() for line in lines]
    return [line for line in found if re.match(r"itm [a-z]", line) and "..." not in line and "<" not in line]
