"""The quick way reads what numpy.savez writes, and leaves everything else to zipfile and numpy."""

import io
import zipfile

import numpy as np
import pytest

from itm.data import records
from itm.data.npz import plain_arrays
from itm.data.preprocess import read_regions
from itm.data.records import Regions

MOST = 1 << 20


def saved(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_the_arrays_are_those_of_numpy_as_views_of_the_bytes():
    rng = np.random.default_rng(0)
    arrays = {"features": rng.normal(size=(5, 7)).astype(np.float16), "width": np.int32(3), "none": np.zeros((0, 4)), "conf": rng.random(5)}
    data = saved(**arrays)
    found = plain_arrays(data, MOST)
    assert found is not None and list(found) == list(arrays)
    for name, array in np.load(io.BytesIO(data)).items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
        assert not found[name].flags.writeable and found[name].base is not None


def other_archives() -> dict[str, bytes]:
    plain = saved(features=np.ones((2, 3)))
    packed = io.BytesIO()
    np.savez_compressed(packed, features=np.ones((2, 3)))
    twice, extra = io.BytesIO(), io.BytesIO(plain)
    with zipfile.ZipFile(twice, "w") as held, pytest.warns(UserWarning, match="Duplicate name"):
        _ = [held.writestr("features.npy", b"") for _ in range(2)]
    with zipfile.ZipFile(extra, "a") as held:
        held.comment = b"made by hand"
    wrong = bytearray(plain)
    wrong[plain.index(np.ones(1).tobytes())] ^= 1
    return {
        "packed": packed.getvalue(),
        "twice": twice.getvalue(),
        "comment": extra.getvalue(),
        "checksum": bytes(wrong),
        "fortran": saved(features=np.asfortranarray(np.ones((2, 3)))),
        "objects": saved(features=np.array([None])),
        "text": saved(features=np.array(["a"])),
        "cut": plain[:-5],
        "in front": b"x" + plain,
        "empty": b"",
        "too large": saved(features=np.zeros(MOST)),
    }


def test_what_is_not_plain_is_left_to_zipfile():
    for name, data in other_archives().items():
        assert plain_arrays(data, MOST) is None, name


def test_any_byte_may_be_wrong_and_the_quick_way_never_gives_other_arrays_than_the_slow_one():
    data, rng = saved(features=np.arange(12.0).reshape(3, 4), boxes=np.ones((3, 4), np.float32)), np.random.default_rng(0)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] = rng.integers(256)
        found = plain_arrays(bytes(damaged), MOST)
        if found is not None:
            with np.load(io.BytesIO(damaged)) as slow:
                assert {name: array.tolist() for name, array in found.items()} == {name: array.tolist() for name, array in slow.items()}


def test_region_files_give_the_same_numbers_and_the_same_refusals_either_way(monkeypatch):
    boxes = np.array([[0, 0, 50, 20], [10, 5, 40, 25]], np.float32)
    given = [Regions(np.random.default_rng(0).normal(size=(2, 9)), boxes, 60, 30).to_npz(), Regions(np.ones((3, 2))).to_npz()]
    given += [saved(boxes=boxes), saved(features=np.ones(3)), saved(features=np.ones((2, 2)), width=np.ones(2)), *other_archives().values()]

    def outcome(data: bytes) -> object:
        try:
            return {name: array.tolist() for name, array in read_regions(data, 4).items()}
        except ValueError as error:
            return str(error)

    quick = [outcome(data) for data in given]
    monkeypatch.setattr(records, "plain_arrays", lambda data, most: None)
    assert quick == [outcome(data) for data in given]
    assert isinstance(quick[0], dict) and isinstance(quick[2], str)
