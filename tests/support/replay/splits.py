"""Data folders in the authors' published layout, read by our source, tokenised by their vocabularies, scored and ranked.

A case is a folder with README.json of kind run_splits, arrays.npz, the folders that `results` names, and vocab/<name>_vocab.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from itm.data.records import Record
from itm.data.sources.precomp import Precomp
from itm.data.text import WordVocabulary
from itm.evaluation.dataset import names_of
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.protocols import Scored, folds
from itm.evaluation.scoring import score_matrix
from itm.importers.scan import load_scan
from itm.types import Captions, Images
from tests.support.replay import Case, Check

DEV_IMAGES = 1000  # the authors' loaders give split dev 5,000 captions whatever its files hold: recipes say data.val_images
FOLDS = 5


def find(root: Path) -> Iterator[Case]:
    for readme in sorted(root.rglob("README.json")):
        about = json.loads(readme.read_text())
        if isinstance(about, dict) and about.get("kind") == "run_splits" and (readme.parent / "arrays.npz").exists():
            yield Case(f"runs/{readme.parent.name}", partial(run, readme.parent, about))


def run(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays = dict(np.load(folder / "arrays.npz"))
    for name, results in about["results"].items():
        parts: list[dict[str, torch.Tensor]] = [{}, {}, {}]
        for key, value in arrays.items():
            owner, _, rest = key.partition("|")
            if owner == name and rest[:2] in ("0|", "1|", "2|"):
                parts[int(rest[0])][rest[2:]] = torch.from_numpy(value)
        matcher = load_scan({"model": [part for part in parts if part], "opt": results["options"]})
        source = Precomp(str(folder / name))
        source.regions_dtype = "fp32"
        reader = WordVocabulary.from_json(folder / "vocab" / f"{name}_vocab.json", max_length=128, clean=False)
        for split, size in about["sizes"][name].items():
            yield Check(f"{name} {split}", [source.count(split)], [size["images"]], atol=0.0, rtol=0.0)
        for title, want in results.items():
            if title != "options":
                yield from _result(f"{name} {title}", want, (matcher, source, reader), arrays)


def _result(title: str, want: dict[str, Any], parts: tuple[Any, Precomp, WordVocabulary], arrays: dict[str, np.ndarray]) -> Iterator[Check]:
    matcher, source, reader = parts
    name, _, result = title.partition(" ")
    split = result.split(" ")[0]
    images, captions = _read(source, split, reader, DEV_IMAGES if split == "dev" else None)
    count, size = (FOLDS, len(images) // FOLDS) if "fold5" in result else (1, len(images))
    owner = captions.image_id
    with torch.no_grad():
        sides = matcher.encode_images(images), matcher.encode_captions(captions)
        scores = torch.full((len(images), len(captions)), -torch.inf)
        for first in range(0, size * count, size):
            own = ((owner >= first) & (owner < first + size)).nonzero()[:, 0]
            scores[first : first + size, own] = score_matrix(matcher, sides[0][first : first + size], sides[1][own])
    stored = f"{name}|{result.replace(' ', '_')}|"
    shown = arrays[f"{stored}scores_first_20_images_100_captions"]
    yield Check(f"{title} scores", scores[: shown.shape[0], : shown.shape[1]].numpy(), shown, atol=5e-6, rtol=0.0)
    total = float(scores[scores > -torch.inf].double().sum())
    if count == 1:
        yield Check(f"{title} sum of scores", [total], arrays[f"{stored}score_sum"], atol=0.0, rtol=1e-6)
    found = (
        folds(Scored(scores, names_of(len(images), owner)), count)[0]
        if count > 1
        else retrieval_metrics(scores, (torch.arange(len(images)), owner))
    )
    yield from _recalls(title, found, want)


def _recalls(title: str, found: dict[str, float], want: dict[str, Any]) -> Iterator[Check]:
    """R@K within what scores off by 1e-6 allow; median rank equal; mean rank to 5e-3, since captions of the same tokens tie."""
    bounds = want["if_every_score_moves_by_1e-6"]
    got = np.array([found[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)])
    yield Check(f"{title} recalls", got, np.clip(got, bounds["low"], bounds["high"]), atol=1e-9, rtol=0.0)
    for way in ("i2t", "t2i"):
        yield Check(f"{title} {way} median rank", [found[f"{way}_medr"]], [want[way][3]], atol=0.0, rtol=0.0)
        yield Check(f"{title} {way} mean rank", [found[f"{way}_meanr"]], [want[way][4]], atol=5e-3, rtol=0.0)


def _read(source: Precomp, split: str, reader: WordVocabulary, limit: int | None) -> tuple[Images, Captions]:
    records = [record for record in source.records(split, 0, limit) if isinstance(record, Record)]
    regions = np.stack([record.regions.features for record in records if record.regions is not None])
    tokens, mask = reader([caption.text for record in records for caption in record.captions])
    owner = torch.tensor([number for number, record in enumerate(records) for _ in record.captions])
    return Images(torch.arange(len(records)), regions=torch.from_numpy(regions)), Captions(tokens, mask, owner)
