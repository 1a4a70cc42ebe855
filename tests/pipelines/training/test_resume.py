"""What a run costs that was killed, ran out of disk, lost an actor or goes on with other workers: time, and not one bit."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from itm.config import Train
from itm.data import files
from itm.data.pairs import Pairs, Work
from itm.data.plan import Plan, Position
from itm.matchers.dual import DualEncoder
from itm.methods.matching import Matching
from itm.tracking.addresses import tracking_uri
from itm.tracking.runs import client
from itm.training.checkpoint import State, latest, load_checkpoint, save_checkpoint
from itm.training.optim import build_optimizer
from itm.training.step import Step
from pipelines.cli import stage_main
from pipelines.on_ray.stream import stream, stream_here, work_of
from pipelines.train import train
from tests.support.columns import equal
from tests.support.noise_split import world
from tests.support.small_training import die_at, final, recipe, same, splits


@pytest.fixture(autouse=True, scope="module")
def _tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


def names(pairs: Pairs, plan: Plan, first: int, last: int) -> list[tuple[str, str]]:
    """(key, caption) of steps [first, last) in global order, as `plan.ranks` readers stream them."""
    pairs.fetch.plan = plan
    readers = [stream_here(pairs, work_of(rank, first, last, plan.accumulate), threads=2) for rank in range(plan.ranks)]
    rows: list[tuple[str, str]] = []
    for tables in zip(*readers, strict=True):
        for table in tables:
            rows += zip(table["key"], table["caption"], strict=True)
    return rows


@pytest.mark.parametrize(("ranks", "batch"), [(2, 3), (3, 2), (2, 6), (1, 3)])
def test_another_number_of_workers_goes_on_with_the_very_next_pair(tmp_path: Path, ranks: int, batch: int) -> None:
    """8 steps of one worker with 6 pairs are an epoch; after 3 of them others take over, and go on into the next epoch."""
    pairs = world(tmp_path)
    alone = pairs.fetch.plan
    whole = names(pairs, alone, 0, 16)
    before = names(pairs, alone, 0, 3)
    plan = Plan.of(pairs.fetch.manifest, seed=0, batch=batch, ranks=ranks, window=2).resume(alone.locate(3))
    left = (48 - 18) // (batch * ranks) * batch * ranks  # what the others can still take of this epoch
    after = names(pairs, plan, 3, 3 + left // (batch * ranks) + 48 // (batch * ranks))
    assert before + after == whole[: 18 + left] + whole[48 : 48 + len(after) - left]
    assert len(set(whole[:48])) == 48


@pytest.mark.e2e
def test_a_run_of_one_process_is_finished_by_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: object) -> None:
    splits(tmp_path)
    with monkeypatch.context() as patch:
        die_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path, data={"val_split": ""}))
    done = train(recipe(tmp_path, data={"val_split": ""}, workers=2))
    assert (done["steps"], done["rows_in"], done["rows_out"]) == (10, 4 * 6 + 6 * 12, 4 * 6 + 6 * 12)


def start(stage: str, path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"pipelines.{stage}", "-c", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


@pytest.mark.e2e
def test_a_driver_killed_with_sigkill_and_run_again_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    splits(tmp_path)
    given: dict[str, Any] = {"data": {"crop": "random", "flip": True, "val_split": ""}, "steps": 100, "ema": 0.9}
    train(recipe(tmp_path, name="whole", **given))
    killed = recipe(tmp_path, name="killed", **given)
    (tmp_path / "r.json").write_text(killed.model_dump_json())
    folder = tmp_path / "runs/killed"
    for step in (4, 12):
        driver = start("train", tmp_path / "r.json")
        wait_for(folder / f"checkpoints/{step:09d}.json", driver)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (folder / "run.json").exists()
    half = folder / "checkpoints" / f"000000099.json.tmp-{os.uname().nodename}-{driver.pid}-01234567"
    half.write_bytes(b"half")
    done = train(killed)
    assert (done["steps"], done["rows_in"], done["rows_out"]) == (100, 600, 600)
    assert same(final(tmp_path, "whole", 100), final(tmp_path, "killed", 100))
    assert not [p for p in folder.rglob("*") if ".tmp-" in p.name]


def small_step() -> Step:
    torch.manual_seed(0)
    options = Train(batch_size=4)
    method = Matching(DualEncoder(vocab_size=20, image={"kind": "conv", "image_size": 16, "hidden": 64}, width=16))
    return Step(method, build_optimizer(method, options), options, lambda step: 0.1, None, seed=0)


def test_a_checkpoint_that_cannot_be_written_says_so_and_leaves_the_one_before_whole(tmp_path: Path) -> None:
    """A limit on the size of files gives the error of a full disk without one."""
    step = small_step()
    root = str(tmp_path)
    save_checkpoint(root, State(Position(1), "d"), step)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for parameter in step.plain.parameters():
        parameter.grad = torch.ones_like(parameter)
    step.optimizer.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10_000, len(before["000000001.model.safetensors"]) + 100):  # the weights do not fit; the optimiser does not fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=rf"cannot write {tmp_path}/000000002\.(model|optimizer)"):
                save_checkpoint(root, State(Position(2), "d"), step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    state = latest(root)
    assert state is not None
    assert state.position.step == 1
    load_checkpoint(root, state, small_step())
    assert {name: data for name, data in ((p.name, p.read_bytes()) for p in tmp_path.iterdir()) if name in before} == before
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"NO SMALL DISK HERE, a full one was not tried: {mounted.stderr.strip()} (needs the right to mount a tmpfs)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.e2e
def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_it_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits(tmp_path)
    train(recipe(tmp_path, name="whole", data={"val_split": ""}))
    whole = final(tmp_path, "whole")
    (tmp_path / "r.json").write_text(recipe(tmp_path, name="full", data={"val_split": ""}).model_dump_json())
    plain, filler = Step.__call__, small_disk / "filler"

    def filling(self: Step, batches: Any, number: int) -> Any:
        if number == 5:
            with pytest.raises(OSError, match="No space") as full, filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(1024))
            assert full.value.errno == errno.ENOSPC
        return plain(self, batches, number)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", filling)
        assert stage_main("train", ["-c", str(tmp_path / "r.json")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    state = latest(str(small_disk / "full/checkpoints"))
    assert state is not None
    assert state.position.step == 4
    filler.unlink()
    assert stage_main("train", ["-c", str(tmp_path / "r.json")]) == 0
    assert same(whole, final(tmp_path, "full"))


def kill_one(named: str, when: Callable[[], bool]) -> None:
    """SIGKILL a Ray worker of this test by the name of its process once `when` holds."""
    while not when():
        time.sleep(0.01)
    while True:
        found = [(p, " ".join(p.cmdline())) for p in psutil.Process().children(recursive=True)]
        if victims := [p for p, name in found if named in name]:
            victims[0].kill()
            return
        time.sleep(0.01)


@pytest.mark.e2e
def test_the_death_of_a_preprocessing_actor_loses_and_repeats_nothing(tmp_path: Path, ray_local: object) -> None:
    pairs = world(tmp_path)
    items = work_of(0, 0, 400, 1)
    tables = []
    killer = threading.Thread(target=kill_one, args=("FetchActor", lambda: len(tables) > 2), daemon=True)
    killer.start()
    for table in stream(pairs, items, "trainer", 1):
        tables.append(table)
        if killer.is_alive():
            time.sleep(0.05)  # not all of it is ready before the actor dies
    killer.join(timeout=5)
    assert not killer.is_alive()
    assert len(tables) == 400
    for step, table in enumerate(tables):
        assert equal(table, pairs(Work(step, 0, 0)))
    assert files.exists(f"{tmp_path}/train/manifest.json")


def test_metrics_that_were_queued_when_a_process_ended_are_logged_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits(tmp_path)
    choices = recipe(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)
        train(choices)
    with closing(sqlite3.connect(tracking_uri().removeprefix("sqlite:///"))) as database:  # as if the server had not taken them
        assert database.execute("DELETE FROM metrics WHERE key LIKE 'train/%' AND step BETWEEN 3 AND 6").rowcount > 4
        database.commit()
    run_id = train(choices)["run_id"]
    kept = {row["step"]: row for row in map(json.loads, files.read_bytes(f"{choices.folder}/losses.jsonl").decode().splitlines())}
    for name in ("loss", "lr", "rejected"):
        logged = sorted((point.step, point.value) for point in client().get_metric_history(run_id, f"train/{name}"))
        assert [step for step, _ in logged if step <= 6] == [1, 2, 3, 4, 5, 6]
        assert logged[2:6] == [(step, kept[step][name]) for step in range(3, 7)]
