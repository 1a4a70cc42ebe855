"""Where a run says it comes from: address, commit, and texts that a tracking server takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from itm.tracking.addresses import tracking_uri
from itm.tracking.lineage import LONGEST_NAME, LONGEST_TAG, git_commit, plain_name, shorten, texts
from tests.support import ROOT


def test_an_address_is_absolute_whatever_was_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for given, wanted in {
        "": f"sqlite:///{tmp_path}/mlflow.db",
        "sqlite:///sub/x.db": f"sqlite:///{tmp_path}/sub/x.db",
        "sqlite:////abs/x.db": "sqlite:////abs/x.db",
        "mlruns": f"{tmp_path}/mlruns",
        "http://host:5000": "http://host:5000",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert tracking_uri() == wanted


def test_cut_texts_and_names_stay_distinct():
    assert shorten("x" * 10, 10) == "x" * 10
    assert shorten("x" * 9000 + "a", 6000) != shorten("x" * 9000 + "b", 6000)
    assert plain_name("a@1%b") == "a_1_b"
    assert plain_name("n" * 300 + "a") != plain_name("n" * 300 + "b")
    assert len(plain_name("n" * 300)) == LONGEST_NAME


def test_the_commit_comes_from_the_job_or_from_git(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ITM_GIT_COMMIT", "abc")
    assert git_commit() == "abc"
    monkeypatch.delenv("ITM_GIT_COMMIT")
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert git_commit().removesuffix("-dirty") == asked.stdout.strip()


def test_code_outside_any_repository_or_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("ITM_GIT_COMMIT", raising=False)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert git_commit() == ""
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == ""


def test_tags_are_texts_that_fit_and_what_is_missing_is_left_out():
    given = {"a@b": 1, "none": None, "empty": "", "zero": 0, "long": "x" * 9000}
    tags = texts(given)
    assert list(tags) == ["a_b", "zero", "long"]
    assert (tags["a_b"], tags["zero"], len(tags["long"])) == ("1", "0", LONGEST_TAG)
