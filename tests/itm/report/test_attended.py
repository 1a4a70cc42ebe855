"""What the page is told of where words look: the matcher's own weights, and boxes where regions and patches lie in the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from itm.config import Part
from itm.data.preprocess import ImageInput, Inputs, framed
from itm.data.records import Record
from itm.data.sources.scenes import Scenes
from itm.data.text import WordVocabulary
from itm.evaluation.attention import spelled
from itm.evaluation.dataset import EncodedSplit, encode_split
from itm.matchers.folder import build_matcher
from itm.report.attended import attended
from tests.support.small_split import write_split

TEXT = {"kind": "gru", "word_dim": 8, "width": 12}


def split_of(folder: Path, form: ImageInput, image: dict[str, Any], kind: str = "scan") -> tuple[Any, EncodedSplit, list[Record]]:
    rows = [r for r in Scenes(world="tiny", n_test=6, regions=form.kind == "regions").records("test") if isinstance(r, Record)]
    write_split(folder, rows)
    inputs = Inputs(form, WordVocabulary.from_captions([caption.text for row in rows for caption in row.captions]))
    options = {"image": image, "text": TEXT} | ({} if kind == "scan" else {"width": 8})
    matcher = build_matcher(Part(kind=kind, options=options), inputs).eval()
    return matcher, encode_split(matcher, str(folder)), rows


def test_regions_come_with_their_boxes_and_the_weights_of_the_matcher_for_each_word(tmp_path: Path):
    form = ImageInput(kind="regions", max_regions=6, region_width=358)
    matcher, split, rows = split_of(tmp_path, form, {"kind": "regions", "in_width": 358, "width": 12})
    caption = int((split.names.caption_image == 4).nonzero()[0])
    (found,) = attended(matcher, split, [(4, caption)])
    held = rows[4].regions
    assert held is not None and held.boxes is not None
    torch.testing.assert_close(torch.tensor(found["boxes"]), torch.tensor(held.boxes[:6]) / held.width, atol=1e-4, rtol=0)
    assert (found["image"], found["text"], found["grid"]) == (rows[4].key, split.names.texts[caption], False)
    assert found["words"] == found["text"].split()[:12]
    alone = matcher.attention(
        matcher.encode_images(matcher.inputs.images([held.to_npz()])), matcher.encode_captions(matcher.inputs.captions([found["text"]]))
    )[0, 1:-1]
    torch.testing.assert_close(
        torch.tensor(found["weights"]), alone[: len(found["words"]), : len(found["boxes"])].detach(), atol=1e-4, rtol=0
    )


def test_patches_tile_the_part_of_the_image_that_the_matcher_sees(tmp_path: Path):
    matcher, split, _ = split_of(tmp_path, ImageInput(size=64, crop="squash"), {"kind": "conv", "image_size": 64})
    (found,) = attended(matcher, split, [(0, 0)])
    assert found["grid"] and len(found["boxes"]) == 16
    assert found["boxes"][0] == [0, 0, 0.25, 0.25] and found["boxes"][6] == [0.5, 0.25, 0.75, 0.5]
    assert all(len(row) == 16 and sum(row) == pytest.approx(1, abs=1e-3) for row in found["weights"])


def test_a_matcher_of_vectors_looks_nowhere(tmp_path: Path):
    matcher, split, _ = split_of(tmp_path, ImageInput(size=64, crop="squash"), {"kind": "conv", "image_size": 64}, kind="dual")
    assert attended(matcher, split, [(0, 0)]) == []


def test_a_centre_crop_leaves_the_middle_of_the_longer_side():
    assert framed(200, 100, 50, "center") == (0.25, 0.0, 0.75, 1.0)
    assert framed(200, 100, 50, "squash") == (0.0, 0.0, 1.0, 1.0)


def test_words_stand_at_their_tokens_and_start_and_end_are_none():
    vocabulary = WordVocabulary.from_captions(["a red box"])
    assert spelled(vocabulary, "a red zebra box") == ["", "a", "red", "<unk>", "box", ""]
