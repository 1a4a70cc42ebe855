"""JSON annotation files: COCO captions, Karpathy splits, lists of pairs; one file, or one a split."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itm.config import Part
from itm.data.detect.finding import ROLES, Answers, Finding, choose, role_of, roles_of
from itm.data.detect.images import image_root, looks_like_image, walk
from itm.data.detect.tables import CAPTION_WORDS, is_table, look_at_table, words_of
from itm.data.sources.pairs_json import read_pairs
from itm.data.sources.source import read_text

MOST_JSON = 2 << 30  # bytes; a larger file is no annotation file that a source could hold
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")
CAPTIONS = {"coco": "coco_captions", "karpathy": "karpathy", "pairs": "pairs_json", "table": "csv"}
NAMES = {"coco": "COCO captions", "karpathy": "a Karpathy split file", "pairs": "a list of image-caption pairs", "table": "a table"}


@dataclass(frozen=True)
class Annotation:
    """A file that says captions. kind: coco, karpathy, pairs or table; images: paths that it names (none for a table).

    fields: of pairs, the names of fields that may be the image, and the caption, each with its first value; empty for the usual ones.
    """

    path: Path
    kind: str
    images: list[str]
    splits: tuple[str, ...] = ()
    fields: Mapping[str, dict[str, str]] = field(default_factory=dict)


def annotation_at(file: Path) -> Annotation | None:
    """What a file says, None when it says no captions of images. Raises ValueError naming a JSON file that cannot be read."""
    json_like = file.suffix.lower() in (".json", ".jsonl")
    if not json_like and file.suffix.lower() in SUFFIXES:
        return Annotation(file, "table", []) if is_table(file) else None
    if not json_like or file.stat().st_size > MOST_JSON:
        return None
    text = read_text(file)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = read_pairs(str(file), text)
    return _json_annotation(file, said) or _pairs_annotation(file, text)


def _json_annotation(file: Path, said: Any) -> Annotation | None:
    rows = said.get("images") if isinstance(said, dict) else said
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows[:10]):
        return None
    if isinstance(said, list):
        named = [str(row.get("image_path", row.get("image"))) for row in rows if isinstance(row, dict) and "caption" in row]
        named = [name for name in named if name != "None"]
        return Annotation(file, "pairs", named) if named else None
    if not any(isinstance(row, dict) and {"id", "file_name", "filename", "sentences", "sentids"} & row.keys() for row in rows[:10]):
        return None
    if any("sentences" in row or "sentids" in row for row in rows[:10]):
        named = ["/".join(filter(None, (row.get("filepath"), row.get("filename")))) for row in rows if isinstance(row, dict)]
        return Annotation(file, "karpathy", named, tuple(sorted({str(row.get("split")) for row in rows if isinstance(row, dict)})))
    annotations = said.get("annotations") or []
    if any(isinstance(row, dict) and "caption" in row for row in annotations[:1000]):
        return Annotation(file, "coco", [str(row.get("file_name")) for row in rows if isinstance(row, dict)])
    return None


def _pairs_annotation(file: Path, text: str) -> Annotation | None:
    """Pairs whose fields have other names, or whose rows are not a list: told by the image files that a field names."""
    try:
        rows = [row for row in read_pairs(str(file), text) if isinstance(row, dict)][:1000]
    except ValueError as error:
        if "stands twice" in str(error):
            raise
        return None
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row))
    images = {n: str(rows[0].get(n)) for n in names if _most([row.get(n) for row in rows], _is_image_name)}
    said = {n: str(rows[0].get(n))[:60] for n in names if n not in images and words_of(n) & set(CAPTION_WORDS)}
    said = {n: text for n, text in said.items() if _most([row.get(n) for row in rows], _is_said)}
    if not images or not said:
        return None
    first = next((name for name in ("image_path", "image") if name in images), next(iter(images)))
    named = [str(row[first]) for row in rows if isinstance(row.get(first), str)]
    fields: dict[str, dict[str, str]] = {}
    if first not in ("image_path", "image"):
        fields["image"] = images
    if "caption" not in said:
        fields["caption"] = said
    return Annotation(file, "pairs", named, fields=fields)


def _is_image_name(value: Any) -> bool:
    return isinstance(value, str) and looks_like_image(value)


def _is_said(value: Any) -> bool:
    return isinstance(value, str | list)


def _most(values: list[Any], holds: Callable[[Any], bool]) -> bool:
    return sum(map(holds, values)) * 2 > len(values)


def _fields(annotation: Annotation, answers: Answers) -> dict[str, object]:
    """Options of `pairs_json` for the names of its fields. Raises Question where two may be meant."""
    options: dict[str, object] = {}
    if images := annotation.fields.get("image"):
        options["image_field"] = choose(f"{annotation.path.name}: more than one field names images", "image-column", images, answers)
    if captions := annotation.fields.get("caption"):
        given = answers.get("caption-columns", "").split(",")
        if given != [""] and not set(given) - set(captions):
            return options | {"caption_fields": given}
        options["caption_fields"] = choose(f"{annotation.path.name}: more than one field holds texts", "caption-columns", captions, answers)
    return options


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
    options = {"path": path, "image_root": root} | (_fields(chosen[0], answers) if kind == "pairs" else {})
    return Finding(layout, Part(kind=CAPTIONS[kind], options=options), splits=splits)


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
