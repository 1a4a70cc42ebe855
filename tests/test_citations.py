"""Every citation of a page of documentation leads to a heading that exists, in sources, recipes, tests and between the pages themselves."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

OWN = Path(__file__).resolve()
ROOT = next(folder for folder in OWN.parents if (folder / "pyproject.toml").exists())
FOLDERS = ("itm", "pipelines", "cluster", "mlflow", "tests", "docs")
SUFFIXES = (".py", ".yaml", ".md")
CITATION = re.compile(r"(?<![\w/.])(docs/[\w/.-]+\.md)(?:#([\w-]+))?")
MARKDOWN_LINK = re.compile(r"\[[^\]]*\]\(([^()\s:]*?)(?:#([^()\s]*))?\)")
BY_NUMBER = re.compile(
    r"\bspec(?:s|ification)? \d|\b(?:scan|sgraf|uarda|iais|cusa|dual|data|unicom)\.md \d|\b(?:scan|sgraf|uarda|iais|cusa) section \d",
    re.IGNORECASE,
)


def pages_and_sources(root: Path) -> list[Path]:
    """All files that may cite, without this one, whose examples are wrong on purpose."""
    found = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(path for path in (*found, *root.glob("*.md")) if path.resolve() != OWN)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


def prose_of(page: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page outside fenced code."""
    fenced = False
    for number, line in lines_of(page):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def headings_of(page: Path) -> list[str]:
    return [found[1] for _, line in prose_of(page) if (found := re.match(r"#{1,6} +(.*?)\s*#*$", line))]


def github_slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def mkdocs_slug(heading: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors_of(page: Path) -> set[str]:
    """Anchors that a forge and a static site agree on: headings with the same slug by both rules, used once on the page."""
    slugs = Counter(map(github_slug, headings_of(page)))
    return {slug for heading in headings_of(page) if (slug := github_slug(heading)) == mkdocs_slug(heading) and slugs[slug] == 1}


def targets_of(path: Path, root: Path) -> Iterator[tuple[int, Path, str]]:
    """(line, cited file, anchor or "") of a file: `docs/<page>.md#anchor` anywhere, relative Markdown links on pages."""
    for number, line in lines_of(path):
        for page, anchor in CITATION.findall(line):
            yield number, root / page, anchor
    if path.suffix == ".md":
        for number, line in prose_of(path):
            for target, anchor in MARKDOWN_LINK.findall(re.sub(r"`[^`]*`", "", line)):
                yield number, path.parent / target if target else path, anchor


def dangling_citations(root: Path) -> list[str]:
    """`file:line: reason` of every citation whose page or anchor does not exist."""
    problems = set()
    for path in pages_and_sources(root):
        for number, cited, anchor in targets_of(path, root):
            where, name = f"{path.relative_to(root)}:{number}", os.path.relpath(cited, root)
            if not cited.exists():
                problems.add(f"{where}: there is no {name}")
            elif anchor and cited.suffix == ".md" and anchor not in anchors_of(cited):
                problems.add(f"{where}: {name} has no one heading #{anchor}")
    return sorted(problems)


def citations_by_number(root: Path) -> list[str]:
    """`file:line: text` of every section that is cited by its number, which nothing can follow."""
    lines = ((path, number, line) for path in pages_and_sources(root) for number, line in lines_of(path))
    return [f"{path.relative_to(root)}:{number}: {line.strip()}" for path, number, line in lines if BY_NUMBER.search(line)]


def repository(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_every_citation_in_the_repository_resolves():
    assert dangling_citations(ROOT) == []


def test_no_source_cites_a_section_by_number():
    assert citations_by_number(ROOT) == []


def test_every_method_page_is_cited_by_code_and_each_of_its_headings_is_an_anchor():
    pages = sorted((ROOT / "docs" / "methods").glob("*.md"))
    cited = {page for path in pages_and_sources(ROOT) if path.suffix == ".py" for _, page, _ in targets_of(path, ROOT)}
    assert [page.name for page in pages if page not in cited] == []
    assert [page.name for page in pages if len(anchors_of(page)) < len(headings_of(page))] == []


def test_a_wrong_page_a_wrong_anchor_and_a_wrong_link_are_each_named_with_file_and_line(tmp_path: Path):
    root = repository(
        tmp_path,
        {
            "docs/methods/scan.md": "# SCAN\n\n## Loss\n\nSee [loss](#loss), [gone](#gone), [other](other.md#x), `[code](no.md)`.\n",
            "README.md": "[Fine](docs/methods/scan.md#loss), [elsewhere](https://example.org/docs/no.md).\n",
            "itm/a.py": '"""Good: docs/methods/scan.md#loss."""\n\n# bad: docs/methods/scan.md#losses\n',
            "pipelines/recipes/r.yaml": "# docs/methods/sgraf.md#loss\n",
        },
    )
    assert dangling_citations(root) == [
        "docs/methods/scan.md:5: docs/methods/scan.md has no one heading #gone",
        "docs/methods/scan.md:5: there is no docs/methods/other.md",
        "itm/a.py:3: docs/methods/scan.md has no one heading #losses",
        "pipelines/recipes/r.yaml:1: there is no docs/methods/sgraf.md",
    ]


def test_a_heading_in_code_or_used_twice_or_with_two_slugs_is_no_anchor(tmp_path: Path):
    page = "# Page\n\n```\n# Fenced\n```\n\n    # Indented\n\n## Twice\n\n## Twice\n\n## Loss / schedule\n\n## Text-to-image, `exactly`\n"
    assert anchors_of(repository(tmp_path, {"page.md": page}) / "page.md") == {"page", "text-to-image-exactly"}


def test_a_section_cited_by_number_is_found(tmp_path: Path):
    files = {
        "itm/a.py": '"""Eps outside the root (SGRAF spec 1)."""\n\n# see cusa.md 5.2\n',
        "itm/b.py": 'spec = find_spec("clip")\n',
        "tests/c.py": "# cusa section 1.1, not docs/methods/cusa.md#teachers\n",
    }
    found = [problem.split(": ")[0] for problem in citations_by_number(repository(tmp_path, files))]
    assert found == ["itm/a.py:1", "itm/a.py:3", "tests/c.py:1"]
