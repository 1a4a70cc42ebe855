"""A split encoded and scored by all ranks of a training: each takes some shards, then some tiles; they meet when all have done theirs.

The numbers are those of one rank: shards and tiles are the same, whoever takes them (see `score_share`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from itm.data import files
from itm.data.manifest import ShardInfo
from itm.data.shards import read_manifest, read_samples
from itm.distributed import all_reduce_sum, rank, world_size
from itm.evaluation.dataset import EncodedSplit, captioned, checked, encode_samples
from itm.evaluation.scoring import score_share
from itm.precision import computing
from itm.types import Encoded, Matcher

SENT_BYTES = 64 << 20  # of scores, at a time: a GPU holds no more of them
Found = dict[int, tuple[int | None, EncodedSplit]]
"""Shards by number, with how many images of each were asked for (None = all)."""


def encode_over_ranks(
    matcher: Matcher, split_uri: str, batch_size: int, limit: int | None, max_reject_rate: float, device: torch.device, precision: str
) -> EncodedSplit:
    """What `encode_split` gives, in `precision`, on every rank. matcher: the same weights on all of them.

    Raises ValueError as `encode_split`, on every rank.
    """
    shards, found = read_manifest(split_uri).shards, Found()
    while due := _due(shards, found, limit):
        own: dict[int, EncodedSplit | Exception] = {}
        for n, left in due[rank() :: world_size()]:
            uri = files.join(split_uri, shards[n].name)
            try:
                with computing(precision, device):
                    own[n] = encode_samples(matcher, uri, captioned(read_samples(uri, shards[n].sha256), uri), batch_size, left, device)
            except (OSError, ValueError) as error:  # told to the others, who would wait for this shard
                own[n] = error
        for place, (n, left) in enumerate(due):
            found[n] = left, _from_rank(place % world_size(), own.get(n), device)
    return checked([piece for _, (_, piece) in sorted(found.items())], split_uri, max_reject_rate)


def _due(shards: Sequence[ShardInfo], found: Found, limit: int | None) -> list[tuple[int, int | None]]:
    """Shards to be encoded, each with how many images of it: the first `limit` of the split, counting as rejected what is known to be."""
    due, taken = [], 0
    for n, shard in enumerate(shards):
        left = None if limit is None or limit - taken >= shard.samples else limit - taken
        if left is not None and left <= 0:
            break
        if n in found and found[n][0] == left:
            taken += len(found[n][1].names.image_keys)
        else:
            due.append((n, left))
            taken += shard.samples if left is None else left
    return due


def score_over_ranks(
    matcher: Matcher, images: Encoded, captions: Encoded, block: int | None, device: torch.device, precision: str
) -> Tensor:
    """(I,T) float32 on the CPU of every rank, as `score_matrix`."""
    scores = score_share(matcher, images, captions, (rank(), world_size()), block=block, device=device, precision=precision)
    if world_size() > 1:
        for rows in scores.split(max(1, SENT_BYTES // (4 * scores.shape[1]))):
            rows.copy_(all_reduce_sum(rows.to(device)))
    return scores


def _from_rank(source: int, piece: EncodedSplit | Exception | None, device: torch.device) -> EncodedSplit:
    held: list[EncodedSplit | Exception | None] = [piece]
    if world_size() > 1:
        dist.broadcast_object_list(held, source, device=device)
    found = held[0]
    if isinstance(found, Exception):
        raise found
    assert found is not None
    return found
