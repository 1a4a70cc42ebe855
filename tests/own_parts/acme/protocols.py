"""Protocols of one's own: one of the scores, one that asks the matcher."""

from __future__ import annotations

from typing import Any

import torch

from itm.evaluation.dataset import encode_split
from itm.evaluation.protocols import MatcherProtocol, Outcome, Question, Scored, ScoreProtocol


class MeanMargin(ScoreProtocol):
    """By how much the annotated image of a caption beats the best other one."""

    def measure(self, scored: Scored, tie: str) -> Outcome:
        scores, own = scored.scores.T, scored.names.caption_image
        right = scores.gather(1, own[:, None])[:, 0]
        best_other = scores.scatter(1, own[:, None], -torch.inf).amax(1)
        return Outcome("mean margin of the annotated image", {"t2i_margin": float((right - best_other).mean())}, {}, {"captions": len(own)})


class Width(MatcherProtocol):
    """How wide the vectors of a matcher are."""

    score_type = "a count"

    def measure(self, matcher: Any, asked: Question) -> Outcome:
        vectors = encode_split(matcher, asked.split_uri, asked.batch_size).images.vector
        assert vectors is not None
        return Outcome("width of vectors", {"width": float(vectors.shape[1])}, {}, {"images": len(vectors)})
