"""`look(paths, answers)`: which source of a recipe reads what lies at a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from itm.config import Part
from itm.data import files
from itm.data.detect.annotations import Annotation, annotation_at, annotations_below, look_at_annotations
from itm.data.detect.features import look_at_features
from itm.data.detect.finding import Answers, Finding, Question, roles_of
from itm.data.detect.images import is_image, walk
from itm.data.detect.shards import look_at_archive, look_at_tars
from itm.data.detect.tables import columns_of, read_table

TABLES = (".parquet", ".arrow", ".feather")
BESIDE = "beside"
MAY_SAY = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".xls", ".ods", ".gz", ".sqlite", ".db", ".xml", ".srt", ".yaml", ".yml")
METADATA = ("metadata.jsonl", "metadata.csv")
KNOWN = (
    "photos with a table of captions (csv, tsv, |), with a .txt beside each or without captions; imagefolder; parquet or a saved data set; "
    "zip or tar of photos; WebDataset shards; COCO, Karpathy or pair lists as JSON; *_precomp folders; UNITER databases; bottom-up TSV"
)


def look(paths: Sequence[str], answers: Answers) -> Finding:
    """The one reading of what lies at `paths` (a folder and, where it lies elsewhere, its annotation file).

    Raises Question where two readings are possible, ValueError naming what is there where none is.
    """
    if len(paths) == 1 and files.is_remote(paths[0]):
        return _remote(paths[0])
    places = [Path(files.absolute(path)) for path in paths]
    if missing := [str(place) for place in places if not place.exists()]:
        raise ValueError(f"nothing at {', '.join(missing)}")
    annotations = [place for place in places if place.is_file() and len(places) > 1]
    folders = [place for place in places if place not in annotations]
    if len(folders) > 1 or len(annotations) > 1:
        raise ValueError("name one folder or file, and beside it at most one annotation file")
    if annotations:
        return _one_file(annotations[0], folders[0], answers)
    return _one_file(folders[0], folders[0].parent, answers) if folders[0].is_file() else _folder(folders[0], answers)


def _remote(uri: str) -> Finding:
    """Of an object store: shards and parquet tables, which need not be walked."""
    if uri.endswith(TABLES) or files.list_files(uri, ".parquet"):
        return Finding(f"parquet at {uri}", Part(kind="parquet", options={"path": uri}))
    folders = [files.name_of(folder) for folder in files.list_folders(uri) if files.list_files(folder, ".tar")]
    if folders:
        roles = roles_of(folders)
        return Finding(f"shards below {uri}", None, uri, roles if "train" in roles else {"train": folders[0]} | roles)
    if files.list_files(uri, ".tar"):
        return Finding(f"shards in {uri}", None, uri.rstrip("/").rpartition("/")[0], {"train": files.name_of(uri)})
    raise ValueError(
        f"{uri} holds no .tar and no .parquet: copy annotation files and photos to this machine first, or pack them into shards"
    )


def _one_file(file: Path, start: Path, answers: Answers) -> Finding:
    suffix = file.suffix.lower()
    if suffix in (".tar", ".zip"):
        return look_at_archive(file, answers)
    if suffix in TABLES:
        return Finding(f"a {suffix[1:]} table, {file.name}", Part(kind="parquet", options={"path": str(file)}))
    if file.name in METADATA:
        return _imagefolder(file.parent)
    if (found := look_at_features(file, answers)) is not None:
        return found
    if (annotation := annotation_at(file)) is not None:
        return look_at_annotations([annotation], start, {**answers, "annotations": str(file)})
    if is_image(file):
        raise ValueError(f"{file} is one image: name the folder that it lies in")
    raise ValueError(f"{file} says no captions of images; known are {KNOWN}")


def _folder(folder: Path, answers: Answers) -> Finding:
    names = {entry.name for entry in folder.iterdir()}
    for look_at in (look_at_features, look_at_tars):
        if (found := look_at(folder, answers)) is not None:
            return found
    if {"dataset_info.json", "state.json"} <= names or "dataset_dict.json" in names:
        return Finding(f"a data set saved by `datasets`, {folder.name}", Part(kind="parquet", options={"path": str(folder)}))
    tables = [path for path in walk(folder, 2) if path.suffix.lower() in TABLES]
    if tables:
        return Finding(f"{len(tables)} parquet tables in {folder.name}", Part(kind="parquet", options={"path": str(folder)}))
    if any(path.name in METADATA for path in walk(folder, 2)):
        return _imagefolder(folder)
    return _photos(folder, answers)


def _imagefolder(folder: Path) -> Finding:
    found = next(path for path in walk(folder, 2) if path.name in METADATA)
    below = [path.name for path in folder.iterdir() if path.is_dir()] if found.parent != folder else []
    layout = f"an imagefolder, {folder.name} with {found.name}"
    return Finding(layout, Part(kind="imagefolder", options={"path": str(folder)}), splits=roles_of(below))


def _photos(folder: Path, answers: Answers) -> Finding:
    """Photos with annotation files, with a text beside each, or with nothing."""
    images = [path for path in walk(folder) if is_image(path)]
    stems = {path.with_suffix("") for path in images}
    texts = [path for path in walk(folder) if path.suffix.lower() == ".txt" and path.with_suffix("") in stems]
    beside = set(texts)
    said, others = annotations_below(folder, beside=beside)
    notes = (f"{', '.join(others[:5])} say no captions of images: left aside",) if others else ()
    if not said and images and not texts:
        said = _above(folder, answers)
    if said and texts:
        _which(said[0].path, len(texts), answers)
    if said and answers.get("annotations") not in (BESIDE, "none"):
        return look_at_annotations(said, folder, answers, notes)
    if not images:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise ValueError(f"{folder} holds neither images nor anything that says captions, but {there}; known are {KNOWN}")
    if not texts and answers.get("annotations") != "none":
        _unread(folder, images, answers)
    captions = f"a .txt beside {len(texts):,} of them" if texts else "no captions"
    layout = f"{len(images):,} image files below {folder.name}, {captions}"
    return Finding(layout, Part(kind="imagefolder", options={"path": str(folder)}), captioned=bool(texts), notes=notes)


def _unread(folder: Path, images: Sequence[Path], answers: Answers) -> None:
    """Raises Question where no caption was found, and there are files that may hold some: they are not lost without a word."""
    stems = {path.stem for path in images}
    others = [path for path in walk(folder) if path not in set(images)]
    tables = [path.name for path in others if path.name.lower().endswith(MAY_SAY)]
    named = [path for path in others if path.stem in stems]
    if not tables and not named:
        return
    what = f"{', '.join(tables[:3])} may hold captions in a form that is not read"
    if not tables:
        what = f"{len(named)} files such as {named[0].relative_to(folder)} bear the names of images and are no .txt beside them"
    remedy = "captions are read from CSV, JSON or JSON lines whose rows name the image with its suffix, or from a .txt beside it"
    if given := answers.get("annotations"):
        raise ValueError(f"--annotations {given}: {folder.name} holds images, and {what}; {remedy}")
    raise Question(f"{folder.name} holds images, and {what}: {remedy}", "annotations", {"none": "photos without captions"})


def _which(annotations: Path, texts: int, answers: Answers) -> None:
    if "annotations" not in answers:
        meanings = {str(annotations): "the annotation file", BESIDE: f"the {texts} .txt files beside the images"}
        raise Question("captions lie in an annotation file and beside the images", "annotations", meanings)


def _above(folder: Path, answers: Answers) -> list[Annotation]:
    """Annotation files beside a folder of bare photos: whether they are meant is for the user to say."""
    if answers.get("annotations") == "none":
        return []
    found = [a for a in annotations_below(folder.parent, 0)[0] if _names_images_of(a, folder)]
    if found and "annotations" not in answers:
        meanings = {str(a.path): "it names images of this folder" for a in found} | {"none": "photos without captions"}
        raise Question(f"{folder.name} holds no captions, and a file beside it does", "annotations", meanings)
    return found


def _names_images_of(annotation: Annotation, folder: Path) -> bool:
    names = annotation.images
    if annotation.kind == "table":
        try:
            table = read_table(annotation.path, {})
            names = table.cells(columns_of(table, annotation.path, {})[0])
        except ValueError:  # a question of its own: it is asked when the file is chosen
            return True
    return any((base / name).is_file() for base in (folder, folder.parent) for name in names[:50])
