from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import itm
from itm.data.preprocess import Inputs
from itm.evaluation.dataset import encode_split
from tests.support.small_split import small_run


def test_the_next_rows_are_decoded_while_the_model_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_run(tmp_path, count=6)
    matcher = itm.load_matcher(f"{recipe.folder}/matcher")
    decoded, begun, encoded = Inputs.images, [threading.Event() for _ in range(4)], 0

    def images(self: Inputs, raw: Any, *given: Any) -> Any:
        next(event for event in begun if not event.is_set()).set()
        return decoded(self, raw, *given)

    def waits(images: Any) -> Any:
        nonlocal encoded
        encoded += 1
        assert encoded % 2 == 0 or begun[encoded].wait(10), "nothing is decoded meanwhile"
        return encode(images)

    encode = matcher.encode_images
    monkeypatch.setattr(Inputs, "images", images)
    monkeypatch.setattr(matcher, "encode_images", waits)
    encode_split(matcher, f"{recipe.data.root}/test", batch_size=2)  # two shards of three images
    assert encoded == 4
