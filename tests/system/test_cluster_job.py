"""A real cluster head with its dashboard, real jobs: train, evaluate, register; then the model is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import itm
from itm.config import load_recipe
from itm.tracking.registry import find_version
from itm.tracking.runs import client
from pipelines.cli import RECIPES
from pipelines.submit import submit
from tests.support.ray_head import ray_head

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


@pytest.fixture
def head(tmp_path: Path, registry: Path) -> Iterator[str]:
    with ray_head(tmp_path / "head.log") as started:
        yield started.dashboard


def test_jobs_train_evaluate_and_register_a_model_on_a_cluster(head: str, registry: Path, tmp_path: Path, ray_local, capfd):
    from pipelines.pack import pack

    overrides = [
        f"data.root={tmp_path}/shards",
        f"output={tmp_path}/runs",
        "data.source.options.world=tiny",
        "train.steps=4",
        "train.batch_size=8",
        "train.warmup_steps=1",
        "train.validate_every=4",
        "registry.metric=rsum",
        "registry.model=job-model",
    ]
    pack(load_recipe(RECIPES / "demo.yaml", overrides))
    too_early = submit("register", ["-c", "demo", *overrides], head)
    assert too_early == 2
    assert "run `itm train` with the same recipe first" in capfd.readouterr().out
    for stage in ("train", "evaluate", "register"):
        assert submit(stage, ["-c", "demo", *overrides], head) == 0, capfd.readouterr().out
    version = find_version("models:/job-model@champion")
    assert (version.tags["recipe_name"], version.tags["git_commit"]) == ("demo", "c0ffee")
    run = client().get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert "test/auto/rsum" in run.data.metrics
    matcher = itm.load_matcher("models:/job-model@champion")
    assert matcher.encode_captions(matcher.inputs.captions(["a red circle"])).vector.shape == (1, 128)
    assert list(registry.rglob("model.safetensors"))
