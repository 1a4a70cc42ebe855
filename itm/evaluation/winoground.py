"""Winoground: does a matcher tell two captions of the same words apart by their images? Thrush et al., CVPR 2022."""

from __future__ import annotations

import torch
from torch import Tensor

from itm.evaluation.dataset import Names
from itm.evaluation.protocols import Outcome, Scored, ScoreProtocol

CHANCE = {"winoground_text": 25.0, "winoground_image": 25.0, "winoground_group": 100 / 6}
"""Of random scores: two answers of two each, both right; and, of the four pairs, the two true ones first."""


class Winoground(ScoreProtocol):
    """Percent of rows (image 0, caption 0, image 1, caption 1) with the right caption for both images (text), the right image for both
    captions (image), and both (group). Rows are told by `pair` and `side` in the metadata of images, else by their order."""

    def measure(self, scored: Scored, tie: str) -> Outcome:
        """A right answer has the higher score; an equal one counts under `optimistic` alone. Raises ValueError for a row that is not
        two images with one caption each."""
        images, captions = _rows_of(scored.names)
        s00, s01, s10, s11 = _scores(scored, images, captions).flatten(1).unbind(1)  # image, caption
        right = torch.ge if tie == "optimistic" else torch.gt
        text = right(s00, s01) & right(s11, s10)
        image = right(s00, s10) & right(s11, s01)
        found = {"text": text, "image": image, "group": text & image}
        metrics = {f"winoground_{name}": 100 * float(hits.double().mean()) for name, hits in found.items()}
        title = "Winoground: the right caption for both images, the right image for both captions, both; equal scores are "
        return Outcome(title + ("right" if tie == "optimistic" else "wrong"), metrics, dict(CHANCE), {"rows": len(images)})


def _scores(scored: Scored, images: Tensor, captions: Tensor) -> Tensor:
    """(R,2,2) float64 of images (R,2) and captions (R,2); one row of scores is read at a time."""
    rows = (torch.as_tensor(scored.scores[image : image + 1])[0].double() for image in images.flatten().tolist())
    return torch.stack([row[captions[n // 2]] for n, row in enumerate(rows)]).view(-1, 2, 2)


def _rows_of(names: Names) -> tuple[Tensor, Tensor]:
    """Image and caption numbers (R,2) of each row, by side."""
    count = len(names.image_keys)
    metas = names.image_metas or [{} for _ in range(count)]
    told = all("pair" in meta and meta.get("side") in (0, 1) for meta in metas)
    if not told and any("pair" in meta for meta in metas):
        raise ValueError("protocol winoground: some images have no `pair` and `side` in their metadata; pack by the source `winoground`")
    held: dict[str, dict[int, int]] = {}
    for number, meta in enumerate(metas):
        pair, side = (str(meta["pair"]), int(meta["side"])) if told else (str(number // 2), number % 2)
        held.setdefault(pair, {})[side] = number
    if alone := [pair for pair, sides in held.items() if len(sides) < 2]:
        raise ValueError(
            f"protocol winoground: {len(alone)} of {len(held)} rows lack one of their two images, the first is row {alone[0]}: "
            "quarantine.jsonl beside the shards and the result says why images were left out"
        )
    caption_of = torch.full((count,), -1)
    caption_of[names.caption_image] = torch.arange(len(names.caption_ids))
    if len(names.caption_ids) != count:
        raise ValueError(f"protocol winoground: an image has one caption, but {count} images have {len(names.caption_ids)}")
    images = torch.tensor([[sides[0], sides[1]] for sides in held.values()])
    return images, caption_of[images]
