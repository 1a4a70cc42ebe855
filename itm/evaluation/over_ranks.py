"""A split encoded and scored by all ranks of a training: each takes some shards, then some tiles; they meet when all have done theirs.

The numbers are those of one rank: shards and tiles are the same, whoever takes them (see `score_share`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from itm.distributed import all_reduce_sum, rank, world_size
from itm.evaluation.dataset import EncodedSplit, checked, encode_shard, shards_of
from itm.evaluation.scoring import score_share
from itm.types import Encoded, Matcher

SENT_BYTES = 64 << 20  # of scores, at a time: a GPU holds no more of them


def encode_over_ranks(
    matcher: Matcher, split_uri: str, *, batch_size: int, max_reject_rate: float, device: torch.device, precision: str
) -> EncodedSplit:
    """The whole split, on every rank. matcher: the same weights on all ranks. Raises ValueError, on all of them, as `encode_split`."""
    shards, ranks = shards_of(split_uri), world_size()
    own: dict[int, EncodedSplit | Exception] = {}
    for n in range(rank(), len(shards), ranks):
        try:
            own[n] = encode_shard(matcher, *shards[n], batch_size, None, device, precision)
        except (OSError, ValueError) as error:  # told to the others, who would wait for this shard
            own[n] = error
    pieces = []
    for n in range(len(shards)):
        piece = _from_rank(n % ranks, own.get(n), device)
        if isinstance(piece, Exception):
            raise piece
        pieces.append(piece)
    return checked(pieces, split_uri, max_reject_rate)


def score_over_ranks(
    matcher: Matcher, images: Encoded, captions: Encoded, *, block: int | None, device: torch.device, precision: str
) -> Tensor:
    """(I,T) float32 on the CPU of every rank, as `score_matrix`."""
    scores = score_share(matcher, images, captions, (rank(), world_size()), block=block, device=device, precision=precision)
    if world_size() > 1:
        for rows in scores.split(max(1, SENT_BYTES // (4 * scores.shape[1]))):
            rows.copy_(all_reduce_sum(rows.to(device)))
    return scores


def _from_rank(source: int, piece: EncodedSplit | Exception | None, device: torch.device) -> EncodedSplit | Exception:
    held: list[EncodedSplit | Exception | None] = [piece]
    if world_size() > 1:
        dist.broadcast_object_list(held, source, device=device)
    found = held[0]
    assert found is not None
    return found
