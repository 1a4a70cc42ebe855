"""JSON annotation files: COCO captions, Karpathy splits, lists of pairs; one file, or one a split."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itm.config import Part
from itm.data.detect.finding import ROLES, Answers, Finding, choose, role_of, roles_of
from itm.data.detect.images import image_root, walk
from itm.data.detect.tables import is_table, look_at_table

MOST_JSON = 2 << 30  # bytes; a larger file is no annotation file that a source could hold
SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".token")
CAPTIONS = {"coco": "coco_captions", "karpathy": "karpathy", "pairs": "pairs_json", "table": "csv"}
NAMES = {"coco": "COCO captions", "karpathy": "a Karpathy split file", "pairs": "a list of image-caption pairs", "table": "a table"}


@dataclass(frozen=True)
class Annotation:
    """A file that says captions. kind: coco, karpathy, pairs or table; images: paths that it names (none for a table)."""

    path: Path
    kind: str
    images: list[str]
    splits: tuple[str, ...] = ()


def annotation_at(file: Path) -> Annotation | None:
    """What a file says, None when it says no captions of images. Raises ValueError naming a JSON file that cannot be read."""
    if file.suffix.lower() != ".json" and file.suffix.lower() in SUFFIXES:
        return Annotation(file, "table", []) if is_table(file) else None
    if file.suffix.lower() != ".json" or file.stat().st_size > MOST_JSON:
        return None
    try:
        said = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    return _json_annotation(file, said)


def _json_annotation(file: Path, said: Any) -> Annotation | None:
    rows = said.get("images") if isinstance(said, dict) else said
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows[:10]):
        return None
    if isinstance(said, list):
        named = [str(row.get("image_path", row.get("image"))) for row in rows if isinstance(row, dict) and "caption" in row]
        named = [name for name in named if name != "None"]
        return Annotation(file, "pairs", named) if named else None
    if any("sentences" in row or "sentids" in row for row in rows[:10]):
        named = ["/".join(filter(None, (row.get("filepath"), row.get("filename")))) for row in rows if isinstance(row, dict)]
        return Annotation(file, "karpathy", named, tuple(sorted({str(row.get("split")) for row in rows if isinstance(row, dict)})))
    annotations = said.get("annotations") or []
    if any(isinstance(row, dict) and "caption" in row for row in annotations[:1000]):
        return Annotation(file, "coco", [str(row.get("file_name")) for row in rows if isinstance(row, dict)])
    return None


def annotations_below(folder: Path, depth: int = 2, beside: Container[Path] = ()) -> tuple[list[Annotation], list[str]]:
    """Every file below a folder that says captions, and the names of those that say none. beside: captions of one image, left out."""
    looked = [file for file in walk(folder, depth) if file.suffix.lower() in SUFFIXES and file not in beside]
    found = [(file.name, annotation_at(file)) for file in looked]
    return [a for _, a in found if a is not None], [name for name, a in found if a is None]


def look_at_annotations(found: list[Annotation], start: Path, answers: Answers, notes: tuple[str, ...] = ()) -> Finding:
    """A finding of the annotation files, which are one reading, or several of which one has to be named."""
    groups: dict[str, list[Annotation]] = {}
    for annotation in found:
        groups.setdefault(_group(annotation), []).append(annotation)
    readings: dict[str, list[Annotation]] = {}
    for group in groups.values():
        roles = roles_of([a.path.name for a in group])
        whole = len(roles) == len(group)
        for one in [group] if whole else [[a] for a in group]:
            readings[",".join(str(a.path) for a in one)] = one
    meanings = {name: NAMES[group[0].kind] for name, group in readings.items()}
    chosen = readings[choose("more than one annotation file lies here", "annotations", meanings, answers)]
    finding = look_at_table(chosen[0].path, start, answers) if chosen[0].kind == "table" else _look(chosen, start, answers)
    if chosen[0].kind == "table" and len(chosen) > 1:
        finding = _tables(chosen, finding)
    return Finding(**(vars(finding) | {"notes": (*finding.notes, *notes)}))


def _group(annotation: Annotation) -> str:
    """Files of one group differ by the name of the split only."""
    name = annotation.path.name
    role = role_of(name)
    for word in ROLES.get(role or "", ()):
        name = name.lower().replace(word, "*")
    return f"{annotation.path.parent}/{annotation.kind}/{name}"


def _look(chosen: list[Annotation], start: Path, answers: Answers) -> Finding:
    kind, paths = chosen[0].kind, {role_of(a.path.name) or "train": a.path for a in chosen}
    what = ", ".join(a.path.name for a in chosen)
    roots = {role_of(a.path.name) or "train": image_root(list(dict.fromkeys(a.images)), start, answers, a.path.name) for a in chosen}
    root = _one_root(roots, what)
    layout = f"{NAMES[kind]}: {what}; images below {root}"
    if kind == "karpathy":
        names = {"restval": "train"}
        splits = roles_of(sorted({names.get(split, split) for split in chosen[0].splits}))
        return Finding(layout, Part(kind="karpathy", options={"path": str(chosen[0].path), "image_root": root}), splits=splits)
    whole = len(chosen) == 1 and role_of(chosen[0].path.name) in (None, "train")
    path: object = str(chosen[0].path) if whole else {role: str(path) for role, path in _in_order(paths).items()}
    splits = {} if whole else {role: role for role in _in_order(paths)}
    return Finding(layout, Part(kind=CAPTIONS[kind], options={"path": path, "image_root": root}), splits=splits)


def _tables(chosen: list[Annotation], first: Finding) -> Finding:
    """Tables that differ by their split, read as the first of them."""
    assert first.source is not None
    paths = _in_order({str(role_of(a.path.name)): a.path for a in chosen})
    options = first.source.options | {"path": {role: str(path) for role, path in paths.items()}}
    return Finding(first.layout, Part(kind="csv", options=options), splits={role: role for role in paths})


def _in_order(paths: Mapping[str, Path]) -> dict[str, Path]:
    return {role: paths[role] for role in ROLES if role in paths}


def _one_root(roots: Mapping[str, str], what: str) -> str:
    """The folder of all splits, with `{split}` in it where each has one of its own. Raises ValueError where that says too little."""
    distinct = set(roots.values())
    if len(distinct) == 1:
        return distinct.pop()
    patterns = {_with_split(root, role) for role, root in roots.items()}
    if len(patterns) == 1 and "{split}" in (pattern := patterns.pop()):
        return pattern
    raise ValueError(f"the images of {what} lie in {', '.join(sorted(distinct))}: put them below one folder, or init each file by itself")


def _with_split(root: str, role: str) -> str:
    head, slash, name = root.rpartition("/")
    return f"{head}{slash}{name.replace(role, '{split}', 1)}"
