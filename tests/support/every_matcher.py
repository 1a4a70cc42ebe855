"""One tiny matcher of every kind, and batches that all of them read: pixels, regions with boxes, captions with start and end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itm.kinds import build_part
from itm.matchers import MATCHERS
from itm.types import Batch, Captions, Images, SoftLabels

WORDS, REGIONS, POSITIONS = 30, 4, 12
SCAN_TOWERS = {"image": {"in_width": 6, "width": 10}, "text": {"word_dim": 6, "width": 10}}
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CLIP_TOWERS = {
    "model_type": "clip",
    "projection_dim": 8,
    "text_config": {**TOWER, "vocab_size": WORDS, "max_position_embeddings": POSITIONS, "eos_token_id": 2},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 8},
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vse": ("dual", {"image": {"kind": "regions", **SCAN_TOWERS["image"]}, "text": {"kind": "gru", **SCAN_TOWERS["text"]}, "width": 8}),
    "dual": ("dual", {"image": {"kind": "conv", "image_size": 16, "hidden": 8}, "width": 8, "heads": {"uni": True}}),
    "clip": ("clip", {"config": CLIP_TOWERS, "heads": {"cross": True, "uni": True}}),
    "scan": ("scan", SCAN_TOWERS),
    "scan_i2t": ("scan", {**SCAN_TOWERS, "cross_attn": "i2t"}),
    "sgr": ("sgr", {**SCAN_TOWERS, "sim_dim": 6, "regions": REGIONS, "steps": 2}),
    "saf": ("saf", {**SCAN_TOWERS, "sim_dim": 6, "regions": REGIONS}),
    "uarda": ("uarda", {**SCAN_TOWERS, "direction": "both", "threshold": {"min_words": 4}}),
    "uniter": ("uniter", {"hidden": 16, "layers": 2, "heads": 2, "positions": POSITIONS, "region_dim": 6, "init_std": 0.25}),
}


def matcher_of(name: str, **options: Any) -> Any:
    kind, given = KINDS[name]
    return build_part(MATCHERS, kind, {**given, **options}, "model", vocab_size=WORDS).eval()


def images_of(rows: int, regions: int = REGIONS) -> Images:
    mask, generator = torch.ones(rows, regions, dtype=torch.bool), torch.Generator().manual_seed(rows)
    pixels = torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8, generator=generator)
    parts, boxes = torch.randn(rows, regions, 6, generator=generator), torch.rand(rows, regions, 7, generator=generator)
    return Images(torch.arange(rows), pixels, parts, boxes, mask)


def captions_of(lengths: list[int], longest: int | None = None) -> Captions:
    """Start 1, words, end 2; padding 0."""
    mask = torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, WORDS, mask.shape, generator=torch.Generator().manual_seed(sum(lengths)))
    tokens[:, 0] = 1
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
    return Captions(tokens * mask, mask, torch.arange(len(lengths)))


def batch_of(rows: int) -> Batch:
    labels = SoftLabels(torch.randn(rows, 7), torch.randn(rows, 9))
    return Batch(images_of(rows), captions_of([4 + k % 4 for k in range(rows)]), labels)


def scores_of(matcher: Any, images: Images, captions: Captions) -> Tensor:
    with torch.no_grad():
        return matcher.score(matcher.encode_images(images), matcher.encode_captions(captions))
