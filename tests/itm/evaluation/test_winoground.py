"""Winoground: its three scores on examples worked out by hand, and from the published files to the command's result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import itm
from itm.data.sources.winoground import Winoground
from itm.evaluation.dataset import Names, encode_split, names_of
from itm.evaluation.protocols import Scored, run_protocol
from itm.evaluation.scoring import score_matrix
from pipelines.cli import stage_main
from tests.support.packing_here import pack_here
from tests.support.packing_here import recipe as packing_recipe
from tests.support.pictures import picture, write
from tests.support.small_split import small_run

# Scores of one row by image and caption, and whether text, image and group are right, from the definitions of the paper:
# text: s(c0,i0) > s(c1,i0) and s(c1,i1) > s(c0,i1); image: s(c0,i0) > s(c0,i1) and s(c1,i1) > s(c1,i0); group: both.
WORKED = [
    ([[0.9, 0.1], [0.2, 0.8]], (True, True, True)),
    ([[0.5, 0.4], [0.6, 0.7]], (True, False, False)),  # the right caption for both images, but caption 0 prefers image 1
    ([[0.5, 0.6], [0.4, 0.7]], (False, True, False)),  # the right image for both captions, but image 0 prefers caption 1
    ([[0.1, 0.9], [0.8, 0.2]], (False, False, False)),
    ([[0.5, 0.5], [0.5, 0.5]], (False, False, False)),  # says nothing, so it is right in nothing
    ([[0.9, 0.9], [0.1, 0.95]], (False, True, False)),
]


def test_the_three_scores_are_those_of_rows_worked_out_by_hand():
    scores = torch.full((12, 12), 7.0)  # what lies outside of the rows is never read
    for row, (block, _) in enumerate(WORKED):
        scores[2 * row : 2 * row + 2, 2 * row : 2 * row + 2] = torch.tensor(block)
    outcome = run_protocol("winoground", Scored(scores, names_of(12, torch.arange(12))))
    text, image, group = (100 * np.mean([right[n] for _, right in WORKED]) for n in range(3))
    want = {"winoground_text": text, "winoground_image": image, "winoground_group": group}
    assert outcome.metrics == pytest.approx(want)
    assert outcome.counts == {"rows": 6}
    assert set(outcome.chance) == set(outcome.metrics)


def test_equal_scores_are_wrong_unless_ties_are_optimistic():
    world = Scored(torch.ones(2, 2), names_of(2, torch.arange(2)))
    assert set(run_protocol("winoground", world).metrics.values()) == {0.0}
    assert set(run_protocol("winoground", world, "optimistic").metrics.values()) == {100.0}


def test_random_scores_come_out_at_chance():
    torch.manual_seed(0)
    outcome = run_protocol("winoground", Scored(torch.randn(1600, 1600), names_of(1600, torch.arange(1600))))
    for name, value in outcome.metrics.items():
        assert value == pytest.approx(outcome.chance[name], abs=5)  # three deviations of 800 rows


def test_rows_are_told_by_their_metadata_in_whatever_order_they_lie():
    metas = [{"pair": "b", "side": 1}, {"pair": "a", "side": 0}, {"pair": "b", "side": 0}, {"pair": "a", "side": 1}]
    names = Names(list("wxyz"), list("0123"), torch.arange(4), image_metas=metas)
    scores = torch.eye(4)
    scores[1, 1] = -1  # row a is wrong
    assert run_protocol("winoground", Scored(scores, names)).metrics["winoground_group"] == 50
    with pytest.raises(ValueError, match=r"1 of 2 rows lack one of their two images, the first is row a"):
        run_protocol("winoground", Scored(torch.eye(3), Names(list("wxy"), list("012"), torch.arange(3), image_metas=metas[:3])))
    with pytest.raises(ValueError, match="some images have no `pair` and `side`"):
        run_protocol("winoground", Scored(scores, replace(names, image_metas=[*metas[:3], {}])))
    with pytest.raises(ValueError, match="an image has one caption, but 2 images have 3"):
        run_protocol("winoground", Scored(torch.ones(2, 3), names_of(2, torch.tensor([0, 1, 1]))))


ROWS = [
    {"id": n, "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1", "caption_0": f"a dog {n} on a cat",
     "caption_1": f"a cat {n} on a dog", "tag": "Noun", "collapsed_tag": "Object", "num_main_preds": 1} for n in range(3)
]  # fmt: skip


def published(folder: Path, rows: list[dict]) -> str:
    """examples.jsonl and the folder of images, as they are published."""
    names = {row[f"image_{side}"] for row in ROWS for side in (0, 1)}
    write(folder, {f"images/{name}.png": picture(n) for n, name in enumerate(sorted(names))})
    write(folder, {"examples.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    return str(folder / "examples.jsonl")


def test_the_published_files_are_packed_and_scored_by_the_command(tmp_path, monkeypatch):
    recipe = small_run(tmp_path)
    packed = packing_recipe(tmp_path / "winoground", "winoground", {"path": published(tmp_path / "raw", ROWS)})
    assert pack_here(packed, monkeypatch)["test"].captions == 6
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert stage_main("evaluate", ["-c", str(tmp_path / "r.yaml"), "--protocol", "winoground", f"data.root={tmp_path}/winoground"]) == 0
    result = json.loads(Path(recipe.folder, "evaluation-winoground.json").read_text())
    matcher = itm.load_matcher(f"{recipe.folder}/matcher")
    seen = encode_split(matcher, f"{tmp_path}/winoground/test")
    assert [(meta["pair"], meta["side"], meta["tag"]) for meta in seen.names.image_metas][:3] == [
        ("0", 0, "Noun"),
        ("0", 1, "Noun"),
        ("1", 0, "Noun"),
    ]
    scores = score_matrix(matcher, seen.images, seen.captions).numpy()
    blocks = [scores[2 * row : 2 * row + 2, 2 * row : 2 * row + 2] for row in range(3)]
    want = 100 * np.mean([b[0, 0] > b[0, 1] and b[1, 1] > b[1, 0] for b in blocks])
    assert result["metrics"]["winoground_text"] == pytest.approx(want)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{k: v for k, v in ROWS[0].items() if k != "caption_1"}], r"examples\.jsonl line 1 has no `caption_1`; it has id, image_0"),
        ([ROWS[0] | {"caption_0": " "}], r"line 1: image_0 and caption_0 are texts, not 'ex_0_img_0' and ' '"),
        ([ROWS[0], ROWS[1] | {"image_1": "ex_0_img_0"}], r"line 2: the image ex_0_img_0 stands at .*line 1 already"),
        ([ROWS[0], ROWS[1] | {"id": 0}], r"examples\.jsonl: the id 0 stands there twice"),
        ([], r"examples\.jsonl holds no row"),
    ],
)
def test_rows_that_lack_something_or_stand_twice_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        Winoground(published(tmp_path, rows))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl cannot be read"):
        Winoground(str(tmp_path / "nowhere.jsonl"))
    path = published(tmp_path, ROWS)
    (tmp_path / "images" / "ex_1_img_1.png").unlink()
    assert [item.reason.rpartition("/")[2] for item in Winoground(path).records("test") if hasattr(item, "reason")] == [
        "ex_1_img_1.png cannot be read: No such file or directory"
    ]
