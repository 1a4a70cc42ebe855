"""Each validation of a run can log how far relations of words and of regions differ, on the images that its recalls are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import itm
from itm.config import Part, Recipe
from itm.data.manifest import Manifest, write_manifest
from itm.data.records import Caption, Record, Regions
from itm.data.shards import read_manifest, read_samples, write_shard
from itm.evaluation.relations import isd_of_split
from itm.tracking.runs import Tracker, client
from pipelines.training.job import Job
from pipelines.training.preparation import prepare
from pipelines.training.worker import work
from tests.support.noise_split import small_split
from tests.support.small_training import recipe

pytest_plugins = ["tests.support.registry_fixtures"]

UNITER = {"hidden": 16, "layers": 1, "heads": 2, "positions": 12, "region_dim": 3, "init_std": 0.25}


def asked(root: Path, relations: list[str], model: Part | None = None, **data: Any) -> Recipe:
    data = {"image": "regions", "max_regions": 3, "val_images": 10, **data}
    chosen = recipe(root, data=data, batch_size=3, steps=2, validate_every=1, checkpoint_every=2, log_every=2)
    evaluation = chosen.evaluation.model_copy(update={"relations": relations})
    return chosen.model_copy(update={"model": model or Part(kind="uniter", options=UNITER), "evaluation": evaluation})


def annotated(root: Path, name: str) -> None:
    """A split whose captions name two entities, by the characters of their first and last word."""
    rows = []
    for sample in read_samples(str(root / name / "00000.tar")):
        captions = []
        for caption in sample.captions:
            first, last = caption.text.split()[0], caption.text.split()[-1]
            spans = [[0, len(first)], [len(caption.text) - len(last), len(caption.text)]]
            captions.append(Caption(caption.id, caption.text, {"entities": [{"spans": [s], "regions": [n]} for n, s in enumerate(spans)]}))
        regions = Regions.from_npz(sample.regions)
        rows.append(Record(sample.key, name, captions, sample.image, "png", regions))
    write_manifest(str(root / name), Manifest(split=name, source="test", shards=[write_shard(str(root / name / "00000.tar"), rows)]))


def prepared(chosen: Recipe) -> Job:
    return prepare(chosen, read_manifest(f"{chosen.data.root}/train"))


def test_the_distances_of_every_validation_are_those_of_its_weights_on_its_images(registry: Path, tmp_path: Path) -> None:
    small_split(tmp_path / "shards", "train", regions=True)
    small_split(tmp_path / "shards", "val", shards=1, samples=12, regions=True)
    annotated(tmp_path / "shards", "val")
    job = prepared(asked(tmp_path, ["isd", "isda"]))
    with Tracker.start("tests", "run") as tracker:
        job = replace(job, run_id=tracker.run_id, tracking_uri=tracker.uri)
    work(job, torch.device("cpu"), lambda *said: None)
    matcher, split = itm.load_matcher(f"{job.folder}/matcher"), f"{job.recipe.data.root}/val"
    want = isd_of_split(matcher, split, False, limit=10).metrics | isd_of_split(matcher, split, True, limit=10).metrics
    assert len(want) == 6 and want != isd_of_split(matcher, split, False).metrics | isd_of_split(matcher, split, True).metrics
    history = {name: client(job.tracking_uri).get_metric_history(job.run_id, f"val/{name}") for name in want}
    best = max(client(job.tracking_uri).get_metric_history(job.run_id, "val/rsum"), key=lambda seen: (seen.value, -seen.step)).step
    for name, value in want.items():
        assert [seen.step for seen in history[name]] == [1, 2]
        assert history[name][best - 1].value == pytest.approx(value, rel=1e-5)


def test_what_cannot_be_measured_is_refused_before_the_training(registry: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        small_split(tmp_path / "shards", name, regions=True)
    with pytest.raises(ValueError, match=r"no caption of its first shard names two entities.*pack it with flickr30k_entities"):
        prepared(asked(tmp_path, ["isda"]))
    with pytest.raises(ValueError, match=r"evaluation.relations are measured in validations, and data.val_split is empty"):
        prepared(asked(tmp_path, ["isd"], val_split=""))
    dual = recipe(tmp_path).model
    with pytest.raises(ValueError, match="IAIS relates words and image parts in one space"):
        prepared(asked(tmp_path, ["isd"], dual, image="pixels"))
