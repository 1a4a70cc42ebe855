"""The version of what lies on disk: a whole number under `format`. A file that does not say is of format 1."""

from __future__ import annotations

import json
from typing import Any

from itm.data import files

Json = dict[str, Any]
"""The content of a JSON object. What it must hold is checked where it is read."""


class NewerFormat(ValueError):
    """A file that a later version of itm wrote: nobody may take it for a damaged one and replace it."""


def check_format(where: str, said: Any, known: int) -> None:
    """`said` is the content of the JSON `where`. Raises NewerFormat, naming both versions, for a format above `known`."""
    found = said.get("format", 1) if isinstance(said, dict) else 1
    if type(found) is not int or found > known:
        raise NewerFormat(f"{where} has format {found!r}, this version reads up to {known}: upgrade itm-pipeline")


def read_json(uri: str, known: int) -> Json:
    """The JSON object in a file of a format up to `known`. Raises NewerFormat; ValueError naming a file that holds none."""
    try:
        said = json.loads(files.read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is no JSON: {error}; delete it, and run the stage that makes it again") from None
    check_format(uri, said, known)
    if not isinstance(said, dict):
        raise ValueError(f"{uri} holds a {type(said).__name__}, not an object; delete it, and run the stage that makes it again")
    return said
