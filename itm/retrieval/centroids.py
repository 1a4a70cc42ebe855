"""A first stage of late interactions: parts stand for the nearest of a few centroids, so that words need few products with many images.

As PLAID (Santhanam et al., CIKM 2022) does for texts: an image is kept as the set of the centroids of its regions, a caption as that of the
centroids of its words. A word of a question is compared with all centroids once, an image gives it the best of its own, and the mean over
the words is the score; regions ask for captions likewise. So candidates come from parts, not from the mean of parts; the exact score
decides among them.

    <index>/images.centroids.arrow, captions.centroids.arrow     the centroids of each side, unit vectors in fp32: learnt once, then kept
    <index>/<split>/<shard stem>.centroids.arrow                 codes: of each image, ascending, each once
    <index>/<split>/<shard stem>.captions.centroids.arrow        the same of each caption

What is added to the index gets centroids that are there. K = centroids   W = words (or regions) that are asked   C = codes
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from itm.data import files
from itm.data.formats import Json
from itm.retrieval.index import Index
from itm.retrieval.scan import PART_ROWS, blocks
from itm.retrieval.sides import Find, Side
from itm.retrieval.store import captions_uri, read_header, read_rows, write_rows
from itm.retrieval.stored import Stored
from itm.types import Encoded

SIDES: tuple[Find, ...] = ("images", "captions")
MOST = 4096
TRAINED_ON, ROUNDS = 32, 8  # parts a centroid, and passes over them
_CHUNK = 1 << 22  # products held at once
_TOGETHER = 16  # questions
_REMEDY = "run `itm index --screen centroids` again"


class Centroids:
    """The centroids of one side, and the codes (C,) int32 of its rows behind one another: those of row n start at starts[n], (N+1,)."""

    def __init__(self, vectors: Tensor, codes: Tensor, starts: Tensor) -> None:
        self.vectors, self.codes, self.starts = vectors, codes, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def read(cls, index: Index, find: Find) -> Centroids:
        """Raises ValueError naming a file that is missing, damaged, or of other centroids."""
        vectors, name = _learnt(index, find)
        pieces, counts = [torch.empty(0, dtype=torch.int32)], [torch.zeros(1, dtype=torch.int64)]
        for place in index.places:
            uri = codes_uri(place, find)
            said = read_header(uri)
            if said is None or said.get("centroids") != name:
                raise ValueError(f"{uri} is missing, or of other centroids than {centroids_uri(index.uri, find)}: {_REMEDY}")
            column = read_rows(uri)["codes"].combine_chunks()
            column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            pieces.append(torch.tensor(column.flatten().to_numpy()))
            counts.append(torch.tensor(np.diff(column.offsets.to_numpy()).astype(np.int64)))
        found = cls(vectors, torch.cat(pieces), torch.cat(counts).cumsum(0))
        if len(found) != len(index.images if find == "images" else index.captions):
            raise ValueError(f"the codes of {len(found):,} {find} are in {index.uri}, which holds other ones: {_REMEDY}")
        return found

    def scores(self, asked: Encoded, rows: slice | Tensor) -> Tensor:
        """(Q,B) of questions with parts (Q,L,D) and rows (B): the mean over the parts of the best cosine with a centroid of the row."""
        if len(asked) > _TOGETHER:
            pieces = range(0, len(asked), _TOGETHER)
            return torch.cat([self.scores(asked[first : first + _TOGETHER], rows) for first in pieces])
        assert asked.parts is not None
        mask = torch.ones(asked.parts.shape[:2], dtype=torch.bool) if asked.mask is None else asked.mask
        likeness = self.vectors @ F.normalize(asked.parts[mask].float(), dim=1).T
        codes, offsets = self._bags(rows)
        best = F.embedding_bag(codes, likeness, offsets, mode="max")
        share = torch.zeros(len(asked), best.shape[1])
        share[mask.nonzero()[:, 0], torch.arange(best.shape[1])] = 1.0
        return share / mask.sum(1, keepdim=True) @ best.T

    def _bags(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The codes of some rows behind one another, and where those of each start (B,), both int32."""
        if isinstance(rows, slice):
            first = self.starts[rows.start : rows.stop]
            return self.codes[self.starts[rows.start] : self.starts[rows.stop]], (first - self.starts[rows.start]).int()
        counts = self.starts[rows + 1] - self.starts[rows]
        offsets = counts.cumsum(0) - counts
        places = torch.arange(int(counts.sum())) + (self.starts[rows] - offsets).repeat_interleave(counts)
        return self.codes[places], offsets.int()


def centroids_uri(index: str, find: Find) -> str:
    return files.join(index, f"{find}.centroids.arrow")


def codes_uri(images_uri: str, find: Find) -> str:
    rows = images_uri if find == "images" else captions_uri(images_uri)
    return rows.removesuffix(".arrow") + ".centroids.arrow"


def write_centroids(index: Index) -> dict[str, int]:
    """Learn the centroids of both sides where the index has none of its matcher, and give each shard its codes where it has none.

    Returns how many centroids each side has. Raises ValueError for an index without parts, or with those of several matchers.
    """
    if "parts" not in index.images.fields or getattr(index.images, "members", None):
        what = "of each of its members" if "parts" in index.images.fields else "to compare"
        raise ValueError(f"{index.uri} has no parts {what}: --screen centroids is for one late interaction; say own, or a dual encoder")
    found: dict[str, int] = {}
    for find in SIDES:
        if not _is_current(index, find):
            write_rows(centroids_uri(index.uri, find), _origin(index), {}, Encoded(vector=_trained(_side(index, find))), "fp32")
        vectors, name = _learnt(index, find)
        for place in index.places:
            rows, target = place if find == "images" else captions_uri(place), codes_uri(place, find)
            header = {**_origin(index), "made_from": (read_header(place) or {}).get("made_from"), "centroids": name}
            said = read_header(target)
            if said is None or any(said.get(key) != value for key, value in header.items()):
                write_rows(target, header, {"codes": _coded(Stored([read_rows(rows)]), vectors)}, Encoded(), "fp32")
        found[find] = len(vectors)
    return found


def _side(index: Index, find: Find) -> Side:
    return index.images if find == "images" else index.captions


def _origin(index: Index) -> Json:
    """What a header says so that the file is known for one of this index; vectors of another matcher are no help."""
    said = read_header(index.places[0]) or {}
    return {key: said.get(key) for key in ("matcher", "dtype", "fields")}


def _is_current(index: Index, find: Find) -> bool:
    said = read_header(centroids_uri(index.uri, find))
    return said is not None and all(said.get(key) == value for key, value in _origin(index).items())


def _learnt(index: Index, find: Find) -> tuple[Tensor, str]:
    """(K,D) unit vectors and a name by which codes know them. Raises ValueError naming a file that is missing or damaged."""
    uri = centroids_uri(index.uri, find)
    if not files.exists(uri):
        raise ValueError(f"{uri}, which the index needs, is missing: {_REMEDY}")
    table = read_rows(uri)
    vectors = Stored([table]).read(slice(0, len(table)), ("vector",)).vector
    assert vectors is not None
    return vectors, hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:12]


def _parts(side: Side, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of the real parts of some rows behind one another, and how many each row has."""
    read = side.read(rows, ("parts", "mask"))
    assert read.parts is not None
    mask = torch.ones(read.parts.shape[:2], dtype=torch.bool) if read.mask is None else read.mask
    return F.normalize(read.parts[mask], dim=1), mask.sum(1)


def _trained(side: Side) -> Tensor:
    """As many centroids as PLAID takes, a power of two below sixteen times the root of the number of parts, and `MOST` at most."""
    some = torch.linspace(0, len(side) - 1, min(len(side), PART_ROWS)).round().long()
    each = float(_parts(side, some)[1].float().mean())
    wanted = min(MOST, 2 ** int(np.log2(16 * (each * len(side)) ** 0.5)))
    rows = torch.linspace(0, len(side) - 1, min(len(side), round(TRAINED_ON * wanted / each) + 1)).round().long()
    return k_means(torch.cat([_parts(side, block)[0] for block in blocks(len(side), rows, PART_ROWS)]), wanted)


def k_means(parts: Tensor, wanted: int, seed: int = 0) -> Tensor:
    """(K,D) unit vectors, at most `wanted`, each the direction of the mean of the parts (N,D) that are nearest to it by cosine.

    Parts that are the same, as equal words are, start one centroid only.
    """
    start = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))[:wanted]
    found = F.normalize((parts[start] * 1024).round().unique(dim=0), dim=1)
    for _ in range(ROUNDS):
        nearest = _nearest(parts, found)
        sums = torch.zeros_like(found).index_add_(0, nearest, parts)
        found = torch.where(sums.square().sum(1, keepdim=True) > 0, F.normalize(sums, dim=1), found)  # one that nobody is near to stays
    return found


def _nearest(parts: Tensor, vectors: Tensor) -> Tensor:
    """(N,) int64."""
    step = max(1, _CHUNK // len(vectors))
    return torch.cat([(own @ vectors.T).argmax(1) for own in parts.split(step)]) if len(parts) else torch.empty(0, dtype=torch.int64)


def _coded(side: Stored, vectors: Tensor) -> pa.Array:
    return pa.array(list(_code_rows(side, vectors)), pa.list_(pa.int32()))


def _code_rows(side: Stored, vectors: Tensor) -> Iterator[list[int]]:
    for block in blocks(len(side), None, PART_ROWS):
        parts, counts = _parts(side, block)
        for codes in _nearest(parts, vectors).split(counts.tolist()):
            yield codes.unique().tolist()
