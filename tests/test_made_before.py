"""What version 0.1.0 wrote still loads, scores, resumes and serves, and what is written today has the same names, keys and bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import itm
from itm.config import Recipe, load_recipe
from itm.data.manifest import Manifest, read_receipt, write_manifest
from itm.data.shards import Sample, read_manifest, read_samples
from itm.data.sidecar import Header, open_store, read_sidecar, sidecar_uri, write_sidecar, write_store
from itm.evaluation.dataset import encode_split
from itm.evaluation.scoring import score_matrix
from itm.evaluation.tiles import TileStore, read_tile
from itm.matchers.folder import save_matcher
from itm.methods import METHODS
from itm.teachers.identity import choice_of
from itm.teachers.stores import store_for
from itm.tracking import lookup
from itm.tracking.fetch import download
from itm.tracking.runs import client
from pipelines.evaluate import evaluate
from pipelines.pack import CLAIM, Job, pack, pack_shard
from pipelines.register import register
from pipelines.teach import teach
from pipelines.train import train
from tests.support import ROOT
from tests.support.every_matcher import KINDS, matcher_of
from tests.support.made_before import WRITTEN, move_here, recorded, unpack
from tests.support.record_formats import STOPPED_AT, STORES, TEXTS, folder_of, method_of, run_of, scores_of, sha256, shapes_of, sidecars_of

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matchers and shards to read."""
    return unpack(tmp_path_factory.mktemp("made"), "matchers", "shards")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with shards, runs and the registry as their user has them."""
    unpack(tmp_path, "shards", "runs", "registry")
    move_here(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/registry/mlflow.db")
    return tmp_path


def whole(*overrides: str) -> Recipe:
    return load_recipe("recipe.yaml", list(overrides))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lost(before: Any, now: Any, where: str = "") -> list[str]:
    """Keys of nested objects that are no longer there."""
    if not isinstance(before, dict):
        return []
    now = now if isinstance(now, dict) else {}
    gone = [f"{where}.{key}" for key in before if key not in now]
    return gone + [name for key in before if key in now for name in lost(before[key], now[key], f"{where}.{key}")]


# --- matchers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_an_old_matcher_folder_gives_its_scores_and_is_written_again_byte_for_byte(name: str, made: Path, tmp_path: Path) -> None:
    matcher = itm.load_matcher(made / "matchers" / name)
    save_matcher(matcher, tmp_path / name)
    assert content(tmp_path / name) == content(made / "matchers" / name)
    assert json.dumps(folder_of(tmp_path / name)) == json.dumps(recorded()["matcher folders"][name])
    old = json.loads((WRITTEN / "scores.json").read_text())[name]
    np.testing.assert_allclose(scores_of(matcher, made / "shards"), old, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_a_fresh_matcher_has_the_names_and_shapes_of_then_alone_and_in_every_method(name: str) -> None:
    before, matcher = recorded(), shapes_of(matcher_of(name).state_dict())
    assert list(matcher.items()) == list(before["matchers"][name].items())  # in this order: an optimiser numbers its state
    for kind in METHODS:
        assert method_of(kind, name, matcher) == before["methods"][f"{kind} {name}"], kind


# --- shards and stores ------------------------------------------------------------------------------------------------------------------


def test_old_shards_are_known_as_finished_and_packed_again_have_the_same_bytes(here: Path) -> None:
    before = content(here / "shards")
    manifests = pack(whole())  # nothing to do, so it needs no Ray
    assert content(here / "shards") == before
    for split, manifest in manifests.items():
        claim = json.loads((here / "shards" / split / CLAIM).read_text())
        source, size = whole().data.source, whole().data.shard_samples
        assert source is not None
        for n, shard in enumerate(manifest.shards):
            stop = n * size + shard.samples
            pack_shard(Job(source, split, "pixels", claim["made_from"], f"again/{split}/{shard.name}", n * size, stop))
        receipts = [read_receipt(f"again/{split}/{shard.name}") for shard in manifest.shards]
        assert receipts == [read_receipt(f"shards/{split}/{shard.name}") for shard in manifest.shards]
        write_manifest(f"again/{split}", Manifest(split=split, source=manifest.source, shards=[r.info for r in receipts if r]))
    old = {name: digest for name, digest in recorded()["shards"].items() if name.endswith((".tar", "manifest.json"))}
    assert {name: sha256(Path("again", name)) for name in old} == old


@pytest.mark.parametrize("dtype", STORES)
def test_old_stores_are_known_as_finished_and_written_again_have_the_same_schema(dtype: str, here: Path) -> None:
    before = content(here / "shards" / "train" / "teachers")
    wanted = {f"teachers.{modality}": "null" for modality in STORES[dtype]} | {"teachers.dtype": dtype}
    recipe = whole(*(f"{key}={value}" for key, value in wanted.items()))
    stores = teach(recipe)  # nothing to do, so it needs no Ray
    assert content(here / "shards" / "train" / "teachers") == before
    for modality, uri in stores.items():
        store, headers = open_store(uri), {}
        for shard in read_manifest("shards/train").shards:
            rows = store.sidecar(shard.name, shard.sha256)
            header = Header(rows.header.identity, modality, dtype, shard.name, shard.sha256)
            target = sidecar_uri(f"again/shards/train/teachers/{store.teacher}", shard.name)
            headers[shard.name] = write_sidecar(target, header, rows.keys, rows.vectors, rows.captions, rows.problems)
            np.testing.assert_allclose(read_sidecar(target).vectors, rows.vectors, atol=1e-2)
        choice = choice_of(getattr(recipe.teachers, modality), modality, dtype)
        write_store("again/shards/train/teachers", choice, headers, store.identity)
    assert json.dumps(sidecars_of(Path("again"), dtype)) == json.dumps(recorded()["sidecars"][dtype])


# --- runs -------------------------------------------------------------------------------------------------------------------------------


def test_an_old_run_that_was_stopped_goes_on_to_its_end_in_its_own_mlflow_run(here: Path) -> None:
    run, recipe = here / "runs" / "stopped", whole("name=stopped")
    kept = (run / "losses.jsonl").read_text().splitlines()
    started = json.loads((run / "started.json").read_text())
    assert len(kept) == STOPPED_AT - 1 and started["teachers"] == {m: store_for(recipe, "train", m).teacher for m in ("image", "text")}
    done = train(recipe)
    assert (done["steps"], done["run_id"], done["rows_in"], done["rejected"]) == (8, started["run_id"], 48, 0)
    rows = (run / "losses.jsonl").read_text().splitlines()
    assert rows[: len(kept)] == kept
    ours, undisturbed = ([json.loads(row) for row in text] for text in (rows, (here / "runs/whole/losses.jsonl").read_text().splitlines()))
    assert [list(row) for row in ours] == [list(row) for row in undisturbed]
    for name in ("step", "loss", "itc", "csa", "usa", "lr"):
        np.testing.assert_allclose([row[name] for row in ours], [row[name] for row in undisturbed], rtol=1e-2, err_msg=name)
    assert train(recipe) == done


def test_an_old_finished_run_is_not_run_again_and_other_choices_are_refused(here: Path) -> None:
    before = content(here / "runs" / "whole")
    assert train(whole()) == json.loads(before["run.json"])
    assert evaluate(whole()) == json.loads(before["evaluation.json"])
    assert content(here / "runs" / "whole") == before
    with pytest.raises(ValueError, match=r"other choices: train.lr was .*, is 0.02;.*--overwrite"):
        train(whole("train.lr=0.02"))


def test_a_run_of_today_leaves_the_names_and_keys_of_then(here: Path) -> None:
    train(whole(), overwrite=True)
    now, before = run_of(here / "runs" / "whole"), recorded()["run"]
    best = [name for name in now["files"] if "best-" in name]
    assert [name for name in before["files"] if "best-" not in name] == [name for name in now["files"] if name not in best]
    assert len(best) == 1
    for name in ("run.json", "started.json", "checkpoint"):
        assert not lost(before[name], now[name])
    assert not set(before["losses.jsonl"]) - set(now["losses.jsonl"])
    for name in ("weights", "best", "optimizer"):
        assert now[name] == before[name], name


def test_an_old_matcher_scores_its_split_as_its_kept_tiles_say(here: Path) -> None:
    matcher = itm.load_matcher("runs/whole/matcher")
    (folder,) = (here / "runs" / "whole").glob("scores-*")
    store, seen = TileStore.open(str(folder)), encode_split(matcher, "shards/test")
    assert store.missing() == []
    scores = score_matrix(matcher, seen.images, seen.captions)[:, store.order]
    for tile in store.grid.tiles:
        torch.testing.assert_close(scores[store.grid.span(tile)], torch.from_numpy(read_tile(store.tile_uri(tile))), atol=1e-5, rtol=0)


# --- the registry -----------------------------------------------------------------------------------------------------------------------

SERVE = """
import importlib.machinery, json, sys

class OnlyPackaged:
    "This project is found below the registry or nowhere: the interpreter of the tests has it installed."
    def find_spec(self, name, path=None, target=None):
        if name in ("itm", "pipelines"):
            found = importlib.machinery.PathFinder.find_spec(name, [p for p in sys.path if p.startswith(sys.argv[2])])
            if found is None:
                raise ModuleNotFoundError(f"no {name} in the package")
            return found

sys.meta_path.insert(0, OnlyPackaged())
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
image, texts = sys.argv[3], json.loads(sys.argv[4])
vectors = model.predict([{"text": text} for text in texts])
scores = model.predict([{"image": image}, *({"text": text} for text in texts)], params={"output": "scores"})
print(json.dumps({"itm": sys.modules["itm"].__file__, "vectors": vectors.tolist(), "scores": scores.tolist()}))
"""


def image_of_the_test_split(here: Path) -> Path:
    sample = next(s for s in read_samples("shards/test/00000.tar") if isinstance(s, Sample) and s.image)
    (here / "image.png").write_bytes(sample.image or b"")
    return here / "image.png"


def serve(uri: str, registry: Path, image: Path) -> dict[str, Any]:
    """What the model says in a fresh process that knows no itm but that of the model."""
    command = [sys.executable, "-I", "-c", SERVE, uri, str(registry), str(image), json.dumps(TEXTS)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"ITM_PATHS": "1"}
    said = subprocess.run(command, cwd=registry, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert said.returncode == 0, said.stderr
    answer: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    assert Path(answer["itm"]).parent.parent.name == "code"
    return answer


def agrees_with_the_matcher(answer: dict[str, Any], matcher: Any, image: Path) -> None:
    with torch.no_grad():
        captions = matcher.encode_captions(matcher.inputs.captions(TEXTS))
        images = matcher.encode_images(matcher.inputs.images([image.read_bytes()]))
        torch.testing.assert_close(torch.tensor(answer["vectors"]), captions.vector, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(answer["scores"]), matcher.score(images, captions), atol=1e-5, rtol=0)


def test_an_old_version_is_found_and_served_by_the_code_it_brought(here: Path) -> None:
    assert register(whole()).version == "1"  # the same weights of the same run: nothing is added
    answer = serve("models:/recorded@champion", here / "registry", image_of_the_test_split(here))
    agrees_with_the_matcher(answer, itm.load_matcher("models:/recorded/1"), here / "image.png")


def test_old_versions_runs_and_recipes_are_told(here: Path) -> None:
    (version,) = lookup.versions("recorded")
    told, whole_run = version.plain(), json.loads((here / "runs" / "whole" / "run.json").read_text())
    evaluated = json.loads((here / "runs" / "whole" / "evaluation.json").read_text())
    assert told["metrics"] == {name: pytest.approx(value) for name, value in evaluated["metrics"].items()}
    assert (told["data"]["train"], told["chance"], told["run_id"]) == (whole_run["manifest"], {}, whole_run["run_id"])
    assert sorted(told["teachers"]) == sorted(whole_run["teachers"].values())
    kept = lookup.recipe_of(version)
    assert (kept["train"]["lr"], kept["train"]["steps"], kept["model"]["kind"]) == (
        whole().train.lr,
        whole().train.steps,
        whole().model.kind,
    )
    assert lookup.difference(version, version)["recipe"] == {}
    run = client().get_run(whole_run["run_id"])
    assert whole_run["run_id"] in {row["run_id"] for row in lookup.runs(client().get_experiment(run.info.experiment_id).name)}


def test_a_version_of_today_brings_the_whole_of_itm_and_nothing_else(here: Path) -> None:
    today = whole("name=today", "train.steps=2")
    train(today)
    evaluate(today)
    registered = register(today)
    assert registered.version == "2"
    code = download(registered.uri).parents[1] / "code"
    assert [path.name for path in code.iterdir()] == ["itm"]
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "itm").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()} == ours
    answer = serve(registered.uri, here / "registry", image_of_the_test_split(here))
    agrees_with_the_matcher(answer, itm.load_matcher(registered.uri), here / "image.png")
