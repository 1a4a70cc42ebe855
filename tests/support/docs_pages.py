"""`python -m tests.support.docs_pages`: write the pages of docs/ that are made from the code: recipes, recipe keys and commands.

`make docs` runs it first; tests/docs holds the committed pages equal to what it would write.
"""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from itm.config import Part, Recipe
from pipelines.cli import GROUPS, STAGES, module_of
from pipelines.list_recipes import markdown
from tests.support import ROOT

MADE = "<!-- made by `python -m tests.support.docs_pages`; do not edit -->"
RECIPES_HEAD = f"""{MADE}
# Shipped recipes

One recipe for each published result. `itm recipes` lists them and `itm recipes --markdown` prints this table.
What is verified here is the method, against numbers that the authors' own code produced. The recalls themselves need data and weights
that are not shipped, and were not run. Each recipe also names the decisions where code and paper differ (`paper.decisions`).

`itm pack -c sgr-f30k --debug` and `itm train -c sgr-f30k --debug` run the same method on tiny synthetic data in seconds.

"""
KEYS_HEAD = f"""{MADE}
# Every key of a recipe

A recipe is one YAML file. Every key below may be set in it, or on the command line as `section.key=value`. An unknown key is an error
that names the nearest known one. `extends: other.yaml` at the top of a recipe starts from another recipe, at most two in a row.
Mappings merge key by key, and a part whose `kind` changes is replaced as a whole. `itm recipes NAME` prints the result, and where each
value comes from.

"A kind" means `{{kind: name, options: {{...}}}}`. [Every kind](kinds.md) lists the names and their options.
"""
COMMANDS_HEAD = f"""{MADE}
# Commands

`itm <command> --help` prints the same text, `itm --help` the list, `itm --version` the version.
Every command also runs as `python -m pipelines.<command>`.
An error that you can mend is one line on stderr and exit code 2. `--traceback`, which every stage takes, shows where it arose.

"""


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic field) of everything that is no section."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not Part:
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def kind_of(annotation: Any) -> str:
    """A type in words: choices as they are written, `unset` for None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(kind_of(a) for a in arguments if a is not type(None))
    if origin in (list, tuple):
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        return "mapping"
    if annotation is Part:
        return "a kind"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}.get(annotation, "any")


def default_of(field: Any) -> str:
    if field.is_required():
        return "**needed**"
    value = field.default_factory() if field.default_factory else field.default
    if value is None or value is PydanticUndefined:
        return "unset"
    if isinstance(value, Part):
        return f"`{value.kind}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in ("", [], {}) else "empty"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def keys_page() -> str:
    lines, section = [KEYS_HEAD], None
    for key, field in keys(Recipe):
        room = key.rpartition(".")[0]
        if room != section:
            section = room
            lines += ["", f"## {room or 'The run'}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        lines.append(f"| `{key}` | {kind_of(field.annotation)} | {default_of(field)} | {cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def parser_of(stage: str) -> argparse.ArgumentParser:
    """The parser of a command, as `itm <stage>` builds it."""
    module = import_module(module_of(stage))
    parser = argparse.ArgumentParser(prog=f"itm {stage}")
    module.add_arguments(parser)
    return parser


def flags_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """(how an argument is written, the argument), without --help."""
    for action in parser._actions:
        if action.dest != "help" and action.help != argparse.SUPPRESS:
            yield ", ".join(action.option_strings) or str(action.metavar or action.dest), action


def meaning_of(action: argparse.Action) -> str:
    choices = f" One of: {', '.join(map(str, action.choices))}." if action.choices and not action.nargs else ""
    default = action.default
    shown = default is not None and not isinstance(default, bool | list | tuple) and "default" not in (action.help or "")
    return cell((action.help or "") + choices + (f" (default: {default})" if shown else ""))


def commands_page() -> str:
    order = [stage for group in GROUPS for stage in STAGES if STAGES[stage].group == group]
    lines = [COMMANDS_HEAD, "| to | command | what it does |", "|---|---|---|"]
    lines += [f"| {STAGES[stage].group} | [`itm {stage}`](#itm-{stage}) | {cell(STAGES[stage].about)} |" for stage in order]
    for stage in order:
        module = import_module(module_of(stage))
        lines += ["", f"## itm {stage}", "", "```text", inspect.cleandoc(module.__doc__ or ""), "```", ""]
        arguments = list(flags_of(parser_of(stage)))
        if arguments:
            lines += ["| argument | meaning |", "|---|---|"]
            lines += [f"| `{name}` | {meaning_of(action)} |" for name, action in arguments]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Name in docs/ -> text."""
    return {"recipes.md": RECIPES_HEAD + markdown() + "\n", "recipe-keys.md": keys_page(), "commands.md": commands_page()}


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
