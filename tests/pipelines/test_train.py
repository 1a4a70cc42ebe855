from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import itm
from itm.config import Recipe, load_recipe, overridden, parse_recipe
from itm.data.records import Problem
from itm.evaluation.metrics import retrieval_metrics
from itm.matchers.folder import load_matcher_folder
from pipelines.train import train
from pipelines.training import moments
from pipelines.training.group import check_room
from pipelines.training.worker import LOST, ended_with_its_device
from tests.support.noise_split import small_split
from tests.support.small_training import die_at, final, recipe, same, splits, teach_noise


@pytest.fixture(autouse=True, scope="module")
def _tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One database for the module: making its tables takes longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


@pytest.mark.e2e
def test_a_matcher_is_fine_tuned_with_its_own_tokenizer_and_one_of_other_sizes_is_refused(tmp_path: Path) -> None:
    splits(tmp_path)
    train(recipe(tmp_path))
    first = itm.load_matcher(tmp_path / "runs" / "run" / "matcher")
    train(recipe(tmp_path, name="tuned", start=f"{tmp_path}/runs/run/matcher", steps=1, lr=1e-12, validate_every=1))
    tuned = itm.load_matcher(tmp_path / "runs" / "tuned" / "matcher")
    assert tuned.inputs.tokenizer.vocab_size == first.inputs.tokenizer.vocab_size
    for name, value in first.named_parameters():
        torch.testing.assert_close(dict(tuned.named_parameters())[name], value)
    wider = recipe(tmp_path, name="wider", start=f"{tmp_path}/runs/run/matcher")
    wider = wider.model_copy(update={"model": wider.model.model_copy(update={"options": wider.model.options | {"width": 4}})})
    with pytest.raises(ValueError, match="does not fit model.options, take them from its config.json"):
        train(wider)


@pytest.mark.parametrize(("key", "value"), [("clean", False), ("max_length", 9)])
def test_a_recipe_that_contradicts_the_tokenizer_it_starts_from_is_refused(tmp_path: Path, key: str, value: object) -> None:
    splits(tmp_path)
    train(recipe(tmp_path, steps=1, validate_every=1))
    other = overridden(recipe(tmp_path, name="other", start=f"{tmp_path}/runs/run/matcher"), [f"text.{key}={value}"])
    with pytest.raises(ValueError, match=rf"contradicts the tokenizer of train\.start.*text\.{key}: {value!r} here"):
        train(other)


def test_validation_reads_so_many_images_and_the_share_of_same_image_pairs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits(tmp_path)
    seen: list[int] = []
    monkeypatch.setattr(moments, "retrieval_metrics", lambda scores, truth: seen.append(len(scores)) or retrieval_metrics(scores, truth))
    done = train(recipe(tmp_path, data={"val_images": 5, "shuffle_pairs": "all"}))
    assert seen == [5, 5]
    assert "are expected with another pair of their image beside them" in capsys.readouterr().out
    assert 0 < done["same_image_share"] < 1


@pytest.mark.e2e
def test_a_run_leaves_all_its_outputs_and_is_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits(tmp_path)
    done = train(recipe(tmp_path))
    folder = tmp_path / "runs" / "run"
    assert json.loads((folder / "run.json").read_text()) == done
    assert {"run_id", "recipe_fingerprint", "manifest", "teachers", "steps", "seconds", "samples_per_s", "git_commit"} <= set(done)
    assert done["best"]["step"] in (5, 10)
    assert done["seconds"] > 0
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert {"loss", "contrastive", "lr", "samples_per_s", "rejected"} <= set(rows[0])
    assert sorted(p.name for p in folder.glob("checkpoints/*.json")) == ["000000008.json", "000000010.json"]
    matcher = load_matcher_folder(folder / "matcher")
    best = load_file(folder / "checkpoints" / f"best-{done['best']['step']:09d}.safetensors")
    assert same(dict(matcher.state_dict()), best)
    before = (folder / "run.json").stat().st_mtime_ns
    assert train(recipe(tmp_path)) == done
    assert "is finished" in capsys.readouterr().out
    assert (folder / "run.json").stat().st_mtime_ns == before
    assert train(recipe(tmp_path), overwrite=True)["run_id"] != done["run_id"]


@pytest.mark.e2e
def test_a_killed_run_goes_on_and_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits(tmp_path)
    augmented = {"crop": "random", "flip": True}
    train(recipe(tmp_path, name="whole", data=augmented, ema=0.9))
    with monkeypatch.context() as patch:
        die_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path, name="killed", data=augmented, ema=0.9))
    assert not (tmp_path / "runs" / "killed" / "run.json").exists()
    run_id = json.loads((tmp_path / "runs" / "killed" / "started.json").read_text())["run_id"]
    done = train(recipe(tmp_path, name="killed", data=augmented, ema=0.9))
    assert done["run_id"] == run_id
    assert same(final(tmp_path, "whole"), final(tmp_path, "killed"))
    whole, killed = (load_matcher_folder(tmp_path / "runs" / name / "matcher").state_dict() for name in ("whole", "killed"))
    assert same(dict(whole), dict(killed))
    losses = [
        [{k: v for k, v in json.loads(line).items() if k != "samples_per_s"} for line in (tmp_path / "runs" / name / "losses.jsonl").open()]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.e2e
def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    splits(tmp_path)
    train(recipe(tmp_path, steps=2))
    with pytest.raises(
        ValueError, match=r"other choices: model.options.width was 8, is 4; train.lr was 0.001, is 0.1;.*--overwrite"
    ) as told:
        other = recipe(tmp_path, steps=2, lr=0.1).model_dump(mode="json")
        other["model"]["options"]["width"] = 4
        train(parse_recipe(other))
    assert "steps" not in str(told.value)


@pytest.mark.e2e
def test_a_rejected_pair_is_counted_and_written_down_until_the_limit(tmp_path: Path) -> None:
    small_split(tmp_path / "shards", "train", broken=(4,))
    data = {"val_split": "", "max_reject_rate": 0.2}
    done = train(recipe(tmp_path, data=data))
    assert done["rejected"] == 1
    assert done["best"] is None
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "quarantine-0.jsonl").open()]
    assert [(row["key"], row["shard"], row["stage"]) for row in rows] == [("k004", "00000.tar", "train")]
    with pytest.raises(ValueError, match=r"1 of 24 samples were rejected, more than data\.max_reject_rate=0\.01.*quarantine-0"):
        train(recipe(tmp_path, name="strict", data={"val_split": ""}))


@pytest.mark.e2e
def test_what_ranks_rejected_that_are_gone_still_counts(tmp_path: Path) -> None:
    small_split(tmp_path / "shards", "train", broken=(4,))
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    for number in (1, 3):
        (folder / f"quarantine-{number}.jsonl").write_text(Problem(f"k00{number}", "00000.tar", "train", "met by a rank").row() + "\n")
    assert train(recipe(tmp_path, data={"val_split": "", "max_reject_rate": 0.2}))["rejected"] == 3
    assert [path.name for path in folder.glob("quarantine-*")] == ["quarantine-0.jsonl"]


def test_trainers_that_leave_no_cpu_to_the_decoding_actors_are_refused(tmp_path: Path) -> None:
    asked = recipe(tmp_path, workers=2, data={"decode": "actors"})
    with pytest.raises(ValueError, match=r"need 2\.5 CPUs, the cluster has 2: set data\.decode=trainer"):
        check_room(asked, 2.0)
    for fine, cpus in ((asked, 2.5), (asked, 0.0), (recipe(tmp_path, workers=2), 2.0)):  # 0: a cluster that is still to grow
        check_room(fine, cpus)


def test_more_trainers_than_a_session_that_cannot_grow_has_cpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"train\.workers=9 need as many CPUs, the session of this machine has 4"):
        check_room(recipe(tmp_path, workers=9), 4.0)
    check_room(recipe(tmp_path, workers=9, min_workers=2), 4.0)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_room(recipe(tmp_path, workers=9), 4.0)


def test_too_few_pairs_are_refused_with_numbers_before_the_start(tmp_path: Path) -> None:
    splits(tmp_path, shards=1, samples=3)
    with pytest.raises(ValueError, match=r"has 6 pairs in 1 shards, fewer than one global batch of 24 = 6 .* x 4 \(workers\)"):
        train(recipe(tmp_path, workers=4))
    assert not (tmp_path / "runs" / "run" / "started.json").exists()


def test_a_missing_store_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    splits(tmp_path)
    with pytest.raises(ValueError, match=r"needs image teacher vectors: set teachers\.image and run `itm teach`"):
        train(recipe(tmp_path, {"kind": "cusa"}))


def test_missing_splits_and_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shards/train; run `itm pack`"):
        train(recipe(tmp_path))
    small_split(tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"shards/val.*data\.val_split="):
        train(recipe(tmp_path))
    with pytest.raises(ValueError, match=r"set train\.steps or train\.epochs"):
        train(recipe(tmp_path, data={"val_split": ""}, steps=None))


def test_a_model_of_another_image_size_is_refused_before_anything_is_tracked(tmp_path: Path) -> None:
    splits(tmp_path)
    with pytest.raises(ValueError, match=r"conv tower for 16 pixels a side got \(24, 24\): set its image_size to data.image_size"):
        train(recipe(tmp_path, data={"image_size": 24}))
    assert not (tmp_path / "runs" / "run" / "started.json").exists()


def test_an_unknown_recipe_key_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {kind: dual}\ntrain: {bach_size: 3}\n")
    with pytest.raises(ValueError, match=r"'train\.bach_size'; did you mean 'batch_size'"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.e2e
def test_cusa_trains_from_its_stores(tmp_path: Path) -> None:
    splits(tmp_path)
    done = train(recipe(tmp_path, {"kind": "cusa"}, teachers=teach_noise(tmp_path)))
    assert set(done["teachers"]) == {"image", "text"}
    row = json.loads((tmp_path / "runs/run/losses.jsonl").read_text().splitlines()[-1])
    assert row["loss"] == pytest.approx(row["itc"] + row["csa"] + row["usa"], rel=1e-5)
    assert any("csa_student" in name for name in row)


def test_a_missing_sidecar_and_one_of_other_shards_are_refused_before_the_start(tmp_path: Path) -> None:
    splits(tmp_path)
    teachers = teach_noise(tmp_path)
    next((tmp_path / "shards/train/teachers").glob("noise-*/00001.arrow")).unlink()
    with pytest.raises(ValueError, match=r"no sidecar at .*00001\.arrow: run `itm teach`"):
        train(recipe(tmp_path, {"kind": "cusa"}, teachers=teachers))
    small_split(tmp_path / "shards", "train", samples=9)
    with pytest.raises(ValueError, match=r"was scored from another version of 0000\d\.tar"):
        train(recipe(tmp_path, {"kind": "cusa"}, teachers=teachers))
    assert not (tmp_path / "runs/run/started.json").exists()


@pytest.mark.e2e
def test_what_a_ray_worker_raises_for_the_user_reaches_him_as_it_was(tmp_path: Path, ray_local: object) -> None:
    small_split(tmp_path / "shards", "train", broken=(4,))
    with pytest.raises(ValueError, match=r"^1 of 24 samples were rejected, more than data\.max_reject_rate=0\.01"):
        train(recipe(tmp_path, data={"val_split": ""}, workers=1))


def kill_a_worker_after(checkpoint: Path) -> None:
    """SIGKILL one Ray Train worker of this test once the checkpoint is there."""
    while not checkpoint.exists():
        time.sleep(0.02)
    names = [(p, " ".join(p.cmdline())) for p in psutil.Process().children(recursive=True)]
    next(p for p, name in names if "RayTrainWorker" in name).kill()


@pytest.mark.e2e
def test_two_workers_on_one_shard_survive_the_death_of_one_bit_for_bit(tmp_path: Path, ray_local: object) -> None:
    splits(tmp_path, shards=1, samples=24)
    given: dict[str, Any] = {"workers": 2, "batch_size": 3, "steps": 60, "validate_every": 30, "max_failures": 1}
    whole = train(recipe(tmp_path, name="whole", **given))
    killer = threading.Thread(target=kill_a_worker_after, args=(tmp_path / "runs/killed/checkpoints/000000004.json",), daemon=True)
    killer.start()
    killed = train(recipe(tmp_path, name="killed", **given))
    killer.join(timeout=5)
    assert not killer.is_alive()
    assert whole["steps"] == killed["steps"] == 60
    assert whole["best"] == killed["best"]
    assert same(final(tmp_path, "whole", 60), final(tmp_path, "killed", 60))


def loses_its_device(root: Path, **given: Any) -> Recipe:
    method = {"kind": "tests.support.lost_device:LosesItsDevice", "options": {"notes": f"{root}/{given['workers']}.txt"}}
    return recipe(root, method, {"val_split": ""}, name=f"run{given['workers']}", **given)


def notes(path: Path) -> list[list[int]]:
    return [[*map(int, line.split())] for line in path.read_text().splitlines()]


def test_a_device_that_is_lost_ends_a_run_without_workers_in_a_line_and_it_goes_on(tmp_path: Path) -> None:
    splits(tmp_path)
    asked = loses_its_device(tmp_path, workers=0)
    with pytest.raises(OSError, match="^the device is lost: CUDA error: device-side assert triggered; run the same command again, it goes"):
        train(asked)
    assert train(asked)["steps"] == 10
    assert [step for _, step in notes(tmp_path / "0.txt")] == [*range(6), *range(4, 10)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), LOST),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), LOST),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (ValueError("a loss is not finite"), 1),
    ],
)
def test_a_lost_device_ends_the_process_of_a_worker_and_no_other_error_does(error: Exception, code: int) -> None:
    child = os.fork()
    if not child:
        try:
            with ended_with_its_device(own_process=True):
                raise error
        except Exception:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


@pytest.mark.e2e
def test_a_worker_whose_device_is_lost_is_replaced_by_another_process(tmp_path: Path, ray_local: object) -> None:
    splits(tmp_path)
    assert train(loses_its_device(tmp_path, workers=1, max_failures=1))["steps"] == 10
    seen = notes(tmp_path / "1.txt")
    assert [step for _, step in seen] == [*range(6), *range(4, 10)]
    assert len({process for process, step in seen if step == 5}) == 2
    assert len({process for process, _ in seen}) == 2


@pytest.mark.e2e
def test_more_workers_than_gpus_are_refused_before_a_run_is_recorded(ray_local: Any, tmp_path: Path) -> None:
    splits(tmp_path)
    with pytest.raises(ValueError, match=r"train\.workers=2 need 2 GPUs, the cluster has 0 .* with train\.use_gpu=false, or add nodes"):
        train(recipe(tmp_path, workers=2, use_gpu=True))
    assert not (tmp_path / "runs" / "run" / "started.json").exists()
