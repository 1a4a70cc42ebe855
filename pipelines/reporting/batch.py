"""Some pairs of a split, encoded and scored as a batch of training is, with their teacher vectors: what the pictures of a batch are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json
from itm.data.records import Caption
from itm.data.shards import Sample, index_shard, read_manifest, read_range
from itm.data.sidecar import Sidecar
from itm.evaluation.scoring import encode_rows, score_matrix, scoring_mode
from itm.evaluation.uni_modal import uni_vectors
from itm.kinds import find_part
from itm.losses.soft_label import cosine_matrix, mixed_similarity
from itm.matchers.late.uarda import UARDA
from itm.matchers.norms import masked_mean
from itm.methods import METHODS
from itm.methods.cusa import CUSA
from itm.precision import computing
from itm.report.soft_labels import Compared, soft_labels_of
from itm.report.thresholds import maxima_of
from itm.teachers.stores import roots_of, store_for
from itm.types import Encoded, Matcher, Method

PAIRS, SHARDS = 64, 4


@dataclass(frozen=True)
class Drawn:
    """Pairs of different images: the sample, its shard, and one of its captions."""

    samples: list[Sample]
    shards: list[str]
    captions: list[Caption]


def drawn(split_uri: str, seed: int = 0) -> Drawn:
    """`PAIRS` pairs from `SHARDS` shards at most, by a fixed order of chance; images without caption are left out.

    Raises ValueError for a split with fewer than two captioned images.
    """
    order = np.random.default_rng(seed)
    shards = [files.join(split_uri, shard.name) for shard in read_manifest(split_uri).shards]
    chosen = [shards[k] for k in sorted(order.permutation(len(shards))[:SHARDS].tolist())]
    found = Drawn([], [], [])
    for number, uri in enumerate(chosen):
        entries = [entry for entry in index_shard(uri) if entry.captions]
        wanted = (PAIRS - len(found.samples)) // (len(chosen) - number)
        for k in sorted(order.permutation(len(entries))[:wanted].tolist()):
            sample = read_range(uri, entries[k].start, entries[k].end)
            found.samples.append(sample)
            found.shards.append(uri)
            found.captions.append(sample.captions[int(order.integers(len(sample.captions)))])
    if len(found.samples) < 2:
        raise ValueError(f"{split_uri} has {len(found.samples)} images with captions: a batch needs two")
    return found


def batch_of(recipe: Recipe, matcher: Matcher, trained: Mapping[str, float], device: torch.device) -> Json:
    """`soft_labels` and `maxima` of a batch, where the run has what they need, and `lacks`: the others, each with its reason.

    trained: the last row of losses.jsonl, for temperatures that were learned.
    """
    told: Json = {}
    lacks: list[str] = []
    for name, title, numbers in (
        ("soft_labels", "soft labels of a batch", lambda: _soft_labels(recipe, matcher, trained, device)),
        ("maxima", "similarities that the threshold parts", lambda: _maxima(recipe, matcher, device)),
    ):
        try:
            told[name] = numbers()
        except (ValueError, OSError) as error:
            lacks.append(f"{title}: {error}")
    return told | {"lacks": lacks}


def _maxima(recipe: Recipe, matcher: Matcher, device: torch.device) -> Json:
    if not isinstance(matcher, UARDA):
        raise ValueError(f"{matcher.kind} has no threshold: uarda has one")
    pairs = drawn(files.join(recipe.data.root, recipe.data.test_split))
    images, captions, scores = _scored(matcher, pairs, device)
    own = torch.eye(len(scores), dtype=torch.bool)
    with scoring_mode(matcher, "cpu"):
        return {"split": recipe.data.test_split, "pairs": len(scores), "directions": maxima_of(matcher, images, captions, own, scores)}


def _soft_labels(recipe: Recipe, matcher: Matcher, trained: Mapping[str, float], device: torch.device) -> Json:
    if recipe.method.kind != "cusa" or recipe.teachers.image is None or recipe.teachers.text is None:
        raise ValueError(f"method {recipe.method.kind} is trained on no soft labels: cusa with an image and a text teacher is")
    split = recipe.data.train_split
    root = roots_of(recipe)[0]
    pairs = drawn(files.join(root.data.root, split))
    teachers = [_cosines(root, split, modality, pairs) for modality in ("image", "text")]
    method = _method(recipe, matcher, trained)
    mode = method.csa.mode if method.csa else "each"
    term = "csa" if method.csa else "usa"
    taus = [tuple(float(tau.detach()) for tau in method.temperature(f"{term}_{role}")) for role in ("teacher", "student")]
    images, captions, scores = _scored(matcher, pairs, device)
    compared = Compared(
        keys=[sample.key for sample in pairs.samples],
        shards=pairs.shards,
        captions=[caption.id for caption in pairs.captions],
        texts=[caption.text for caption in pairs.captions],
        scores=scores,
        student_image=_within(images),
        student_text=_within(captions),
        teacher_image=teachers[0],
        teacher_text=teachers[1],
        targets=mixed_similarity(teachers[0], teachers[1], mode),
        teacher_taus=(taus[0][0], taus[0][1]),
        student_taus=(taus[1][0], taus[1][1]),
    )
    return {"split": split, "teachers": {"image": recipe.teachers.image.kind, "text": recipe.teachers.text.kind}} | soft_labels_of(compared)


def _scored(matcher: Matcher, pairs: Drawn, device: torch.device) -> tuple[Encoded, Encoded, Tensor]:
    """Both sides on the CPU, and their scores (B,B)."""
    regions = matcher.inputs.image.kind == "regions"
    data = [sample.regions if regions else sample.image for sample in pairs.samples]
    if (bare := [sample.key for sample, raw in zip(pairs.samples, data, strict=True) if raw is None]) != []:
        raise ValueError(f"{pairs.shards[0]}: image {bare[0]!r} has no {'region file' if regions else 'image'}, which the matcher reads")
    with scoring_mode(matcher, device), computing("fp32", device):
        images = encode_rows(matcher, matcher.inputs.images([raw for raw in data if raw is not None]), 16, device)
        captions = encode_rows(matcher, matcher.inputs.captions([caption.text for caption in pairs.captions]), PAIRS, device)
    scores = score_matrix(matcher, images, captions, device=device)
    matcher.cpu()
    return images, captions, scores


def _within(rows: Encoded) -> Tensor | None:
    """Cosines of the vectors that the matcher compares within a side: the uni-modal head, else its vector, else the mean of its parts."""
    if rows.uni is None and rows.vector is None:
        return None if rows.parts is None else cosine_matrix(masked_mean(rows.parts, rows.mask))
    return cosine_matrix(uni_vectors(rows, "batch"))


def _cosines(recipe: Recipe, split: str, modality: str, pairs: Drawn) -> Tensor:
    """(B,B) of the teacher's vectors. Raises ValueError where one of the pairs has none."""
    store = store_for(recipe, split, modality)
    opened: dict[str, tuple[Sidecar, dict[tuple[str, str], int]]] = {}
    vectors = []
    for sample, shard, caption in zip(pairs.samples, pairs.shards, pairs.captions, strict=True):
        if shard not in opened:
            sidecar = store.sidecar(files.name_of(shard))
            named = sidecar.captions or [""] * len(sidecar.keys)
            opened[shard] = sidecar, {both: row for row, both in enumerate(zip(sidecar.keys, named, strict=True))}
        sidecar, rows = opened[shard]
        row = rows.get((sample.key, caption.id if modality == "text" else ""))
        if row is None or not sidecar.ok[row]:
            raise ValueError(f"{sidecar.uri} has no {modality} vector of sample {sample.key!r}: run `itm teach` with this recipe")
        vectors.append(torch.from_numpy(sidecar.vectors[row].astype(np.float32)))
    return cosine_matrix(torch.stack(vectors))


def _method(recipe: Recipe, matcher: Matcher, trained: Mapping[str, float]) -> CUSA:
    """The method with the temperatures that were learned, for them alone."""
    part: Any = find_part(METHODS, recipe.method.kind, "method")
    keeps = matcher.keeps_whole
    method: Method = part(matcher, **recipe.method.options)
    matcher.keeps_whole = keeps
    assert isinstance(method, CUSA)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if parameter.dim() == 0 and name in trained:
                parameter.fill_(trained[name])
    return method
