"""The logger tensorboard: its event files hold what the tracker was told, read by their published layout."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from itm.config import parse_recipe
from itm.tracking.loggers import loggers_of
from itm.tracking.runs import Tracker

pytest_plugins = ["tests.support.registry_fixtures"]


def events(path: Path) -> Iterator[Event]:
    """A file of records: length (8 bytes, little endian), its checksum (4), data, their checksum (4)."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4


def test_event_files_hold_every_metric_of_the_run_at_its_step(tmp_path: Path, registry: Path) -> None:
    loggers = [{"kind": "tensorboard"}, {"kind": "tensorboard", "options": {"to": str(tmp_path / "all")}}]
    recipe = parse_recipe({"name": "run", "output": str(tmp_path / "runs"), "model": {"kind": "dual"}, "registry": {"loggers": loggers}})
    run = Tracker.start("e", "run")
    with Tracker.resume(run.run_id, run.uri, loggers=loggers_of(recipe, run.run_id)) as tracker:
        tracker.metrics({"train/loss": 0.5, "lr": 0.1}, step=3)
        tracker.metrics({"train/loss": 0.25}, step=6)
    run.finish()
    for folder in (tmp_path / "runs/run/tensorboard", tmp_path / "all/run"):
        (file,) = folder.glob("events.out.tfevents.*")
        points = [(event.step, value.tag, value.simple_value) for event in events(file) for value in event.summary.value]
        assert sorted(points) == [(3, "lr", pytest.approx(0.1)), (3, "train/loss", 0.5), (6, "train/loss", 0.25)]


def test_a_run_in_an_object_store_asks_for_a_local_folder(registry: Path) -> None:
    recipe = parse_recipe(
        {"name": "r", "output": "s3://b/runs", "model": {"kind": "dual"}, "registry": {"loggers": [{"kind": "tensorboard"}]}}
    )
    with pytest.raises(ValueError, match=r"not at s3://b/runs/r/tensorboard: set registry\.loggers\.options\.to"):
        loggers_of(recipe, "0")
