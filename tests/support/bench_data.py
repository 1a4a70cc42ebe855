"""Speed of the data plane: tar -> decoded uint8 batch on equal cores, region shards, sidecars. Peers are measured in the same run.

    python -m tests.support.bench_data                       # all; tables on stdout: loaders (photos of 500x375), packed (256x256), ...
    python -m tests.support.bench_data loaders --rounds 3 --epochs 4
    python -m tests.support.bench_data regions sidecars

Every loader runs in a process of its own, in turn, so that none finds another's workers; CPU time and memory are those of the whole
process tree, Ray's daemons included. Memory is the proportional share (PSS): pages that processes share count once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from itm.config import Text
from itm.data import files
from itm.data.collate import to_batch
from itm.data.manifest import Manifest, write_manifest
from itm.data.pairs import Pairs
from itm.data.pixels import decode
from itm.data.plan import Plan
from itm.data.preprocess import ImageInput, Inputs, draw, fit
from itm.data.records import Caption, Record, Regions
from itm.data.shards import Sample, read_manifest, read_samples, write_shard
from itm.data.sidecar import Header, Store, read_sidecar, sidecar_uri, write_sidecar
from itm.data.text import build_tokenizer

SENTENCE = "a photo of two small dogs that run over green grass near the old red house by blue water"
WORDS = SENTENCE.split()
BATCH, WORKERS, SHARDS, SAMPLES = 128, 2, 8, 256
TITLES = {"packed": "photos packed at 256x256, not resized", "loaders": "photos of 500x375, cut to 224x224"}
PACKED = 256  # pixels a side of shards that were packed at the size of training, as img2dataset writes them


def photo(number: int, side: int | None = None) -> bytes:
    """A JPEG of 500x375 (or on end; about 39 kB), or `side` pixels square: noise, its power falling with frequency as in photographs."""
    width, height = (side, side) if side else (500, 375) if number % 3 else (375, 500)
    rng, total = np.random.default_rng(number), np.zeros((height, width, 3), np.float32)
    for cell in (4, 8, 16, 32, 64, 128):
        coarse = rng.normal(0, 1, (3, height // cell + 2, width // cell + 2)).astype(np.float32)
        layers = [np.asarray(Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC)) for layer in coarse]
        total += np.stack(layers, -1) * cell**0.5 * 4
    out = io.BytesIO()
    Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_split(root: Path, side: int | None = None) -> Path:
    """SHARDS x SAMPLES photos with one caption each; made once."""
    split = root / f"train{side or ''}"
    if not (split / "manifest.json").exists():
        rng, infos = np.random.default_rng(0), []
        for shard in range(SHARDS):
            numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
            rows = [Record(f"k{n:06d}", "train", [Caption(f"c{n}", " ".join(rng.choice(WORDS, 11)))], photo(n, side)) for n in numbers]
            infos.append(write_shard(f"{split}/{shard:05d}.tar", rows))
        write_manifest(str(split), Manifest(split=split.name, source="made up", shards=infos))
    return split


def make_inputs(split: Path) -> Inputs:
    return Inputs(ImageInput(size=size_of(split)), build_tokenizer(Text(max_length=32), [SENTENCE] * 5))


def size_of(split: Path) -> int:
    """Photos are brought to 224 pixels a side; square ones were packed at the size that training wants."""
    return int(split.name.removeprefix("train") or 224)


# --- loaders: iterators of (pixels (B,S,S,3) or (B,3,S,S) uint8, tokens (B,L)) -----------------------------------------------------


def ours(split: Path, epochs: int, decode: str | None) -> Iterator[Any]:
    """decode: through Ray Data, decoded there; None: without Ray."""
    from pipelines.on_ray.session import connect
    from pipelines.on_ray.stream import stream, stream_here, work_of

    manifest = read_manifest(str(split))
    plan = Plan.of(manifest, seed=0, batch=BATCH)
    pairs = Pairs(str(split), manifest, plan, make_inputs(split), {})
    work = work_of(0, 0, epochs * plan.steps_per_epoch, 1)
    if decode:
        connect()
    for batch in map(to_batch, stream(pairs, work, decode, WORKERS) if decode else stream_here(pairs, work, WORKERS)):
        yield batch.images.pixels, batch.captions.tokens


def web_loader(split: Path, epochs: int, quick: bool) -> Iterator[Any]:
    """webdataset as its guide sets it up: shuffled shards, a buffer, batches made in workers. quick: our decoder, else PIL's."""
    import webdataset as wds

    inputs = make_inputs(split)

    def row(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        data, text = sample["jpg"], json.loads(sample["json"])["captions"][0]["text"]
        pixels = (
            inputs.image_columns(data, draw(0, 0, sample["__key__"]))["pixels"] if quick else fit(decode(data), size_of(split), "center")
        )
        return pixels, text

    def collate(rows: list[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(np.stack([pixels for pixels, _ in rows])), inputs.captions([text for _, text in rows]).tokens

    urls = sorted(map(str, split.glob("*.tar")))
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(500).map(row).batched(BATCH, collation_fn=collate, partial=False)
    loader = wds.WebLoader(data.repeat(epochs + 1), batch_size=None, num_workers=WORKERS, prefetch_factor=4)
    for number, (pixels, tokens) in enumerate(loader):
        if number == epochs * SHARDS * SAMPLES // BATCH:
            return
        yield pixels, tokens


def read_webdataset(split: Path, epochs: int) -> Iterator[Any]:
    """Ray Data as a first program writes it: rows through a map."""
    from pipelines.on_ray.session import connect

    connect()
    import ray

    inputs = make_inputs(split)

    def row(sample: dict[str, Any]) -> dict[str, Any]:
        pixels = inputs.image_columns(sample["jpg"], draw(0, 0, sample["__key__"]))["pixels"]
        return {"pixels": pixels, "tokens": inputs.captions([sample["json"]["captions"][0]["text"]]).tokens[0].numpy()}

    for _ in range(epochs):
        rows = ray.data.read_webdataset(sorted(map(str, split.glob("*.tar"))), decoder=as_bytes, suffixes=["jpg", "json"]).map(row)
        for batch in rows.iter_torch_batches(batch_size=BATCH, drop_last=True):
            yield batch["pixels"], batch["tokens"]


def as_bytes(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"json": json.loads(sample["json"])}


LOADERS: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    "ours, Ray Data": lambda split, epochs: ours(split, epochs, "trainer"),
    "ours, decode: actors": lambda split, epochs: ours(split, epochs, "actors"),
    "ours, without Ray": lambda split, epochs: ours(split, epochs, None),
    "WebLoader, our decoder": lambda split, epochs: web_loader(split, epochs, quick=True),
    "WebLoader, PIL": lambda split, epochs: web_loader(split, epochs, quick=False),
    "read_webdataset + map": lambda split, epochs: read_webdataset(split, 1),
}


class Tree:
    """CPU seconds and memory of this process and all below it, those that have ended included."""

    def __init__(self) -> None:
        self.top, self.peak = psutil.Process(), 0
        self.spent: dict[tuple[int, float], float] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Nobody waits for Ray's workers, so what they used is gone with them: look often enough."""
        while True:
            self.cpu()
            time.sleep(2)

    def processes(self) -> list[psutil.Process]:
        return [self.top, *self.top.children(recursive=True)]

    def cpu(self) -> float:
        """A process that has ended counts with what it had used when it was last seen."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self.spent[process.pid, process.create_time()] = times.user + times.system
        return sum(list(self.spent.values()))

    def look(self) -> None:
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        self.peak = max(self.peak, total)


def measure(loader: str, split: Path, epochs: int) -> dict[str, float]:
    """Consume a loader. The steady part begins after the first eighth of the batches, and two batches before the end it stops."""
    tree = Tree()
    whole = (1 if loader.startswith("read") else epochs) * SHARDS * SAMPLES // BATCH
    begin, end = max(2, whole // 8), whole - 2
    born, seconds, cpu, found = time.perf_counter(), 0.0, 0.0, {}
    for number, (pixels, tokens) in enumerate(LOADERS[loader](split, epochs), 1):
        assert len(pixels) == len(tokens) == BATCH and pixels.dtype == torch.uint8
        assert int(pixels[0, 0, 0].sum()) >= 0  # the bytes are really there
        if number == 1:
            found["first"] = time.perf_counter() - born
        if number == begin - 1:
            tree.look()  # 0.1 s for Ray's many processes, so not while time is taken
        if number == begin:
            seconds, cpu = time.perf_counter(), tree.cpu()
        if number == end:
            images = (end - begin) * BATCH
            found["images_s"] = images / (time.perf_counter() - seconds)
            found["cpu_ms"] = (tree.cpu() - cpu) / images * 1e3
            tree.look()
    return found | {"mb": tree.peak / 1e6, "whole": (time.perf_counter() - born) / (whole * BATCH)}


Loaders = dict[str, dict[str, float]]  # loader -> the medians of its figures


def loaders(root: Path, rounds: int, epochs: int, side: int | None = None) -> Loaders:
    make_split(root, side)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for _ in range(rounds):
        for name in LOADERS:
            command = [
                sys.executable,
                "-m",
                "tests.support.bench_data",
                "one",
                "--loader",
                name,
                "--root",
                str(root),
                "--epochs",
                str(epochs),
            ]
            command += ["--side", str(side)] if side else []
            said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            found[name].append(json.loads(said.splitlines()[-1]))
            print(f"  {name:<24}" + "  ".join(f"{key} {value:.4g}" for key, value in found[name][-1].items()), file=sys.stderr, flush=True)
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def loader_table(middle: Loaders) -> str:
    peer = middle["WebLoader, our decoder"], middle["WebLoader, PIL"]
    lines = [
        "| loader | images/s | CPU-ms/image | first batch s | peak MB | x images/s (same decoder, PIL) | x CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in middle.items():
        speed, cost = (" ".join(f"{r:.2f}" for r in rs) for rs in zip(*(ratios(row, other) for other in peer), strict=True))
        figures = f"{row['images_s']:.0f} | {row['cpu_ms']:.2f} | {row['first']:.1f} | {row['mb']:.0f} | {speed} | {cost}"
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def plot(found: dict[str, Loaders], path: str) -> None:
    """Bars of images/s and of CPU-ms an image, a column of charts for each kind of photo."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(found), 5), layout="constrained")
    charts = figure.subplots(2, len(found), squeeze=False)
    for column, (title, rows) in enumerate(found.items()):
        for line, (key, label, form) in enumerate((("images_s", "images/s", "%.0f"), ("cpu_ms", "CPU-ms an image, all processes", "%.2f"))):
            colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in rows]
            charts[line, column].bar_label(
                charts[line, column].barh(list(rows), [row[key] for row in rows.values()], color=colours), fmt=form
            )
            charts[line, column].invert_yaxis()
            charts[line, column].margins(x=0.15)
            charts[line, column].set_xlabel(label)
        charts[0, column].set_title(title)
    figure.savefig(path)


def ratios(row: dict[str, float], peer: dict[str, float]) -> tuple[float, float]:
    return row["images_s"] / peer["images_s"], row["cpu_ms"] / peer["cpu_ms"]


# --- regions, sidecars -------------------------------------------------------------------------------------------------------------


def regions(root: Path, rounds: int, samples: int = 1000) -> str:
    """Bytes of region shards a second as parsed samples, against reading the same (cached) file; and as prepared batches."""
    uri, rng = str(root / "regions/00000.tar"), np.random.default_rng(0)
    if not files.exists(uri):
        features = rng.normal(0, 1, (36, 2048)).astype(np.float16)
        boxes = np.sort(rng.random((36, 4)).astype(np.float32) * 300, 1)
        rows = (
            Record(f"k{n}", "train", [Caption(f"c{n}", "a dog")], None, "jpg", Regions(features, boxes, 400, 300)) for n in range(samples)
        )
        write_manifest(str(root / "regions"), Manifest(split="regions", source="made up", shards=[write_shard(uri, rows)]))
    manifest = read_manifest(str(root / "regions"))
    inputs = Inputs(ImageInput("regions"), build_tokenizer(Text(max_length=32), [SENTENCE] * 5))
    pairs = Pairs(str(root / "regions"), manifest, Plan.of(manifest, seed=0, batch=100), inputs, {})
    works = {
        "raw read": lambda: Path(uri).read_bytes(),
        "raw read, 1 MB at a time, nothing kept": lambda: skim(uri),
        "samples": lambda: sum(isinstance(s, Sample) for s in read_samples(uri)),
        "batches": lambda: [pairs(w) for w in work(pairs)],
    }
    spans = alternate(works, rounds)
    size = files.size_of(uri) / 1e9
    rows = [f"| {name} | {size / wall:.2f} | {size / cpu:.2f} | {spans['raw read'][0] / wall:.2f} |" for name, (wall, cpu) in spans.items()]
    return "\n".join(["| region shards | GB/s | GB/CPU-s | of raw |", "|---|---|---|---|", *rows])


def skim(uri: str) -> None:
    block = bytearray(1 << 20)
    with open(uri, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def work(pairs: Pairs) -> list[Any]:
    from pipelines.on_ray.stream import work_of

    return work_of(0, 0, pairs.fetch.plan.steps_per_epoch, 1)


def sidecars(root: Path, rounds: int, rows: int = 200_000, width: int = 384) -> str:
    """Rows a second: opening with every check, and all vectors as float32; and the vectors of scattered rows as a batch needs them."""
    lines = ["| sidecar | rows/s opened and checked | rows/CPU-s |", "|---|---|---|"]
    vectors = np.random.default_rng(0).normal(0, 1, (rows, width)).astype(np.float32)
    keys = [f"k{n}" for n in range(rows)]
    for dtype in ("int8", "fp16"):
        uri = str(root / f"side-{dtype}.arrow")
        write_sidecar(uri, Header({"kind": "made up"}, "image", dtype, "00000.tar", "0"), keys, vectors)
        wall, cpu = alternate({dtype: lambda uri=uri: read_sidecar(uri, "0").vectors}, rounds)[dtype]  # type: ignore[misc]
        lines.append(f"| {dtype}, width {width} | {rows / wall:,.0f} | {rows / cpu:,.0f} |")
    return "\n".join([*lines, "", attach(root, rounds, width)])


def attach(root: Path, rounds: int, width: int) -> str:
    """What two int8 teacher vectors add to the reading of a pair."""
    split = make_split(root, PACKED)
    manifest = read_manifest(str(split))
    plan = Plan.of(manifest, seed=0, batch=BATCH)
    given: dict[str, dict[str, Store]] = {
        "bare": {},
        "with": {m: store(root / f"store-{m}", manifest, m, width) for m in ("image", "text")},
    }
    pairs = {name: Pairs(str(split), manifest, plan, make_inputs(split), stores) for name, stores in given.items()}
    works = {name: lambda one=one: [one.fetch(w) for w in work(one)] for name, one in pairs.items()}  # type: ignore[misc]
    cpu = {name: spent / plan.steps_per_epoch * 1e3 for name, (_, spent) in alternate(works, rounds).items()}
    added = cpu["with"] - cpu["bare"]
    return f"Two int8 vectors of width {width} add {added:.2f} CPU-ms to the {cpu['bare']:.2f} of reading a batch of {BATCH} pairs."


def store(root: Path, manifest: Manifest, modality: str, width: int) -> Store:
    """A store of made-up vectors for the photos of `make_split`."""
    identity = {"kind": "made up"}
    for number, info in enumerate(manifest.shards):
        rows = range(number * SAMPLES, (number + 1) * SAMPLES)
        vectors = np.random.default_rng(number).normal(0, 1, (SAMPLES, width)).astype(np.float32)
        header = Header(identity, modality, "int8", info.name, info.sha256)
        captions = [f"c{n}" for n in rows] if modality == "text" else None
        write_sidecar(sidecar_uri(str(root), info.name), header, [f"k{n:06d}" for n in rows], vectors, captions)
    return Store(str(root), modality, "int8", width, identity, {})


def alternate(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median (wall, CPU) seconds by name; one round before them is not timed."""
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, job in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            job()
            if turn:
                spans[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (statistics.median(s[0] for s in rows), statistics.median(s[1] for s in rows)) for name, rows in spans.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["loaders", "packed", "regions", "sidecars"])
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "itm-bench", help="where the made-up data lies")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help=f"of {SHARDS * SAMPLES} images; packed: six times as many")
    parser.add_argument("--loader", choices=LOADERS, help="of the command `one`")
    parser.add_argument("--side", type=int, help="of the command `one`: square photos of so many pixels, not resized")
    parser.add_argument("--plot", metavar="SVG", help="also draw the tables of loaders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == ["one"]:
        print(json.dumps(measure(args.loader, make_split(args.root, args.side), args.epochs)), flush=True)
        return
    print(f"{os.cpu_count()} cores, {WORKERS} loader workers, batch {BATCH}, medians of {args.rounds} runs in turn", flush=True)
    of_photos: dict[str, Callable[[], Loaders]] = {
        "loaders": lambda: loaders(args.root, args.rounds, args.epochs),
        "packed": lambda: loaders(args.root, args.rounds, 6 * args.epochs, PACKED),  # a third of the time an image
    }
    found: dict[str, Loaders] = {}
    for what in args.what:
        if what in of_photos:
            found[TITLES[what]] = of_photos[what]()
            print(loader_table(found[TITLES[what]]) + "\n", flush=True)
        else:
            print({"regions": regions, "sidecars": sidecars}[what](args.root, args.rounds) + "\n", flush=True)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
