"""Precomputed regions: `*_precomp` folders, UNITER's databases, bottom-up-attention TSV files."""

from __future__ import annotations

from pathlib import Path

from itm.config import Part
from itm.data.detect.finding import Answers, Finding, choose, role_of, roles_of

BUA_CELLS = 6


def look_at_features(place: Path, answers: Answers) -> Finding | None:
    """None where no regions lie here. Raises ValueError naming what belongs to them and is missing."""
    if place.is_file():
        return _bua([place], place.parent, answers) if is_bua(place) else None
    precomp = [p.name.removesuffix("_ims.npy") for p in sorted(place.glob("*_ims.npy"))]
    if precomp:
        splits = roles_of([name for name in precomp if (place / f"{name}_caps.txt").exists()])
        if not splits:
            raise ValueError(f"{place} holds {precomp[0]}_ims.npy and no {precomp[0]}_caps.txt: the captions belong beside the regions")
        per_image = _captions_per_image(place, next(iter(splits.values())))
        options = {"path": str(place)} | ({} if per_image == 5 else {"captions_per_image": per_image})
        return Finding(
            f"a precomp folder of region features, {place.name}", Part(kind="precomp", options=options), splits=splits, image="regions"
        )
    if (lmdbs := _databases(place)) is not None:
        return lmdbs
    tsvs = [p for p in sorted(place.rglob("*.tsv*")) if is_bua(p)]
    return _bua(tsvs, place, answers) if tsvs else None


def _captions_per_image(folder: Path, split: str) -> int:
    """Lines of captions for a row of regions; the published files of 5 x as many rows repeat each image five times."""
    import numpy as np

    rows = len(np.load(folder / f"{split}_ims.npy", mmap_mode="r", allow_pickle=False))
    lines = (folder / f"{split}_caps.txt").read_bytes().removesuffix(b"\n").count(b"\n") + 1
    return lines // rows if rows and lines > rows and lines % rows == 0 else 5


def is_bua(file: Path) -> bool:
    """Six cells between tabs: id, width, height, boxes as numbers, then two of base64."""
    if ".tsv" not in file.name:
        return False
    with file.open("rb") as stream:
        cells = stream.readline(4096).split(b"\t")
    return len(cells) >= BUA_CELLS - 1 and all(cell.isdigit() for cell in cells[1:4])


def _bua(tsvs: list[Path], start: Path, answers: Answers) -> Finding:
    """Regions without captions: these come from an annotation file beside them."""
    from itm.data.detect.annotations import CAPTIONS, NAMES, annotation_at

    found = {str(p): a for p in sorted(start.rglob("*")) if p.is_file() and p not in tsvs and (a := annotation_at(p)) is not None}
    if given := answers.get("annotations"):
        annotation = annotation_at(Path(given))
    elif not found:
        raise ValueError(f"{tsvs[0].name} holds regions of images and no captions: say where those are with --annotations FILE")
    else:
        meanings = {name: NAMES[a.kind] for name, a in found.items()}
        annotation = found[choose(f"captions for {tsvs[0].name} may come from more than one file", "annotations", meanings, answers)]
    if annotation is None or annotation.kind not in ("karpathy", "coco", "pairs"):
        raise ValueError(f"--annotations {given}: captions of regions come from COCO, Karpathy or pair lists as JSON")
    said = {"kind": CAPTIONS[annotation.kind], "options": {"path": str(annotation.path)}}
    features: object = str(tsvs[0]) if len(tsvs) == 1 else [str(p) for p in tsvs]
    splits = roles_of([{"restval": "train"}.get(s, s) for s in annotation.splits])
    layout = f"bottom-up regions in {', '.join(p.name for p in tsvs)}, captions in {annotation.path.name}"
    return Finding(layout, Part(kind="bua_tsv", options={"features": features, "captions": said}), splits=splits, image="regions")


def _databases(place: Path) -> Finding | None:
    """UNITER's: a text database keeps meta.json and id2len.json beside data.mdb, an image database neither."""
    found = sorted({p.parent for p in place.rglob("data.mdb")})
    if not found:
        return None
    texts = [p for p in found if (p / "txt2img.json").exists() or (p / "meta.json").exists()]
    images = [p for p in found if p not in texts]
    if not texts or not images:
        raise ValueError(f"{place} holds {len(texts)} text and {len(images)} image databases of UNITER: both are needed, below one folder")
    roles = {role_of(p.name) or role_of(p.parent.name) or "train": str(p) for p in texts}
    shown: object = str(images[0]) if len(images) == 1 else [str(p) for p in images]
    vocab = next((str(p) for p in sorted(place.rglob("vocab.txt"))), None)
    options = {"texts": roles, "images": shown} | ({"vocab": vocab} if vocab else {})
    layout = f"UNITER databases: texts {', '.join(p.name for p in texts)}, images {', '.join(p.name for p in images)}"
    return Finding(
        layout, Part(kind="uniter_db", options=options), splits={r: r for r in ("train", "val", "test") if r in roles}, image="regions"
    )
