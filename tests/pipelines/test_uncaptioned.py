"""Photos without captions: packed, taught and searched; refused by name where captions are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from itm.config import Recipe, parse_recipe
from itm.data.formats import NewerFormat
from itm.data.manifest import parse_manifest
from itm.data.shards import read_manifest, read_samples, write_shard
from itm.data.sidecar import open_store
from pipelines import inspect, search
from pipelines.evaluate import evaluate
from pipelines.repair import repair
from pipelines.teaching import driver as teaching
from pipelines.train import train
from tests.support.packing_here import pack_here, quarantine, recipe
from tests.support.registry_world import matcher_folder, picture
from tests.support.small_split import records
from tests.support.small_teaching import score_here

COLOURS = ["red", "blue", "green", "black", "red", "blue"]


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Six photos of which one is broken, and a file that is none, packed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    photos = tmp_path / "photos"
    photos.mkdir()
    for n, colour in enumerate(COLOURS):
        (photos / f"{n}.png").write_bytes(picture(colour)[: 60 if n == 3 else None])
    (photos / "notes.pdf").write_bytes(b"%PDF")
    made = recipe(tmp_path / "shards", "imagefolder", {"path": str(photos)})
    pack_here(made, monkeypatch)
    return made


def test_field_case_photos_without_captions_what_was_read_was_packed_rejected_or_passed_over(choices: Recipe) -> None:
    manifest = read_manifest(f"{choices.data.root}/train")
    assert (manifest.samples, manifest.captions, manifest.rejected, manifest.format) == (5, 0, 1, "itm-2")
    assert [(row["key"], row["what"]) for row in quarantine(f"{choices.data.root}/train")] == [("notes.pdf", "member"), ("3", "sample")]
    samples = list(read_samples(f"{choices.data.root}/train/00000.tar"))
    assert [(s.key, s.captions) for s in samples] == [("0", []), ("1", []), ("2", [])]
    assert inspect.inspect(f"{choices.data.root}/train").problems == []
    clean = repair(f"{choices.data.root}/train", f"{choices.data.root}/clean")
    assert (clean.samples, clean.format) == (5, "itm-2")


def test_field_case_photos_without_captions_a_search_finds_the_images_that_scoring_each_finds(choices: Recipe, tmp_path: Path) -> None:
    folder = str(matcher_folder(tmp_path / "m", 2))
    for _ in range(2):  # the second time from the kept index
        found = search.search("a red circle", model=folder, shards=f"{choices.data.root}/train", k=9)
        assert sorted(hit.key for hit in found.hits) == ["0", "1", "2", "4", "5"]
        scores = {hit.key: hit.score for hit in found.hits}
        assert scores["0"] == pytest.approx(scores["4"])
        assert scores["1"] == pytest.approx(scores["5"])
        assert all(hit.captions == [] for hit in found.hits)
    assert "0" in str(found)
    assert "<figure>" in search.page(found)
    with pytest.raises(ValueError, match="have no captions, so none can be found"):
        search.search(image=str(tmp_path / "photos" / "0.png"), model=folder, shards=f"{choices.data.root}/train")


def test_an_image_teacher_scores_them(choices: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "_score", score_here)
    taught = parse_recipe(choices.model_dump() | {"teachers": {"image": {"kind": "statistics"}}})
    store = open_store(teaching.teach(taught)["image"])
    assert [key for shard in store.shards for key in store.sidecar(shard).keys] == ["0", "1", "2", "4", "5"]


def test_training_validation_and_evaluation_refuse_them_by_name_with_the_remedy(choices: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shards/train holds 5 images without captions.* not trained on; pack them with captions"):
        train(choices)
    with pytest.raises(ValueError, match="not evaluated; pack them with captions"):
        matcher = str(matcher_folder(tmp_path / "m", 2))
        evaluate(choices, matcher, split="train")
    write_shard(f"{choices.data.root}/said/00000.tar", records(4))
    swapped = parse_recipe(choices.model_dump() | {"data": choices.data.model_dump() | {"train_split": "said", "val_split": "train"}})
    with pytest.raises(ValueError, match="not validated on; .* or train without validation"):
        train(swapped)


def test_a_reader_of_format_one_is_told_that_it_cannot_read_them(choices: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{choices.data.root}/train/manifest.json"
    monkeypatch.setattr("itm.data.manifest.UNCAPTIONED", 1)
    with pytest.raises(NewerFormat, match="has format 2, this version reads up to 1"):
        parse_manifest(uri, Path(uri).read_bytes())
    assert json.loads(Path(uri).read_text())["format"] == "itm-2"
