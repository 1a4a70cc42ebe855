from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cli import stage_main
from pipelines.submit import ROOT, check_arguments, job_environment, submit

SHARED = ["data.root=/shared/data", "output=s3://bucket/runs"]


def test_a_recipe_keeps_its_place_in_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT / "pipelines" / "recipes")
    assert check_arguments(["-c", "demo.yaml", *SHARED]) == ["-c", "pipelines/recipes/demo.yaml", *SHARED]
    monkeypatch.chdir("/")
    assert check_arguments(["-c", "demo", *SHARED]) == ["-c", "demo", *SHARED]
    assert check_arguments(["a red circle", "--model", "models:/m@champion"]) == ["a red circle", "--model", "models:/m@champion"]


def test_places_that_a_job_would_lose_are_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ValueError, match=r"output=.* is relative.*Say output=/shared"):
        check_arguments(["-c", "demo", SHARED[0]])
    with pytest.raises(ValueError, match=r"data\.root=.* is relative"):
        check_arguments(["-c", "demo", SHARED[1]])
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {kind: dual}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml lies outside"):
        check_arguments(["-c", str(tmp_path / "mine.yaml"), *SHARED])


def test_a_local_tracking_file_serves_only_a_local_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ITM_GIT_COMMIT", "c0ffee")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    told = job_environment("http://127.0.0.1:8265")
    assert told["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert told["ITM_GIT_COMMIT"] == "c0ffee"
    assert "secret" not in told.values()
    with pytest.raises(ValueError, match="set it to a tracking server that http://head:8265 can reach"):
        job_environment("http://head:8265")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert job_environment("http://head:8265")["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_an_address_that_is_missing_or_answers_nothing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert stage_main("submit", ["train", "-c", "demo", *SHARED]) == 2
    assert "give --address or RAY_ADDRESS" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no Ray dashboard at http://127\.0\.0\.1:9"):
        submit("train", ["-c", "demo", *SHARED], "http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        stage_main("submit", ["trane"])
    assert stage_main("submit", ["--env", "X", "train"]) == 2
    assert stage_main("submit", ["train", "-c", "demo", *SHARED, "--address", "http://127.0.0.1:9"]) == 2
    assert "--address belongs to submit, not to the stage: itm submit --address ... train" in capsys.readouterr().err
