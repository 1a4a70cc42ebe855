"""Training JPEGs decoded in full and at 1/2, 1/4 or 1/8 (`data.scaled_jpeg`): time, and how far the pixels are from those of evaluation.

    python -m tests.support.bench_pixels                     # photos made up, 500x375
    python -m tests.support.bench_pixels --tar val/0.tar     # those of a shard

CPU milliseconds of one thread an image, the two ways in turn, medians of the rounds; differences in levels of 255.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import time
from pathlib import Path

import numpy as np
import torch

from itm.data.pixels import decode
from itm.data.preprocess import fit, fit_quickly
from tests.support.bench_data import photo


def photos(tar: Path | None, count: int) -> list[bytes]:
    if tar is None:
        return [photo(n) for n in range(count)]
    with tarfile.open(tar) as archive:
        held = (archive.extractfile(member) for member in archive if member.name.endswith("jpg"))
        return [file.read() for file in held if file is not None][:count]


def row(held: list[bytes], size: int, rounds: int) -> str:
    spent: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds + 1):
        for halving, spans in spent.items():
            begin = time.thread_time()
            for data in held:
                fit_quickly(data, size, "center", halving=halving)
            spans.append((time.thread_time() - begin) / len(held) * 1e3)
    full, scaled = (statistics.median(spans[1:]) for spans in spent.values())
    off = [np.abs(fit_quickly(d, size, "center", halving=True).astype(int) - fit(decode(d), size, "center")) for d in held]
    difference = np.concatenate([one.ravel() for one in off])
    levels = f"{difference.mean():.1f} | {np.percentile(difference, 99):.0f} | {difference.max()}"
    return f"| {size} | {full:.2f} | {scaled:.2f} | **{full / scaled:.2f}** | {levels} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    held = photos(args.tar, args.photos)
    print("| size | in full, ms | scaled, ms | full / scaled | mean off by | 99 % | most |\n" + "|---" * 7 + "|")
    for size in args.sizes:
        print(row(held, size, args.rounds), flush=True)


if __name__ == "__main__":
    main()
