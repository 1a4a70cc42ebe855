"""Stages on a cluster whose GPUs are to come: asked for, waited for, shared in fractions that fit. Its GPUs are declared, without CUDA."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from itm.config import Part
from itm.evaluation.tiles import score_tile
from itm.matchers.folder import build_matcher, load_matcher_folder, save_matcher
from itm.teachers.identity import build_teacher
from itm.teachers.stores import stored_identity
from itm.types import Encoded
from pipelines.evaluating import driver as evaluate
from pipelines.on_ray import gpus, scoring
from pipelines.on_ray.gpus import Seats
from pipelines.on_ray.session import connect
from pipelines.teaching import driver as teaching
from pipelines.train import train
from tests.support import small_training
from tests.support.growing_cluster import growing_cluster
from tests.support.small_split import small_run
from tests.support.small_teaching import pack, recipe, scenes, score_here
from tests.support.where import Where

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default:computing on CPUs")]
NO_CUDA = "computing on CPUs, although the cluster names 2 GPUs: on .*, device 'cuda' was asked for, but "
UARDA = Part(
    kind="uarda",
    options={"image": {"kind": "conv", "image_size": 64}, "text": {"kind": "gru", "word_dim": 8, "width": 16}, "eval_threshold": 0.1},
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A head without GPUs that promises three; two nodes of one GPU each can come."""
    import ray

    before = ray.is_initialized()
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch, growing_cluster(2, "itm/gpus=3", CPU=2, GPU=1, most=2) as address:
        patch.setenv("RAY_ADDRESS", address)
        connect()
        yield
        ray.shutdown()
    if before:
        connect()


@pytest.fixture
def grown(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both nodes that can come are there, however busy this machine is."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"GPU": 1}] * 2)
    end = time.monotonic() + 240
    while gpus.gpus_there() < 2:
        assert time.monotonic() < end, "the nodes have not come"
        time.sleep(0.5)
    monkeypatch.setattr(gpus, "PATIENCE", 0.1)


def scored(job: teaching.Job, uri: Path) -> list[teaching.Written]:
    teacher = build_teacher(job.part, job.modality)
    identity = stored_identity(teacher, "fp16")
    return list(teaching._score(job, str(uri), job.manifest.shards, identity, prepare=teacher.prepare))


def test_gpus_that_a_label_promises_are_asked_for_and_missed_after_a_limit(cluster, tmp_path, monkeypatch, capsys):
    small_training.splits(tmp_path)
    monkeypatch.setattr(gpus, "PATIENCE", 12.0)
    with pytest.raises(ValueError, match=r"asked for 3 GPUs, \d are there after 12 s, although the node label itm/gpus promises 3"):
        train(small_training.recipe(tmp_path, workers=3, use_gpu=True))
    assert "waiting for 3 GPUs that the cluster can grow to, 0 are there (0 s)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"workers=4 need 4 GPUs, the cluster has 3 and would wait for ever: set train\.workers=3, or"):
        train(small_training.recipe(tmp_path, workers=4, use_gpu=True))
    assert not (tmp_path / "runs" / "run" / "started.json").exists()


def test_a_training_on_gpus_without_cuda_is_refused_before_a_run_exists(grown, tmp_path):
    small_training.splits(tmp_path)
    with pytest.raises(ValueError, match=r"^train\.use_gpu=true: on .*, device 'cuda' was asked for, but .*; set train\.use_gpu=false$"):
        train(small_training.recipe(tmp_path, workers=2, use_gpu=True))
    assert not (tmp_path / "runs" / "run" / "started.json").exists()


@pytest.mark.parametrize(("actors", "most"), [(1, 1), (3, 2)])
def test_teachers_start_in_fractions_that_fit_and_write_what_one_process_writes(grown, tmp_path, capsys, actors, most):
    pack(tmp_path / "data", scenes(16), per_shard=2)
    wanted = recipe(tmp_path / "data", {"kind": "statistics"})
    wanted = wanted.model_copy(update={"teachers": wanted.teachers.model_copy(update={"actors": actors})})
    job = teaching.Job.of(wanted, "train", "image", Part(kind="statistics"))
    with pytest.warns(UserWarning, match=NO_CUDA):
        written = scored(job, tmp_path / "store")
    assert len(written) == 8
    assert 1 <= len({row.actor for row in written}) <= most
    said = "3 actors asked for, 2 start: a GPU each, and the cluster has 2 GPUs"
    assert (said in capsys.readouterr().out) == (actors == 3)
    teacher = build_teacher(job.part, "image")
    list(score_here(job, str(tmp_path / "here"), job.manifest.shards, stored_identity(teacher, "fp16"), prepare=teacher.prepare))
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert len(names) == 8
    assert all((tmp_path / "store" / name).read_bytes() == (tmp_path / "here" / name).read_bytes() for name in names)


def test_unset_there_is_an_actor_for_each_gpu_and_more_share_them_equally(grown, monkeypatch, capsys):
    monkeypatch.setattr(gpus, "_missed", False)
    gpus.gpu_seats(None, 9, 0.1)
    assert "going on with 2 of 3 GPUs: the others have not come in 0 s" in capsys.readouterr().out
    monkeypatch.setattr(gpus, "PATIENCE", 900.0)  # waited for once
    asked = {(None, 9): (2, 1.0), (None, 1): (1, 1.0), (4, 9): (4, 0.5), (5, 9): (4, 0.5), (6, 9): (6, 0.3333)}
    seats = {given: gpus.gpu_seats(*given, 0.1) for given in asked}
    assert {given: (found.count, found.gpus) for given, found in seats.items()} == asked


def jobs(folder: Path, shared: Any, put: Any) -> list[tuple[Any, ...]]:
    rows = [put([Encoded(vector=torch.randn(n + 1, 2))]) for n in range(6)]
    return [(str(folder / f"{n}.npy"), shared, rows[n], rows[n], {}) for n in range(6)]


@pytest.mark.parametrize("seats", [1, 2])
def test_one_process_scores_all_the_tiles_of_a_gpu_in_their_order(grown, tmp_path, monkeypatch, seats):
    if seats == 1:
        monkeypatch.setattr(scoring, "gpu_seats", lambda *_: Seats(1, 1.0, "cpu"))
    spread, put, device = scoring.by_actors(6)
    assert device == "cpu"
    assert list(spread(score_tile, jobs(tmp_path, put([Where()]), put))) == [None] * 6
    tiles = [np.load(tmp_path / f"{n}.npy") for n in range(6)]
    assert [tile.shape for tile in tiles] == [(n + 1, n + 1) for n in range(6)]
    processes = {value for tile in tiles for value in np.unique(tile).tolist()}
    assert 1 <= len(processes) <= seats
    assert os.getpid() not in processes


def test_an_error_in_an_actor_is_raised_as_it_was_raised_there(grown, tmp_path):
    spread, put, _ = scoring.by_actors(6)
    broken = jobs(tmp_path, put([Where()]), put)
    broken[3] = (*broken[3][:4], {"precision": "fp7"})
    with pytest.raises(ValueError, match=r"^unknown precision 'fp7'; known: "):
        list(spread(score_tile, broken))


def test_a_driver_without_gpu_leaves_encoding_and_scoring_to_the_nodes_that_have_them(grown, tmp_path, monkeypatch):
    given = small_run(tmp_path)
    inputs = load_matcher_folder(f"{given.folder}/matcher").inputs
    save_matcher(build_matcher(UARDA, inputs), uri := f"{given.folder}/uarda")
    with monkeypatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        alone = evaluate.evaluate(given, uri)
    for path in Path(given.folder).glob("evaluation*"):
        path.unlink()
    monkeypatch.setattr(evaluate, "resolve_device", lambda: pytest.fail("encoded in the driver"))
    monkeypatch.setattr(scoring, "score_matrix", lambda *_, **__: pytest.fail("scored in the driver"))
    with pytest.warns(UserWarning, match=NO_CUDA):
        there = evaluate.evaluate(given, uri)
    assert there["metrics"] == alone["metrics"]
    assert (there["matcher_hash"], there["rows_out"]) == (alone["matcher_hash"], alone["rows_out"])
    assert list(Path(given.folder).glob("scores-*/tile-*.npy"))


def test_an_actor_that_no_node_has_room_for_is_refused(grown):
    with pytest.raises(ValueError, match=r"an actor needs 5 CPUs beside its GPU, and no node with a GPU has them: give such nodes CPUs"):
        gpus.gpu_seats(1, 1, 5)


def test_a_label_that_is_no_number_is_refused(cluster, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Labels": {"itm/gpus": "many"}, "Resources": {}}])
    with pytest.raises(ValueError, match="node label itm/gpus=many: it is the number of GPUs that the cluster can grow to"):
        gpus.most_gpus()
