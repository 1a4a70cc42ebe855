"""The audit of an index: what is planted is found, counts are those of a slow loop, and nothing from data becomes markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from itm.evaluation.dataset import EncodedSplit, Names
from itm.report.audit_page import captions_page, duplicates_page, reach_page
from itm.retrieval.audit import duplicates, reach_and_fit
from itm.retrieval.index import Index
from itm.retrieval.sides import Identity
from itm.types import Encoded
from pipelines.cli import stage_main
from tests.support.disc_index import write_discs
from tests.support.registry_world import matcher_folder

HOSTILE = "<script>alert('x')</script>"


def index_of(images: torch.Tensor, captions: torch.Tensor, owners: list[int], folders: list[str] | None = None) -> Index:
    keys = [f"k{n}" for n in range(len(images))]
    shards = [f"data/{folder}/00000.tar" for folder in folders or ["test"] * len(images)]
    ids = [f"c{n}" for n in range(len(captions))]
    names = Names(keys, ids, torch.tensor(owners), [HOSTILE] * len(ids), image_shards=shards)
    return Index.of_split(EncodedSplit(Encoded(vector=images), Encoded(vector=captions), names), Identity("m", {"data": "f"}))


def random_index(images: int = 60, captions: int = 150) -> Index:
    torch.manual_seed(3)
    vectors = F.normalize(torch.randn(images, 8), dim=1)
    owners = torch.randint(images, (captions,))
    return index_of(vectors, F.normalize(vectors[owners] + 0.5 * torch.randn(captions, 8), dim=1), owners.tolist())


def test_groups_of_near_duplicates_are_those_of_a_slow_loop_and_leaks_come_first():
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(50, 8), dim=1)
    near = lambda row: F.normalize(vectors[row] + 0.02 * torch.randn(8), dim=0)
    vectors[10], vectors[20], vectors[40] = near(3), near(3), near(5)
    folders = ["train" if n < 30 else "test" for n in range(50)]
    found = duplicates(index_of(vectors, vectors[:0], [], folders), 0.98)
    assert [(g.rows, g.splits) for g in found.groups] == [([5, 40], ["train", "test"]), ([3, 10, 20], ["train"] * 3)]
    assert [g.rows for g in found.across] == [[5, 40]]
    assert found.groups[0].alike == pytest.approx(float(vectors[5] @ vectors[40]), abs=1e-6)
    with pytest.raises(ValueError, match="--alike 2 is no cosine"):
        duplicates(index_of(vectors, vectors[:0], []), 2)


def test_reach_and_misfits_are_those_of_a_slow_loop():
    index = random_index()
    reach, fit = reach_and_fit(index)
    times, wrong = [0] * 60, {}
    images, captions = index.images.read(slice(0, 60)).vector, index.captions.read(slice(0, 150)).vector
    for row in range(150):
        scores = [float(captions[row] @ image) for image in images]
        order = sorted(range(60), key=lambda n: -scores[n])
        for n in order[:10]:
            times[n] += 1
        own = int(index.names.caption_image[row])
        if order[0] != own:
            wrong[row] = (own, order[0], order.index(own))
    assert reach.times.tolist() == times
    assert reach.never == [n for n in range(60) if times[n] == 0]
    assert {m.caption: (m.own, m.other, m.before) for m in fit.misfits} == wrong
    gaps = [m.other_score - m.own_score for m in fit.misfits]
    assert gaps == sorted(gaps, reverse=True)


def test_an_image_that_every_caption_finds_is_a_hub():
    torch.manual_seed(0)
    images = F.normalize(torch.randn(400, 64), dim=1)
    centre = F.normalize(torch.ones(64), dim=0)
    images[7] = centre
    reach, _ = reach_and_fit(index_of(images, F.normalize(centre + 0.02 * torch.randn(100, 64), dim=1), list(range(100))))
    assert (7, 100) in reach.hubs
    assert len(reach.never) > 200
    assert reach.skewness > 1


def test_pages_count_all_and_make_no_markup_of_data():
    index = random_index()
    reach, fit = reach_and_fit(index)
    pages = [
        duplicates_page(index, duplicates(index, 0.5), lambda row: ""),
        reach_page(index, reach, lambda row: "data:image/jpeg;base64,AA=="),
        captions_page(index, fit, lambda row: ""),
    ]
    assert f"<b>{len(fit.misfits)}</b>" in pages[2]
    assert f"<b>{len(reach.never)}</b>" in pages[1]
    for page in pages:
        assert "<script" not in page
        assert page.count("<div") == page.count("</div>")
    assert "&lt;script&gt;" in pages[2]


def test_the_command_writes_a_page_each_with_the_photos(tmp_path: Path, capsys):
    folder = str(matcher_folder(tmp_path / "m", 2))
    train, test = write_discs(tmp_path / "train", ["red", "blue"]), write_discs(tmp_path / "test", ["red", "green"])
    pages = tmp_path / "pages"
    where = ["--output", str(tmp_path / "index"), "--workers", "0", "--report", str(pages), "--alike", "0.99"]
    assert stage_main("index", ["--model", folder, "--shards", train, test, *where]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\d+ groups of near duplicates \(cosine 0.99\), \d+ over several splits", said)
    assert sorted(path.name for path in pages.iterdir()) == ["captions.html", "duplicates.html", "reach.html"]
    assert "data:image/jpeg;base64," in (pages / "duplicates.html").read_text()
