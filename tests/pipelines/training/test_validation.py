"""Ranks validate together: what they find is what one process finds with the weights that were kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import itm
from itm.config import Part, Recipe
from itm.data.shards import read_manifest, read_samples
from itm.evaluation.dataset import checked, encode_samples, encode_split, shards_of
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.over_ranks import encode_over_ranks
from itm.evaluation.scoring import score_matrix
from itm.matchers.folder import save_matcher
from itm.precision import computing
from itm.tracking.runs import Tracker
from itm.training.checkpoint import latest
from pipelines.training.job import Job, build_method
from pipelines.training.preparation import prepare
from pipelines.training.worker import work
from tests.support.noise_split import small_split
from tests.support.ranks import joined, spawn_ranks
from tests.support.small_training import recipe

pytest_plugins = ["tests.support.registry_fixtures"]

TOWERS = {"image": {"in_width": 3, "width": 8}, "text": {"word_dim": 6, "width": 8}}
UNITER = {"hidden": 16, "layers": 1, "heads": 2, "positions": 12, "region_dim": 3, "init_std": 0.25}
RUNS: dict[str, tuple[Part | None, dict[str, Any]]] = {
    "dual": (None, {"ema": 0.5, "precision": "bf16"}),
    "dual-sharded": (None, {"ema": 0.5, "shard_weights": True, "data": {"val_images": 10, "max_reject_rate": 0.2}}),
    "saf": (Part(kind="saf", options={**TOWERS, "sim_dim": 6, "regions": 3}), {}),
    "saf-sharded": (Part(kind="saf", options={**TOWERS, "sim_dim": 6, "regions": 3}), {"shard_weights": True}),
    "uniter": (Part(kind="uniter", options=UNITER), {}),
    "uniter-sharded": (Part(kind="uniter", options=UNITER), {"shard_weights": True}),
}


def choices(root: Path, name: str) -> Recipe:
    model, given = RUNS[name]
    given = {"data": {"image": "regions", "max_regions": 3} if model else {"max_reject_rate": 0.2}, **given}
    chosen = recipe(root, name=name, batch_size=3, steps=2, validate_every=1, checkpoint_every=2, log_every=2, **given)
    return chosen.model_copy(update={"model": model}) if model else chosen


def work_of_ranks(rank: int, port: int, jobs: list[Job], damaged: str) -> None:
    with joined(rank, port, 2):
        for job in jobs:
            work(job, torch.device("cpu"), lambda *said: None)
        matcher: Any = itm.load_matcher(f"{jobs[0].folder}/fresh")
        with pytest.raises(ValueError, match=r"00001\.tar has sha256"):
            encode_over_ranks(matcher, damaged, 4, None, 1.0, torch.device("cpu"), "fp32")


def alone(chosen: Recipe) -> dict[str, float]:
    """The metrics of the kept matcher by one process that knows no ranks."""
    matcher, split, precision = itm.load_matcher(f"{chosen.folder}/matcher"), f"{chosen.data.root}/val", chosen.train.precision
    if precision == "fp32":
        encoded = encode_split(matcher, split, chosen.evaluation.batch_size, chosen.data.val_images)
    else:
        with computing(precision, cpu := torch.device("cpu")):
            pieces = [encode_samples(matcher, uri, read_samples(uri), 256, None, cpu) for uri, _ in shards_of(split)]
        encoded = checked(pieces, split, 1.0)
    return retrieval_metrics(score_matrix(matcher, encoded.images, encoded.captions, precision=precision), encoded.positives)


@pytest.mark.e2e
def test_what_two_ranks_find_is_what_one_process_finds(registry: Path, tmp_path: Path) -> None:
    small_split(tmp_path / "shards", "train", regions=True)
    small_split(tmp_path / "shards", "val", regions=True, shards=3, broken=(2,))
    small_split(tmp_path / "shards", "damaged", shards=2)
    jobs = []
    for name in RUNS:
        chosen = choices(tmp_path, name)
        asked = chosen.model_copy(update={"train": chosen.train.model_copy(update={"workers": 2})})
        job = prepare(asked, read_manifest(f"{chosen.data.root}/train"))
        with Tracker.start("tests", name) as tracker:
            jobs.append(replace(job, recipe=chosen, run_id=tracker.run_id, tracking_uri=tracker.uri))
    save_matcher(build_method(jobs[0].recipe, jobs[0].inputs).matcher, f"{jobs[0].folder}/fresh")
    shard = tmp_path / "shards" / "damaged" / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"captions", b"captiona", 1))
    spawn_ranks(work_of_ranks, 2, jobs, str(tmp_path / "shards" / "damaged"))
    for job in jobs:
        state = latest(job.checkpoints)
        assert state is not None and state.best is not None
        assert math.isfinite(state.best.metrics["rsum"])
        assert state.best.metrics == pytest.approx(alone(job.recipe), abs=1e-6), job.recipe.name
