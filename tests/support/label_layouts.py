"""Tiny sets of labelled images in exactly the layouts of CUB-200-2011, Stanford Online Products, In-Shop Clothes and iNaturalist."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.pictures import picture, write


def _pictures(root: Path, paths: list[str], first: int) -> None:
    write(root, {path: picture(first + number, "JPEG") for number, path in enumerate(paths)})


def cub(root: Path) -> Path:
    """Two classes of the first hundred, and the classes 101 (3 images) and 200 (2), of which train_test_split.txt calls 3 training."""
    classes = [1, 1, 100, 100, 101, 101, 101, 200, 200]
    paths = [f"{c:03d}.Bird_{c}/Bird_{c}_{n:04d}.jpg" for n, c in enumerate(classes)]
    _pictures(root / "images", paths, 0)
    lists = {"images.txt": paths, "image_class_labels.txt": classes, "train_test_split.txt": [0, 0, 1, 1, 1, 0, 0, 0, 0]}
    write(root, {name: "".join(f"{n} {said}\n" for n, said in enumerate(rows, 1)) for name, rows in lists.items()})
    return root


def sop(root: Path) -> Path:
    rows = [(11319 + n // 2, f"chair_final/{n}_0.JPG") for n in range(6)]
    _pictures(root, [path for _, path in rows], 100)
    lines = [f"{59552 + n} {label} 3 {path}\n" for n, (label, path) in enumerate(rows)]
    write(root, {"Ebay_test.txt": "image_id class_id super_class_id path\n" + "".join(lines), "Ebay_train.txt": "not read"})
    return root


def inshop(root: Path) -> Path:
    """Three queries of two items against four images of the gallery, one of them of a third item; one training image."""
    rows = [("a", 7, "query"), ("b", 7, "query"), ("c", 8, "query"), ("d", 7, "gallery"), ("e", 8, "gallery")]
    rows += [("f", 8, "gallery"), ("g", 9, "gallery"), ("h", 1, "train")]
    named = [(f"img/WOMEN/Dresses/id_{item:08d}/{name}_1_front.jpg", f"id_{item:08d}", status) for name, item, status in rows]
    _pictures(root / "Img", [path for path, _, _ in named], 200)
    lines = "".join(f"{path:<60} {item} {status}\n" for path, item, status in named)
    write(root, {"Eval/list_eval_partition.txt": f"{len(rows)}\nimage_name item_id evaluation_status\n{lines}"})
    return root


def inaturalist(root: Path) -> Path:
    """The json in the folder that its paths start at."""
    images = [{"id": 400 + n, "file_name": f"train_val2018/Aves/{n // 2}/{n:032x}.jpg"} for n in range(4)]
    _pictures(root, [str(row["file_name"]) for row in images], 300)
    notes = [{"id": n, "image_id": 400 + n, "category_id": 10 + n // 2} for n in reversed(range(4))]
    write(root, {"val2018.json": json.dumps({"images": images, "annotations": notes, "categories": []})})
    return root / "val2018.json"


def all_four(root: Path) -> dict[str, str]:
    """The option `sets` of the source `labelled`."""
    made = {"cub": cub(root / "CUB_200_2011"), "sop": sop(root / "Stanford_Online_Products"), "inshop": inshop(root / "In-shop")}
    return {name: str(place) for name, place in made.items()} | {"inaturalist": str(inaturalist(root / "inat"))}
