"""Every stage against an S3 store that fails now and then: the same bytes and the same weights as on a local disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import itm
from itm.config import Recipe, Registry, parse_recipe
from itm.data import files
from itm.matchers.folder import load_matcher_folder
from itm.tracking.runs import client
from pipelines import pack as packing
from pipelines.evaluate import evaluate
from pipelines.inspect import inspect
from pipelines.register import register
from pipelines.repair import repair
from pipelines.report import report
from pipelines.teaching import driver as teaching
from pipelines.train import train
from tests.support.noise_split import small_split
from tests.support.s3_server import BUCKET, s3_server
from tests.support.small_teaching import score_here
from tests.support.small_training import die_at, same, splits
from tests.support.small_training import recipe as small_recipe


@pytest.fixture(autouse=True, scope="module")
def _tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


def recipe(root: str) -> Recipe:
    """Scenes, two teachers, CUSA: what reads and writes everything. `root` holds all of it."""
    image, text = {"kind": "conv", "image_size": 16, "hidden": 16}, {"kind": "pooled_gru", "word_dim": 8, "hidden": 8}
    source = {"kind": "scenes", "options": {"world": "tiny", "n_train": 10, "n_val": 4, "n_test": 4}}
    return parse_recipe(
        {
            "name": "run",
            "output": f"{root}/runs",
            "data": {"root": f"{root}/shards", "source": source, "shard_samples": 5, "image_size": 16},
            "text": {"max_length": 10},
            "teachers": {"image": {"kind": "statistics"}, "text": {"kind": "scenes_text", "options": {"world": "tiny"}}},
            "model": {"kind": "dual", "options": {"image": image, "text": text, "width": 8}},
            "method": {"kind": "cusa"},
            "train": {"batch_size": 6, "steps": 6, "workers": 0, "validate_every": 3, "checkpoint_every": 2, "log_every": 1},
        }
    )


def stages_here(choices: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Pack, teach, train (interrupted once) and evaluate in this process."""
    here = lambda recipe, jobs, title: {job.uri: packing.Receipt.model_validate_json(packing.pack_shard(job)) for job in jobs}
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_run_jobs", here)
        patch.setattr(teaching, "_score", score_here)
        packing.pack(choices)
        teaching.teach(choices)
        die_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(choices)
    train(choices)
    metrics: dict[str, float] = evaluate(choices)["metrics"]
    return metrics


def tree(uri: str) -> dict[str, bytes]:
    found = {files.name_of(f): files.read_bytes(f) for f in files.list_files(uri)}
    for folder in files.list_folders(uri):
        found |= {f"{files.name_of(folder)}/{name}": data for name, data in tree(folder).items()}
    return found


@pytest.mark.e2e
def test_all_stages_give_the_bytes_and_weights_of_a_local_disk_although_requests_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = stages_here(recipe(str(tmp_path)), monkeypatch)
    with s3_server(every=13):
        root = f"s3://{BUCKET}/deep"
        there = stages_here(recipe(root), monkeypatch)
        assert there == here
        local, remote = tree(f"{tmp_path}/shards"), tree(f"{root}/shards")
        assert {n for n in remote if n.endswith((".tar", ".arrow"))} >= {"train/00000.tar", "train/00001.tar", "val/00000.tar"}
        assert remote == local
        matchers = [dict(load_matcher_folder(f"{place}/runs/run/matcher").state_dict()) for place in (str(tmp_path), root)]
        assert same(*matchers)
        assert inspect(f"{root}/shards/train").problems == []
        assert repair(f"{root}/shards/train", f"{root}/clean/train").samples == 10
        assert train(recipe(root))["steps"] == 6, "a finished run is recognised"


@pytest.mark.e2e
def test_what_the_stages_give_to_an_experiment_in_the_store_lands_there_and_its_champion_loads_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITM_CACHE", str(tmp_path / "cache"))
    splits(tmp_path)
    small_split(tmp_path / "shards", "test", shards=1)
    choices = small_recipe(tmp_path, steps=2, validate_every=2)
    choices = choices.model_copy(update={"registry": Registry(experiment="in the store"), "output": f"s3://{BUCKET}/runs"})
    with s3_server(every=29):
        place = f"s3://{BUCKET}/mlflow"
        client().create_experiment("in the store", artifact_location=place)
        run_id = train(choices)["run_id"]
        evaluate(choices)
        report(choices)
        for name in ("evaluation.json", "report.html"):
            assert files.read_bytes(f"{place}/{run_id}/artifacts/{name}") == files.read_bytes(f"{choices.folder}/{name}")
        assert register(choices).champion
        loaded, trained = itm.load_matcher("models:/itm-matcher@champion"), load_matcher_folder(f"{choices.folder}/matcher")
        assert same(dict(loaded.state_dict()), dict(trained.state_dict()))
        [model] = files.list_folders(f"{place}/models")
        weights = files.read_bytes(f"{model}/artifacts/artifacts/matcher/model.safetensors")
    assert [path.read_bytes() for path in (tmp_path / "cache").rglob("model.safetensors")] == [weights], "a copy, fetched from there"


@pytest.mark.e2e
def test_the_packing_tasks_of_a_ray_cluster_write_to_the_store(tmp_path: Path) -> None:
    with s3_server():
        path = tmp_path / "r.json"
        path.write_text(recipe(f"s3://{BUCKET}").model_dump_json())
        command = [sys.executable, "-m", "pipelines.pack", "-c", str(path), "--splits", "val"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ITM_TRACEBACK": "1"}, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(files.read_bytes(f"s3://{BUCKET}/shards/val/manifest.json"))["shards"][0]["samples"] == 4


def test_a_stream_that_ends_in_an_error_leaves_the_object_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing an upload publishes it, so nothing may be uploaded before all of it is there."""
    with s3_server():
        uri = f"s3://{BUCKET}/x.bin"
        files.write_atomic(uri, b"old")
        with pytest.raises(RuntimeError), files.atomic_stream(uri) as stream:
            stream.write(b"half")
            raise RuntimeError
        assert files.read_bytes(uri) == b"old"
        assert files.sizes(f"s3://{BUCKET}") == {"x.bin": 3}
        with pytest.raises(ValueError, match=r"cannot write below s3://other/place: .*NO_SUCH_BUCKET"):
            files.check_writable("s3://other/place")
    with pytest.raises(OSError, match=r"x\.bin"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("ITM_PATIENCE", "0")
        files.read_bytes(uri)
