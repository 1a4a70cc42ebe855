"""Golden retrieval numbers: recalls with every tie rule, ECCV metrics, image retrieval, fold means, and the COCO 5K hash worlds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from itm.evaluation.dataset import names_of
from itm.evaluation.metrics import KS, rank_queries, retrieval_metrics
from itm.evaluation.protocols import ECCV, CxC, Scored, folds, same_label_metrics
from tests.support.replay import Case, Check

# Their names for the two directions.
WAYS = {"txt": "i2t", "img": "t2i"}


def find(root: Path) -> Iterator[Case]:
    for path in sorted(root.rglob("*.npz")):
        arrays = _names(path)
        if {"sim", "img2txt_offsets", "img2txt_ids"} <= arrays:
            yield Case(f"retrieval/{path.stem}", partial(_recalls, path))
        elif {"self_feats", "query_feats", "gallery_feats"} <= arrays:
            yield Case(f"retrieval/{path.parent.name}/{path.stem}", partial(_image_retrieval, path))
        elif {"fold5_sims", "fold5_rows"} <= arrays:
            yield Case(f"retrieval/{path.parent.parent.name}/{path.parent.name}", partial(_sgraf_metrics, path))
        elif {"latent_values", "random_values", "metric_names"} <= arrays:
            yield from (Case(f"retrieval/{path.stem}/{kind}", partial(_hash_world, path, kind)) for kind in ("random", "latent"))
    for path in sorted(root.rglob("*.json")):
        if path.name != "README.json" and {"ranked", "positives", "expected"} <= _keys(path):
            yield Case(f"retrieval/eccv/{path.stem}", partial(_eccv, path))


def _names(path: Path) -> set[str]:
    with np.load(path, allow_pickle=False) as npz:
        return set(npz.files)


def _keys(path: Path) -> set[str]:
    content = json.loads(path.read_text())
    return set(content) if isinstance(content, dict) else set()


def _theirs(metrics: dict[str, float], names: Any) -> list[float]:
    mine = {f"{their}_{rest}": metrics[f"{our}_{rest}"] for their, our in WAYS.items() for rest in ("r1", "r5", "r10", "r_mean")}
    return [(mine | {"r_mean": metrics["r_mean"], "rsum": metrics["rsum"]})[name] for name in names]


def _recalls(path: Path) -> Iterator[Check]:
    about = json.loads((path.parent / "README.json").read_text())["cases"][path.stem]
    data = np.load(path)
    scores = torch.from_numpy(data["sim"])
    offsets, ids = data["img2txt_offsets"], torch.from_numpy(data["img2txt_ids"])
    positives = torch.zeros(scores.shape, dtype=torch.bool)
    positives[torch.from_numpy(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))), ids] = True
    rules = {"official": "stable_high_index_first", "pessimistic": "pessimistic", "optimistic": "optimistic"}
    got = {rule: retrieval_metrics(scores, positives, tie=rule) for rule in rules}
    for rule, name in rules.items():
        want = about[f"metrics_{name}"]
        yield Check(rule, _theirs(got[rule], want), list(want.values()), atol=1e-9, rtol=1e-12)
    want = about["metrics_official"]
    official = np.array(list(want.values()))
    if about["ties"]:
        low, high = (np.array(_theirs(got[rule], want)) for rule in ("pessimistic", "optimistic"))
        yield Check("between", (low - 0.005 <= official) & (official <= high + 0.005), np.ones(len(official), bool))
    else:
        yield Check("rounded", np.round(_theirs(got["pessimistic"], want), 2), official, atol=0.0101, rtol=0)


def _image_retrieval(path: Path) -> Iterator[Check]:
    data = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    one = same_label_metrics(data["self_feats"], data["self_labels"])
    yield Check("one set", one["r1"], data["self_rank1"].item(), atol=1e-9)
    two = same_label_metrics(data["query_feats"], data["query_labels"], (data["gallery_feats"], data["gallery_labels"]))
    yield Check("query, gallery", two["r1"], data["query_gallery_rank1"].item(), atol=1e-9)


def _sgraf_metrics(path: Path) -> Iterator[Check]:
    data = np.load(path)
    for name in sorted({key.partition("_")[0] for key in data.files if key.endswith("_sims")} - {"fold5"}):
        scores = torch.from_numpy(data[f"{name}_sims"])
        truth = (torch.arange(len(scores)), torch.arange(scores.shape[1]) // (scores.shape[1] // len(scores)))
        metrics = retrieval_metrics(scores, truth)
        for way, rows, ids in (("i2t", scores, truth), ("t2i", scores.T, truth[::-1])):
            yield Check(f"{name} {way}", [metrics[f"{way}_{m}"] for m in ("r1", "r5", "r10", "medr", "meanr")], data[f"{name}_{way}"])
            yield Check(f"{name} {way} ranks", rank_queries(rows, ids).best.double(), data[f"{name}_{way}_ranks"])
            yield Check(f"{name} {way} top1", rows.argmax(1).double(), data[f"{name}_{way}_top1"])
        yield Check(f"{name} rsum", metrics["rsum"], data[f"{name}_rsum"])
    scores = torch.from_numpy(data["fold5_sims"])
    mean, _ = folds(Scored(scores, names_of(len(scores), torch.arange(scores.shape[1]) // 5)), 5)
    columns = [f"{way}_{m}" for way in ("i2t", "t2i") for m in ("r1", "r5", "r10", "medr", "meanr")]
    yield Check("fold mean", [mean[c] for c in (*columns, "i2t_r_mean", "t2i_r_mean", "rsum")], data["fold5_mean"])


def _eccv(path: Path) -> Iterator[Check]:
    """Lists cut at K become scores: the listed ids descend, the rest share the lowest score."""
    case = json.loads(path.read_text())
    ids = sorted({i for row in (*case["ranked"].values(), *case["positives"].values()) for i in row})
    column = {name: place for place, name in enumerate(ids)}
    scores = torch.full((len(case["positives"]), len(ids)), -1.0)
    truth = torch.zeros(scores.shape, dtype=torch.bool)
    for row, (query, positives) in enumerate(case["positives"].items()):
        listed = [column[i] for i in case["ranked"][query]]
        scores[row, listed] = torch.arange(len(listed), 0, -1).float()
        truth[row, [column[i] for i in positives]] = True
    ranking = rank_queries(scores, truth)
    mine = {"eccv_map_at_r": float(ranking.average_precision.mean()), "eccv_rprecision": float(ranking.r_precision.mean())}
    for name, want in case["expected"].items():
        k = name.rpartition("r")[2]
        yield Check(name, mine[name] if name in mine else ranking.recall(int(k)) / 100, want, atol=1e-12, rtol=1e-12)


def _hash(x: np.ndarray) -> np.ndarray:
    """splitmix64 finaliser on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_scores(kind: str, seed: int, own: np.ndarray, images: int) -> np.ndarray:
    """(images, captions) integers of the golden file's `method`; the 53-bit ones are kept exact as float64."""
    base = np.uint64((seed << 40) % (1 << 64))
    rows, columns = np.arange(images, dtype=np.uint64), np.arange(len(own), dtype=np.uint64)
    if kind == "random":
        scores = np.empty((images, len(own)))
        for row in range(images):
            scores[row] = (_hash(base + (rows[row] << np.uint64(20)) + columns) >> np.uint64(11)).astype(np.float64)
        return scores
    width = np.arange(24, dtype=np.uint64)

    def vectors(offset: int, index: np.ndarray) -> np.ndarray:
        return (_hash(base + np.uint64(offset) + (index[:, None] << np.uint64(8)) + width) >> np.uint64(60)).astype(np.float32) - 8

    zi, zn = vectors(1 << 39, rows), vectors(1 << 38, columns)
    return zi @ (2 * zi[own] + 3 * zn).T


def _hash_world(path: Path, kind: str) -> Iterator[Check]:
    from itm.evaluation.coco_truth import data_folder

    data = np.load(path)
    captions = np.load(data_folder() / "coco_test_ids.npy")
    own_image = json.loads((data_folder() / "original_caption_to_image.json").read_text())
    own = [own_image[str(c)][0] for c in captions]
    images = list(dict.fromkeys(own))
    row = {name: place for place, name in enumerate(images)}
    caption_image = np.array([row[name] for name in own])
    with np.errstate(over="ignore"):
        scores = _hash_scores(kind, int(data["seed"]), caption_image, len(images))
    names = names_of(len(images), torch.from_numpy(caption_image), list(map(str, images)), list(map(str, captions)))
    scored = Scored(torch.from_numpy(scores), names)
    whole = retrieval_metrics(scored.scores, names.positives, tie="lower_index")
    fold, _ = folds(scored, 5, "lower_index")
    wider = ECCV().measure(scored, "lower_index").metrics | CxC().measure(scored, "lower_index").metrics
    want = dict(zip(data["metric_names"].tolist(), data[f"{kind}_values"], strict=True))
    for name, values in want.items():
        group, _, metric = name.rpartition("_") if "map_at_r" not in name else ("eccv", "", "map_at_r")
        for way, value in zip(data["columns"].tolist(), values, strict=True):
            if group.startswith("coco"):
                got = (fold if group == "coco_1k" else whole)[f"{way}_{metric}"] / 100
            else:
                got = wider[f"{way}_{group}_{metric.replace('rprecision', 'r_precision')}"] / (
                    100 if metric in {f"r{k}" for k in KS} else 1
                )
            yield Check(f"{name} {way}", got, value, atol=1e-12, rtol=1e-12)
