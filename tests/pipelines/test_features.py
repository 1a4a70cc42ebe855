"""The features stage: regions lie where the photo has them, captions stay, damage is named, a kill costs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from itm.config import Recipe, parse_recipe
from itm.data.preprocess import read_regions
from itm.data.records import Caption, Record, Regions
from itm.data.shards import read_manifest
from pipelines import features as stage
from pipelines.contract import stages_of
from pipelines.estimates import split_of
from pipelines.featuring import of_photos
from pipelines.plan import lines_of
from tests.support.making_features import HIGH, WIDE, photo, photos, samples, without_ray
from tests.support.small_teaching import pack

ENCODER = "tests.support.mean_colours:MeanColours"


def recipe(root: Path, **features: object) -> Recipe:
    asked = {"photos": str(root / "photos"), "encoder": {"kind": ENCODER}, "batch_size": 2, **features}
    data = {"root": str(root / "regions"), "image_size": 32, "crop": "squash", "val_split": "", "test_split": "train", "image": "regions"}
    return parse_recipe({"name": "t", "output": str(root / "runs"), "model": {"kind": "scan"}, "data": data, "features": asked})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return without_ray(monkeypatch)


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_every_photo_gets_regions_and_keeps_its_captions_and_its_bytes(tmp_path, here):
    photos(tmp_path / "photos")
    (manifest,) = stage.features(recipe(tmp_path)).values()
    before, after = samples(tmp_path / "photos" / "train"), samples(tmp_path / "regions" / "train")
    assert manifest.samples == 6
    assert [(s.key, s.image, s.captions, s.meta) for s in before] == [(s.key, s.image, s.captions, s.meta) for s in after]
    held = Regions.from_npz(after[0].regions or b"")
    assert (held.features.shape, held.features.dtype, held.width, held.height) == ((16, 3), np.float16, WIDE, HIGH)


def test_the_cells_lie_where_the_photo_has_them(tmp_path, here):
    photos(tmp_path / "photos", 1)
    stage.features(recipe(tmp_path))
    held = Regions.from_npz(samples(tmp_path / "regions" / "train")[0].regions or b"")
    assert held.boxes is not None
    assert held.boxes[0].tolist() == [0, 0, WIDE / 4, HIGH / 4]
    assert held.boxes[-1].tolist() == [WIDE * 3 / 4, HIGH * 3 / 4, WIDE, HIGH]
    coloured = held.features[:, 2] > 0.5
    centres = (held.boxes[:, :2] + held.boxes[:, 2:]) / 2
    assert coloured.tolist() == ((centres[:, 0] < WIDE / 2) & (centres[:, 1] < HIGH / 2)).tolist()


def test_a_box_gets_the_mean_of_the_cells_it_covers(tmp_path, here):
    photos(tmp_path / "photos", 2)
    plain = recipe(tmp_path)
    stage.features(plain)
    grid = [Regions.from_npz(s.regions or b"").features.astype(np.float32) for s in samples(tmp_path / "regions" / "train")]
    boxes = tmp_path / "boxes.jsonl"
    said = [
        {"image_id": f"k{n}", "boxes": [[0, 0, WIDE / 2, HIGH / 4], [WIDE / 8, 0, WIDE / 2, HIGH / 4]], "conf": [0.9, 0.5]} for n in (0, 1)
    ]
    boxes.write_text("\n".join(map(json.dumps, said)))
    stage.features(recipe(tmp_path, boxes=str(boxes)), overwrite=True)
    for cells, sample in zip(grid, samples(tmp_path / "regions" / "train"), strict=True):
        held = Regions.from_npz(sample.regions or b"")
        assert held.conf is not None and held.conf.tolist() == [np.float32(0.9), np.float32(0.5)]
        want = [cells[:2].mean(0), (cells[0] / 2 + cells[1]) / 1.5]
        assert np.abs(held.features.astype(np.float32) - want).max() < 2e-3
        assert read_regions(sample.regions or b"", 4)["boxes"][0].tolist()[:4] == [0, 0, 0.5, 0.25]


def test_boxes_outside_the_photo_are_left_out_with_a_count(tmp_path, here):
    photos(tmp_path / "photos", 2)
    boxes = tmp_path / "boxes.jsonl"
    good, outside, empty = [0, 0, 10, 10], [0, 0, WIDE + 9, 10], [5, 5, 5, 9]
    rows = [{"image_id": "k0", "boxes": [good, outside, empty]}, {"image_id": "k1", "boxes": [good]}]
    boxes.write_text("\n".join(map(json.dumps, rows)))
    asked = recipe(tmp_path, boxes=str(boxes))
    (manifest,) = stage.features(asked).values()
    row = json.loads((tmp_path / "regions" / "train" / "quarantine.jsonl").read_text())
    assert (row["key"], row["what"]) == ("k0", "member")
    assert row["reason"].startswith("2 boxes lie outside its 96 x 64 pixels")
    assert manifest.samples == 2
    assert "1 images lost boxes" in stage.flow_line(str(tmp_path / "regions" / "train"), manifest)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"image_id": "other", "boxes": [[0, 0, 5, 5]]}], "is of other photos: it names none of the 2 in the first shard"),
        ([{"image_id": "k0", "boxes": [[0, 0, 5, 5]]}], "1 of 2 photos rejected, more than data.max_reject_rate=0.01; the first: k1"),
        ([{"image_id": "k0", "boxes": [[0, 0, 5]]}], "line 1"),
        ([{"image_id": "k0", "boxes": [[0, 0, 5, 5]]}] * 2, "line 2: image 'k0' comes a second time"),
        (
            [{"image_id": "k0", "boxes": [[90, 60, 500, 500]]}, {"image_id": "k1", "boxes": [[0, 0, 5, 5]]}],
            "none of its 1 boxes lies inside",
        ),
    ],
)
def test_boxes_that_cannot_be_used_are_refused_by_name(tmp_path, here, rows, reason):
    photos(tmp_path / "photos", 2)
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        stage.features(recipe(tmp_path, boxes=str(boxes)))


def test_a_stage_that_was_stopped_goes_on_and_ends_with_the_same_bytes(tmp_path, here):
    for name in ("whole", "torn"):
        photos(tmp_path / name / "photos")
    stage.features(recipe(tmp_path / "whole"))
    stage.features(recipe(tmp_path / "torn"))
    folder = tmp_path / "torn" / "regions" / "train"
    for lost in ("manifest.json", "mean.npy", "00001.index.json", "00002.tar"):
        (folder / lost).unlink()
    (folder / "00002.tar.part").write_bytes(b"half")
    here.clear()
    stage.features(recipe(tmp_path / "torn"))
    assert [Path(uri).name for uri in here] == ["00001.tar", "00002.tar"]
    (folder / "00002.tar.part").unlink(missing_ok=True)
    assert bytes_of(folder) == bytes_of(tmp_path / "whole" / "regions" / "train")
    here.clear()
    stage.features(recipe(tmp_path / "torn"))
    assert not here


def test_a_changed_photo_makes_its_shard_again_and_no_other(tmp_path, here):
    photos(tmp_path / "photos")
    asked = recipe(tmp_path)
    stage.features(asked)
    assert stage.featured(asked) is not None
    records = [Record(f"k{n}", "train", [Caption(f"c{n}", "new")], photo((9, 9, 9)), "png") for n in range(2)]
    keep = read_manifest(str(tmp_path / "photos" / "train"))
    pack(tmp_path / "other", records, 2)
    changed = read_manifest(str(tmp_path / "other" / "train")).shards[0]
    (tmp_path / "photos" / "train" / "00000.tar").write_bytes((tmp_path / "other" / "train" / "00000.tar").read_bytes())
    manifest = keep.model_copy(update={"shards": [changed, *keep.shards[1:]]})
    (tmp_path / "photos" / "train" / "manifest.json").write_text(manifest.model_dump_json())
    assert stage.featured(asked) is None
    here.clear()
    stage.features(asked)
    assert [Path(uri).name for uri in here] == ["00000.tar"]
    assert samples(tmp_path / "regions" / "train")[0].captions[0].text == "new"


def test_features_of_other_choices_are_not_mixed_with_these(tmp_path, here):
    photos(tmp_path / "photos", 2)
    stage.features(recipe(tmp_path))
    other = recipe(tmp_path, keep_images=False)
    with pytest.raises(ValueError, match=r"holds shards with features of other choices \(keep_images differ\)"):
        stage.features(other)
    stage.features(other, overwrite=True)
    assert samples(tmp_path / "regions" / "train")[0].image is None


def test_a_photo_that_cannot_be_decoded_is_listed_with_its_captions(tmp_path, here):
    records = [
        Record("good", "train", [Caption("a", "x")], photo((9, 9, 9)), "png"),
        Record("bad", "train", [Caption("b", "y")], b"no photo", "png"),
    ]
    pack(tmp_path / "photos", records)
    asked = recipe(tmp_path)
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"max_reject_rate": 0.5})})
    (manifest,) = stage.features(asked).values()
    row = json.loads((tmp_path / "regions" / "train" / "quarantine.jsonl").read_text())
    assert (row["key"], row["captions"], manifest.samples, manifest.rejected) == ("bad", 1, 1, 1)
    assert "2 images = 1 with features + 1 rejected, 2 captions = 1 kept + 1 rejected" in stage.flow_line(
        str(tmp_path / "regions" / "train"), manifest
    )


def test_the_mean_is_that_of_the_photos(tmp_path, here):
    photos(tmp_path / "photos", 5)
    asked = recipe(tmp_path)
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"regions_dtype": "fp32"})})
    stage.features(asked)
    means = [Regions.from_npz(s.regions or b"").features.mean(0) for s in samples(tmp_path / "regions" / "train")]
    assert np.abs(np.load(tmp_path / "regions" / "train" / "mean.npy") - np.mean(means, 0)).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"photos": None}, "set features.photos"),
        ({"boxes": "x.jsonl"}, "needs data.crop=squash"),
        ({"encoder": None}, "set features.encoder"),
        ({"encoder": {"kind": "convv", "options": {}}}, "did you mean 'conv'"),
    ],
)
def test_choices_that_cannot_be_are_refused(tmp_path, here, change, reason):
    photos(tmp_path / "photos", 2)
    asked = recipe(tmp_path, **change)
    if change.get("boxes"):
        asked = asked.model_copy(update={"data": asked.data.model_copy(update={"crop": "center"})})
    with pytest.raises(ValueError, match=reason):
        stage.features(asked)


def test_region_shards_need_a_folder_of_their_own(tmp_path):
    asked = recipe(tmp_path)
    same = asked.model_copy(update={"data": asked.data.model_copy(update={"root": str(tmp_path / "photos")})})
    with pytest.raises(ValueError, match="region shards need a folder of their own"):
        stage.features(same)


def test_packing_goes_to_the_photos_and_comes_before_features(tmp_path):
    asked = recipe(tmp_path)
    source = parse_recipe(
        asked.model_dump(mode="json", exclude_unset=True)
        | {"data": {**asked.data.model_dump(exclude_unset=True), "source": {"kind": "scenes", "options": {}}}}
    )
    assert [c.stage for c in stages_of(source)][:3] == ["pack", "features", "train"]
    assert of_photos(source).data.root == str(tmp_path / "photos")
    pack_contract, features_contract = stages_of(source)[:2]
    assert pack_contract.writes(source)[0].startswith(str(tmp_path / "photos"))
    assert features_contract.writes(source)[0].startswith(str(tmp_path / "regions"))
    assert pack_contract.reads(source) == []


def test_the_plan_says_what_features_will_cost_before_they_are_made(tmp_path, here):
    photos(tmp_path / "photos")
    asked = recipe(tmp_path)
    said = "\n".join(lines_of(asked, only="features"))
    assert "makes   train: regions of about 6 images, 3 shards" in said
    split = split_of(asked, "train")
    stage.features(asked)
    assert [Regions.from_npz(data).features.shape for data, _ in split.rows[:2]] == [(16, 3)] * 2
    made = split_of(asked, "train")
    assert (split.images, split.captions, split.rows[0]) == (made.images, made.captions, made.rows[0])
    assert abs(split.size - made.size) / made.size < 0.3  # tars of a few bytes are mostly padding
    assert "done    train 6 images" in "\n".join(lines_of(asked, only="features"))


@pytest.mark.e2e
def test_a_killed_stage_ends_with_the_bytes_of_one_that_was_not(tmp_path, monkeypatch, ray_local):
    """Through Ray, by actors; the other half without it."""
    photos(tmp_path / "photos", 60)
    asked = recipe(tmp_path, batch_size=1)
    (tmp_path / "r.json").write_text(asked.model_dump_json(exclude_unset=True))
    folder = tmp_path / "regions" / "train"
    killed = subprocess.Popen(
        [sys.executable, "-m", "pipelines.features", "-c", str(tmp_path / "r.json")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.index.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(3)  # orphaned workers finish or die
    left = {f: os.stat(f).st_ino for f in folder.glob("*.index.json")}
    assert 0 < len(left) < 30, "killed half-way"
    assert not (folder / "manifest.json").exists()
    stage.features(asked)
    assert {f: os.stat(f).st_ino for f in left} == left, "what was done is not done again"
    shutil.copytree(tmp_path / "photos", tmp_path / "whole" / "photos")
    without_ray(monkeypatch)
    stage.features(recipe(tmp_path / "whole", batch_size=1))
    assert bytes_of(folder) == bytes_of(tmp_path / "whole" / "regions" / "train")
