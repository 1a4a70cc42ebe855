"""What a pair costs in the trainer's process beside decoding: nearly all of it holds the lock of the interpreter.

    python -m tests.support.bench_lock

Images of 8x8 pixels and region files 8 wide leave so little to decode that what is left is reading, parsing, tokenising and collating.
CPU time of one thread, microseconds a pair, medians over batches of 128; shards in the page cache, five captions an image.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from itm.config import Text
from itm.data.collate import to_batch
from itm.data.pairs import Pairs, Work
from itm.data.plan import Plan
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Caption, Record, Regions
from itm.data.shards import Manifest, read_manifest, write_manifest, write_shard
from itm.data.text import build_tokenizer
from tests.support.bench_data import SENTENCE, WORDS, photo

WIDE, ROWS, BATCH, SAMPLES = 8, 36, 128, 256


def make_split(root: Path, kind: str) -> Manifest:
    """Four shards; made once."""
    split = root / kind
    if not (split / "manifest.json").exists():
        rng, infos = np.random.default_rng(0), []
        for shard in range(4):
            rows = []
            for n in range(shard * SAMPLES, (shard + 1) * SAMPLES):
                captions = [Caption(f"k{n}#{k}", " ".join(rng.choice(WORDS, 11))) for k in range(5)]
                boxes = np.sort(rng.random((ROWS, 4)).astype(np.float32) * 300, 1)
                features = Regions(rng.normal(0, 1, (ROWS, WIDE)).astype(np.float16), boxes, 400, 300)
                held = {"regions": features} if kind == "regions" else {"image": photo(n, WIDE)}
                rows.append(Record(f"k{n:06d}", "train", captions, **held))  # type: ignore[arg-type]
            infos.append(write_shard(f"{split}/{shard:05d}.tar", rows))
        write_manifest(str(split), Manifest(split=kind, source="made up", shards=infos))
    return read_manifest(str(split))


def measure(root: Path, kind: str, batches: int) -> dict[str, float]:
    """Microseconds a pair of each part, and of all."""
    manifest = make_split(root, kind)
    image = ImageInput("regions", max_regions=ROWS) if kind == "regions" else ImageInput(size=WIDE)
    inputs = Inputs(image, build_tokenizer(Text(max_length=32), [SENTENCE] * 5))
    pairs = Pairs(str(root / kind), manifest, Plan.of(manifest, seed=0, batch=BATCH), inputs, {})
    spent: dict[str, list[float]] = defaultdict(list)
    for step in range(batches + 2):
        moments = [time.thread_time()]
        fetched = pairs.fetch.read(Work(step % pairs.fetch.plan.steps_per_epoch, 0, 0))
        moments.append(time.thread_time())
        columns = pairs.prepare(fetched)
        moments.append(time.thread_time())
        to_batch(columns)
        moments.append(time.thread_time())
        for name, span in zip(("read", "prepare", "collate"), np.diff(moments), strict=True):
            spent[name].append(float(span))
        spent["all"].append(moments[-1] - moments[0])
    return {name: statistics.median(spans[2:]) / BATCH * 1e6 for name, spans in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "itm-bench-lock", help="where the shards are made, once")
    parser.add_argument("--batches", type=int, default=20)
    args = parser.parse_args()
    print("| a pair, microseconds of CPU | read | prepare | collate | all | wanted |\n" + "|---" * 6 + "|")
    for kind in ("pixels", "regions"):
        found = measure(args.root, kind, args.batches)
        print(f"| {kind} | " + " | ".join(f"{found[name]:.0f}" for name in ("read", "prepare", "collate", "all")) + " | 50 |", flush=True)


if __name__ == "__main__":
    main()
