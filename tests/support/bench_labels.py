"""What soft labels cost a training step: tables 12 and 13 of CUSA's appendix in their shape, on this CPU. `bench_teach` runs it.

Student, image teacher and text teacher have the widths of the paper's (CLIP ViT-B/32, Unicom ViT-B/32, all-mpnet-base), random weights, and
3 of their 12 layers in table 13, so that their shares of a step are the paper's and a step takes seconds. Image vectors are 37,632 wide.
Every row runs in a process of its own, forked from one that has imported everything. Memory of the device is that of the pretend CUDA
device: elements of all tensors that live at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WIDE, TEXT_WIDE = 37_632, 768
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SOURCES = ("none", "store / store", "npy / npy", "store / online", "online / store", "online / online")
"""Where the labels of (image / text) come from; npy: CUSA's own dictionaries. `store / online` is the released code, with our store."""
TERMS: dict[str, dict[str, Any]] = {
    "none": {"kind": "matching"},
    "CSA": {"kind": "cusa", "options": {"usa": False}},
    "USA": {"kind": "cusa", "options": {"csa": False, "usa": {"teacher": 1.0}}},
    "CUSA": {"kind": "cusa"},
}


def names() -> list[tuple[str, str]]:
    """(source, term) of every row."""
    return [("none", "none"), *((source, term) for source in SOURCES[1:] for term in ("CSA", "USA", "CUSA"))]


def make_models(root: Path, layers: int) -> Path:
    """Student and teachers, saved once; of the folder's `image` and `text` the teachers are built as `itm teach` builds them."""
    folder = root / f"models-{layers}"
    if not (folder / "done").exists():
        import torch
        from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

        from tests.support.bench_data import SENTENCE

        torch.manual_seed(0)
        depth = {"num_hidden_layers": layers}
        vision = {**SIZES, **depth, "image_size": 224, "patch_size": 32}
        words = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, **depth, "vocab_size": 1000}
        words |= {"max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 0}
        CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=512)).save_pretrained(folder / "student")
        CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "image")
        known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(SENTENCE.split()))]
        BertModel(BertConfig(**SIZES, **depth, vocab_size=len(known)), add_pooling_layer=False).save_pretrained(folder / "text")
        (folder / "words.txt").write_text("\n".join(known))
        BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder / "text")
        (folder / "done").touch()
    return folder


def teachers(folder: Path) -> dict[str, Any]:
    """The image teacher gives its whole trunk, all patch tokens in a row, as CUSA stores it."""
    from itm.teachers.image import HFVisionTeacher
    from itm.teachers.text import HFTextTeacher

    return {"image": HFVisionTeacher(str(folder / "image"), pooling="patches"), "text": HFTextTeacher(str(folder / "text"), "mean")}


def made_up(root: Path) -> tuple[Path, dict[str, Any]]:
    """The split of `bench_data`, and a store a modality of random vectors."""
    import numpy as np

    from itm.data.shards import Manifest, read_manifest
    from itm.data.sidecar import Header, Store, sidecar_uri, write_sidecar
    from tests.support.bench_data import SAMPLES, make_split

    split = make_split(root)
    manifest: Manifest = read_manifest(str(split))
    stores = {}
    for modality, width in (("image", WIDE), ("text", TEXT_WIDE)):
        folder = root / f"wide-{modality}"
        for number, info in enumerate(manifest.shards):
            if Path(sidecar_uri(str(folder), info.name)).exists():
                continue
            rows = range(number * SAMPLES, (number + 1) * SAMPLES)
            vectors = np.random.default_rng(number).normal(0, 1, (SAMPLES, width)).astype(np.float32)
            header = Header({"kind": "made up"}, modality, "fp16", info.name, info.sha256)
            captions = [f"c{n}" for n in rows] if modality == "text" else None
            write_sidecar(sidecar_uri(str(folder), info.name), header, [f"k{n:06d}" for n in rows], vectors, captions)
        stores[modality] = Store(str(folder), modality, "fp16", width, {"kind": "made up"}, {})
    return split, stores


def as_dictionaries(root: Path) -> dict[str, str]:
    """The same vectors in CUSA's form: one pickled dictionary a modality, float32."""
    import numpy as np

    from itm.data.shards import read_manifest

    split, stores = made_up(root)
    found = {}
    for modality, store in stores.items():
        uri = root / f"wide-{modality}.npy"
        if not uri.exists():
            held: dict[str, Any] = {}
            for info in read_manifest(str(split)).shards:
                rows = store.sidecar(info.name)
                held |= {
                    name: vector.astype(np.float32)[None] for name, vector in zip(rows.captions or rows.keys, rows.vectors, strict=True)
                }
            np.save(uri, np.array(held, dtype=object), allow_pickle=True)
        found[modality] = str(uri)
    return found


@dataclass
class Labels:
    """Vectors of a batch from where a row of the table has them; those of stores are in the batch already."""

    live: dict[str, Any]
    held: dict[str, dict[str, Any]]
    device: str

    @classmethod
    def of(cls, source: str, root: Path, folder: Path, device: str) -> Labels:
        import numpy as np

        where = dict(zip(("image", "text"), source.split(" / "), strict=False))
        built = teachers(folder) if "online" in where.values() else {}
        live = {side: built[side].to(device) for side, kind in where.items() if kind == "online"}
        uris = as_dictionaries(root) if "npy" in where.values() else {}
        return cls(live, {side: np.load(uri, allow_pickle=True).item() for side, uri in uris.items()}, device)

    def add(self, batch: Any, columns: Any, texts: list[str]) -> Any:
        """The batch with the teacher vectors that no store gave. An online image teacher reads the student's pixels, decoded once."""
        import numpy as np
        import torch

        from itm.types import SoftLabels

        found = {}
        for side, known in self.held.items():
            keys = columns["key"] if side == "image" else columns["caption"]
            found[side] = torch.from_numpy(np.stack([known[key][0] for key in keys]))
        if "image" in self.live:
            payloads = [row.tobytes() for row in batch.images.pixels.permute(0, 2, 3, 1).contiguous().numpy()]
            found["image"] = torch.from_numpy(self.live["image"].embed(payloads))
        if "text" in self.live:
            found["text"] = torch.from_numpy(self.live["text"].embed([text.encode() for text in texts]))
        if not found:
            return batch
        stored = batch.teacher or SoftLabels()
        return replace(batch, teacher=SoftLabels(found.get("image", stored.image), found.get("text", stored.text)))


@contextlib.contextmanager
def most_elements() -> Iterator[dict[str, int]]:
    """`now` and `most`: elements of all storages of the pretend device that live at once, without what a kernel holds while it runs."""
    from tests.support.pretend import pretend

    known: dict[int, list[int]] = {}  # storage -> [wrappers that hold it, elements]
    count = {"now": 0, "most": 0}

    class Hold:
        """Lives as long as its wrapper. (A weak reference would do, were there no swapping of parameters.)"""

        def __init__(self, host: Any) -> None:
            self.place = host.untyped_storage().data_ptr()
            if self.place not in known:
                known[self.place] = [0, host.untyped_storage().nbytes() // host.element_size()]
                count["now"] += known[self.place][1]
                count["most"] = max(count["most"], count["now"])
            known[self.place][0] += 1

        def __del__(self) -> None:
            known[self.place][0] -= 1
            if not known[self.place][0]:
                count["now"] -= known.pop(self.place)[1]

    def born(self: Any, host: Any) -> None:
        self.host, self.hold = host, Hold(host)

    plain = pretend.CudaTensor.__init__
    pretend.CudaTensor.__init__ = born  # type: ignore[method-assign,assignment]
    try:
        yield count
    finally:
        pretend.CudaTensor.__init__ = plain  # type: ignore[method-assign]


def steps(root: Path, source: str, term: str, batch: int, number: int, device: str = "cpu") -> dict[str, float]:
    """Median CPU and wall seconds of `number` training steps after a first one, batch and labels included; memory of this process."""
    import psutil
    import torch

    from itm.config import Part, Text, Train
    from itm.data.arrow import to_columns
    from itm.data.collate import to_batch
    from itm.data.pairs import Pairs, Work
    from itm.data.plan import Plan
    from itm.data.preprocess import ImageInput, Inputs
    from itm.data.shards import read_manifest
    from itm.data.text import build_tokenizer
    from itm.kinds import build_part
    from itm.matchers.folder import build_matcher
    from itm.methods import METHODS
    from itm.training.switches import build_step
    from tests.support.bench_data import SENTENCE

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = make_models(root, 3)
    split, stores = made_up(root)
    stored = dict(zip(("image", "text"), source.split(" / "), strict=False))
    manifest = read_manifest(str(split))
    inputs = Inputs(ImageInput(size=224), build_tokenizer(Text(max_length=32), [SENTENCE] * 5))
    given = {side: stores[side] for side, kind in stored.items() if kind == "store"}
    pairs = Pairs(str(split), manifest, Plan.of(manifest, seed=0, batch=batch), inputs, given)
    student = Part(kind="clip", options={"path": str(folder / "student"), "heads": {"cross": True, "uni": True}})
    matcher = build_matcher(student, inputs)
    method = build_part(METHODS, TERMS[term]["kind"], TERMS[term].get("options", {}), "method", matcher=matcher).train()
    step = build_step(method, Train(schedule="constant"), lambda _: 1e-5, 0, torch.device(device))
    labels = Labels.of(source, root, folder, device)
    spans = []
    for turn in range(number + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        fetched = pairs.fetch(Work(turn, 0, 0))
        texts = fetched["text"].to_pylist()
        columns = pairs.prepare(fetched)
        step([labels.add(to_batch(columns), to_columns(fetched), texts)], turn)
        spans.append((time.process_time() - cpu, time.perf_counter() - wall))
    memory = psutil.Process().memory_full_info()
    cpu_s, wall_s = (statistics.median(span[k] for span in spans[1:]) for k in (0, 1))
    return {"cpu_s": cpu_s, "wall_s": wall_s, "own_mb": memory.uss / 1e6, "resident_mb": memory.rss / 1e6}


def all_steps(root: Path, batch: int, number: int) -> dict[str, dict[str, float]]:
    """`steps` of every row, by `source, term`."""
    import multiprocessing

    make_models(root, 3)
    as_dictionaries(root)
    import transformers.models.bert.modeling_bert
    import transformers.models.clip.modeling_clip  # noqa: F401  (imported before the fork, as all that is of no row's own)

    forked = multiprocessing.get_context("fork")
    found = {}
    for row in names():
        ours, theirs = forked.Pipe()
        child = forked.Process(target=lambda row=row, theirs=theirs: theirs.send(steps(root, *row, batch, number)))
        child.start()
        theirs.close()
        found[", ".join(row)] = ours.recv()
        child.join()
        print(row, found[", ".join(row)], file=sys.stderr, flush=True)
    return found


def on_device(root: Path, batch: int) -> dict[str, int]:
    """Elements that live at once on the device in the second step, when the optimiser's state is there, by `source, term`."""
    import gc

    from tests.support.pretend import pretend  # before torch

    found = {}
    for source, term in names():
        if "npy" not in source:  # on the device they are those of the store
            with pretend.cuda(), most_elements() as count:
                steps(root, source, term, batch, 1, "cuda")
            found[f"{source}, {term}"] = count["most"]
            gc.collect()
    return found


def parts(root: Path, batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Table 12: (wall, CPU) seconds a batch of what labels are made of, teachers at their full depth."""
    import numpy as np
    import torch

    from itm.data.shards import read_manifest
    from itm.losses.soft_label import cosine_matrix
    from tests.support.bench_data import SENTENCE, alternate

    torch.set_num_threads(1)
    split, stores = made_up(root)
    built = teachers(make_models(root, 12))
    manifest = read_manifest(str(split))
    drawn = np.random.default_rng(0)
    pixels = [drawn.integers(0, 256, 224 * 224 * 3, dtype=np.uint8).tobytes() for _ in range(batch)]
    words = SENTENCE.split()
    captions = [" ".join(drawn.choice(words, 11)).encode() for _ in range(batch)]
    sidecars = {side: [store.sidecar(info.name) for info in manifest.shards] for side, store in stores.items()}
    places = [(drawn.integers(0, len(manifest.shards), batch), drawn.integers(0, 256, batch)) for _ in range(rounds + 1)] * 8
    held = {side: np.load(uri, allow_pickle=True).item() for side, uri in as_dictionaries(root).items()}
    drawn_keys = {side: [list(drawn.choice(list(known), batch)) for _ in range(rounds + 1)] * 8 for side, known in held.items()}
    turn = iter(range(10**6))

    def rows(side: str) -> Any:
        shards, numbers = places[next(turn) % len(places)]
        return np.stack([sidecars[side][s].vectors[n].astype(np.float32) for s, n in zip(shards, numbers, strict=True)])

    def entries(side: str) -> Any:
        return np.stack([held[side][key][0] for key in drawn_keys[side][next(turn) % len(places)]])

    wide = torch.from_numpy(rows("image"))
    works = {
        "image teacher, ViT-B/32 trunk": lambda: built["image"].embed(pixels),
        "text teacher, BERT-base size": lambda: built["text"].embed(captions),
        f"image vectors from the store, {WIDE:,} wide, fp16": lambda: rows("image"),
        f"image vectors from CUSA's npy, {WIDE:,} wide, fp32": lambda: entries("image"),
        f"text vectors from the store, {TEXT_WIDE} wide, fp16": lambda: rows("text"),
        f"text vectors from CUSA's npy, {TEXT_WIDE} wide, fp32": lambda: entries("text"),
        f"one matrix of cosines, {WIDE:,} wide": lambda: cosine_matrix(wide),
    }
    return alternate(works, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "device", "parts"])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--number", type=int, default=3, help="steps, or rounds")
    args = parser.parse_args()
    if args.what == "steps":
        found: Any = all_steps(args.root, args.batch, args.number)
    elif args.what == "device":
        found = on_device(args.root, args.batch)
    else:
        found = parts(args.root, args.batch, args.number)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
