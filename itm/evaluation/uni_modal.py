"""The vectors by which images are compared with images and captions with captions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from itm.types import Encoded


def uni_vectors(encoded: Encoded | None, what: str) -> Tensor:
    """(N,U) float32: the uni-modal heads' where the matcher has some (CUSA), else its vectors. what: image or caption, for the message.

    Raises ValueError where there are neither.
    """
    vectors = None if encoded is None else encoded.uni if encoded.uni is not None else encoded.vector
    if vectors is None:
        raise ValueError(
            f"uni-modal questions (i2i, t2t, sts) need {what} vectors, and this matcher (or score file) gives none: "
            "take a dual encoder, a late interaction, or a joint encoder with uni-modal heads"
        )
    return vectors.float()


def likeness(asked: Encoded, gallery: Encoded, what: str) -> Tensor:
    """(Q,G) cosines of rows of one modality. Raises ValueError as `uni_vectors`."""
    left, right = (F.normalize(uni_vectors(rows, what), dim=1) for rows in (asked, gallery))
    return left @ right.T
