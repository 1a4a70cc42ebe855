"""Image retrieval on labelled sets: recalls equal to a plain count in numpy, through packing and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import itm
from itm.data.records import Problem
from itm.evaluation.dataset import EncodedSplit, Names, encode_split
from itm.evaluation.image_retrieval import outcome_of
from itm.types import Encoded
from pipelines.cli import stage_main
from tests.support.label_layouts import all_four
from tests.support.packing_here import pack_here
from tests.support.packing_here import recipe as packing_recipe
from tests.support.small_split import small_run


def split(metas: list[dict[str, Any]], vectors: np.ndarray | torch.Tensor, **more: Any) -> EncodedSplit:
    keys = [f"k{n}" for n in range(len(metas))]
    names = Names(keys, [], torch.zeros(0, dtype=torch.int64), image_metas=metas)
    return EncodedSplit(Encoded(vector=torch.as_tensor(vectors).float()), Encoded(), names, **more)


def recall(queries: np.ndarray, asked: list[str], gallery: np.ndarray, labels: list[str], k: int, itself: bool) -> float:
    """Percent of queries with their label among the k nearest by cosine; itself: the query is a row of the gallery, and is left out."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, gallery)]
    hits = []
    for row, label in enumerate(asked):
        cosines = unit[1] @ unit[0][row]
        order = [n for n in np.argsort(-cosines, kind="stable") if not (itself and n == row)]
        hits.append(label in [labels[n] for n in order[:k]])
    return 100 * float(np.mean(hits))


def test_recalls_of_a_set_equal_a_count_in_numpy_and_each_set_is_a_gallery_of_its_own():
    draws = np.random.default_rng(0)
    vectors, marks = draws.standard_normal((90, 6)), [f"c{n % 15}" for n in range(60)] + [f"c{n % 10}" for n in range(30)]
    metas = [{"set": "sop" if n < 60 else "mine", "label": label} for n, label in enumerate(marks)]
    outcome = outcome_of(split(metas, vectors), "here")
    for k in (1, 10):
        assert outcome.metrics[f"i2i_sop_r{k}"] == pytest.approx(recall(vectors[:60], marks[:60], vectors[:60], marks[:60], k, True))
    for k in (1, 5, 10):
        assert outcome.metrics[f"i2i_mine_r{k}"] == pytest.approx(recall(vectors[60:], marks[60:], vectors[60:], marks[60:], k, True))
    assert outcome.metrics["i2i_sop_r1000"] == 100
    mean = (outcome.metrics["i2i_sop_r1"] + outcome.metrics["i2i_mine_r1"]) / 2
    assert outcome.metrics["i2i_mean_r1"] == pytest.approx(mean)
    assert outcome.chance["i2i_mine_r1"] == pytest.approx(100 * 2 / 29)
    assert outcome.counts == {"images": 90, "classes": 25, "queries": 90, "rejected": 0}
    assert "sop has 60 images of 15 classes, published figures are of 60,502 and 11,316" in outcome.protocol


def test_queries_are_asked_of_the_gallery_alone():
    draws = np.random.default_rng(1)
    vectors = draws.standard_normal((40, 4))
    roles, labels = ["query"] * 15 + ["gallery"] * 25, [f"c{n % 5}" for n in range(40)]
    vectors[:15] += 100  # queries lie beside each other: were they in the gallery, each would find another one
    outcome = outcome_of(split([{"set": "inshop", "label": a, "role": b} for a, b in zip(labels, roles, strict=True)], vectors), "here")
    for k in (1, 10, 20, 30):
        assert outcome.metrics[f"i2i_inshop_r{k}"] == pytest.approx(recall(vectors[:15], labels[:15], vectors[15:], labels[15:], k, False))
    assert outcome.counts["queries"] == 15
    assert "i2i_mean_r1" not in outcome.metrics


def test_uni_modal_vectors_are_compared_where_there_are_some():
    metas = [{"label": "a"}, {"label": "a"}, {"label": "b"}, {"label": "b"}]
    good, bad = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]])
    whole = split(metas, bad)
    whole = EncodedSplit(Encoded(vector=bad, uni=good), whole.captions, whole.names)
    assert outcome_of(whole, "here").metrics["i2i_images_r1"] == 100


def test_what_cannot_be_answered_is_named_with_the_set_and_what_was_rejected():
    lost = [Problem("k9", "00000.tar", "evaluate", "cannot decode image")]
    with pytest.raises(ValueError, match=r"here: image 'k1' has no label in its metadata; pack the set by the source `labelled`"):
        outcome_of(split([{"label": "a"}, {}], np.eye(2)), "here")
    alone = [{"set": "sop", "label": "a"}, {"set": "sop", "label": "a"}, {"set": "sop", "label": "b"}]
    with pytest.raises(
        ValueError, match=r"set sop: nothing can be found for 1 of 3 images, 1 were rejected; the first is 'k2': no other image"
    ):
        outcome_of(split(alone, np.eye(3), problems=lost), "here")
    asked = [{"set": "inshop", "label": "a", "role": "query"}, {"set": "inshop", "label": "b", "role": "gallery"}]
    with pytest.raises(ValueError, match=r"the first is 'k0': no other image of the gallery has its label 'a'"):
        outcome_of(split(asked, np.eye(2)), "here")
    with pytest.raises(ValueError, match="a set is called mean"):
        outcome_of(split([{"set": "mean", "label": "a"}] * 2, np.eye(2)), "here")


def test_the_four_sets_are_packed_and_judged_by_one_command_into_the_runs_folder(tmp_path: Path, monkeypatch, capsys):
    recipe = small_run(tmp_path)
    packed = packing_recipe(tmp_path / "image-sets", "labelled", {"sets": all_four(tmp_path / "raw")})
    assert pack_here(packed, monkeypatch)["test"].samples == 22
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    shards = str(tmp_path / "image-sets" / "test")
    asked = ["-c", str(tmp_path / "r.yaml"), "--protocol", "image-retrieval", "--shards", shards]
    assert stage_main("evaluate", asked) == 0
    result = json.loads(Path(recipe.folder, "evaluation-image-retrieval.json").read_text())
    seen = encode_split(itm.load_matcher(f"{recipe.folder}/matcher"), shards, bare=True)
    rows = [n for n, meta in enumerate(seen.names.image_metas) if meta["set"] == "cub"]
    vectors, labels = seen.images.vector.numpy()[rows], [seen.names.image_metas[n]["label"] for n in rows]
    assert result["metrics"]["i2i_cub_r1"] == pytest.approx(recall(vectors, labels, vectors, labels, 1, True))
    first = [result["metrics"][f"i2i_{name}_r1"] for name in ("cub", "sop", "inshop", "inaturalist")]
    assert result["metrics"]["i2i_mean_r1"] == pytest.approx(np.mean(first))
    assert result["sets"]["inshop"] == {"images": 7, "classes": 3, "queries": 3}
    assert (result["split"], result["protocol_name"]) == ("test", "image-retrieval")
    assert "mean_r1" in capsys.readouterr().out
    assert stage_main("evaluate", ["--protocol", "image-retrieval", "--shards", shards, "--model", f"{recipe.folder}/matcher"]) == 0
    assert f"{result['metrics']['i2i_mean_r1']:.2f}" in capsys.readouterr().out
