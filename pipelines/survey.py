"""What packing would make of raw data, or what shards hold: counted on the first images, by the checks that packing makes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from itm.config import Part
from itm.data import files
from itm.data.detect.finding import Finding
from itm.data.records import Problem, Record, check_image
from itm.data.shards import Sample, read_manifest, read_samples

LOOKED_AT = 2_000  # images of a split
SIZED = 64
SHOWN = 5  # examples, and kinds of problems
MOST_SCANNED = 2 << 30  # bytes of foreign shards that are counted by reading them


@dataclass
class Survey:
    """totals: images of each split, usable or not; captions: how many images have so many; sizes: (width, height) of a sample;
    lost: images of each split that packing would reject; wordless: images with a caption of punctuation only, which training of a recipe
    that cleans captions leaves out."""

    totals: dict[str, int] = field(default_factory=dict)
    looked: Counter[str] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    words: int = 0
    region_width: int = 0
    regions: int = 0
    problems: list[Problem] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    wordless: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> int:
        return sum(self.captions.values())

    @property
    def texts(self) -> int:
        return sum(n * times for n, times in self.captions.items())

    def pairs(self, split: str) -> int:
        """Captions of a split, of which the first images may stand for the others."""
        usable = self.looked[split] / max(1, sum(self.looked.values())) * self.texts
        return int(usable * self.totals[split] / max(1, min(self.totals[split], LOOKED_AT)))

    def add(self, split: str, key: str, texts: Sequence[str], image: bytes | None) -> None:
        self.looked[split] += 1
        self.captions[len(texts)] += 1
        self.said += [(key, text) for text in texts[:1]] or [(key, "(no caption)")]
        self.words = max([self.words, *(len(text.split()) for text in texts)])
        without = [text for text in texts if not any(map(str.isalnum, text))]
        self.wordless[split] += bool(without)
        self.problems += [Problem(key, "", "survey", f"caption {text[:40]!r} holds no word", "caption") for text in without]
        if image and len(self.sizes) < SIZED:
            self.sizes.append(check_image(image))

    def lines(self) -> list[str]:
        """What was found, in a few lines."""
        split = ", ".join(f"{name} {count:,}" for name, count in self.totals.items())
        lines = [f"splits    {split} images"]
        if self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            lines.append(f"sizes     {min(widths)}-{max(widths)} x {min(heights)}-{max(heights)} pixels in a sample of {len(self.sizes)}")
        if self.region_width:
            lines.append(f"regions   up to {self.regions} an image, {self.region_width} wide")
        if self.images:
            spread = f"{min(self.captions)} / {self.texts / self.images:.2f} / {max(self.captions)}"
            lines.append(f"captions  {self.texts:,} of {self.images:,} images looked at; an image least / mean / most: {spread}")
        step = max(1, len(self.said) // SHOWN)
        lines += [f"example   {key}: {' '.join(text.split())[:90]}" for key, text in self.said[::step][:SHOWN]]
        return [*lines, f"problems  {len(self.problems):,}", *_by_kind(self.problems)]


def _by_kind(problems: Iterable[Problem]) -> list[str]:
    """Counts of problems that differ in names and numbers only, each with its first example."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\S*[\d/#]\S*|'[^']*'", "_", problem.reason), []).append(problem)
    shown = sorted(kinds.values(), key=len, reverse=True)
    rows = [f"  {len(rows):>6,} x {rows[0].what} {rows[0].key}: {rows[0].reason[:160]}" for rows in shown[:SHOWN]]
    return rows + ([f"  and {len(shown) - SHOWN} other kinds"] if len(shown) > SHOWN else [])


def survey(finding: Finding) -> Survey:
    """Raises ValueError as the source or the shards do."""
    return _of_source(finding.source, finding.image) if finding.source is not None else _of_shards(finding)


def _of_source(part: Part, image: str) -> Survey:
    from pipelines.pack import Job, accepted, open_source

    source, seen = open_source(part), Survey()
    for split in source.splits:
        seen.totals[split] = source.count(split)
        job = Job(part, split, image, "", "survey", 0, min(seen.totals[split], LOOKED_AT))
        for record in accepted(job, seen.problems, Counter()):
            _add_record(seen, split, record)
        seen.lost[split] = min(seen.totals[split], LOOKED_AT) - seen.looked[split]
    return seen


def _add_record(seen: Survey, split: str, record: Record) -> None:
    seen.add(split, record.key, [caption.text for caption in record.captions], record.image)
    if record.regions is not None:
        count, width = record.regions.features.shape
        seen.regions, seen.region_width = max(seen.regions, count), width


def _of_shards(finding: Finding) -> Survey:
    from itm.data.preprocess import read_regions

    seen = Survey()
    for split in dict.fromkeys(finding.splits.values()):
        uri = files.join(finding.root, split)
        tars = files.list_files(uri, ".tar")
        small = files.exists(files.join(uri, "manifest.json")) or sum(files.sizes(uri, ".tar").values()) < MOST_SCANNED
        for item in islice((item for tar in tars for item in read_samples(tar)), LOOKED_AT):
            if isinstance(item, Sample):
                seen.add(split, item.key, [caption.text for caption in item.captions], item.image)
                if item.regions is not None and finding.image == "regions" and not seen.region_width:
                    seen.regions, seen.region_width = read_regions(item.regions, 1 << 16)["regions"].shape
            else:
                seen.problems.append(item)
                seen.lost[split] += item.what in ("sample", "shard")
        seen.totals[split] = read_manifest(uri).samples if small else seen.looked[split]
    return seen
