"""Teachers that run in every training step give the targets of their stores, learn nothing, and are refused where they can't serve."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from itm.config import Part, Recipe
from itm.data.arrow import to_columns
from itm.data.collate import to_batch
from itm.data.fetch import Work
from itm.data.pairs import Pairs
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import WordVocabulary
from itm.matchers.folder import build_matcher, save_matcher
from itm.methods.cusa import CUSA
from itm.teachers.online import OnlineTeachers
from itm.types import Batch
from pipelines.contract import stages_of
from pipelines.teaching import driver as stage
from pipelines.train import train
from pipelines.training.job import Job, build_method
from pipelines.training.preparation import prepare, training_manifest
from tests.support.noise_split import COLOURS
from tests.support.small_training import final, recipe, splits
from tests.support.tiny_unicom import saved, weights

pytest_plugins = ["tests.support.teaching_fixtures"]
CPU = torch.device("cpu")


@pytest.fixture
def teachers(here: Path) -> dict[str, Any]:
    """A Unicom in a file, and a matcher in a folder; the splits that they are to teach."""
    splits(here)
    torch.manual_seed(1)
    words = WordVocabulary.from_captions([f"a {colour} thing number" for colour in COLOURS])
    part = Part(kind="dual", options={"width": 16, "image": {"kind": "conv", "image_size": 16}})
    matcher = build_matcher(part, Inputs(ImageInput(size=16), words))
    save_matcher(matcher.eval(), here / "matcher")
    path = saved(here / "FP16-tiny.pt", weights())
    image, text = {"kind": "unicom", "options": {"path": path}}, {"kind": "matcher", "options": {"uri": str(here / "matcher")}}
    return {"image": image, "text": text, "dtype": "fp32", "batch_size": 4}


def prepared(given: Recipe) -> Job:
    return prepare(given, training_manifest(given))


def batch_of(job: Job, work: Work) -> tuple[list[str], Batch]:
    """As a worker has it: the captions, and the batch with teacher vectors. The columns go through a table, as between processes."""
    online = OnlineTeachers(job.online, job.recipe.teachers.batch_size, CPU)
    pairs = Pairs(job.split("train"), job.manifest, job.course.plan, job.inputs, job.stores, online.prepare)
    columns = to_columns(pickle.loads(pickle.dumps(pairs))(work))
    return columns["caption"], online.taught(to_batch(columns), columns)


def cosines(job: Job, batch: Batch) -> list[torch.Tensor]:
    method = build_method(job.recipe, job.inputs)
    assert isinstance(method, CUSA)
    return list(method._teacher_cosines(batch))


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 2e-6), ("fp16", 1e-3), ("int8", 4e-3)])
@pytest.mark.parametrize("online", [["image", "text"], ["text"]])
def test_the_targets_are_those_of_the_store_to_its_rounding(
    here: Path, teachers: dict[str, Any], dtype: str, rounding: float, online: list[str]
) -> None:
    stored = recipe(here, {"kind": "cusa"}, teachers=teachers | {"dtype": dtype})
    stage.teach(stored)
    live = recipe(here, {"kind": "cusa"}, teachers=teachers | {"dtype": dtype, "online": online})
    jobs = prepared(stored), prepared(live)
    for work in (Work(0, 0, 0), Work(3, 0, 0)):
        (names, want), (same, got) = (batch_of(job, work) for job in jobs)
        assert names == same
        for a, b in zip(cosines(jobs[0], want), cosines(jobs[1], got), strict=True):
            assert (a - b).abs().max() <= rounding and a.std() > 10 * rounding


@pytest.mark.e2e
def test_a_run_learns_what_it_learns_from_stores_and_keeps_no_teacher(here: Path, teachers: dict[str, Any]) -> None:
    given: dict[str, Any] = {"method": {"kind": "cusa"}, "steps": 4}
    stage.teach(recipe(here, teachers=teachers))
    train(recipe(here, name="stored", teachers=teachers, **given))
    done = train(recipe(here, name="online", teachers=teachers | {"online": ["image", "text"]}, **given))
    stored, online = (final(here, name, 4) for name in ("stored", "online"))
    assert stored.keys() == online.keys()
    assert max(float((stored[k] - online[k]).abs().max()) for k in stored if stored[k].is_floating_point()) < 1e-5
    losses = [json.loads((here / "runs" / name / "losses.jsonl").read_text().splitlines()[-1])["loss"] for name in ("stored", "online")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert done["teachers"]["image"].startswith("unicom-FP16-tiny.pt-") and done["teachers"]["text"].startswith("matcher-matcher-")
    kept = load_file(here / "runs" / "online" / "matcher" / "model.safetensors")
    assert not any("teacher" in name or "pos_embed" in name for name in kept)


def test_a_teacher_is_frozen_in_evaluation_mode_on_the_device_and_travels_without_its_model(here: Path, teachers: dict[str, Any]) -> None:
    job = prepared(recipe(here, {"kind": "cusa"}, teachers=teachers | {"online": ["image", "text"]}))
    online = OnlineTeachers(job.online, 4, CPU)
    for teacher in online.teachers.values():
        assert teacher.module is not None and teacher.device == CPU
        assert not any(m.training for m in teacher.module.modules()) and not any(p.requires_grad for p in teacher.module.parameters())
    assert len(pickle.dumps(online.prepare)) < 2000
    _, batch = batch_of(job, Work(0, 0, 0))
    assert batch.teacher is not None
    assert {x.shape[0] for x in batch.teacher.present().values()} == {6}
    assert not any(x.requires_grad or x.is_inference() for x in batch.teacher.present().values())
    assert OnlineTeachers({}, 4, CPU).taught(batch, {}) is batch


def test_an_image_that_the_teacher_cannot_read_gives_its_place_to_another_pair(here: Path, teachers: dict[str, Any]) -> None:
    job = prepared(recipe(here, {"kind": "cusa"}, teachers=teachers | {"online": ["image", "text"]}))
    plain = Pairs(job.split("train"), job.manifest, job.course.plan, job.inputs, {})
    names = plain(Work(0, 0, 0))["key"].to_pylist()

    def picky(sample: Any) -> bytes:
        if sample.key == names[0]:
            raise ValueError("too dark")
        return str(sample.key).encode()

    pairs = Pairs(job.split("train"), job.manifest, job.course.plan, job.inputs, {}, {"image": picky})
    columns = to_columns(pairs(Work(0, 0, 0)))
    assert [key.encode() for key in columns["key"]] == list(columns["online_image"])
    lost = [json.loads(problem) for problem in columns["problem"] if problem]
    assert {p["key"] for p in lost} == {names[0]} and len(lost) == names.count(names[0])
    assert lost[0]["reason"] == "no image teacher vector: too dark" and lost[0]["stage"] == "teach"


def test_only_teachers_that_are_stored_have_a_teach_stage(here: Path, teachers: dict[str, Any]) -> None:
    one = recipe(here, teachers=teachers | {"online": ["text"]})
    assert list(stage.teach(one)) == ["image"] and "teach" in [contract.stage for contract in stages_of(one)]
    both = recipe(here, teachers=teachers | {"online": ["text", "image"]})
    assert "teach" not in [contract.stage for contract in stages_of(both)]
    with pytest.raises(ValueError, match="no teacher to store: teachers.online has them run while it trains"):
        stage.teach(both)


def test_what_cannot_run_online_is_refused_by_name(here: Path, teachers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"online names text, which has no teacher: set teachers\.text"):
        recipe(here, teachers=teachers | {"online": ["text"], "text": None})
    control = {"kind": "shuffled", "options": {"of": teachers["image"]}}
    with pytest.raises(ValueError, match=r"control teachers\.image hands stored vectors round: take image out of online"):
        recipe(here, teachers=teachers | {"online": ["image"], "image": control})
    gone = teachers | {"online": ["image"], "image": {"kind": "unicom", "options": {"path": str(here / "gone.pt")}}}
    with pytest.raises(ValueError, match=r"gone\.pt: no checkpoint"):
        prepared(recipe(here, {"kind": "cusa"}, teachers=gone))
    job = prepared(recipe(here, {"kind": "cusa"}, teachers=teachers | {"online": ["image", "text"]}))
    saved(here / "FP16-tiny.pt", weights(5))
    with pytest.raises(ValueError, match=r"teachers\.image has other weights here than on the driver's node"):
        OnlineTeachers(job.online, 4, CPU)


def test_a_path_of_the_driver_is_absolute_for_workers(here: Path, teachers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    given = teachers | {"online": ["image", "text"], "image": {"kind": "unicom", "options": {"path": "FP16-tiny.pt"}}}
    job = prepared(recipe(here, {"kind": "cusa"}, teachers=given))
    assert job.online["image"].part.options["path"] == str(here / "FP16-tiny.pt")
    monkeypatch.chdir("/")
    assert OnlineTeachers({"image": job.online["image"]}, 4, CPU).teachers["image"].width > 1
