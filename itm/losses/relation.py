"""IAIS (arXiv 2105.13868): align relations among words with relations among regions of a matched pair; measure how far they differ.

Blocks are attention maps of G matched pairs with n words (L) and m regions (V), each row summing to 1 over its own block:
LL (G,n,n), VV (G,m,m), LV (G,n,m) words to regions, VL (G,m,n) regions to words; word_mask (G,n), region_mask (G,m) bool, True = real.
Everything is computed in float32 (float64 stays float64). Pairs without a word or without a region have no relation and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("singular", "distributed", "soft")
COUNTERPARTS = ("softmax", "renormalise", "logits")
_ANCHOR_FLOOR = 1e-12  # below it an exact 0 of the anchor would make the singular loss infinite
_TINY = 1e-38

Blocks = tuple[Tensor, Tensor, Tensor, Tensor]


def relation_alignment_loss(
    blocks: Blocks,
    word_mask: Tensor,
    region_mask: Tensor,
    *,
    anchor: str = "L",
    kind: str = "singular",
    counterpart: str = "softmax",
    logits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean over the matched pairs of `relation_distances`; a scalar, 0 (with graph) when no pair has both words and regions."""
    values = relation_distances(blocks, word_mask, region_mask, anchor=anchor, kind=kind, counterpart=counterpart, logits=logits)
    return values.mean() if len(values) else torch.stack([b.sum() for b in blocks]).sum() * 0.0


def relation_distances(
    blocks: Blocks,
    word_mask: Tensor,
    region_mask: Tensor,
    *,
    anchor: str = "L",
    kind: str = "singular",
    counterpart: str = "softmax",
    logits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(G',) row-mean symmetric KL of each pair that has a word and a region, in nats. With anchor L, A = LL and

    singular     B = softmax over the row of VV[a_i, a_j], a_i = argmax_v LV[i, v]; no gradient through the index
    distributed  B = LV VL, with 1e-6 inside the logarithm of the model side
    soft         B = LV VV LV^T with LV detached, softmax on A and on B (CACR)

    anchor V swaps the two modalities. `counterpart` is for singular: "softmax" is what the authors' code does (a second softmax,
    on probabilities), "renormalise" divides the extracted row by its sum, "logits" takes the softmax of the extracted raw
    products, head by head; it needs `logits` = (G,h,n,n) among words and (G,h,m,m) among regions.
    Raises ValueError for an unknown anchor, kind or counterpart.
    """
    _check(anchor, kind, counterpart, logits)
    own, other, cross, back = (_wide(b) for b in blocks)
    own_mask, other_mask = word_mask.bool(), region_mask.bool()
    raw = None if logits is None else logits[1]
    if anchor == "V":
        own, other, cross, back, own_mask, other_mask = other, own, back, cross, other_mask, own_mask
        raw = None if logits is None else logits[0]
    kept = own_mask.any(1) & other_mask.any(1)
    if not bool(kept.all()):
        own, other, cross, back, own_mask, other_mask = (x[kept] for x in (own, other, cross, back, own_mask, other_mask))
        raw = None if raw is None else raw[kept]
    if kind == "distributed":
        return _symmetric_kl(own, cross @ back, own_mask, epsilon=1e-6)
    if kind == "soft":
        cross = cross.detach()
        return _symmetric_kl(_softmax(own, own_mask), _softmax(cross @ other @ cross.mT, own_mask), own_mask)
    index = aligned_index(cross, other_mask)
    if counterpart == "logits":
        assert raw is not None
        partner = _softmax(_extract(_wide(raw), index), own_mask).mean(1)
    elif counterpart == "renormalise":
        picked = _extract(other, index) * own_mask[:, None]
        partner = picked / picked.sum(-1, keepdim=True).clamp_min(_ANCHOR_FLOOR)
        partner = partner.clamp_min(_ANCHOR_FLOOR)
    else:
        partner = _softmax(_extract(other, index), own_mask)
    return _symmetric_kl(own.clamp_min(_ANCHOR_FLOOR), partner, own_mask)


def aligned_index(cross: Tensor, other_mask: Tensor) -> Tensor:
    """(G,n) int64: the partner each row of a cross block (G,n,m) attends to most, invalid partners (other_mask (G,m)) left out."""
    return cross.masked_fill(~other_mask[:, None], -1.0).argmax(-1)


def isd(blocks: Blocks, word_mask: Tensor, region_mask: Tensor) -> dict[str, Tensor]:
    """Intra-modal self-attention distance without annotation: the four values (G',) of each matched pair; lower = more consistent."""
    return {
        f"{anchor}_{kind}": relation_distances(blocks, word_mask, region_mask, anchor=anchor, kind=kind)
        for kind in ("singular", "distributed")
        for anchor in ("L", "V")
    }


class ISDa(NamedTuple):
    """sum (G,), mean (G,): over the entities of a pair; words, regions (G,K,K): relations among entities, rows sum to 1."""

    sum: Tensor
    mean: Tensor
    words: Tensor
    regions: Tensor


def isda(among_words: Tensor, among_regions: Tensor, entity_words: Tensor, entity_regions: Tensor) -> ISDa:
    """ISD with annotation: LL (G,n,n) and VV (G,m,m) gathered to K entities by entity_words (G,K,n) and entity_regions (G,K,m), 0/1.

    A[k,l] = mean over the members i of k of the sum over the members j of l of S[i,j], clamped at 1e-12, rows divided by their sum;
    value of entity k = sum over l of (A_L - A_V)(ln A_L - ln A_V). An entity without words or without regions is padding.
    Raises ValueError when a pair has fewer than two entities.
    """
    real = (entity_words.sum(-1) > 0) & (entity_regions.sum(-1) > 0)
    if (real.sum(-1) < 2).any():
        raise ValueError("ISDa compares relations among entities: every pair needs at least two entities that have words and regions")
    words = _entity_relations(_wide(among_words), entity_words, real)
    regions = _entity_relations(_wide(among_regions), entity_regions, real)
    both = real[:, :, None] & real[:, None, :]
    ratio = words.masked_fill(~both, 1.0).log() - regions.masked_fill(~both, 1.0).log()
    total = ((words - regions) * ratio).sum((1, 2))
    return ISDa(total, total / real.sum(-1), words, regions)


def _entity_relations(attention: Tensor, members: Tensor, real: Tensor) -> Tensor:
    members = members.to(attention.dtype)
    mass = members @ attention @ members.mT / members.sum(-1, keepdim=True).clamp_min(1.0)
    mass = mass.clamp_min(1e-12) * (real[:, :, None] & real[:, None, :])
    return mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)


def _check(anchor: str, kind: str, counterpart: str, logits: tuple[Tensor, Tensor] | None) -> None:
    for name, value, known in (("anchor", anchor, ("L", "V")), ("kind", kind, KINDS), ("counterpart", counterpart, COUNTERPARTS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r} of the relation alignment; known: {', '.join(known)}")
    if kind == "singular" and counterpart == "logits" and logits is None:
        raise ValueError("counterpart 'logits' needs `logits`: the raw products (G,h,n,n) among words and (G,h,m,m) among regions")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _extract(among: Tensor, index: Tensor) -> Tensor:
    """among[..., a_i, a_j] for index a (G,n): (G,m,m) -> (G,n,n), or the same head by head."""
    n, m = index.shape[1], among.shape[-1]
    if among.dim() == 4:
        index = index[:, None].expand(-1, among.shape[1], -1)
    rows = among.gather(-2, index[..., :, None].expand(*index.shape, m))
    return rows.gather(-1, index[..., None, :].expand(*index.shape[:-1], n, n))


def _softmax(values: Tensor, column_mask: Tensor) -> Tensor:
    columns = column_mask[:, None] if values.dim() == 3 else column_mask[:, None, None]
    return values.masked_fill(~columns, float("-inf")).softmax(-1)


def _symmetric_kl(a: Tensor, b: Tensor, mask: Tensor, epsilon: float = 0.0) -> Tensor:
    """(G,): (1/rows) sum of b ln b - b ln(a + eps) + a ln a - a ln(b + eps) over the valid corner; 0 ln 0 = 0."""
    valid = mask[:, :, None] & mask[:, None, :]
    # Padding becomes 1 before the logarithm: its terms vanish and its gradient is 0, never NaN.
    a, b = a.masked_fill(~valid, 1.0), b.masked_fill(~valid, 1.0)
    own = a * a.clamp_min(_TINY).log() + b * b.clamp_min(_TINY).log()
    cross = b * (a + epsilon).log() + a * (b + epsilon).log()
    return ((own - cross) * valid).sum((1, 2)) / mask.sum(1)
