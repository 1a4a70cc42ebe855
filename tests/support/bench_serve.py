"""`make bench-serve`: what an index costs, how fast questions are answered, what re-ranking adds, and a day of a service in three minutes.

    python -m tests.support.bench_serve                                # 10,000 and 1,000,000 vectors; at most 30 minutes
    python -m tests.support.bench_serve --rows 2000 --questions 64     # small
    python -m tests.support.bench_serve --only engine,http --write docs/results/serve.md

Vectors of width 512 lie around 20,000 centres in a space of 32 dimensions (seed 0), as vectors of photos do. Peers are measured in the same
run: numpy's float32 product in memory, and where they are installed faiss (flat), and hnswlib or usearch on 100,000 rows. Every figure is a
row in <output>/rows.jsonl, with the load of the machine before it; rows that are there are not measured again, so a run that was stopped
goes on. recall@10 is against numpy in float64. Everything computes on one thread a process, as the replicas of the service do.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from itm.config import Part, Text
from itm.data import files
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import WordVocabulary, build_tokenizer
from itm.matchers.folder import build_matcher, save_matcher
from itm.retrieval.approximate import Approximate, faiss_uri
from itm.retrieval.engine import Engine, Question
from itm.retrieval.index import Index
from itm.retrieval.kept import matcher_identity
from itm.retrieval.store import Catalogue, Choices, Entry, SplitEntry, captions_uri, write_catalogue, write_rows
from itm.tracking.registry import crown
from itm.types import Captions, Encoded, Images, Matcher
from pipelines.index import index
from pipelines.on_ray.session import quiet
from tests.support.serve_page import page
from tests.support.serving_process import QUESTION, SCENES, Asking, replicas, serving, two_models, until
from tests.support.serving_world import add_scenes, scenes

WIDTH, CENTRES, INTRINSIC, SEED, REGIONS = 512, 20_000, 32, 0, 36
SHARD = 10_000
PEER_ROWS = 100_000
RECALLED = 50  # questions that show what a peer finds
CLIENTS = (1, 16)
PARTS = ("build", "engine", "faiss", "peers", "rerank", "http", "load")
CONV = {"kind": "conv", "image_size": 32, "hidden": 8}
DUAL = Part(kind="dual", options={"image": CONV, "text": {"kind": "hf_text", "path": "minilm"}, "width": WIDTH})
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Rows:
    """The rows measured so far, kept as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row.pop("row"): row for row in map(json.loads, lines)}

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        if name in self.rows:
            return
        load = os.getloadavg()[0]
        found = {key: round(value, 4) if isinstance(value, float) else value for key, value in work().items()}
        self.rows[name] = found | {"load": round(load, 1)}
        with self.path.open("a") as out:
            out.write(json.dumps({"row": name, **self.rows[name]}) + "\n")
        print(f"{name:<28}{self.told(name)}", flush=True)

    def told(self, name: str) -> str:
        return "  ".join(f"{key} {value}" for key, value in self.rows[name].items())


class Table(Matcher):
    """Captions are words that stand for vectors: the questions are given, and only the search is measured."""

    def __init__(self, questions: np.ndarray) -> None:
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.from_numpy(questions))
        self.vector_width = WIDTH
        names = [word(number) for number in range(len(questions))]
        self.inputs = Inputs(ImageInput(size=32, crop="squash"), WordVocabulary.from_captions(names))
        self.first = self.inputs.tokenizer.word2idx[names[0]]  # type: ignore[attr-defined]

    def encode_images(self, images: Images) -> Encoded:
        raise NotImplementedError("images are given as vectors")

    def encode_captions(self, captions: Captions) -> Encoded:
        return Encoded(vector=self.vectors[captions.tokens[:, 1] - self.first])

    def score(self, images: Encoded, captions: Encoded) -> torch.Tensor:
        assert images.vector is not None and captions.vector is not None
        return images.vector @ captions.vector.T


def word(number: int) -> str:
    """Words of one length, in the order of their numbers."""
    letters = []
    for _ in range(4):
        number, place = divmod(number, 26)
        letters.append(LETTERS[place])
    return "q" + "".join(reversed(letters))


# --- vectors ----------------------------------------------------------------------------------------------------------------------------


class Cloud:
    """The world that vectors and questions are drawn from."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(SEED)
        self.centres = self.draw.standard_normal((CENTRES, INTRINSIC), dtype=np.float32)
        self.base = self.draw.standard_normal((INTRINSIC, WIDTH), dtype=np.float32) / np.sqrt(WIDTH)

    def take(self, count: int) -> np.ndarray:
        """(count, WIDTH) float32 of length one."""
        inner = self.centres[self.draw.integers(0, CENTRES, count)] + 0.35 * self.draw.standard_normal((count, INTRINSIC), dtype=np.float32)
        rows = inner @ self.base + 0.01 * self.draw.standard_normal((count, WIDTH), dtype=np.float32)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def vectors(folder: Path, count: int, questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, WIDTH), memory-mapped, and questions; drawn once."""
    place, asked = folder / f"vectors-{count}.npy", folder / f"questions-{count}-{questions}.npy"
    if not place.exists() or not asked.exists():
        cloud = Cloud()
        rows = np.lib.format.open_memmap(folder / "vectors.tmp.npy", "w+", np.float32, (count, WIDTH))
        for start in range(0, count, SHARD):
            rows[start : start + SHARD] = cloud.take(min(SHARD, count - start))
        rows.flush()
        np.save(asked, cloud.take(questions))
        (folder / "vectors.tmp.npy").rename(place)
    return np.load(place, mmap_mode="r"), np.load(asked)


def write_index(uri: str, rows: np.ndarray, identity: str) -> dict[str, Any]:
    """An index as `itm index` writes it, of given vectors; seconds and bytes."""
    begun, entries = time.perf_counter(), []
    for number, start in enumerate(range(0, len(rows), SHARD)):
        piece = np.ascontiguousarray(rows[start : start + SHARD])
        place, ids = files.join(uri, "made", f"{number:05d}.arrow"), range(start, start + len(piece))
        named = {"key": pa.array([f"p{n:08d}" for n in ids]), "image": pa.array(ids, pa.int64())}
        write_rows(place, {}, named, Encoded(vector=torch.from_numpy(piece)), "fp16")
        captions = {"id": pa.array([f"c{start:08d}"]), "text": pa.array(["a photo"]), "image": pa.array([0], pa.int64())}
        write_rows(captions_uri(place), {}, captions, Encoded(vector=torch.from_numpy(piece[:1])), "fp16")
        entries.append(Entry(f"{number:05d}.tar", "0" * 64, 0, len(piece), 1, 0))
    catalogue = Catalogue(Choices(identity), "dual", [SplitEntry("/nowhere/made", "made", "0" * 12, entries)])
    write_catalogue(uri, catalogue)
    held = sum(files.walk(uri).values())
    return {"s": time.perf_counter() - begun, "MB": held / 1e6}


# --- measuring --------------------------------------------------------------------------------------------------------------------------


def asked_by(
    clients: int, questions: int, ask: Callable[[int], Any], seconds: float = 30.0, cpu: Callable[[], float] = time.process_time
) -> dict[str, Any]:
    """Latencies of `ask(number of a question)` from so many threads, until all are asked or the time is over.

    cpu: seconds that the processor has worked for those who answer, which a busy machine does not lengthen as it does latencies.
    """
    taken: list[float] = []
    numbers, end = iter(range(questions)), time.monotonic() + seconds
    lock = threading.Lock()

    def work() -> None:
        while time.monotonic() < end:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            begun = time.perf_counter()
            ask(number)
            taken.append(time.perf_counter() - begun)

    begun, worked = time.perf_counter(), cpu()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies(taken) | {"CPU ms": 1000 * (cpu() - worked) / len(taken), "q/s": len(taken) / (time.perf_counter() - begun)}


def latencies(taken: Sequence[float]) -> dict[str, Any]:
    found = np.percentile(np.array(taken or [np.nan]) * 1000, (50, 95, 99))
    return {"n": len(taken), **{f"p{p} ms": float(value) for p, value in zip((50, 95, 99), found, strict=True)}}


def truth(folder: Path, rows: np.ndarray, asked: np.ndarray, k: int = 10) -> list[set[int]]:
    """The k best rows of each question, in float64; kept beside the vectors."""
    kept = folder / f"truth-{len(rows)}-{len(asked)}.npy"
    if kept.exists():
        return [set(row.tolist()) for row in np.load(kept)]
    best = [np.full((len(asked), k), -np.inf), np.zeros((len(asked), k), np.int64)]
    for start in range(0, len(rows), SHARD):
        scores = asked.astype(np.float64) @ rows[start : start + SHARD].astype(np.float64).T
        both = np.concatenate([best[0], scores], 1)
        places = np.concatenate([best[1], np.arange(start, start + scores.shape[1])[None].repeat(len(asked), 0)], 1)
        order = np.argpartition(-both, k - 1, axis=1)[:, :k]
        best = [np.take_along_axis(both, order, 1), np.take_along_axis(places, order, 1)]
    np.save(kept, best[1])
    return [set(row.tolist()) for row in best[1]]


def recall(found: Sequence[Sequence[int]], wanted: Sequence[set[int]]) -> float:
    return sum(len(set(rows) & best) for rows, best in zip(found, wanted, strict=True)) / sum(map(len, wanted))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_engine(rows: Rows, count: int, uri: str, asked: np.ndarray, wanted: list[set[int]]) -> None:
    engine = Engine(Table(asked), Index.open(uri), "cpu")
    lock = threading.Lock()

    def ask(number: int) -> list[int]:
        with lock:  # as the service does
            (found,) = engine.answer([Question(text=word(number), k=10)])
        return [int(hit.key[1:]) for hit in found.hits]

    for clients in CLIENTS:
        rows.measure(f"engine/{count}/{clients}", lambda clients=clients: asked_by(clients, len(asked), ask) | {"peak MB": peak_mb()})

    def batched() -> dict[str, Any]:
        begun = time.perf_counter()
        found = engine.answer([Question(text=word(number), k=10) for number in range(len(asked))])
        seconds = time.perf_counter() - begun
        keys = [[int(hit.key[1:]) for hit in hits.hits] for hits in found]
        return {"n": len(asked), "q/s": len(asked) / seconds, "recall@10": recall(keys, wanted)}

    rows.measure(f"engine/{count}/batch", batched)


def measure_faiss(rows: Rows, count: int, uri: str, asked: np.ndarray, wanted: list[set[int]]) -> None:
    """The structure that `itm index --faiss recall=.95` makes: chosen on one half of the questions, measured on the other."""
    index, half = Index.open(uri), len(asked) // 2

    def build() -> dict[str, Any]:
        begun = time.perf_counter()
        made, measured = Approximate.build(index.images, 0.95, (torch.from_numpy(asked[:half]), torch.from_numpy(asked[half:])))
        made.write(faiss_uri(uri, "images"))
        return {"s": time.perf_counter() - begun, "kind": made.kind, "effort": made.effort, "recall@10": measured.recall}

    rows.measure(f"faiss-build/{count}", build)
    said = rows.rows[f"faiss-build/{count}"]
    index.settings = {"faiss": {"images": {"kind": said["kind"], "effort": said["effort"]}}}
    engine = Engine(Table(asked), index, "cpu")

    def ask(number: int) -> list[int]:
        (found,) = engine.answer([Question(text=word(number), k=10)])
        return [int(hit.key[1:]) for hit in found.hits]

    def work() -> dict[str, Any]:
        found = [ask(number) for number in range(half, len(asked))]
        return asked_by(1, len(asked) - half, lambda n: ask(half + n)) | {"recall@10": recall(found, wanted[half:])}

    rows.measure(f"faiss-engine/{count}/1", work)


def measure_peers(rows: Rows, folder: Path, given: np.ndarray, asked: np.ndarray) -> None:
    count, wanted = len(given), truth(folder, given, asked)
    for name, build in PEERS.items():
        if name not in ("numpy", "faiss") and count > PEER_ROWS:
            continue
        if name != "numpy" and importlib.util.find_spec(name) is None:
            print(f"NOT MEASURED: {name} is not installed")
            continue

        def work(build: Callable[[np.ndarray], Any] = build) -> dict[str, Any]:
            begun = time.perf_counter()
            gc.collect()
            ask = build(given)
            built = time.perf_counter() - begun
            some = min(len(asked), RECALLED)
            found = [ask(asked[number : number + 1]) for number in range(some)]
            return {"s": built, **asked_by(1, len(asked), lambda n: ask(asked[n : n + 1])), "recall@10": recall(found, wanted[:some])}

        rows.measure(f"{name}/{count}/1", work)


def _numpy(given: np.ndarray) -> Callable[[np.ndarray], list[int]]:
    held = np.array(given)  # not the file, but memory

    def ask(question: np.ndarray) -> list[int]:
        scores = (held @ question[0]).ravel()
        return [int(row) for row in np.argpartition(-scores, 9)[:10]]

    return ask


def _faiss(given: np.ndarray) -> Callable[[np.ndarray], list[int]]:
    from importlib import import_module

    index: Any = import_module("faiss").IndexFlatIP(WIDTH)
    index.add(given)
    return lambda question: [int(row) for row in index.search(question, 10)[1][0]]


def _hnswlib(given: np.ndarray) -> Callable[[np.ndarray], list[int]]:
    from importlib import import_module

    index: Any = import_module("hnswlib").Index(space="ip", dim=WIDTH)
    index.init_index(max_elements=len(given), ef_construction=100, M=16)
    index.add_items(given)
    index.set_ef(64)
    return lambda question: [int(row) for row in index.knn_query(question, k=10)[0][0]]


def _usearch(given: np.ndarray) -> Callable[[np.ndarray], list[int]]:
    from importlib import import_module

    index: Any = import_module("usearch.index").Index(ndim=WIDTH, metric="ip")
    index.add(np.arange(len(given)), given)
    return lambda question: [int(row) for row in index.search(question[0], 10).keys]


PEERS: dict[str, Callable[[np.ndarray], Any]] = {"numpy": _numpy, "faiss": _faiss, "hnswlib": _hnswlib, "usearch": _usearch}


LATE = {"image": {"kind": "regions", "in_width": 2048, "width": 1024}, "text": {"kind": "gru", "word_dim": 300, "width": 1024}}
RERANKED: dict[str, dict[str, Any]] = {"scan": LATE, "sgr": LATE | {"regions": REGIONS}, "uniter": {"region_dim": 2048}}


def measure_rerank(rows: Rows, folder: Path, times: int) -> None:
    """100 images of 36 stored regions, scored by a matcher of the published size for one text of ten words."""
    draw, names = torch.Generator().manual_seed(SEED), [word(number) for number in range(600)]
    boxes = torch.rand(100, REGIONS, 7, generator=draw)
    regions = torch.rand(100, REGIONS, 2048, generator=draw)
    images = Images(torch.arange(100), regions=regions, boxes=boxes, mask=torch.ones(100, REGIONS, dtype=torch.bool))
    for kind, options in RERANKED.items():
        if f"rerank/{kind}/100" in rows.rows:
            continue
        form = ImageInput(kind="regions", max_regions=REGIONS, region_width=2048)
        matcher = build_matcher(Part(kind=kind, options=options), Inputs(form, WordVocabulary.from_captions(names))).eval()
        with torch.no_grad():
            encoded = matcher.encode_images(images)
        uri, place = str(folder / f"regions-{kind}"), files.join(str(folder / f"regions-{kind}"), "made", "00000.arrow")
        write_rows(place, {}, {"key": pa.array([f"p{n}" for n in range(100)]), "image": pa.array(range(100), pa.int64())}, encoded, "fp16")
        with torch.no_grad():
            one = matcher.encode_captions(matcher.inputs.captions(["a photo"]))
        captions = {"id": pa.array(["c"]), "text": pa.array(["a photo"]), "image": pa.array([0], pa.int64())}
        write_rows(captions_uri(place), {}, captions, one, "fp16")
        entries = [SplitEntry("/nowhere/made", "made", "0" * 12, [Entry("00000.tar", "0" * 64, 0, 100, 1, 0)])]
        write_catalogue(uri, Catalogue(Choices(matcher_identity(matcher)), kind, entries))
        engine = Engine(matcher, Index.open(uri), "cpu")
        texts = [" ".join(names[(number * 7 + n) % 600] for n in range(10)) for number in range(times)]
        ask = lambda number, engine=engine, texts=texts: engine.answer([Question(text=texts[number], k=10)])
        ask(0)
        rows.measure(f"rerank/{kind}/100", lambda ask=ask: asked_by(1, times, ask))


def measure_http(rows: Rows, count: int, folder: Path, uri: str, times: int) -> None:
    """From a sentence to ids: MiniLM encodes it, all vectors are compared, the answer comes as JSON."""
    with serving(folder, ["--model", f"dual={folder / 'dual'}", "--index", uri]) as service:
        ask = lambda number: service.client.search(f"two dogs run through deep snow near {word(number % 600)}", k=10)
        ask(0)
        cpu = lambda: worked(service.process.pid)
        for clients in CLIENTS:
            rows.measure(f"http/{count}/{clients}", lambda clients=clients: asked_by(clients, times, ask, cpu=cpu))


def measure_load(rows: Rows, folder: Path, seconds: float) -> None:
    """16 clients; a replica is killed, the alias moved and moved back, the index of the other model grows; then some time in peace."""

    def work() -> dict[str, Any]:
        shutil.rmtree(folder / "load", ignore_errors=True)
        (folder / "load").mkdir()
        begun = time.monotonic()
        with two_models(folder / "load") as service, Asking(service.address, 16) as asking:
            until(lambda: len(asking.versions) > 100, 60)
            before = len(asking.versions)
            os.kill(replicas(service.process.pid, "dual")[0].pid, 9)
            time.sleep(seconds)
            moved = {}
            for number in ("2", "1"):
                start = time.monotonic()
                crown("dual", number)
                until(lambda number=number: asking.versions[-32:] == [f"dual/{number}"] * 32, 120)  # type: ignore[misc]
                moved[number] = time.monotonic() - start
            add_scenes(service.shards, scenes(10, seed=9))
            index(replace(service.scanned, add=True))
            until(lambda: service.client.search(QUESTION, model="scan")["total"] == SCENES + 10, 120)
            held = [resident(service.process.pid)]
            for _ in range(10):
                time.sleep(seconds / 2)
                held.append(resident(service.process.pid))
            figures = latencies(asking.seconds[before:])
        figures |= {"failed": len(asking.faults), "alias s": max(moved.values()), "s": time.monotonic() - begun}
        return figures | {"MB": held[0], "MB later": held[-1]}

    rows.measure("load/60/16", work)


def worked(process: int) -> float:
    """Seconds of the processor that all processes of the service have had."""
    own = psutil.Process(process)
    return sum(sum(one.cpu_times()[:2]) for one in [own, *own.children(recursive=True)])


def resident(process: int) -> float:
    """MB of the replicas of both models."""
    return sum(one.memory_info().rss for name in ("dual", "scan") for one in replicas(process, name)) / 1e6


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-serve"), help="vectors, indexes and rows.jsonl")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20.0, help="between the events of the load run")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts of {', '.join(PARTS)}")
    parser.add_argument("--write", type=Path, help="also write the table to this page")
    args = parser.parse_args()
    only = args.only.split(",")
    folder = args.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(folder / "rows.jsonl")
    torch.manual_seed(SEED)
    dual = build_matcher(DUAL, Inputs(ImageInput(size=32, crop="squash"), build_tokenizer(Text(kind="hf", path="minilm", max_length=48))))
    save_matcher(dual, folder / "dual")
    for count in args.rows:
        sized(rows, folder, count, args.questions, only, matcher_identity(dual))
    if "rerank" in only:
        measure_rerank(rows, folder, min(args.questions, 100))
    if "load" in only:
        measure_load(rows, folder, args.seconds)
    if args.write:
        args.write.write_text(page(rows.rows, args.write.read_text() if args.write.exists() else ""))


def sized(rows: Rows, folder: Path, count: int, questions: int, only: Sequence[str], identity: str) -> None:
    """The parts that depend on the number of rows."""
    given, asked = vectors(folder, count, questions)
    uri = str(folder / f"index-{count}")
    if f"build/{count}" not in rows.rows or not files.exists(files.join(uri, "index.json")):
        rows.rows.pop(f"build/{count}", None)
        with suppress(FileNotFoundError):
            shutil.rmtree(uri)
        rows.measure(f"build/{count}", lambda: write_index(uri, given, identity))
    if {"engine", "faiss"} & set(only):
        wanted = truth(folder, given, asked)
        if "engine" in only:
            measure_engine(rows, count, uri, asked, wanted)
        if "faiss" in only and count > PEER_ROWS:
            measure_faiss(rows, count, uri, asked, wanted)
    if "peers" in only:
        measure_peers(rows, folder, given, asked)
        if count > PEER_ROWS:
            measure_peers(rows, folder, given[:PEER_ROWS], asked)
    if "http" in only:
        measure_http(rows, count, folder, uri, questions)


if __name__ == "__main__":
    main()
