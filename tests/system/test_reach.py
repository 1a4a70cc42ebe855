"""A cluster of two nodes, of which one sees another folder under the same path: every stage refuses it, naming key, path and node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from itm.config import Recipe, load_recipe
from pipelines.cli import RECIPES
from pipelines.features import features
from pipelines.on_ray.reach import shared
from pipelines.on_ray.session import connect
from pipelines.pack import pack
from pipelines.teach import teach
from pipelines.train import train
from tests.support.node_cluster import Cluster

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare, to hide a folder from a node"),
]
BLIND = "127.0.0.2"


@pytest.fixture
def hidden(registry: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder that the second of two nodes does not see; this process is connected to the cluster."""
    import ray

    ray.shutdown()
    folder = tmp_path / "hidden"
    folder.mkdir()
    cluster = Cluster(tmp_path)
    try:
        cluster.start(cpus=2)
        cluster.start(cpus=2, hidden=str(folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", f"127.0.0.1:{cluster.port}")
            connect()
            yield folder
            ray.shutdown()
    finally:
        cluster.stop()


def test_a_folder_of_one_machine_is_refused_before_anything_is_written_to_it(hidden: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def recipe(*overrides: str, name: str = "demo-cusa") -> Recipe:
        given = ["data.source.options.world=tiny", "train.steps=2", "train.batch_size=8", "data.shard_samples=100"]
        if name == "demo-cusa":
            given += [f"teachers.{modality}.options.world=tiny" for modality in ("image", "text")]
        return load_recipe(RECIPES / f"{name}.yaml", [f"data.root={seen}/shards", f"output={seen}/runs", *given, *overrides])

    with shared({"output": f"{seen}/runs"}) as tokens:
        assert [key for key, _ in tokens] == ["output"]
    assert not list((seen / "runs").iterdir()), "the token is gone"
    with pytest.raises(ValueError, match=rf"data\.root={hidden}/shards is not shared: .* {BLIND}\. Say data\.root=s3"):
        pack(recipe(f"data.root={hidden}/shards"))
    assert not list((hidden / "shards").rglob("*.tar"))
    pack(recipe())
    with pytest.raises(ValueError, match=rf"teachers\.root={hidden}/stores.* is not shared: .* {BLIND}"):
        teach(recipe(f"teachers.root={hidden}/stores"))
    teach(recipe())
    with pytest.raises(ValueError, match=rf"data\.root={hidden}/regions is not shared: .* {BLIND}"):
        features(recipe(f"features.photos={seen}/shards", f"data.root={hidden}/regions", "features.encoder={kind: conv}"))
    with pytest.raises(ValueError, match=rf"output={hidden}/runs.* is not shared: .* {BLIND}"):
        train(recipe(f"output={hidden}/runs", "train.workers=1"))
    shutil.copytree(seen / "shards", hidden / "shards", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=rf"data\.root={hidden}/shards is not shared: .* {BLIND}"):
        train(recipe(f"data.root={hidden}/shards", "train.workers=1", name="demo"))
