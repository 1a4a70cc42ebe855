"""A detector's boxes in a file: which photo has which, and which of them can be used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from itm.data import files
from itm.data.formats import Json

SLACK = 1.0  # pixels that a box may reach over the edge: detectors round; it is cut there


@dataclass(frozen=True)
class Boxes:
    """Image -> boxes (B,4) float32 x1 y1 x2 y2 in pixels of the photo, and their confidences (B,) float32, or None."""

    uri: str
    sha256: str
    of: dict[str, tuple[np.ndarray, np.ndarray | None]]

    def found(self, key: str, meta: Json) -> tuple[np.ndarray, np.ndarray | None] | None:
        """By the key of a sample, else by its image_id."""
        return self.of.get(key) or self.of.get(str(meta.get("image_id")))


def read_boxes(uri: str) -> Boxes:
    """JSON lines `{"image_id": ..., "boxes": [[x1, y1, x2, y2], ...], "conf": [...]}`; conf may be left out.

    Raises ValueError naming the line that is something else, and for an image that comes twice.
    """
    data = files.read_bytes(files.absolute(uri))
    held: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            image, boxes, conf = _row(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f'{uri}, line {number}: {error!r}; a line is {{"image_id": "...", "boxes": [[x1, y1, x2, y2], ...], "conf": [...]}}'
            ) from None
        if image in held:
            raise ValueError(f"{uri}, line {number}: image {image!r} comes a second time")
        held[image] = (boxes, conf)
    if not held:
        raise ValueError(f"{uri} holds no boxes")
    return Boxes(uri, hashlib.sha256(data).hexdigest(), held)


def _row(said: Any) -> tuple[str, np.ndarray, np.ndarray | None]:
    boxes = np.asarray(said["boxes"], np.float32).reshape(-1, 4)
    conf = None if said.get("conf") is None else np.asarray(said["conf"], np.float32)
    if conf is not None and conf.shape != (len(boxes),):
        raise ValueError(f"{len(boxes)} boxes and conf of shape {conf.shape}")
    return str(said["image_id"]), boxes, conf


def usable(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """(B,) bool: which boxes are finite, not empty, and inside a photo of these pixels but for SLACK."""
    with np.errstate(invalid="ignore"):
        inside = (boxes[:, :2] >= -SLACK).all(1) & (boxes[:, 2] <= width + SLACK) & (boxes[:, 3] <= height + SLACK)
        clipped = cut(boxes, width, height)
        whole = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    return np.asarray(np.isfinite(boxes).all(1) & inside & whole)


def cut(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Boxes cut at the edges of the photo."""
    return np.asarray(np.clip(boxes, 0, np.array([width, height, width, height], np.float32)))
