"""A served model takes up a moved alias beside the old version, and refuses what does not fit its index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from itm.data import files
from itm.retrieval.index import Index
from itm.tracking.registry import crown, promote
from itm.tracking.runs import Tracker
from pipelines.index import index
from pipelines.indexing.building import Wanted
from pipelines.serving.served import Place, ServedModel
from tests.support.disc_index import COLOURS, write_discs
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


def test_an_index_of_its_own_is_opened_for_each_version_and_another_matchers_is_refused_by_name(two_versions: str, tmp_path: Path):
    shards = write_discs(tmp_path / "test")
    for number in (1, 2):
        index(Wanted(str(tmp_path / f"m{number}"), (shards,), str(tmp_path / "index" / str(number)), device="cpu", workers=0))
    model = ServedModel(Place("tiny", two_versions, str(tmp_path / "index" / "{version}")))
    fixed = ServedModel(Place("fixed", two_versions, str(tmp_path / "index" / "1")))
    crown("tiny", "2")
    assert (model.refresh(), fixed.refresh()) == (True, False)
    assert (model.said().version, fixed.said().version) == ("tiny/2", "tiny/1")
    ours, theirs = (Index.open(str(tmp_path / "index" / number)).identity.matcher for number in ("1", "2"))
    assert ours in fixed.problem and theirs in fixed.problem
    assert model.said().fields["colour"], "fields of the samples can be filtered by"


def test_a_grown_index_is_taken_up(tmp_path: Path):
    shards, place = write_discs(tmp_path / "test", COLOURS[:3]), Place("m", str(matcher_folder(tmp_path / "m", 1)), str(tmp_path / "index"))
    wanted = Wanted(place.model, (shards,), str(place.index), device="cpu", workers=0)
    index(wanted)
    model = ServedModel(place)
    assert model.said().images == 3
    write_discs(tmp_path / "test", COLOURS)
    assert not model.refresh(), "the index itself is as it was"
    index(replace(wanted, add=True))
    assert model.refresh()
    assert model.said().images == 6


def test_a_half_built_index_and_one_whose_shards_have_changed_are_refused(tmp_path: Path):
    shards, place = write_discs(tmp_path / "test"), Place("m", str(matcher_folder(tmp_path / "m", 1)), str(tmp_path / "index"))
    index(Wanted(place.model, (shards,), str(place.index), device="cpu", workers=0))
    write_discs(tmp_path / "test", COLOURS[::-1])
    with pytest.raises(ValueError, match="chang"):
        ServedModel(place)
    (tmp_path / "index" / "index.json").unlink()
    with pytest.raises(ValueError, match="no finished index"):
        ServedModel(place)
