"""Score files: the scores of a foreign model with their ids, which `itm evaluate --scores` reads and `--save-scores` writes."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

from itm.data import files
from itm.data.formats import Json
from itm.evaluation.dataset import Names, names_of
from itm.evaluation.protocols import Scored, run_protocol
from itm.types import Options
from pipelines.evaluating import FORMAT
from pipelines.evaluating.result import content


def evaluate_scores(
    scores: str,
    truth: str | None,
    protocol: str = "auto",
    tie: str = "pessimistic",
    output: str | None = None,
    options: Options | None = None,
) -> Json:
    """Evaluate a .npy score matrix (images, captions) of any origin; the truth file holds the ids of its rows and columns."""
    if not truth:
        raise ValueError("--scores needs --truth IDS.json with image_ids, caption_ids and caption_image_ids")
    outcome_of = Scored(_read_scores(scores), read_truth(truth))
    outcome = run_protocol(protocol, outcome_of, tie, options)
    digest = hashlib.sha256(files.read_bytes(truth)).hexdigest()[:12]
    about = {"format": FORMAT, "split_hash": digest, "protocol_name": protocol, "tie": tie, "scores": scores, "truth": truth}
    result = about | content(outcome, outcome_of, f"imported, {outcome_of.scores.dtype}")
    files.write_atomic(output or scores.removesuffix(".npy") + ".evaluation.json", json.dumps(result, indent=1).encode())
    return result


def write_scores(path: str, scored: Scored) -> None:
    """`path` (.npy, float32) and `<path>.ids.json`: what --scores and --truth read."""
    names = scored.names
    rows = {
        "image_ids": names.image_keys,
        "caption_ids": names.caption_ids,
        "caption_image_ids": [names.image_keys[row] for row in names.caption_image.tolist()],
    }
    with files.atomic_stream(path) as stream:
        shape = tuple(scored.scores.shape)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, shape[0], 64):  # streamed scores never fit as a whole
            stream.write(np.ascontiguousarray(scored.scores[start : start + 64], dtype="<f4").tobytes())
    files.write_atomic(f"{path}.ids.json", json.dumps(rows).encode())


def read_truth(path: str) -> Names:
    """Raises ValueError naming the file and the missing key; unknown image ids are left to `Names.check`."""
    try:
        truth = json.loads(files.read_bytes(path))
        images, captions, owners = ([str(name) for name in truth[key]] for key in ("image_ids", "caption_ids", "caption_image_ids"))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is no truth file: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; it needs image_ids, caption_ids and caption_image_ids") from None
    if len(captions) != len(owners):
        raise ValueError(f"{path}: {len(captions)} caption_ids but {len(owners)} caption_image_ids")
    row_of = {name: row for row, name in enumerate(images)}
    return names_of(len(images), torch.tensor([row_of.get(name, -1) for name in owners], dtype=torch.int64), images, captions)


def _read_scores(path: str) -> np.ndarray:
    try:
        scores = np.load(files.absolute(path), mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy score matrix: {error}") from None
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(f"{path} must hold a float matrix (images, captions), not {scores.dtype} {scores.shape}")
    return scores
