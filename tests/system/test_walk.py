"""The first ten minutes of somebody with photos and a table of captions: init, run, search; then photos without captions, searched too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itm.data.records import Record
from pipelines.search import search
from tests.support import ROOT
from tests.support.own_photos import walk_world, write_photos

BROKEN = (7, 20, 41)


def itm(folder: Path, *words: str) -> str:
    """What a command prints, with its duration."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    start = time.perf_counter()
    command = [sys.executable, "-m", "pipelines.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    print(f"$ itm {' '.join(words)}\n{done.stdout}[{time.perf_counter() - start:.0f} s]\n")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("walk") / "mine"
    folder.mkdir()
    records = walk_world(folder)
    start = time.perf_counter()
    itm(folder, "init", ".")
    itm(folder, "run", "-c", "recipe.yaml")
    print(f"from photos to a registered matcher: {time.perf_counter() - start:.0f} s")
    return folder, records


def test_every_rejected_row_is_named_and_nothing_else_is_lost(walked: tuple[Path, list[Record]]) -> None:
    folder, records = walked
    shards = folder / "runs" / "mine" / "shards"
    rows = [json.loads(line) for path in shards.glob("*/quarantine.jsonl") for line in path.read_text().splitlines()]
    assert {row["key"] for row in rows if row["what"] == "sample"} == {f"photo{n:03d}" for n in BROKEN} | {"lost"}
    kept = [json.loads(path.read_text()) for path in shards.glob("*/manifest.json")]
    captions = sum(shard["captions"] for manifest in kept for shard in manifest["shards"])
    assert captions == sum(len(record.captions) for n, record in enumerate(records) if n not in BROKEN)


def test_a_second_run_does_nothing_and_a_search_answers(walked: tuple[Path, list[Record]]) -> None:
    folder, _ = walked
    said = itm(folder, "run", "-c", "recipe.yaml")
    assert said.count("done already") == 5
    command = next(line for line in said.splitlines() if line.startswith("try: itm search"))
    assert "photo" in itm(folder, "search", "a red circle left of a blue square", *command.split('" ')[1].split())


def test_photos_without_captions_are_found_by_what_is_on_them(walked: tuple[Path, list[Record]]) -> None:
    folder, records = walked
    good = [n for n in range(len(records)) if n not in BROKEN]
    write_photos(folder / "holiday", [records[n] for n in good])
    said = itm(folder, "init", "holiday", "-o", "holiday.yaml")
    assert "no captions" in said
    itm(folder, "pack", "-c", "holiday.yaml")
    asked, found = good[::6][:10], 0
    for n in asked:
        text = records[n].captions[0].text
        place = {"model": str(folder / "runs" / "mine" / "matcher"), "shards": str(folder / "runs" / "holiday" / "shards" / "train")}
        hits = [hit.key for hit in search(text, k=5, **place).hits]
        found += f"photo{good.index(n):03d}" in hits
        print(f"{text!r}: {hits}, right photo{good.index(n):03d}")
    print(f"{found} of {len(asked)} captions find their photo among the first 5 of {len(good)}")
    assert found >= 8
