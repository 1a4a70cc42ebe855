"""The relation matrices of a pair against attention recomputed from the weights of the last layer, and against cosines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from itm.report.pair import explained, find_pair
from tests.support.pair_world import matcher_of, split

CPU = torch.device("cpu")


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_blocks_of_a_joint_matcher_are_head_means_of_attention_within_each_block(tmp_path: Path):
    rows = split(tmp_path / "test")
    matcher = matcher_of("uniter", rows)
    pair = find_pair(str(tmp_path / "test"), rows[1].key)
    told = explained(matcher, pair, CPU)["relations"]
    with torch.no_grad():
        images, captions = matcher.inputs.images([pair.image.regions]), matcher.inputs.captions([pair.caption.text])
        image, caption = matcher.encode_images(images), matcher.encode_captions(captions)
        joint = torch.cat([caption.parts[0], image.parts[0][image.mask[0]]])  # one layer: what it is given
        own = matcher.uniter.encoder.layer[0].attention.self
        queries, keys = (layer(joint).double().numpy().reshape(len(joint), 2, 6) for layer in (own.query, own.key))
    length, regions = len(caption.parts[0]), int(image.mask[0].sum())
    words, parts = range(1, length - 1), range(length, length + regions)
    blocks = {"LL": (words, words), "VV": (parts, parts), "LV": (words, parts), "VL": (parts, words)}
    for name, (asking, asked) in blocks.items():
        heads = [softmax(queries[asking, h] @ keys[asked, h].T / 6**0.5) for h in range(2)]
        np.testing.assert_allclose(np.array(told[name]), sum(heads) / 2, atol=2e-6, err_msg=name)
    assert told["words"] == pair.caption.text.split() and told["regions"] == regions and not told["cosines"]
    assert told["partner"] == np.array(told["LV"]).argmax(1).tolist()
    wanted = [[told["VV"][a][b] for b in told["partner"]] for a in told["partner"]]
    assert told["extracted"] == wanted


def test_the_distances_are_those_of_the_matrices_that_are_shown(tmp_path: Path):
    rows = split(tmp_path / "test")
    told = explained(matcher_of("uniter", rows), find_pair(str(tmp_path / "test"), rows[1].key), CPU)["relations"]
    a, b = np.array(told["LL"]), softmax(np.array(told["extracted"]))
    assert told["isd"]["L_singular"] == pytest.approx(((a - b) * (np.log(a) - np.log(b))).sum() / len(a), abs=1e-4)
    b = np.array(told["LV"]) @ np.array(told["VL"])
    assert told["isd"]["L_distributed"] == pytest.approx(((a - b) * (np.log(a) - np.log(b))).sum() / len(a), abs=1e-4)


def test_a_matcher_of_parts_gives_cosines_and_says_so_and_one_of_vectors_gives_the_reason_why_not(tmp_path: Path):
    rows = split(tmp_path / "test")
    pair = find_pair(str(tmp_path / "test"), rows[1].key)
    assert explained(matcher_of("scan", rows), pair, CPU)["relations"]["cosines"]
    dual = explained(matcher_of("dual", rows), pair, CPU)
    assert "relations" not in dual or dual["relations"]["cosines"]
    assert any(text.startswith("where the words look: dual") for text in dual["lacks"])
