"""Whatever can be chosen is documented: source options, kinds, recipe keys, commands, flags; and what the pages say is there."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from itm.config import Part, Recipe
from itm.data.sources import SOURCES
from itm.evaluation import PROTOCOLS
from itm.kinds import find_part, options_of
from itm.matchers import MATCHERS
from itm.matchers.encoders.build import IMAGE_ENCODERS, TEXT_ENCODERS
from itm.matchers.encoders.poolings import POOLINGS
from itm.matchers.late.uarda import SeparationOptions
from itm.matchers.late.uarda_threshold import ThresholdOptions
from itm.methods import METHODS
from itm.methods.cusa_temperatures import CSAOptions, TemperatureOptions, USAOptions
from itm.methods.iais import Ranking
from itm.methods.terms import TERMS
from itm.teachers import TEACHERS
from itm.teachers.shuffled import Shuffle
from itm.tracking.loggers import LOGGERS
from pipelines.cli import STAGES
from tests.support import ROOT
from tests.support.docs_pages import keys, pages, parser_of
from tests.support.documents import DOCS, NAMES, commands, section

GIVEN = {"matcher", "vocab_size", "modality", "name", "run_id", "folder"}  # what the code gives, not the recipe
TABLES = {
    "data.md": SOURCES,
    "teachers.md": TEACHERS,
    "kinds.md": {**MATCHERS, **IMAGE_ENCODERS, **TEXT_ENCODERS, **POOLINGS, **METHODS, **LOGGERS},
}
OPTION_MODELS: list[tuple[str, str, type[BaseModel]]] = [
    *(("kinds.md", name, find_part(TERMS, name, "term").choices) for name in TERMS),
    ("kinds.md", "csa", CSAOptions),
    ("kinds.md", "csa", TemperatureOptions),
    ("kinds.md", "usa", USAOptions),
    ("kinds.md", "iais", Ranking),
    ("kinds.md", "uarda", ThresholdOptions),
    ("kinds.md", "uarda", SeparationOptions),
    ("teachers.md", "shuffled", Shuffle),
]


@pytest.mark.parametrize(("page", "kind"), [(page, kind) for page, table in TABLES.items() for kind in table])
def test_every_kind_has_a_section_that_names_its_options(page: str, kind: str) -> None:
    text = section(page, kind)
    part = find_part(TABLES[page], kind, "kind")
    missing = {option for option in set(options_of(part)[0]) - GIVEN if f"`{option}`" not in text}
    assert not missing, f"docs/{page}, section {kind}: say what {', '.join(sorted(missing))} does"


@pytest.mark.parametrize(("page", "heading", "model"), OPTION_MODELS, ids=lambda value: getattr(value, "__name__", value))
def test_every_option_of_a_term_or_rule_is_named(page: str, heading: str, model: type[BaseModel]) -> None:
    text = section(page, heading)
    missing = {name for name in model.model_fields if f"`{name}`" not in text}
    assert not missing, f"docs/{page}, section {heading}: say what {', '.join(sorted(missing))} does"


def test_every_protocol_is_named() -> None:
    text = section("kinds.md", "Protocols")
    assert {name for name in PROTOCOLS if f"| `{name}` |" not in text} == set()


def test_every_key_of_a_recipe_is_named_and_explained() -> None:
    text = (DOCS / "recipe-keys.md").read_text(encoding="utf-8")
    rows = {cells[1].strip("` "): cells[-2].strip() for line in text.splitlines() if (cells := re.split(r"(?<!\\)\|", line))[1:]}
    known = dict(walk(Recipe))
    assert known.keys() == {key for key, _ in keys(Recipe)}
    assert known.keys() - rows.keys() == set()
    # What these mean is their name.
    assert {key for key in known if not rows[key]} <= {"train.optimizer", "train.weight_decay"}


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys by way of the JSON schema, which the generator of the page does not use."""
    schema = model.model_json_schema()
    sections = {name: body for name, body in schema["$defs"].items() if name != Part.__name__}
    for name, body in schema["properties"].items():
        inside = sections.get(body.get("$ref", "").rpartition("/")[2])
        yield from ((f"{name}.{key}", value) for key, value in inside["properties"].items()) if inside else [(name, body)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_command_has_a_section_that_names_its_flags(stage: str) -> None:
    parser = parser_of(stage)
    written = section("commands.md", f"itm {stage}")
    flags = {flag for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", parser.format_help()) if flag not in ("-h", "--help")}
    assert {flag for flag in flags if flag not in written} == set()


@pytest.mark.parametrize("page", sorted(pages()))
def test_a_page_made_from_the_code_is_up_to_date(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == pages()[page], "run `python -m tests.support.docs_pages` and commit what it writes"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_on_a_page_is_one_that_the_parsers_take(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands(ROOT / name):
        stage, *rest = shlex.split(line)[1:]
        assert stage in STAGES, line
        parser = parser_of(stage)
        try:
            parsed = parser.parse_args(rest) if stage == "submit" else parser.parse_intermixed_args(rest)
        except SystemExit:
            pytest.fail(f"{name}: {line}: {capsys.readouterr().err}")
        assert isinstance(parsed, argparse.Namespace)


def test_the_readme_shows_the_commands_of_the_page_on_own_photos() -> None:
    from tests.support.documents import fenced

    readme = ROOT / "README.md"
    assert fenced(readme, "console") == fenced(DOCS / "own-photos.md", "console")[:1]
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 80


def texts_of(path: Path) -> Iterator[str]:
    """The strings of a source with `...` for what is filled in, without quotation marks."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def plain(text: str) -> str:
    return re.sub(r"[`'\"{}]", "", text)


def test_the_messages_of_the_page_on_trouble_are_those_of_the_code() -> None:
    sources = [path for folder in ("itm", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    spoken = plain("\n".join(text for path in sources for text in texts_of(path)))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [found[1] for line in page.splitlines() if (found := re.match(r"\| `([^`]+)`(?: \(a warning\))? \|", line))]
    assert len(messages) > 25
    pieces = [(message, piece.strip(" :,;")) for message in messages for piece in plain(message).split("...")]
    lost = {message for message, piece in pieces if len(piece) > 8 and piece not in spoken}
    assert not lost, "docs/troubleshooting.md quotes what no source says"
