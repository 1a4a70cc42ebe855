"""`python -m tests.support.bench_index`: an exact search of an index against a product of NumPy in memory, CPU seconds, medians.

    python -m tests.support.bench_index --rows 1000000 --width 512 --questions 64 --folder /tmp/bench-index
    python -m tests.support.bench_index --rows 50000 --width 256 --recall .9 .95 .98 --folder /tmp/bench-index

The index holds random unit vectors as fp16 or int8 in files of 10,000 rows, which are memory-mapped; the product is that of float32 arrays
that lie in memory, with `numpy.argpartition` for the best ten and without. Seconds are of the CPU, so that a busy machine counts for less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from itm.retrieval.approximate import Approximate, held_out
from itm.retrieval.scan import VECTOR_ROWS, best
from itm.retrieval.sides import Held
from itm.retrieval.store import read_rows, write_rows
from itm.retrieval.stored import Stored
from itm.types import Encoded

PER_FILE = 10_000


def vectors(rows: int, width: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def written(folder: Path, rows: int, width: int, dtype: str) -> list[str]:
    uris = []
    for number, start in enumerate(range(0, rows, PER_FILE)):
        uri = folder / f"{dtype}-{width}-{number:05d}.arrow"
        uris.append(str(uri))
        if not uri.exists():
            keys = {"key": pa.array([str(n) for n in range(start, start + PER_FILE)])}
            write_rows(str(uri), {}, keys, Encoded(vector=torch.from_numpy(vectors(PER_FILE, width, number))), dtype)
    return uris


def median(work: Callable[[], object], runs: int) -> float:
    work()
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def low_dimensional(rows: int, width: int, seed: int, dimensions: int = 24) -> torch.Tensor:
    """Unit vectors on a bent surface of few dimensions, as those of trained encoders are; the surface is the same for each seed."""
    surface, draw = np.random.default_rng(0), np.random.default_rng(seed)
    bend = surface.standard_normal((dimensions, 128), dtype=np.float32)
    lift = surface.standard_normal((128, width), dtype=np.float32)
    found = np.tanh(draw.standard_normal((rows, dimensions), dtype=np.float32) @ bend * 0.3) @ lift
    found += 0.1 * found.std() * draw.standard_normal(found.shape, dtype=np.float32)
    return torch.from_numpy(found / np.linalg.norm(found, axis=1, keepdims=True))


def recalls(rows: int, width: int, wanted: list[float], folder: Path) -> None:
    """What faiss finds of vectors of 24 dimensions: a line for each wanted recall."""
    side, questions = Held(Encoded(vector=low_dimensional(rows, width, 1))), held_out(low_dimensional(1000, width, 2), 500)
    exact = median(lambda: best(lambda block: questions[1] @ side.encoded.vector[block].T, rows, None, 10), 1)
    for recall in wanted:
        start = time.process_time()
        made, measured = Approximate.build(side, recall, questions)
        build = time.process_time() - start
        made.write(str(folder / "images.faiss"))
        size = (folder / "images.faiss").stat().st_size / rows
        quick = median(lambda made=made: made.propose(questions[1], 10), 1)
        said = measured.said() | {"width": width, "build_seconds": round(build, 1), "bytes_a_row": round(size)}
        print(json.dumps(said | {"milliseconds": round(2 * quick, 3), "exact_milliseconds": round(2 * exact, 3)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recall", type=float, nargs="+", default=[], help="measure faiss instead")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.recall:
        recalls(args.rows, args.width, args.recall, args.folder)
        return
    whole = np.concatenate([vectors(PER_FILE, args.width, n) for n in range(args.rows // PER_FILE)])
    for count in args.questions:
        asked = vectors(count, args.width, 10**6)
        said: dict[str, object] = {"rows": args.rows, "width": args.width, "questions": count, "load": os.getloadavg()[0]}
        said["numpy_product"] = median(lambda asked=asked: asked @ whole.T, args.runs)
        said["numpy_product_and_best"] = median(lambda asked=asked: np.argpartition(asked @ whole.T, -10, axis=1)[:, -10:], args.runs)
        for dtype in args.dtypes:
            side = Stored([read_rows(uri) for uri in written(args.folder, args.rows, args.width, dtype)])
            queries = torch.from_numpy(asked)

            def score(block: slice | torch.Tensor, side: Stored = side, queries: torch.Tensor = queries) -> torch.Tensor:
                assert isinstance(block, slice)
                return torch.cat([queries @ piece.vector.T for piece in side.pieces(block) if piece.vector is not None], 1)

            said[dtype] = median(lambda score=score: best(score, args.rows, None, 10, VECTOR_ROWS), args.runs)
            said[f"{dtype}_ratio"] = float(said[dtype]) / float(said["numpy_product"])  # type: ignore[arg-type]
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in said.items()}), flush=True)


if __name__ == "__main__":
    main()
