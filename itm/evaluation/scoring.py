"""All images against all captions: encode once, score in tiles.

Captions are walked in order of length and cut to the longest of their tile, so short captions cost no padding; a tile is sized by a
memory budget. Matchers that cut tiles themselves (`cuts_tiles`) get large blocks in the given order. Any matcher works; several
matchers, or a mean of them, give the mean of their scores (an ensemble, as SGRAF = SGR + SAF), each scored by itself.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from itm.device import resolve_device, sized_by
from itm.precision import computing, warn_if_slow
from itm.rows import Rows
from itm.types import Captions, Encoded, Images, Matcher

TILE_BYTES = 256 << 20
TILE_CAPTIONS = 256
TILE_VECTORS = 1024
Raw = TypeVar("Raw", Images, Captions)
OWN_TILES = (1024, 4096)
"""Images x captions given at once to a matcher that cuts tiles itself: large, since it computes once a call what one side alone needs."""


def score_matrix(
    matcher: Matcher | Sequence[Matcher],
    images: Images | Encoded | Sequence[Encoded],
    captions: Captions | Encoded | Sequence[Encoded],
    *,
    block: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    batch_size: int = 256,
) -> Tensor:
    """(I,T) float32 scores on the CPU, larger = better; exact: no pair is skipped or approximated.

    Inputs are raw (`Images`, `Captions`: encoded here, `batch_size` rows a call) or `Encoded`; an ensemble takes one `Encoded` a member.
    block: images per tile; unset = from the memory budget. precision: fp32 (the score of record), tf32, bf16 or fp16 (`itm.precision`).
    device: auto, cpu, cuda, ... (`resolve_device`).
    The block size changes a score by float32 rounding at most (a GEMM may sum in another order for another shape).
    Raises ValueError for an unknown precision or device, an empty side, or an ensemble whose encodings do not match its members.
    """
    where = resolve_device(device)
    members = list(matcher) if isinstance(matcher, Sequence) else [matcher]
    if len(members) == 1:
        images, captions = _alone(images), _alone(captions)
        members = list(members[0].averaged)
    left: Sequence[Images | Encoded] = _per_member(images, len(members), "image")
    right: Sequence[Captions | Encoded] = _per_member(captions, len(members), "caption")
    total: Tensor | None = None
    for member, own_images, own_captions in zip(members, left, right, strict=True):
        with _scoring(member, where, precision):
            encoded_images = _encoded(member, own_images, batch_size, where)
            encoded_captions = _encoded(member, own_captions, batch_size, where)
            scores = _tiled(member, encoded_images, encoded_captions, block, where)
        total = scores if total is None else total.add_(scores)
    assert total is not None
    return total.div_(len(members))


def score_share(
    matcher: Matcher,
    images: Encoded,
    captions: Encoded,
    share: tuple[int, int],
    *,
    block: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Tensor:
    """(I,T) float32 on the CPU: every n-th tile of `score_matrix`, from the k-th on, for share (k, n); zero in all others.

    So the sum over k is what `score_matrix` gives. Matchers that cut tiles themselves get blocks of I/n images at most.
    """
    where = resolve_device(device)
    with _scoring(matcher, where, precision):
        return _tiled(matcher, images, captions, block, where, share)


def encode_rows(matcher: Matcher, rows: Images | Captions, batch_size: int = 256, device: str | torch.device = "cpu") -> Encoded:
    """Encode in batches, results on the CPU. The caller sets evaluation mode (see `scoring_mode`)."""
    pieces = (rows[i : i + batch_size].to(device) for i in range(0, len(rows), batch_size))
    with sized_by("evaluation.batch_size", batch_size):
        return Encoded.cat([(matcher.encode_images(p) if isinstance(p, Images) else matcher.encode_captions(p)).to("cpu") for p in pieces])


@contextlib.contextmanager
def scoring_mode(matcher: Matcher, device: str | torch.device = "cpu") -> Iterator[None]:
    """No gradients, evaluation mode, on `device`; the matcher's training flag is put back afterwards.

    One that is in evaluation mode there is taken as it is: a walk through all modules would cost every question of a search.
    """
    training, weight = matcher.training, next(matcher.parameters(), None)
    if training or weight is None or weight.device != torch.device(device):
        matcher.eval().to(device)
    try:
        with torch.no_grad():  # inference tensors would not outlive this block
            yield
    finally:
        if training:
            matcher.train()


@contextlib.contextmanager
def _scoring(matcher: Matcher, device: torch.device, precision: str) -> Iterator[None]:
    warn_if_slow(precision, device)
    with scoring_mode(matcher, device), computing(precision, device):
        yield


def _alone(rows: Raw | Encoded | Sequence[Encoded]) -> Raw | Encoded | Sequence[Encoded]:
    """The encoding of the one matcher that there is, whether or not it stands in a list."""
    return rows[0] if isinstance(rows, Sequence) and len(rows) == 1 else rows


def _per_member(given: Raw | Encoded | Sequence[Encoded], members: int, what: str) -> Sequence[Raw | Encoded]:
    rows: Raw | Encoded | Sequence[Raw | Encoded] = list(given.each) if isinstance(given, Rows) and given.each else given
    if isinstance(rows, Sequence) and len(rows) != members:
        raise ValueError(f"{members} matchers, but {len(rows)} {what} encodings")
    if isinstance(rows, Encoded) and members > 1:
        raise ValueError(f"{members} matchers need one {what} encoding each; give a list, or the raw {what}s")
    each: Sequence[Raw | Encoded] = rows if isinstance(rows, Sequence) else [rows] * members
    if any(len(r) == 0 for r in each):
        raise ValueError(f"no {what}s to score")
    return each


def _encoded(matcher: Matcher, rows: Images | Captions | Encoded, batch_size: int, device: str | torch.device) -> Encoded:
    return rows if isinstance(rows, Encoded) else encode_rows(matcher, rows, batch_size, device)


def _tiled(
    matcher: Matcher, images: Encoded, captions: Encoded, block: int | None, device: torch.device, share: tuple[int, int] = (0, 1)
) -> Tensor:
    own, of = share
    scores = torch.zeros(len(images), len(captions)) if of > 1 else torch.empty(len(images), len(captions))
    own_tiles = matcher.cuts_tiles(captions)
    order = None if own_tiles or captions.mask is None else by_length(captions)
    columns = OWN_TILES[1] if own_tiles else _columns(images, captions)
    before = 0  # tiles
    for start in range(0, len(captions), columns):
        chosen = slice(start, start + columns) if order is None else order[start : start + columns]
        tile = trim(captions[chosen])
        rows = block or (min(OWN_TILES[0], -(-len(images) // of)) if own_tiles else _rows(images, tile))
        firsts = range(0, len(images), rows)
        mine = firsts[(own - before) % of :: of]
        before += len(firsts)
        if not mine:
            continue
        moved, most = tile.to(device), rows
        for first in mine:
            last = min(first + rows, len(images))
            while first < last:
                span = slice(first, min(first + most, last))
                try:
                    scores[span, chosen] = matcher.score(images[span].to(device), moved).float().cpu()
                except torch.OutOfMemoryError as error:
                    most = _half(span.stop - first, len(tile), error)
                else:
                    first = span.stop
    return scores


def _half(rows: int, captions: int, error: torch.OutOfMemoryError) -> int:
    """The next smaller tile, said once a step down. Raises ValueError when one image is too many."""
    if rows == 1:
        raise ValueError(
            f"out of memory with one image and {captions} captions a tile: use a device with more memory or --precision bf16 ({error})"
        ) from None
    warnings.warn(f"out of memory with {rows} images a tile; going on with evaluation.block={rows // 2}", stacklevel=2)
    return rows // 2


def by_length(captions: Encoded) -> Tensor:
    """Rows of the captions, shortest first: (T,) int64."""
    if captions.mask is None:
        return torch.arange(len(captions))
    return captions.mask.sum(1).argsort(stable=True)


def trim(rows: Encoded) -> Encoded:
    """Cut `parts` and `mask` behind the last real part of any row."""
    if rows.mask is None or rows.parts is None or rows.mask.shape[1] != rows.parts.shape[1]:
        return rows
    longest = int(rows.mask.any(0).nonzero().max()) + 1 if rows.mask.any() else 1
    return Encoded(rows.vector, rows.parts[:, :longest], rows.mask[:, :longest], rows.uni)


def _pair_bytes(images: Encoded, captions: Encoded) -> int:
    """Bytes a late-interaction score of one pair may hold at once: attention in both directions. Matchers cut tiles further where the
    attended vectors are built.

    A product of vectors holds 4, but tiles of 16 MB cost less time than larger ones, whose memory is new each time.
    """
    if images.parts is None or captions.parts is None:
        return 64
    return 16 * images.parts.shape[1] * captions.parts.shape[1]


def _columns(images: Encoded, captions: Encoded) -> int:
    """Captions per tile: a few hundred for late interaction, so that tiles are of one length; a block of one matmul for vectors."""
    return TILE_VECTORS if captions.parts is None or images.parts is None else TILE_CAPTIONS


def _rows(images: Encoded, captions: Encoded) -> int:
    return max(1, TILE_BYTES // (_pair_bytes(images, captions) * len(captions)))
