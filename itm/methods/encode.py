"""Both sides of a batch encoded, over the ranks that gather, in the chunks that memory holds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.distributed import gather_ragged_rows, gather_rows, rank, world_size
from itm.matchers.chunked import encode_in_chunks
from itm.types import Batch, Encoded, Matcher, positives_from_ids

Gather = bool | Literal["official"]


def encode(matcher: Matcher, batch: Batch, gather: Gather, chunk: int | None = None) -> tuple[Encoded, Encoded]:
    """Both sides of a batch; with `gather` the rows of all ranks in rank order. chunk: rows that are encoded at a time."""
    images = encode_in_chunks(matcher.encode_images, batch.images, chunk)
    captions = encode_in_chunks(matcher.encode_captions, batch.captions, chunk)
    return gather_encoded(images, gather), gather_encoded(captions, gather)


def batch_positives(batch: Batch, gather: Gather) -> Tensor:
    """(I,T) bool from the image ids, of all ranks with `gather`."""
    ids = batch.images.image_id, batch.captions.image_id
    return positives_from_ids(*(gather_rows(i) if gather else i for i in ids))


def gather_encoded(encoded: Encoded, gather: Gather) -> Encoded:
    """True: gradient of every rank's loss (one-process gradient after DDP's mean). `official`: only the own loss's gradient of the own
    rows (docs/methods/cusa.md#several-ranks), so network gradients are 1/W of the one-process ones after DDP's mean. Ranks hold equally
    many rows."""
    if not gather or world_size() == 1:
        return encoded
    ragged = ("parts", "mask")
    return Encoded(each=(), **{name: _gather(value, name in ragged, gather) for name, value in encoded.present().items()})


def _gather(x: Tensor, ragged: bool, gather: Gather) -> Tensor:
    collect = gather_ragged_rows if ragged else gather_rows
    if gather != "official" or not x.is_floating_point():
        return collect(x)
    everyone = collect(x.detach())
    own = F.pad(x, (0, 0, 0, everyone.shape[1] - x.shape[1])) if ragged else x
    start = rank() * len(x)
    return torch.cat([everyone[:start], own, everyone[start + len(x) :]])
