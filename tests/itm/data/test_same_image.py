"""Data sets of one sample a caption: copies of an image are positives in training and one image in evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itm.config import Text
from itm.data.collate import to_batch
from itm.data.fetch import Work
from itm.data.pairs import Pairs
from itm.data.plan import Plan
from itm.data.preprocess import ImageInput, Inputs
from itm.data.same_image import image_number, image_of
from itm.data.shards import Sample, read_manifest, read_samples
from itm.data.text import build_tokenizer
from itm.evaluation.dataset import EncodedSplit, Names, encode_split, told_apart
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.scoring import score_matrix
from itm.matchers.folder import build_matcher
from itm.types import positives_from_ids
from tests.support.small_split import MODEL
from tests.support.tars import png, tar_of

TEXTS = ["a red dog", "two cats", "a kite", "a boat", "a bird", "a bike"]
SAYS = ["runs", "sleeps", "waits"]


def split_of(folder: Path, way: str) -> str:
    """Six images with three captions each: joined in one sample, or a sample a caption that names its image in another way."""
    members: list[tuple[str, bytes]] = []
    for image, text in enumerate(TEXTS):
        captions = [f"{text} {say}" for say in SAYS]
        if way == "joined":
            said = {"image_id": image, "captions": captions}
            members += [(f"{image}.png", png(image, 64)), (f"{image}.json", json.dumps(said).encode())]
            continue
        for number, caption in enumerate(captions):
            key = f"{image * len(SAYS) + number:05d}"
            stated = {"id": {"image_id": image}, "bytes": {}, "id is a key": {"image_id": f"{image * len(SAYS):05d}"}}[way]
            bytes_of = png(image, 64) if number == 0 or way == "bytes" else again(png(image, 64))
            members += [(f"{key}.png", bytes_of), (f"{key}.json", json.dumps({"caption": caption, **stated}).encode())]
    (folder / way).mkdir()
    half = len(members) // 6 * 4  # the copies of one image lie in two shards
    tar_of(folder / way / "00000.tar", members[:half])
    tar_of(folder / way / "00001.tar", members[half:])
    return str(folder / way)


def again(data: bytes) -> bytes:
    """The same picture in other bytes."""
    import io

    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "PNG", compress_level=0)
    return out.getvalue()


def small_inputs() -> Inputs:
    return Inputs(ImageInput(size=64, crop="squash"), build_tokenizer(Text(), [f"{t} {s}" for t in TEXTS for s in SAYS]))


def encoded(folder: Path, way: str) -> tuple[EncodedSplit, dict[str, float]]:
    torch.manual_seed(0)
    matcher = build_matcher(MODEL, small_inputs())
    split = encode_split(matcher, split_of(folder, way))
    return split, retrieval_metrics(score_matrix(matcher, split.images, split.captions), split.positives)


@pytest.mark.parametrize("way", ["id", "bytes", "id is a key"])
def test_field_case_16_one_sample_a_caption_is_evaluated_as_the_joined_samples_are(tmp_path: Path, way: str) -> None:
    joined, expected = encoded(tmp_path, "joined")
    split, found = encoded(tmp_path, way)
    assert found == expected
    assert split.copies == 12
    assert joined.copies == 0
    assert split.names.texts == joined.names.texts
    assert torch.equal(split.names.caption_image, joined.names.caption_image)
    torch.testing.assert_close(split.images.vector, joined.images.vector)
    torch.testing.assert_close(split.captions.vector, joined.captions.vector)
    split.names.check()


@pytest.mark.parametrize("way", ["joined", "id", "bytes", "id is a key"])
def test_field_case_16_copies_of_an_image_are_positives_of_each_other_in_training(tmp_path: Path, way: str) -> None:
    folder = split_of(tmp_path, way)
    manifest = read_manifest(folder)
    pairs = Pairs(folder, manifest, Plan.of(manifest, seed=0, batch=18), small_inputs(), {})
    table = pairs(Work(0, 0, 0))
    texts = [text for rows in ([f"{t} {s}" for s in SAYS] for t in TEXTS) for text in rows]
    by_key = {f"{row:05d}": row // 3 for row in range(18)} | {str(row): row for row in range(6)}
    image = torch.tensor([by_key[key] for key in table["key"].to_pylist()])
    assert len(texts) == len(image)
    batch = to_batch(table)
    positives = positives_from_ids(batch.images.image_id, batch.captions.image_id)
    assert torch.equal(positives, image[:, None] == image[None, :])
    assert torch.equal(batch.images.pixels[0], batch.images.pixels[int((image == image[0]).nonzero()[-1])])


def test_an_id_that_the_json_states_is_believed_and_bytes_are_asked_where_there_is_none(tmp_path: Path) -> None:
    said = [{}, {}, {"image_id": 7}, {"image_id": 7}, {"image_id": "7"}, {"image_id": None}, {"image_id": "key"}]
    images = [1, 1, 2, 3, 4, 1, 1]
    tar_of(
        tmp_path / "0.tar",
        [
            member
            for n, (seed, meta) in enumerate(zip(images, said, strict=True))
            for member in ((f"{n}.png", png(seed)), (f"{n}.json", json.dumps({"caption": "a cup", **meta}).encode()))
        ],
    )
    names = [image_of(s) for s in read_samples(str(tmp_path / "0.tar")) if isinstance(s, Sample)]
    assert [names.index(name) for name in names] == [0, 0, 2, 2, 2, 0, 6]


def test_ids_of_two_splits_know_nothing_of_each_other_and_bytes_do() -> None:
    stated, bare = Sample("k", b"x", None, [], {"image_id": 3}), Sample("k", b"x", None, [], {"image_id": "k"}, states_image=False)
    assert image_number(stated, "s3://a") != image_number(stated, "s3://b")
    assert image_number(bare, "s3://a") == image_number(bare, "s3://b")
    numbers = {image_number(Sample("k", None, None, [], {"image_id": n}), "a") for n in range(1000)}
    assert len(numbers) == 1000
    assert min(numbers) >= 0 and max(numbers) <= np.iinfo(np.int64).max


def test_field_case_18_keys_that_restart_in_each_shard_are_told_apart() -> None:
    names = Names(
        ["0", "1", "0"], ["0#0", "1#0", "1#1", "0#0"], torch.tensor([0, 1, 1, 2]), image_shards=["a/00.tar", "a/00.tar", "a/01.tar"]
    )
    found = told_apart(names)
    assert found.image_keys == ["00/0", "1", "01/0"]
    assert found.caption_ids == ["00/0#0", "1#0", "1#1", "01/0#0"]
    found.check()


def test_field_case_18_a_split_whose_keys_restart_is_evaluated_and_trained_on_whole(tmp_path: Path) -> None:
    for shard in range(2):
        members = [
            (f"{n:04d}.{end}", data)
            for n in range(3)
            for end, data in (("png", png(3 * shard + n, 64)), ("txt", f"{TEXTS[3 * shard + n]} runs".encode()))
        ]
        tar_of(tmp_path / f"{shard:05d}.tar", members)
    split = encode_split(build_matcher(MODEL, small_inputs()), str(tmp_path))
    assert split.names.image_keys == [f"{shard:05d}/{n:04d}" for shard in range(2) for n in range(3)]
    split.names.check()
    manifest = read_manifest(str(tmp_path))
    batch = to_batch(Pairs(str(tmp_path), manifest, Plan.of(manifest, seed=0, batch=6), small_inputs(), {})(Work(0, 0, 0)))
    assert torch.equal(positives_from_ids(batch.images.image_id, batch.captions.image_id), torch.eye(6, dtype=torch.bool))
