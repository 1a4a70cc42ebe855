from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

from itm.config import Part
from itm.tracking.runs import Tracker
from tests.support.registry_world import TEXTS, matcher_folder, picture, register_matcher, tiny_matcher

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e
PICTURES = [picture("red"), picture("blue")]


@pytest.fixture
def load(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Registers a matcher and loads it as any MLflow user would, with pickle forbidden."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

    def register_and_load(part: Part | None = None):
        with Tracker.start("tests", "run") as tracker:
            version = register_matcher(matcher_folder(tmp_path / "matcher", 5, part), "tiny", tracker.run_id, {})
        with warnings.catch_warnings(action="ignore"):
            import mlflow.pyfunc
            from mlflow import set_tracking_uri

            set_tracking_uri(tracker.uri)
            try:
                return mlflow.pyfunc.load_model(f"models:/tiny/{version}")
            finally:
                set_tracking_uri(None)

    return register_and_load


def test_the_flavour_gives_the_vectors_and_scores_of_the_matcher(load, tmp_path: Path):
    model, matcher = load(), tiny_matcher(5)
    images = matcher.encode_images(matcher.inputs.images(PICTURES))
    captions = matcher.encode_captions(matcher.inputs.captions(TEXTS))
    (tmp_path / "blue.png").write_bytes(PICTURES[1])
    rows = [{"image": PICTURES[0]}, {"text": TEXTS[0]}, {"image": str(tmp_path / "blue.png")}, {"text": TEXTS[1]}]
    wanted = torch.stack([images.vector[0], captions.vector[0], images.vector[1], captions.vector[1]]).detach()
    for given in (rows, pd.DataFrame(rows)):
        torch.testing.assert_close(torch.from_numpy(model.predict(given)), wanted)
    frame = pd.DataFrame({"image": [*PICTURES, None], "text": TEXTS})
    scores = model.predict(frame, params={"output": "scores"})
    torch.testing.assert_close(torch.from_numpy(scores), matcher.score(images, captions).detach())
    only = model.predict(pd.DataFrame({"text": TEXTS}))
    torch.testing.assert_close(torch.from_numpy(only), captions.vector.detach())


def test_the_flavour_says_which_row_it_cannot_use(load, tmp_path: Path):
    model = load()
    with pytest.raises(ValueError, match=r"row 1: no image file at nowhere\.jpg"):
        model.predict([{"image": PICTURES[0]}, {"image": "nowhere.jpg"}])
    with pytest.raises(ValueError, match="row 0 holds an image and a text"):
        model.predict([{"image": PICTURES[0], "text": "a red circle"}])
    with pytest.raises(ValueError, match="at least one image and one text"):
        model.predict([{"text": "a red circle"}], params={"output": "scores"})
    with pytest.raises(ValueError, match="use 'vectors' or 'scores'"):
        model.predict([{"text": "a red circle"}], params={"output": "logits"})
