from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import uvicorn
from PIL import Image

from itm.config import Part
from itm.matchers.folder import save_matcher
from itm.matchers.uni_heads import UniHeads, give_heads
from itm.tracking.runs import Tracker
from tests.support.ports import free_ports
from tests.support.registry_world import TEXTS, matcher_folder, picture, register_matcher, tiny_matcher

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e
PICTURES = [picture("red"), picture("blue")]


@pytest.fixture
def load(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Registers a matcher and loads it as any MLflow user would, with pickle forbidden."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

    def register_and_load(part: Part | None = None, heads: UniHeads | None = None, **options: Any):
        folder = matcher_folder(tmp_path / "matcher", 5, part)
        if heads is not None:
            matcher = tiny_matcher(5, part)
            give_heads(matcher, heads)
            save_matcher(matcher, folder)
        with Tracker.start("tests", "run") as tracker:
            version = register_matcher(folder, "tiny", tracker.run_id, {})
        with warnings.catch_warnings(action="ignore"):
            import mlflow.pyfunc
            from mlflow import set_tracking_uri

            set_tracking_uri(tracker.uri)
            try:
                return mlflow.pyfunc.load_model(f"models:/tiny/{version}", **options)
            finally:
                set_tracking_uri(None)

    return register_and_load


def test_the_flavour_gives_the_vectors_and_scores_of_the_matcher(load, tmp_path: Path):
    model, matcher = load(model_config={"paths": True}), tiny_matcher(5)
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


def test_images_and_texts_are_compared_among_themselves_through_the_uni_heads(load):
    heads = UniHeads("linear", 8)
    model, matcher = load(heads=heads), tiny_matcher(5)
    with torch.no_grad():
        images = matcher.encode_images(matcher.inputs.images(PICTURES)).vector @ heads["image"].weight.T + heads["image"].bias
        texts = matcher.encode_captions(matcher.inputs.captions(TEXTS)).vector @ heads["text"].weight.T + heads["text"].bias
    images, texts = (rows / rows.norm(dim=1, keepdim=True) for rows in (images, texts))
    torch.testing.assert_close(torch.from_numpy(model.predict(TEXTS, params={"output": "t2t"})), texts @ texts.T)
    torch.testing.assert_close(torch.from_numpy(model.predict(PICTURES, params={"output": "i2i"})), images @ images.T)
    mixed = model.predict([TEXTS[1], PICTURES[0]], params={"output": "uni"})
    torch.testing.assert_close(torch.from_numpy(mixed), torch.stack([texts[1], images[0]]))
    torch.testing.assert_close(torch.from_numpy(model.predict(TEXTS)), expected(TEXTS), msg="plain vectors are as they were")
    for given, output, message in ((TEXTS, "i2i", "i2i needs at least one image"), (TEXTS, "i2t", "use vectors, scores, uni, i2i or t2t")):
        with pytest.raises(ValueError, match=message):
            model.predict(given, params={"output": output})


def expected(rows: list[bytes | str]) -> torch.Tensor:
    """Row by row, from the matcher itself."""
    matcher = tiny_matcher(5)
    one = [
        matcher.encode_images(matcher.inputs.images([row]))
        if isinstance(row, bytes)
        else matcher.encode_captions(matcher.inputs.captions([row]))
        for row in rows
    ]
    return torch.cat([encoded.vector for encoded in one]).detach()


def test_every_form_of_a_text_and_of_an_image_gives_the_same_vectors(load):
    model = load()
    pictures = [Image.open(io.BytesIO(raw)) for raw in PICTURES]
    arrays, encoded = [np.asarray(p) for p in pictures], [base64.b64encode(raw).decode() for raw in PICTURES]
    one_text, texts, one_image, images = (expected(rows) for rows in (TEXTS[:1], TEXTS, PICTURES[:1], PICTURES))
    forms = [
        (TEXTS[0], one_text),
        ({"text": TEXTS[0]}, one_text),
        (TEXTS, texts),
        (tuple(TEXTS), texts),
        (np.array(TEXTS), texts),
        (np.array(TEXTS, dtype=object), texts),
        (pd.Series(TEXTS), texts),
        (pd.DataFrame(TEXTS), texts),
        ({"text": TEXTS}, texts),
        ({"text": np.array(TEXTS)}, texts),
        (PICTURES[0], one_image),
        (bytearray(PICTURES[0]), one_image),
        (pictures[0], one_image),
        (arrays[0], one_image),
        (f"data:image/png;base64,{encoded[0]}", one_image),
        ({"image": encoded[0]}, one_image),
        (PICTURES, images),
        (pictures, images),
        (arrays, images),
        (np.stack(arrays), images),
        ([{"image": text} for text in encoded], images),
        (pd.DataFrame({"image": encoded}), images),
        (pd.DataFrame({"image": PICTURES}), images),
        (pd.DataFrame({"image": pictures}), images),
        ({"image": arrays}, images),
        ([TEXTS[0], pictures[1], {"text": TEXTS[1]}, arrays[0]], expected([TEXTS[0], PICTURES[1], TEXTS[1], PICTURES[0]])),
    ]
    for given, wanted in forms:
        torch.testing.assert_close(torch.from_numpy(model.predict(given)), wanted, msg=lambda said, given=given: f"{given!r:.80}: {said}")
    assert str(model.metadata.signature.outputs)
    assert model.input_example == ["a red circle left of a blue square", "two dogs run over a lawn"]


def test_a_row_that_is_null_or_empty_is_refused_by_its_number_and_none_is_lost(load):
    model = load()
    for given, rows in [
        (["a", None, "b"], "row 1 of 3"),
        (["a", "b", ""], "row 2 of 3"),
        ([float("nan"), "a", "  "], "rows 0, 2 of 3"),
        (pd.DataFrame({"text": ["a", None, pd.NA]}), "rows 1, 2 of 3"),
        (pd.DataFrame({"image": [PICTURES[0], None, b""], "text": [None, None, ""]}), "rows 1, 2 of 3"),
        ([{"text": "a"}, {}], "row 1 of 2"),
        ("", "row 0 of 1"),
    ]:
        with pytest.raises(ValueError, match=f"{rows}: empty"):
            model.predict(given)
    for given, message in [
        ([], "no row"),
        (["a", 5], "row 1: a int is no image"),
        ([{"text": 5}], "row 0: its text is a int"),
        ([{"caption": "a"}], "row 0 has neither 'image' nor 'text', it has \\['caption'\\]"),
        ({"image": PICTURES, "text": TEXTS}, "differ in length"),
        (np.zeros((2, 3), dtype=np.float32), "no input: images are uint8"),
        ([np.full((4, 4, 3), 300)], "row 0: an array .* from 0 to 255"),
        ([PICTURES[0], b"no image"], "row 1: "),
    ]:
        with pytest.raises(ValueError, match=message):
            model.predict(given)


def test_files_are_opened_only_where_that_was_switched_on(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "blue.png").write_bytes(PICTURES[1])
    closed, path = load(), str(tmp_path / "blue.png")
    for given in ([{"image": path}], {"image": path}, [tmp_path / "blue.png"]):
        with pytest.raises(ValueError, match=r"row 0: '/.*' is neither base64 nor a file, and files of the server are not opened"):
            closed.predict(given)
    torch.testing.assert_close(torch.from_numpy(load(model_config={"paths": True}).predict([{"image": path}])), expected(PICTURES[1:]))
    monkeypatch.setenv("ITM_PATHS", "1")
    torch.testing.assert_close(torch.from_numpy(load().predict([{"image": path}])), expected(PICTURES[1:]))


@pytest.fixture
def ask(load):
    """A function that posts JSON to the server of MLflow, which runs in this process."""
    with warnings.catch_warnings(action="ignore"):
        from mlflow.pyfunc import scoring_server
    server = uvicorn.Server(uvicorn.Config(scoring_server.init(load()), port=free_ports(1)[0], log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()

    def post(body: dict[str, Any]) -> tuple[int, Any]:
        while not server.started:
            time.sleep(0.05)
        url = f"http://127.0.0.1:{server.config.port}/invocations"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    yield post
    server.should_exit = True
    thread.join()


def test_the_same_over_http(ask, tmp_path: Path):
    encoded = [base64.b64encode(raw).decode() for raw in PICTURES]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(raw))) for raw in PICTURES]).tolist()
    rows = [{"text": TEXTS[0]}, {"image": encoded[0]}]
    mixed = expected([TEXTS[0], PICTURES[0]])
    for body, wanted in [
        ({"inputs": TEXTS}, expected(TEXTS)),
        ({"inputs": TEXTS[0]}, expected(TEXTS[:1])),
        ({"instances": TEXTS}, expected(TEXTS)),
        ({"inputs": {"text": TEXTS}}, expected(TEXTS)),
        ({"inputs": rows}, mixed),
        ({"instances": [{"image": e} for e in encoded]}, expected(PICTURES)),
        ({"inputs": pixels}, expected(PICTURES)),
        ({"dataframe_records": rows}, mixed),
        ({"dataframe_split": {"columns": ["image"], "data": [[e] for e in encoded]}}, expected(PICTURES)),
    ]:
        status, answer = ask(body)
        assert status == 200, (body, answer)
        torch.testing.assert_close(torch.tensor(answer["predictions"]), wanted)
    status, answer = ask({"inputs": [{"image": encoded[0]}, {"text": TEXTS[0]}], "params": {"output": "scores"}})
    assert (status, np.shape(answer["predictions"])) == (200, (1, 1))
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    for body, message in [
        ({"inputs": ["a", None, "b"]}, "row 1 of 3: empty"),
        ({"inputs": ["a", ""]}, "row 1 of 2: empty"),
        ({"dataframe_records": [{"text": "a"}, {"text": None}]}, "row 1 of 2: empty"),
        ({"dataframe_split": {"columns": ["text"], "data": [["a"], [None]]}}, "row 1 of 2: empty"),
        ({"instances": rows}, "row 0 holds an image and a text"),  # MLflow makes columns of them, without the gaps
        ({"inputs": [{"image": str(tmp_path / "secret.png")}]}, "files of the server are not opened"),
    ]:
        status, said = ask(body)
        assert status == 400, (body, said)
        assert message in said


def test_the_flavour_says_which_row_it_cannot_use(load, tmp_path: Path):
    model = load()
    with pytest.raises(ValueError, match=r"row 1: 'nowhere\.jpg' is neither base64 nor a file"):
        model.predict([{"image": PICTURES[0]}, {"image": "nowhere.jpg"}])
    with pytest.raises(ValueError, match="row 0 holds an image and a text"):
        model.predict([{"image": PICTURES[0], "text": "a red circle"}])
    with pytest.raises(ValueError, match="at least one image and one text"):
        model.predict([{"text": "a red circle"}], params={"output": "scores"})
    with pytest.raises(ValueError, match="use vectors, scores, uni, i2i or t2t"):
        model.predict([{"text": "a red circle"}], params={"output": "logits"})
