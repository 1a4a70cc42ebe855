"""One rule for every path that a person writes: relative, `~`, file:// and remote, whoever reads it."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
import torch

import itm
from itm.data import files
from itm.data.shards import read_manifest
from itm.data.sources.source import paths_by_split
from itm.data.text import WordVocabulary
from itm.matchers.folder import build_matcher, save_matcher
from itm.tracking.addresses import tracking_uri
from pipelines.training.preparation import prepare
from tests.support.noise_split import small_split
from tests.support.small_training import recipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is `work`, the home `home`."""
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_every_way_to_write_a_local_path_becomes_the_same_absolute_one(home: Path):
    there = str(home / "a" / "b")
    for written in ("~/a/b", "../home/a/b", f"{home}/./a/c/../b", f"file://{home}/a/b", f"file://localhost{home}/a/b", Path(there)):
        assert files.absolute(written) == there, written


def test_a_remote_uri_stays_as_it_is():
    for uri in ("s3://bucket/a/../b", "gs://bucket/~/x", "memory://x", "hdfs://host:1/x"):
        assert files.absolute(uri) == uri
        assert files.is_remote(uri)
    assert not files.is_remote("file:///x")
    assert not files.is_remote("a/b://c")


def test_a_file_uri_is_what_pathlib_writes_for_any_printable_character(tmp_path: Path):
    for character in set(string.printable) - set("/\0"):
        path = tmp_path / f"a{character}b"
        assert files.absolute(path.as_uri()) == str(path), repr(character)
        assert files.absolute(path) == str(path), repr(character)


def test_a_file_of_another_machine_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"names a file of the machine 'host'; say file:///absolute/path"):
        files.absolute("file://host/x")


def test_what_is_written_by_one_way_is_read_by_every_other(home: Path):
    files.write_atomic("~/deep/x.bin", b"12345")
    for written in (f"file://{home}/deep/x.bin", "../home/deep/x.bin"):
        assert files.read_bytes(written) == b"12345"
    assert os.listdir(".") == []


def test_vocabularies_and_annotations_are_found_in_the_home_folder(home: Path):
    vocabulary = WordVocabulary({"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "circle": 4})
    vocabulary.save(home / "v")
    assert WordVocabulary.from_json("~/v/vocabulary.json").word2idx == vocabulary.word2idx
    (home / "captions.csv").write_text("image,caption\n")
    assert paths_by_split("~/captions.csv") == {"train": str(home / "captions.csv")}


def test_a_matcher_is_saved_and_loaded_below_the_home_folder(home: Path):
    for split in ("train", "val"):
        small_split(home / "shards", split, shards=1)
    choices = recipe(home)
    inputs = prepare(choices, read_manifest("~/shards/train")).inputs
    matcher = build_matcher(choices.model, inputs)
    save_matcher(matcher, "~/matchers/m")
    loaded = itm.load_matcher(f"file://{home}/matchers/m").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in matcher.state_dict().items())


def test_a_relative_tracking_database_is_made_absolute_by_the_same_rule(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/mlflow.db")
    assert tracking_uri() == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "../home/mlruns")
    assert tracking_uri() == f"{home}/mlruns"
