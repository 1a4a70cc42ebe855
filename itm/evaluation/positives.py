"""A table of the pairs that hold, in the place of the annotated ones: any 1:N set becomes a protocol of one recipe line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from itm.data import files
from itm.data.formats import Json
from itm.data.sources.source import read_json
from itm.data.sources.tables import read_table_file
from itm.evaluation.dataset import Names
from itm.evaluation.metrics import KS, chance_of, equivalence_metrics, rank_queries, with_sums
from itm.evaluation.protocols import Outcome, Scored, ScoreProtocol

COLUMNS = (("image", "image_key", "image_id"), ("caption", "caption_id", "caption_key"))
"""What the columns of images and of captions may be called where nobody says."""


class Positives(ScoreProtocol):
    """Recalls, mAP@R and R-precision over the pairs of `table`: a .csv, .tsv, .jsonl, .json or .parquet of image and caption keys.

    columns: what its two columns are called. A .json is a list of objects or of [image, caption], or {image: captions}. An image is named
    by its key, `image_id` or file name, a caption by its id. What the table does not name is in the gallery and is not asked.
    """

    def __init__(self, table: str, columns: Sequence[str] | None = None) -> None:
        self.table, self.columns = files.absolute(table), columns
        if columns is not None and len(columns) != 2:
            raise ValueError(f"protocol positives: columns are two, of images and of captions, not {list(columns)}")

    def identity(self) -> Json:
        """Another table is another result."""
        return {"table_hash": hashlib.sha256(files.read_bytes(self.table)).hexdigest()[:12]}

    def measure(self, scored: Scored, tie: str) -> Outcome:
        """Raises ValueError naming the rows of the table that name no image or caption of the split."""
        positives = relevance(read_table(self.table, self.columns), scored.names, self.table)
        metrics: dict[str, float] = {}
        chance: dict[str, float] = {}
        counts: dict[str, int] = {}
        for way, scores, truth in (("i2t", scored.scores, positives), ("t2i", scored.scores.T, positives.T)):
            ranking = rank_queries(scores, truth, tie)
            values = equivalence_metrics(ranking)
            found = {f"r{k}": ranking.recall(k) for k in KS} | {"medr": ranking.median_rank(), "meanr": ranking.mean_rank()}
            found |= {name: values[name] for name in ("map_at_r", "r_precision")}
            metrics |= {f"{way}_{name}": value for name, value in found.items()}
            chance |= {f"{way}_{name}": value for name, value in chance_of(truth.sum(1), truth.shape[1]).items()}
            counts[f"{way}_queries"] = int(ranking.asked.sum())
        counts["pairs"] = int(positives.sum())
        title = f"the pairs of {files.name_of(self.table)} as positives, all images and captions as gallery; ties {tie}"
        return Outcome(title, with_sums(metrics), with_sums(chance), counts)


def read_table(uri: str, columns: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
    """(image, caption, file and row) of every pair. Raises ValueError naming file and row for what is missing or empty."""
    rows = list(_json_rows(uri) if uri.lower().endswith(".json") else ((row.where, row.cells) for row in read_table_file(uri)))
    if not rows:
        raise ValueError(f"{uri} holds no pair")
    names = _columns(rows[0], columns)
    found = []
    for where, cells in rows:
        image, caption = (cells.get(name) for name in names)
        if image in (None, "") or caption in (None, ""):
            raise ValueError(f"{where}: {names[0]} and {names[1]} name a pair; it has {json.dumps(cells, default=str)[:120]}")
        found.append((str(image), str(caption), where))
    return found


def relevance(pairs: Iterable[tuple[str, str, str]], names: Names, where: str) -> Tensor:
    """(I,T) bool. Raises ValueError, with counts and the first place, for names that the split has not, or has of several images."""
    images = _image_rows(names)
    captions = {name: [row] for row, name in enumerate(names.caption_ids)}
    held = torch.zeros(len(names.image_keys), len(names.caption_ids), dtype=torch.bool)
    lost: list[str] = []
    total = 0
    for image, caption, place in pairs:
        total += 1
        rows = images.get(image, []), captions.get(caption, [])
        if len(rows[0]) > 1:
            raise ValueError(f"{place}: {image!r} is the name of {len(rows[0])} images of the split; name them by their keys")
        if all(rows):
            held[rows[0][0], rows[1][0]] = True
        else:
            lost.append(f"{place}: no {'caption' if rows[0] else 'image'} {caption if rows[0] else image!r}")
    if lost:
        raise ValueError(f"{where}: {len(lost)} of {total} pairs name what the split has not; {'; '.join(lost[:3])}")
    return held


def _image_rows(names: Names) -> dict[str, list[int]]:
    """Rows by key; by image_id or file name where no key is called so."""
    found: dict[str, list[int]] = {}
    for row, meta in enumerate(names.image_metas):
        for name in {str(meta[key]) for key in ("image_id", "filename") if meta.get(key) is not None}:
            found.setdefault(name, []).append(row)
    return found | {key: [row] for row, key in enumerate(names.image_keys)}


def _json_rows(uri: str) -> Iterator[tuple[str, Json]]:
    said = read_json(uri)
    if isinstance(said, dict):
        for image, captions in said.items():
            for caption in captions if isinstance(captions, list) else [captions]:
                yield f"{uri} of {image}", {"image": image, "caption": caption}
        return
    if not isinstance(said, list):
        raise ValueError(f"{uri} holds a {type(said).__name__}, not a list of pairs or {{image: captions}}")
    for number, row in enumerate(said):
        pair = dict(zip(("image", "caption"), row, strict=True)) if isinstance(row, list) and len(row) == 2 else row
        if not isinstance(pair, dict):
            raise ValueError(f"{uri} row {number} is no object and no [image, caption]")
        yield f"{uri} row {number}", pair


def _columns(first: tuple[str, Json], columns: Sequence[str] | None) -> tuple[str, str]:
    where, cells = first
    wanted = [(name,) for name in columns] if columns else COLUMNS
    found = [next((name for name in usual if name in cells), None) for usual in wanted]
    if None in found:
        what = ", ".join(columns) if columns else "image and caption (set `columns`)"
        raise ValueError(f"{where} has no column {what}; it has {', '.join(cells)}")
    return str(found[0]), str(found[1])
