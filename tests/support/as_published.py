"""A shipped recipe run as it stands on the authors' layout: pack, teach, train a few steps, evaluate by its protocol, register.

Only what is listed in `MAY_CHANGE` is overridden: where it computes, how long, how wide, and where weights and tokenizers lie. The test
sets have ten images, and so have the protocols here; stages run inside this process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from itm.config import Recipe, load_recipe
from itm.data.formats import Json
from itm.data.manifest import Receipt
from itm.evaluation.protocols import Coco1KFolds, Coco5K, Flickr30K
from pipelines import evaluate, pack, register, teach, train
from pipelines.cli import RECIPES
from pipelines.teaching import driver as teaching
from tests.support import authors_layouts
from tests.support.small_teaching import score_here

MAY_CHANGE = (
    r"train\.(use_gpu|workers|batch_size|steps|start)",
    r"(text|model\.options|teachers\.text\.options)\.path",
    r"model\.options\.((image|text)\.)?(in_width|width|word_dim|sim_dim|hidden|layers|heads|region_dim)",
    r"data\.(root|source\.options\.(path|image_root|texts|images|vocab))",
)
SHAPES = {
    "scan": ["image.in_width=8", "image.width=12", "text.word_dim=6", "text.width=12"],
    "uniter": ["hidden=16", "layers=2", "heads=2", "region_dim=8"],
}


def overrides(recipe: Recipe) -> list[str]:
    """What a run on a CPU with small weights needs."""
    size, kind = recipe.data.image_size, recipe.model.kind
    shapes = SHAPES.get(kind, SHAPES["scan"] + ["sim_dim=6"] * (kind in ("sgr", "saf", "sgraf")) if kind != "clip" else [])
    given = ["train.use_gpu=false", "train.workers=0", "train.batch_size=8", "train.steps=2", *(f"model.options.{s}" for s in shapes)]
    if kind == "clip":
        given += [f"model.options.path=weights/clip-{size}", f"text.path=weights/clip-{size}"]
    if kind == "uniter":
        given += ["train.steps=1", "train.start=weights/uniter", "text.path=weights/text"]
    return given + ["teachers.text.options.path=weights/text"] * (recipe.teachers.text is not None)


def as_published(name: str) -> Recipe:
    """The shipped recipe with `overrides`. Raises AssertionError for one that changes another key."""
    given = overrides(load_recipe(RECIPES / f"{name}.yaml"))
    foreign = [key for key in (item.partition("=")[0] for item in given) if not any(re.fullmatch(may, key) for may in MAY_CHANGE)]
    assert not foreign, foreign
    return load_recipe(RECIPES / f"{name}.yaml", given)


@contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    """The layouts below `folder`, in which runs start, with a tracking database of its own."""
    authors_layouts.everything(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setattr(pack, "_run_jobs", lambda recipe, jobs, title: {j.uri: Receipt.model_validate_json(pack.pack_shard(j)) for j in jobs})
        patch.setattr(teaching, "_score", score_here)
        for protocol in (Flickr30K, Coco5K, Coco1KFolds):
            patch.setattr(protocol, "images", authors_layouts.TEST)
        yield folder


def run(name: str) -> tuple[Recipe, Json, Any]:
    """(recipe, content of evaluation.json, what was registered); an ensemble's members must have run."""
    recipe = as_published(name)
    if recipe.evaluation.ensemble:
        return recipe, evaluate.evaluate(recipe), register.register(recipe)
    pack.pack(recipe)
    if recipe.teachers.image:
        teach.teach(recipe)
    train.train(recipe)
    result = evaluate.evaluate(recipe)
    return recipe, result, register.register(recipe)
