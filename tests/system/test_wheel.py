"""The wheel installs with each extra under the constraints, and imports what that extra promises.

The core is installed into a fresh environment; an extra goes into an environment of its own that sees the one it adds to, so that torch is
unpacked once. What an extra brings is thereby what pip finds missing in the other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import itm
from tests.support import ROOT

# Of the whole package, which `importlib.metadata` knows by its distribution.
IMPORTS = """
import importlib, importlib.util, json, pkgutil, sys
failed = []
for package in {packages}:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        try:
            importlib.import_module(found.name)
        except ImportError:
            failed.append(found.name)
there = [name for name in ("ray", "mlflow", "boto3") if importlib.util.find_spec(name)]
print(json.dumps({{"failed": sorted(failed), "there": there}}))
"""
LOADS_AND_SCORES = """
import itm, torch
from itm.config import Part, Text
from itm.data.preprocess import ImageInput, Inputs
from itm.data.sources.scenes import Scenes
from itm.data.text import build_tokenizer
from itm.matchers.folder import build_matcher, save_matcher

scenes = [Scenes("tiny").item("train", k) for k in range(3)]
texts = [scene.captions[0].text for scene in scenes]
inputs = Inputs(ImageInput(kind="pixels", size=32, crop="squash"), build_tokenizer(Text(), texts))
options = {"image": {"kind": "conv", "hidden": 8}, "text": {"kind": "pooled_gru", "word_dim": 8, "hidden": 8}, "width": 8}
save_matcher(build_matcher(Part(kind="dual", options=options), inputs), "m")
matcher = itm.load_matcher("m")
with torch.inference_mode():
    images = matcher.encode_images(matcher.inputs.images([scene.image for scene in scenes]))
    scores = matcher.score(images, matcher.encode_captions(matcher.inputs.captions(texts)))
print(tuple(scores.shape), bool(scores.isfinite().all()))
"""


ENCODES = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from itm.data.records import Caption
from itm.matchers.encoders.build import build_image_encoder
from itm.teachers.text import MiniLMTeacher
from itm.types import Images

photo = Images(torch.arange(1), pixels=torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
with torch.inference_mode():
    parts = build_image_encoder("efficientnet_lite0").eval()(photo).parts
print(tuple(parts.shape), MiniLMTeacher()([Caption("a", "a dog")]).shape)
"""


class Environment:
    """A virtual environment that sees the packages of those it adds to."""

    def __init__(self, folder: Path, below: Environment | None = None) -> None:
        self.folder, self.below = folder, below
        venv.create(folder, with_pip=True, symlinks=True)
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        lower, seen = below, []
        while lower is not None:
            seen.append(str(lower.packages))
            lower = lower.below
        if seen:
            (self.packages / "below.pth").write_text("\n".join(seen) + "\n")

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.folder / "bin" / "python"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=clean, check=False)
        assert not check or done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def install(self, wanted: str) -> Environment:
        self.run("-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), wanted)
        return self

    def imports(self, *packages: str) -> SimpleNamespace:
        """failed: modules that cannot be imported; there: which of ray, mlflow and boto3 are installed."""
        said = self.run("-W", "ignore", "-c", IMPORTS.format(packages=packages)).stdout
        return SimpleNamespace(**json.loads(said.splitlines()[-1]))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that goes when the tests are done: torch is large."""
    folder = tmp_path_factory.mktemp("wheel")
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "six"], capture_output=True, check=False
    )
    if asked.returncode:
        pytest.skip("NOT TESTED: the wheel and its extras; pip reaches no package registry from here")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wheel(room: Path) -> str:
    """Built from a copy: what an earlier build left in the checkout must not get in."""
    source = room / "source"
    for name in ("itm", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(room), str(source)], check=True)
    (built,) = room.glob("itm_pipeline-*.whl")
    return str(built)


@pytest.fixture(scope="module")
def core(room: Path, wheel: str) -> Environment:
    return Environment(room / "core").install(wheel)


@pytest.fixture(scope="module")
def tracking(room: Path, core: Environment, wheel: str) -> Environment:
    return Environment(room / "tracking", core).install(f"{wheel}[tracking]")


@pytest.fixture(scope="module")
def pipeline(room: Path, tracking: Environment, wheel: str) -> Environment:
    """It includes tracking."""
    return Environment(room / "pipeline", tracking).install(f"{wheel}[pipeline]")


def test_the_core_imports_all_of_itm_but_tracking(core: Environment):
    found = core.imports("itm")
    assert found.there == []
    asks_mlflow = ("drivers", "fetch", "history", "lookup", "outages", "registry", "runs")
    assert found.failed == ["itm.pyfunc", *(f"itm.tracking.{name}" for name in asks_mlflow)]


def test_the_core_loads_a_matcher_and_scores(core: Environment):
    assert core.run("-c", LOADS_AND_SCORES).stdout.strip() == "(3, 3) True"


def test_the_core_names_the_extra_of_what_it_lacks(core: Environment):
    done = core.run("-m", "pipelines.train", "-c", "demo", check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "itm train needs mlflow: pip install 'itm-pipeline[pipeline]'")
    done = core.run("-c", "import itm; itm.load_matcher('models:/a@b')", check=False)
    assert done.stderr.splitlines()[-1].endswith("needs mlflow: pip install 'itm-pipeline[tracking]'")


def test_the_installed_package_says_who_it_is(core: Environment):
    asks = (
        "import importlib.metadata as m, itm; d = m.metadata('itm-pipeline'); print(itm.__version__, d['Version'], d['License-Expression'])"
    )
    assert core.run("-c", asks).stdout.split() == [itm.__version__, itm.__version__, "Apache-2.0"]
    script = subprocess.run([str(core.folder / "bin" / "itm"), "--version"], capture_output=True, text=True, check=True)
    assert script.stdout == f"itm {itm.__version__}\n"
    assert {"itm/py.typed", "pipelines/py.typed", "pipelines/recipes/demo.yaml"} <= {
        str(path.relative_to(core.packages)) for name in ("itm", "pipelines") for path in (core.packages / name).rglob("*")
    }


def test_tracking_brings_the_registry_and_the_served_model(tracking: Environment):
    found = tracking.imports("itm")
    assert (found.failed, found.there) == ([], ["mlflow"])


def test_pipeline_brings_every_stage(pipeline: Environment):
    found = pipeline.imports("itm", "pipelines")
    assert (found.failed, found.there) == (["pipelines.serving.app"], ["ray", "mlflow"])  # Ray Serve is the extra serve
    pipeline.run("-c", "import ray.data, ray.train.torch, ray.job_submission")


def test_serve_brings_ray_serve_and_the_files_of_the_page(room: Path, pipeline: Environment, wheel: str):
    served = Environment(room / "serve", pipeline).install(f"{wheel}[serve]")
    assert served.imports("pipelines.serving").failed == []
    ask = "from importlib.resources import files; print(sorted(f.name for f in files('pipelines.serving').joinpath('page').iterdir()))"
    assert served.run("-c", ask).stdout.strip() == "['docs.html', 'docs.js', 'icon.svg', 'page.css', 'page.html', 'page.js']"


def test_s3_brings_what_artifacts_in_a_bucket_need(room: Path, core: Environment, wheel: str):
    assert Environment(room / "s3", core).install(f"{wheel}[s3]").imports("itm").there == ["boto3"]


def test_all_is_every_extra_that_a_user_needs(room: Path, pipeline: Environment, wheel: str):
    found = Environment(room / "all", pipeline).install(f"{wheel}[all]").imports("itm", "pipelines")
    assert (found.failed, found.there) == ([], ["ray", "mlflow", "boto3"])


def test_real_brings_two_pretrained_towers(room: Path, core: Environment, wheel: str):
    real = Environment(room / "real", core).install(f"{wheel}[real]")
    assert real.run("-W", "ignore", "-c", ENCODES).stdout.splitlines()[-1] == "(1, 49, 1280) (1, 384)"
