"""ECCV Caption, CxC and the COCO recalls against the code of the eccv-caption package, on all of COCO 5K, with made-up vectors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from itm.evaluation.dataset import names_of
from itm.evaluation.protocols import Scored, run_protocol

DEEP = 400  # more than the positives of any query, so that mAP@R sees all of its ranks


@pytest.fixture(scope="module")
def package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asks for a faster json
        metrics = pytest.importorskip("eccv_caption", reason="pip install eccv-caption==0.1.0").Metrics()
    return metrics


@pytest.fixture(scope="module")
def coco(package: Any) -> tuple[Scored, dict[int, list[int]], dict[int, list[int]]]:
    """5,000 images in the package's order, five captions each; and both rankings as it wants them."""
    images = list(dict.fromkeys(package.coco_gts["t2i"][caption][0] for caption in np.asarray(package.coco_ids).tolist()))
    captions = [caption for image in images for caption in package.coco_gts["i2t"][image][:5]]
    owners = torch.tensor([row for row, image in enumerate(images) for _ in package.coco_gts["i2t"][image][:5]])
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(len(images), 24, generator=generator)
    right = left[owners] + 0.8 * torch.randn(len(captions), 24, generator=generator)
    scores = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T
    names = names_of(len(images), owners, [str(i) for i in images], [str(c) for c in captions])
    return Scored(scores, names), ranked(scores, images, captions), ranked(scores.T, captions, images)


def ranked(scores: Tensor, queries: list[int], gallery: list[int]) -> dict[int, list[int]]:
    ids = torch.tensor(gallery)
    return {query: ids[row].tolist() for query, row in zip(queries, scores.topk(DEEP).indices, strict=True)}


@pytest.mark.e2e
def test_our_numbers_are_those_of_the_package(package: Any, coco: Any) -> None:
    scored, i2t, t2i = coco
    ranking = {"i2t": i2t, "t2i": t2i}
    for protocol, prefix, recalls in (
        ("coco-5k", "", package.coco_5k_recalls),
        ("coco-1k-5fold", "", package.coco_1k_recalls),
        ("cxc", "cxc_", package.cxc_recalls),
        ("eccv", "eccv_", package.eccv_recalls),
    ):
        ours = run_protocol(protocol, scored).metrics
        for k in (1, 5, 10):
            theirs = recalls(ranking, "all", K=k)
            assert [ours[f"{way}_{prefix}r{k}"] for way in ranking] == pytest.approx([100 * theirs[way] for way in ranking], abs=1e-9)
    theirs = package.eccv_metrics(ranking, "all")
    for way in ranking:
        assert ours[f"{way}_eccv_map_at_r"] == pytest.approx(theirs["eccv_map_at_r"][way], abs=1e-9)
        assert ours[f"{way}_eccv_r_precision"] == pytest.approx(theirs["eccv_rprecision"][way], abs=1e-9)
        assert 0.05 < ours[f"{way}_eccv_map_at_r"] < 0.9
