"""The numbers of `itm.report.pair`, `thresholds` and `soft_labels` as markup: matrices, strips of words, curves, rows of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from itm.report.charts import curves, densities, histogram, matrix
from itm.report.looks import Look, looks

BLOCKS = {
    "LL": "S_LL: words to words",
    "extracted": "S_VV in the words' places",
    "VV": "S_VV: regions to regions",
    "LV": "S_LV: words to regions",
    "VL": "S_VL: regions to words",
}
POINTS = 80
SIDES = {"image": "image to image", "text": "text to text", "across": "image to text"}
Told = Mapping[str, Any]
"""What `itm.report.pair.explained` gives of a matcher."""


class Drawn(NamedTuple):
    """A drawing under its title."""

    title: str
    drawing: Markup


class Word(NamedTuple):
    """A word in a strip: its value, the share of the bar below it, and whether it is cut."""

    text: str
    value: str
    share: float
    cut: bool = False


class Strip(NamedTuple):
    title: str
    words: list[Word]


def relation_rows(models: Mapping[str, Told]) -> list[tuple[str, list[Drawn]]]:
    """For each block its drawings, one a model that has relations; of a single model two rows, by what is compared. A row has one scale."""
    shown = {name: told["relations"] for name, told in models.items() if "relations" in told}
    if len(shown) == 1:
        (found,) = shown.values()
        rows = {"Words, and regions in the words' places": ("LL", "extracted"), "Regions, and across": ("VV", "LV", "VL")}
        return [(title, _row([(BLOCKS[block], block, found) for block in blocks])) for title, blocks in rows.items()]
    return [(title, _row([(name, block, found) for name, found in shown.items()])) for block, title in BLOCKS.items() if shown]


def _row(drawn: Sequence[tuple[str, str, Told]]) -> list[Drawn]:
    """title, block and relations of each matrix."""
    most = max(max(map(max, found[block])) for _, block, found in drawn)
    return [Drawn(title, Markup(matrix(found[block], _sides(block, found), most))) for title, block, found in drawn]


def _sides(block: str, found: Told) -> tuple[Sequence[str], Sequence[str]]:
    words, regions = found["words"], [str(n) for n in range(found["regions"])]
    if block == "extracted":
        words = [f"{word} ({partner})" for word, partner in zip(words, found["partner"], strict=True)]
    return {"LL": (words, words), "VV": (regions, regions), "LV": (words, regions), "VL": (regions, words)}.get(block, (words, words))


def partners(found: Told, boxes: Sequence[Sequence[float]] | None) -> list[tuple[int, Sequence[float]]]:
    """Number and box of each region that a word attends to most; nothing where the places are not known."""
    return [(n, boxes[n]) for n in sorted(set(found["partner"])) if n < len(boxes)] if boxes else []


def gate_strip(title: str, found: Told) -> Strip:
    return _strip(title, found["nodes"], found["gates"])


def edge_drawings(found: Told) -> tuple[list[Drawn], list[Strip]]:
    """The matrix of each step but the last, whose one row is a strip, and what the whole pair holds of each node at the end."""
    nodes, steps = found["nodes"], found["steps"]
    drawn = [Drawn(f"step {n}", Markup(matrix(step, (nodes, nodes)))) for n, step in enumerate(steps[:-1], 1)]
    strips = [_strip(f"step {len(steps)}: what the whole pair takes of each node", nodes, steps[-1][0])]
    if len(steps) > 1:
        strips.append(_strip("over all steps: the product of the edges", nodes, found["share"]))
    return drawn, strips


def cut_strips(found: Told) -> list[Strip]:
    """One for each direction: the words with their similarity to the region most like them."""
    strips = []
    for direction, said in found["directions"].items():
        pairs = zip(found["words"], found["best"], said["cut"], strict=True)
        most = max(*found["best"], said["t"]) or 1.0
        words = [Word(word, f"{best:.3f}", max(best / most, 0.0), cut) for word, best, cut in pairs]
        lost = sum(said["cut"])
        strips.append(Strip(f"{direction}: threshold {said['t']:.3f} cuts {lost} of {len(words)} words", words))
    return strips


def _strip(title: str, names: Sequence[str], values: Sequence[float]) -> Strip:
    most = max(values) or 1.0
    return Strip(title, [Word(name, f"{value:.3f}", value / most) for name, value in zip(names, values, strict=True)])


def maxima_drawing(found: Told) -> Markup:
    """The maxima of the sampled pairs as bars, the matcher's own Gaussians as lines, its thresholds as marks."""
    state = found["state"]
    shares = {"matched": found["matched"], "mismatched": found["mismatched"]}
    lines = _gaussians(state, found["edges"][0], found["edges"][-1]) if state["sigma_pos"] > 0 else {}
    return Markup(densities(found["edges"], shares, lines, {"t": state["t"], "t_safe": state["t_safe"]}, "similarity"))


def fit_drawings(fits: Sequence[Told]) -> list[Drawn]:
    """The two fitted Gaussians and both thresholds at the end of each of the epochs, on one axis."""
    low = min(min(row["mu_neg"] - 3.2 * row["sigma_neg"], row["t"], row["t_safe"]) for row in fits)
    high = max(row["mu_pos"] + 3.2 * row["sigma_pos"] for row in fits)
    drawn = []
    for row in fits:
        title = f"epoch {row['epoch']}, step {row['step']:,}" if "epoch" in row else f"step {row['step']:,}"
        marks = {"t": row["t"], "t_safe": row["t_safe"]}
        drawn.append(Drawn(title, Markup(densities((), {}, _gaussians(row, low, high), marks, "similarity"))))
    return drawn


def _gaussians(state: Told, low: float, high: float) -> dict[str, list[tuple[float, float]]]:
    xs = [low + (high - low) * n / POINTS for n in range(POINTS + 1)]
    return {
        "matched": [(x, density(x, state["mu_pos"], state["sigma_pos"])) for x in xs],
        "mismatched": [(x, density(x, state["mu_neg"], state["sigma_neg"])) for x in xs],
    }


def density(x: float, mean: float, deviation: float) -> float:
    """The normal density."""
    return math.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


def likeness(histograms: Mapping[str, Told]) -> list[Drawn]:
    """Teacher against student, a histogram a side."""
    return [
        Drawn(
            f"{SIDES[side]}, rank correlation {found['rank_correlation']:.2f}",
            Markup(histogram(found["edges"], {name: found[name] for name in ("teacher", "student")}, "similarity")),
        )
        for side, found in histograms.items()
    ]


def distances(validations: Sequence[Mapping[str, float]], annotated: bool = False) -> str:
    """ISD over the steps of a training, or ISDa where `annotated`; '' where it was not measured."""
    names = {f"isd_{anchor}_{kind}": f"{anchor}, {kind}" for kind in ("singular", "distributed") for anchor in ("L", "V")}
    names = {"isda_mean": "mean over the entities of a pair", "isda_sum": "sum"} if annotated else names
    series = {title: [(row["step"], row[name]) for row in validations if name in row] for name, title in names.items()}
    return curves(series, "step", "nats")


class Distances(NamedTuple):
    """ISD of the pair: a row for each of the four, a column for each model."""

    names: list[str]
    rows: list[tuple[str, list[str]]]


class Inside(NamedTuple):
    """What the pages show of one pair, for each model that has it. cosines: the models whose relations are cosines."""

    looks: list[tuple[str, Look]]
    grid: bool
    cosines: list[str]
    distances: Distances
    relations: list[tuple[str, list[Drawn]]]
    partners: list[tuple[str, list[tuple[int, Sequence[float]]]]]
    gates: list[Strip]
    edges: list[tuple[str, list[Drawn], list[Strip]]]
    cuts: list[tuple[str, list[Strip]]]

    @property
    def any(self) -> bool:
        """Whether there is anything beside the words' looks."""
        return any((self.relations, self.gates, self.edges, self.cuts))


def inside_of(models: Mapping[str, Told]) -> Inside:
    """The drawings of `itm.report.pair.explained` of one pair, by name of the model."""
    has = {name: told["attention"] for name, told in models.items() if "attention" in told and told["attention"]["boxes"]}
    looked = list(zip(has, looks([{"image": "", "text": "", **found} for found in has.values()]), strict=True))
    related = {name: told["relations"] for name, told in models.items() if "relations" in told}
    kinds = next(iter(related.values()))["isd"] if related else ()
    rows = [(kind.replace("_", ", "), [f"{found['isd'][kind]:.3f}" for found in related.values()]) for kind in kinds]
    places = {name: told.get("attention", {}).get("boxes") for name, told in models.items()}
    spots = [(name, partners(found, places[name])) for name, found in related.items() if not _grid(models[name])]
    return Inside(
        looks=looked,
        grid=any(found["grid"] for found in has.values()),
        cosines=[name for name, found in related.items() if found["cosines"]],
        distances=Distances(list(related), rows),
        relations=relation_rows(models),
        partners=[(name, found) for name, found in spots if found],
        gates=[gate_strip(name, told["gates"]) for name, told in models.items() if "gates" in told],
        edges=[(name, *edge_drawings(told["edges"])) for name, told in models.items() if "edges" in told],
        cuts=[(name, cut_strips(told["cut"])) for name, told in models.items() if "cut" in told],
    )


def lacks_of(models: Mapping[str, Told]) -> list[str]:
    """What no picture could be made of, a line for each model and picture."""
    several = len(models) > 1
    return [f"{name}: {text}" if several else text for name, told in models.items() for text in told["lacks"]]


def _grid(told: Told) -> bool:
    return bool(told.get("attention", {}).get("grid"))
