"""A first stage by faiss: candidates that are then scored exactly, so that what is found has exact scores and some may be missed.

The kind follows from the wanted recall: below .97 inverted lists (IVF), which are small and quick to build, else a graph (HNSW). Its effort
is doubled until the recall of the best ten, on questions that are kept for this, is what is wanted; other questions then say what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from itm.data import files
from itm.evaluation.screen import wilson
from itm.extras import needed_by
from itm.retrieval.scan import best
from itm.retrieval.sides import Find, Side

AT = 10
GRAPH_FROM = 0.97
"""Wanted recall from which a graph is built."""
LEAST_ROWS = 1000
"""Fewer rows are searched exactly in less time than a structure over them takes."""
TRAINED_ON = 64
"""Rows a list that the centres of the lists are learnt from."""
_LINKS, _BUILT_WITH = 32, 200  # of a graph


@dataclass(frozen=True)
class Measured:
    """recall: share of the exact best ten that were among the candidates, with its 95 % Wilson interval (low, high), of `questions`.

    effort: lists that are looked into (ivf), or the breadth of the walk (hnsw). rows: those of the side.
    """

    kind: str
    effort: int
    wanted: float
    recall: float
    low: float
    high: float
    questions: int
    rows: int

    def said(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        interval = f"{self.low:.3f} to {self.high:.3f}, {self.questions * min(AT, self.rows):,} answers of {self.questions:,} questions"
        return f"{self.kind} effort {self.effort}: recall@{AT} {self.recall:.3f} ({interval})"


class Approximate:
    """A structure of faiss over the unit vectors of a side, by inner product."""

    def __init__(self, structure: Any, kind: str, effort: int) -> None:
        self.structure, self.kind = structure, kind
        self.effort = effort

    @classmethod
    def build(cls, side: Side, wanted: float, questions: tuple[Tensor, Tensor]) -> tuple[Approximate, Measured]:
        """questions: unit vectors (Q,D) that choose the effort, and others (P,D) that measure the recall.

        Raises ValueError for a recall that is none, few rows, a side without vectors, and a recall that no effort reaches; MissingExtra.
        """
        if not 0 < wanted < 1:
            raise ValueError(f"--faiss recall={wanted:g} is no recall: say a share between 0 and 1, e.g. recall=.95")
        if len(side) < LEAST_ROWS:
            raise ValueError(f"{len(side):,} rows are searched exactly in no time: --faiss is for {LEAST_ROWS:,} or more")
        kind = "ivf" if wanted < GRAPH_FROM else "hnsw"
        made = cls(_filled(side, kind), kind, 1)
        exact = [_exact(side, rows) for rows in questions]
        most = made.structure.nlist if kind == "ivf" else 8192
        while True:
            hits, asked = made._hits(questions[0], exact[0]), exact[0].numel()
            if wilson(hits, asked)[0] >= wanted or made.effort >= most:
                break
            made.effort = min(2 * made.effort, most)
        if hits / asked < wanted:
            raise ValueError(f"{kind} finds {hits / asked:.3f} of the best {AT} with all effort, not recall={wanted:g}: search exactly")
        hits, asked = made._hits(questions[1], exact[1]), exact[1].numel()
        low, high = wilson(hits, asked)
        return made, Measured(kind, made.effort, wanted, hits / asked, low, high, len(questions[1]), len(side))

    def propose(self, asked: Tensor, keep: int) -> Tensor:
        """(Q,keep) rows, -1 where there are no more. asked: unit vectors (Q,D) float32."""
        if self.kind == "ivf":
            self.structure.nprobe = self.effort
        else:
            self.structure.hnsw.efSearch = max(self.effort, keep)
        return torch.from_numpy(self.structure.search(np.ascontiguousarray(asked.numpy()), keep)[1])

    def _hits(self, asked: Tensor, exact: Tensor) -> int:
        return int((self.propose(asked, exact.shape[1])[:, :, None] == exact[:, None]).sum())

    def write(self, uri: str) -> None:
        faiss = _faiss()
        files.write_atomic(uri, faiss.serialize_index(self.structure).tobytes())

    @classmethod
    def read(cls, uri: str, kind: str, effort: int) -> Approximate:
        """Raises ValueError naming a file that is missing or damaged; MissingExtra."""
        faiss = _faiss()
        try:
            structure = faiss.deserialize_index(np.frombuffer(files.read_view(uri), np.uint8))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{uri}, which the index needs, cannot be read ({error}): run `itm index --faiss` again") from None
        return cls(structure, kind, effort)


def faiss_uri(index: str, find: Find) -> str:
    return files.join(index, f"{find}.faiss")


def unit(vectors: Tensor | None) -> Tensor:
    """Raises ValueError where there are none."""
    if vectors is None:
        raise ValueError("this matcher gives no vectors, so faiss has nothing to search: it is for dual encoders and late interactions")
    return F.normalize(vectors.float(), dim=1)


def held_out(questions: Tensor, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two samples (up to `each` rows) that share no row of the questions (N,D)."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    half = min(each, len(order) // 2)
    return questions[order[:half]], questions[order[half : 2 * half]]


def _exact(side: Side, asked: Tensor) -> Tensor:
    return best(lambda block: asked @ unit(side.read(block, ("vector",)).vector).T, len(side), None, AT)[1]


def _filled(side: Side, kind: str) -> Any:
    faiss = _faiss()
    first = unit(side.read(slice(0, 1), ("vector",)).vector)
    width, half = first.shape[1], faiss.ScalarQuantizer.QT_fp16
    if kind == "hnsw":
        structure = faiss.IndexHNSWSQ(width, half, _LINKS, faiss.METRIC_INNER_PRODUCT)
        structure.hnsw.efConstruction = _BUILT_WITH
    else:
        lists = round(len(side) ** 0.5)
        structure = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, lists, half, faiss.METRIC_INNER_PRODUCT)
        structure.cp.seed = 1234
    rows = torch.linspace(0, len(side) - 1, min(len(side), TRAINED_ON * max(64, round(len(side) ** 0.5)))).round().long()
    structure.train(unit(side.read(rows, ("vector",)).vector).numpy())
    for block in _blocks(len(side)):
        structure.add(unit(side.read(block, ("vector",)).vector).numpy())
    return structure


def _blocks(count: int, size: int = 16384) -> Sequence[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _faiss() -> Any:
    with needed_by("an approximate search", extra="faiss"):
        import faiss
    return faiss
