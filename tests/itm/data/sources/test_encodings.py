"""Files of other kinds than their names promise: each is named, with what it is and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from itm.data.records import Record
from itm.data.sources.coco import CocoCaptions
from itm.data.sources.csv import CsvPairs
from itm.data.sources.karpathy import Karpathy
from itm.data.sources.pairs_json import PairsJson
from itm.data.sources.precomp import Precomp
from itm.data.sources.source import Source
from tests.support.tars import png

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
TEXT = "un café au lait"
SAYS: dict[str, tuple[str, Callable[[str], Source]]] = {
    "csv": (f"image,caption\na.png,{TEXT}\n", lambda path: CsvPairs({"train": path}, str(Path(path).parent))),
    "pairs_json": (
        json.dumps([{"image": "a.png", "caption": TEXT}], ensure_ascii=False),
        lambda path: PairsJson({"train": path}, str(Path(path).parent)),
    ),
    "coco": (
        json.dumps(
            {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 2, "image_id": 1, "caption": TEXT}]}, ensure_ascii=False
        ),
        lambda path: CocoCaptions({"train": path}, str(Path(path).parent)),
    ),
    "karpathy": (
        json.dumps(
            {"images": [{"split": "train", "filename": "a.png", "imgid": 0, "sentences": [{"raw": TEXT, "sentid": 0}]}]}, ensure_ascii=False
        ),
        lambda path: Karpathy(path, str(Path(path).parent)),
    ),
}


@pytest.mark.parametrize("kind", SAYS)
def test_field_case_11_a_byte_order_mark_is_taken_and_other_encodings_and_pointers_are_named(tmp_path: Path, kind: str) -> None:
    text, opened = SAYS[kind]
    file = tmp_path / "annotations.file"
    (tmp_path / "a.png").write_bytes(png())
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        (record,) = opened(str(file)).records("train")
        assert isinstance(record, Record)
        assert [c.text for c in record.captions] == [TEXT]
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"annotations\.file line {2 if kind == 'csv' else 1} is not UTF-8 \(byte 0xe9\).*iconv -f latin1"
    ):
        opened(str(file))
    file.write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"annotations\.file is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        opened(str(file))


def test_field_case_11_features_that_are_a_pointer_or_no_array_are_named_with_a_remedy(tmp_path: Path) -> None:
    features, captions = tmp_path / "train_ims.npy", tmp_path / "train_caps.txt"
    captions.write_text("one\ntwo\n")
    for content, said in (
        (POINTER, r"train_ims\.npy is a Git LFS pointer"),
        (b"PK\x03\x04 an archive", r"train_ims\.npy is no \.npy file: write it with numpy\.save"),
        (b"", r"train_ims\.npy is no \.npy file"),
    ):
        features.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            Precomp(str(tmp_path), captions_per_image=1)
    np.save(features, np.ones((2, 3, 4), np.float32))
    whole = features.read_bytes()
    assert Precomp(str(tmp_path), captions_per_image=1).count("train") == 2
    features.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"train_ims\.npy is cut short, or holds objects"):
        Precomp(str(tmp_path), captions_per_image=1)
    features.write_bytes(whole)
    captions.write_bytes("été\nlà\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train_caps\.txt line 1 is not UTF-8"):
        Precomp(str(tmp_path), captions_per_image=1)
