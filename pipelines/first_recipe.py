"""The first recipe for somebody's data: a model and sizes that fit the data and the machine, as YAML with comments."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass

import yaml

from itm.config import Part
from itm.data.detect.finding import Finding
from pipelines.survey import Survey

SMALL = 200  # images; a tenth of fewer is too few to choose weights by, so they are trained to the end
LEAST = 20  # images; fewer are not split
HELD_OUT = 1_000  # images of a validation or test split are enough
REAL = """\
text: {kind: hf, path: minilm, max_length: 48}
model:  # linear heads on frozen towers of the extra `real`; `itm init --model NAME` fine-tunes a CLIP instead
  kind: dual
  options:
    image: {kind: efficientnet_lite0, freeze: true, cells: 1}
    text: {kind: hf_text, path: minilm, freeze: true}
    width: 256
method: {kind: matching, options: {loss: contrastive, tau: 0.07}}
"""


@dataclass(frozen=True)
class Machine:
    """cpus: cores that this process may use; gpu: name of the first GPU, or empty; memory: bytes of main memory."""

    cpus: int
    gpu: str
    memory: int

    @classmethod
    def here(cls) -> Machine:
        import torch

        from itm.device import cores

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
        return cls(cores(), gpu, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def __str__(self) -> str:
        return self.gpu or f"{self.cpus} cores without a GPU"


def splits_for(total: int) -> dict[str, float] | None:
    """Shares of the images that are held out where all are of one split; None for so few that nothing can be."""
    if total < LEAST:
        return None
    share = min(0.1, round(HELD_OUT / total, 4))
    return {"test": share} if total < SMALL else {"val": share, "test": share}


@dataclass(frozen=True)
class FirstRecipe:
    """Everything that the text of the recipe depends on. splits: role -> split of the shards; pretrained: a CLIP to fine-tune.

    real: the towers of the extra `real`, frozen, for pixels where there is no CLIP.
    """

    name: str
    finding: Finding
    seen: Survey
    machine: Machine
    pretrained: str | None = None
    real: bool = False

    @property
    def train(self) -> str:
        return self.finding.splits.get("train", "train")

    def text(self) -> str:
        """The recipe as YAML."""
        name = _quoted(self.name)
        head = f"# {self.finding.layout}\n# Made by `itm init`; docs/recipe-keys.md tells of every key.\nname: {name}\n"
        parts = [head, self._data(), self._text_and_model(), self._train(), f"registry: {{experiment: {name}, model: {name}}}\n"]
        return "".join(parts)

    @property
    def captioned(self) -> bool:
        return self.finding.captioned and self.seen.texts > 0

    def about(self) -> str:
        """What the recipe does, in half a line."""
        if not self.captioned:
            return "photos without captions, to be searched with a matcher trained on others"
        small = "heads on frozen EfficientNet-Lite0 and MiniLM" if self.on_towers else "a small dual encoder from scratch"
        kind = f"fine-tunes {self.pretrained}" if self.pretrained else small
        return f"{kind}, {self._course[1]:,} steps of {self._course[0]} pairs, for {self.machine}"

    @property
    def on_towers(self) -> bool:
        """Whether the towers of the extra `real` are proposed: their features are made once, below runs/."""
        return self.real and not self.pretrained and self.finding.image == "pixels"

    def next_command(self, output: str) -> str:
        if self.captioned:
            return shlex.join(["itm", "run", "-c", output])
        root = f"runs/{self.name}/shards" if self.finding.source is not None else self.finding.root
        search = f'itm search "what you look for" --model runs/NAME/matcher --shards {shlex.quote(f"{root}/{self.train}")}'
        return f"{shlex.join(['itm', 'pack', '-c', output])} && {search}" if self.finding.source is not None else search

    def _data(self) -> str:
        seen, lines = self.seen, ["data:"]
        if self.finding.source is not None:
            lines.append(f"  source: {_flow(self.finding.source)}")
        if self.on_towers:
            lines.append(f"  root: {_quoted(f'runs/{self.name}/features')}  # where itm features writes")
        elif self.finding.source is not None:
            lines.append(f"  root: {_quoted(self.photos)}  # where itm pack writes")
        else:
            lines.append(f"  root: {_quoted(self.finding.root)}  # shards that are there already: nothing is packed")
        lines += [f"  train_split: {_quoted(self.train)}", *judged(self.finding, self.train)]
        if self.finding.image == "regions":
            lines += ["  image: regions", f"  max_regions: {max(1, seen.regions)}"]
        else:
            size = self.image_size
            lines.append(f"  image_size: {size}  # pixels a side; larger sees more and takes longer")
            lines.append(f"  crop: {'center' if self.pretrained else 'squash'}  # squash keeps all of an image, center cuts a square")
        if self.on_towers:
            lines.append("  cache_features: true  # the frozen towers are run once")
        if line := reject_line(seen):
            lines.append(f"  {line}")
        if self.on_towers:
            what = "where itm pack writes" if self.finding.source is not None else "shards that are there already: nothing is packed"
            lines.append(f"features: {{photos: {_quoted(self.photos)}}}  # {what}")
        return "\n".join(lines) + "\n"

    @property
    def photos(self) -> str:
        """Where the shards of photos lie."""
        return f"runs/{self.name}/shards" if self.finding.source is not None else self.finding.root

    @property
    def image_size(self) -> int:
        if self.pretrained:
            from itm.importers.hub import sizes_of

            return sizes_of(self.pretrained).image
        if self.on_towers:
            return 224
        return 128 if self.machine.gpu else 64

    def _text_and_model(self) -> str:
        if self.pretrained:
            from itm.importers.hub import sizes_of

            path, sizes = _quoted(self.pretrained), sizes_of(self.pretrained)
            return (
                f"text: {{kind: hf, path: {path}, max_length: {sizes.text}, clean: false}}\n"
                f"model: {{kind: hf_dual, options: {{path: {path}}}}}  # all weights are trained\n"
            )
        if self.on_towers:
            return REAL
        return small_model(self.finding, self.seen, self.machine)

    def _train(self) -> str:
        batch, steps = self._course
        rate = "1.0e-5" if self.pretrained else "1.0e-3"  # of small models from scratch, and of heads on frozen towers
        where = "use_gpu: true" if self.machine.gpu else "workers: 0"
        why = f"for {self.machine}" + ("" if self.machine.gpu else ": inside one process, without Ray")
        lines = ["train:", f"  {where}  # {why}", f"  batch_size: {batch}  # of {self._pairs:,} pairs", f"  steps: {steps}"]
        lines += ["  precision: auto", f"  lr: {rate}", f"  warmup_steps: {steps // 10}", "  clip_norm: 2.0"]
        lines.append(f"  validate_every: {max(1, steps // 4)}")
        return "\n".join(lines) + "\n"

    @property
    def _pairs(self) -> int:
        return max(2, self.seen.pairs(self.train) if self.train in self.seen.totals else self.seen.texts)

    @property
    def _course(self) -> tuple[int, int]:
        return course_for(self._pairs, bool(self.machine.gpu), self.pretrained is not None)


def small_model(finding: Finding, seen: Survey, machine: Machine) -> str:
    """The lines of a vocabulary and a small dual encoder that is trained from scratch."""
    longest = max(8, min(64, seen.words + 4))
    wide = 256 if machine.gpu else 128
    image = "{kind: conv}"
    if finding.image == "regions":
        image = f"{{kind: regions, in_width: {seen.region_width}, width: {4 * wide}}}"
    return (
        f"text: {{kind: words, max_length: {longest}}}  # a vocabulary of the training captions\n"
        "model:  # small and from scratch; `itm init --model NAME` fine-tunes a CLIP instead\n"
        f"  kind: dual\n  options: {{image: {image}, text: {{kind: pooled_gru}}, width: {wide}}}\n"
        "method: {kind: matching, options: {loss: contrastive, tau: 0.07}}\n"
    )


def judged(finding: Finding, train: str) -> list[str]:
    """The lines of the splits that validate and test."""
    roles = dict(finding.splits)
    test = roles.get("test") or roles.get("val")
    val = roles.get("val") if roles.get("test") else None
    lines = [f"  val_split: {_quoted(val)}" if val else "  val_split: ''  # no images to choose weights by: the last are kept"]
    if test:
        return [*lines, f"  test_split: {_quoted(test)}"]
    return [*lines, f"  test_split: {_quoted(train)}  # no other images here: the figures say nothing about new ones"]


def index_only(recipe: FirstRecipe) -> str:
    """The recipe of photos without captions: they are packed to be searched with a matcher that was trained on others."""
    name, source = _quoted(recipe.name), recipe.finding.source
    where = f"  source: {_flow(source)}\n" if source is not None else ""
    root = f"runs/{recipe.name}/shards" if source is not None else recipe.finding.root
    limit = f"  {line}\n" if (line := reject_line(recipe.seen)) else ""
    return (
        f"# {recipe.finding.layout}\n# Made by `itm init`: `itm pack` makes shards of it that `itm search` reads.\nname: {name}\n"
        f"data:\n{where}  root: {_quoted(root)}\n  train_split: {_quoted(recipe.train)}\n  val_split: ''\n"
        f"  test_split: {_quoted(recipe.train)}\n{limit}"
        "model: {kind: dual}  # not trained: there are no captions\n"
    )


def reject_line(seen: Survey) -> str:
    """The limit of rejected images, above what the survey found in the worst split; empty where it found none."""
    lost = sum(seen.lost.values()) + sum(seen.wordless.values())
    if not lost:
        return ""
    shares = [max(seen.lost[s], seen.wordless[s]) / (seen.lost[s] + seen.looked[s]) for s in seen.totals if seen.lost[s] + seen.looked[s]]
    worst = max(shares)
    return f"max_reject_rate: {min(1.0, round(worst * 1.5 + 0.01, 2))}  # {lost:,} images are rejected now, each named in quarantine.jsonl"


def course_for(pairs: int, gpu: bool, pretrained: bool) -> tuple[int, int]:
    """Pairs of a step, and steps: twenty passes (four of a pretrained model); few pairs are seen more often, many less without a GPU."""
    largest = (7 if gpu else 4) if pretrained else (8 if gpu else 7)
    batch = max(2, 1 << min(largest, pairs.bit_length() - 1))
    passes = 20 * pairs // batch
    if pretrained:
        return batch, min(max(passes // 5, 50), 20_000 if gpu else 300)
    return batch, min(max(passes, 500), 20_000 if gpu else 3_000)


def _quoted(text: str) -> str:
    """A YAML scalar: plain where it reads as this text, JSON's way where it might not."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text, re.ASCII) and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def _flow(part: Part) -> str:
    """A part on one line; JSON is YAML."""
    return f"{{kind: {part.kind}, options: {json.dumps(part.options, ensure_ascii=False)}}}"
