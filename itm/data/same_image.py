"""Which samples show one image: data sets of one sample a caption hold each image several times.

Samples of one split show the same image when their json states the same `image_id`; where it states none, when their image files (or, for
want of one, their region files) are the same bytes. Copies are positives of each other in training and one image in evaluation.
"""

from __future__ import annotations

import hashlib

from itm.data.shards import Sample

_POSITIVE = (1 << 63) - 1


def image_of(sample: Sample) -> str:
    """What is equal for samples of a split that show one image, and for no others."""
    if sample.states_image:
        return f"id {sample.meta['image_id']}"
    return bytes_of(sample)


def bytes_of(sample: Sample) -> str:
    """What is equal for samples with equal image files (for want of one, region files)."""
    return f"bytes {hashlib.blake2b(sample.image or sample.regions or b'', digest_size=16).hexdigest()}"


def image_number(sample: Sample, split: str) -> int:
    """int64, equal where `image_of` is. Over several splits only equal bytes are one image: their ids know nothing of each other.

    The chance that two of n images get one number is n * n / 2**64.
    """
    named = image_of(sample)
    where = "" if named.startswith("bytes ") else split
    return int.from_bytes(hashlib.blake2b(f"{where}\n{named}".encode(errors="replace"), digest_size=8).digest()) & _POSITIVE
