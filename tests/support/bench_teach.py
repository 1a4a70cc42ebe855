"""`make bench-teach`: what `itm teach` adds to a bare teacher, what a store weighs and how fast it is read, what labels cost a step.

    python -m tests.support.bench_teach                              # all four parts; tables on stdout
    python -m tests.support.bench_teach reading --rounds 5
    python -m tests.support.bench_teach --write docs/results/teach.md

Peers are measured in the same run and in turn: the teacher fed from memory, the loop that everybody writes, RayGen's gzipped torch files in
a tar, plain npy, CUSA's own npy of one pickled dictionary. Figures are medians; CPU time is the column to read on a machine that is shared.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from itm.config import Recipe, parse_recipe
from itm.data.shards import Sample, read_manifest, read_samples
from itm.data.sidecar import Header, read_sidecar, write_sidecar
from pipelines.on_ray.session import quiet
from tests.support.bench_data import SAMPLES, SHARDS, Tree, alternate, make_split
from tests.support.bench_labels import SOURCES, TERMS, TEXT_WIDE, WIDE, make_models

PAIRS = (1_000_000, 100_000_000, 1_000_000_000)
V100 = {"image": 162.11e-3 / 128, "text": 90.39e-3 / 128}  # seconds a row, CUSA's appendix, table 12
GFLOP = {"image": 8.7, "text": 2 * 85 * 16 / 1000}  # a forward pass: ViT-B/32 on 224 x 224, a base-size text model on 16 tokens
H100 = 0.4 * 989e3  # GFLOP/s: bf16, two fifths of the peak, as docs/results/gpu.md reckons
Table = dict[str, dict[str, float]]


@dataclass
class Bench:
    """Where made-up data lies, how often things are measured, the batch of a training step, and the lines of the page so far."""

    root: Path
    rounds: int
    batch: int
    lines: list[str] = field(default_factory=list)

    def say(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)

    def own_process(self, module: str, *more: str) -> dict[str, Any]:
        """What a process of its own prints as its last line."""
        command = [sys.executable, "-m", module, "--root", str(self.root), *more]
        found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])
        print(f"  {' '.join(more)}: {found}", file=sys.stderr, flush=True)
        return found


def rows(head: list[str], cells: Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in cells), ""]


# --- teaching -----------------------------------------------------------------------------------------------------------------------------


def recipe(root: Path) -> Recipe:
    """Both teachers: of images a ViT-B/32, of captions a BERT-base, each of one layer, so that thousands of rows take seconds."""
    folder = make_models(root, 1)
    given = {
        "name": "bench",
        "data": {"root": str(root), "train_split": "train"},
        "model": {"kind": "dual"},
        "teachers": {
            "root": f"{root}/stores/{os.getpid()}",
            "image": {"kind": "hf_vision", "options": {"path": f"{folder}/image"}},
            "text": {"kind": "hf_text", "options": {"path": f"{folder}/text", "pooling": "mean"}},
        },
    }
    return parse_recipe(given)


def samples(root: Path) -> Iterator[Sample]:
    for shard in read_manifest(f"{root}/train").shards:
        yield from (s for s in read_samples(f"{root}/train/{shard.name}") if isinstance(s, Sample))


def bare(root: Path, from_memory: bool) -> dict[str, float]:
    """Both teachers over all pairs, in one process: fed from memory, or by the loop that reads, decodes and scores in turn."""
    from itm.teachers.identity import build_teacher, embed_in_batches

    at = recipe(root)
    assert at.teachers.image and at.teachers.text
    built = build_teacher(at.teachers.image, "image"), build_teacher(at.teachers.text, "text")
    pairs = list(samples(root))
    payloads = [[t.prepare(row) for row in side] for t, side in zip(built, (pairs, [s.captions[0] for s in pairs]), strict=True)]
    cpu, begin = time.process_time(), time.perf_counter()
    if not from_memory:
        pairs = list(samples(root))
        payloads = [[t.prepare(row) for row in side] for t, side in zip(built, (pairs, [s.captions[0] for s in pairs]), strict=True)]
    for teacher, ready in zip(built, payloads, strict=True):
        embed_in_batches(teacher, ready, at.teachers.batch_size)
    seconds = time.perf_counter() - begin
    return {
        "pairs_s": len(pairs) / seconds,
        "whole_pairs_s": len(pairs) / seconds,
        "cpu_ms": (time.process_time() - cpu) / len(pairs) * 1e3,
    }


def stage(root: Path) -> dict[str, float]:
    """`itm teach` of both stores; steady: from the first sidecar of each store on, so without the start of Ray and of the actors."""
    from pipelines.teach import teach

    tree, begin = Tree(), time.perf_counter()
    folders = teach(recipe(root))
    seconds = time.perf_counter() - begin
    count, steady = SHARDS * SAMPLES, 0.0
    for folder in folders.values():
        ends = sorted(sidecar.stat().st_mtime for sidecar in Path(folder).glob("*.arrow"))
        steady += (ends[-1] - ends[0]) / (count - SAMPLES)
    return {"pairs_s": 1 / steady, "whole_pairs_s": count / seconds, "cpu_ms": tree.cpu() / count * 1e3}


TEACHING: dict[str, Callable[[Path], dict[str, float]]] = {
    "teachers alone, from memory": lambda root: bare(root, True),
    "one process that reads, decodes, scores": lambda root: bare(root, False),
    "itm teach": stage,
}


def teaching(bench: Bench) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{bench.root}/mlflow.db"
    make_split(bench.root)
    make_models(bench.root, 1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TEACHING}
    for _ in range(bench.rounds):
        for name, seen in found.items():
            seen.append(bench.own_process("tests.support.bench_teach", "teaching", "--row", name))
    middle = {name: {key: statistics.median(row[key] for row in seen) for key in seen[0]} for name, seen in found.items()}
    peer = next(iter(middle.values()))
    bench.say(f"## `itm teach` against its bare teachers, {SHARDS * SAMPLES} pairs, JPEGs of 500x375, one layer of each teacher", "")
    cells = (
        [
            name,
            f"{row['pairs_s']:.0f}",
            f"{row['whole_pairs_s']:.0f}",
            f"{row['cpu_ms']:.1f}",
            f"{peer['cpu_ms'] / row['cpu_ms']:.0%}",
            f"{row['pairs_s'] / peer['pairs_s']:.2f}",
        ]
        for name, row in middle.items()
    )
    bench.say(*rows(["", "pairs/s once running", "with its start", "CPU-ms a pair", "of it the teachers", "x pairs/s"], cells))


# --- reading ------------------------------------------------------------------------------------------------------------------------------


def forms(folder: Path, vectors: np.ndarray) -> dict[str, tuple[Path, Callable[[], Any], Callable[[np.ndarray], Any] | None]]:
    """name -> the file, reading all of it as float32, and the vectors of scattered rows (None: the form has none)."""
    keys = [f"k{n:07d}" for n in range(len(vectors))]
    found: dict[str, tuple[Path, Callable[[], Any], Callable[[np.ndarray], Any] | None]] = {}
    for dtype in ("int8", "fp16", "fp32"):
        uri = folder / f"{dtype}.arrow"
        write_sidecar(str(uri), Header({"kind": "made up"}, "image", dtype, "00000.tar", "0"), keys, vectors)
        store = read_sidecar(str(uri))
        found[f"our store, {dtype}"] = (uri, lambda u=str(uri): whole(read_sidecar(u).vectors), lambda at, s=store: picked(s.vectors, at))
    for dtype in ("float16", "float32"):
        uri = folder / f"{dtype}.npy"
        np.save(uri, vectors.astype(dtype))
        held = np.load(uri, mmap_mode="r")
        found[f"plain npy, {dtype}, mapped, no keys"] = (uri, lambda h=held: whole(h), lambda at, h=held: picked(h, at))
    uri = folder / "cusa.npy"
    np.save(uri, np.array({key: row[None] for key, row in zip(keys, vectors, strict=True)}, dtype=object), allow_pickle=True)
    whole_dict = np.load(uri, allow_pickle=True).item()
    found["CUSA's npy, one pickled dict"] = (
        uri,
        lambda u=uri: np.concatenate(list(np.load(u, allow_pickle=True).item().values())),
        lambda at: np.stack([whole_dict[keys[k]][0] for k in at]),
    )
    uri = folder / "raygen.tar"
    tar_of_gz(uri, keys, vectors)
    found["RayGen: tar of pth.gz, bf16"] = (uri, lambda u=uri: np.stack(list(read_gz(u))), None)
    return found


def whole(vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), 128):
        vectors[start : start + 128].astype(np.float32)


def picked(vectors: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Row by row, as training reads a batch."""
    return np.stack([vectors[k].astype(np.float32) for k in at])


def tar_of_gz(uri: Path, keys: list[str], vectors: np.ndarray) -> None:
    """As apple/ml-mobileclip-dr writes embeddings: a gzipped torch file a sample."""
    with tarfile.open(uri, "w") as tar:
        for key, vector in zip(keys, torch.from_numpy(vectors).bfloat16(), strict=True):
            buffer = io.BytesIO()
            with gzip.GzipFile(fileobj=buffer, mode="wb") as stream:
                torch.save({"image_emb": vector.clone()}, stream)
            info = tarfile.TarInfo(f"{key}.pth.gz")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)


def read_gz(uri: Path) -> Iterator[np.ndarray]:
    """As its TarReader reads them."""
    with tarfile.open(fileobj=io.BytesIO(uri.read_bytes())) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                yield torch.load(io.BytesIO(stream.read()))["image_emb"].float().numpy()


def reading(bench: Bench) -> None:
    for width, count in ((TEXT_WIDE, 8192), (WIDE, 512)):
        folder = bench.root / f"reading-{width}"
        folder.mkdir(parents=True, exist_ok=True)
        drawn = np.random.default_rng(0)
        made = forms(folder, drawn.normal(0, 1, (count, width)).astype(np.float32))
        spans = alternate({name: read for name, (_, read, _) in made.items()}, bench.rounds)
        at = drawn.integers(0, count, 128)
        batches = {name: lambda f=pick, a=at: f(a) for name, (_, _, pick) in made.items() if pick is not None}
        scattered = alternate(batches, 3 * bench.rounds)
        peer = count / spans["RayGen: tar of pth.gz, bf16"][1]
        bench.say(f"## Reading vectors, {width:,} wide ({count:,} rows, one thread, file cache warm)", "")
        cells = (
            [
                name,
                f"{uri.stat().st_size / count:,.0f}",
                f"{count / spans[name][1]:,.0f}",
                f"{count / spans[name][1] / peer:,.1f}",
                f"{scattered[name][1] * 1e3:.2f}" if name in scattered else "not by row",
            ]
            for name, (uri, _, _) in made.items()
        )
        bench.say(*rows(["", "bytes a row", "rows/CPU-s to float32", "x RayGen", "CPU-ms, 128 scattered rows"], cells))
    bench.say("A pair is an image row and a text row.", "")


# --- what labels cost a step --------------------------------------------------------------------------------------------------------------


def labels(bench: Bench) -> None:
    module = "tests.support.bench_labels"
    parts = bench.own_process(module, "parts", "--batch", str(bench.batch), "--number", str(bench.rounds))
    bench.say(f"## Parts of a step, batch {bench.batch} (CUSA's table 12; theirs on a V100, batch 128)", "")
    theirs = ["162.11 ms, 1,831 MB", "90.39 ms, 1,037 MB", "", "12.75 ms, 329 MB", "", "3.26 ms, 311 MB", "0.3 ms"]
    cells = ([name, f"{cpu * 1e3:.2f}", said] for (name, (_, cpu)), said in zip(parts.items(), theirs, strict=True))
    bench.say(*rows(["", "CPU-ms a batch", "theirs"], cells))
    device = bench.own_process(module, "device", "--batch", str(bench.batch))
    found = bench.own_process(module, "steps", "--batch", str(bench.batch), "--number", str(bench.rounds))
    bench.say(f"## A training step by the source of its labels, batch {bench.batch} (CUSA's table 13)", "")
    base = found["none, none"]
    bench.say(
        *rows(["labels of image / text", *(f"{of} {term}" for of in HEADS for term in ("+CSA", "+USA", "+CUSA"))], steps_of(found, device))
    )
    bench.say(
        f"Without soft labels: {base['cpu_s']:.2f} CPU-s, {device['none, none'] / 1e6:.1f} M elements, {base['own_mb']:.0f} MB of its own.",
        "",
    )
    hours(bench, parts)


HEADS = ("CPU-s", "M elements", "host, own MB")


def steps_of(found: dict[str, dict[str, Any]], device: dict[str, int]) -> Iterator[list[str]]:
    terms = [term for term in TERMS if term != "none"]
    for source in SOURCES[1:]:
        on = source.replace("npy", "store")  # on the device they are the same vectors
        yield [
            source,
            *(f"{found[f'{source}, {term}']['cpu_s']:.2f}" for term in terms),
            *(f"{device[f'{on}, {term}'] / 1e6:.1f}" for term in terms),
            *(f"{found[f'{source}, {term}']['own_mb']:.0f}" for term in terms),
        ]


def hours(bench: Bench, parts: dict[str, tuple[float, float]]) -> None:
    """Hours to score so many pairs once, one image and one caption each."""
    (_, image), (_, text) = list(parts.values())[:2]
    each = {
        "core-hours here (measured above)": (image + text) / bench.batch,
        "V100-hours (the paper's table 12)": V100["image"] + V100["text"],
        "H100-hours on paper (bf16, two fifths of the peak)": (GFLOP["image"] + GFLOP["text"]) / H100,
    }
    bench.say("## Hours of scoring, ViT-B/32 and a base-size text model", "")
    cells = ([name, *(f"{seconds * pairs / 3600:,.2f}" for pairs in PAIRS)] for name, seconds in each.items())
    bench.say(*rows(["", *(f"{pairs // 1_000_000:,} M pairs" for pairs in PAIRS)], cells))


WHAT: dict[str, Callable[[Bench], None]] = {"teaching": teaching, "reading": reading, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(WHAT), metavar="|".join(WHAT))
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "itm-bench-teach", help="where the made-up data lies")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="pairs of a training step")
    parser.add_argument("--write", metavar="FILE", help="write the tables there too")
    parser.add_argument("--row", choices=TEACHING, help="measure this row of `teaching` alone, in this process")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if args.row:
        print(json.dumps(TEACHING[args.row](args.root)), flush=True)
        return
    bench, began = Bench(args.root, args.rounds, args.batch), time.perf_counter()
    for what in args.what:
        WHAT[what](bench)
    minutes, load = (time.perf_counter() - began) / 60, os.getloadavg()[1]
    bench.say(
        f"{os.cpu_count()} cores, medians of {args.rounds}, {minutes:.0f} minutes at a load of {load:.0f}; torch {torch.__version__}."
    )
    if args.write:
        Path(args.write).write_text("\n".join(bench.lines) + "\n")


if __name__ == "__main__":
    main()
