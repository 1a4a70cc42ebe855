"""The registered model as MLflow sees it (models from code): a thin shell around a matcher folder.

    model = mlflow.pyfunc.load_model("models:/itm-matcher@champion")
    model.predict("a red circle")                                                        # one vector a row
    model.predict(["a red circle", PIL.Image.open("photo.jpg"), photo_bytes, array])
    model.predict([{"text": "a red circle"}, {"image": base64_of_a_photo}])              # as JSON has it, or as a DataFrame
    model.predict([{"image": photo_bytes, "text": "a red circle"}], params={"output": "scores"})
    model.predict(["a red circle", "a red disc"], params={"output": "t2t"})              # or i2i, of images; uni: the vectors of both

Rows hold `image`, `text`, or both (`itm.data.request` lists every form). `vectors`: each row holds one of the two. `scores`: every
image against every text, (I, T); rows without one of the two only add to the other side. `uni`: as `vectors`, by which images are compared
with images and texts with texts: of the uni-modal heads where the matcher has some. `i2i`, `t2t`: their cosines, (I, I) or (T, T), over all
images or all texts. An empty row is refused: never fewer rows out than in. It runs on a GPU where there is one; the variable ITM_DEVICE
names another device (`resolve_device`).

Files of the machine that serves are opened only where that is switched on, for whoever can reach it would read them:

    mlflow.pyfunc.load_model(uri, model_config={"paths": True})                          # or ITM_PATHS=1 for the process

A matcher that names parts of a package of its maker's loads only if the caller allows that package:

    mlflow.pyfunc.load_model(uri, model_config={"allow": ["acme"]})
    MLFLOW_PYFUNC_INFERENCE_CONFIG='{"allow": ["acme"]}' mlflow models serve -m ...
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pandas as pd

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, if nobody has imported it yet: see docs/registry-and-serving.md

import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

ROWS_PER_CALL = 64
OUTPUTS = ("vectors", "scores", "uni", "i2i", "t2t")


class ItmModel(PythonModel):
    def load_context(self, context: Any) -> None:
        from itm.device import resolve_device
        from itm.matchers.folder import load_matcher_folder

        config = context.model_config or {}
        allow = config.get("allow", [])
        self.paths = bool(config.get("paths", False)) or os.environ.get("ITM_PATHS") == "1"
        self.device = resolve_device(os.environ.get("ITM_DEVICE", "auto"))
        self.matcher: Any = load_matcher_folder(context.artifacts["matcher"], allow).to(self.device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """(N, D) vectors, (I, T) scores or (N, N) cosines, float32. Raises ValueError naming the row that cannot be used.

        model_input: every form of `rows_of`; of annotations MLflow takes this one for no schema, and warns of none at all.
        """
        from itm.data.request import rows_of

        output = (params or {}).get("output", "vectors")
        if output not in OUTPUTS:
            raise ValueError(f"params output={output!r} is unknown; use {', '.join(OUTPUTS[:-1])} or {OUTPUTS[-1]}")
        rows = rows_of(_plain(model_input), self.paths)
        images = [(row.number, row.image) for row in rows if row.image is not None]
        texts = [(row.number, row.text) for row in rows if row.text is not None]
        with torch.inference_mode():
            if output in ("vectors", "uni"):
                return self._vectors(images, texts, uni=output == "uni")
            return self._scores(images, texts) if output == "scores" else self._likeness(images, texts, output)

    def _likeness(self, images: list[tuple[int, Any]], texts: list[tuple[int, Any]], output: str) -> np.ndarray:
        from itm.evaluation.uni_modal import likeness

        cells, encode, what = (images, self._encode_images, "image") if output == "i2i" else (texts, self._encode_texts, "text")
        if not cells:
            raise ValueError(f"{output} needs at least one {what}")
        encoded = encode(cells)
        return likeness(encoded, encoded, what).cpu().numpy()

    def _scores(self, images: list[tuple[int, Any]], texts: list[tuple[int, Any]]) -> np.ndarray:
        if not images or not texts:
            raise ValueError("scores need at least one image and one text")
        return self.matcher.score(self._encode_images(images), self._encode_texts(texts)).float().cpu().numpy()

    def _vectors(self, images: list[tuple[int, Any]], texts: list[tuple[int, Any]], uni: bool) -> np.ndarray:
        from itm.evaluation.uni_modal import uni_vectors

        both = {n for n, _ in images} & {n for n, _ in texts}
        if both:
            raise ValueError(f"row {min(both)} holds an image and a text; give one a row for vectors, or ask for params output='scores'")
        vectors: dict[int, np.ndarray] = {}
        for cells, encode, what in ((images, self._encode_images, "image"), (texts, self._encode_texts, "text")):
            if cells:
                rows = encode(cells)
                encoded = uni_vectors(rows, what) if uni else rows.vector
                if encoded is None:
                    raise ValueError(f"a {type(self.matcher).__name__} matcher has no vectors; ask for params output='scores'")
                vectors.update(zip((n for n, _ in cells), encoded.float().cpu().numpy(), strict=True))
        return np.stack([vectors[n] for n in sorted(vectors)])

    def _encode_images(self, cells: list[tuple[int, Any]]) -> Any:
        return _in_pieces(cells, self._images)

    def _images(self, piece: list[tuple[int, Any]]) -> Any:
        try:
            pixels = self.matcher.inputs.images([raw for _, raw in piece])
        except ValueError:
            for number, raw in piece:  # which of them
                try:
                    self.matcher.inputs.images([raw])
                except ValueError as error:
                    raise ValueError(f"row {number}: {error}") from None
            raise
        return self.matcher.encode_images(pixels.to(self.device))

    def _encode_texts(self, cells: list[tuple[int, Any]]) -> Any:
        captions = self.matcher.inputs.captions
        return _in_pieces(cells, lambda piece: self.matcher.encode_captions(captions([text for _, text in piece]).to(self.device)))


def _in_pieces(cells: list[tuple[int, Any]], encode: Any) -> Any:
    pieces = [encode(cells[n : n + ROWS_PER_CALL]) for n in range(0, len(cells), ROWS_PER_CALL)]
    return type(pieces[0]).cat(pieces)


def _plain(given: Any) -> Any:
    """Tables of pandas as dicts and lists."""
    if isinstance(given, pd.Series):
        return given.tolist()
    if not isinstance(given, pd.DataFrame):
        return given
    if "image" in given or "text" in given or given.shape[1] != 1:
        return {str(name): given[name].tolist() for name in given.columns}
    return given.iloc[:, 0].tolist()  # a list that became a table on the way


set_model(ItmModel())
