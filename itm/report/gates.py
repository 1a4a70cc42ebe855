"""What SGRAF does inside with one pair: the gate of each node of SAF, the edges of each step of SGR."""

from __future__ import annotations

from itm.data.formats import Json
from itm.matchers.late.base import parts_of
from itm.matchers.late.sgraf import SAF, SGR, SGRAF, SimilarityMatcher
from itm.matchers.late.sgraf_inside import edges, gates
from itm.types import Encoded, Matcher

WHOLE, START, END = "whole pair", "start", "end"


def gates_of(matcher: Matcher, image: Encoded, caption: Encoded, spelled: list[str]) -> Json:
    """`nodes`: their names, the whole pair first; `gates`: the share of each in the score vector. Raises ValueError for other kinds."""
    if not isinstance(matcher, SAF | SGRAF):
        raise ValueError(f"{matcher.kind} has no gates: saf and sgraf have them")
    _check_whole(matcher)
    found = gates(matcher, image, caption)
    names = nodes_of(caption, spelled)
    return {"nodes": names, "gates": [round(value, 6) for value in found[: len(names)].tolist()]}


def edges_of(matcher: Matcher, image: Encoded, caption: Encoded, spelled: list[str]) -> Json:
    """`nodes`; `steps`: of each the rows of edges, what a node takes of each node; the last step has the row of the whole pair alone.

    `share`: what the whole pair holds of each node at the end, were the steps edges alone: the product of their matrices.
    Raises ValueError for other kinds.
    """
    if not isinstance(matcher, SGR | SGRAF):
        raise ValueError(f"{matcher.kind} reasons over no graph: sgr and sgraf do")
    _check_whole(matcher)
    found = edges(matcher, image, caption)
    names = nodes_of(caption, spelled)
    cut = [step.double().cpu()[: len(names), : len(names)] for step in found]
    share = cut[-1]
    for step in reversed(cut[:-1]):
        share = share @ step
    steps = [[[round(value, 6) for value in row] for row in step.tolist()] for step in cut]
    return {"nodes": names, "steps": steps, "share": [round(value, 6) for value in share[0].tolist()]}


def _check_whole(matcher: SimilarityMatcher) -> None:
    if not matcher.whole_method:
        raise ValueError(f"this {matcher.kind} was made with nodes={matcher.kept_nodes} and readout={matcher.readout}, an ablation")


def nodes_of(caption: Encoded, spelled: list[str]) -> list[str]:
    """The names of the nodes of one caption: the whole pair, then its tokens."""
    length = int(parts_of(caption)[1][0].sum())
    words = [word or (START if place == 0 else END) for place, word in enumerate(spelled[:length])]
    return [WHOLE, *words]
