"""Nested choices as a recipe file holds them: read from YAML, merged, overridden by dotted keys, flattened, told apart by a digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml


def read_choices(path: Path, wanted_by: Path | None) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError naming the file, and `wanted_by`, the file that extends it."""
    if not path.exists():
        raise ValueError(
            f"no recipe at {path}" + (f", which {wanted_by} extends" if wanted_by else "; `itm recipes` lists the shipped ones")
        )
    try:
        choices = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(choices, dict):
        raise ValueError(f"{path} must hold a mapping, not a {type(choices).__name__}")
    return choices


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A part whose kind changes is replaced whole: the options of another kind would be unknown to it."""
    if "kind" in above and above["kind"] != below.get("kind"):
        return above
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_overrides(choices: dict[str, Any], overrides: list[str]) -> None:
    """Put `key.sub=value` overrides (values are YAML) into nested choices, in place. Raises ValueError for one of another form."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key.sub=value")
        _set(choices, key.strip().split("."), yaml.safe_load(value), override)


def _set(choices: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        choices = choices.setdefault(key, {})
        if not isinstance(choices, dict):
            raise ValueError(f"override {override!r}: {key!r} is a value, not a section")
    choices[keys[-1]] = value


def digest(choices: dict[str, Any]) -> str:
    """12 hex digits of the sha256 of the choices."""
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]


def known_to(choices: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The sections, and the keys in them, that `recorded` has as well."""

    def inside(section: Any, there: Any) -> Any:
        both = isinstance(section, dict) and isinstance(there, dict)
        return {key: value for key, value in section.items() if key in there} if both else section

    return {name: inside(value, recorded[name]) for name, value in choices.items() if name in recorded}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> scalar."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
