"""Training on several packed roots: the weights of an unbroken run also after an interruption, stores beside each root, shares told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from itm.config import parse_recipe
from pipelines.teaching import driver as teaching
from pipelines.train import train
from tests.support.noise_split import small_split
from tests.support.small_teaching import score_here
from tests.support.small_training import die_at, final, recipe, same, splits


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Two roots whose shards and keys have the same names, and other images."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    splits(tmp_path)
    small_split(tmp_path / "more", "train", shards=2, samples=5)
    return {"mix": [{"root": f"{tmp_path}/shards", "weight": 3}, {"root": f"{tmp_path}/more", "weight": 1}]}


def test_an_interrupted_run_ends_with_the_weights_of_an_unbroken_one_and_tells_the_shares(
    tmp_path: Path, roots: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = train(recipe(tmp_path, data=roots, name="whole", steps=20))
    assert list(done["mix"]) == [f"{tmp_path}/shards/train", f"{tmp_path}/more/train"]
    first, second = done["mix"].values()
    assert first + second == pytest.approx(1)
    assert first == pytest.approx(0.75, abs=0.12)
    rows = [json.loads(line) for line in (tmp_path / "runs/whole/losses.jsonl").read_text().splitlines()]
    assert rows[-1]["mix/0"] == first
    with monkeypatch.context() as patch:
        die_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path, data=roots, name="broken", steps=20))
    train(recipe(tmp_path, data=roots, name="broken", steps=20))
    assert same(final(tmp_path, "whole", 20), final(tmp_path, "broken", 20))
    with pytest.raises(ValueError, match="holds a run on other shards"):
        train(recipe(tmp_path, name="whole", steps=20))


def test_stores_lie_beside_the_shards_of_each_root(tmp_path: Path, roots: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "_score", score_here)
    taught = {"image": {"kind": "statistics"}, "text": {"kind": "tests.own_parts.acme.teacher:Letters"}}
    choices = recipe(tmp_path, method={"kind": "cusa"}, data=roots, teachers=taught, steps=4)
    with pytest.raises(ValueError, match="run `itm teach`"):
        train(choices)
    stores = teaching.teach(choices)
    assert set(stores) == {f"{m} of {tmp_path}/{root}" for m in ("image", "text") for root in ("shards", "more")}
    assert train(choices)["steps"] == 4
    elsewhere = parse_recipe(choices.model_dump() | {"teachers": choices.teachers.model_dump() | {"root": str(tmp_path / "t")}})
    with pytest.raises(ValueError, match=r"teachers\.root is one place for the stores of several roots"):
        teaching.teach(elsewhere)
