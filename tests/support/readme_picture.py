"""`python -m tests.support.readme_picture`: docs/images/scenes.png, what a small SCAN finds for a caption and where it looks.

The model is the row `scan | base` of docs/results/learning.md, seed 0; it is trained below --output if it is not there yet (minutes).
The caption is what the first scene of the test split shows: nothing is chosen by how well it is found.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import itm
from itm.data.records import Regions
from itm.data.shards import Sample, read_manifest, read_samples
from itm.data.sources.scene_language import relevance
from tests.support import ROOT
from tests.support.learning import learn, recipe_of

HITS = 5
RELATIONS = {"left": "to the left of", "above": "above"}


def samples_of(split: str) -> list[Sample]:
    return [s for shard in read_manifest(split).shards for s in read_samples(f"{split}/{shard.name}") if isinstance(s, Sample)]


def say(form: dict[str, Any]) -> str:
    """A scene's logical form in plain words."""
    first, second = (f"a {colour} {shape}" for colour, shape in (form["a"], form["b"]))
    return f"{first} {RELATIONS[form['relation']]} {second}"


@torch.no_grad()
def look(matcher: Any, samples: list[Sample], query: str) -> tuple[list[int], np.ndarray]:
    """The best `HITS` samples for the query, and the attention (words of the query, regions) on the first of them."""
    images = matcher.encode_images(matcher.inputs.images([s.regions for s in samples]))
    captions = matcher.encode_captions(matcher.inputs.captions([query]))
    best = matcher.score(images, captions)[:, 0].argsort(descending=True)[:HITS].tolist()
    raw = captions.parts[0] @ images.parts[best[0]].T  # docs/methods/scan.md#attention: (SCAN 7) to (SCAN 9)
    clipped = F.leaky_relu(raw, 0.1)
    weights = (matcher.lambda_softmax * clipped / (clipped.norm(dim=0, keepdim=True) + 1e-8)).softmax(1)
    return best, weights[1:-1].numpy()  # without start and end


def draw(samples: list[Sample], holds: list[bool], query: str, words: list[str], weights: np.ndarray, file: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle
    from PIL import Image

    figure, axes = plt.subplots(2, HITS, figsize=(7.5, 3.5), dpi=110, gridspec_kw={"wspace": 0.06, "hspace": 0.22})
    pictures = [Image.open(io.BytesIO(s.image or b"")) for s in samples]
    for axis, picture, right in zip(axes[0], pictures, holds, strict=True):
        axis.imshow(picture)
        for spine in axis.spines.values():
            spine.set(color="#2a9d3a" if right else "#d03030", linewidth=3)
    regions = Regions.from_npz(samples[0].regions or b"")
    assert regions.boxes is not None
    spoken = query.split()
    for axis, word in zip(axes[1], words, strict=False):
        axis.imshow(picture := pictures[0], alpha=0.45)
        row = weights[spoken.index(word)]
        for (x1, y1, x2, y2), weight in zip(regions.boxes, row, strict=True):
            shown = float(weight / row.max())
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=4, edgecolor="#ff7f0e", alpha=shown))
        axis.set(xlim=(0, picture.width), ylim=(picture.height, 0))
        axis.set_title(f'"{word}"', fontsize=9, pad=3)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[1, -1].axis("off")
    figure.suptitle(f'"{query}"', fontsize=11, y=0.98)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/learning", help="folder of the runs of tests.support.learning")
    args = parser.parse_args()
    recipe = recipe_of(str(Path(args.output).absolute()), "scan", "base", 0)
    learn(recipe)
    samples = samples_of(f"{recipe.data.root}/{recipe.data.test_split}")
    form = samples[0].meta["scene"]
    query, words = say(form), [*form["a"], *form["b"]]
    best, weights = look(itm.load_matcher(f"{recipe.folder}/matcher"), samples, query)
    holds = relevance([s.meta for s in samples], [{"form": form}])[:, 0]
    print(f"{query!r} holds for {int(holds.sum())} of {len(samples)} scenes")
    draw([samples[i] for i in best], [bool(holds[i]) for i in best], query, words, weights, ROOT / "docs" / "images" / "scenes.png")


if __name__ == "__main__":
    main()
