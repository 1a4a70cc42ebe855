"""Data as the authors of a paper laid them out: the shipped recipe that reads them, with its paths set to where they lie."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from itm.choices import apply_overrides
from itm.config import Part, Recipe, parse_recipe, resolve_recipe
from itm.data.detect.finding import Finding
from pipelines.cli import RECIPES

SETS = {"f30k": r"f(lickr)?30k", "coco": r"(ms)?coco"}
FIRST = {"precomp": "sgr-{}", "pairs_json": "cusa-clip-b32-{}", "uniter_db": "iais-{}-base"}
ALSO = {
    "precomp": ("saf-{}", "sgraf-{} (the ensemble of both)", "scan-{}-t2i-avg and its other variants", "uarda-{}"),
    "pairs_json": ("cusa-clip-l14-{}",),
    "uniter_db": ("iais-{}-large",),
}
CUSA_LIST = re.compile(r"new_(train|val|test)\.json")


@dataclass(frozen=True)
class Published:
    """A shipped recipe for data that were found; `overrides` say where they lie and what this machine cannot do."""

    recipe: str
    also: tuple[str, ...]
    overrides: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The recipe as one YAML file, with what it extends inside it."""
        choices = resolve_recipe(RECIPES / f"{self.recipe}.yaml").written
        apply_overrides(choices, list(self.overrides))
        parse_recipe(choices, self.recipe)
        head = f"# The shipped recipe {self.recipe}, on data that `itm init` found; `itm recipes {self.recipe}` tells of each value.\n"
        return head + yaml.safe_dump(choices, sort_keys=False, allow_unicode=True, width=140)


def published(finding: Finding, gpu: bool) -> Published | None:
    """None where the data are nobody's in particular: the layout and the name of the set decide."""
    source = finding.source
    if source is None or source.kind not in FIRST or not _as_authors_have_it(source, finding.splits):
        return None
    said = json.dumps(source.options)
    held = [name for name, pattern in SETS.items() if re.search(rf"(^|[^a-z0-9]){pattern}([^a-z0-9]|$)", said, re.IGNORECASE)]
    if not held or (len(held) > 1 and source.kind != "uniter_db"):
        return None
    name = FIRST[source.kind].format(held[0])
    recipe = resolve_recipe(RECIPES / f"{name}.yaml").recipe
    wanted, notes = _places(source, recipe)
    if source.kind == "uniter_db" and not all(_all_there(value) for key, value in wanted.items() if key.startswith("data.source.")):
        return None
    if recipe.train.use_gpu and not gpu:
        wanted["train.use_gpu"] = False
        notes.append("there is no GPU here: train.use_gpu is false, and the published training takes days on a CPU")
    notes += [f"{other} is here too: iais-{other}-base" for other in held[1:]]
    given = tuple(f"{key}={json.dumps(value)}" for key, value in wanted.items())
    return Published(name, tuple(other.format(held[0]) for other in ALSO[source.kind]), given, tuple(notes))


def _as_authors_have_it(source: Part, splits: Mapping[str, str]) -> bool:
    options = source.options
    if source.kind == "precomp":
        return {"train", "dev", "test"} <= set(splits.values()) and "captions_per_image" not in options
    if source.kind == "pairs_json":
        lists = options["path"]
        return isinstance(lists, dict) and all(CUSA_LIST.fullmatch(Path(str(place)).name) for place in lists.values())
    return True


def _databases(held: Mapping[str, object], text: Path) -> dict[str, object]:
    """The databases that a recipe names below data/uniter, below the folder that holds this text database's folder."""

    def moved(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: moved(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [moved(inner) for inner in value]
        return str(text.parent.parent / str(value).removeprefix("data/uniter/"))

    return {key: moved(value) for key, value in held.items()}


def _all_there(value: object) -> bool:
    if isinstance(value, Mapping | list):
        return all(map(_all_there, value.values() if isinstance(value, Mapping) else value))
    return Path(str(value)).exists()


def _places(source: Part, recipe: Recipe) -> tuple[dict[str, object], list[str]]:
    """Keys whose values are elsewhere than the recipe has them, and what has to be known of what is missing."""
    options, notes = dict(source.options), []
    wanted: dict[str, object] = {}
    if source.kind == "precomp":
        folder = Path(str(options["path"]))
        vocab = Path(str(recipe.text.path)).name
        found = next(
            (p for p in (folder / vocab, *(up / "vocab" / vocab for up in (folder.parent, folder.parent.parent))) if p.exists()), None
        )
        wanted["text.path"] = str(found) if found else None
        if found is None:
            notes.append(f"no {vocab} near {folder}: the vocabulary is made of the training captions, so released weights do not fit it")
    if source.kind == "pairs_json":
        folder = Path(str(next(iter(options["path"].values())))).parent
        options = {"path": str(folder / "new_{split}.json"), "image_root": options["image_root"]}
        teacher = folder / "train_unicom.npy"
        wanted["teachers.image.options.path"] = str(teacher)
        if not teacher.exists():
            notes.append(f"no {teacher}, the image teacher's vectors: name another teacher under teachers.image")
    held = {} if recipe.data.source is None else recipe.data.source.options
    if source.kind == "uniter_db":
        options = _databases(held, Path(str(next(iter(options["texts"].values())))))
    wanted |= {f"data.source.options.{key}": value for key, value in options.items() if key in held}
    start, text = recipe.train.start, recipe.text.path
    if start and not Path(start).exists():
        notes.append(f"train.start={start} is not here: docs/checkpoints.md says where it is from")
    if text and "text.path" not in wanted:
        notes.append(f"{text} is asked of the hub: for a folder of your own say text.path=...")
    return wanted, notes
