"""Raw data in the layouts that people have, each small and made in a moment: `layout(folder)` writes it, returns the path to look at."""

from __future__ import annotations

import base64
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from itm.data.manifest import Manifest, write_manifest
from itm.data.shards import write_shard
from tests.support.own_photos import scenes, table, write_photos

COUNT = 6
RECORDS = scenes(COUNT, "tiny")
SPLITS = ("train", "val", "test")
TEXTS = [record.captions[0].text for record in RECORDS]


def photos(folder: Path, below: str = "photos") -> list[str]:
    return write_photos(folder / below, RECORDS)


def csv_with_header(folder: Path) -> Path:
    (folder / "captions.csv").write_text(table(photos(folder), RECORDS))
    return folder


def tsv_without_header(folder: Path) -> Path:
    (folder / "captions.tsv").write_text("".join(f"{n}\t{t}\n" for n, t in zip(photos(folder), TEXTS, strict=True)))
    return folder / "captions.tsv"


def bars_with_numbers(folder: Path) -> Path:
    """As Flickr30k's results.csv."""
    rows = [f"{n}| {k}| {c.text} ." for n, r in zip(photos(folder), RECORDS, strict=True) for k, c in enumerate(r.captions)]
    (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows, ""]))
    return folder


def csv_with_splits(folder: Path) -> Path:
    rows = [f'{n},{s},"{t}"' for n, s, t in zip(photos(folder), SPLITS * 2, TEXTS, strict=True)]
    (folder / "all.csv").write_text("\n".join(["filename,split,caption", *rows, ""]))
    return folder


def txt_beside(folder: Path) -> Path:
    for name, text in zip(photos(folder), TEXTS, strict=True):
        (folder / "photos" / name).with_suffix(".txt").write_text(text)
    return folder / "photos"


def bare_photos(folder: Path) -> Path:
    photos(folder, "holiday")
    return folder / "holiday"


def imagefolder(folder: Path) -> Path:
    rows = [json.dumps({"file_name": n, "text": t}) for n, t in zip(photos(folder, "set"), TEXTS, strict=True)]
    (folder / "set" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "set"


def parquet(folder: Path) -> Path:
    images = [{"bytes": record.image, "path": f"{record.key}.png"} for record in RECORDS]
    pq.write_table(pa.table({"image": images, "caption": TEXTS}), folder / "train-00000-of-00001.parquet")
    return folder


def zip_of_photos(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for name, record, text in zip(photos(folder, "loose"), RECORDS, TEXTS, strict=True):
            archive.writestr(f"photos/{name}", record.image or b"")
            archive.writestr(f"photos/{name.replace('.png', '.txt')}", text)
            archive.writestr(f"__MACOSX/photos/._{name}", b"a Mac's twin")
    return folder / "photos.zip"


def tar_of_photos(folder: Path) -> Path:
    with tarfile.open(folder / "photos.tar", "w") as archive:
        for name, record in zip(photos(folder, "loose"), RECORDS, strict=True):
            _add(archive, f"photos/{name}", record.image or b"")
    return folder / "photos.tar"


def our_shards(folder: Path) -> Path:
    for split in SPLITS:
        info = write_shard(str(folder / "shards" / split / "00000.tar"), RECORDS)
        write_manifest(str(folder / "shards" / split), Manifest(split=split, source="scenes 1234", shards=[info]))
    return folder / "shards"


def img2dataset(folder: Path) -> Path:
    (folder / "laion").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "laion" / f"{shard:05d}.tar", "w") as archive:
            for n in range(3):
                record, key = RECORDS[3 * shard + n], f"{shard:05d}{n:04d}"
                _add(archive, f"{key}.png", record.image or b"")
                _add(archive, f"{key}.txt", record.captions[0].text.encode())
                _add(archive, f"{key}.json", json.dumps({"caption": record.captions[0].text, "key": key}).encode())
    return folder / "laion"


def coco(folder: Path) -> Path:
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        names = photos(folder, f"{split}2017")
        images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
        said = [{"id": n, "image_id": n, "caption": text} for n, text in enumerate(TEXTS)]
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps({"images": images, "annotations": said}))
        boxes = [{"id": n, "image_id": n, "bbox": [0, 0, 1, 1], "category_id": 1} for n in range(COUNT)]
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    return folder


def karpathy(folder: Path) -> Path:
    splits = ("train", "restval", "val", "test", "train", "train")
    rows = [
        {"split": s, "filename": n, "imgid": k, "sentences": [{"raw": t, "sentid": k}]}
        for k, (s, n, t) in enumerate(zip(splits, photos(folder, "images"), TEXTS, strict=True))
    ]
    (folder / "dataset_mine.json").write_text(json.dumps({"dataset": "mine", "images": rows}))
    return folder / "dataset_mine.json"


def pairs(folder: Path) -> Path:
    names = photos(folder, "images")
    for split in SPLITS:
        rows = [{"image": f"images/{n}", "caption": [t, t + " again"]} for n, t in zip(names, TEXTS, strict=True)]
        (folder / f"mine_{split}.json").write_text(json.dumps(rows))
    return folder


def precomp(folder: Path) -> Path:
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        rng = np.random.default_rng(len(split))
        np.save(folder / f"{name}_ims.npy", rng.standard_normal((COUNT, 4, 16), np.float32))
        (folder / f"{name}_caps.txt").write_text("".join(f"{t}\n" for r in RECORDS for t in [c.text for c in r.captions][:5]))
    return folder


def bua(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    with (folder / "features.tsv").open("wb") as file:
        for n in range(COUNT):
            arrays = [rng.standard_normal((3, width)).astype(np.float32) for width in (4, 16)]
            file.write(b"\t".join([str(n).encode(), b"640", b"480", b"3", *map(base64.b64encode, arrays)]) + b"\n")
    images = [{"id": n, "file_name": f"photo_{n:06d}.jpg"} for n in range(COUNT)]
    said = [{"id": n, "image_id": n, "caption": text} for n, text in enumerate(TEXTS)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": said}))
    return folder


def uniter(folder: Path) -> Path:
    import msgpack

    names = [f"flickr30k_{n:012d}.npz" for n in range(COUNT)]
    arrays = {"features": np.ones((3, 16), np.float16), "norm_bb": np.full((3, 6), 0.5, np.float16), "conf": np.ones((3, 1), np.float16)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    _database(folder / "img_db" / "feat", {n.encode(): buffer.getvalue() for n in names} | {b"__keys__": json.dumps(names).encode()})
    for split in ("train", "val"):
        owners = {str(k): name for k, name in enumerate(names)}
        rows: dict[bytes, bytes] = {}
        for k, name in owners.items():
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "lz4") as out:
                out.write(msgpack.packb({"input_ids": [1, 2], "img_fname": name, "raw": TEXTS[int(k)]}))
            rows[k.encode()] = sink.getvalue().to_pybytes()
        place = _database(folder / "txt_db" / f"itm_flickr30k_{split}.db", rows)
        said: dict[str, Any] = {"id2len": dict.fromkeys(owners, 2), "txt2img": owners, "img2txts": {n: [k] for k, n in owners.items()}}
        for name, value in (said | {"meta": {"CLS": 101, "SEP": 102}}).items():
            (place / f"{name}.json").write_text(json.dumps(value))
    return folder


def _database(folder: Path, entries: dict[bytes, bytes]) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 24, lock=False) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    (folder / "lock.mdb").unlink(missing_ok=True)
    return folder


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    f.__name__: f
    for f in (
        csv_with_header,
        tsv_without_header,
        bars_with_numbers,
        csv_with_splits,
        txt_beside,
        bare_photos,
        imagefolder,
        parquet,
        zip_of_photos,
        tar_of_photos,
        our_shards,
        img2dataset,
        coco,
        karpathy,
        pairs,
        precomp,
        bua,
        uniter,
    )
}
