"""The commands of the page on own photos, as they stand there, on a folder of pictures and a table."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from itm.data.records import Record
from itm.data.sources.scenes import Scenes
from tests.support import ROOT
from tests.support.documents import fenced

SIZES = {"train": 24, "val": 6, "test": 6}


def photos(folder: Path) -> None:
    """`photos/` and `captions.csv`."""
    (folder / "photos").mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", "split"))
        for split, count in SIZES.items():
            for record in Scenes("tiny").records(split, 0, count):
                assert isinstance(record, Record)
                (folder / "photos" / f"{record.key}.png").write_bytes(record.image or b"")
                table.writerows((f"{record.key}.png", caption.text, split) for caption in record.captions)


# One process for all, as each start of Python and of Ray costs seconds; Ray's workers start in the folder, as a user's do.
FOLLOW = """
import shlex, sys
from pipelines.cli import main
for line in sys.stdin.read().splitlines():
    code = main(shlex.split(line)[1:])
    if code:
        sys.exit(f"{line} ended with {code}")
"""


@pytest.mark.e2e
def test_three_commands_and_the_five_by_hand_make_a_searchable_model_of_own_photos(tmp_path: Path) -> None:
    photos(tmp_path)
    page = ROOT / "docs" / "own-photos.md"
    quick, by_hand = fenced(page, "console")[:2]
    (tmp_path / "by-hand.yaml").write_text(fenced(page, "yaml")[0].replace("epochs: 10", "epochs: 1"))
    commands = quick.replace("run -c my.yaml", "run -c my.yaml train.steps=4 train.validate_every=4") + by_hand
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-c", FOLLOW]
    done = subprocess.run(command, input=commands, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train 24 images, 120 captions, 0 rejected" in done.stdout
    assert "version 1 is the first champion" in done.stdout
    assert done.stdout.count("'a dog in the snow' in 6 images, 30 captions") == 2
    assert "images 6  captions 30" in done.stdout
    for name in ("my-photos", "by-hand"):
        assert name in (tmp_path / "runs" / name / "report.html").read_text()
