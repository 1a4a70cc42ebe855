"""CUSA in numbers, for the pairs of one batch: what the teachers hold alike against what the student does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from itm.data.formats import Json

BINS, SHOWN, ALIKE = 40, 6, 8
AS_MUCH = 0.5  # of the weight of the pair itself: from there on a soft label calls a pair alike


@dataclass(frozen=True)
class Compared:
    """B pairs of different images: `keys`, `shards`, `captions` (ids) and `texts` name them.

    scores (B,B) of the student, images in rows; student_image, student_text (B,B) its cosines within a side, None where it has no vectors;
    teacher_image, teacher_text (B,B) those of the teachers; targets: the similarities that the soft labels of image -> text and of
    text -> image are made of (`itm.losses.soft_label.mixed_similarity`); taus: the temperatures of those labels, and of the student.
    """

    keys: Sequence[str]
    shards: Sequence[str]
    captions: Sequence[str]
    texts: Sequence[str]
    scores: Tensor
    student_image: Tensor | None
    student_text: Tensor | None
    teacher_image: Tensor
    teacher_text: Tensor
    targets: tuple[Tensor, Tensor]
    teacher_taus: tuple[float, float]
    student_taus: tuple[float, float]

    def image(self, row: int) -> Json:
        return {"image": self.keys[row], "shard": self.shards[row]}


def soft_labels_of(found: Compared) -> Json:
    """`pairs`: B; `histograms`, `row`, `alike`: what the functions below give."""
    return {"pairs": len(found.keys), "histograms": histograms(found), "row": row_of(found), "alike": alike(found)}


def histograms(found: Compared) -> dict[str, Json]:
    """Of the pairs of different samples: shares by similarity of the teacher and of the student, on one scale; `image`, `text`, `across`.

    Across, the teacher's are what the soft labels of image -> text are made of, and the student's its scores, which need not be cosines.
    """
    sides = {
        "image": (found.teacher_image, found.student_image),
        "text": (found.teacher_text, found.student_text),
        "across": (found.targets[0], found.scores),
    }
    return {name: _histogram(teacher, student) for name, (teacher, student) in sides.items() if student is not None}


def _histogram(teacher: Tensor, student: Tensor) -> Json:
    other = ~torch.eye(len(teacher), dtype=torch.bool)
    values = {"teacher": teacher[other].float(), "student": student[other].float()}
    low, high = (float(edge) for edge in (torch.cat([*values.values()]).min(), torch.cat([*values.values()]).max()))
    high = high if high > low else low + 1e-3
    shares = {name: (torch.histc(v, BINS, low, high) / len(v)).tolist() for name, v in values.items()}
    ranks = [v.double().argsort().argsort().double() for v in values.values()]
    agreement = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    return {"edges": torch.linspace(low, high, BINS + 1).tolist(), **shares, "rank_correlation": agreement}


def row_of(found: Compared) -> Json:
    """The caption whose soft label spreads most, but has its own image on top: the images of largest target, and what the student gives.

    target = softmax over the batch of the teacher's similarity / its temperature; student = softmax of the scores / the student's.
    """
    target = (found.targets[1] / found.teacher_taus[1]).softmax(1)
    student = (found.scores.T / found.student_taus[1]).softmax(1)
    entropy = -(target * target.clamp_min(1e-30).log()).sum(1)
    own = target.argmax(1) == torch.arange(len(target))
    asked = int(entropy.masked_fill(~own, -1.0).argmax()) if bool(own.any()) else int(entropy.argmax())
    best = target[asked].topk(min(SHOWN, len(target))).indices.tolist()
    images = [
        {**found.image(row), "own": row == asked, "target": float(target[asked, row]), "student": float(student[asked, row])}
        for row in best
    ]
    rest = {"target": float(1 - target[asked, best].sum()), "student": float(1 - student[asked, best].sum())}
    about = {"caption": found.captions[asked], "text": found.texts[asked], "entropy": float(entropy[asked]), "flat": math.log(len(target))}
    return {**about, "teacher_tau": found.teacher_taus[1], "student_tau": found.student_taus[1], "images": images, "rest": rest}


def alike(found: Compared) -> Json:
    """The false negatives of the batch: pairs that the annotation calls wrong and a soft label gives at least `AS_MUCH` of the weight of
    the caption's own pair. `count` of the `negatives`; `pairs`: the most alike of them, with both teachers' cosines and the rank
    that the student gives the image."""
    target = (found.targets[1] / found.teacher_taus[1]).softmax(1)  # captions in rows
    ratio = (target / target.diagonal()[:, None]).fill_diagonal_(0.0)
    together = ((found.teacher_image + found.teacher_text) / 2).masked_fill(ratio < AS_MUCH, -torch.inf)
    chosen = together.flatten().argsort(descending=True)[: min(ALIKE * len(ratio), ratio.numel())].tolist()
    pairs: list[Json] = []
    seen: set[frozenset[int]] = set()
    for place in chosen:
        caption, image = divmod(place, len(ratio))
        both = frozenset((caption, image))
        if together[caption, image] == -torch.inf or both in seen or len(pairs) == ALIKE:
            continue
        seen.add(both)
        pairs.append(
            {
                "caption": found.captions[caption],
                "text": found.texts[caption],
                **{f"own_{name}": value for name, value in found.image(caption).items()},
                **found.image(image),
                "weight": float(ratio[caption, image]),
                "teacher_image": float(found.teacher_image[caption, image]),
                "teacher_text": float(found.teacher_text[caption, image]),
                "student_rank": int((found.scores[:, caption] > found.scores[image, caption]).sum()) + 1,
            }
        )
    count = int((ratio >= AS_MUCH).sum())
    return {"count": count, "negatives": len(ratio) * (len(ratio) - 1), "pairs": pairs}
