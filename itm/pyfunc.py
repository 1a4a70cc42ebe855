"""The registered model as MLflow sees it (models from code): a thin shell around a matcher folder.

    model = mlflow.pyfunc.load_model("models:/itm-matcher@champion")
    model.predict([{"text": "a red circle"}, {"image": "photo.jpg"}])                    # one vector a row
    model.predict([{"image": "photo.jpg", "text": "a red circle"}], params={"output": "scores"})

Rows hold `image` (encoded bytes or a path), `text`, or both. `vectors`: each row holds one of the two. `scores`: every
image against every text, (I, T); rows without one of the two only add to the other side. It runs on a GPU where there is one; the variable
ITM_DEVICE names another device (`resolve_device`).

A matcher that names parts of a package of its maker's loads only if the caller allows that package:

    mlflow.pyfunc.load_model(uri, model_config={"allow": ["acme"]})
    MLFLOW_PYFUNC_INFERENCE_CONFIG='{"allow": ["acme"]}' mlflow models serve -m ...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, if nobody has imported it yet: see docs/registry-and-serving.md

import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

ROWS_PER_CALL = 64


class ItmModel(PythonModel):
    def load_context(self, context: Any) -> None:
        from itm.device import resolve_device
        from itm.matchers.folder import load_matcher_folder

        allow = (context.model_config or {}).get("allow", [])
        self.device = resolve_device(os.environ.get("ITM_DEVICE", "auto"))
        self.matcher: Any = load_matcher_folder(context.artifacts["matcher"], allow).to(self.device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """(N, D) vectors or (I, T) scores, float32. Raises ValueError naming the row that cannot be used."""
        output = (params or {}).get("output", "vectors")
        if output not in ("vectors", "scores"):
            raise ValueError(f"params output={output!r} is unknown; use 'vectors' or 'scores'")
        images = [(n, _image_bytes(cell, n)) for n, cell in _cells(model_input, "image")]
        texts = _cells(model_input, "text")
        if not images and not texts:
            raise ValueError(f"the input needs a column 'image' (bytes or path) or 'text', it has {list(map(str, model_input.columns))}")
        with torch.inference_mode():
            if output == "scores":
                return self._scores([raw for _, raw in images], [text for _, text in texts])
            return self._vectors(images, texts)

    def _scores(self, images: list[bytes], texts: list[str]) -> np.ndarray:
        if not images or not texts:
            raise ValueError("scores need at least one image and one text")
        return self.matcher.score(self._encode_images(images), self._encode_texts(texts)).float().cpu().numpy()

    def _vectors(self, images: list[tuple[int, Any]], texts: list[tuple[int, Any]]) -> np.ndarray:
        both = {n for n, _ in images} & {n for n, _ in texts}
        if both:
            raise ValueError(f"row {min(both)} holds an image and a text; give one a row for vectors, or ask for params output='scores'")
        vectors: dict[int, np.ndarray] = {}
        for cells, encode in ((images, self._encode_images), (texts, self._encode_texts)):
            if cells:
                encoded = encode([cell for _, cell in cells]).vector
                if encoded is None:
                    raise ValueError(f"a {type(self.matcher).__name__} matcher has no vectors; ask for params output='scores'")
                vectors.update(zip((n for n, _ in cells), encoded.float().cpu().numpy(), strict=True))
        return np.stack([vectors[n] for n in sorted(vectors)])

    def _encode_images(self, raw: list[Any]) -> Any:
        return _in_pieces(raw, lambda piece: self.matcher.encode_images(self.matcher.inputs.images(piece).to(self.device)))

    def _encode_texts(self, texts: list[Any]) -> Any:
        return _in_pieces(texts, lambda piece: self.matcher.encode_captions(self.matcher.inputs.captions(piece).to(self.device)))


def _in_pieces(cells: list[Any], encode: Any) -> Any:
    pieces = [encode(cells[n : n + ROWS_PER_CALL]) for n in range(0, len(cells), ROWS_PER_CALL)]
    return type(pieces[0]).cat(pieces)


def _cells(rows: pd.DataFrame, column: str) -> list[tuple[int, Any]]:
    if column not in rows:
        return []
    return [(n, cell) for n, cell in enumerate(rows[column]) if isinstance(cell, str | bytes) and len(cell)]


def _image_bytes(cell: str | bytes, row: int) -> bytes:
    if isinstance(cell, bytes):
        return cell
    if not Path(cell).is_file():
        raise ValueError(f"row {row}: no image file at {cell}")
    return Path(cell).read_bytes()


set_model(ItmModel())
