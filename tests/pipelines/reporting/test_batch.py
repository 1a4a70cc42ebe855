"""The pictures of a batch: the pairs that are drawn, their teachers' vectors from the stores, and the reasons where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from itm.config import Part, parse_recipe
from itm.data.preprocess import ImageInput, Inputs
from itm.data.sidecar import read_sidecar
from itm.data.text import WordVocabulary
from itm.evaluation.scoring import score_matrix
from itm.matchers.folder import build_matcher
from itm.teachers.stores import store_for
from pipelines.reporting.batch import batch_of, drawn
from pipelines.reporting.pictures import steps_per_epoch
from pipelines.teach import teach
from tests.support import pair_world
from tests.support.small_split import MODEL
from tests.support.small_teaching import pack, scenes

pytest_plugins = ["tests.support.teaching_fixtures"]
CPU = torch.device("cpu")
TEACHERS = {name: {"kind": f"scenes_{name}", "options": {"world": "tiny"}} for name in ("image", "text")}
CUSA = {"itc": {"tau": 0.07}, "csa": {"weight": 1.0, "student": "itc", "teacher": 0.05}, "usa": False}


def recipe_of(root: Path, **given: Any):
    data = {"root": str(root), "test_split": "train"}
    choices = {"name": "t", "model": MODEL.model_dump(), "data": data, "teachers": TEACHERS, "method": {"kind": "cusa", "options": CUSA}}
    return parse_recipe(choices | given)


def matcher_of(texts: list[str]) -> Any:
    torch.manual_seed(3)
    return build_matcher(MODEL, Inputs(ImageInput(size=64, crop="squash"), WordVocabulary.from_captions(texts))).eval()


def test_soft_labels_are_those_of_the_stored_vectors_at_the_temperatures_of_the_method(here: Path):
    rows = scenes(10)
    pack(here, rows)
    recipe = recipe_of(here)
    teach(recipe)
    matcher = matcher_of([caption.text for row in rows for caption in row.captions])
    told = batch_of(recipe, matcher, {"itc.tau": 0.2}, CPU)
    found = told["soft_labels"]["row"]
    pairs = drawn(str(here / "train"))
    assert sorted(sample.key for sample in pairs.samples) == sorted(row.key for row in rows)
    vectors, store = [], store_for(recipe, "train", "text")
    for sample, shard, caption in zip(pairs.samples, pairs.shards, pairs.captions, strict=True):
        assert caption in sample.captions
        sidecar = read_sidecar(f"{store.uri}/{Path(shard).stem}.arrow")
        names = list(zip(sidecar.keys, sidecar.captions or [], strict=True))
        vectors.append(sidecar.vectors[names.index((sample.key, caption.id))].astype(np.float64))
    unit = np.stack(vectors) / np.linalg.norm(np.stack(vectors), axis=1, keepdims=True)
    asked = [caption.id for caption in pairs.captions].index(found["caption"])
    target = np.exp(unit @ unit[asked] / 0.05)
    images = matcher.inputs.images([sample.image for sample in pairs.samples])
    scores = score_matrix(matcher, images, matcher.inputs.captions([found["text"]]))[:, 0].double().numpy()
    student = np.exp(scores / 0.2)
    for image in found["images"]:
        place = [sample.key for sample in pairs.samples].index(image["image"])
        assert image["target"] == pytest.approx(target[place] / target.sum(), abs=1e-3)
        assert image["student"] == pytest.approx(student[place] / student.sum(), abs=1e-5)
    assert (found["teacher_tau"], found["student_tau"]) == (pytest.approx(0.05), pytest.approx(0.2))
    assert set(told["soft_labels"]["histograms"]) == {"image", "text", "across"}
    assert told["lacks"] == ["similarities that the threshold parts: dual has no threshold: uarda has one"]


def test_what_a_run_lacks_for_the_pictures_of_a_batch_is_said_with_the_remedy(here: Path):
    rows = scenes(6)
    pack(here, rows)
    matcher = matcher_of([caption.text for row in rows for caption in row.captions])
    assert "run `itm teach` with this recipe" in batch_of(recipe_of(here), matcher, {}, CPU)["lacks"][0]
    plain = recipe_of(here, method={"kind": "matching"})
    wanted = "soft labels of a batch: method matching is trained on no soft labels: cusa with an image and a text teacher is"
    assert batch_of(plain, matcher, {}, CPU)["lacks"][0] == wanted


def test_the_maxima_of_a_threshold_are_of_pairs_of_the_test_split(tmp_path: Path):
    rows = pair_world.split(tmp_path / "test", count=8)
    matcher: Any = pair_world.matcher_of("uarda", rows)
    recipe = parse_recipe({"name": "t", "model": Part(kind="uarda").model_dump(), "data": {"root": str(tmp_path)}})
    found = batch_of(recipe, matcher, {}, CPU)["maxima"]
    assert (found["split"], found["pairs"]) == ("test", 8)
    assert found["directions"]["t2i"]["fragments"] > 8 and not matcher.training


def test_an_epoch_has_as_many_steps_as_its_captions_fill(tmp_path: Path):
    pack(tmp_path, scenes(10))  # 1 + 2 + 3 + 4 + 5 captions, twice
    recipe = recipe_of(tmp_path)
    assert steps_per_epoch(recipe, {"steps": 20, "rows_in": 120}) == 30 / 6
    assert steps_per_epoch(recipe, {}) is None
    assert steps_per_epoch(recipe_of(tmp_path / "gone"), {"steps": 20, "rows_in": 120}) is None
