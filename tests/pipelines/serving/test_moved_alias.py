"""A served model takes up a moved alias beside the old version, and refuses what does not fit its index."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from itm.data import files
from itm.tracking.registry import crown, promote
from itm.tracking.runs import Tracker
from pipelines.serving.served import Place, ServedModel
from tests.support.disc_index import write_discs
from tests.support.registry_world import matcher_folder, register_matcher
from tests.support.serving_world import service

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


@pytest.fixture
def two_versions(registry: Path, tmp_path: Path) -> str:
    """A registered model whose champion is version 1; version 2 has other weights."""
    with Tracker.start("tests", "run") as tracker:
        for seed, rsum in ((1, 1.0), (2, 0.5)):
            version = register_matcher(matcher_folder(tmp_path / f"m{seed}", seed), "tiny", tracker.run_id, {})
            promote("tiny", version, "rsum", rsum)
    return "models:/tiny@champion"


def test_a_moved_alias_is_taken_up_and_pages_of_the_old_version_are_told(two_versions: str, tmp_path: Path):
    app, models = service(Place("tiny", two_versions, shards=write_discs(tmp_path / "test")))
    client, model = TestClient(app), models["tiny"]
    before = client.post("/v1/search", json={"text": "a red circle"}).json()
    assert (before["version"], model.refresh()) == ("tiny/1", False)
    crown("tiny", "2")
    assert client.post("/v1/search", json={"text": "a red circle"}).json() == before
    assert model.refresh()
    after = client.post("/v1/search", json={"text": "a red circle"}).json()
    assert after["version"] == "tiny/2"
    assert [hit["score"] for hit in after["answers"]] != [hit["score"] for hit in before["answers"]]
    stale = client.post("/v1/search", json={"text": "a red circle", "offset": 2, "version": "tiny/1"})
    assert (stale.status_code, "tiny/1" in stale.json()["error"]) == (409, True)


def test_a_version_that_does_not_fit_is_refused_by_name_and_the_old_one_goes_on(two_versions: str, tmp_path: Path):
    app, models = service(Place("tiny", two_versions, shards=write_discs(tmp_path / "test")))
    client, model = TestClient(app), models["tiny"]
    before = client.post("/v1/search", json={"text": "a red circle"}).json()
    files.delete(str(tmp_path / "test" / "manifest.json"))  # the index of the new version cannot be made
    for tar in (tmp_path / "test").glob("*.tar"):
        tar.unlink()
    crown("tiny", "2")
    assert not model.refresh()
    assert "version tiny/2 is refused, version tiny/1 goes on" in model.problem
    assert client.post("/v1/search", json={"text": "a red circle"}).json() == before
    (said,) = client.get("/v1/models").json()["models"]
    assert "tiny/2 is refused" in said["problem"]
    assert 'itm_model_refused{model="tiny"} 1.0' in client.get("/metrics").text
    photo = client.get("/v1/images/k1")
    assert (photo.status_code, "no photo" in photo.json()["error"]) == (404, True)


def test_a_registry_that_does_not_answer_stops_nobody(two_versions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = ServedModel(Place("tiny", two_versions, shards=write_discs(tmp_path / "test")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert not model.refresh()
    assert "cannot look for a newer version" in model.problem
    assert model.said().version == "tiny/1"


def test_an_alias_that_is_not_there_is_told_at_the_start(two_versions: str, tmp_path: Path):
    with pytest.raises(ValueError, match="has no alias 'nobody'; it has"):
        ServedModel(Place("tiny", "models:/tiny@nobody", shards=write_discs(tmp_path / "test")))
