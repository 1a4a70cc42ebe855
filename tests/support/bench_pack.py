"""Packing photos into shards: `itm pack` against img2dataset's writer and the system's tar.

    python -m tests.support.bench_pack                                   # 2,000 photos; tar alone as the peer
    pip download --no-deps img2dataset && unzip img2dataset-*.whl
    python -m tests.support.bench_pack --photos 10000 --peer img2dataset/writer.py

Photos are made up, one caption each: 500x375 as they are, and 256 a side (`itm pack` never changes a photo, so these come in at that
size). Ours is the work of the stage's tasks, one after the other in this process, without Ray's start: reading, checking, writing, reading
back, index, receipts and manifest. img2dataset: reading, and its writer of tars and parquet by itself, without download, decoding or
resizing; it checks nothing, makes no index and no sum. CPU seconds of a process, the sides in turn, medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from itm.config import parse_recipe
from pipelines import pack as packing
from tests.support.bench_data import SENTENCE, photo

SHARD = 1000
PEER = """
import importlib.util, sys, time
from pathlib import Path
import pyarrow as pa
spec = importlib.util.spec_from_file_location("writer", sys.argv[1])
writing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writing)
photos, out, shard = sorted(Path(sys.argv[2]).glob("*.jpg")), sys.argv[3], int(sys.argv[4])
schema = pa.schema([(name, pa.string()) for name in ("key", "caption", "status")] + [(n, pa.int32()) for n in ("width", "height")])
begin = time.process_time()
for n, path in enumerate(photos):
    if n % shard == 0:
        writer = writing.WebDatasetSampleWriter(n // shard, out, True, 5, schema, "jpg")
    caption = path.with_suffix(".txt").read_text()
    meta = {"key": path.stem, "caption": caption, "status": "success", "width": 500, "height": 375}
    writer.write(path.read_bytes(), path.stem, caption, meta)
    if n % shard == shard - 1 or n + 1 == len(photos):
        writer.close()
print(time.process_time() - begin)
"""


def ours(photos: Path, out: Path) -> float:
    """The CPU seconds that packing takes in this process."""
    section = {"source": {"kind": "imagefolder", "options": {"path": str(photos)}}, "root": str(out / "shards"), "shard_samples": SHARD}
    recipe = parse_recipe({"name": "pack", "output": str(out / "runs"), "data": section, "model": {"kind": "dual"}})
    packing._run_jobs = lambda recipe, jobs, title: {j.uri: packing.Receipt.model_validate_json(packing.pack_shard(j)) for j in jobs}
    packing._tracked = lambda *_: nullcontext(lambda manifest: None)
    begin = spent()
    packing.pack(recipe)
    return spent() - begin


def spent(who: int = resource.RUSAGE_SELF) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def tar(photos: Path, out: Path) -> float:
    begin = spent(resource.RUSAGE_CHILDREN)
    subprocess.run(["tar", "-cf", out / "plain.tar", "-C", photos, "."], check=True)
    return spent(resource.RUSAGE_CHILDREN) - begin


def img2dataset(photos: Path, out: Path, writer: str) -> float:
    command = [sys.executable, "-c", PEER, writer, str(photos), str(out), str(SHARD)]
    return float(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def measure(count: int, side: int | None, rounds: int, peer: str | None) -> dict[str, float]:
    """Median CPU milliseconds a photo, by who packs."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        distinct = [photo(n, side) for n in range(min(count, 20))]  # the noise of one takes 30 ms
        for n in range(count):  # bytes behind the end of a JPEG are no part of the picture, but keep each file another
            (photos / f"{n:06d}.jpg").write_bytes(distinct[n % len(distinct)] + n.to_bytes(4, "big"))
            (photos / f"{n:06d}.txt").write_text(f"{SENTENCE} {n}")
        for turn in range(rounds):
            works = {"ours": ours, "tar": tar} | ({"img2dataset": lambda a, b: img2dataset(a, b, str(peer))} if peer else {})
            for who, work in works.items():
                out = Path(name) / f"{who}{turn}"
                out.mkdir()
                found.setdefault(who, []).append(work(photos, out))
    return {who: statistics.median(spans) / count * 1e3 for who, spans in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", type=int, default=[0, 256], help="0: 500x375")
    parser.add_argument("--peer", help="the file writer.py of img2dataset")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    print("| photos | ours, CPU-ms a photo | img2dataset | theirs / ours | tar |\n|---|---|---|---|---|", flush=True)
    for side in args.sides:
        name = f"{side}x{side}" if side else "500x375"
        rows[name] = row = measure(args.photos, side or None, args.rounds, args.peer)
        peer = row.get("img2dataset")
        figures = f"{peer:.2f} | **{peer / row['ours']:.2f}**" if peer else "not there |"
        print(f"| {name} | {row['ours']:.2f} | {figures} | {row['tar']:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
