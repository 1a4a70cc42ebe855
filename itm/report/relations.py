"""The relation matrices of IAIS for one pair: among words, among regions, across, and the regions' relations in the words' places."""

from __future__ import annotations

import torch

from itm.data.formats import Json
from itm.losses.relation import aligned_index, isd
from itm.types import Captions, Images, Matcher


def relations_of(matcher: Matcher, image: Images, caption: Captions, spelled: list[str]) -> Json:
    """LL (n,n), VV (m,m), LV (n,m), VL (m,n), rows of each summing to 1; `partner` (n,): the region that each word attends to most;
    `extracted` (n,n): VV in the rows and columns of the partners, as IAIS compares it with LL; `isd`: its four distances, in nats.

    image, caption: one row each; spelled: the word behind every token. `cosines`: the matcher attends within no pair, so the blocks come
    from cosines of its parts. Raises ValueError, with the reason, for a matcher or a pair without relations.
    """
    found = matcher.relations(image, caption)[2]
    words, regions = (int(mask[0].sum()) for mask in (found.word_mask, found.region_mask))
    if not words or not regions:
        raise ValueError(f"the pair has {words} words and {regions} regions: nothing to relate")
    ll, vv, lv, vl = (block[0].double().cpu() for block in found.blocks)
    ll, vv, lv, vl = ll[:words, :words], vv[:regions, :regions], lv[:words, :regions], vl[:regions, :words]
    partner = aligned_index(lv[None], torch.ones(1, regions, dtype=torch.bool))[0]
    extracted = vv[partner][:, partner]
    distances = isd(found.blocks, found.word_mask, found.region_mask)
    return {
        "words": spelled[1 : words + 1],
        "regions": regions,
        "cosines": not matcher.joint,
        **{name: _rows(block) for name, block in (("LL", ll), ("VV", vv), ("extracted", extracted), ("LV", lv), ("VL", vl))},
        "partner": partner.tolist(),
        "isd": {name: float(value[0]) for name, value in distances.items()},
    }


def _rows(block: torch.Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in block.tolist()]
