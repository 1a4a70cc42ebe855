"""Named parts: a room's table maps a kind to `module:Class`, imported on first use so that unused ones cost nothing."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable
from importlib import import_module
from typing import Any, Unpack, get_args, get_origin, get_type_hints


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
    known, takes_any = options_of(part)
    if not takes_any:
        refuse_unknown(options, known, f"{what} {kind!r}")
    try:
        inspect.signature(part).bind(**given, **options)
    except TypeError as error:
        raise ValueError(f"{what} {kind!r}: {error}") from None
    return part(**given, **options)


def refuse_unknown(options: Iterable[str], known: Collection[str], what: str) -> None:
    """Raises ValueError naming the first option that is not known, and the near one."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} has no option {option!r}; {hint}")


def options_of(part: Any) -> tuple[list[str], bool]:
    """Names of what a part takes, the keys of an unpacked TypedDict (`**options: Unpack[...]`) included; whether it takes any other too."""
    parameters = inspect.signature(part).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for rest in (p for p in parameters if p.kind is p.VAR_KEYWORD):
        hint = get_type_hints(part.__init__ if inspect.isclass(part) else part).get(rest.name)
        if get_origin(hint) is not Unpack:
            return names, True
        names += get_type_hints(get_args(hint)[0])
    return names, False
