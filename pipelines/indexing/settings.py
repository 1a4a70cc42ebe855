"""What is chosen once the vectors are there: the first stage of a matcher that scores pairs, and structures of faiss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import itm
from itm.data import files
from itm.data.formats import Json
from itm.device import resolve_device
from itm.retrieval.approximate import Approximate, faiss_uri, held_out, unit
from itm.retrieval.centroids import write_centroids
from itm.retrieval.first_stage import chosen_screen
from itm.retrieval.index import Index
from itm.retrieval.store import CENTROIDS, OWN, Catalogue, write_catalogue
from pipelines.indexing.building import Wanted, build


@dataclass(frozen=True)
class Chosen:
    """screen: `own` vectors, `centroids` of parts, or the URI of a dual encoder; None = no first stage. loss: share of hits that it may
    lose, as the upper end of a 95 % interval over `sample` questions each way. recall: that faiss has to reach, None = no faiss.
    """

    screen: str | None = None
    loss: float = 0.01
    sample: int = 1000
    recall: float | None = None

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        if not 0 < self.loss < 1:
            raise ValueError(f"--loss {self.loss:g} is no share of hits that may be lost: say one between 0 and 1, e.g. .01")
        if self.sample < 1:
            raise ValueError(f"--sample is {self.sample}; at least one question has to be asked")


def settle(wanted: Wanted, catalogue: Catalogue, chosen: Chosen) -> list[str]:
    """Write the settings into the index; returns what they are, in lines. Raises ValueError as `chosen_screen`, `Approximate.build`."""
    chosen.check()
    matcher = itm.load_matcher(wanted.model, allow=wanted.allow) if isinstance(wanted.model, str) else wanted.model
    index, settings, lines = Index.open(wanted.output, matcher), dict(catalogue.settings), []
    device = resolve_device(wanted.device)
    if chosen.screen is not None:
        if chosen.screen == CENTROIDS:
            lines.append("centroids: " + ", ".join(f"{count:,} of {find}" for find, count in write_centroids(index).items()))
        elif chosen.screen != OWN:
            splits, place = tuple(index.identity.data), files.join(wanted.output, "screen")
            build(replace(wanted, model=chosen.screen, output=place, shards=splits, merge=(), part=(1, 1)))
        settings["screen"] = chosen_screen(matcher.to(device), index, chosen.screen, (chosen.loss, chosen.sample), device, wanted.allow)
        lines += _screen_lines(settings["screen"])
    if chosen.recall is not None:
        settings["faiss"], said = _structures(wanted.output, index, chosen.recall, chosen.sample)
        lines += said
    write_catalogue(wanted.output, replace(catalogue, settings=settings))
    return lines


def _screen_lines(screen: Json) -> list[str]:
    lines = [f"screen by {screen['by']}: the best {screen['k']:,} are scored exactly"]
    for way, said in screen["measured"].items():
        one = said["r10"]
        lines.append(f"  {way}: loses {one['lost']:.2f} % ({one['low']:.2f} to {one['high']:.2f}) of the hits among the first 10")
    return lines


def _structures(output: str, index: Index, recall: float, sample: int) -> tuple[Json, list[str]]:
    """For each side that has rows enough: questions come from the other side, of an index without captions from the images themselves."""
    settings: Json = {}
    lines = []
    sides = {"images": (index.images, index.captions), "captions": (index.captions, index.images)}
    for find, (side, other) in sides.items():
        if find == "captions" and not len(side):
            continue
        asking = other if len(other) else side
        some = held_out(unit(asking.read(slice(0, len(asking)), ("vector",)).vector), sample)
        made, measured = Approximate.build(side, recall, some)
        made.write(faiss_uri(output, "images" if find == "images" else "captions"))
        settings[find] = measured.said()
        lines.append(f"faiss, {find}: {measured}")
    return settings, lines
