"""Scores as probabilities of a true match, one question at a time, so that a search can say that it found nothing.

A flat cutoff fails: the score that is right for one question is wrong for the next. So an answer is judged against the scores that its own
question has for other rows of the index (the background), and by its lead over the next answer; a logistic curve turns both into a
probability. It is fitted on a validation split of which half the questions have lost their true matches, for people also ask for what is
not there.

    told = calibrate(matcher, encode_split(matcher, "data/shards/val"))
    print(told)                                           # error that is stated and error that was seen, on questions held out
    Engine(matcher, index, calibration=told.sized(index))

Q = questions   C = candidates   K = answers   F = features
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itm.data import files
from itm.data.formats import read_json
from itm.evaluation.dataset import EncodedSplit
from itm.evaluation.scoring import score_matrix
from itm.retrieval.index import Find, Index
from itm.types import Matcher, positives_from_ids

FORMAT = 1
ANSWERS = 10  # of each question that the curve is fitted to
BACKGROUND = 256  # rows, evenly spread, as the engine takes them
LEAST = 50  # questions below which nothing is fitted
THRESHOLDS = (0.0, 0.5, 0.8)
_RIDGE, _ROUNDS = 1e-2, 50
_FEATURES = 5


@dataclass(frozen=True)
class Checked:
    """Of the questions whose best answer had at least the probability `least`: how many (n), the share of wrong answers that the curve
    states and the one seen, and the 95 % interval of the seen one (Wilson). On questions that the curve was not fitted to."""

    least: float
    n: int
    stated: float
    seen: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """weights (F) of the features; size: candidates of the split that it was fitted on; questions: how many."""

    weights: tuple[float, ...]
    size: int
    questions: int
    checked: tuple[Checked, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """A curve for each direction of one matcher. sizes: candidates of the index that is searched: among more, a chance one comes higher."""

    matcher: str
    curves: Mapping[Find, Curve]
    sizes: Mapping[Find, int] = field(default_factory=dict)

    def sized(self, index: Index) -> Calibration:
        """For an index."""
        return replace(self, sizes={"images": len(index), "captions": index.caption_count})

    def __call__(self, scores: Tensor, background: Tensor, find: Find) -> Tensor:
        """scores (K,) of the answers, best first, from the very first one; background (B,) of the same question -> probabilities (K,).

        Raises ValueError for a direction that was not calibrated.
        """
        if find not in self.curves:
            raise ValueError(f"no probability for {find}: only {', '.join(self.curves)} are calibrated")
        curve = self.curves[find]
        rows = features(scores[None].double(), background[None].double(), self.sizes.get(find, curve.size))[0]
        return torch.sigmoid(rows @ torch.tensor(curve.weights, dtype=torch.float64)).float()

    def __str__(self) -> str:
        lines = [f"{'find':<10}{'at least':>9}{'n':>7}{'stated error':>14}{'seen error':>12}   95 %"]
        for find, curve in self.curves.items():
            for row in curve.checked:
                interval = f"{row.low:.1%} to {row.high:.1%}"
                lines.append(f"{find:<10}{row.least:>9.2f}{row.n:>7}{row.stated:>14.1%}{row.seen:>12.1%}   {interval}")
        return "\n".join(lines)


def features(scores: Tensor, background: Tensor, size: int) -> Tensor:
    """(Q,K,F) of the answers' scores (Q,K), best first, against background (Q,B): how far above its question's usual scores an answer
    lies, less what the best of `size` chance ones would reach, and its distance to its rival, for the first answer and for the others."""
    usual = background.median(1, keepdim=True).values
    spread = (usual - background.quantile(0.16, dim=1, keepdim=True)).clamp(min=1e-6)  # of the lower half, which no true match widens
    height = (scores - usual) / spread
    lead = height - height[:, :1]
    if scores.shape[1] > 1:
        lead[:, 0] = height[:, 0] - height[:, 1]
    first = torch.zeros_like(height)
    first[:, 0] = 1
    above = height - math.sqrt(2 * math.log(max(size, 2)))
    return torch.stack([first, 1 - first, above, lead * first, lead * (1 - first)], 2)


def calibrate(
    matcher: Matcher, split: EncodedSplit, identity: str, device: str | torch.device = "cpu", relevance: Tensor | None = None
) -> Calibration:
    """Fitted on a split with captions. relevance (I,T) bool: which captions are right for an image; unset: its own.

    Raises ValueError for a split with fewer than LEAST images.
    """
    images = len(split.images)
    if images < LEAST:
        raise ValueError(f"{images} images are too few to calibrate on: take a validation split of at least {LEAST}")
    scores = score_matrix(matcher, split.images, split.captions, device=device).cpu()
    own = positives_from_ids(torch.arange(images), split.names.caption_image)
    right = own if relevance is None else relevance.bool() | own
    sides: dict[Find, tuple[Tensor, Tensor, Tensor]] = {
        "images": (scores.T, right.T, split.names.caption_image),
        "captions": (scores, right, torch.arange(images)),
    }
    return Calibration(identity, {find: _fitted(*side) for find, side in sides.items()})


def _fitted(scores: Tensor, right: Tensor, group: Tensor) -> Curve:
    """The curve of one direction: scores and right (Q,C), group (Q,) of the questions, whose members stay in one fold."""
    rows, labels = _answers(scores, right)
    size = scores.shape[1]
    fold = (group % 2).bool()
    stated = torch.empty(len(rows), dtype=torch.float64)
    for held in (fold, ~fold):
        weights = logistic(rows[~held], labels[~held])
        stated[held] = torch.sigmoid(rows[held][:, 0] @ weights)
    checked = tuple(_checked(stated, labels[:, 0], least) for least in THRESHOLDS)
    return Curve(tuple(logistic(rows, labels).tolist()), size, len(rows), checked)


def _answers(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Features (Q,K,F) and labels (Q,K) of the best answers, where every other pair of questions has lost its true matches."""
    lost = (torch.arange(len(scores)) // 2) % 2 == 1
    left = scores.double().masked_fill(right & lost[:, None], -torch.inf)
    values, places = left.topk(min(ANSWERS, left.shape[1] - int(right.sum(1).max())), dim=1)
    spread = torch.linspace(0, scores.shape[1] - 1, min(BACKGROUND, scores.shape[1])).round().long()
    background = left[:, spread]
    background = torch.where(
        background.isinf(), background.masked_fill(background.isinf(), torch.inf).min(1, keepdim=True).values, background
    )
    return features(values, background, scores.shape[1]), right.gather(1, places).double()


def logistic(rows: Tensor, labels: Tensor) -> Tensor:
    """Weights (F) of the logistic regression of labels (...) on features (..., F), by Newton's method with a small ridge."""
    x, y = rows.reshape(-1, rows.shape[-1]).double(), labels.reshape(-1).double()
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    ridge = torch.eye(x.shape[1], dtype=torch.float64) * _RIDGE
    for _ in range(_ROUNDS):
        p = torch.sigmoid(x @ weights)
        slope = x.T @ (y - p) - ridge @ weights
        step = torch.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + ridge, slope)
        weights = weights + step.clamp(-5, 5)
        if step.abs().max() < 1e-9:
            break
    return weights


def _checked(stated: Tensor, right: Tensor, least: float) -> Checked:
    kept = stated >= least
    n = int(kept.sum())
    if not n:
        return Checked(least, 0, 0.0, 0.0, 0.0, 1.0)
    seen = float(1 - right[kept].mean())
    low, high = wilson(seen, n)
    return Checked(least, n, float(1 - stated[kept].mean()), seen, low, high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in n independent cases."""
    z = 1.959964
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - width) / (1 + z * z / n)), min(1.0, (middle + width) / (1 + z * z / n))


def calibration_uri(folder: str, identity: str) -> str:
    """Where the calibration of a matcher lies in the folder of an index."""
    return files.join(folder, f"calibration-{identity}.json")


def write_calibration(folder: str, told: Calibration) -> str:
    """Beside the index in `folder`; returns the file."""
    said: dict[str, Any] = {
        "format": FORMAT,
        "matcher": told.matcher,
        "curves": {find: asdict(curve) for find, curve in told.curves.items()},
    }
    uri = calibration_uri(folder, told.matcher)
    files.write_atomic(uri, json.dumps(said, indent=1).encode())
    return uri


def load_calibration(folder: str, index: Index) -> Calibration | None:
    """Of the matcher that made the index, and for its size; None where nobody calibrated it. Raises NewerFormat, and ValueError for a
    file that is damaged."""
    uri = calibration_uri(folder, index.identity.matcher)
    if not files.exists(uri):
        return None
    said = read_json(uri, FORMAT)
    try:
        curves: dict[Find, Curve] = {}
        for find, told in said["curves"].items():
            checked = tuple(Checked(**row) for row in told["checked"])
            weights = tuple(float(weight) for weight in told["weights"])
            if len(weights) != _FEATURES or not np.isfinite(weights).all():
                raise ValueError(f"{len(weights)} weights, not {_FEATURES} finite ones")
            curves[find] = Curve(weights, int(told["size"]), int(told["questions"]), checked)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{uri} is damaged ({error}): delete it and calibrate again") from None
    return Calibration(said["matcher"], curves).sized(index)
