"""How sets of labelled images are laid out: one reader a layout, from a folder or list to images with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from itm.data import files
from itm.data.sources.photos import open_photos
from itm.data.sources.pictures import SUFFIXES
from itm.data.sources.source import field_of, read_json, read_text
from itm.data.sources.tables import read_table_file

ROLES = ("query", "gallery")
CUB_TRAINED = 100
"""Metric learning trains on the first hundred classes of CUB and is judged on the other hundred."""


@dataclass(frozen=True)
class LabelledImage:
    """path: below the root of the set. role: query or gallery; None where every image is both."""

    path: str
    label: str
    role: str | None = None


@dataclass(frozen=True)
class LabelledSet:
    """Images below `root`, as `lists` (files) say."""

    root: str
    images: list[LabelledImage]
    lists: list[str] = field(default_factory=list)


def folders(uri: str) -> LabelledSet:
    """A folder a class; images may lie deeper. Raises ValueError for images outside of a class folder, and where there is no folder."""
    if not files.is_folder(uri):
        raise ValueError(f"no folder of class folders at {uri}")
    names = sorted(n for n in open_photos(uri).names if n.rpartition(".")[2].lower() in SUFFIXES)
    if bare := [n for n in names if "/" not in n]:
        raise ValueError(f"{uri}: {len(bare)} images lie in no class folder, the first is {bare[0]}")
    return LabelledSet(uri, [LabelledImage(n, n.partition("/")[0]) for n in names])


def table(uri: str) -> LabelledSet:
    """A .csv, .tsv, .jsonl or .parquet with the columns image, label and, where there are queries, role; or lines `path label` (.txt)."""
    root = uri.rpartition("/")[0]
    if uri.lower().endswith(".txt"):
        cut = ((where, line.rpartition(" ")) for where, line in _lines(uri))
        return LabelledSet(root, [LabelledImage(_filled(path, where, "image"), label) for where, (path, _, label) in cut], [uri])
    found = []
    for row in read_table_file(uri):
        if row.fault:
            raise ValueError(row.fault)
        path, label = (_filled(field_of(row.cells, name, row.where), row.where, name) for name in ("image", "label"))
        role = row.cells.get("role") or None
        if role not in (None, *ROLES):
            raise ValueError(f"{row.where}: the role {role!r} is none of {', '.join(ROLES)}")
        found.append(LabelledImage(path, label, role))
    if len({image.role is None for image in found}) > 1:
        raise ValueError(f"{uri}: some rows have a role (query, gallery) and others none")
    return LabelledSet(root, found, [uri])


def cub(uri: str) -> LabelledSet:
    """CUB-200-2011: images.txt and image_class_labels.txt; the classes 101 to 200, as metric learning has it."""
    paths, labels, lists = _cub_lists(uri)
    kept = [n for n, label in labels.items() if _number(label, f"{lists[1]}: the class of image {n}") > CUB_TRAINED]
    return LabelledSet(files.join(uri, "images"), [LabelledImage(paths[n], labels[n]) for n in kept], lists)


def cub_listed(uri: str) -> LabelledSet:
    """CUB-200-2011: all classes, the images that train_test_split.txt calls no training images."""
    paths, labels, lists = _cub_lists(uri)
    split = files.join(uri, "train_test_split.txt")
    chosen = _by_number(split)
    _check_same(paths, chosen, lists[0], split)
    kept = [LabelledImage(paths[n], labels[n]) for n in paths if chosen[n] == "0"]
    return LabelledSet(files.join(uri, "images"), kept, [*lists, split])


def sop(uri: str) -> LabelledSet:
    """Stanford Online Products: Ebay_test.txt, `image_id class_id super_class_id path` under a header."""
    listed = files.join(uri, "Ebay_test.txt")
    rows = _rows(listed, 4, header="image_id class_id super_class_id path")
    found = [LabelledImage(row[3], str(_number(row[1], f"{where}: class_id"))) for where, row in rows]
    return LabelledSet(uri, found, [listed])


def inshop(uri: str) -> LabelledSet:
    """In-Shop Clothes: list_eval_partition.txt (also below Eval/); its query and gallery images."""
    listed = next((at for at in (files.join(uri, f"{d}list_eval_partition.txt") for d in ("Eval/", "")) if files.exists(at)), "")
    if not listed:
        raise ValueError(f"no annotation file at {files.join(uri, 'Eval/list_eval_partition.txt')}")
    lines = list(_lines(listed))
    count = _number(lines[0][1] if lines else "", f"{listed} line 1: the number of images")
    rows = list(_cut(lines[1:], listed, 3, "image_name item_id evaluation_status"))
    if count != len(rows):
        raise ValueError(f"{listed} has {len(rows)} images, its first line says {count}: the file is not whole")
    for where, (_, _, status) in rows:
        if status not in ("train", *ROLES):
            raise ValueError(f"{where}: evaluation_status is train, query or gallery, not {status!r}")
    found = [LabelledImage(path, item, status) for _, (path, item, status) in rows if status != "train"]
    inner = files.join(uri, "Img")
    return LabelledSet(inner if files.is_folder(inner) else uri, found, [listed])


def inaturalist(uri: str) -> LabelledSet:
    """iNaturalist's json: `images` (id, file_name) and `annotations` (image_id, category_id), one each; paths are below its folder."""
    images, notes = _parts(read_json(uri), uri)
    labels: dict[object, str] = {}
    for number, note in enumerate(notes):
        where = f"{uri} annotation {number}"
        image = field_of(note, "image_id", where)
        if image in labels:
            raise ValueError(f"{where}: the image {image} has a category already")
        labels[image] = str(field_of(note, "category_id", where))
    found = []
    for number, row in enumerate(images):
        where = f"{uri} image {number}"
        key = field_of(row, "id", where)
        if key not in labels:
            raise ValueError(f"{where}: no annotation gives the image {key} a category")
        found.append(LabelledImage(_filled(field_of(row, "file_name", where), where, "file_name"), labels.pop(key)))
    if labels:
        raise ValueError(f"{uri}: {len(labels)} annotations are of images that it does not list, the first is {next(iter(labels))}")
    return LabelledSet(uri.rpartition("/")[0], found, [uri])


Layout = Callable[[str], LabelledSet]
LAYOUTS: dict[str, Layout] = {
    "folders": folders,
    "list": table,
    "cub": cub,
    "cub_listed": cub_listed,
    "sop": sop,
    "inshop": inshop,
    "inaturalist": inaturalist,
}
"""Name -> reader of a folder or file."""


def _parts(said: object, uri: str) -> tuple[list[object], list[object]]:
    parts = [said.get(name) if isinstance(said, dict) else None for name in ("images", "annotations")]
    if not isinstance(parts[0], list) or not isinstance(parts[1], list):
        raise ValueError(f"{uri} holds no lists `images` and `annotations`, as iNaturalist's do")
    return parts[0], parts[1]


def _cub_lists(uri: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Path and class of each image by its number, and the two lists."""
    lists = [files.join(uri, name) for name in ("images.txt", "image_class_labels.txt")]
    paths, labels = (_by_number(listed) for listed in lists)
    _check_same(paths, labels, *lists)
    return paths, labels, lists


def _by_number(listed: str) -> dict[str, str]:
    """Number of an image -> what the line says of it."""
    found: dict[str, str] = {}
    for where, (number, said) in _rows(listed, 2):
        if number in found:
            raise ValueError(f"{where}: the image {number} stands there twice")
        found[number] = said
    return found


def _check_same(one: dict[str, str], other: dict[str, str], first: str, second: str) -> None:
    for here, there, listed, lacking in ((one, other, first, second), (other, one, second, first)):
        if lost := [n for n in here if n not in there]:
            raise ValueError(f"{lacking} does not name {len(lost)} of {len(here)} images of {listed}, the first is {lost[0]}")


def _rows(listed: str, cells: int, header: str = "") -> Iterator[tuple[str, list[str]]]:
    yield from _cut(list(_lines(listed)), listed, cells, header)


def _cut(lines: list[tuple[str, str]], listed: str, cells: int, header: str) -> Iterator[tuple[str, list[str]]]:
    """(file and line, its cells) of lines cut at white space, the first of which is `header`, where there is one."""
    if header and (not lines or lines[0][1].split() != header.split()):
        raise ValueError(f"{lines[0][0] if lines else listed} is not the header `{header}`")
    for where, line in lines[1:] if header else lines:
        found = line.split()
        if len(found) != cells:
            raise ValueError(f"{where} has {len(found)} cells, not {cells}: {line[:80]}")
        yield where, found


def _lines(listed: str) -> Iterator[tuple[str, str]]:
    """(file and line, text) of the lines that are not blank."""
    for number, line in enumerate(read_text(listed).split("\n"), 1):
        if line.strip():
            yield f"{listed} line {number}", line.strip()


def _filled(said: object, where: str, name: str) -> str:
    if said is None or not str(said).strip():
        raise ValueError(f"{where}: `{name}` is empty")
    return str(said).strip()


def _number(said: str, what: str) -> int:
    if not said.isdigit():
        raise ValueError(f"{what} is no number: {said[:40]!r}")
    return int(said)
