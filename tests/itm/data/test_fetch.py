"""The planned pairs as shards and sidecars hold them, undecoded: each row against the tar itself."""

from __future__ import annotations

import json
import pickle
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from itm.data import files
from itm.data.fetch import Fetch, Work
from itm.data.preprocess import ImageInput
from itm.data.records import Caption, Record
from itm.data.shards import Sample, read_samples, write_shard
from itm.data.sidecar import Header, Store, sidecar_uri, teacher_id, write_sidecar
from tests.support.noise_split import png, world


def samples_of(fetch: Fetch) -> list[list[Sample]]:
    return [[i for i in read_samples(files.join(fetch.split, s.name)) if isinstance(i, Sample)] for s in fetch.manifest.shards]


def whole_epoch(fetch: Fetch) -> list[pa.Table]:
    return [fetch(Work(step, 0, 0)) for step in range(fetch.plan.steps_per_epoch)]


def store(root: Path, fetch: Fetch, modality: str, broken: str = "") -> Store:
    """Vectors that spell their row: (shard, row, 1)."""
    identity = {"kind": "spelled"}
    for number, (info, samples) in enumerate(zip(fetch.manifest.shards, samples_of(fetch), strict=True)):
        captions = [(s.key, c.id) for s in samples for c in s.captions]
        keys = [key for key, _ in captions] if modality == "text" else [s.key for s in samples]
        vectors = np.array([[number, row, 1] for row in range(len(keys))], np.float32)
        header = Header(identity, modality, "fp32", info.name, info.sha256)
        ids = [c for _, c in captions] if modality == "text" else None
        write_sidecar(sidecar_uri(str(root), info.name), header, keys, vectors, ids, ["unreadable" if k == broken else None for k in keys])
    return Store(str(root), modality, "fp32", 3, identity, {})


def test_teacher_rows_belong_to_their_sample_and_caption(tmp_path: Path) -> None:
    fetch = world(tmp_path).fetch
    fetch.stores = {m: store(tmp_path / m, fetch, m) for m in ("image", "text")}
    samples = samples_of(fetch)
    for step in range(fetch.plan.steps_per_epoch):
        table = fetch(Work(step, 0, 0))
        for row, (shard, number) in enumerate(fetch.plan.batch_pairs(step, 0, 0).tolist()):
            image_row = [s.key for s in samples[shard]].index(table["key"][row].as_py())
            for modality, at in (("image", image_row), ("text", number)):
                want = np.array([shard, at, 1]) / np.linalg.norm([shard, at, 1])
                np.testing.assert_allclose(table[f"teacher_{modality}"][row].as_py(), want, rtol=1e-6)


def test_a_sample_that_its_teacher_could_not_read_is_told(tmp_path: Path) -> None:
    fetch = world(tmp_path, batch=36).fetch
    fetch.stores = {"image": store(tmp_path / "image", fetch, "image", broken="k001")}
    problems = {json.loads(p)["reason"] for p in fetch(Work(0, 0, 0))["problem"].to_pylist() if p}
    assert problems == {"no image teacher vector: unreadable"}


def test_a_sidecar_of_other_rows_is_refused(tmp_path: Path) -> None:
    fetch = world(tmp_path).fetch
    fetch.stores = {"text": store(tmp_path / "text", fetch, "text")}
    info = fetch.manifest.shards[0]
    uri = sidecar_uri(str(tmp_path / "text"), info.name)
    captions = [(s.key, c.id) for s in samples_of(fetch)[0] for c in s.captions][::-1]
    header = Header({"kind": "spelled"}, "text", "fp32", info.name, info.sha256)
    write_sidecar(uri, header, [k for k, _ in captions], np.ones((len(captions), 3), np.float32), [c for _, c in captions])
    assert teacher_id(header.identity) == fetch.stores["text"].teacher
    with pytest.raises(ValueError, match=r"row \d+ is of .*itm teach"):
        whole_epoch(fetch)


def test_shards_that_changed_after_their_manifest_are_refused(tmp_path: Path) -> None:
    fetch = world(tmp_path).fetch
    write_shard(files.join(tmp_path, "train", "00000.tar"), [Record("other", "train", [Caption("c", "a red thing")], png(0), "png")])
    with pytest.raises(ValueError, match=r"00000\.tar has sha256 \w+, its manifest says \w+: the shard changed after the manifest"):
        whole_epoch(fetch)


@pytest.mark.parametrize("kind", ["pixels", "regions"])
def test_a_row_holds_the_bytes_of_its_member_and_the_caption_that_the_plan_names(tmp_path: Path, kind: str) -> None:
    fetch = world(tmp_path, ImageInput(kind=kind), regions=True).fetch
    held: list[list[tuple[str, bytes, str, str]]] = []
    for shard in fetch.manifest.shards:
        with tarfile.open(tmp_path / "train" / shard.name) as archive:
            data = {m.name: archive.extractfile(m).read() for m in archive}
        rows = held.append([]) or held[-1]
        for name in data:
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                content = data[f"{key}.{'png' if kind == 'pixels' else 'regions.npz'}"]
                rows += [(key, content, c["id"], c["text"]) for c in json.loads(data[name])["captions"]]
    for step, table in enumerate(whole_epoch(fetch)):
        wanted = [held[shard][row] for shard, row in fetch.plan.batch_pairs(step, 0, 0).tolist()]
        columns = [table[name].to_pylist() for name in ("key", "data", "caption", "text")]
        assert list(zip(*columns, strict=True)) == wanted
        ids, keys = table["image_id"].to_pylist(), [key for key, *_ in wanted]
        assert [ids.index(i) for i in ids] == [keys.index(key) for key in keys]
        assert table["step"].to_pylist() == [step] * 6
        assert table["problem"].null_count == 6


def test_a_copy_in_another_process_reads_the_same(tmp_path: Path) -> None:
    fetch = world(tmp_path).fetch
    before = fetch(Work(1, 0, 0))  # its files are open now, and do not travel
    assert pickle.loads(pickle.dumps(fetch))(Work(1, 0, 0)).equals(before)


def test_a_sample_without_the_wanted_file_is_a_problem_and_a_batch_of_those_an_error(tmp_path: Path) -> None:
    fetch = world(tmp_path).fetch
    fetch.kind = "regions"
    with pytest.raises(ValueError, match="not one of the 6 pairs of step 0 can be used; the first: .*no regions in this sample"):
        fetch(Work(0, 0, 0))


class Slow:
    """A file of a store that answers after a while; counts how many answers are waited for at a time."""

    waiting, most, lock = 0, 0, threading.Lock()

    def __init__(self, file: pa.NativeFile) -> None:
        self.file = file

    def read_at(self, count: int, start: int) -> bytes:
        with Slow.lock:
            Slow.waiting += 1
            Slow.most = max(Slow.most, Slow.waiting)
        time.sleep(0.02)
        with Slow.lock:
            Slow.waiting -= 1
            return self.file.read_at(count, start)


def test_a_store_is_asked_for_many_samples_at_a_time_and_the_rows_are_those_of_one_reader(tmp_path: Path) -> None:
    here = world(tmp_path, batch=20).fetch
    assert here.readers == 1, "a disk"
    there = Fetch("s3://bucket/train", here.manifest, here.plan, here.kind, {})
    assert there.readers > 8
    there.split, there.folders = here.split, here.folders
    there = pickle.loads(pickle.dumps(there))  # as an actor gets it
    plain = there._shard
    there._shard = lambda shard: plain(shard)._replace(file=Slow(plain(shard).file))
    assert [there(Work(step, 0, 0)) for step in range(2)] == [here(Work(step, 0, 0)) for step in range(2)]
    assert Slow.most > 8
