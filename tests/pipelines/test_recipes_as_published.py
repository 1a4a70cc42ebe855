"""One recipe of each family runs as shipped on data laid out as its authors published it; `tests/system` runs all of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import itm
from itm.data.manifest import Manifest
from itm.data.records import Regions
from itm.data.shards import Sample, read_manifest, read_samples
from tests.support.as_published import MAY_CHANGE, run, working_folder
from tests.support.authors_layouts import DEV, TEST, TRAIN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working_folder(tmp_path_factory.mktemp("authors")) as made:
        yield made


@pytest.mark.parametrize("name", ["scan-coco-i2t-lse", "uarda-f30k", "cusa-saf-coco", "cusa-clip-b32-f30k", "iais-coco-large"])
def test_a_recipe_of_each_family_runs_as_shipped_on_the_authors_layout(name: str, folder: Path) -> None:
    recipe, result, registered = run(name)
    assert math.isfinite(result["metrics"]["rsum"])
    assert result["protocol_name"] == recipe.evaluation.protocol
    assert (result["split"], registered.name) == (recipe.data.test_split, name)
    counts = {split: read_manifest(f"{recipe.data.root}/{split}").samples for split in (recipe.data.train_split, recipe.data.val_split)}
    assert list(counts.values()) == [TRAIN, DEV]
    assert result["counts"]["captions"] == 5 * TEST


def test_an_ensemble_recipe_evaluates_and_registers_its_members_as_shipped(folder: Path) -> None:
    for member in ("cusa-sgr-f30k", "cusa-saf-f30k"):
        run(member)
    _, result, registered = run("cusa-sgraf-f30k")
    assert result["score_type"] == "mean of SGR + SAF scores, fp32"
    together = itm.load_matcher(registered.uri)
    assert [member.kind for member in together.averaged] == ["sgr", "saf"]
    assert together.encode_captions(together.inputs.captions(["a dog"])).uni is not None, "the uni-modal heads of both came along"


def samples(split: str) -> list[Sample]:
    manifest: Manifest = read_manifest(split)
    return [s for shard in manifest.shards for s in read_samples(f"{split}/{shard.name}") if isinstance(s, Sample)]


def test_float32_features_reach_the_shards_as_published(folder: Path) -> None:
    run("scan-f30k-t2i-avg")
    published = np.load("data/f30k_precomp/dev_ims.npy")
    stored = np.stack([Regions.from_npz(s.regions).features for s in samples("data/f30k/dev") if s.regions])
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, published)


def test_the_word_pieces_of_iais_come_back_as_its_captions(folder: Path) -> None:
    run("iais-f30k-base")
    texts = {caption.id: caption.text for s in samples("data/uniter/f30k-shards/test") for caption in s.captions}
    owners = json.loads(Path("data/uniter/txt_db/itm_flickr30k_test_base-cased.db/txt2img.json").read_text())
    assert texts.keys() == owners.keys()
    assert all(text and "[" not in text for text in texts.values())


@pytest.mark.parametrize("key", ["method.options.margin", "data.val_split", "data.shuffle_pairs", "evaluation.protocol", "train.optimizer"])
def test_what_makes_a_run_the_published_one_may_not_be_overridden(key: str) -> None:
    assert not any(re.fullmatch(may, key) for may in MAY_CHANGE)
