from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from itm.data.arrow import to_table
from itm.data.collate import to_batch


def columns(rows: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    mask = np.arange(6)[None] < rng.integers(2, 5, rows)[:, None]
    mask[0] = np.arange(6) < 5
    return {
        "image_id": np.arange(rows, dtype=np.int64) * 3,
        "tokens": rng.integers(1, 9, (rows, 6)) * mask,
        "token_mask": mask,
        "key": [f"k{i}" for i in range(rows)],
    }


def test_pixels_and_teachers_arrive_as_they_were() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    image, text = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    given = columns(5)
    batch = to_batch(to_table({**given, "pixels": pixels, "teacher_image": image, "teacher_text": text}))
    assert batch.images.pixels is not None
    assert batch.teacher is not None
    np.testing.assert_array_equal(batch.images.pixels.numpy(), pixels.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(batch.teacher.image, image)
    np.testing.assert_array_equal(batch.teacher.text, text)
    assert batch.images.image_id.tolist() == batch.captions.image_id.tolist() == [0, 3, 6, 9, 12]
    assert batch.captions.mask.dtype == torch.bool


def test_tokens_are_trimmed_to_the_longest_caption_of_the_batch() -> None:
    given = columns(4)
    batch = to_batch(to_table({**given, "pixels": np.zeros((4, 2, 2, 3), np.uint8)}))
    assert batch.captions.tokens.shape == (4, 5)
    np.testing.assert_array_equal(batch.captions.tokens, given["tokens"][:, :5])  # type: ignore[index]


def test_regions_keep_their_shapes_through_a_slice_of_a_stack_of_tables() -> None:
    rng = np.random.default_rng(2)
    parts = [
        {
            **columns(3),
            "regions": rng.normal(size=(3, 4, 5)).astype(np.float32),
            "boxes": rng.random((3, 4, 7), np.float32),
            "mask": rng.random((3, 4)) < 0.5,
        }
        for _ in range(2)
    ]
    table = pa.concat_tables([to_table(p) for p in parts])[2:5]
    batch = to_batch(table)
    for name in ("regions", "boxes", "mask"):
        whole = np.concatenate([p[name] for p in parts])[2:5]
        np.testing.assert_array_equal(getattr(batch.images, name), whole)


def test_a_batch_may_be_written_to() -> None:
    table = to_table({**columns(4), "pixels": np.zeros((4, 2, 2, 3), np.uint8)})
    to_batch(table).images.pixels.add_(1)  # type: ignore[union-attr]
    assert not to_batch(table).images.pixels.any()  # type: ignore[union-attr]
