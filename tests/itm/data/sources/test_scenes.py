"""Scenes: the world has the density it was designed for, its truth is exact, and every record stands alone."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from itm.data.sources.scene_language import holds, say
from itm.data.sources.scene_world import COLOURS, SHAPES, WORLDS, form_of, slots_of
from itm.data.sources.scenes import Scenes, relevance, scene_truth_caption, scene_truth_image


@pytest.fixture(scope="module")
def main_test():
    return list(Scenes("main").records("test"))


def true_of(scene: dict, form: dict) -> bool:
    """The obvious oracle: try both assignments in plain Python."""

    def fits(said, thing):
        return all(s in (None, t) for s, t in zip(said, thing, strict=True))

    if form["relation"] is not None:
        return form["relation"] == scene["relation"] and fits(form["a"], scene["a"]) and fits(form["b"], scene["b"])
    return any(fits(form["a"], x) and fits(form["b"], y) for x, y in itertools.permutations((scene["a"], scene["b"])))


def test_the_density_of_positives_is_that_of_the_published_table(main_test):
    captions = [c.meta for r in main_test for c in r.captions]
    rel = relevance([r.meta for r in main_test], captions)
    assert rel.sum(0).mean() == pytest.approx(4.7, abs=0.4)
    assert rel.sum(1).mean() == pytest.approx(23.5, abs=2)
    for kind, mean in {"full": 1.4, "drop1": 3.4, "drop2": 14.9, "norel": 2.5}.items():
        chosen = rel[:, [c["kind"] == kind for c in captions]]
        assert chosen.sum(0).mean() == pytest.approx(mean, rel=0.1)
    assert len({r.meta["scene_id"] for r in main_test}) == pytest.approx(831, abs=40)


def test_captions_have_the_designed_vocabulary_and_lengths(main_test):
    lengths = [len(c.text.split()) for r in main_test for c in r.captions]
    words = {w for r in main_test for c in r.captions for w in c.text.split()}
    assert (min(lengths), max(lengths)) == (5, 14)
    assert np.mean(lengths) == pytest.approx(9.6, abs=0.3)
    assert 48 <= len(words) <= 54
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", c.text) for r in main_test for c in r.captions)


def test_relevance_agrees_with_trying_every_assignment(main_test):
    some = main_test[:60]
    captions = [c.meta for r in some for c in r.captions]
    expected = [[true_of(r.meta["scene"], c["form"]) for c in captions] for r in some]
    assert np.array_equal(relevance([r.meta for r in some], captions), expected)
    assert all(expected[i][5 * i + n] for i in range(60) for n in range(5))


def test_the_words_of_a_caption_say_its_logical_form(main_test):
    converse = {"right": "left", "below": "above", "under": "above", "lower": "above"}
    straight = {"left": "left", "above": "above", "over": "above", "higher": "above"}
    for caption in (c for r in main_test[:100] for c in r.captions if c.meta["kind"] == "full"):
        words = caption.text.split()
        word = next(w for w in words if w in converse or w in straight)
        assert caption.meta["form"]["relation"] == (converse | straight)[word]
        synonyms = {"crimson": "red", "emerald": "green", "azure": "blue", "golden": "yellow", "violet": "purple", "amber": "orange"}
        colours = [synonyms.get(w, w) for w in words if synonyms.get(w, w) in synonyms.values()]
        assert colours == [caption.meta["form"][side][0] for side in ("ba" if word in converse else "ab")]


def test_a_record_is_the_same_whichever_slice_it_is_made_in():
    whole = list(Scenes("tiny", regions=True).records("train", 0, 12))
    part = list(Scenes("tiny", regions=True).records("train", 7, 9))
    for a, b in zip(whole[7:9], part, strict=True):
        assert (a.key, a.image, a.captions, a.meta) == (b.key, b.image, b.captions, b.meta)
        assert a.regions.to_npz() == b.regions.to_npz()
    other = next(Scenes("tiny", seed=1).records("train"))
    assert other.image != whole[0].image
    assert next(Scenes("tiny").records("val")).image != whole[0].image


def test_the_picture_shows_the_two_objects_in_their_boxes(main_test):
    rgb = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 225), "yellow": (240, 220, 50)}
    solid = 0
    for record in main_test[:80]:
        picture = np.asarray(Image.open(io.BytesIO(record.image)), float)
        assert picture.shape == (64, 64, 3)
        for (colour, shape), (x1, y1, x2, y2) in zip((record.meta["scene"][s] for s in "ab"), record.meta["boxes"], strict=True):
            assert 0 <= x1 < x2 <= 64
            assert 0 <= y1 < y2 <= 64
            if colour in rgb and shape != "ring":
                centre = picture[int((y1 + y2) / 2), int((x1 + x2) / 2)]
                assert np.abs(centre - rgb[colour]).max() < 20
                solid += 1
        (ax, ay), (bx, by) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in record.meta["boxes"])
        along, across = (bx - ax, by - ay) if record.meta["scene"]["relation"] == "left" else (by - ay, bx - ax)
        assert along > 20 > 6 > abs(across)
    assert solid > 50


def test_regions_are_standardised_and_hold_their_own_position():
    records = list(Scenes("main", regions=True).records("train", 0, 100))
    features = np.stack([r.regions.features for r in records]).astype(float)
    boxes = np.stack([r.regions.boxes for r in records]) / 64
    assert features.shape == (100, 6, 358)
    assert np.abs(features.mean((0, 1))).max() < 0.35
    assert features.std((0, 1)).max() < 1.5
    assert np.corrcoef(features[..., 337].ravel(), boxes[..., 0].ravel())[0, 1] > 0.999
    for record in records:  # two of the six cover the true objects
        overlaps = np.abs(record.regions.boxes[:, None] - np.array(record.meta["boxes"])[None]).max(-1)
        assert (overlaps.min(0) < 1.6).all()


def test_the_exact_image_teacher_is_the_share_of_equal_slots(main_test):
    vectors = np.stack([scene_truth_image(r.meta) for r in main_test[:40]])
    slots = np.stack([slots_of(r.meta["scene"]) for r in main_test[:40]])
    assert np.allclose(vectors @ vectors.T, (slots[:, None] == slots[None]).mean(-1), atol=1e-6)


def test_the_exact_caption_teacher_compares_the_sets_of_satisfying_scenes(main_test):
    captions = [c.meta for r in main_test[:6] for c in r.captions]
    scenes = WORLDS["main"].all_scenes()
    sets = [{i for i, s in enumerate(scenes) if true_of(form_of(s), c["form"])} for c in captions]
    vectors = np.stack([scene_truth_caption(c) for c in captions])
    expected = [[len(a & b) / (len(a) * len(b)) ** 0.5 for b in sets] for a in sets]
    assert np.allclose(vectors @ vectors.T, expected, atol=1e-6)


@pytest.mark.parametrize("world", ["equiv", "small"])
def test_in_an_equivalence_world_every_caption_means_exactly_one_scene(world: str):
    records = list(Scenes(world).records("test", 0, 30))
    assert all(c.meta["kind"] == "full" for r in records for c in r.captions)
    forms = np.stack([slots_of(c.meta["form"]) for r in records for c in r.captions])
    assert (holds(WORLDS[world].all_scenes(), forms).sum(0) == 1).all()


def test_the_worlds_have_their_sizes_and_scene_ids_invert():
    assert {n: (w.scenes, w.sizes) for n, w in WORLDS.items()} == {
        "main": (2592, (3000, 500, 1000)),
        "equiv": (512, (1500, 300, 600)),
        "small": (162, (1500, 300, 600)),
        "tiny": (512, (200, 50, 50)),
    }
    scenes = WORLDS["main"].all_scenes()
    assert [WORLDS["main"].scene_id(s) for s in scenes[::97]] == list(range(0, 2592, 97))
    assert np.array_equal(slots_of(form_of(scenes[1234])), scenes[1234])
    assert Counter(len(list(Scenes("tiny", n_val=3).records(s))) for s in ("val", "test")) == {3: 1, 50: 1}
    with pytest.raises(ValueError, match="unknown world"):
        Scenes("huge")


def test_every_colour_and_shape_has_words_of_its_own():
    said = {}
    for colour, shape in itertools.product(range(len(COLOURS)), range(len(SHAPES))):
        for seed in range(20):
            slots = np.array([colour, shape, colour, shape, -1])
            said.setdefault((colour, shape), set()).add(
                re.split(r" (?:and|next to|together with) ", say(slots, np.random.default_rng(seed)))[-1]
            )
    assert sum(map(len, said.values())) == len(set().union(*said.values()))
