"""Parts of a user's own package, named by import path, through the stages: train, evaluate, teach, search, register, serve, and Ray."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import itm
from itm.config import Recipe, load_recipe, parse_recipe
from itm.data.sidecar import open_store, read_sidecar, sidecar_uri
from itm.tracking.registry import find_version
from itm.tracking.runs import client
from pipelines.cli import stage_main
from pipelines.evaluate import evaluate
from pipelines.register import register
from pipelines.teach import teach
from pipelines.train import train
from tests.support import ROOT
from tests.support.noise_split import png, small_split
from tests.support.small_teaching import pack, samples, scenes
from tests.support.small_teaching import recipe as teaching
from tests.support.small_training import recipe as training

pytest_plugins = ["tests.support.own_parts", "tests.support.registry_fixtures", "tests.support.teaching_fixtures"]
pytestmark = pytest.mark.e2e
FOLDER = ROOT / "tests" / "own_parts"
CONV = {"kind": "conv", "image_size": 16, "hidden": 16}
JOINT = {"kind": "acme.joint:CrossEncoder", "options": {"image": CONV, "width": 8, "depth": 1}}
VECTORS = {"kind": "acme.parts:Vectors", "options": {"image": CONV, "text": {"kind": "pooled_gru", "word_dim": 8, "hidden": 8}, "width": 8}}


def own(root: Path, model: dict[str, Any], method: dict[str, Any] | None = None, **given: Any) -> Recipe:
    """The small training with a model of the package `acme`; all three splits are packed."""
    for name in ("train", "val", "test"):
        small_split(root / "shards", name, shards=1)
    plain = training(root, method, steps=2, validate_every=2, checkpoint_every=2, **given)
    loggers = [{"kind": "acme.parts:JsonLines", "options": {"path": str(root / "log.jsonl")}}]
    choices = plain.model_dump(mode="json") | {"model": model, "registry": {"model": "own", "loggers": loggers, "metric": "t2i_r1"}}
    return parse_recipe(choices)


def test_a_joint_matcher_of_ones_own_is_trained_judged_registered_and_served(acme: Path, registry: Path, tmp_path: Path) -> None:
    recipe = own(tmp_path, JOINT, {"kind": "matching", "options": {"loss": "acme.parts:Squared"}}, checkpoint_activations=True)
    done = train(recipe)
    said = client().get_run(done["run_id"]).data.tags["packages"]
    for file, path in (("joint", "acme.joint:CrossEncoder"), ("parts", "acme.parts:Squared"), ("parts", "acme.parts:JsonLines")):
        digest = hashlib.sha256((acme / f"{file}.py").read_bytes()).hexdigest()[:12]
        assert f"{path} of acme (no version), sha256 {digest}" in said
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["run"] for row in logged} == {done["run_id"]}
    assert [row["step"] for row in logged if "train/acme.parts:Squared" in row] == [1, 2]
    assert any("val/rsum" in row for row in logged)
    with pytest.raises(ValueError, match="code of the package 'acme'"):
        itm.load_matcher(done["matcher"])
    matcher = itm.load_matcher(done["matcher"], allow=["acme"])
    assert evaluate(recipe)["metrics"]["rsum"] >= 0
    version = register(recipe)
    uri = find_version(version.uri).source
    with pytest.raises(ValueError, match="code of the package 'acme'"):
        itm.load_matcher(version.uri)
    assert type(itm.load_matcher(version.uri, allow=["acme"])) is type(matcher)
    served(uri, tmp_path, matcher)


def served(uri: str, tmp_path: Path, matcher: Any) -> None:
    """In a fresh process that does not have the package on its path: the registered model brings it."""
    (tmp_path / "picture.png").write_bytes(png(3))
    program = f"""
import sys, warnings, json
warnings.simplefilter("ignore")
import mlflow.pyfunc
rows = [{{"image": {str(tmp_path / "picture.png")!r}, "text": "a red thing"}}]
try:
    mlflow.pyfunc.load_model({uri!r})
except ValueError as error:
    print(error)
model = mlflow.pyfunc.load_model({uri!r}, model_config={{"allow": ["acme"], "paths": True}})
print(json.dumps(model.predict(rows, params={{"output": "scores"}}).tolist()))
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    refused, scores = done.stdout.strip().splitlines()[-2:] if done.stdout else (done.stderr, "")
    assert "code of the package 'acme'" in refused, done.stderr
    with torch.inference_mode():
        images = matcher.encode_images(matcher.inputs.images([png(3)]))
        wanted = matcher.score(images, matcher.encode_captions(matcher.inputs.captions(["a red thing"])))
    torch.testing.assert_close(torch.tensor(json.loads(scores)), wanted)


def test_protocols_of_ones_own_judge_scores_and_the_matcher_itself(acme: Path, registry: Path, tmp_path: Path, capsys) -> None:
    recipe = own(tmp_path, VECTORS)
    train(recipe)
    result = evaluate(recipe, protocol="acme.protocols:MeanMargin")
    assert set(result["metrics"]) == {"t2i_margin"}
    assert Path(recipe.folder, "evaluation-acme.protocols-MeanMargin.json").exists()
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert stage_main("evaluate", ["-c", str(tmp_path / "r.yaml"), "--protocol", "acme.protocols:Width"]) == 0
    assert "width" in capsys.readouterr().out
    assert json.loads(Path(recipe.folder, "evaluation-acme.protocols-Width.json").read_text())["metrics"] == {"width": 8.0}
    assert stage_main("evaluate", ["-c", str(tmp_path / "r.yaml"), "--protocol", "acme.parts:Squared"]) == 2
    assert "is not a subclass of itm.evaluation.protocols.Protocol" in capsys.readouterr().err


def test_commands_load_a_folder_of_another_ones_package_only_with_allow(acme: Path, registry: Path, tmp_path: Path, capsys) -> None:
    theirs = own(tmp_path, VECTORS)
    folder = train(theirs)["matcher"]
    plain = training(tmp_path, name="mine", steps=1, start=folder)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(plain.model_dump(mode="json")))
    shards = str(tmp_path / "shards" / "test")
    for command in (
        ["train", "-c", str(path)],
        ["evaluate", "-c", str(path), "--matcher", folder],
        ["search", "a red thing", "--model", folder, "--shards", shards],
    ):
        assert stage_main(command[0], command[1:]) == 2
        assert "code of the package 'acme': it is imported only if you allow it" in capsys.readouterr().err
    for command in (
        ["evaluate", "-c", str(path), "--matcher", folder, "--allow", "acme"],
        ["search", "a red thing", "--model", folder, "--shards", shards, "--allow", "acme"],
    ):
        assert stage_main(command[0], command[1:]) == 0
    path.write_text(json.dumps(plain.model_dump(mode="json") | {"model": VECTORS}))
    assert stage_main("train", ["-c", str(path)]) == 0
    assert load_recipe(path, ["allow=[x]"]).allowed == ["acme", "x"]


def test_a_text_teacher_of_two_lines_fills_a_store(acme: Path, here: Path) -> None:
    rows = scenes(5)
    pack(here, rows)
    part = {"kind": "acme.teacher:Letters"}
    store = open_store(teach(teaching(here, text=part))["text"])
    digest = hashlib.sha256((acme / "teacher.py").read_bytes()).hexdigest()[:12]
    assert (store.identity["kind"], store.identity["model"]) == ("Letters", "acme.teacher")
    assert store.identity["revision"] == f"source {digest}"
    texts = [caption.text for sample in samples(here) for caption in sample.captions]
    found = [vector for name in ("00000.tar", "00001.tar") for vector in read_sidecar(sidecar_uri(store.uri, name)).vectors]
    for text, vector in zip(texts, found, strict=True):
        wanted = torch.tensor([1.0 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"])
        torch.testing.assert_close(torch.tensor(vector).float(), wanted / wanted.norm(), atol=1e-3, rtol=1e-3)  # stored as unit fp16


def test_a_package_that_is_not_installed_travels_to_ray_workers(tmp_path: Path) -> None:
    """In a process of its own: packed by its source, trained one step by a worker with its matcher and its loss."""
    (tmp_path / "lines.txt").write_text("".join(f"a red thing of grey number {n}\n" for n in range(12)))
    recipe = training(tmp_path, {"kind": "matching", "options": {"loss": "acme.parts:Squared"}}, steps=1, workers=1)
    choices = recipe.model_dump(mode="json") | {"model": VECTORS}
    choices["data"] |= {"source": {"kind": "acme.parts:Lines", "options": {"path": str(tmp_path / "lines.txt")}}, "val_split": ""}
    (tmp_path / "r.yaml").write_text(json.dumps(choices))
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(FOLDER)!r})
from itm.config import load_recipe
from pipelines.pack import pack
from pipelines.train import train
if __name__ == "__main__":
    recipe = load_recipe({str(tmp_path / "r.yaml")!r})
    pack(recipe)
    print("steps", train(recipe)["steps"])
"""
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(program)
    env = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run([sys.executable, str(script)], env=env, cwd=script.parent, capture_output=True, text=True, timeout=400)
    assert "steps 1" in done.stdout, done.stdout + done.stderr
    with warnings.catch_warnings(action="ignore"):
        sys.path.insert(0, str(FOLDER))
        try:
            assert itm.load_matcher(tmp_path / "runs" / "run" / "matcher", allow=["acme"]).kind == "acme.parts:Vectors"
        finally:
            sys.path.remove(str(FOLDER))
