"""Image retrieval by label on sets of images without captions (source `labelled`): Recall@K of each set, and their mean.

Protocol: docs/methods/cusa.md#image-retrieval.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from itm.data.formats import Json
from itm.data.sources.labelled import unanswerable
from itm.evaluation.dataset import EncodedSplit, encode_split
from itm.evaluation.protocols import MatcherProtocol, Outcome, Question, same_label_metrics
from itm.evaluation.uni_modal import uni_vectors
from itm.types import Matcher


class Published(NamedTuple):
    """What published figures of a set are of: the K of its recalls, images and classes."""

    ks: tuple[int, ...]
    images: int
    classes: int


PUBLISHED = {
    "cub": Published((1, 2, 4, 8), 5_924, 100),
    "sop": Published((1, 10, 100, 1000), 60_502, 11_316),
    "inshop": Published((1, 10, 20, 30), 26_830, 3_985),
    "inaturalist": Published((1, 4, 16, 32), 136_093, 2_452),
}
OTHER_KS = (1, 5, 10)


class ImageRetrieval(MatcherProtocol):
    """Each image of a set is asked of all others of its set, a `query` of the `gallery`; relevant = the same label."""

    score_type: ClassVar[str] = "cosine of images, fp32"

    def measure(self, matcher: Matcher, asked: Question) -> Outcome:
        """Raises ValueError for images without a label, for an image that nothing can be found for, and for a matcher without vectors."""
        uri, size = asked.split_uri, asked.batch_size
        seen = encode_split(matcher, uri, size, device=asked.device, max_reject_rate=asked.max_reject_rate, bare=True)
        return outcome_of(seen, uri)


def outcome_of(seen: EncodedSplit, where: str) -> Outcome:
    """`i2i_<set>_r1` and so on, mAP@R and R-precision of every set, and the means of those that all sets have, where there are several."""
    vectors = uni_vectors(seen.images, "image")
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    sets: Json = {}
    for name, rows in _sets(seen, where).items():
        labels, gallery = _checked(seen, rows, f"{where}, set {name}")
        images = vectors[torch.tensor(rows)]
        ks = PUBLISHED[name].ks if name in PUBLISHED else OTHER_KS
        if gallery.any():
            values = same_label_metrics(images[~gallery], labels[~gallery], (images[gallery], labels[gallery]), ks=ks)
        else:
            values = same_label_metrics(images, labels, ks=ks)
        queries, by_chance = values.pop("queries"), values.pop("chance")
        metrics |= {f"i2i_{name}_{key}": value for key, value in values.items()}
        chance |= {f"i2i_{name}_{key}": value for key, value in by_chance.items()}
        sets[name] = {"images": len(rows), "classes": len(labels.unique()), "queries": queries}
    for found in (metrics, chance) if len(sets) > 1 else ():
        means = {key: sum(found[f"i2i_{name}_{key}"] for name in sets) / len(sets) for key in ("r1", "map_at_r", "r_precision")}
        found |= {f"i2i_mean_{key}": value for key, value in means.items()}
    counts = {key: sum(said[key] for said in sets.values()) for key in ("images", "classes", "queries")}
    return Outcome(_title(sets), metrics, chance, counts | {"rejected": len(seen.problems)}, {"sets": sets})


def _title(sets: Json) -> str:
    """Says so where a set is not the one that published figures are of."""
    other = [
        f"{name} has {said['images']:,} images of {said['classes']:,} classes, published figures are of {of.images:,} and {of.classes:,}"
        for name, said in sets.items()
        if (of := PUBLISHED.get(name)) and (of.images, of.classes) != (said["images"], said["classes"])
    ]
    return "; ".join([f"image -> image of the same label, the query itself left out: {', '.join(sets)}", *other, "ties pessimistic"])


def _sets(seen: EncodedSplit, where: str) -> dict[str, list[int]]:
    """Rows of each set; images of shards that know no set are one, `images`."""
    rows: dict[str, list[int]] = {}
    for row, meta in enumerate(seen.names.image_metas):
        if meta.get("label") is None:
            raise ValueError(
                f"{where}: image {seen.names.image_keys[row]!r} has no label in its metadata; pack the set by the source `labelled`"
            )
        rows.setdefault(str(meta.get("set", "images")), []).append(row)
    if "mean" in rows:
        raise ValueError(f"{where}: a set is called mean, as the mean of all sets is; call it otherwise")
    return rows


def _checked(seen: EncodedSplit, rows: list[int], where: str) -> tuple[Tensor, Tensor]:
    """labels (N,), whether a row is of the gallery (N,). What was rejected since packing may have left an image alone."""
    metas = [seen.names.image_metas[row] for row in rows]
    labels = [str(meta["label"]) for meta in metas]
    roles = [meta.get("role") for meta in metas]
    if lost := list(unanswerable(zip(labels, roles, strict=True))):
        first, kind = rows[lost[0]], "of the gallery " if roles[lost[0]] == "query" else ""
        raise ValueError(
            f"{where}: nothing can be found for {len(lost)} of {len(rows)} images, {len(seen.problems)} were rejected; the first is "
            f"{seen.names.image_keys[first]!r}: no other image {kind}has its label {labels[lost[0]]!r}"
        )
    index = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([index[label] for label in labels]), torch.tensor([role == "gallery" for role in roles])
