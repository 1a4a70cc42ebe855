from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from itm.config import Text
from itm.data.pairs import Pairs, Work
from itm.data.pixels import decode
from itm.data.preprocess import ImageInput, Inputs, draw, fit
from itm.data.same_image import image_number
from itm.data.text import build_tokenizer
from tests.support.noise_split import every_sample, world


def whole_epoch(pairs: Pairs) -> list[pa.Table]:
    return [pairs(Work(step, 0, 0)) for step in range(pairs.fetch.plan.steps_per_epoch)]


def test_rows_equal_a_slow_walk_over_the_plan(tmp_path: Path) -> None:
    pairs = world(tmp_path)
    samples = every_sample(pairs)
    for step in (0, 3, pairs.fetch.plan.steps_per_epoch):  # the last is of the second epoch
        table = pairs(Work(step, 0, 0))
        for row, (shard, number) in enumerate(pairs.fetch.plan.batch_pairs(step, 0, 0).tolist()):
            sample, caption = [(s, c) for s in samples[shard] for c in s.captions][number]
            assert (table["key"][row].as_py(), table["caption"][row].as_py()) == (sample.key, caption.id)
            assert sample.image is not None
            pixels = np.array(table["pixels"][row].as_py(), np.uint8).reshape(16, 16, 3)
            np.testing.assert_array_equal(pixels, fit(decode(sample.image), 16, "center"))
            length = sum(table["token_mask"][row].as_py())
            assert table["tokens"][row].as_py()[:length] == pairs.inputs.captions([caption.text]).tokens[0].tolist()
            assert table["image_id"][row].as_py() == image_number(sample, pairs.fetch.split)
    assert table["step"].to_pylist() == [step] * 6


def test_an_epoch_gives_every_caption_once(tmp_path: Path) -> None:
    pairs = world(tmp_path, batch=4)
    seen = [c for table in whole_epoch(pairs) for c in table["caption"].to_pylist()]
    assert len(seen) == len(set(seen)) == pairs.fetch.plan.pairs // 4 * 4


def test_augmentation_follows_seed_epoch_and_key_wherever_it_runs(tmp_path: Path) -> None:
    pairs = world(tmp_path, ImageInput(size=16, crop="random", flip=True))
    again = pickle.loads(pickle.dumps(pairs))
    assert pairs(Work(2, 0, 0)).equals(again(Work(2, 0, 0)))
    table = pairs(Work(2, 0, 0))
    key = table["key"][0].as_py()
    data = next(s.image for shard in every_sample(pairs) for s in shard if s.key == key)
    assert data is not None
    ours = pairs.inputs.image_columns(data, draw(0, 0, key))["pixels"]
    np.testing.assert_array_equal(np.array(table["pixels"][0].as_py(), np.uint8), ours.reshape(-1))


def test_an_image_that_cannot_be_decoded_gives_its_place_to_the_next_good_pair(tmp_path: Path) -> None:
    whole, hurt = world(tmp_path / "a"), world(tmp_path / "b", broken=(4,))
    met = 0
    for step in range(whole.fetch.plan.steps_per_epoch):
        want, got = (p(Work(step, 0, 0)) for p in (whole, hurt))
        keys = want["key"].to_pylist()
        good = [k for k in keys if k != "k004"]
        for row, key in enumerate(keys):
            problem = got["problem"][row].as_py()
            if key == "k004":
                met += 1
                said = json.loads(problem)
                assert (said["key"], said["stage"]) == ("k004", "train")
                assert "cannot decode" in said["reason"]
                after = [k for k in keys[row:] + keys[:row] if k != "k004"]
                assert got["key"][row].as_py() == after[0]
            else:
                assert problem is None
                assert got["key"][row].as_py() == key
        assert len(got) == 6
        assert set(got["key"].to_pylist()) == set(good)
    assert met


def test_a_caption_without_words_is_rejected_alone(tmp_path: Path) -> None:
    pairs = world(tmp_path, wordless=True, batch=36)
    pairs.inputs = Inputs(pairs.inputs.image, build_tokenizer(Text(max_length=10, clean=True), ["a red thing"]))
    problems = [json.loads(p) for p in pairs(Work(0, 0, 0))["problem"].to_pylist() if p]
    assert [(p["key"], p["what"]) for p in problems] == [("k000", "caption")]


def test_a_batch_without_one_good_pair_is_an_error(tmp_path: Path) -> None:
    pairs = world(tmp_path, broken=tuple(range(24)))
    with pytest.raises(ValueError, match="not one of the 6 pairs of step 0"):
        pairs(Work(0, 0, 0))


def test_regions_are_read_padded_and_masked(tmp_path: Path) -> None:
    pairs = world(tmp_path, ImageInput(kind="regions", max_regions=4), regions=True)
    table = pairs(Work(0, 0, 0))
    for row, key in enumerate(table["key"].to_pylist()):
        number = int(key[1:])
        mask = table["mask"][row].as_py()
        assert sum(mask) == 2 + number % 2
        assert table["regions"][row].as_py() == [float(number * m) for m in mask for _ in range(3)]
