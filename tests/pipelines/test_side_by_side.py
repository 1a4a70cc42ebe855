"""`itm evaluate --model`: figures of any matcher on any split, without a recipe or a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import itm
from itm.data.shards import Sample, read_samples
from itm.evaluation.metrics import retrieval_metrics
from pipelines.cli import stage_main
from tests.support.hub_models import tiny
from tests.support.noise_split import small_split
from tests.support.small_split import small_run


def split(root: Path) -> Path:
    small_split(root, "test", shards=2, samples=6)
    return root / "test"


def test_the_figures_are_those_of_the_models_own_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "clip", "clip")
    shards = split(tmp_path / "shards")
    before = sorted(tmp_path.rglob("*"))
    assert stage_main("evaluate", ["--model", "clip", "--shards", str(shards), "--output", "said.json"]) == 0
    said = capsys.readouterr().out
    assert "chance" in said
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [tmp_path / "said.json"]
    matcher = itm.load_matcher("clip")
    samples = [s for n in range(2) for s in read_samples(str(shards / f"{n:05d}.tar")) if isinstance(s, Sample)]
    images = matcher.encode_images(matcher.inputs.images([s.image or b"" for s in samples]))
    captions = matcher.encode_captions(matcher.inputs.captions([c.text for s in samples for c in s.captions]))
    owner = np.repeat(np.arange(len(samples)), [len(s.captions) for s in samples])
    import torch

    expected = retrieval_metrics(matcher.score(images, captions).detach(), (torch.arange(len(samples)), torch.from_numpy(owner)))
    written = json.loads((tmp_path / "said.json").read_text())["models"][0]["metrics"]
    assert {name: round(written[name], 6) for name in expected} == {name: round(value, 6) for name, value in expected.items()}


def test_two_models_stand_side_by_side_with_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "siglip", "siglip", seed=1)
    recipe = small_run(tmp_path)
    models = ["--model", "siglip", "--matcher", f"{recipe.folder}/matcher"]
    assert stage_main("evaluate", [*models, "--shards", str(tmp_path / "shards" / "test"), "--output", "said.json"]) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    one, other = (model["metrics"] for model in said["models"])
    for name, (difference, low, high) in said["differences"][0].items():
        assert abs(difference - (other[name] - one[name])) < 1e-6
        assert low <= difference <= high
    shown = capsys.readouterr().out
    assert "B - A  (95 %)" in shown
    assert f"{said['models'][0]['chance']['i2t_r1']:.2f}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody/nothing", "--shards", "s/test"], "is no matcher folder and no Hugging Face model"),
        (["--model", "s", "--shards", "s/none"], "s is no matcher folder"),
        (["--model", "s"], "--model URI --shards FOLDER"),
        (["-c", "demo", "--shards", "s/test"], "--shards names the split where there is no recipe"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    split(tmp_path / "s")
    assert stage_main("evaluate", arguments) == 2
    assert message in capsys.readouterr().err
