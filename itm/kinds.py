"""Named parts: a room's table maps a kind to `module:Class`, imported on first use so that unused ones cost nothing."""

from __future__ import annotations

import difflib
import inspect
from importlib import import_module
from typing import Any


def find_part(table: dict[str, str], kind: str, what: str) -> Any:
    """The class behind `kind`. Raises ValueError naming the near kind."""
    if kind not in table:
        near = difflib.get_close_matches(kind, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(table))}"
        raise ValueError(f"unknown {what} {kind!r}; {hint}")
    module, _, name = table[kind].partition(":")
    return getattr(import_module(module), name)


def build_part(table: dict[str, str], kind: str, options: dict[str, Any], what: str, **given: Any) -> Any:
    """Build `kind` from recipe `options` plus what the caller gives. Raises ValueError for an unknown or missing option."""
    part = find_part(table, kind, what)
    known = [p.name for p in inspect.signature(part).parameters.values() if p.kind is not p.VAR_KEYWORD]
    takes_any = len(known) < len(inspect.signature(part).parameters)
    for option in options:
        if option not in known and not takes_any:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} {kind!r} has no option {option!r}; {hint}")
    try:
        inspect.signature(part).bind(**given, **options)
    except TypeError as error:
        raise ValueError(f"{what} {kind!r}: {error}") from None
    return part(**given, **options)
